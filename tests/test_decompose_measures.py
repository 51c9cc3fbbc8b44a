"""Measures beside the default: divergences between members, proper scores, Dirichlets, normals, few members."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_decompose as slow
import pytest
from scipy.special import entr

import bayescal as bc
from bayescal.decompose import (
    class_variance_parts,
    corrected_mutual_information,
    differential_entropy,
    distributional_uncertainty,
    entropy_bound_parts,
    entropy_parts,
    information_bounds,
    mutual_information,
    pairwise_divergence,
    pairwise_parts,
    proper_score_parts,
    reverse_mutual_information,
    vacuity,
    zero_one_parts,
)

pytestmark = pytest.mark.core

WEIGHTS = [None, np.array([2, 0, 1, 0.5], np.float32), np.array([0, 2, 1, 0.5], np.float32)]
spherical_parts = proper_score_parts(lambda p: 1 - jnp.sqrt((p**2).sum()))
brier_parts = proper_score_parts(lambda p: 1 - (p**2).sum())


def example(rng, scale=2.0, rows=30, classes=5):
    logits = (scale * rng.normal(size=(4, rows, classes))).astype(np.float32)
    return logits, np.array([[oracles.softmax(logits[s, i]) for i in range(rows)] for s in range(4)])


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted", "without the first"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
def test_divergences_against_loops(rng, weights, scale):
    logits, probs = example(rng, scale)
    pred = bc.Categorical(logits, weights)
    rows = range(logits.shape[1])
    truth = {
        pairwise_divergence: [slow.pairwise_divergence(probs[:, i], weights) for i in rows],
        reverse_mutual_information: [slow.reverse_information(probs[:, i], weights) for i in rows],
        mutual_information: oracles.mutual_information(logits, weights),
    }
    for function, expected in truth.items():
        # the loops themselves lose digits of nearly equal members
        np.testing.assert_allclose(
            function(pred), expected, rtol=1e-5 if scale > 1e-3 else 1e-4, err_msg=function.__name__
        )
    both = mutual_information(pred) + reverse_mutual_information(pred)
    np.testing.assert_allclose(pairwise_divergence(pred), both, rtol=1e-6)
    parts = bc.decompose(pred, measure=pairwise_parts)
    np.testing.assert_allclose(parts.aleatoric, entropy_parts(pred)[0], rtol=1e-6)
    np.testing.assert_allclose(parts.epistemic, both, rtol=1e-6)


def test_divergences_by_hand():
    # (0.5, 0.5) and (0.9, 0.1): KL one way 0.5108, the other 0.3681; half of each, and of zero with itself
    pred = bc.Probabilities(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]]))
    np.testing.assert_allclose(pairwise_divergence(pred), [(0.510826 + 0.368064) / 4], rtol=1e-5)


def test_who_rules_out_what_another_allows():
    pred = bc.Categorical(jnp.array([[[0.0, -jnp.inf]], [[0.0, 0.0]]]))
    assert np.isinf(reverse_mutual_information(pred)[0]) and np.isinf(pairwise_divergence(pred)[0])
    assert np.isfinite(mutual_information(pred)[0])
    never = bc.Categorical(jnp.array([[[0.0, 1.0, -jnp.inf]], [[1.0, 0.0, -jnp.inf]]]))
    without = bc.Categorical(never.logits[..., :2])
    np.testing.assert_allclose(pairwise_divergence(never), pairwise_divergence(without), rtol=1e-6)


def test_probabilities_keep_the_digits_of_their_differences(rng):
    base = rng.dirichlet(np.ones(6), size=(1, 40))
    probs = (base * (1 + 1e-5 * rng.normal(size=(5, 40, 6)))).astype(np.float32)
    mean = probs.astype(float).mean(0)
    ratio = probs / mean
    truth = (mean * (ratio * np.log(ratio) - ratio + 1)).mean(0).sum(-1)
    np.testing.assert_allclose(mutual_information(bc.Probabilities(probs)), truth, rtol=1e-4)
    lost = np.asarray(mutual_information(bc.Categorical(np.log(probs))))
    assert np.median(abs(lost / truth - 1)) > 1e-3
    hard = np.eye(3, dtype=np.float32)[:, None]
    np.testing.assert_allclose(mutual_information(bc.Probabilities(hard)), [math.log(3)], rtol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted", "without the first"])
def test_proper_scores_against_loops(rng, weights):
    logits, probs = example(rng)
    measures = {class_variance_parts: "brier", brier_parts: "brier", zero_one_parts: "zero one", entropy_parts: "log"}
    for family in (bc.Categorical(logits, weights), bc.Probabilities(probs.astype(np.float32), weights)):
        for measure, entropy in measures.items():
            parts = bc.decompose(family, measure=measure)
            expected = [slow.generalised(probs[:, i], slow.ENTROPIES[entropy], weights) for i in range(30)]
            np.testing.assert_allclose(parts.aleatoric, [e[0] for e in expected], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(parts.epistemic, [e[1] for e in expected], rtol=1e-4, atol=1e-6)
            assert (np.asarray(parts.epistemic) >= 0).all()
    expected = [slow.generalised(probs[:, i], lambda p: 1 - np.sqrt((p**2).sum()), weights)[1] for i in range(30)]
    found = bc.decompose(bc.Categorical(logits, weights), measure=spherical_parts)
    np.testing.assert_allclose(found.epistemic, expected, rtol=1e-4, atol=1e-6)


def test_proper_scores_by_hand():
    # (1, 0) and (0, 1): nothing aleatoric, total 1 - 1/2 in both; two classes given by one logit are the same
    pred = bc.Probabilities(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    for measure in (class_variance_parts, zero_one_parts):
        np.testing.assert_allclose([x[0] for x in bc.decompose(pred, measure=measure)[:3]], [0.5, 0, 0.5], atol=1e-6)
    one = bc.decompose(bc.Bernoulli(jnp.array([[1.0], [-2.0]])), measure=class_variance_parts)
    two = bc.decompose(bc.Categorical(jnp.array([[[0.0, 1.0]], [[0.0, -2.0]]])), measure=class_variance_parts)
    np.testing.assert_allclose(one[:3], two[:3], rtol=1e-5)


@pytest.mark.parametrize("measure", [class_variance_parts, zero_one_parts, spherical_parts, pairwise_parts])
def test_measures_keep_their_promises(rng, measure):
    """One member and equal members: exactly nothing epistemic. Order and copies of members do not matter; NaN does."""
    logits, _ = example(rng)
    assert not bc.decompose(bc.Categorical(logits[:1]), measure=measure).epistemic.any()
    same = bc.decompose(bc.Categorical(logits[[0, 0, 0]]), measure=measure).epistemic
    np.testing.assert_allclose(same, 0, atol=1e-7)
    parts = bc.decompose(bc.Categorical(logits), measure=measure)
    for other in (logits[::-1], np.concatenate([logits, logits])):
        again = bc.decompose(bc.Categorical(other), measure=measure)
        np.testing.assert_allclose(again.epistemic, parts.epistemic, rtol=1e-5, atol=1e-6)
    broken = logits.copy()
    broken[1, 3, 0] = np.nan
    parts = bc.decompose(bc.Categorical(broken), measure=measure)
    assert np.isnan(parts.epistemic[3]) and np.isnan(parts.aleatoric[3])
    assert np.isfinite(np.delete(np.asarray(parts.epistemic), 3)).all()


def test_dirichlet_against_draws(key):
    concentration = jnp.array([[1.0, 1.0, 1.0], [0.2, 3.0, 0.5], [20.0, 5.0, 1.0], [300.0, 200.0, 100.0]])
    parts = bc.decompose(bc.Dirichlet(concentration[None]))
    drawn = np.asarray(jax.random.dirichlet(key, concentration, (100_000, 4)), np.float64)
    entropy = -np.where(drawn > 0, drawn * np.log(np.where(drawn > 0, drawn, 1)), 0).sum(-1)
    error = entropy.std(0) / np.sqrt(len(drawn))
    assert (abs(parts.aleatoric - entropy.mean(0)) < 4 * error + 1e-5).all()
    mean = np.asarray(concentration / concentration.sum(-1, keepdims=True), np.float64)
    total = [oracles.entropy(p) for p in mean]
    np.testing.assert_allclose(parts.total, total, rtol=1e-5)
    np.testing.assert_allclose(parts.epistemic, total - entropy.mean(0), atol=float(4 * error.max()) + 1e-5)
    np.testing.assert_allclose(parts.ood, 3 / concentration.sum(-1), rtol=1e-6)


def test_dirichlet_by_hand_and_against_scipy():
    from scipy.special import digamma
    from scipy.stats import dirichlet

    # Dir(1, 1): total log 2, aleatoric psi(3) - psi(2) = 1/2
    parts = bc.decompose(bc.Dirichlet(jnp.ones((1, 1, 2))))
    np.testing.assert_allclose([x[0] for x in parts], [math.log(2), 0.5, math.log(2) - 0.5, 1], rtol=1e-5)
    for a in ([0.3, 2.0, 7.9], [8.1, 50.0, 1e3], [1e5, 1e6, 3e6]):
        a = np.array(a)
        p = a / a.sum()
        truth = (p * ((digamma(a + 1) - np.log(a)) - (digamma(a.sum() + 1) - np.log(a.sum())))).sum()
        pred = bc.Dirichlet(a[None, None].astype(np.float32))
        np.testing.assert_allclose(distributional_uncertainty(pred), [truth], rtol=2e-5)
        np.testing.assert_allclose(differential_entropy(pred), [dirichlet(a).entropy()], rtol=1e-5, atol=1e-5)
    naive = np.float32(digamma(np.float32(1e6))) - np.float32(digamma(np.float32(4.1e6)))  # what the form is for
    assert abs(naive) > 1


def test_an_ensemble_of_dirichlets(rng):
    """Its epistemic part is its members' own and what is between them; known ones leave what is between alone."""
    concentration = rng.gamma(2, 2, size=(3, 20, 4)).astype(np.float32)
    pred = bc.Dirichlet(concentration)
    parts = bc.decompose(pred)
    means = concentration / concentration.sum(-1, keepdims=True)
    between = mutual_information(bc.Probabilities(means))
    np.testing.assert_allclose(parts.epistemic, distributional_uncertainty(pred) + between, rtol=1e-5)
    np.testing.assert_allclose(parts.total, pred.entropy(), rtol=1e-5)
    sharp = bc.decompose(bc.Dirichlet(means * 1e7))
    np.testing.assert_allclose(sharp.epistemic, between, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sharp.aleatoric, entropy_parts(bc.Probabilities(means))[0], rtol=1e-4)
    np.testing.assert_allclose(pred.log_probs(), np.log(means.mean(0)), rtol=1e-5)
    assert (np.asarray(vacuity(pred)) > np.asarray(vacuity(bc.Dirichlet(2 * concentration)))).all()
    assert bc.take(pred, [1, 2]).batch_shape == (2,) and pred.top_label()[1].shape == (20,)
    np.testing.assert_allclose(bc.evaluate(pred, means.mean(0).argmax(-1), {"a": bc.accuracy()})["a"].value, 1)


