import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import bayescal as bc
from bayescal.decompose import mutual_information

pytestmark = pytest.mark.core


def test_total_disagreement_is_log_2():
    # two members, each certain, of different classes: nothing aleatoric, log 2 epistemic
    logits = jnp.array([[[40.0, -40.0]], [[-40.0, 40.0]]])
    parts = bc.decompose(bc.Categorical(logits))
    np.testing.assert_allclose(parts.epistemic, [math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(parts.aleatoric, [0], atol=1e-6)
    np.testing.assert_allclose(parts.total, [math.log(2)], rtol=1e-6)


def test_agreement_is_all_aleatoric():
    parts = bc.decompose(bc.Categorical(jnp.zeros((3, 1, 4))))
    assert parts.epistemic[0] == 0
    np.testing.assert_allclose(parts.aleatoric, [math.log(4)], rtol=1e-6)


def test_one_hot_disagreement_of_many_is_log_of_their_number():
    logits = 200 * jnp.eye(7)[:, None, :]
    np.testing.assert_allclose(bc.decompose(bc.Categorical(logits)).epistemic, [math.log(7)], rtol=1e-6)


def test_impossible_classes_disagree():
    logits = jnp.array([[[0.0, -jnp.inf]], [[-jnp.inf, 0.0]]])
    np.testing.assert_allclose(bc.decompose(bc.Categorical(logits)).epistemic, [math.log(2)], rtol=1e-6)
    never = jnp.full((2, 1, 3), -jnp.inf).at[:, :, 0].set(0)
    assert bc.decompose(bc.Categorical(never)).total[0] == 0


FAMILIES = {
    "random": lambda rng, s, n, c: rng.normal(size=(s, n, c)),
    "confident": lambda rng, s, n, c: 30 * rng.normal(size=(s, n, c)),
    "near agreement": lambda rng, s, n, c: rng.normal(size=(1, n, c)) * 3 + 1e-3 * rng.normal(size=(s, n, c)),
    "impossible classes": lambda rng, s, n, c: np.where(
        (rng.uniform(size=(s, n, c)) < 0.3) & (np.arange(c) > 0), -np.inf, rng.normal(size=(s, n, c))
    ),
    "one hot": lambda rng, s, n, c: 60 * np.eye(c)[rng.integers(0, c, size=(s, n))],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("members", "classes"), [(2, 2), (5, 10), (7, 100)])
def test_mutual_information_against_long_double(rng, family, members, classes):
    logits = FAMILIES[family](rng, members, 40, classes).astype(np.float32)
    ours = np.asarray(mutual_information(bc.Categorical(logits)), np.float64)
    truth = oracles.mutual_information(logits)
    assert (ours >= 0).all()
    shown = truth > 1e-8
    error = np.abs(ours - truth)[shown] / truth[shown]
    if shown.any():
        assert np.median(error) < 1e-6
        assert error.max() < 1e-4


def test_a_difference_of_entropies_would_fail(rng):
    """What the Bregman form is for: H - H in float32 is off by tens of percent, and negative for many inputs."""
    logits = (rng.normal(size=(1, 500, 10)) * 3 + 1e-3 * rng.normal(size=(5, 500, 10))).astype(np.float32)
    pred = bc.Categorical(logits)
    naive = np.asarray(pred.entropy() - pred.member_entropy().mean(0))
    ours = np.asarray(bc.decompose(pred).epistemic)
    truth = oracles.mutual_information(logits)
    assert (naive < 0).mean() > 0.02 and (ours >= 0).all()
    assert np.median(np.abs(naive - truth) / truth) > 0.05 > 1e4 * np.median(np.abs(ours - truth) / truth)


def test_parts_against_loops(rng, strict):
    logits = rng.normal(size=(4, 6, 5)).astype(np.float32) * 2
    parts = bc.decompose(bc.Categorical(logits))
    aleatoric = [np.mean([oracles.entropy(oracles.softmax(logits[s, i])) for s in range(4)]) for i in range(6)]
    total = [oracles.entropy(p) for p in oracles.pool(logits)]
    np.testing.assert_allclose(parts.aleatoric, aleatoric, rtol=1e-5)
    np.testing.assert_allclose(parts.total, total, rtol=1e-5)
    np.testing.assert_array_equal(parts.total, parts.aleatoric + parts.epistemic)
    energies = [-np.mean([math.log(np.exp(logits[s, i].astype(float)).sum()) for s in range(4)]) for i in range(6)]
    np.testing.assert_allclose(parts.ood, energies, rtol=1e-5)


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-8])
def test_a_member_of_tiny_weight(rng, small):
    logits = rng.normal(size=(2, 20, 4)).astype(np.float32) * 8
    weights = np.array([1, small], np.float32)
    ours = np.asarray(mutual_information(bc.Categorical(logits, weights)))
    np.testing.assert_allclose(ours, oracles.mutual_information(logits, weights), rtol=1e-3)


