"""Conformal regression: scores of residuals and quantiles under every procedure."""

import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformal_bands import ALPHAS, coverage_band
from scipy.stats import norm
from test_metrics import REFERENCE

import bayescal as bc
from bayescal import conformal
from bayescal.conformal import Interval, absolute, fit_split, normalised, rank

pytestmark = pytest.mark.core
EPISTEMIC = conformal.epistemic_deviation(floor=0.1)
SCORES = {
    "absolute": absolute(),
    "normalised": normalised(),
    "epistemic": normalised(EPISTEMIC),
    "above": conformal.above(),
    "below": conformal.below(),
    "quantiles": conformal.quantile_score(alpha=0.3),
}


def normals(seed, rows=40, members=3, dim=2):
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(members, rows, dim)).astype(np.float32)
    variance = rng.uniform(0.2, 2, size=mean.shape).astype(np.float32)
    return bc.Gaussian(mean, variance), (mean.mean(0) + rng.normal(size=(rows, dim))).astype(np.float32)


def mixture_cdf_inverse(mean, sd, q):
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(norm.cdf((middle - mean) / sd)) < q else (low, middle)
    return low


def oracle(name, pred, targets, new, alpha):
    """Ends (2, rows, dim) of the intervals by loops in float64."""
    ends = np.zeros((2, *new.mean.shape[1:]))
    for d in range(targets.shape[1]):
        describe = lambda p, i, d=d: (p.mean[:, i, d].astype(float), np.sqrt(p.variance[:, i, d].astype(float)))
        scores = []
        for i, y in enumerate(targets[:, d].astype(float)):
            low, high, scale = band(name, *describe(pred, i))
            scores.append({"above": y - high, "below": low - y}.get(name, max(low - y, y - high)) / scale)
        k = math.ceil((len(targets) + 1) * (1 - Fraction(str(alpha))))
        q = sorted(scores)[k - 1] if k <= len(scores) else np.inf
        for i in range(new.mean.shape[1]):
            low, high, scale = band(name, *describe(new, i))
            ends[0, i, d] = -np.inf if name == "above" else low - q * scale
            ends[1, i, d] = np.inf if name == "below" else high + q * scale
    return ends


def band(name, mean, sd):
    centre = mean.mean()
    if name == "quantiles":
        return mixture_cdf_inverse(mean, sd, 0.15), mixture_cdf_inverse(mean, sd, 0.85), 1.0
    scale = {"normalised": math.sqrt((sd**2).mean() + mean.var()), "epistemic": mean.std() + 0.1}
    return centre, centre, scale.get(name, 1.0)


@pytest.mark.parametrize("name", SCORES)
def test_equals_the_oracle(name, unchecked):
    pred, targets = normals(0)
    new, _ = normals(1, rows=15)
    width = -np.inf
    for alpha in (0.2, 0.1, 0.01):
        got = fit_split(pred, targets, SCORES[name], alpha=alpha)(new)
        np.testing.assert_allclose(np.stack(got), oracle(name, pred, targets, new, alpha), rtol=1e-4, atol=1e-4)
        assert float((got.high - got.low).min()) >= width  # monotone in alpha
        width = float((got.high - got.low).min())
        if alpha == 0.01:  # 41 * 0.99 > 40
            assert np.isinf(got.high).all() or name == "below"


def simulate(key, rows, new):
    """Three members around a mean, with noise that grows; they disagree where it does."""
    keys = jax.random.split(key, 4)
    inputs = jax.random.uniform(keys[0], (rows + new, 1))
    spread = 0.2 + inputs
    mean = jnp.sin(3 * inputs) + 0.5 * spread * jax.random.normal(keys[1], (3, rows + new, 1))
    targets = jnp.sin(3 * inputs) + spread * jax.random.normal(keys[2], (rows + new, 1))
    pred = bc.Gaussian(mean, jnp.broadcast_to(0.5 * spread**2, mean.shape))
    return bc.take(pred, slice(0, rows)), targets[:rows], bc.take(pred, slice(rows, None)), targets[rows:]


def inside(interval, targets):
    return ((interval.low <= targets) & (targets <= interval.high)).mean()


def test_coverage_is_exactly_that_of_order_statistics():
    repetitions, rows, new = 1000, 120, 40

    @jax.jit
    @jax.vmap
    def run(key):
        pred, targets, test, truth = simulate(key, rows, new)

        def of(score):  # as `fit_split`, which `test_equals_the_oracle` has
            scores = score.measure(pred, targets, None)
            thresholds = jnp.stack([conformal.order_statistic(scores, rank(rows, a)) for a in ALPHAS])
            return jax.vmap(lambda t: inside(score.region(test, t, None), truth))(thresholds)

        return jnp.array([of(score) for score in SCORES.values()])

    coverage = np.asarray(run(jax.random.split(jax.random.key(0), repetitions))).mean(0)
    for place, alpha in enumerate(ALPHAS):
        low, high = coverage_band(repetitions, rows, new, rank(rows, alpha))
        assert (coverage[:, place] >= low).all() and (coverage[:, place] <= high).all(), (alpha, coverage[:, place])


