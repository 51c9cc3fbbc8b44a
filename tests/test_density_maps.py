import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

import bayescal as bc
from bayescal.calibrate import (
    BinwiseTemperature,
    fit_binwise_temperature,
    fit_density_aware,
    fit_groupwise_temperature,
    fit_proximity,
)
from bayescal.calibrate.density_aware import _require_converged
from bayescal.calibrate.region_temperature import _bins

pytestmark = pytest.mark.core


def labels(rng, logits):
    return (logits + rng.gumbel(size=logits.shape)).argmax(1).astype(np.int32)


def fisher(logits, temperature, columns):
    """Information about w in T = columns @ w: sum of Var(z) / T^4 columns columns^T."""
    probs = softmax(logits / temperature[:, None], axis=1)
    mean = (probs * logits).sum(1, keepdims=True)
    each = (probs * (logits - mean) ** 2).sum(1) / temperature**4
    return (columns * each[:, None]).T @ columns


def test_one_region_is_the_plain_temperature(rng):
    logits = (3 * rng.normal(size=(4000, 4))).astype(np.float32)
    targets, pred = labels(rng, logits / 2), bc.Categorical(logits[None])
    weights = rng.uniform(size=4000).astype(np.float32)
    plain = bc.fit_temperature(pred, targets, weights=weights)
    binwise = fit_binwise_temperature(pred, targets, num_bins=1, weights=weights)
    group = np.zeros(4000, np.int32)
    groupwise = fit_groupwise_temperature(pred, targets, features=group, num_groups=1, weights=weights)
    for temperature in (binwise.temperatures[0], groupwise.temperatures[0]):
        np.testing.assert_allclose(temperature, plain.temperature, rtol=1e-5)
    np.testing.assert_allclose(binwise(pred).pooled_mean(), plain(pred).pooled_mean(), atol=1e-6)
    assert max(float(binwise.gradient), float(groupwise.gradient)) < 1e-5
    steep = bc.Categorical(1e5 * logits[None])  # T goes with the logits, beyond any bound of a search
    steep = fit_groupwise_temperature(steep, targets, features=group, num_groups=1, weights=weights)
    np.testing.assert_allclose(steep.temperatures / 1e5, groupwise.temperatures, rtol=1e-4)


def test_centres_of_many_rows():
    """Means of 2^20 rows to a part in a million, where one running float32 sum is off in the fourth digit."""
    confidence = np.random.default_rng(2).uniform(0.5, 1, 2**20).astype(np.float32)
    log_probs = jnp.log(jnp.stack([confidence, 1 - confidence], -1))
    _, regions, centres = _bins(log_probs, jnp.ones(len(confidence)), 2)
    exact = [np.exp(np.asarray(log_probs[:, 0], np.float64))[np.asarray(regions) == b].mean() for b in (0, 1)]
    np.testing.assert_allclose(centres, exact, rtol=2e-6)


def test_regions_recover_their_temperatures():
    """Rows of low confidence at T = 1, of high confidence at T = 2.5; and groups at 0.7 and 1.6: within 4 standard errors."""
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=(4000, 4))).astype(np.float32)
    confidence = softmax(logits, axis=1).max(1)
    high = confidence > np.median(confidence)
    truth = np.where(high, 2.5, 1.0)
    pred, targets = bc.Categorical(logits[None]), labels(rng, logits / truth[:, None])
    fitted = fit_binwise_temperature(pred, targets, num_bins=2, interpolate=False)
    errors = np.diag(fisher(logits, truth, np.eye(2)[high.astype(int)])) ** -0.5
    assert (abs(fitted.temperatures - np.array([1.0, 2.5])) < 4 * errors).all()
    np.testing.assert_allclose(fitted.edges, [np.median(confidence)], atol=1e-4)
    groups = rng.integers(2, size=len(logits)).astype(np.int32)
    truth = np.array([0.7, 1.6])[groups]
    targets = labels(rng, logits / truth[:, None])
    fitted = fit_groupwise_temperature(pred, targets, features=groups, num_groups=2)
    errors = np.diag(fisher(logits, truth, np.eye(2)[groups])) ** -0.5
    assert (abs(fitted.temperatures - np.array([0.7, 1.6])) < 4 * errors).all()
    scaled = fitted(pred, features=groups).log_probs()
    exact = log_softmax(logits / np.asarray(fitted.temperatures)[groups, None], axis=1)
    np.testing.assert_allclose(scaled, exact, atol=1e-4)


