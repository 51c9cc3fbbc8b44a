"""Scores of outputs: against loops, in the right direction, blind to what they should not see, NaN in and out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import bayescal as bc
from bayescal.scores import output

pytestmark = pytest.mark.core

SCORES = {name: getattr(output, name) for name in output.__all__}
OF_LEVEL = (
    "free_energy",
    "free_energy_of_mean",
    "max_logit",
    "dempster_shafer",
)  # they look at the level of the logits
WEIGHTS = np.array([2, 0, 1, 0.5], np.float32)


def slow(logits, weights):
    """Every score of one example, logits (member, classes), float64."""
    w = weights / weights.sum()
    kept = [s for s in range(len(w)) if w[s] > 0]
    probs = {s: np.array(oracles.softmax(logits[s])) for s in kept}
    pool = sum(w[s] * probs[s] for s in kept)
    classes = len(pool)
    energy = {s: -math.log(sum(math.exp(z) for z in logits[s])) for s in kept}
    votes = np.zeros(classes)
    for s in kept:
        votes[logits[s].argmax()] += w[s]
    falling = np.sort(pool)[::-1]
    mean = sum(w[s] * logits[s] for s in kept)
    return {
        "max_probability": -math.log(pool.max()),
        "margin": math.log(falling[1]) - math.log(falling[0]),
        "entropy": oracles.entropy(pool),
        "generalised_entropy": sum((p * (1 - p)) ** 0.1 for p in pool),
        "kl_from_uniform": math.log(classes) + sum(math.log(p) for p in pool) / classes,
        "max_logit": sum(w[s] * -max(logits[s]) for s in kept),
        "free_energy": sum(w[s] * energy[s] for s in kept),
        "free_energy_of_mean": -math.log(sum(math.exp(z) for z in mean)),
        "dempster_shafer": sum(w[s] * classes / (classes + math.exp(-energy[s])) for s in kept),
        "variation_ratio": 1 - votes.max(),
        "member_disagreement": sum(w[s] * w[t] for s in kept for t in kept if logits[s].argmax() != logits[t].argmax()),
        "mutual_information": oracles.entropy(pool) - sum(w[s] * oracles.entropy(probs[s]) for s in kept),
    }


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_against_loops(rng, name, weights):
    logits = (2 * rng.normal(size=(4, 25, 5))).astype(np.float32)
    given = np.ones(4) if weights is None else weights
    expected = [slow(logits[:, i].astype(float), given)[name] for i in range(25)]
    if weights is not None:
        logits[1] = np.nan  # of weight 0
    ours = jax.jit(SCORES[name])(bc.Categorical(logits, weights))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_by_hand():
    # two members, certain of other classes of two: pool (1/2, 1/2)
    pred = bc.Categorical(jnp.array([[[40.0, -40.0]], [[-40.0, 40.0]]]))
    expected = {
        "max_probability": math.log(2),
        "margin": 0,
        "entropy": math.log(2),
        "generalised_entropy": 2 * 0.25**0.1,
        "kl_from_uniform": 0,
        "max_logit": -40,
        "free_energy": -40,
        "free_energy_of_mean": -math.log(2),
        "dempster_shafer": 0,
        "variation_ratio": 0.5,
        "member_disagreement": 0.5,
        "mutual_information": math.log(2),
    }
    assert expected.keys() == SCORES.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(SCORES[name](pred), [value], atol=1e-6, err_msg=name)


def test_higher_is_more_unlike():
    sure, unsure = jnp.array([[[9.0, 0.0, 0.0]]] * 2), jnp.array([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    for name, score in SCORES.items():
        assert score(bc.Categorical(unsure))[0] > score(bc.Categorical(sure))[0], name


def test_a_shift_of_all_logits(rng):
    """Moves the energies and the largest logit by as much, and nothing else at all."""
    logits = rng.normal(size=(3, 20, 4)).astype(np.float32)
    for name, score in SCORES.items():
        before, after = (np.asarray(score(bc.Categorical(z))) for z in (logits, logits + 3))
        if name == "dempster_shafer":
            assert (after < before).all()
        else:
            np.testing.assert_allclose(after, before - 3 * (name in OF_LEVEL), rtol=1e-4, atol=1e-5, err_msg=name)


def test_order_of_members_and_names_of_classes(rng):
    logits = rng.normal(size=(3, 20, 4)).astype(np.float32)
    for name, score in SCORES.items():
        base = score(bc.Categorical(logits))
        for other in (logits[::-1], logits[..., ::-1], np.concatenate([logits, logits])):
            np.testing.assert_allclose(score(bc.Categorical(other)), base, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", SCORES)
def test_nan_is_never_familiar(rng, name):
    logits = rng.normal(size=(3, 6, 4)).astype(np.float32)
    logits[1, 2, 3] = np.nan
    for jitted in (SCORES[name], jax.jit(SCORES[name])):
        values = np.asarray(jitted(bc.Categorical(logits)))
        assert np.isnan(values[2]) and np.isfinite(np.delete(values, 2)).all()


@pytest.mark.parametrize("members", [1, 3, 7, 21])
def test_sure_rows_are_told_apart(rng, members):
    """Where p rounds to one in float32, what is left for the others still ranks rows, and to float64's figures."""
    logits = rng.normal(size=(members, 200, 10)).astype(np.float32)
    logits[..., 0] += rng.uniform(15, 35, size=200).astype(np.float32)
    pred = bc.Categorical(logits)
    shifted = logits.astype(np.longdouble) - logits.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    rest = probs.mean(0)[:, 1:].sum(-1)
    others = probs.mean(0)[:, 1:]
    truth = {
        "max_probability": -np.log1p(-rest),
        "entropy": -(1 - rest) * np.log1p(-rest) - (others * np.log(others)).sum(-1),
        "generalised_entropy": ((1 - rest) * rest) ** 0.1 + ((others * (1 - others)) ** 0.1).sum(-1),
    }
    for name, values in truth.items():
        ours = np.asarray(SCORES[name](pred))
        np.testing.assert_allclose(ours, np.asarray(values, float), rtol=2e-5, err_msg=name)
        assert (ours > 0).all() and len(np.unique(ours)) > 190
    assert not np.asarray(output.variation_ratio(pred)).any() and not np.asarray(output.member_disagreement(pred)).any()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("row", [[np.inf, 0, 0], [-np.inf, -np.inf, -np.inf]])
