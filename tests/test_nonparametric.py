import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from test_metrics import REFERENCE

import bayescal as bc
from bayescal.calibrate import (
    Calibrator,
    HistogramBinning,
    Isotonic,
    fit_bayesian_binning,
    fit_histogram,
    fit_isotonic,
    fit_scaling_binning,
    fit_shared_isotonic,
)
from bayescal.calibrate.histogram import equal_mass_edges, place
from bayescal.types import pytree

pytestmark = pytest.mark.core


def binary(p):
    p = np.asarray(p)
    return bc.Probabilities(np.stack([1 - p, p], -1).astype(np.float32)[None])


def event(pred):
    return np.asarray(pred.pooled_mean())[:, 1]


def at(fitted, p):
    """Probability of class 1 after the map where it was p: in one shape for all, which compiles once."""
    p = np.asarray(p)
    return event(fitted(binary(np.resize(p, 300))))[: len(p)]


def yes_or_no(seed, rows=300, decimals=2):
    """Probabilities with ties, and outcomes that are less sure than they say."""
    rng = np.random.default_rng(seed)
    p = np.clip(rng.beta(0.7, 0.9, rows).round(decimals), 0.01, 0.99)
    return p, (rng.uniform(size=rows) < 0.2 + 0.5 * p).astype(np.int32)


def classes(seed, rows=300):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(rows, 3))
    targets = (logits / 2 + rng.gumbel(size=logits.shape)).argmax(1).astype(np.int32)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return bc.Probabilities(probs.astype(np.float32)[None]), targets, probs.astype(np.float32).astype(np.float64)


def min_max(p, y, w):
    """f(v) = max over a <= v of min over b >= v of the mean of y where a <= p <= b."""

    def mean(a, b):
        inside = (p >= a) & (p <= b)
        return np.average(y[inside], weights=w[inside])

    values = sorted(set(p))
    return [max(min(mean(a, b) for b in values if b >= v) for a in values if a <= v) for v in values]


def test_isotonic_by_hand():
    """Rates 1/4, 3/4, 2/4, 2/4 at four probabilities: the last three violate, and share (3 + 2 + 2) / 12."""
    p = np.repeat([0.2, 0.4, 0.6, 0.8], 4)
    y = np.array([1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1])
    fitted = fit_isotonic(binary(p), y)
    given = [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.95]
    between = (1 / 4 + 7 / 12) / 2
    np.testing.assert_allclose(at(fitted, given), [1 / 4, 1 / 4, between, 7 / 12, 7 / 12, 7 / 12, 7 / 12], rtol=1e-5)
    assert fitted.knots.shape == (1, 3)  # the ends of the blocks


@pytest.mark.parametrize("seed", [0, 2])
def test_isotonic_equals_min_max_and_scikit_learn(seed):
    p, y = yes_or_no(seed, decimals=1 + seed)
    p, y = np.resize(p[:80], 300), np.resize(y[:80], 300)  # at few probabilities: the oracle is slow
    p = p.astype(np.float32).astype(np.float64)  # the same ties
    w = np.random.default_rng(seed).uniform(0.5, 2, len(p)).astype(np.float32)
    fitted = fit_isotonic(binary(p), y, weights=w)
    np.testing.assert_allclose(at(fitted, np.unique(p)), min_max(p, y, w), atol=1e-5)
    other = IsotonicRegression(out_of_bounds="clip").fit(p, y, w)
    new = np.linspace(0.001, 0.999, 97)
    np.testing.assert_allclose(at(fitted, new), other.predict(new), atol=2e-5)