def test_logarithms_are_interpolated_between_centres():
    fitted = BinwiseTemperature(
        jnp.array([1.0, 4.0]), jnp.array([0.7]), jnp.array([0.6, 0.8]), jnp.float32(0), interpolate=True
    )
    probs = np.array([[0.55, 0.45], [0.7, 0.3], [0.9, 0.1]], np.float32)
    temperature = np.array([1.0, 2.0, 4.0])  # below the first centre, half way, above the last
    expected = softmax(np.log(probs) / temperature[:, None], axis=1)
    np.testing.assert_allclose(fitted(bc.Probabilities(probs[None])).pooled_mean(), expected, rtol=1e-5)
    one = bc.Bernoulli(jnp.log(probs[:, 1] / probs[:, 0])[None])
    np.testing.assert_allclose(fitted(one).pooled_mean(), expected[:, 1], rtol=1e-5)


def test_groups_that_are_not_there_are_nan_under_jit(rng):
    logits = (3 * rng.normal(size=(4000, 4))).astype(np.float32)
    pred, targets = bc.Categorical(logits[None]), labels(rng, logits)
    fitted = fit_groupwise_temperature(pred, targets, features=np.zeros(4000, np.int32), num_groups=1)
    probs = jax.jit(lambda groups: fitted(pred, features=groups).pooled_mean())(jnp.arange(4000) - 1)
    assert np.isfinite(probs[1]).all() and np.isnan(np.delete(probs, 1, 0)).all()
    lost = np.where(np.arange(4000) < 2000, 0, 1).astype(np.int32)
    sure = np.where(lost, logits.argmax(1), targets)
    fit = jax.jit(lambda targets, groups: fit_groupwise_temperature(pred, targets, features=groups, num_groups=2))
    traced = fit(sure, lost)
    assert np.isfinite(traced.temperatures[0]) and np.isnan(traced.temperatures[1])
    for outside in (-1, 2):  # not the rows of another group, nor left out
        traced = fit(targets, np.where(np.arange(4000) == 3000, outside, lost))
        assert np.isnan(traced.temperatures[0]) and np.isfinite(traced.temperatures[1])


def far_and_near(seed, weights, rows=4000):
    """Logits whose right temperature is weights[0] + weights[1:] @ distances."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(rows, 4))).astype(np.float32)
    distances = rng.gamma(2, 0.5, (rows, len(weights) - 1)).astype(np.float32)
    temperature = weights[0] + distances @ np.array(weights[1:])
    return logits, labels(rng, logits / temperature[:, None]), distances, temperature


def test_density_aware_recovers_known_weights():
    """Within 4 standard errors of the Fisher information, and the same as scipy's bounded search finds."""
    truth = np.array([0.8, 0.6, 0.3])
    logits, targets, distances, temperature = far_and_near(2, truth)
    fitted = fit_density_aware(bc.Categorical(logits[None]), targets, features=distances)
    found = np.array([fitted.base, *fitted.slopes])
    columns = np.column_stack([np.ones(len(logits)), distances])
    errors = np.diag(np.linalg.inv(fisher(logits, temperature, columns))) ** 0.5
    assert (abs(found - truth) < 4 * errors).all()

    def nll(w):
        return -log_softmax(logits / (columns @ w)[:, None].astype(np.float64), axis=1)[
            range(len(targets)), targets
        ].mean()

    other = minimize(nll, [1, 0.1, 0.1], bounds=[(1e-6, None)] * 3)
    np.testing.assert_allclose(found, other.x, rtol=5e-3)
    assert nll(found) < other.fun + 1e-6 and float(fitted.gradient) < 1e-5


def test_density_aware_leaves_out_what_does_not_matter():
    """Where the distance makes a net less over-confident the best slope is negative: 0, and the plain temperature is left."""
    rng = np.random.default_rng(3)
    logits = (3 * rng.normal(size=(4000, 4))).astype(np.float32)
    distances = rng.uniform(0, 1, (4000, 1)).astype(np.float32)
    pred, targets = bc.Categorical(logits[None]), labels(rng, logits / (2.5 - 1.5 * distances))
    fitted = fit_density_aware(pred, targets, features=distances)
    assert float(fitted.slopes[0]) == 0
    np.testing.assert_allclose(fitted.base, bc.fit_temperature(pred, targets).temperature, rtol=1e-4)
    scaled = fitted(pred, features=distances).pooled_mean()
    np.testing.assert_allclose(scaled, bc.fit_temperature(pred, targets)(pred).pooled_mean(), atol=1e-4)
    two = np.column_stack([distances, np.zeros(4000, np.float32)])  # a layer without any distance
    assert (np.asarray(fit_density_aware(pred, targets, features=two).slopes) == 0).all()
    unrelated = rng.gamma(2, 0.5, (4000, 1)).astype(np.float32)
    slope = fit_density_aware(pred, labels(rng, logits / 1.7), features=unrelated).slopes[0]
    columns = np.column_stack([np.ones(4000), unrelated])
    error = np.linalg.inv(fisher(logits, np.full(4000, 1.7), columns))[1, 1] ** 0.5
    assert 0 <= float(slope) < 4 * error


