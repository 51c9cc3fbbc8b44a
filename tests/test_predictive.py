import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import strictly

import bayescal as bc
from bayescal.predictive import check_predictive

pytestmark = pytest.mark.core


def random_logits(rng, members=4, rows=6, classes=5, scale=3.0):
    return rng.normal(size=(members, rows, classes)).astype(np.float32) * scale


def test_pool_is_the_mean_of_probabilities(rng, strict):
    logits = random_logits(rng)
    np.testing.assert_allclose(np.exp(bc.Categorical(logits).log_probs()), oracles.pool(logits), rtol=2e-6)


def test_pool_by_hand():
    # sigmoid-like logits 0 and log 3: p = 1/2 and 3/4, mean 5/8
    pred = bc.Categorical(jnp.array([[[0.0, 0.0]], [[math.log(3), 0.0]]]))
    np.testing.assert_allclose(pred.pooled_mean(), [[5 / 8, 3 / 8]], rtol=1e-6)
    np.testing.assert_allclose(pred.log_prob(jnp.array([0])), [math.log(5 / 8)], rtol=1e-6)


def test_pool_is_not_the_mean_of_logits():
    # one confident member of three: the mean of probabilities stays modest, that of logits would not
    logits = np.zeros((3, 1, 3), np.float32)
    logits[0, 0] = [6, 0, 0]
    np.testing.assert_allclose(bc.Categorical(logits).pooled_mean()[0, 0], (1 / 3 + 1 / 3 + 0.99505) / 3, rtol=1e-4)


def test_pool_does_not_underflow():
    logits = jnp.array([[[150.0, 0.0]], [[150.0, 0.0]]])
    np.testing.assert_allclose(bc.Categorical(logits).log_probs()[0, 1], -150, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.0, 5.0), (0.0, 0.0, 1.0, 0.0)])
def test_member_weights(rng, weights):
    logits = random_logits(rng)
    weights = np.array(weights, np.float32)
    logits[weights == 0] = np.nan  # a member that does not count may hold anything
    pred = bc.Categorical(logits, weights)
    np.testing.assert_allclose(pred.pooled_mean(), oracles.pool(logits, weights), rtol=2e-6)
    assert np.isfinite(pred.entropy()).all()


def test_weights_per_example(rng):
    logits = random_logits(rng, members=2, rows=3)
    weights = np.array([[1, 0, 1], [0, 1, 1]], np.float32)
    pooled = bc.Categorical(logits, weights).pooled_mean()
    for i in range(3):
        np.testing.assert_allclose(pooled[i : i + 1], oracles.pool(logits[:, i : i + 1], weights[:, i]), rtol=2e-6)


def test_no_weight_at_all_is_undefined_not_zero(rng):
    pred = bc.Categorical(random_logits(rng), np.zeros(4, np.float32))
    assert np.isnan(pred.log_probs()).all()
    assert np.isnan(bc.decompose(pred).epistemic).all()


def test_entropy_and_member_log_prob(rng, strict):
    logits = random_logits(rng)
    targets = np.array([0, 1, 2, 3, 4, 0])
    pred = bc.Categorical(logits)
    np.testing.assert_allclose(pred.entropy(), [oracles.entropy(p) for p in oracles.pool(logits)], rtol=1e-5)
    expected = [[math.log(oracles.softmax(logits[s, i])[targets[i]]) for i in range(6)] for s in range(4)]
    np.testing.assert_allclose(pred.member_log_prob(targets), expected, rtol=1e-5, atol=1e-6)


def test_impossible_classes():
    pred = bc.Categorical(jnp.array([[[0.0, 0.0, -jnp.inf]]]))
    np.testing.assert_allclose(pred.entropy(), [math.log(2)], rtol=1e-6)
    assert pred.log_prob(jnp.array([2]))[0] == -jnp.inf