def test_isotonic_of_classes_equals_scikit_learn():
    pred, targets, probs = classes(0)
    new, _, held = classes(1)
    fresh = lambda: IsotonicRegression(out_of_bounds="clip")
    each = np.stack([fresh().fit(probs[:, k], targets == k).predict(held[:, k]) for k in range(3)], 1)
    np.testing.assert_allclose(
        fit_isotonic(pred, targets)(new).pooled_mean(), each / each.sum(1, keepdims=True), atol=1e-4
    )
    shared = fresh().fit(probs.ravel(), np.eye(3)[targets].ravel()).predict(held.ravel()).reshape(held.shape)
    ours = fit_shared_isotonic(pred, targets)
    np.testing.assert_allclose(ours(new).pooled_mean(), shared / shared.sum(1, keepdims=True), atol=1e-4)
    strict = fit_shared_isotonic(pred, targets, mixture=1e-3)(new).pooled_mean()
    np.testing.assert_array_equal(np.argsort(strict, 1), np.argsort(held, 1))  # no ties but by the flat pieces alone


def test_isotonic_is_idempotent_and_keeps_the_mean():
    p, y = yes_or_no(4)
    w = np.random.default_rng(4).integers(1, 4, len(p)).astype(np.float32)
    once = fit_isotonic(binary(p), y, weights=w)(binary(p))
    np.testing.assert_allclose(np.average(event(once), weights=w), np.average(y, weights=w), rtol=1e-5)
    np.testing.assert_allclose(event(fit_isotonic(once, y, weights=w)(once)), event(once), atol=1e-5)
    assert (np.diff(event(once)[np.argsort(p)]) >= 0).all()


def test_shared_isotonic_of_two_classes_treats_both_alike():
    p, y = yes_or_no(5)
    there = fit_shared_isotonic(binary(p), y)(binary(p))
    back = fit_shared_isotonic(binary(1 - p), 1 - y)(binary(1 - p))
    np.testing.assert_allclose(event(there), 1 - event(back), atol=1e-4)
    logits = np.log(p / (1 - p)).astype(np.float32)[None]
    one = fit_isotonic(bc.Bernoulli(logits), y)(bc.Bernoulli(logits))
    assert isinstance(one, bc.Bernoulli)
    np.testing.assert_allclose(one.pooled_mean(), event(fit_isotonic(binary(p), y)(binary(p))), atol=1e-4)


def test_rows_of_zeros_and_the_mixture():
    probs = np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], np.float32)
    fitted = Isotonic(jnp.tile(jnp.array([0.4, 0.6]), (3, 1)), jnp.tile(jnp.array([0.0, 1.0]), (3, 1)))
    after = fitted(bc.Probabilities(probs[None])).pooled_mean()
    np.testing.assert_allclose(after, [[0, 0, 1], [1, 0, 0]])
    lost = np.array([[0.35, 0.33, 0.32]] * 2, np.float32)
    np.testing.assert_allclose(fitted(bc.Probabilities(lost[None])).pooled_mean(), lost, rtol=1e-6)
    mixed = Isotonic(fitted.knots, fitted.values, 0.25)(bc.Probabilities(probs[None])).pooled_mean()
    np.testing.assert_allclose(mixed, 0.75 * np.array([[0, 0, 1], [1, 0, 0]]) + 0.25 * probs, rtol=1e-5)
    p, y = np.resize([0.1, 0.2, 0.8, 0.9], 300), np.resize([0, 0, 1, 1], 300)
    wrong, given = jnp.ones(300, int), binary([0.15] * 300)
    assert np.isneginf(fit_isotonic(binary(p), y)(given).log_prob(wrong)).all()
    saved = fit_isotonic(binary(p), y, mixture=1e-9)(given).log_prob(wrong)
    np.testing.assert_allclose(saved, math.log(1e-9 * 0.15), rtol=1e-5)


