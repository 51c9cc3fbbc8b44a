"""Edges that a review found: rare events, one row, rows and groups without weight, order statistics, certain predictions."""

import jax
import numpy as np
import pytest

import bayescal as bc
from bayescal import metrics as m
from bayescal.evaluate import standard_error

pytestmark = pytest.mark.core

IRREGULAR = {
    "ece": bc.calibration_error(),
    "squared": bc.squared_calibration_error(),
    "smooth": bc.smooth_calibration_error(),
    "classwise": bc.classwise_calibration_error(),
    "ks": bc.whole(m.ks_error),
    "kuiper": bc.whole(m.kuiper_error),
    "equal_mass": bc.whole(m.equal_mass_calibration_error),
}


@pytest.mark.parametrize(("confidence", "rows"), [(0.99, 60), (0.999, 300)])
def test_rare_errors_are_no_proof_of_miscalibration(rng, confidence, rows):
    """Calibrated forecasts whose errors mostly do not show: a bin without spread is not without noise."""
    hits = dict.fromkeys(IRREGULAR, 0)
    for _ in range(40):
        probs = np.full((rows, 2), 1 - confidence, np.float32)
        probs[:, 0] = confidence
        targets = (rng.uniform(size=rows) > confidence).astype(np.int32)
        found = bc.evaluate(bc.Probabilities(probs[None]), targets, IRREGULAR)
        for name, e in found.items():
            hits[name] += e.low is None or e.low <= 0 <= e.high
    assert min(hits.values()) >= 35, hits


def test_many_classes_are_no_proof_of_miscalibration(rng):
    """A hundred classes of small probability, calibrated: the interval of the classwise error reaches zero."""
    hits = 0
    for _ in range(20):
        logits = 2 * rng.normal(size=(400, 100))
        targets = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        found = bc.evaluate(
            bc.Categorical(logits[None].astype(np.float32)), targets, {"it": bc.classwise_calibration_error()}
        )
        hits += found["it"].low <= 1e-6
    assert hits >= 17, hits


def test_one_row_has_no_interval():
    pred = bc.Probabilities(np.array([[[0.7, 0.3]]], np.float32))
    chosen = {"nll": bc.nll(), "brier": bc.brier(), "aurc": bc.whole(bc.aurc), "smooth": bc.smooth_calibration_error()}
    assert all(e.low is None for e in bc.evaluate(pred, np.array([0]), chosen).values())


def test_groups_without_weight_do_not_count(rng):
    influences, weights = rng.normal(size=30), np.r_[np.ones(20), np.zeros(10)]
    groups = np.r_[np.repeat([0, 1], 10), np.full(10, 2)]
    kept = standard_error(influences[:20], None, groups[:20])
    np.testing.assert_allclose(standard_error(influences, weights, groups), kept, rtol=1e-9)
    with pytest.raises(ValueError, match="of at least two groups"):
        standard_error(influences, np.r_[np.ones(10), np.zeros(20)], groups)


def test_rows_of_weight_zero_may_hold_anything(rng):
    p, y, w = (
        rng.uniform(size=40).astype(np.float32),
        rng.integers(0, 2, 40),
        np.r_[np.zeros(5), np.ones(35)].astype(np.float32),
    )
    dirty, features = p.copy(), rng.normal(size=(40, 2)).astype(np.float32)
    dirty[:5] = np.nan
    nothing = features.copy()
    nothing[:5] = np.nan
    probs, wrong = np.stack([1 - p, p], 1), np.stack([1 - dirty, dirty], 1)
    for function in (m.ks_error, m.kuiper_error, m.mmce, bc.auroc, bc.aurc, m.equal_mass_calibration_error):
        np.testing.assert_allclose(function(dirty, y, weights=w), function(p[5:], y[5:], weights=w[5:]), rtol=1e-5)
    np.testing.assert_allclose(m.skce(wrong, y, weights=w), m.skce(probs[5:], y[5:], weights=w[5:]), rtol=1e-4)
    local = (m.local_calibration_error(*a) for a in ((p[5:], y[5:], features[5:]),))
    masked = m.local_calibration_error(dirty, y, nothing, weights=w)
    np.testing.assert_allclose(masked.mean, next(local).mean, rtol=1e-5)