def test_what_is_undefined_is_never_familiar(name, row):
    pred = bc.Categorical(np.array([[row], [[0.0, 1.0, 2.0]]], np.float32))
    assert np.isnan(SCORES[name](pred)).all() and np.isnan(jax.jit(SCORES[name])(pred)).all()


def test_energy_of_mean_is_never_below_the_mean_of_energies(rng):
    pred = bc.Categorical((3 * rng.normal(size=(5, 200, 6))).astype(np.float32))
    assert (np.asarray(output.free_energy_of_mean(pred)) >= np.asarray(output.free_energy(pred)) - 1e-5).all()


def test_other_families(rng, unchecked):
    """One logit, probabilities and Dirichlets give what the same distributions as logits give."""
    z = rng.normal(size=(3, 8)).astype(np.float32)
    two = bc.Categorical(np.stack([-z / 2, z / 2], -1))
    probs = bc.Probabilities(np.asarray(jnp.exp(two.member_log_probs())))
    dirichlet = bc.Dirichlet(7 * probs.probs)
    for name, score in SCORES.items():
        np.testing.assert_allclose(score(bc.Bernoulli(z)), score(two), rtol=1e-5, atol=1e-6, err_msg=name)
        if name in OF_LEVEL:
            with pytest.raises(TypeError, match=f"`{name}` does not exist for Probabilities"):
                score(probs)
            continue
        np.testing.assert_allclose(score(probs), score(two), rtol=1e-4, atol=1e-5, err_msg=name)
        if name != "mutual_information":
            np.testing.assert_allclose(score(dirichlet), score(two), rtol=1e-4, atol=1e-5, err_msg=name)


def test_generalised_entropy_of_the_largest(rng):
    pred = bc.Categorical(rng.normal(size=(1, 9, 6)).astype(np.float32))
    falling = np.sort(np.asarray(pred.pooled_mean()), -1)[:, ::-1]
    expected = ((falling * (1 - falling)) ** 0.5)[:, :2].sum(-1)
    np.testing.assert_allclose(output.generalised_entropy(pred, gamma=0.5, top=2), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: output.max_logit(bc.pool(p)), ValueError, "`max_logit` needs a network's raw logits"),
        (lambda p: output.free_energy_of_mean(bc.pool(p)), ValueError, "`free_energy_of_mean` needs a network's raw"),
        (lambda p: output.dempster_shafer(bc.pool(p)), ValueError, "`dempster_shafer` needs a network's raw logits"),
        (lambda p: output.free_energy(bc.pool(p)), ValueError, "`free_energy` needs a network's raw logits"),
        (
            lambda p: output.max_logit(bc.Probabilities(p.pooled_mean()[None])),
            TypeError,
            "`max_logit` does not exist for",
        ),
        (
            lambda p: output.variation_ratio(bc.Gaussian(p.logits, p.logits + 1)),
            TypeError,
            "`a vote of members` does not",
        ),
        (lambda p: output.margin(bc.Categorical(p.logits[..., :1])), ValueError, "`margin` needs at least two classes"),
        (lambda p: output.generalised_entropy(p, gamma=1.0), ValueError, r"`gamma` must lie in \(0, 1\)"),
        (lambda p: output.generalised_entropy(p, top=0), ValueError, "`top` be at least 1, got 0.1 and 0"),
    ],
)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call(bc.Categorical(jnp.zeros((2, 3, 4))))


@pytest.fixture(scope="module")
def moons():
    """An ensemble trained on two moons: its predictions on new points of both, and on points in the gap between them."""
    import optax
    from sklearn.datasets import make_moons

    inputs, labels = make_moons(400, noise=0.1, random_state=0)
    train = bc.Dataset(inputs.astype(np.float32), labels.astype(np.int32))
    method = bc.ensemble(bc.map_estimate(bc.models.mlp(2, (32, 32), 2), bc.Categorical, optax.adam(1e-2)), 5)
    state = bc.fit(method, train, jax.random.key(0), epochs=30, batch_size=50, progress=False).state
    inside, _ = make_moons(200, noise=0.1, random_state=1)
    gap = np.random.default_rng(0).normal([0.5, 0.25], 0.08, size=(200, 2))
    pred = bc.predict(method, state, np.concatenate([inside, gap]).astype(np.float32), None)
    return jax.tree.map(np.asarray, pred), np.arange(400) >= 200


@pytest.mark.parametrize("name", SCORES)
def test_finds_the_gap_between_two_moons(moons, name):
    pred, outside = moons
    found = float(bc.auroc(np.asarray(SCORES[name](pred)), outside))
    assert found > (0.6 if name in ("variation_ratio", "member_disagreement") else 0.9), found  # the votes of five tie