def test_recovers_a_known_map():
    """True rate 0.2 + 0.6 p: bins of 1,000 rows have a standard error of at most 0.016, and isotonic blocks are longer than
    that where the slope is not steep."""
    rng = np.random.default_rng(6)
    p = rng.uniform(size=20_000)
    y = (rng.uniform(size=len(p)) < 0.2 + 0.6 * p).astype(np.int32)
    grid = np.linspace(0.05, 0.95, 50)
    gap = lambda fitted: abs(at(fitted, grid) - (0.2 + 0.6 * grid)).mean()
    assert gap(fit_isotonic(binary(p), y)) < 0.016
    averaged = fit_bayesian_binning(binary(p), y)
    size = float(averaged.num_bins[0])  # a step of 0.6 / size is off its line by a quarter of that on average
    assert gap(averaged) < 0.6 / size / 4 + 0.5 / math.sqrt(len(p) / size)
    fitted = fit_histogram(binary(p), y, num_bins=20)
    middles = (np.arange(20) + 0.5) / 20
    assert abs(fitted.values[0] - (0.2 + 0.6 * middles)).max() < 4 * 0.016
    assert fitted.weight[0].min() == fitted.weight[0].max() == 1000


def test_histogram_by_hand():
    p, y = np.resize([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], 300), np.resize([0, 0, 1, 1, 0, 1], 300)
    fitted = fit_histogram(binary(p), y, num_bins=2)
    np.testing.assert_allclose(fitted.edges, [[0.5]], rtol=1e-6)
    np.testing.assert_allclose(at(fitted, [0.05, 0.49, 0.51]), [1 / 3, 1 / 3, 2 / 3], rtol=1e-5)
    wide = fit_histogram(binary(p), y, num_bins=5, binning="width")  # closed on the right: 0.2 is in the first bin
    np.testing.assert_array_equal(wide.weight, [[100, 50, 0, 100, 50]])
    np.testing.assert_allclose(
        at(wide, [0.15, 0.35, 0.55, 0.75, 0.95]), [0, 1, 0.55, 0.5, 1], atol=1e-6
    )  # the bin of 0.55 is empty


@pytest.mark.parametrize(("num_bins", "rows"), [(7, 49), (7, 35), (11, 300)])
def test_bins_of_equal_mass_are_equal_where_they_can_be(num_bins, rows):
    """Under jit too, where k / num_bins is not what it is elsewhere."""
    scores = jnp.asarray(np.random.default_rng(7).permutation(rows) / rows, jnp.float32)
    edges = jax.jit(equal_mass_edges, static_argnums=2)(scores, jnp.ones(rows), num_bins)
    counts = np.bincount(place(edges, scores), minlength=num_bins)
    np.testing.assert_array_equal(counts, np.diff(np.ceil(np.arange(num_bins + 1) * rows / num_bins)))


def test_one_class_is_an_error_or_stated(unchecked):
    """Where a map needs every class it says so; the others give the rates that they saw: all of class 0."""
    pred, _, _ = classes(13)
    for fit in (fit_isotonic, fit_histogram):
        with pytest.raises(ValueError, match=r"`targets` must hold every one of the 3 classes, got none of \[1, 2\]"):
            fit(pred, np.zeros(300, np.int32))
    averaged = np.asarray(fit_bayesian_binning(pred, np.zeros(300, np.int32))(pred).pooled_mean())
    assert (averaged[:, 0] > 0.5).all() and averaged.min() > 0


@pytest.mark.parametrize("binning", ["mass", "width"])
def test_histogram_leaves_no_calibration_error_in_its_bins(binning):
    pred, targets, probs = classes(7)
    w = np.random.default_rng(7).uniform(size=len(targets)).astype(np.float32)
    fitted = fit_histogram(pred, targets, num_bins=10, binning=binning, weights=w)
    for k in range(3):
        bins = np.searchsorted(np.asarray(fitted.edges[k]), probs[:, k].astype(np.float32))
        for b in range(10):
            if w[bins == b].sum() > 0:
                gap = np.average((targets == k)[bins == b] - fitted.values[k, b], weights=w[bins == b])
                assert abs(gap) < 1e-6


