import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bayescal as bc
from bayescal.binning import bin_index, reliability, wilson_interval
from bayescal.evaluate import measure
from bayescal.metrics import accuracy_rejection

pytestmark = pytest.mark.core

REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"


def predictions(rng, rows=200, classes=4, members=3):
    logits = rng.normal(size=(members, rows, classes)).astype(np.float32) * 2
    return bc.Categorical(logits), rng.integers(0, classes, rows)


def values(pred, targets, **metrics):
    return {name: e.value for name, e in bc.evaluate(pred, targets, metrics).items()}


def test_against_loops(rng):
    pred, targets = predictions(rng)
    probs = oracles.pool(pred.logits)
    ours = values(pred, targets, accuracy=bc.accuracy(), nll=bc.nll(), brier=bc.brier(), ece=bc.calibration_error())
    np.testing.assert_allclose(ours["accuracy"], (probs.argmax(1) == targets).mean(), rtol=1e-6)
    np.testing.assert_allclose(ours["nll"], oracles.nll(probs, targets), rtol=1e-5)
    np.testing.assert_allclose(ours["brier"], oracles.brier(probs, targets), rtol=1e-5)
    np.testing.assert_allclose(ours["ece"], oracles.calibration_error(probs, targets), rtol=1e-5)


def test_by_hand():
    # two rows, p = 3/4 on the first class; the first is right, the second wrong
    pred = bc.Categorical(jnp.log(jnp.array([[[0.75, 0.25], [0.75, 0.25]]])))
    ours = values(
        pred, np.array([0, 1]), accuracy=bc.accuracy(), nll=bc.nll(), brier=bc.brier(), ece=bc.calibration_error()
    )
    assert ours["accuracy"] == 0.5
    np.testing.assert_allclose(ours["nll"], (-math.log(0.75) - math.log(0.25)) / 2, rtol=1e-6)
    np.testing.assert_allclose(ours["brier"], (2 * 0.0625 + 2 * 0.5625) / 2, rtol=1e-6)
    np.testing.assert_allclose(ours["ece"], 0.25, rtol=1e-6)


def test_uniform_forecast():
    pred = bc.Categorical(jnp.zeros((1, 5, 4)))
    ours = values(pred, np.zeros(5, int), nll=bc.nll(), brier=bc.brier())
    np.testing.assert_allclose([ours["nll"], ours["brier"]], [math.log(4), 0.75], rtol=1e-6)


def test_zero_probability_is_infinite_not_clipped():
    pred = bc.Categorical(jnp.array([[[0.0, -jnp.inf]]]))
    assert values(pred, np.array([1]), nll=bc.nll())["nll"] == math.inf


def test_nll_of_the_pool_is_below_the_members_own(rng):
    pred, targets = predictions(rng)
    assert values(pred, targets, nll=bc.nll())["nll"] < -np.mean(pred.member_log_prob(targets))


def test_nll_of_a_density(rng):
    pred = bc.Gaussian(np.zeros((1, 3, 1), np.float32), np.ones((1, 3, 1), np.float32))
    expected = -np.mean([oracles.normal_log_density(x, 0, 1) for x in (0.0, 1.0, 2.0)])
    ours = values(pred, np.array([[0.0], [1.0], [2.0]], np.float32), nll=bc.nll())
    np.testing.assert_allclose(ours["nll"], expected, rtol=1e-6)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("closed", ["right", "left"])
def test_norms_and_closures(rng, norm, closed):
    grid = np.round(rng.uniform(size=300) * 10) / 10  # confidences on the edges of ten bins
    grid = np.maximum(grid, 1 - grid).astype(np.float32)
    probs = np.stack([grid, 1 - grid], 1)
    targets = rng.integers(0, 2, 300)
    with np.errstate(divide="ignore"):
        pred = bc.Categorical(np.log(probs)[None])
    ours = values(pred, targets, ece=bc.calibration_error(num_bins=7, norm=norm, closed=closed))["ece"]
    expected = oracles.calibration_error(probs.astype(np.float64), targets, 7, norm, closed)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("bins", [1, 2, 3, 10, 15, 100])
def test_edges_are_exact(bins):
    """k / M lies on an edge in float32 too: bin k - 1 when closed on the right, k on the left; 0 and 1 stay inside."""
    k = np.arange(bins + 1)
    confidence = (k / bins).astype(np.float32)
    np.testing.assert_array_equal(bin_index(confidence, bins, "right"), np.maximum(k - 1, 0))
    np.testing.assert_array_equal(bin_index(confidence, bins, "left"), np.minimum(k, bins - 1))