def test_weights_are_repetition(rng):
    logits = rng.normal(size=(3, 6, 5)).astype(np.float32)
    weighted = bc.decompose(bc.Categorical(logits, np.array([2.0, 0.0, 1.0], np.float32)))
    repeated = bc.decompose(bc.Categorical(logits[[0, 0, 2]]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), weighted, repeated)


def test_duplicated_members_and_order(rng):
    logits = rng.normal(size=(3, 6, 5)).astype(np.float32)
    parts = bc.decompose(bc.Categorical(logits))
    for other in (logits[[2, 0, 1]], np.concatenate([logits, logits])):
        again = bc.decompose(bc.Categorical(other))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), parts, again)


def test_one_member_has_no_epistemic_part(rng):
    logits = rng.normal(size=(1, 6, 5)).astype(np.float32)
    assert not bc.decompose(bc.Categorical(logits)).epistemic.any()
    assert not bc.decompose(bc.Bernoulli(logits[..., 0])).epistemic.any()
    assert not bc.decompose(bc.Gaussian(1000 + logits, np.exp(logits))).epistemic.any()


def test_gaussian_law_of_total_variance():
    # means 1 and 3, variances 1 and 2: aleatoric 1.5, epistemic 1, total 2.5
    pred = bc.Gaussian(jnp.array([[[1.0]], [[3.0]]]), jnp.array([[[1.0]], [[2.0]]]))
    parts = bc.decompose(pred)
    np.testing.assert_allclose([x[0, 0] for x in parts[:3]], [2.5, 1.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(parts.ood, [0.5 * math.log(1 + 1 / 1.5)], rtol=1e-6)
    known = bc.Gaussian(jnp.array([[[1.0]]]), jnp.array([[[1.0]]]), mean_variance=jnp.array([[[0.5]]]))
    np.testing.assert_allclose([x[0, 0] for x in bc.decompose(known)[:3]], [1.5, 1.0, 0.5], rtol=1e-6)


def test_gaussian_variance_does_not_cancel(rng):
    """Mean 1000, spread 0.05: a one-pass variance in float32 is off a hundredfold."""
    mean = (1000 + 0.05 * rng.normal(size=(30, 4, 1))).astype(np.float32)
    parts = bc.decompose(bc.Gaussian(mean, np.ones_like(mean)))
    np.testing.assert_allclose(parts.epistemic, mean.astype(np.float64).var(0), rtol=1e-3)
    one_pass = (mean**2).mean(0) - mean.mean(0) ** 2
    assert np.abs(one_pass / mean.astype(np.float64).var(0) - 1).max() > 1


def test_nan_stays_nan():
    logits = jnp.zeros((2, 3, 4)).at[0, 1, 2].set(jnp.nan)
    parts = bc.decompose(bc.Categorical(logits))
    for part in parts:
        assert np.isnan(part[1]) and np.isfinite(part[jnp.array([0, 2])]).all()


def test_own_measure_and_score(rng):
    pred = bc.Categorical(rng.normal(size=(3, 6, 5)).astype(np.float32))

    def zero_one(pred):
        each = jnp.exp(pred.member_log_probs()).max(-1)
        total = 1 - pred.pooled_mean().max(-1)
        return 1 - each.mean(0), total - (1 - each.mean(0))

    parts = bc.decompose(pred, measure=zero_one, ood=bc.scores.max_probability)
    np.testing.assert_allclose(parts.total, 1 - pred.pooled_mean().max(-1), rtol=1e-6)
    np.testing.assert_allclose(parts.ood, -np.log(pred.pooled_mean().max(-1)), rtol=1e-5)


def test_no_predictive(unchecked):
    with pytest.raises(TypeError, match=r"`pred` must be a predictive \(Categorical, .*Dirichlet\), got ndarray"):
        bc.decompose(np.zeros((2, 3, 4)))


def test_gradient_is_finite_where_members_agree():
    gradient = jax.grad(lambda z: mutual_information(bc.Categorical(z)).sum())(jnp.zeros((3, 2, 4)))
    assert np.isfinite(gradient).all()
    spread = jax.grad(lambda z: mutual_information(bc.Categorical(z)).sum())(
        jax.random.normal(jax.random.key(0), (3, 2, 4)) * 30
    )
    assert np.isfinite(spread).all()
