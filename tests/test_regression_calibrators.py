"""Variance scaling and the map of quantiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import bayescal as bc
from bayescal import calibrate

pytestmark = pytest.mark.core


def problem(seed=0, rows=400, members=2, factor=4.0):
    """Forecasts whose variance is too small by a factor, of normals in two dimensions."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(members, rows, 2)).astype(np.float32)
    variance = rng.uniform(0.5, 2, size=mean.shape).astype(np.float32)
    pred = bc.Gaussian(mean, variance)
    noise = np.sqrt(factor * np.asarray(pred.pooled_variance())) * rng.normal(size=mean.shape[1:])
    return pred, (pred.pooled_mean() + noise).astype(np.float32)


def test_variance_scaling_is_the_closed_form():
    pred, targets = problem()
    z2 = (targets - np.asarray(pred.pooled_mean(), np.float64)) ** 2 / np.asarray(pred.pooled_variance(), np.float64)
    scaler = calibrate.fit_variance_scaling(pred, targets)
    np.testing.assert_allclose(scaler.factor, z2.mean(0), rtol=1e-5)
    np.testing.assert_allclose(scaler.factor, 4, rtol=4 * np.sqrt(2 / 400))  # four standard errors
    scaled = scaler(pred)
    assert scaled.num_members == 1 and scaler.accuracy_preserving
    np.testing.assert_allclose(scaled.pooled_mean(), pred.pooled_mean())
    nlls = [-bc.Gaussian(scaled.mean, scaled.variance * c).log_prob(targets).mean() for c in (0.97, 1, 1.03)]
    assert nlls[1] < min(nlls[0], nlls[2])
    # By hand: residuals 1 and 3 with variance 2: (1 + 9) / 2 / 2.
    two = bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.full((1, 2, 1), 2, np.float32))
    np.testing.assert_allclose(calibrate.fit_variance_scaling(two, np.array([[1], [3.0]], np.float32)).factor, [2.5])


def test_quantile_map_by_hand_and_loop():
    """Mid-ranks of the PIT, with ties at their middle; then F' and its inverse agree."""
    pred = bc.Gaussian(np.zeros((1, 4, 1), np.float32), np.ones((1, 4, 1), np.float32))
    targets = np.array([[0.0], [1.0], [-1.0], [0.0]], np.float32)
    fitted = calibrate.fit_quantile_map(pred, targets)
    np.testing.assert_allclose(fitted.pits[0], [0, norm.cdf(-1), 0.5, 0.5, norm.cdf(1), 1], atol=1e-6)
    np.testing.assert_allclose(fitted.levels[0], [0, 1 / 8, 1 / 2, 1 / 2, 7 / 8, 1], atol=1e-6)
    pred, targets = problem()
    mapped = calibrate.fit_quantile_map(pred, targets)(pred)
    spread, weights = np.sqrt(np.asarray(pred.variance, np.float64)), 1 / pred.num_members
    pits = (weights * norm.cdf((targets - np.asarray(pred.mean, np.float64)) / spread)).sum(0)
    for d in range(2):
        expected = np.interp(pits[:, d], np.r_[0, np.sort(pits[:, d]), 1], np.r_[0, (np.arange(400) + 0.5) / 400, 1])
        apart = abs(np.asarray(mapped.cdf(targets)[:, d]) - expected)
        assert (
            apart < 1e-5
        ).mean() > 0.97 and apart.max() < 3 / 400  # the order of PITs that float32 cannot tell apart
    for level in (0.05, 0.3, 0.5, 0.8):
        np.testing.assert_allclose(mapped.cdf(mapped.quantile(level)), level, atol=1e-4)


def test_new_rows_are_covered():
    fitted = calibrate.fit_quantile_map(*problem(seed=2))
    pred, targets = problem(seed=1)
    low, high = fitted(pred).interval(0.8)
    plain = [bc.metrics.regression.mixture_quantile(pred, quantile=q) for q in (0.1, 0.9)]
    error = np.sqrt(2 * 0.16 / 400)  # of the fit and of the new rows
    assert (abs(((targets >= low) & (targets <= high)).mean(0) - 0.8) < 4 * error).all()
    assert (((targets >= plain[0]) & (targets <= plain[1])).mean(0) < 0.6).all()