def test_bernoulli_is_a_categorical_of_two_classes(rng):
    logits = random_logits(rng, classes=1)[..., 0]
    pred = bc.Bernoulli(logits)
    both = bc.Categorical(np.stack([np.zeros_like(logits), logits], -1))
    targets = np.array([0, 1, 1, 0, 1, 0])
    np.testing.assert_allclose(pred.log_prob(targets), both.log_prob(targets), rtol=1e-5)
    np.testing.assert_allclose(pred.pooled_mean(), both.pooled_mean()[:, 1], rtol=1e-5)
    np.testing.assert_allclose(pred.entropy(), both.entropy(), rtol=1e-5)
    np.testing.assert_allclose(bc.pool(pred).log_prob(targets), pred.log_prob(targets), rtol=1e-5)
    np.testing.assert_allclose(pred.free_energy(), -np.log(2 * np.cosh(logits / 2)).mean(0), rtol=1e-5)


def test_gaussian_mixture(rng):
    mean = rng.normal(size=(3, 4, 2)).astype(np.float32)
    variance = rng.uniform(0.5, 2, size=(3, 4, 2)).astype(np.float32)
    targets = rng.normal(size=(4, 2)).astype(np.float32)
    pred = bc.Gaussian(mean, variance)
    for i in range(4):
        densities = [
            math.exp(sum(oracles.normal_log_density(targets[i, d], mean[s, i, d], variance[s, i, d]) for d in range(2)))
            for s in range(3)
        ]
        np.testing.assert_allclose(pred.log_prob(targets)[i], math.log(np.mean(densities)), rtol=1e-5)
    np.testing.assert_allclose(pred.pooled_mean(), mean.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pred.pooled_variance(), variance.mean(0) + mean.var(0), rtol=1e-5)


def test_gaussian_sample_has_the_mixture_moments():
    pred = bc.Gaussian(
        jnp.array([[[-2.0]], [[4.0]]]), jnp.array([[[1.0]], [[4.0]]]), member_weights=jnp.array([3.0, 1.0])
    )
    draws = jax.vmap(pred.sample)(jax.random.split(jax.random.key(0), 40_000))
    np.testing.assert_allclose(draws.mean(), pred.pooled_mean()[0, 0], atol=0.05)
    np.testing.assert_allclose(draws.var(), pred.pooled_variance()[0, 0], rtol=0.03)


def test_categorical_sample_frequencies():
    pred = bc.Categorical(jnp.log(jnp.array([[[0.2, 0.8]], [[0.6, 0.4]]])))
    draws = jax.vmap(pred.sample)(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose((draws == 0).mean(), 0.4, atol=0.015)


def test_rescale_brings_the_unit_back(rng):
    mean, variance = rng.normal(size=(2, 5, 1)).astype(np.float32), np.full((2, 5, 1), 0.3, np.float32)
    targets = rng.normal(size=(5, 1)).astype(np.float32)
    standard = bc.Gaussian(mean, variance, mean_variance=variance / 2)
    shift, scale = 10.0, 4.0
    own = bc.rescale(standard, shift, scale)
    np.testing.assert_allclose(own.pooled_variance(), 16 * standard.pooled_variance(), rtol=1e-5)
    # densities change by the Jacobian
    np.testing.assert_allclose(
        own.log_prob(shift + scale * targets), standard.log_prob(targets) - math.log(4), rtol=1e-4, atol=1e-5
    )


def test_merge_members_is_outer_major(rng):
    stacked = bc.Categorical(rng.normal(size=(6, 4, 3)).astype(np.float32))
    split = jax.tree.map(lambda x: x.reshape(2, 3, 4, 3), stacked)
    merged = bc.merge_members(split, np.array([1.0, 0.0], np.float32))
    np.testing.assert_array_equal(merged.logits, stacked.logits)
    np.testing.assert_array_equal(merged.member_weights, [1, 1, 1, 0, 0, 0])


def test_merge_members_multiplies_weights(rng):
    inner = bc.Categorical(rng.normal(size=(3, 4, 3)).astype(np.float32), np.array([1.0, 2.0, 3.0], np.float32))
    both = jax.tree.map(lambda x: jnp.stack([x, x]), inner)
    merged = bc.merge_members(both, np.array([1.0, 10.0], np.float32))
    np.testing.assert_allclose(merged.member_weights, np.array([1, 2, 3, 10, 20, 30]) / 6, rtol=1e-6)


def test_outer_weights_hold_whatever_the_inner_scale():
    """Two outer members of equal weight, one with three counted draws and one with a single one: half each."""
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x),
        bc.Categorical(jnp.tile(jnp.array([2.0, 0.0]), (3, 1, 1)), np.array([1.0, 1.0, 1.0], np.float32)),
        bc.Categorical(jnp.tile(jnp.array([0.0, 2.0]), (3, 1, 1)), np.array([1.0, 0.0, 0.0], np.float32)),
    )
    for outer in (None, np.array([5.0, 5.0], np.float32)):
        np.testing.assert_allclose(bc.merge_members(stacked, outer).pooled_mean(), [[0.5, 0.5]], rtol=1e-6)


