"""Binned calibration metrics of several labels and of groups: renamed, rare, absent or many labels, and slices."""

import numpy as np
import oracles_calibration as oracles
import pytest
from rows_calibration import ROWS, binary, data, expected, read, sums_of, values

from bayescal.evaluate import measure
from bayescal.metrics.classwise import classwise_calibration_error, group_calibration_error
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


def test_relabelling_classes():
    probs, targets, _ = data()
    order = np.array([2, 0, 3, 1])  # class k becomes order[k]
    moved = read(sums_of(probs[:, np.argsort(order)], order[targets].astype(np.int32)))
    for name, value in values().items():
        if name == "class_1":
            assert moved[name] != value
        else:
            np.testing.assert_allclose(moved[name], value, rtol=1e-5, err_msg=name)


def test_labels_that_do_not_occur_and_probabilities_that_are_none():
    """Pitfall 28: neither the task nor logits are guessed from the values."""
    probs, _, _ = data()
    targets = (np.arange(ROWS) % 2).astype(np.int32)  # four classes, of which two occur
    ours, loops = read(sums_of(probs, targets)), expected(probs.astype(np.float64), targets, np.ones(ROWS))
    for name in ("ece", "classwise", "top_label", "soft_avuc"):
        np.testing.assert_allclose(ours[name], loops[name], rtol=1e-5, err_msg=name)
    too_much = probs.copy()
    too_much[3] = [1.01, -0.01, 0, 0]
    with pytest.raises(ValueError, match="prob"):
        sums_of(too_much, targets)


def test_rare_labels_weigh_by_their_rows():
    """Pitfall 31: 98 calibrated rows of one label and two of another with gap 0.9 make 0.018, not their mean 0.45."""
    p = np.r_[np.full(98, 0.0), np.full(2, 0.9)]
    ours = binary(p, np.zeros(100))
    np.testing.assert_allclose([ours["conditional"], ours["one_bin"]], 0.018, rtol=1e-5)
    assert 0 <= values()["ece"] <= values()["rms"] <= values()["l3"] <= values()["mce"] <= 1


def test_many_classes(rng):
    """More classes than are measured at once, and one that is never forecast above the threshold."""
    probs = rng.dirichlet(np.full(19, 0.3), 50)
    probs = np.concatenate([probs, np.zeros((50, 1))], 1).astype(np.float32)
    targets = rng.integers(0, 19, 50)
    metrics = {"all": classwise_calibration_error(), "above": classwise_calibration_error(threshold=0.05)}
    ours = read(measure(Probabilities(probs[None]), targets, metrics), metrics)
    wide = probs.astype(np.float64)
    np.testing.assert_allclose(ours["all"], oracles.classwise_calibration_error(wide, targets), rtol=1e-5)
    np.testing.assert_allclose(
        ours["above"], oracles.classwise_calibration_error(wide, targets, threshold=0.05), rtol=1e-5
    )


def test_groups_and_slices(rng):
    probs, targets, weights = data()
    p, y = probs.max(1), probs.argmax(1) == targets
    labels = rng.integers(0, 3, ROWS).astype(np.uint8)
    labels[labels == 1] = 3  # no row of group 1
    found = group_calibration_error(p, y, labels, weights=weights)
    wide, w = p.astype(np.float64), weights.astype(np.float64)
    errors = [oracles.calibration_error(wide[labels == g], y[labels == g], w[labels == g]) for g in (0, 2, 3)]
    np.testing.assert_allclose(found.errors[[0, 2, 3]], errors, rtol=1e-9)
    assert np.isnan(found.errors[1]) and found.weights[1] == 0 and found.weights.sum() == w.sum()
    np.testing.assert_allclose(found.maximum, max(errors), rtol=1e-9)
    mass = [w[labels == g].sum() for g in (0, 2, 3)]
    np.testing.assert_allclose(found.mean, np.average(errors, weights=mass), rtol=1e-9)
    cells = [b for g in (0, 2, 3) for b in oracles.bins(wide[labels == g], y[labels == g], w[labels == g])]
    np.testing.assert_allclose(found.multicalibration, max(b.gap * b.weight for b in cells) / w.sum(), rtol=1e-9)
    columns = labels[:, None] == np.arange(4)
    for ours, same in zip(group_calibration_error(p, y, columns, weights=weights), found, strict=True):
        np.testing.assert_array_equal(ours, same)
    overlapping = np.stack([np.ones(ROWS, bool), p > 0.6], 1)
    both = group_calibration_error(p, y, overlapping, norm=2)
    np.testing.assert_allclose(both.errors[0], values()["rms"], rtol=1e-5)
    np.testing.assert_allclose(both.errors[1], oracles.calibration_error(wide[p > 0.6], y[p > 0.6], norm=2), rtol=1e-9)
