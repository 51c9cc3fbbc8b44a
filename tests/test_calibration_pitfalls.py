"""How peers go wrong at binned calibration metrics: edges, counters, half precision, names, unused settings."""

import jax
import numpy as np
import pytest
from rows_calibration import CLASSES, INF, METRICS, ROWS, binary, data, read, sums_of, values

from bayescal.binning import bin_edges, bin_index
from bayescal.evaluate import measure
from bayescal.metrics.calibration import calibration_error, confidence_histogram
from bayescal.metrics.events import one_class
from bayescal.metrics.signed import confidence_gap
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


def test_every_multiple_lies_on_its_side_of_the_edge(rng):
    """Pitfall 26: linspace, floor and ceil put some into the neighbour; exact 0 and 1 into bins of their own."""
    numbers, closures = (7, 10, 15, 100, 3840), (("right", "left"), ("left", "right"))
    random = np.r_[rng.uniform(size=ROWS), 10.0 ** -rng.uniform(0, 40, ROWS)].astype(np.float32)
    on_edge = [(np.arange(n + 1) / n).astype(np.float32) for n in numbers]
    moved = [[np.nextafter(x, np.float32(to)) for to in (-1, 2)] for x in on_edge]  # one step to either side

    @jax.jit
    def all_of_them(xs):
        return [[bin_index(x, n, closed) for closed, _ in closures] for n, x in zip(numbers, xs, strict=True)]

    found = all_of_them([np.r_[x, *steps, random] for x, steps in zip(on_edge, moved, strict=True)])
    for n, (right, left) in zip(numbers, found, strict=True):
        k = np.arange(n + 1)
        assert all(edge == i / n for i, edge in enumerate(bin_edges(n))), "linspace is off by a rounding in some"
        at, below, above, rest = (slice(i * (n + 1), (i + 1) * (n + 1) if i < 3 else None) for i in range(4))
        np.testing.assert_array_equal(right[at], np.maximum(k - 1, 0))
        np.testing.assert_array_equal(left[at], np.minimum(k, n - 1))
        for index, (_, side) in zip((right, left), closures, strict=True):
            np.testing.assert_array_equal(index[below], np.maximum(k - 1, 0))
            np.testing.assert_array_equal(index[above], np.minimum(k, n - 1))
            searched = np.searchsorted(bin_edges(n).astype(np.float32), random, side) - 1
            np.testing.assert_array_equal(index[rest], np.clip(searched, 0, n - 1))


def test_probability_one_has_no_bin_of_its_own():
    """Pitfalls 26 and 33: torchmetrics gives 0.525 for this, pytorch-ood drops the top bin."""
    ours = binary([0.95, 1.0], [1, 0])
    np.testing.assert_allclose([ours["ten"], ours["ten_left"]], 0.475, rtol=1e-6)
    sums = sums_of(np.eye(CLASSES)[data()[1]], data()[1])
    for part in (sums["ece"], sums["fine"], sums["top_label"]):
        assert part.weight.sum() == ROWS, "every row is in a bin"
    assert sums["classwise"].weight.sum() == ROWS * CLASSES


def test_many_rows_do_not_saturate():
    """Pitfall 27: float32 counters stop at 2**24; of 10^8 rows at 0.75, of which a quarter happen, the error is 1/2."""
    rows = 2**20
    pred = Probabilities(np.broadcast_to(np.float32([0.25, 0.75]), (1, rows, 2)))
    targets = (np.arange(rows) % 4 == 0).astype(np.int32)
    metrics = {
        "ece": calibration_error(events=one_class(1)),
        "fine": confidence_histogram(events=one_class(1), num_bins=3840),
        "gap": confidence_gap(events=one_class(1)),
    }
    part = measure(pred, targets, metrics, batch_size=rows)
    total = jax.tree.map(lambda x: 0 * x, part)
    for _ in range(96):
        total = jax.tree.map(np.add, total, part)
    assert total["ece"].weight.sum() == 96 * rows > 10**8
    assert abs(metrics["ece"].compute(total["ece"]) - 0.5) < 1e-7
    assert abs(metrics["gap"].compute(total["gap"]) - 0.5) < 1e-6
    np.testing.assert_allclose(total["fine"].accuracy().max(), 0.25, rtol=1e-6)
    np.testing.assert_allclose(total["fine"].confidence.sum(), 0.75 * 96 * rows, rtol=1e-7)
    one = np.float32(2**24)
    assert one + np.float32(1) == one, "what a float32 counter does"


def test_float16_predictions():
    """Pitfall 27: torchmetrics gives NaN for float16."""
    probs, targets, _ = data()
    half = probs.astype(np.float16)
    metrics = {name: METRICS[name] for name in ("ece", "z", "avuc")}
    pred = Probabilities(half[None])
    ours = read(measure(pred, targets, metrics), metrics)
    wide = read(sums_of(half, targets))
    for name, value in ours.items():
        np.testing.assert_allclose(value, wide[name], rtol=1e-5, err_msg=name)


def test_binary_is_not_top_label():
    """Pitfalls 24 and 29: the result says what it is about; a perfect confident model has no error."""
    ours = binary([0.05, 0.05, 0.05, 0.95], [0, 0, 1, 1])
    np.testing.assert_allclose([ours["ece"], ours["top"]], [(0.85 + 0.05) / 4, 0.2], rtol=1e-5)
    assert binary([0, 1, 1, 0], [0, 1, 1, 0])["ece"] == 0
    assert calibration_error(events=one_class(1)).convention.startswith(
        "class 1; 15 equal-width bins closed on the right"
    )
    assert (
        calibration_error(norm=2).convention == "top label; 15 equal-width bins closed on the right; L2 norm; plug-in"
    )
    words = calibration_error(norm=INF, min_count=10, debiased=False).convention
    assert "Linf" in words and "at least 10 rows" in words
    conventions = [m.convention for m in METRICS.values()]
    assert len(set(conventions)) == len(conventions), "no two different metrics have the same name"


def test_every_setting_changes_the_value():
    """Pitfall 32: a threshold that is read and not used."""
    ours = values()
    for name, others in {
        "ece": ("ece_7", "rms", "l3", "mce", "average", "debiased", "class_1", "classwise", "top_label", "one_bin"),
        "mce": ("mce_10",),
        "average": ("average_5",),
        "classwise": ("classwise_2", "classwise_above"),
        "top_label": ("top_label_max",),
        "soft": ("soft_1", "soft_10"),
        "avu": ("avu_1", "avu_confidence"),
        "avuc": ("avuc_1",),
        "soft_avuc": ("soft_avuc_7", "soft_avuc_warm"),
        "auroc": ("auroc_4",),
        "ks": ("ks_4",),
    }.items():
        for other in others:
            assert max(abs(v[name] - v[other]) for v in (ours, values(True))) > 1e-4, (name, other)
    assert "least confidence <= 0.5" in METRICS["avu_confidence"].convention
    grid = np.float32(
        [0.2, 0.4, 0.6, 0.8] * 25
    )  # on the edges of ten bins; closed on the right they are with those below
    sides = binary(np.r_[grid, grid - 0.05], np.arange(ROWS) < 100)
    np.testing.assert_allclose([sides["ten"], sides["ten_left"]], [0.2, 0.475], rtol=1e-5)