def test_groups_and_weights():
    """Mondrian is a split per group, and weights of one are a split."""
    pred, targets = normals(2, rows=200)
    new, _ = normals(3, rows=20)
    groups = np.arange(200) % 2
    for score in (SCORES["normalised"], SCORES["above"]):
        plain = fit_split(pred, targets, score, alpha=0.1)(new)
        ones = conformal.fit_weighted(pred, targets, score, alpha=0.1, weights=np.ones(200, np.float32))
        np.testing.assert_allclose(np.stack(ones(new, weights=np.ones(20, np.float32))), np.stack(plain), rtol=1e-6)
        mondrian = conformal.fit_mondrian(pred, targets, score, alpha=0.1, groups=groups, num_groups=2)
        odd = fit_split(bc.take(pred, groups == 1), targets[groups == 1], score, alpha=0.1)(new)
        np.testing.assert_allclose(
            np.stack(mondrian(new, groups=np.ones(20, np.int32))), np.stack(odd), rtol=1e-6, atol=1e-6
        )


def test_disagreement_widens_the_interval():
    pred, targets = normals(4)
    fit = fit_split(pred, targets, normalised(EPISTEMIC), alpha=0.1)
    agree = bc.Gaussian(np.zeros((3, 1, 2), np.float32), np.ones((3, 1, 2), np.float32))
    differ = bc.Gaussian(agree.mean + np.arange(3, dtype=np.float32)[:, None, None], agree.variance)
    noisy = bc.Gaussian(agree.mean, 100 * agree.variance)
    width = lambda p: np.subtract(*fit(p)[::-1])
    np.testing.assert_allclose(width(agree), 0.2 * np.asarray(fit.threshold)[None], rtol=1e-5)
    assert (width(differ) > 8 * width(agree)).all() and (width(noisy) == width(agree)).all()


def test_by_hand_and_empty_intervals():
    pred = bc.Gaussian(np.zeros((1, 9, 1), np.float32), np.ones((1, 9, 1), np.float32))
    targets = np.arange(1, 10, dtype=np.float32)[:, None] / 10
    assert float(fit_split(pred, targets, absolute(), alpha=0.1).threshold[0]) == np.float32(0.9)
    assert float(fit_split(pred, targets, absolute(), alpha=0.5).threshold[0]) == np.float32(0.5)
    quantiles = conformal.quantile_score(alpha=0.1)
    shrunk = fit_split(pred, targets, quantiles, alpha=0.5)
    np.testing.assert_allclose(shrunk.threshold, [0.5 - 1.6448536], rtol=1e-5)
    tiny = bc.Gaussian(pred.mean[:, :1], 0.01 * pred.variance[:, :1])
    assert float(shrunk(tiny).low[0, 0]) > float(shrunk(tiny).high[0, 0])  # nothing is inside, as stated


def test_quantiles_of_a_network():
    pred, targets = normals(5)
    new, _ = normals(6, rows=7)
    of = lambda p: Interval(*(bc.metrics.regression.mixture_quantile(p, quantile=q) for q in (0.15, 0.85)))
    fit = conformal.fit_quantile_interval(of(pred), targets, alpha=0.2)
    assert fit.alpha == 0.2  # as the other procedures
    got = fit(of(new))
    same = fit_split(pred, targets, SCORES["quantiles"], alpha=0.2)(new)
    np.testing.assert_allclose(np.stack(got), np.stack(same), rtol=1e-6)
    everything = conformal.fit_quantile_interval(of(pred), targets, alpha=0.02)(of(new))  # 41 * 0.98 > 40
    assert np.isneginf(everything.low).all() and np.isposinf(everything.high).all()


def test_recorded_oracles():
    path = REFERENCE / "metrics_oracle_inputs.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    expected = json.loads((REFERENCE / "metrics_oracles.json").read_text())["oracles"]["conformal_regression_alpha0.1"]
    mu, sg, yr = (np.load(path)[name].astype(np.float32)[:100, None] for name in ("mu", "sg", "yr"))
    pred = bc.Gaussian(mu[None], sg[None] ** 2)
    for score, name in ((absolute(), "ref_split_abs_qhat"), (normalised(), "ref_split_normalised_qhat")):
        threshold = fit_split(pred, yr, score, alpha=0.1).threshold
        np.testing.assert_allclose(threshold, [expected[name]["value"]], rtol=1e-6)