def test_against_netcal():
    """netcal 1.4.0 maps the k-th PIT of n to k / n, this to (k - 1/2) / n: 1 / n apart at most, between knots too."""
    netcal = pytest.importorskip("netcal.regression")
    pred, targets = problem(members=1)
    mean, std = np.asarray(pred.mean[0], np.float64), np.sqrt(np.asarray(pred.variance[0], np.float64))
    fitted = calibrate.fit_quantile_map(pred, targets)
    other = netcal.IsotonicRegression()
    other.fit((mean, std), targets.astype(np.float64))
    for d in range(2):
        at = np.linspace(fitted.pits[d, 1], fitted.pits[d, -2], 50)
        ours = np.interp(at, fitted.pits[d], fitted.levels[d])
        assert abs(ours - other._iso[d].predict(at)).max() <= 1 / 400 + 1e-4
    scaling = netcal.VarianceScaling()
    scaling.fit((mean, std), targets.astype(np.float64))
    np.testing.assert_allclose(
        calibrate.fit_variance_scaling(pred, targets).factor, np.square(scaling._weight).ravel(), rtol=1e-3
    )


def test_traces_weighs_and_keeps_nan():
    pred, targets = problem()
    weights = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [150, 100, 150])).astype(np.float32)
    rows = np.repeat(np.arange(400), weights.astype(int))
    spoiled = bc.Gaussian(jnp.asarray(pred.mean).at[:, 7].set(jnp.nan), pred.variance)
    for fit in (calibrate.fit_variance_scaling, calibrate.fit_quantile_map):
        plain, repeated = fit(pred, targets, weights=weights), fit(bc.take(pred, rows), targets[rows])
        traced = jax.jit(fit)(pred, targets, weights=weights)
        read = lambda f, p: f(p).pooled_variance() if hasattr(f, "factor") else f(p).cdf(targets)
        for other in (repeated, traced):
            np.testing.assert_allclose(read(plain, pred), read(other, pred), rtol=1e-4, atol=1e-5)
        out = np.asarray(jax.jit(read)(plain, spoiled))
        assert np.isnan(out[7]).all() and np.isfinite(np.delete(out, 7, 0)).all()
        absent = bc.Gaussian(
            jnp.asarray(pred.mean).at[:, weights == 0].set(jnp.nan), pred.variance
        )  # may hold anything
        np.testing.assert_allclose(
            read(fit(absent, targets, weights=weights), pred), read(plain, pred), rtol=1e-4, atol=1e-5
        )
    out = np.asarray(plain(spoiled).quantile(0.7))
    assert np.isnan(out[7]).all() and np.isfinite(np.delete(out, 7, 0)).all()


def test_dead_members_of_outlying_quantiles():
    """A quantile that the fit saw only where F is 0 in float32 is -infinity, whatever a member of weight 0 holds."""
    mapped = calibrate.QuantileMap(np.array([[0, 0, 0.5, 1]], np.float32), np.array([[0, 0.4, 0.6, 1]], np.float32))
    mean, variance = np.zeros((2, 3, 1), np.float32), np.ones((2, 3, 1), np.float32)
    mean[1] = np.nan
    dead = bc.Gaussian(mean, variance, member_weights=np.array([1, 0], np.float32))
    assert (mapped(dead).quantile(0.1) == -np.inf).all()
    assert np.isnan(mapped(bc.Gaussian(mean, variance)).quantile(0.1)).all()


def test_errors(unchecked):
    pred, targets = problem(rows=20)
    for fit in (calibrate.fit_variance_scaling, calibrate.fit_quantile_map):
        with pytest.raises(TypeError, match="`pred` must be a Gaussian, got Categorical"):
            fit(bc.Categorical(np.zeros((1, 3, 2), np.float32)), targets)
        with pytest.raises(ValueError, match="`pred` must have the 2 dimensions of the fit, got 1"):
            fit(pred, targets)(bc.Gaussian(pred.mean[..., :1], pred.variance[..., :1]))
        with pytest.raises(ValueError, match="`pred` must have one batch axis"):
            fit(bc.Gaussian(pred.mean[:, None], pred.variance[:, None]), targets[None])
        with pytest.raises(ValueError, match="`targets` must be finite"):
            fit(pred, targets * np.nan)
    with pytest.raises(ValueError, match="`targets` must differ from their forecasts"):
        calibrate.fit_variance_scaling(pred, np.array(pred.pooled_mean()))
    with pytest.raises(ValueError, match="`targets` must have at least two rows"):
        calibrate.fit_quantile_map(bc.take(pred, np.array([0])), targets[:1])
    for ask in ("quantile", "interval"):
        with pytest.raises(ValueError, match=r"`level` must lie in \(0, 1\), got 1"):
            getattr(calibrate.fit_quantile_map(pred, targets)(pred), ask)(1)