def test_bounds_enclose_the_information_of_normals(rng, key):
    mean = rng.normal(size=(4, 12, 2)).astype(np.float32) * np.geomspace(0.01, 20, 12)[:, None].astype(np.float32)
    variance = np.exp(rng.normal(size=(4, 12, 2))).astype(np.float32)
    weights = np.array([1, 2, 0, 1], np.float32)
    pred = bc.Gaussian(mean, variance, None, weights)
    low, high = (np.asarray(x) for x in information_bounds(pred))
    drawn = jax.vmap(pred.sample)(jax.random.split(key, 4_000))
    surprise = -np.asarray(jax.vmap(pred.log_prob)(drawn), np.float64)
    own = np.average(np.asarray(pred.member_entropy()), axis=0, weights=weights)
    information, error = surprise.mean(0) - own, surprise.std(0) / np.sqrt(len(surprise))
    assert (low - 4 * error <= information).all() and (information <= high + 4 * error).all()
    most = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert (low >= 0).all() and (high <= most + 1e-5).all() and (low < high + 1e-6).all()
    parts = bc.decompose(pred, measure=entropy_bound_parts)
    np.testing.assert_allclose(parts.aleatoric, own, rtol=1e-5)
    np.testing.assert_allclose(parts.epistemic, high, rtol=1e-6)
    for same in (bc.Gaussian(mean[:1], variance[:1]), bc.Gaussian(mean[[0, 0]], variance[[0, 0]])):
        np.testing.assert_allclose(information_bounds(same), 0, atol=1e-6)


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4])
def test_bounds_of_normals_that_nearly_agree(rng, apart):
    """Against the same sums in long double: neither bound falls below zero, or to it."""
    mean = (apart * rng.normal(size=(4, 50, 2))).astype(np.float32)
    variance = np.exp(apart * rng.normal(size=(4, 50, 2))).astype(np.float32)
    m, v = mean.astype(np.longdouble), variance.astype(np.longdouble)
    square, one, other = (m[:, None] - m[None]) ** 2, v[:, None], v[None]
    near = (square / (one + other) / 4 + np.log((one + other) / (2 * np.sqrt(one * other))) / 2).sum(-1)
    far = ((square + one) / other - 1 - np.log(one / other)).sum(-1) / 2
    for ours, distance in zip(information_bounds(bc.Gaussian(mean, variance)), (near, far), strict=True):
        truth = -np.log1p(np.expm1(-distance).mean(1)).mean(0)
        np.testing.assert_allclose(ours, truth.astype(float), rtol=2e-4 if apart < 1e-2 else 1e-5)


