"""Intervals of the binned calibration metrics: around the truth, covering it, and where there is none; influences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_calibration import INF, METRICS, ROWS, data, sums_of, values

from bayescal.binning import Histogram
from bayescal.metrics.calibration import calibration_error, squared_calibration_error
from bayescal.metrics.fine import binned_auroc
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


def test_intervals(rng):
    """Ends around the truth; none where none is known; the weights' scale does not matter."""
    probs, targets, weights = data()
    plain, scaled = (sums_of(probs, targets, w) for w in (weights, 0.01 * weights))
    with_interval = {name for name, m in METRICS.items() if m.interval}
    assert with_interval.isdisjoint({"soft", "fine"})
    for name in sorted(with_interval - {"mce", "mce_10", "top_label_max"}):
        low, high = METRICS[name].interval(plain[name])
        assert low < high and (
            name not in ("gap", "over", "auroc", "ks", "square", "z") or low < values(True)[name] < high
        )
        np.testing.assert_allclose(
            METRICS[name].interval(scaled[name]), (low, high), rtol=1e-3, atol=1e-4, err_msg=name
        )
    rows = sums_of(probs, targets)["mce"]
    assert np.isnan(METRICS["mce"].interval(rows)).all(), "a bin of few rows says nothing of the worst"
    low, high = calibration_error(norm=INF, min_count=20).interval(rows)
    assert 0 <= low < high <= 1
    for irregular in ("ece", "average", "classwise", "soft", "ks"):
        assert not METRICS[irregular].regular, "no bootstrap for what is biased at zero"
    assert METRICS["square"].regular and METRICS["avu"].regular and METRICS["auroc"].regular


def test_bins_of_one_row_add_nothing_to_the_signed_square():
    """Nor to its interval, which holds the estimate: their gaps of 0.9 would move it to 0.3."""
    rows, gap = np.r_[50.0, np.ones(30)], np.r_[0.1, np.full(30, 0.9)]
    square = np.r_[50 * (0.1**2 + 0.25), np.full(30, 0.81)]
    sums = Histogram(rows, rows * gap, rows * np.r_[0.6, np.full(30, 0.9)], square, rows)
    value, (low, high) = (f(sums) for f in (METRICS["square"].compute, METRICS["square"].interval))
    np.testing.assert_allclose(value, 50 / 80 * (0.01 - 0.25 / 49), rtol=1e-9)
    assert low < value < high < 0.1


def test_intervals_cover(rng):
    """Of 100 data sets with ten bins of known gaps, calibrated or not, about 95 intervals hold the truth."""
    centres = (np.arange(10) + 0.5) / 10
    names = {"l1": calibration_error(), "square": squared_calibration_error(), "auroc": binned_auroc()}
    for off in (0.0, 0.08):
        truth = np.clip(centres + off, 0, 1)
        accuracy = truth.mean()
        # positives of bin i against negatives of bin j
        wins = sum(truth[i] * (1 - truth[j]) * ((i > j) + 0.5 * (i == j)) for i in range(10) for j in range(10))
        known = {
            "l1": np.abs(centres - truth).mean(),
            "square": ((centres - truth) ** 2).mean(),
            "auroc": wins / (100 * accuracy * (1 - accuracy)),
        }
        hits = dict.fromkeys(names, 0)
        for _ in range(100):
            n = rng.multinomial(1000, np.full(10, 0.1)).astype(float)
            right = rng.binomial(n.astype(int), truth)
            wrong = n - right
            gap = n * centres - right
            square = right * (1 - centres) ** 2 + wrong * centres**2
            sums = Histogram(n, gap, n * centres, square, n)
            for name, metric in names.items():
                low, high = metric.interval(sums)
                hits[name] += low <= known[name] <= high
        assert min(hits.values()) >= 89, (off, hits)


def test_the_signed_square_has_an_influence():
    """As clustered rows and the bootstrap use it: the derivative in the weights, and free of their scale."""
    probs, targets, _ = data()
    metric, pred = METRICS["square"], Probabilities(probs[None])

    @jax.jit
    def value_and_slopes(w):
        return jax.value_and_grad(lambda w: metric.compute(metric.measure(pred, targets, w)))(w)

    value, slopes = value_and_slopes(jnp.ones(ROWS))
    step = np.where(np.arange(ROWS) % 2, 1e-2, -1e-2).astype(np.float32)
    ends = [float(value_and_slopes(1 + sign * step)[0]) for sign in (1, -1)]
    np.testing.assert_allclose(ends[0] - ends[1], 2 * (slopes * step).sum(), rtol=1e-2)
    assert abs(slopes.sum()) < 1e-5 < abs(value) and np.count_nonzero(slopes) == ROWS