def test_histogram_equals_netcal():
    """Equal width alone: netcal 1.4.0 does not use the bins of equal mass that it fits."""
    p = np.array([0.05, 0.15, 0.26, 0.35, 0.45, 0.62, 0.65, 0.77, 0.9, 0.97])
    y = np.array([0, 1, 0, 0, 1, 1, 0, 1, 1, 1])
    golden = [
        0.5,
        0.5,
        1 / 3,
        1 / 3,
        1 / 3,
        0.5,
        0.5,
        1,
        1,
        1,
    ]  # HistogramBinning(bins=4).fit(p, y).transform(p), netcal 1.4.0
    fitted = fit_histogram(binary(np.resize(p, 300)), np.resize(y, 300), num_bins=4, binning="width")
    np.testing.assert_allclose(at(fitted, p), golden, atol=1e-6)
    netcal = pytest.importorskip("netcal.binning")
    rng = np.random.default_rng(8)
    p = rng.uniform(0.02, 0.98, 300)
    y = (rng.uniform(size=300) < p).astype(np.int32)
    ours = event(fit_histogram(binary(p), y, num_bins=10, binning="width")(binary(p)))
    np.testing.assert_allclose(ours, netcal.HistogramBinning(bins=10).fit(p, y).transform(p), atol=1e-6)


def stored():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    group = next(v for k, v in groups.items() if k.startswith("calibrators("))
    return inputs["pb"], inputs["yb"].astype(np.int32), lambda name: group[name]["value"]


@pytree
class Logistic(Calibrator):
    """sigmoid(slope * log-odds + offset), without Platt's smoothed targets: what uncertainty-calibration's binner scales by."""

    slope: float
    offset: float
    accuracy_preserving = False

    def __call__(self, pred):
        log_probs = pred.log_probs()
        z = self.slope * (log_probs[..., 1] - log_probs[..., 0]) + self.offset
        return bc.Bernoulli(z[None], normalised=True).as_categorical()


def fit_logistic(pred, targets, *, weights=None):
    log_probs = np.asarray(pred.log_probs(), np.float64)
    fitted = LogisticRegression(C=1e10).fit((log_probs[:, 1] - log_probs[:, 0])[:, None], targets)
    return Logistic(jnp.float32(fitted.coef_[0, 0]), jnp.float32(fitted.intercept_[0]))


def test_stored_oracles():
    p, y, value = stored()
    maps = {
        "sklearn_isotonic_binary_first8": fit_isotonic,
        "netcal_HistogramBinning10_first6": lambda *rows: fit_histogram(*rows, num_bins=10, binning="width"),
        "uc_scaling_binning_10_first6": lambda *rows: fit_scaling_binning(*rows, fit_scaler=fit_logistic, num_bins=10),
    }
    for name, fit in maps.items():
        ours = at(fit(binary(np.resize(p[:100], 300)), np.resize(y[:100], 300)), p[100 : 100 + len(value(name))])
        np.testing.assert_allclose(ours, value(name), atol=1e-6, err_msg=name)


def test_scaling_binning_gives_means_of_scaled_values():
    p, y = yes_or_no(9, decimals=6)
    chain = fit_scaling_binning(binary(p), y, num_bins=5, scaling_rows=150)
    scaler = bc.fit_temperature(binary(p[:150]), y[:150])
    scaled = np.sort(event(scaler(binary(p[150:]))))
    np.testing.assert_allclose(np.unique(event(chain(binary(p))).round(5)), scaled.reshape(5, 30).mean(1), atol=2e-5)
    assert chain.accuracy_preserving is False and isinstance(chain.steps[1], HistogramBinning)


def slow_bayesian_binning(p, y, new, prior=2.0):
    """BDeu-weighted average over equal-mass binnings, row by row; p distinct."""
    order = np.argsort(p)
    p, y, n = p[order], y[order], len(p)
    logs, rates = [], []
    for size in range(max(1, int(n ** (1 / 3) / 10)), min(n, math.ceil(10 * n ** (1 / 3))) + 1):
        cuts = [math.ceil(b * n / size) for b in range(1, size)]
        edges = [0.0, *[(p[c - 1] + p[c]) / 2 for c in cuts], 1.0]
        log, table = 0.0, []
        for low, high in itertools.pairwise(edges):
            inside = (p > low) & (p <= high)
            total, happened = int(inside.sum()), int(y[inside].sum())
            strength = prior / size
            a = strength * (low + high) / 2
            b = strength - a
            log += math.lgamma(strength) - math.lgamma(total + strength)
            log += math.lgamma(happened + a) - math.lgamma(a) + math.lgamma(total - happened + b) - math.lgamma(b)
            table.append((high, (happened + a) / (total + strength)))
        logs.append(log)
        rates.append([next(rate for high, rate in table if x <= high) for x in new])
    weights = np.exp(np.array(logs) - max(logs))
    return np.average(rates, axis=0, weights=weights)


