"""Scores and calibration of forecasts of numbers: mixtures of normals, and samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_scores as oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_regression import (
    DIM,
    EMPTY,
    EQUAL,
    FEW,
    MEMBERS,
    METRICS,
    PAIRS,
    ROWS,
    SUMS,
    normals,
    of_mixtures,
    of_samples,
    of_variances,
    values,
)

import bayescal as bc
from bayescal.evaluate import read_columns
from bayescal.metrics.crps import crps_ensemble, crps_gaussian, energy_score, mixture_crps
from bayescal.metrics.pit import (
    LevelSums,
    ensemble_pit,
    pit_diagram,
    quantile_calibration_error,
)
from bayescal.metrics.regression import (
    interval_score,
    mixture_cdf,
    mixture_quantile,
    pinball,
)
from bayescal.metrics.variances import expected_normalised_calibration_error, uncertainty_calibration_error

pytestmark = pytest.mark.core


@pytest.mark.parametrize("weights", [EQUAL, np.float32([2, 0, 1])])
def test_mixtures_against_loops(rng, weights):
    pred, y = normals(rng, weights)
    mean = pred.mean.copy()
    mean[weights == 0] = np.nan  # counts for nothing
    ours, sums = values(bc.Gaussian(mean, pred.variance, pred.mean_variance, weights), y)
    share = oracles.shares(weights, MEMBERS, ROWS)[:, 0]
    variance = pred.variance.astype(np.float64) + pred.mean_variance
    places = [(i, d) for i in range(ROWS) for d in range(DIM)]
    of = lambda i, d: (pred.mean[:, i, d].astype(np.float64), variance[:, i, d], share)
    u = np.array([oracles.cdf(*of(i, d), y[i, d]) for i, d in places])
    by_dim = u.reshape(ROWS, DIM)
    mixtures = of_mixtures(pred, y)
    np.testing.assert_allclose(mixtures["pit"], by_dim, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours["coverage"], ((u >= 0.05) & (u <= 0.95)).mean(), rtol=1e-6)

    quantiles = {q: np.array([oracles.quantile(*of(i, d), q) for i, d in places]) for q in (0.05, 0.95)}
    low, high, seen = quantiles[0.05], quantiles[0.95], y.astype(np.float64).ravel()
    np.testing.assert_allclose(ours["width"], (high - low).mean(), rtol=1e-5)
    score = [oracles.interval_score(*x, 0.9) for x in zip(low, high, seen, strict=True)]
    np.testing.assert_allclose(ours["winkler"], np.mean(score), rtol=1e-5)
    loss = [oracles.pinball(f, x, 0.05) for f, x in zip(low, seen, strict=True)]
    np.testing.assert_allclose(ours["quantile"], np.mean(loss), rtol=1e-5)

    pooled = np.einsum("s,sid->id", share, pred.mean.astype(np.float64))
    total = np.einsum("s,sid->id", share, variance + (pred.mean - pooled) ** 2)
    np.testing.assert_allclose(ours["mse"], ((pooled - y) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["mse sum"], DIM * ours["mse"], rtol=1e-5)
    np.testing.assert_allclose(ours["rmse"], math.sqrt(ours["mse"]), rtol=1e-6)
    np.testing.assert_allclose(ours["sharpness"], math.sqrt(total.mean()), rtol=1e-5)
    alone = ((pred.mean.astype(np.float64) - y) ** 2).mean((1, 2))
    np.testing.assert_allclose(ours["mean mse"], share @ alone, rtol=1e-5)

    gaps = np.stack([oracles.level_gaps(by_dim[:, d], FEW, "quantile") for d in range(DIM)])
    inside = np.stack([oracles.level_gaps(by_dim[:, d], FEW, "interval") for d in range(DIM)])
    assert (gaps.min() < -0.02) and (gaps.max() > 0.02)  # the curve crosses the diagonal
    np.testing.assert_allclose(ours["qce"], abs(gaps).mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["qce max"], abs(gaps).max(), rtol=1e-5)
    np.testing.assert_allclose(ours["qce interval"], math.sqrt((inside**2).mean()), rtol=1e-5)
    np.testing.assert_allclose(ours["area"], np.mean([oracles.area(FEW, g) for g in gaps]), rtol=1e-5)
    curve = SUMS["curve"].compute(sums["curve"])
    np.testing.assert_allclose(curve.share - curve.level, gaps, atol=1e-6)
    assert (curve.low < curve.share).all() and (curve.share < curve.high).all()
    counts = np.stack([np.histogram(by_dim[:, d], 5, (0, 1))[0] for d in range(DIM)])
    np.testing.assert_array_equal(sums["pit"].weight, counts)
    some = [(i, d) for i, d in places[:20]]
    exact = [oracles.crps(*of(i, d), float(y[i, d])) for i, d in some]
    np.testing.assert_allclose(mixtures["crps"][:10].ravel(), exact, rtol=2e-5)
    np.testing.assert_allclose(ours["crps"], np.mean(mixtures["crps"]), rtol=1e-5)
    np.testing.assert_allclose(ours["crps sum"], DIM * ours["crps"], rtol=1e-5)


def test_samples_against_loops(rng):
    x, y = rng.normal(size=(ROWS, 16)).astype(np.float32), rng.normal(size=ROWS).astype(np.float32)
    x = np.where(rng.uniform(size=x.shape) < 0.3, np.round(x), x)  # with ties, and on y
    y[:20] = np.round(y[:20])
    many, seen = rng.normal(size=(ROWS, 16, 3)).astype(np.float32), rng.normal(size=(ROWS, 3)).astype(np.float32)
    ours = of_samples(x, y, many, seen)
    wide = [a.astype(np.float64) for a in (x, y, many, seen)]
    for name, fair in (("fair", True), ("v", False)):
        expected = [oracles.crps_samples(a, b, fair) for a, b in zip(wide[0], wide[1], strict=True)]
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-7)
        expected = [oracles.energy(a, b, fair) for a, b in zip(wide[2][:40], wide[3], strict=False)]
        np.testing.assert_allclose(ours[f"energy {name}"][:40], expected, rtol=1e-5)
    for name, p, pairs in (("variogram", 0.5, np.ones((3, 3))), ("variogram 1", 1, PAIRS)):
        expected = [oracles.variogram(a, b, p, pairs) for a, b in zip(wide[2][:40], wide[3], strict=False)]
        np.testing.assert_allclose(ours[name][:40], expected, rtol=2e-5)
    line = np.concatenate([x[..., None], np.zeros((ROWS, 16, 2), np.float32)], -1)
    flat = of_samples(x, y, line, np.stack([y, 0 * y, 0 * y], -1))
    for name in ("fair", "v"):  # in one dimension they are the same
        np.testing.assert_allclose(flat[f"energy {name}"], flat[name], rtol=1e-5, atol=1e-6)


def test_samples_by_hand():
    """Eight samples at 0 and eight at 1, seen at 3; all at (3, 4, 0), seen at the origin; a NaN."""
    x, y = np.zeros((ROWS, 16), np.float32), np.full(ROWS, 3, np.float32)
    many, seen = np.zeros((ROWS, 16, 3), np.float32), np.zeros((ROWS, 3), np.float32)
    x[:, :8], x[1, 5], many[:] = 1, np.nan, [3, 4, 0]
    ours = of_samples(x, y, many, seen)
    np.testing.assert_allclose(ours["v"][0], 2.25, rtol=1e-6)
    np.testing.assert_allclose(ours["fair"][0], 2.5 - 64 / 240, rtol=1e-6)
    assert np.isnan(ours["v"][1]) and np.isfinite(ours["v"][2:]).all()
    np.testing.assert_allclose([ours["energy fair"], ours["energy v"]], 5, rtol=1e-6)
    np.testing.assert_allclose(ours["variogram"], 2 * (1 + 3 + 4), rtol=1e-5)
    single = crps_ensemble(np.zeros((1, 1), np.float32), np.full(1, 3, np.float32), estimator="v")
    np.testing.assert_allclose(single, 3)


@jax.jit
def of_plain(mean, std, seen):
    return {
        "crps": crps_gaussian(mean, std, seen),
        "interval": interval_score(mean, mean + 2, seen, level=0.9),
        "crossed": interval_score(mean + 2, mean, seen, level=0.9),
        "pinballs": 20 * (pinball(mean + 2, seen, quantile=0.05) + pinball(mean, seen, quantile=0.95)),
        "pinball": pinball(mean, seen, quantile=0.2),
        "slope": jax.grad(lambda m: crps_gaussian(m, std, seen).sum())(mean),
        "corner": jax.grad(lambda m: energy_score(m[None] + jnp.zeros((3, 6)), m))(mean),
    }


@jax.jit
def of_two(pred, y):
    tails = [mixture_quantile(pred, quantile=q) for q in (1e-6, 0.5, 1 - 1e-6)]
    return mixture_cdf(pred, y), mixture_crps(pred, y), *tails


def test_by_hand():
    """Normals of standard deviation 1, 2 and 0, a very narrow one, and a mixture of two."""
    std = np.array([1, 2, 0, 1e-30, 1e-6, 0], np.float32)
    ours = of_plain(np.zeros(6, np.float32), std, np.array([0, 4, -3, 5, 1e4, 1], np.float32))
    two = 2 * (2 * (2 * 0.9772498680518208 - 1) + 2 * oracles.phi(2) - 1 / math.sqrt(math.pi))
    np.testing.assert_allclose(ours["crps"], [(math.sqrt(2) - 1) / math.sqrt(math.pi), two, 3, 5, 1e4, 1], rtol=1e-6)
    np.testing.assert_allclose(ours["interval"][:4], [2, 42, 62, 62], rtol=1e-6)
    np.testing.assert_allclose(ours["crossed"], ours["pinballs"], rtol=1e-5)
    np.testing.assert_allclose(ours["pinball"][:3], [0, 0.8, 2.4], rtol=1e-6)
    np.testing.assert_allclose(ours["slope"][2:], [1, -1, -1, -1], rtol=1e-6)
    np.testing.assert_array_equal(ours["corner"], 0)  # and not NaN, where samples and y coincide
    pred = bc.Gaussian(np.array([[[0.0]], [[4.0]]], np.float32), np.ones((2, 1, 1), np.float32))
    reached, score, low, middle, high = of_two(pred, np.full((1, 1), 2, np.float32))
    np.testing.assert_allclose([reached, middle], [[[0.5]], [[2]]], rtol=1e-5)
    distance = 2 * (2 * 0.9772498680518208 - 1) + 2 * oracles.phi(2)  # A(2, 1)
    apart = 2 / math.sqrt(math.pi) + 2 * math.sqrt(2) * oracles.phi(math.sqrt(8)) + 4 * math.erf(2)  # A(0, 2) + A(4, 2)
    np.testing.assert_allclose(score, distance - apart / 4, rtol=1e-5)
    tails = [oracles.quantile([0, 4], [1, 1], [0.5, 0.5], q) for q in (1e-6, 1 - 1e-6)]
    np.testing.assert_allclose([low[0, 0], high[0, 0]], tails, rtol=1e-5)


def test_one_member_is_the_normal(rng):
    from scipy.stats import norm

    pred, y = normals(rng, None, (1, ROWS, DIM))
    mean, std = pred.mean[0].astype(np.float64), np.sqrt(pred.variance[0].astype(np.float64) + pred.mean_variance[0])
    plain = jax.jit(crps_gaussian)(mean.astype(np.float32), std.astype(np.float32), y)
    ours = of_mixtures(pred, y)
    np.testing.assert_allclose(ours["crps"], plain, rtol=2e-5)
    z = (y - mean) / std
    closed = std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))
    np.testing.assert_allclose(plain, closed, rtol=2e-5)
    np.testing.assert_allclose(ours["pit"], norm.cdf(z), rtol=1e-5, atol=1e-7)
    for end, q in zip(ours["ends"], (0.01, 0.99), strict=True):
        np.testing.assert_allclose(end, norm.ppf(q, mean, std), rtol=1e-5, atol=1e-5)
    copies = bc.Gaussian(*(np.repeat(x, 4, 0) for x in (pred.mean, pred.variance, pred.mean_variance)))
    ours = of_mixtures(copies, y)  # an even number of members
    np.testing.assert_allclose(ours["crps"], plain, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(ours["ends"][1], norm.ppf(0.99, mean, std), rtol=1e-5, atol=1e-5)


def test_float32_keeps_its_digits(rng):
    """Targets and samples around 10^4 with a spread of 1."""
    pred, y = normals(rng)
    far = bc.Gaussian((pred.mean + 1e4).astype(np.float32), pred.variance, pred.mean_variance, EQUAL)
    back = bc.Gaussian((far.mean - 1e4).astype(np.float32), pred.variance, pred.mean_variance, EQUAL)
    seen = (y + 1e4).astype(np.float32)
    near = of_mixtures(back, (seen - 1e4).astype(np.float32))
    np.testing.assert_allclose(of_mixtures(far, seen)["crps"], near["crps"], rtol=1e-5)
    x = (1e4 + rng.normal(size=(ROWS, 16))).astype(np.float32)
    ours, wide = of_samples(x, seen[:, 0], *EMPTY)["fair"], (x.astype(np.float64), seen[:, 0].astype(np.float64))
    exact = [oracles.crps_samples(a, b, True) for a, b in zip(*wide, strict=True)]
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


def test_direction_of_the_quantiles():
    """Forecasts three sigma too high: everything seen is below the median, P(y <= q50) = 1, and the PIT is near 0."""
    mean = np.full((1, ROWS, DIM), 3.0, np.float32)
    pred, y = bc.Gaussian(mean, np.ones_like(mean)), np.zeros((ROWS, DIM), np.float32)
    ours, sums = values(pred, y)
    assert (SUMS["curve"].compute(sums["curve"]).share[:, 1:] == 1).all()
    np.testing.assert_allclose(ours["qce"], np.mean([1 - q for q in FEW]), rtol=1e-6)
    density = pit_diagram(sums["pit"]).density
    assert (density[:, 0] == 5).all() and (density[:, 1:] == 0).all()
    assert ours["coverage"] == 0


def test_calibrated_forecasts_stay_in_their_bands(rng):
    pred, _ = normals(rng)
    y = np.asarray(pred.sample(jax.random.key(0)))
    ours, sums = values(pred, y)
    diagram = pit_diagram(sums["pit"])
    assert ((diagram.density >= diagram.low) & (diagram.density <= diagram.high)).sum() >= 9  # of 10, each 95 %
    np.testing.assert_allclose(diagram.density.mean(-1), 1)
    assert abs(ours["coverage"] - 0.9) < 0.04 and ours["qce"] < 0.05
    assert METRICS["qce"].interval(sums["qce"])[0] == 0


def test_the_bound_on_quantiles_covers(rng):
    """The interval holds the true error of a forecast known to be off, in at least 95 of 100 samples."""
    from scipy.special import ndtr, ndtri

    metric, hits = METRICS["qce"], 0
    truth = np.mean([abs(ndtr(0.6 * ndtri(q)) - q) for q in FEW])  # standard deviations 0.6 of what they should be
    for _ in range(300):
        u = ndtr(rng.normal(size=ROWS) / 0.6)
        inside = (u[:, None] <= np.array(FEW)).sum(0, dtype=np.float64)[None]
        low, high = metric.interval(LevelSums(inside, np.float64(ROWS), np.float64(ROWS)))
        hits += low <= truth <= high
    assert hits / 300 >= 0.95


def test_ensemble_pit_is_uniform(rng):
    """Also with few samples and many ties, where the plain share of samples below is far from uniform."""
    from scipy.stats import kstest

    for draw in (rng.normal, lambda size: np.round(rng.normal(size=size))):
        x, y = draw(size=(5000, 4)), draw(size=5000)
        x[0], y[0], x[1, 3] = [1, 2, 3, 4], 3.5, np.nan
        u = np.asarray(jax.jit(ensemble_pit)(x.astype(np.float32), y.astype(np.float32), jax.random.key(0)))
        assert 0.6 <= u[0] < 0.8 and math.isnan(u[1])
        x, y, u = x[2:], y[2:], u[2:]
        assert kstest(u, "uniform").pvalue > 0.01
        assert kstest((x < y[:, None]).mean(1), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_variance_bins_against_loops(rng, weighted):
    variance = np.exp(rng.normal(size=ROWS))
    variance = np.where(rng.uniform(size=ROWS) < 0.3, np.round(variance), variance).astype(np.float32) + 0.01  # ties
    error = (variance * rng.normal(size=ROWS) ** 2 * 1.5).astype(np.float32)
    weights = rng.integers(0, 3, ROWS).astype(np.float32) if weighted else np.ones(ROWS, np.float32)
    ours = of_variances(variance, error, weights)
    wide = variance.astype(np.float64), error.astype(np.float64)
    kept = weights > 0
    by_mass = oracles.uce_and_ence(*wide, oracles.variance_groups(wide[0], 10, weights), weights)
    np.testing.assert_allclose([ours["uce mass"], ours["ence mass"]], by_mass, rtol=1e-5)
    for name, key in (("uce", wide[0]), ("ence", np.sqrt(wide[0]))):
        edges = np.linspace(key[kept].min(), key[kept].max(), 11)
        place = np.clip(np.searchsorted(edges, key, side="right") - 1, 0, 9)
        bins = [[i for i in range(ROWS) if place[i] == b] for b in range(10)]
        expected = oracles.uce_and_ence(*wide, bins, weights)[name == "ence"]
        np.testing.assert_allclose(ours[f"{name} width"], expected, rtol=1e-5)
    repeated = np.repeat(np.arange(ROWS), weights.astype(int))
    twice = oracles.uce_and_ence(wide[0][repeated], wide[1][repeated], oracles.variance_groups(wide[0][repeated], 10))
    np.testing.assert_allclose(by_mass, twice, rtol=1e-9)  # so that a weight is a repetition for ours too
    order = rng.permutation(ROWS)
    for name, value in of_variances(variance[order], error[order], weights[order]).items():
        np.testing.assert_allclose(value, ours[name], rtol=1e-5)


def test_variances_by_hand():
    variance, error = np.repeat([1.0, 4.0], 100).astype(np.float32), np.repeat([4.0, 4.0], 100).astype(np.float32)
    ours = of_variances(variance, error, np.ones(ROWS, np.float32))
    for binning in ("mass", "width"):
        assert float(ours[f"uce {binning}"]) == 1.5  # half of |4 - 1|
        assert float(ours[f"ence {binning}"]) == 0.5  # half of |2 - 1| / 1
    alike = of_variances(np.ones(ROWS, np.float32), error, np.ones(ROWS, np.float32))
    assert all(float(alike[f"uce {binning}"]) == 3 for binning in ("mass", "width"))  # all in one bin
    assert all(math.isnan(x) for x in of_variances(variance, error, np.zeros(ROWS, np.float32)).values())
    tiny = of_variances(1e-4 * variance, 1e6 * error, np.ones(ROWS, np.float32))
    np.testing.assert_allclose(tiny["ence mass"], (2e5 - 1 + 1e5 - 1) / 2, rtol=1e-5)  # no digits of the variance lost


def test_intervals_of_variance_metrics(rng):
    """Neither is sure of a gap for calibrated forecasts, both are for variances four times too small."""
    variance = np.exp(rng.normal(size=(1, ROWS, DIM))).astype(np.float32)
    pred = bc.Gaussian(np.zeros_like(variance), variance)
    noise = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    metrics = {"uce": uncertainty_calibration_error(dim=1, num_bins=5)}
    metrics["ence"] = expected_normalised_calibration_error(dim=1, num_bins=5)
    for factor, truth in ((1, 0), (2, 1)):
        y = factor * np.sqrt(variance[0]) * noise
        for name, e in bc.evaluate(pred, y, metrics).items():
            unit = variance[0, :, 1].mean() * 3 if name == "uce" else 1
            assert truth * unit <= e.high and (e.low > 0.05 * unit) == (truth > 0), (name, e)
            assert "dimension 1; 5 equal-mass bins" in e.convention
    read = read_columns(pred, y, metrics["uce"].read)
    assert metrics["uce"].read is metrics["ence"].read
    np.testing.assert_allclose(read[1], y[:, 1] ** 2, rtol=1e-6)
    single = metrics["uce"].interval(*(x[:7] for x in read), None)
    assert single == (None, None)  # bins of one row


def test_estimates_and_their_intervals(rng):
    pred, y = normals(rng)
    names = ("crps", "rmse", "coverage", "sharpness", "qce")
    ours = bc.evaluate(pred, y, {name: METRICS[name] for name in names})
    for name in names:
        assert ours[name].low < ours[name].value < ours[name].high, name
    rows = np.asarray(of_mixtures(pred, y)["crps"]).mean(-1)
    np.testing.assert_allclose(
        ours["crps"].high - ours["crps"].value, 1.959964 * rows.std() / math.sqrt(ROWS), rtol=1e-3
    )
    rate, ends = ours["coverage"].value, np.array([ours["coverage"].low, ours["coverage"].high])
    np.testing.assert_allclose((rate - ends) ** 2, 1.959964**2 * ends * (1 - ends) / ROWS, rtol=1e-5)  # Wilson
    assert "central 90 % interval" in ours["coverage"].convention and ours["coverage"].low < 0.9
    assert METRICS["coverage"].better == "neither" and not METRICS["qce"].regular
    assert "levels 0.05, 0.3, 0.5, 0.95" in ours["qce"].convention and "100 levels" in METRICS["mace"].convention
    assert quantile_calibration_error(levels=np.array(FEW)) is METRICS["qce"]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**31))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    pred, y = normals(rng)
    weights = rng.multinomial(ROWS, np.ones(ROWS) / ROWS)
    repeated, order = np.repeat(np.arange(ROWS), weights), rng.permutation(ROWS)
    plain = values(pred, y, weights)[0]
    turned = bc.Gaussian(*(np.roll(x, 1, 0) for x in (pred.mean, pred.variance, pred.mean_variance)), EQUAL)
    versions = {
        "repetition": values(bc.take(pred, repeated), y[repeated]),
        "order": values(bc.take(pred, order), y[order], weights[order]),
        "members": values(turned, y, weights),
        "scale": values(pred, y, weights * 0.25),
        "merging": values(bc.take(pred, order), y[order], weights[order], batch_size=50),
    }
    for version, (theirs, _) in versions.items():
        for name in METRICS:
            np.testing.assert_allclose(theirs[name], plain[name], rtol=3e-5, atol=1e-6, err_msg=f"{version} {name}")


def test_units(rng):
    """In another unit scores scale with it, and calibration does not change."""
    pred, y = normals(rng)
    plain, scaled = (values(*x)[0] for x in ((pred, y), (bc.rescale(pred, 2.0, 4.0), 2 + 4 * y)))
    powers = {
        "crps": 1,
        "rmse": 1,
        "mse": 2,
        "sharpness": 1,
        "width": 1,
        "winkler": 1,
        "quantile": 1,
        "coverage": 0,
        "qce": 0,
    }
    for name, power in powers.items():
        np.testing.assert_allclose(scaled[name], 4**power * plain[name], rtol=1e-5, err_msg=name)