@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0])
def test_proper_scores_of_members_that_nearly_agree(rng, apart):
    """The Brier score's divergence is the squared distance, which a difference of entropies would lose."""
    base = 2 * rng.normal(size=(1, 40, 5))
    logits = (base + apart * rng.normal(size=(4, 40, 5))).astype(np.float32)
    probs = np.array([[oracles.softmax(z) for z in rows] for rows in logits.astype(float)])
    truth = probs.var(0).sum(-1)
    for measure in (brier_parts, class_variance_parts):
        np.testing.assert_allclose(bc.decompose(bc.Categorical(logits), measure=measure).epistemic, truth, rtol=5e-3)
    spherical = np.asarray(bc.decompose(bc.Categorical(logits), measure=spherical_parts).epistemic, float)
    mean = probs.mean(0)
    norm = lambda p: np.sqrt((p**2).sum(-1))
    by_hand = (norm(probs) - (mean * probs).sum(-1) / norm(mean)).mean(0)
    np.testing.assert_allclose(spherical, by_hand, rtol=5e-3, atol=1e-15)


def test_aleatoric_of_sure_members_keeps_its_digits():
    pred = bc.Categorical(jnp.array([[[20.0, 0.0, 0.0]]]))
    rest = 2 * math.exp(-20) / (1 + 2 * math.exp(-20))
    np.testing.assert_allclose(zero_one_parts(pred)[0], [rest], rtol=1e-5)
    np.testing.assert_allclose(class_variance_parts(pred)[0], [2 * rest], rtol=1e-5)