def test_density_aware_does_not_mind_units():
    logits, targets, distances, _ = far_and_near(4, [0.8, 0.6])
    pred = bc.Categorical(logits[None])
    one, thousand = (fit_density_aware(pred, targets, features=c * distances) for c in (1, 1000))
    np.testing.assert_allclose(thousand.slopes * 1000, one.slopes, rtol=2e-3)
    far = one(pred, features=distances + 10)
    assert (far.top_label()[0] <= one(pred, features=distances).top_label()[0] + 1e-6).all()
    lost = jnp.asarray(distances).at[0].set(-100).at[1].set(jnp.nan)
    probs = np.asarray(one(pred, features=lost).pooled_mean())
    assert np.isnan(probs[:2]).all() and np.isfinite(probs[2:]).all()


def sparse_and_dense(seed, rows=4000):
    """The same confidences near and far, right as often as they say where near, and half as much above chance where far."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.55, 0.95, rows)
    proximity = rng.uniform(size=rows).round() * 0.6 + rng.uniform(0.1, 0.3, rows)
    rate = np.where(proximity > 0.5, confidence, 0.5 + (confidence - 0.5) / 2)
    top = rng.integers(2, size=rows)
    targets = np.where(rng.uniform(size=rows) < rate, top, 1 - top).astype(np.int32)
    probs = np.where(np.arange(2) == top[:, None], confidence[:, None], 1 - confidence[:, None])
    return bc.Probabilities(probs.astype(np.float32)[None]), targets, proximity.astype(np.float32), confidence, rate


@pytest.fixture(scope="module")
def proximate():
    pred, targets, proximity, _, _ = sparse_and_dense(5)
    return pred, targets, fit_proximity(pred, targets, features=proximity)


def test_proximity_mends_what_temperature_cannot(proximate):
    pred, targets, fitted = proximate
    new, _, place, _, rate = sparse_and_dense(6)
    far = place < 0.5

    def gaps(calibrated):
        mended = np.asarray(calibrated.top_label()[0])
        return [abs((mended - rate)[inside].mean()) for inside in (far, ~far)]

    # Temperature is off by half the gap of about 0.125 between the two on either side; kernels of 2,000 rows by their noise.
    assert min(gaps(bc.fit_temperature(pred, targets)(new))) > 0.04
    assert max(gaps(fitted(new, features=place))) < 0.02


def test_proximity_equals_the_oracle():
    rng = np.random.default_rng(7)
    logits = (1.5 * rng.normal(size=(60, 3))).astype(np.float32)
    targets, proximity = labels(rng, logits / 1.5), rng.uniform(size=60).astype(np.float32)
    weights = rng.integers(0, 3, 60).astype(np.float32)
    pred = bc.Categorical(logits[None])
    fitted = fit_proximity(pred, targets, features=proximity, weights=weights)
    after = np.asarray(fitted(pred, features=proximity).pooled_mean())
    probs = softmax(logits.astype(np.float64), axis=1)
    top, rows = probs.argmax(1), np.repeat(np.arange(60), weights.astype(int))
    points = np.column_stack([probs.max(1), proximity])
    density = []
    for right in (False, True):
        bank = points[[i for i in rows if (top[i] == targets[i]) == right]]
        width = 1.06 * bank.std(0) * len(bank) ** (-1 / 6)
        density.append([sum(np.exp(-(((p - q) / width) ** 2).sum() / 2) for q in bank) / width.prod() for p in points])
    for i in range(60):
        confidence = density[1][i] / (density[0][i] + density[1][i])
        expected = probs[i] * (1 - confidence) / (1 - probs[i, top[i]])
        expected[top[i]] = confidence
        np.testing.assert_allclose(after[i], expected, atol=1e-4)


def test_proximity_of_certain_rows(proximate):
    pred, _, fitted = proximate
    probs = np.asarray(
        fitted(bc.Probabilities(np.array([[[0, 1.0, 0, 0]]], np.float32)), features=np.float32([0.2])).pooled_mean()
    )
    np.testing.assert_allclose(probs[0, [0, 2, 3]], (1 - probs[0, 1]) / 3, rtol=1e-4)  # shared equally
    spaced = fitted(pred, features=np.full(4000, 1e6, np.float32)).pooled_mean()
    assert np.isfinite(spaced).all()  # far from every row


def test_bad_input(unchecked):
    rng = np.random.default_rng(9)
    logits = (3 * rng.normal(size=(4000, 4))).astype(np.float32)
    pred, targets, top = bc.Categorical(logits[None]), labels(rng, logits / 2), logits.argmax(1).astype(np.int32)
    low = np.argsort(softmax(logits, axis=1).max(1))[:1400]
    sure = np.where(np.isin(np.arange(4000), low), top, targets).astype(np.int32)
    with pytest.raises(
        ValueError, match=r"`num_bins` must leave every bin a finite best temperature, got none for \[0\] of 3"
    ):
        fit_binwise_temperature(pred, sure, num_bins=3)
    with pytest.raises(ValueError, match="`num_bins` must be at most the number of rows, 4000, got 4001"):
        fit_binwise_temperature(pred, targets, num_bins=4001)
    groups = np.zeros(4000, np.int32)
    fit = fit_groupwise_temperature
    with pytest.raises(
        ValueError, match=r"`num_groups` must leave every group a finite best temperature, got none for \[1\]"
    ):
        fit(pred, targets, features=groups, num_groups=2)
    with pytest.raises(ValueError, match="`num_groups` must be a whole number of at least 1, got 0"):
        fit(pred, targets, features=groups, num_groups=0)
    with pytest.raises(ValueError, match=r"`features` must lie in \[0, 2\), the groups, got values from 2 to 2"):
        fit(pred, targets, features=groups + 2, num_groups=2)
    with pytest.raises(ValueError, match="`features` must be one whole number per row, the group, of shape"):
        fit(pred, targets, features=groups + 0.5, num_groups=2)
    with pytest.raises(ValueError, match="`features` must be one whole number per row, the group, of shape"):
        fit(pred, targets, features=groups, num_groups=1)(pred, features=groups[:5])
    impossible = bc.Categorical(jnp.asarray(logits)[None].at[0, 0, targets[0]].set(-jnp.inf))
    distances = rng.uniform(size=(4000, 2)).astype(np.float32)
    for fit in (
        fit_binwise_temperature,
        lambda *rows: fit_groupwise_temperature(*rows, features=groups, num_groups=1),
        lambda *rows: fit_density_aware(*rows, features=distances),
    ):
        with pytest.raises(ValueError, match="`targets` must have positive probability, got 1 of 4000"):
            fit(impossible, targets)
    with pytest.raises(ValueError, match=r"`features` must be distances of shape \(4000, 2\)"):
        fit_density_aware(pred, targets, features=distances)(pred, features=distances[:, 0])
    with pytest.raises(ValueError, match="`features` must be distances of shape"):
        fit_density_aware(pred, targets, features=distances[:, 0])
    with pytest.raises(ValueError, match="`features` must be finite distances that are not negative"):
        fit_density_aware(pred, targets, features=-distances)
    with pytest.raises(ValueError, match="`targets` must leave a finite best temperature"):
        fit_density_aware(pred, top, features=distances)
    with pytest.raises(ValueError, match=r"`features` must allow the search to converge to a gradient of 0\.0001"):
        _require_converged(1.0, 0.01)
    with pytest.raises(
        ValueError, match=r"`features` must be one proximity per row, of shape \(4000,\), got \(4000, 2\)"
    ):
        fit_proximity(pred, targets, features=distances)
    with pytest.raises(ValueError, match="`features` must be finite, got NaN"):
        fit_proximity(pred, targets, features=np.where(np.arange(4000) == 3, np.nan, distances[:, 0]))
    for wrong in ((top, distances[:, 0]), (targets, np.full(4000, 0.3, np.float32))):
        with pytest.raises(ValueError, match="`pred` must have right rows and wrong ones of several confidences"):
            fit_proximity(pred, wrong[0], features=wrong[1])