def test_concatenate_keeps_each_chunks_weights(rng):
    logits = random_logits(rng, members=2, rows=2)
    chunks = [
        bc.Categorical(logits[:, :1], np.array([1.0, 0.0], np.float32)),
        bc.Categorical(logits[:, 1:], np.array([0.0, 1.0], np.float32)),
    ]
    for i, one in enumerate(chunks):
        np.testing.assert_allclose(bc.concatenate(chunks).pooled_mean()[i], one.pooled_mean()[0], rtol=1e-6)
    with pytest.raises(ValueError, match="`preds` must all be raw or all normalised"):
        bc.concatenate([chunks[0], bc.pool(chunks[1])])


def test_nothing_is_broadcast_or_taken_from_the_end(unchecked):
    pred = bc.Gaussian(np.zeros((1, 3, 1), np.float32), np.ones((1, 3, 1), np.float32))
    with pytest.raises(ValueError, match=r"`targets` must have shape \(3, 1\), which the predictive sets, got \(3,\)"):
        pred.log_prob(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"`shift` must have shape \(\) or \(1,\), got \(3,\)"):
        bc.rescale(pred, np.zeros(3), np.ones(3))
    classes = bc.Categorical(np.zeros((1, 2, 3), np.float32))
    assert np.isnan(classes.log_prob(np.array([-1, 3]))).all()
    with pytest.raises(IndexError, match="`index` must lie in"):
        bc.take(classes, [5])


def test_a_certain_bernoulli():
    pred = bc.Bernoulli(np.array([[-np.inf, np.inf]], np.float32))
    np.testing.assert_allclose(pred.pooled_mean(), [0, 1])
    np.testing.assert_allclose(bc.decompose(pred).total, [0, 0], atol=1e-6)


def test_take_and_concatenate(rng):
    weights = rng.uniform(0.1, 1, size=(4, 6)).astype(np.float32)
    pred = bc.Categorical(random_logits(rng), weights)
    halves = [bc.take(pred, np.arange(2)), bc.take(pred, slice(2, None))]
    whole = bc.concatenate(halves)
    np.testing.assert_array_equal(whole.logits, pred.logits)
    np.testing.assert_array_equal(whole.member_weights, weights)
    shared = bc.take(bc.Categorical(random_logits(rng), np.ones(4, np.float32)), [3])
    assert shared.batch_shape == (1,) and shared.member_weights.shape == (4,)


def test_likelihoods():
    outputs = jnp.array([[[1.0, -2.0, 0.5, 3.0]]])
    pred = bc.heteroscedastic(outputs)
    np.testing.assert_allclose(pred.mean, [[[1.0, -2.0]]])
    np.testing.assert_allclose(pred.variance, np.log1p(np.exp([[[0.5, 3.0]]])), rtol=1e-6)
    np.testing.assert_allclose(bc.homoscedastic(0.25)(outputs).variance, np.full((1, 1, 4), 0.25))
    np.testing.assert_allclose(bc.one_logit(outputs[..., :1]).logits, [[1.0]])
    assert np.isfinite(bc.heteroscedastic(jnp.array([[[0.0, -200.0]]])).log_prob(jnp.array([[0.0]]))).all()