@pytest.mark.parametrize("function", [reverse_mutual_information, pairwise_divergence, mutual_information])
def test_gradients_pass_by_members_that_do_not_count(rng, function):
    logits = jnp.asarray(rng.normal(size=(3, 2, 4)).astype(np.float32))
    gradient = jax.grad(lambda z: function(bc.Categorical(z, jnp.array([1.0, 0.0, 2.0]))).sum())(logits)
    assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("a", [[1e-8] * 10, [1e-6] * 10, [64.0] + [2.0**-20] * 9, [3.0, 1e4, 50.0]])
def test_dirichlet_aleatoric_is_never_negative(a):
    from scipy.special import digamma  # in float64, whose digits are enough

    a = np.array(a, np.float32)
    wide = a.astype(float)
    truth = (wide / wide.sum() * (digamma(wide.sum() + 1) - digamma(wide + 1))).sum()
    aleatoric = bc.decompose(bc.Dirichlet(a[None, None])).aleatoric
    np.testing.assert_allclose(aleatoric, [truth], rtol=2e-5)


def test_bounds_by_hand():
    # N(0, 1) and N(d, 1): Bhattacharyya d^2 / 8, Kullback-Leibler d^2 / 2
    pred = bc.Gaussian(jnp.array([[[0.0]], [[2.0]]]), jnp.ones((2, 1, 1)))
    low, high = information_bounds(pred)
    np.testing.assert_allclose(low, [-math.log(0.5 + 0.5 * math.exp(-0.5))], rtol=1e-5)
    np.testing.assert_allclose(high, [-math.log(0.5 + 0.5 * math.exp(-2))], rtol=1e-5)
    wide = bc.Gaussian(
        jnp.zeros((2, 1, 1)), jnp.array([[[1.0]], [[9.0]]])
    )  # 0.5 log(cosh(log 3)), 0.5 (1/9 - 1 + log 9)
    near, far = 0.5 * math.log(math.cosh(math.log(3))), 0.5 * (1 / 9 - 1 + math.log(9))
    back = 0.5 * (9 - 1 - math.log(9))
    low, high = information_bounds(wide)
    np.testing.assert_allclose(low, [-math.log(0.5 + 0.5 * math.exp(-near))], rtol=1e-5)
    expected = -0.5 * (math.log(0.5 + 0.5 * math.exp(-far)) + math.log(0.5 + 0.5 * math.exp(-back)))
    np.testing.assert_allclose(high, [expected], rtol=1e-5)