def test_bayesian_binning_equals_the_oracle():
    rng = np.random.default_rng(10)
    p = rng.uniform(0.01, 0.99, 64).astype(np.float32).astype(np.float64)
    y = (rng.uniform(size=64) < p**2).astype(np.int32)
    new = np.linspace(0.013, 0.987, 31)
    fitted = fit_bayesian_binning(binary(p), y)
    np.testing.assert_allclose(at(fitted, new), slow_bayesian_binning(p, y, new), atol=1e-5)
    assert 1 <= fitted.num_bins[0] <= 40
    extreme = at(fit_bayesian_binning(binary(p), (p > 0.5).astype(np.int32)), p)
    assert extreme.min() > 0 and extreme.max() < 1
    strong = at(fit_bayesian_binning(binary(p), y, prior=1e6), new)
    assert abs(strong - new).max() < 0.5  # one bin holds 1/2, many follow p


def test_fits_that_are_traced_are_nan_where_undefined():
    pred, targets, _ = classes(11)
    spoiled = bc.Categorical(jnp.asarray(pred.log_probs())[None].at[0, 3].set(jnp.nan))
    for fit in (fit_isotonic, fit_shared_isotonic, fit_bayesian_binning):
        after = jax.jit(lambda pred, fit=fit: fit(pred, targets))(spoiled)(pred).pooled_mean()
        assert np.isnan(after).all()


def test_bad_input(unchecked):
    pred, targets, _ = classes(12)
    p, y = yes_or_no(12)
    for fit in (fit_isotonic, fit_shared_isotonic, fit_histogram, fit_scaling_binning):
        with pytest.raises(ValueError, match=r"`mixture` must lie in \[0, 1\), got 1.0"):
            fit(pred, targets, mixture=1.0)
    for fit in (fit_isotonic, fit_histogram):
        with pytest.raises(ValueError, match=r"`targets` must hold every one of the 3 classes, got none of \[2\]"):
            fit(pred, targets % 2)
        with pytest.raises(ValueError, match="`pred` must have the 2 classes of the fit, got 3"):
            fit(binary(p), y)(pred)
    with pytest.raises(ValueError, match="`binning` must be 'mass' or 'width', got 'equal'"):
        fit_histogram(pred, targets, binning="equal")
    for fit in (fit_histogram, fit_scaling_binning):
        with pytest.raises(ValueError, match="`num_bins` must be at most the number of rows, 300, got 301"):
            fit(pred, targets, num_bins=301)
        with pytest.raises(ValueError, match="`num_bins` must be a whole number of at least 1, got 0"):
            fit(pred, targets, num_bins=0)
    with pytest.raises(ValueError, match=r"`scaling_rows` must leave rows on both sides, in \[1, 299\], got 300"):
        fit_scaling_binning(pred, targets, scaling_rows=300)

    def hungry(pred, targets, *, weights):
        groups = np.zeros(len(targets), np.int32)
        return bc.calibrate.fit_groupwise_temperature(pred, targets, features=groups, num_groups=1, weights=weights)

    with pytest.raises(ValueError, match=r"`fit_scaler` must give a calibrator of the predictive alone, got one that"):
        fit_scaling_binning(pred, targets, fit_scaler=hungry)
    with pytest.raises(ValueError, match="`prior` must be positive and finite, got 0"):
        fit_bayesian_binning(pred, targets, prior=0)