def test_rounding_above_one_stays_in_the_last_bin():
    assert bin_index(np.array([1.0000001], np.float32), 15, "right")[0] == 14


def test_merging_and_weights_are_repetition(rng):
    pred, targets = predictions(rng, rows=60)
    metrics = {"nll": bc.nll(), "brier": bc.brier(), "accuracy": bc.accuracy(), "ece": bc.calibration_error()}
    weights = rng.integers(0, 4, 60).astype(np.float32)
    rows = np.repeat(np.arange(60), weights.astype(int))
    weighted = bc.evaluate(pred, targets, metrics, weights=weights)
    repeated = bc.evaluate(bc.take(pred, rows), targets[rows], metrics)
    for name in metrics:
        np.testing.assert_allclose(weighted[name].value, repeated[name].value, rtol=1e-5)
    assert weighted["nll"].n == (weights > 0).sum()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_batches_do_not_matter(batch_size, seed):
    rng = np.random.default_rng(0)
    pred, targets = predictions(rng, rows=60)
    order = np.random.default_rng(seed).permutation(60)
    metrics = {"nll": bc.nll(), "ece": bc.calibration_error(), "accuracy": bc.accuracy()}
    whole = bc.evaluate(pred, targets, metrics)
    parts = bc.evaluate(bc.take(pred, order), targets[order], metrics, batch_size=max(7, batch_size // 7 * 7))
    for name in metrics:
        np.testing.assert_allclose(parts[name].value, whole[name].value, rtol=1e-5)


def test_float16_predictions(rng):
    pred, targets = predictions(rng)
    half = bc.Categorical(pred.logits.astype(np.float16))
    assert math.isfinite(values(half, targets, ece=bc.calibration_error())["ece"])


def test_intervals():
    for end in wilson_interval(np.array(0.9), np.array(100.0)):  # Wilson: (0.9 - end)^2 = z^2 end (1 - end) / n
        np.testing.assert_allclose((0.9 - end) ** 2, 1.959963984540054**2 * end * (1 - end) / 100, rtol=1e-9)
    pred = bc.Categorical(jnp.log(jnp.array([[[0.75, 0.25]] * 4])))
    estimate = bc.evaluate(pred, np.array([0, 0, 0, 1]), {"nll": bc.nll(), "ece": bc.calibration_error()})
    x = -np.log([0.75, 0.75, 0.75, 0.25])
    np.testing.assert_allclose(estimate["nll"].high - estimate["nll"].value, 1.95996 * x.std() / 2, rtol=1e-4)
    assert "15 equal-width bins closed on the right" in estimate["ece"].convention


def test_reliability_reads_the_same_histogram(rng):
    pred, targets = predictions(rng)
    sums = measure(pred, targets, {"h": bc.confidence_histogram(num_bins=10)})["h"]
    curve = reliability(sums)
    assert curve.weight.sum() == 200
    ece = np.nansum(curve.weight / 200 * np.abs(curve.confidence - curve.accuracy))
    np.testing.assert_allclose(ece, values(pred, targets, e=bc.calibration_error(num_bins=10))["e"], rtol=1e-6)
    assert np.isnan(curve.accuracy[curve.weight == 0]).all()


def test_auroc_against_loops_and_scikit_learn(rng):
    from sklearn.metrics import roc_auc_score

    scores = np.round(rng.normal(size=300), 1).astype(np.float32)  # many ties
    positive = rng.uniform(size=300) < 0.3
    ours = float(bc.auroc(scores, positive))
    np.testing.assert_allclose(ours, oracles.auroc(scores, positive), rtol=1e-6)
    np.testing.assert_allclose(ours, roc_auc_score(positive, scores), rtol=1e-6)
    order = rng.permutation(300)
    np.testing.assert_allclose(float(bc.auroc(scores[order], positive[order])), ours, rtol=1e-6)


def test_auroc_by_hand():
    assert float(bc.auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True]))) == 0.875
    assert float(bc.auroc(np.array([-np.inf, 0.0, np.inf]), np.array([False, False, True]))) == 1
    assert math.isnan(bc.auroc(np.array([1.0, np.nan]), np.array([True, False])))
    assert math.isnan(bc.auroc(np.array([1.0, 2.0]), np.array([True, True])))


def test_auroc_of_integer_labels_and_close_scores():
    assert float(bc.auroc(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1]))) == 1
    close = np.array([1.0, 1.0 + 1e-9, 1.0, 1.0 + 1e-9])  # float32 would tie them
    assert bc.auroc_estimate(close, np.array([False, True, False, True]), "x").value == 1