def test_order_statistics_are_resampled_and_not_differentiated(rng, key):
    logits = rng.normal(size=(2, 1, 80, 3)).astype(np.float32)
    a, b = (bc.Categorical(x) for x in logits)
    targets, fpr = rng.integers(0, 3, 80), bc.whole(bc.fpr_at_tpr)
    with pytest.raises(ValueError, match="an order statistic"):
        bc.compare(fpr, a, b, targets)
    found = bc.compare(fpr, a, b, targets, key=key, num_replicates=100)
    assert found.difference.low <= found.difference.value <= found.difference.high
    resampled = bc.bootstrap_intervals(a, targets, {"fpr": fpr}, key, num_replicates=100)["fpr"]
    plain = bc.evaluate(a, targets, {"fpr": fpr})["fpr"]
    np.testing.assert_allclose([resampled.low, resampled.high], [plain.low, plain.high], atol=0.15)
    with pytest.raises(ValueError, match="must be regular"):
        bc.compare(bc.calibration_error(), a, b, targets, key=jax.random.key(0))


def test_metrics_of_more_than_one_number_say_how_to_read_them():
    pred = bc.Probabilities(np.full((1, 4, 2), 0.5, np.float32))
    with pytest.raises(TypeError, match="`it` must be a metric of one number, got Histogram"):
        bc.evaluate(pred, np.zeros(4, int), {"it": bc.confidence_histogram()})


def test_certain_predictions_and_equal_rows(rng):
    """A pool in float32 may be a rounding above one; rows that are all alike have no median distance."""
    above, y = np.full(20, np.float32(1.0000001)), np.ones(20, int)
    assert m.corp(above, y).score == 0
    assert m.group_calibration_error(above, y, np.arange(20) % 2).maximum < 1e-6
    alike, labels = np.tile(np.array([0.7, 0.3], np.float32), (60, 1)), rng.integers(0, 2, 60)
    residual = np.eye(2)[labels] - alike
    np.testing.assert_allclose(m.skce(alike, labels, estimator="V"), (residual.mean(0) ** 2).sum(), rtol=1e-4)


def test_half_precision_columns_are_summed_in_float32(rng):
    p = rng.uniform(size=20000).astype(np.float16)
    y = rng.uniform(size=20000) < p
    for function in (m.sweep_calibration_error, m.equal_mass_calibration_error):
        np.testing.assert_allclose(function(p, y), function(p.astype(np.float32), y.astype(np.float32)), rtol=1e-6)


def test_nearly_constant_scores_have_the_interval_of_their_spread(rng):
    """Squares in float32 cancel: the interval comes from the rows' influence instead."""
    std = 100 + 1e-2 * rng.normal(size=4000)
    pred = bc.Gaussian(np.zeros((1, 4000, 1), np.float32), (std**2)[None, :, None].astype(np.float32))
    found = bc.evaluate(pred, np.zeros((4000, 1), np.float32), {"it": m.sharpness()})["it"]
    np.testing.assert_allclose((found.high - found.low) / 2, 1.96 * std.std() / np.sqrt(4000), rtol=0.2)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("probability", 2.0, "`probability` must lie in .0, 1., got 2 in 1 of 20 rows"),
        ("outcome", 5.0, "`outcome` must be 0 or 1, got 5 in 1 of 20 rows"),
        ("weights", -1.0, "`weights` must be non-negative, got -1"),
    ],
)
def test_columns_that_are_no_events(unchecked, rng, column, value, words):
    """Called directly with numpy columns, each function says what is wrong; a row of weight 0 may hold it."""
    given = {"probability": rng.uniform(size=20), "outcome": rng.integers(0, 2, 20) * 1.0, "weights": np.ones(20)}
    given[column] = np.where(np.arange(20) == 3, value, given[column])
    functions = (m.ks_error, m.kuiper_error, m.mmce, m.equal_mass_calibration_error, m.sweep_calibration_error)
    for function in functions:
        with pytest.raises(ValueError, match=words):
            function(given["probability"], given["outcome"], weights=given["weights"])
        if column != "weights":
            left_out = np.where(np.arange(20) == 3, 0.0, 1.0)
            assert 0 <= function(given["probability"], given["outcome"], weights=left_out) <= 1