@pytest.mark.parametrize("concentration", [[4.0, 2.0, 1.0, 1.0], [100.0, 50.0, 25.0]])
def test_correction_takes_most_of_the_bias(rng, concentration):
    """Members are draws of a Dirichlet, whose information is known; few of them show too little of it."""
    truth = float(bc.decompose(bc.Dirichlet(np.array(concentration, np.float32)[None, None])).epistemic[0])
    probs = rng.dirichlet(concentration, size=(5, 4000)).astype(np.float32)
    pred = bc.Probabilities(probs)
    plain, corrected = np.asarray(mutual_information(pred)).mean(), corrected_mutual_information(pred)
    assert plain / truth < 0.85  # about 1 - 1 / 5
    assert abs(float(corrected.value.mean()) / truth - 1) < 0.04
    covered = (np.asarray(corrected.low) <= truth) & (truth <= np.asarray(corrected.high))
    assert 0.93 < covered.mean() < 0.99


def test_correction_against_a_loop(rng):
    logits = rng.normal(size=(5, 7, 3)).astype(np.float32)
    whole = oracles.mutual_information(logits)
    parts = np.array([oracles.mutual_information(np.delete(logits, s, 0)) for s in range(5)])
    value = np.minimum((5 * whole - 4 * parts).mean(0), math.log(3))
    pseudo = 5 * np.log(whole) - 4 * np.log(parts)
    centre, error = pseudo.mean(0), pseudo.std(0, ddof=1) / math.sqrt(5)
    padded = np.insert(logits, 2, np.nan, 0)
    weights = np.array([1, 1, 0, 1, 1, 1], np.float32)
    for pred in (bc.Categorical(logits), bc.Categorical(padded, weights)):
        found = corrected_mutual_information(pred)
        np.testing.assert_allclose(found.value, value, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.low, np.minimum(np.exp(centre - 2.7764451 * error), math.log(3)), rtol=1e-4)
        np.testing.assert_allclose(found.high, np.minimum(np.exp(centre + 2.7764451 * error), math.log(3)), rtol=1e-4)
    same = corrected_mutual_information(bc.Categorical(logits[[0, 0, 0]]))
    assert not same.value.any() and np.isnan(same.low).all() and np.isnan(same.high).all()