def test_intervals_do_not_depend_on_the_weights_scale(rng):
    pred, targets = predictions(rng, rows=50)
    metrics = {"nll": bc.nll(), "accuracy": bc.accuracy()}
    plain, scaled = (bc.evaluate(pred, targets, metrics, weights=np.full(50, w)) for w in (1.0, 0.01))
    for name in metrics:
        np.testing.assert_allclose(
            [plain[name].low, plain[name].high], [scaled[name].low, scaled[name].high], rtol=1e-4
        )


def test_auroc_interval_covers(rng):
    """The logit DeLong interval of 300 data sets of known AUROC Phi(1 / sqrt 2) covers about 95 times in 100."""
    truth, hits = 0.760250, 0
    for _ in range(300):
        scores = np.r_[rng.normal(size=60), rng.normal(1, 1, size=40)].astype(np.float32)
        estimate = bc.auroc_estimate(scores, np.arange(100) >= 60, "shifted")
        hits += estimate.low <= truth <= estimate.high
    assert 0.92 <= hits / 300 <= 0.98


def test_accuracy_rejection():
    rejected, accuracy = accuracy_rejection(np.array([3.0, 1.0, 2.0, 2.0]), np.array([False, True, True, False]))
    np.testing.assert_allclose(rejected, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(accuracy, [0.5, 2 / 3, 0.75, 1])  # tied rows count one half each


def test_stored_oracles():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    oracle = json.loads(path.read_text())["oracles"]
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    pred, targets = bc.Categorical(inputs["logits"].astype(np.float32)[None]), inputs["Y"].astype(np.int32)
    ours = values(
        pred,
        targets,
        ece=bc.calibration_error(num_bins=15),
        rmsce=bc.calibration_error(num_bins=15, norm=2),
        mce=bc.calibration_error(num_bins=15, norm=math.inf),
        nll=bc.nll(),
        brier=bc.brier(),
    )
    expected = {
        "ece": ("top_label_ece_15_equal_width", "ref_right_closed"),
        "rmsce": ("top_label_rmsce_15", "ref"),
        "mce": ("top_label_mce_15", "ref"),
        "nll": ("proper_scores_classification", "ref_log_loss"),
        "brier": ("proper_scores_classification", "ref_brier_sum_over_classes"),
    }
    for name, (group, key) in expected.items():
        np.testing.assert_allclose(ours[name], oracle[group][key]["value"], rtol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bc.calibration_error(num_bins=0),
            ValueError,
            "`num_bins` must be a whole number of at least 1, got 0",
        ),
        (lambda: bc.calibration_error(norm=0.5), ValueError, "`norm` must be at least 1"),
        (
            lambda: bin_index(np.zeros(2, np.float32), 3, "both"),
            ValueError,
            "`closed` must be 'right' or 'left', got 'both'",
        ),
        (
            lambda: bc.auroc_estimate(np.array([1.0, np.nan]), np.array([True, False]), "x"),
            ValueError,
            "`scores` must not be NaN, got 1 of 2",
        ),
        (
            lambda: bc.auroc_estimate(np.array([1.0, 2.0]), np.array([True, True]), "x"),
            ValueError,
            "`positive` must hold both classes, got 2 positives of 2",
        ),
        (
            lambda: accuracy_rejection(np.array([np.nan, 1.0]), np.array([True, False])),
            ValueError,
            "`scores` and `correct` must be one axis of the same length without NaN",
        ),
        (
            lambda: bc.auroc_estimate(np.ones(2), np.ones(3, bool), "x"),
            ValueError,
            "must be one axis of the same length",
        ),
        (
            lambda: bc.nll().measure(bc.Categorical(jnp.zeros((1, 2**20 + 1, 2))), None, jnp.ones(2**20 + 1)),
            ValueError,
            "`targets` must have at most 1048576 rows a call, got 1048577",
        ),
    ],
)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_densities_have_no_classes(unchecked):
    normal = bc.Gaussian(np.zeros((1, 4, 1), np.float32), np.ones((1, 4, 1), np.float32))
    y = np.zeros((4, 1), np.float32)
    for metric in (
        bc.brier(),
        bc.calibration_error(),
        bc.calibration_error(events=bc.one_class(0)),
        bc.classwise_calibration_error(),
    ):
        with pytest.raises(TypeError, match="does not exist for Gaussian"):
            bc.evaluate(normal, y, {"it": metric})