def test_equals_crepes():
    pred, targets = normals(7, rows=60, members=1, dim=1)
    sigma = np.sqrt(pred.variance[0, :, 0].astype(float))
    residuals = targets[:, 0].astype(float) - pred.mean[0, :, 0]
    plain, scaled = (fit_split(pred, targets, score, alpha=0.1) for score in (absolute(), normalised()))
    # crepes 0.9.1: ConformalRegressor().fit(residuals, sigmas=sigmas).predict_int([0], sigmas=[1], confidence=0.9)
    np.testing.assert_allclose([plain.threshold[0], scaled.threshold[0]], [1.53683501, 1.9994082], rtol=1e-6)
    crepes = pytest.importorskip("crepes")
    for alpha in (0.05, 0.1, 0.2):
        for score, sigmas in ((absolute(), None), (normalised(), sigma)):
            peer = crepes.ConformalRegressor().fit(residuals, sigmas=sigmas)
            expected = peer.predict_int(pred.mean[0, :, 0].astype(float), sigmas=sigmas, confidence=1 - alpha)
            got = np.concatenate(fit_split(pred, targets, score, alpha=alpha)(pred), -1)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_undefined_rows_stay_undefined():
    pred, targets = normals(16)
    new, _ = normals(17, rows=6)
    spoiled = bc.Gaussian(jnp.asarray(new.mean).at[1, 2, 0].set(jnp.nan), new.variance)
    for score in SCORES.values():
        got = np.stack(jax.jit(lambda f, p: f(p))(fit_split(pred, targets, score, alpha=0.1), spoiled))
        assert np.isnan(got[:, 2, 0]).all() and not np.isnan(np.delete(got, 2, 1)).any()


def test_bad_input(unchecked):
    pred, targets = normals(18)
    with pytest.raises(TypeError, match=r"`pred` must be a Gaussian, got Categorical\. For classes use"):
        fit_split(bc.Categorical(np.zeros((1, 3, 2), np.float32)), np.zeros(3, np.int32), absolute(), alpha=0.1)
    with pytest.raises(ValueError, match=r"`floor` must be positive and finite, in the targets' unit, got 0"):
        conformal.epistemic_deviation(floor=0)
    for alpha in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="`alpha` must be the miscoverage wanted"):
            fit_split(pred, targets, absolute(), alpha=alpha)
        with pytest.raises(ValueError, match="`alpha` must be the miscoverage wanted"):
            conformal.quantile_score(alpha=alpha)
        with pytest.raises(ValueError, match="`alpha` must be the miscoverage wanted"):
            conformal.fit_quantile_interval(Interval(targets, targets), targets, alpha=alpha)
    with pytest.raises(
        ValueError,
        match=r"`pred` must have a score .* got NaN in 40 of 40 rows under residual over scale, first at 0\. Look",
    ):
        fit_split(pred, targets, normalised(lambda p: 0 * p.pooled_mean()), alpha=0.1)
    with pytest.raises(ValueError, match="`targets` must be finite"):
        fit_split(pred, np.full_like(targets, np.nan), absolute(), alpha=0.1)
    with pytest.raises(ValueError, match="`targets` must have at least one row, got none"):
        fit_split(bc.take(pred, slice(0, 0)), targets[:0], absolute(), alpha=0.1)


def test_targets_are_not_broadcast_where_traced(unchecked):
    """Targets (rows,) against means (rows, 1) would be scores (rows, rows)."""
    pred, targets = normals(18, dim=1)
    own = conformal.Conformity(lambda p, y, key: abs(y - p.pooled_mean()), absolute().region, False, "mine")
    for score in (*SCORES.values(), own):
        with pytest.raises(ValueError, match=r"`targets` must have .*shape .*\(40,\)\. Pass one target per"):
            jax.jit(lambda p, y, score=score: fit_split(p, y, score, alpha=0.1).threshold)(pred, targets[:, 0])
    for score in SCORES.values():
        with pytest.raises(ValueError, match=r"`targets` must have shape \(40, 1\), .* got \(40,\)"):
            score.measure(pred, targets[:, 0], None)


def test_bad_quantiles(unchecked):
    ones = np.ones((5, 1), np.float32)
    fit = lambda low, targets: conformal.fit_quantile_interval(Interval(low, ones), targets, alpha=0.1)
    for low, targets in ((ones[:, 0], ones), (ones, ones[:4]), (ones[:0], ones[:0])):
        with pytest.raises(ValueError, match=r"`interval` must hold `low` and `high` of the shape \(rows, dim\)"):
            fit(low, targets)
    with pytest.raises(ValueError, match=r"`interval` and `targets` must be finite, got NaN"):
        fit(np.nan * ones, ones)