def test_bfloat16_is_promoted():
    pred = bc.Categorical(jnp.zeros((2, 3, 4), jnp.bfloat16))
    assert pred.log_probs().dtype == jnp.float32
    assert bc.decompose(pred).epistemic.dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: bc.Categorical(np.zeros(3, np.float32)),
            r"`logits` must have shape \(member, \*batch, classes\), got",
        ),
        (lambda: bc.Bernoulli(np.float32(3)), r"`logits` must have shape \(member, \*batch\), got \(\)"),
        (lambda: bc.Categorical(np.zeros((2, 3, 4), np.float32), np.ones(3, np.float32)), "Give one weight per member"),
        (
            lambda: bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.zeros((1, 2, 2), np.float32)),
            r"`variance` must have the shape of `mean`, \(1, 2, 1\), got \(1, 2, 2\)",
        ),
        (lambda: bc.heteroscedastic(np.zeros((1, 2, 3), np.float32)), "`outputs` must have an even last axis"),
        (
            lambda: bc.one_logit(np.zeros((1, 2, 3), np.float32)),
            "`outputs` must have one logit in the last axis, got 3",
        ),
        (
            lambda: bc.rescale(bc.Gaussian(np.zeros((1, 2, 1)), np.ones((1, 2, 1))), 0.0, -1.0),
            "`scale` must be positive, got -1.0",
        ),
    ],
)
def test_bad_input(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("what", ["entropy", "free_energy", "log_probs"])
def test_what_a_family_cannot_have(what):
    pred = bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32))
    with pytest.raises(TypeError, match=f"`{what}` does not exist for Gaussian"):
        getattr(pred, what)()


def test_pooling_normals_is_refused(unchecked):
    with pytest.raises(TypeError, match="`pool` does not exist for Gaussian"):
        bc.pool(bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32)))


def test_free_energy_of_normalised_logits_is_refused(rng):
    with pytest.raises(ValueError, match="`free_energy` needs a network's raw logits, got normalised ones"):
        bc.pool(bc.Categorical(random_logits(rng))).free_energy()


def test_decomposing_a_pool_is_refused(rng):
    with pytest.raises(ValueError, match="`pred` must have raw members, got a pooled or calibrated one"):
        bc.decompose(bc.pool(bc.Categorical(random_logits(rng))), ood=bc.scores.max_probability)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros(6, np.float32), "`targets` must be integer class labels, got float32"),
        (np.full(6, 5), r"`targets` must lie in \[0, 5\), got values from 5 to 5"),
        (np.full(6, -1), r"`targets` must lie in \[0, 5\), got values from -1 to -1"),
        (np.zeros(4, int), r"`targets` must be integer class labels of shape \(6,\).*got \(4,\)"),
    ],
)
def test_bad_targets(unchecked, rng, targets, message):
    with pytest.raises(ValueError, match=message):
        bc.Categorical(random_logits(rng)).check_targets(targets)


def test_pure_functions_under_strict_promotion(rng):
    logits = random_logits(rng)
    with strictly():
        bc.decompose(bc.Categorical(logits, np.ones(4, np.float32)))
        bc.decompose(bc.Gaussian(logits, np.exp(logits)))
        bc.decompose(bc.Bernoulli(logits[..., 0]))


@pytest.mark.parametrize("family", [bc.Categorical, bc.Probabilities, bc.Dirichlet])
@pytest.mark.parametrize("shape", [(4, 600, 3), (1, 5000, 10)])
def test_nan_is_seen_in_large_arrays(family, shape, rng):
    """Where XLA on CPU loses it from the least and the largest value."""
    probs = rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]).astype(np.float32)
    check_predictive(family(probs))
    for value in (np.nan, np.inf):
        spoiled = probs.copy()
        spoiled[0, shape[1] // 3, 1] = value
        with pytest.raises(ValueError, match=f"`pred` must not hold NaN, .* in 1 of {shape[1]} examples, first at"):
            check_predictive(family(spoiled))