def test_a_correction_stays_possible():
    """Never above log classes; and no interval where the members say nothing of it."""
    apart = corrected_mutual_information(bc.Probabilities(jnp.eye(4)[:, None]))
    np.testing.assert_allclose(apart.value, [math.log(4)], rtol=1e-6)
    dissent = corrected_mutual_information(bc.Probabilities(jnp.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.5, 0.5]]])))
    for found in (apart, dissent):
        assert np.isnan(found.low).all() and np.isnan(found.high).all() and np.isfinite(found.value).all()
    wide = corrected_mutual_information(bc.Categorical(6 * jax.random.normal(jax.random.key(0), (3, 200, 2))))
    assert (np.asarray(wide.value) <= math.log(2) + 1e-6).all()
    assert (np.asarray(wide.high)[np.isfinite(wide.high)] <= math.log(2) + 1e-6).all()


@pytest.mark.parametrize("gap", [0.0, 18.0, 30.0])
@pytest.mark.parametrize("apart", [1e-5, 1e-2, 1.0])
def test_class_variance_keeps_its_digits(rng, gap, apart):
    logits = (rng.normal(size=(1, 60, 4)) + apart * rng.normal(size=(5, 60, 4))).astype(np.float32)
    logits[..., 0] += np.float32(gap)
    shifted = logits.astype(np.longdouble) - logits.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    rest = probs[..., 1:].sum(-1)
    truth = probs[..., 1:].var(0).sum(-1) + rest.var(0)
    found = np.asarray(class_variance_parts(bc.Categorical(logits))[1], float)
    np.testing.assert_allclose(found, truth.astype(float), rtol=1e-4, atol=1e-36)  # squares underflow


def test_undefined_dirichlets_are_never_familiar():
    concentration = np.array([[[np.inf, 1, 1], [0, 1, 1], [2, 1, 1]]], np.float32)
    for part in bc.decompose(bc.Dirichlet(concentration))[1:]:
        assert np.isnan(part[0]) and np.isfinite(part[2])
    assert np.isnan(vacuity(bc.Dirichlet(concentration))[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda z: corrected_mutual_information(bc.Categorical(z[:2])),
            ValueError,
            "at least 3 members that count, got 2",
        ),
        (
            lambda z: corrected_mutual_information(bc.Categorical(z, np.arange(4.0, dtype=np.float32))),
            ValueError,
            "must have members that weigh the same for all examples, got `member_weights` from 0 to 3",
        ),
        (
            lambda z: corrected_mutual_information(bc.pool(bc.Categorical(z))),
            ValueError,
            "`pred` must have raw members",
        ),
        (
            lambda z: mutual_information(bc.Gaussian(z, z)),
            TypeError,
            "`mutual information` does not exist for Gaussian",
        ),
        (lambda z: bc.Dirichlet(z[0, 0]), ValueError, "`concentration` must have shape"),
        (
            lambda z: bc.evaluate(bc.Dirichlet(abs(z) * [0, 1]), np.zeros(3, int), {"a": bc.accuracy()}),
            ValueError,
            "`concentration` must be positive, got zero or less in 3 of 3 examples",
        ),
    ],
)
def test_bad_input(unchecked, rng, call, error, message):
    with pytest.raises(error, match=message):
        call(rng.normal(size=(4, 3, 2)).astype(np.float32))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8, 1e15])
@pytest.mark.parametrize("mixed", [False, True])
def test_logits_of_any_size(scale, mixed, rng):
    """Differences of logits far apart have no digits left: members then stand below their own peaks."""
    logits = (scale * rng.normal(size=(3, 50, 4))).astype(np.float32)
    if mixed:
        logits[1] = rng.normal(size=(50, 4))
    found = mutual_information(bc.Categorical(logits))
    shifted = logits.astype(float) - logits.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    expected = entr(probs.mean(0)).sum(-1) - entr(probs).sum(-1).mean(0)
    np.testing.assert_allclose(found, expected, atol=5e-7)
