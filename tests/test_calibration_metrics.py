"""Binned calibration metrics: against loops, by hand, other libraries' values, invariances, what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_calibration as oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_binfree import REFERENCE
from rows_calibration import CLASSES, INF, METRICS, ROWS, binary, data, expected, read, sums_of, values

from bayescal.binning import Histogram, coarsen
from bayescal.metrics.accuracy_uncertainty import (
    accuracy_versus_uncertainty,
    accuracy_versus_uncertainty_loss,
    soft_accuracy_versus_uncertainty_loss,
)
from bayescal.metrics.calibration import calibration_error, confidence_histogram, squared_calibration_error
from bayescal.metrics.classwise import (
    classwise_calibration_error,
    group_calibration_error,
    top_label_conditional_calibration_error,
)
from bayescal.metrics.soft import soft_binned_calibration_error
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core

KISH = {"debiased", "debiased_2", "square", "mce_10", "average_5", "z"}  # read effective rows: weights are no counts


@pytest.mark.parametrize("weighted", [False, True])
def test_against_loops(weighted):
    probs, targets, weights = data()
    w = weights.astype(np.float64) if weighted else np.ones(ROWS)
    ours, loops = values(weighted), expected(probs.astype(np.float64), targets, w)
    assert set(ours) == set(loops)
    for name, value in loops.items():
        # The limit of hard bins but for rows next to an edge, which lie in both.
        np.testing.assert_allclose(ours[name], value, rtol=2e-2 if name == "soft_hard" else 1e-5, err_msg=name)


def test_by_hand():
    # Ten bins. (0.2, 0.3]: 0.25 twice, one right: gap 0.25. (0.7, 0.8]: 0.75 twice, both right: gap 0.25.
    ours = binary([0.25, 0.25, 0.75, 0.75], [1, 0, 1, 1])
    np.testing.assert_allclose(
        [ours[k] for k in ("ten", "gap", "over", "under", "ks")], [0.25, -0.25, 0.25, 1.25 / 3, 0.25], rtol=1e-6
    )
    # z: (0.75 * 0.5 - 0.25 * 0.5 - 2 * 0.25 * 0.5) / sqrt(4 * 0.25 * 0.1875) = 0
    np.testing.assert_allclose(ours["z"], 0, atol=1e-6)
    np.testing.assert_allclose(ours["auroc_10"], 2.5 / 3, rtol=1e-6)  # of three pairs two won and one tied
    # the first bin: 0.0625 - 0.25 / 1; the second: 0.0625 - 0
    np.testing.assert_allclose(ours["ten_square"], 0.5 * (0.0625 - 0.25) + 0.5 * 0.0625, rtol=1e-6)
    sd = math.sqrt(0.125)
    folded = sd * math.sqrt(2 / math.pi) * math.exp(-0.25) + 0.25 * math.erf(0.25 / (sd * math.sqrt(2)))
    np.testing.assert_allclose(ours["ten_debiased"], 0.5 - 0.5 * folded - 0.5 * 0.25, rtol=1e-6)


def test_accuracy_versus_uncertainty_by_hand():
    # Entropies 0, 0, log 2, log 2: certain and right, certain and wrong, uncertain and right, uncertain and wrong.
    rows, weights = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]), np.zeros(ROWS)
    probs, targets = np.resize(rows, (ROWS, CLASSES)), np.resize([0, 1, 0, 1], ROWS)
    weights[:4] = 1
    t = math.tanh(math.log(2))
    ours = read(sums_of(probs, targets, weights))
    assert ours["avu"] == 0.5
    np.testing.assert_allclose(ours["avuc"], math.log(1 + 0.5 * t / (1 + 0.5 * t)), rtol=1e-6)
    np.testing.assert_allclose(ours["soft_avuc"], math.log(2), rtol=1e-5)  # e = 1/2, so that q is 1/2
    weights[:4] = [1, 0, 2, 1]
    at = read(sums_of(probs, targets, weights))["avu_confidence"]
    assert at == 0.75, "1 - 0.5 is at most 0.5, hence certain: the three right ones agree"
    sure = 0.96 * np.eye(CLASSES)[data()[1]] + 0.01
    assert read(sums_of(sure, (data()[1] + 1) % CLASSES))["avuc"] == INF, "all are wrong and certain: no epsilon"


def test_second_libraries(rng):
    from scipy.stats import foldnorm
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import roc_auc_score

    p = rng.uniform(0.01, 0.99, ROWS).astype(np.float32)
    y = (rng.uniform(size=ROWS) < p**2).astype(int)
    ours = binary(p, y)
    frequency, confidence = calibration_curve(y, p, n_bins=15)
    np.testing.assert_allclose(ours["average"], np.abs(frequency - confidence).mean(), rtol=1e-5)
    grid = np.floor(p.astype(np.float64) * 3840)
    np.testing.assert_allclose(ours["auroc"], roc_auc_score(y, grid), rtol=1e-6)
    np.testing.assert_allclose(oracles.folded_normal_mean(0.1, 0.2), foldnorm(0.5, scale=0.2).mean(), rtol=1e-6)


def stored():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    one = lambda start: next(v for k, v in groups.items() if k.startswith(start))
    return one, np.load(REFERENCE / "metrics_oracle_inputs.npz")


def test_stored_multiclass():
    one, inputs = stored()
    ours = read(sums_of(inputs["P"], inputs["Y"].astype(np.int32)))
    left_out = {"mapie_uniform_nbins15(14 real bins)"}
    for name, group in {
        "ece": "top_label_ece_15_equal_width",
        "ece_left": "top_label_ece_15_equal_width",
        "rms": "top_label_rmsce_15",
        "mce": "top_label_mce_15",
        "average": "average_calibration_error_15",
        "classwise": "classwise_ece_15_equal_width",
    }.items():
        endorsed = {k: v["value"] for k, v in one(group).items() if k not in left_out}
        assert endorsed
        for key, value in endorsed.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-6, err_msg=f"{group}: {key}")
    for name, group, key in (
        ("classwise", "nixon_family", "SCE_classconditional_even"),
        ("soft", "soft_binned_ece", "ref(Karandikar 2021 eq 11)"),
        ("soft_avuc", "soft_avuc", "ref(Karandikar 2021 eq 15)"),
    ):
        np.testing.assert_allclose(ours[name], one(group)[key]["value"], rtol=1e-6, err_msg=group)
    avuc = next(iter(one("avuc_entropy").values()))["value"]
    np.testing.assert_allclose([ours["avuc"], ours["avu"]], [avuc["AvUC_loss"], avuc["AvU"]], rtol=1e-6)


def test_stored_binary_and_edges():
    one, inputs = stored()
    ours = binary(inputs["pb"], inputs["yb"])
    group = {k: v["value"] for k, v in one("binary_ece_15").items()}
    np.testing.assert_allclose(ours["ece"], group["torchmetrics_binary(positive-class reliability)"], rtol=1e-6)
    np.testing.assert_allclose(ours["ece"], group["netcal_1d"], rtol=1e-6)
    np.testing.assert_allclose(ours["top"], group["top_label_of_two_class_ref"], rtol=1e-6)
    tests = one("bin_free_tests")
    np.testing.assert_allclose(ours["z"], tests["mapie_spiegelhalter_stat"]["value"], rtol=1e-6)
    np.testing.assert_allclose(ours["ks"], tests["ref"]["value"]["ks_max_abs"], rtol=1e-5)
    edges = {k: v["value"] for k, v in one("edge_set_binary_10bins").items()}
    ours = binary(inputs["pe"], inputs["ye"])
    for key in ("uncertainty-calibration", "ref_right_closed_linspace"):
        np.testing.assert_allclose(ours["ten"], edges[key], rtol=1e-6)
    # Of the left-closed values only those with exact edges: linspace puts three of ten multiples into the wrong bin.
    for key in ("ref_exact_left_closed_decimal", "torchmetrics_binary_float32"):
        np.testing.assert_allclose(ours["ten_left"], edges[key], rtol=1e-6)
    assert abs(ours["ten_left"] - edges["ref_left_closed_linspace"]) > 1e-3


def test_stored_debiased_from_equal_mass_bins():
    """The stored values use bins of equal mass; read from such a histogram the estimators are the same."""
    one, inputs = stored()
    probs, targets = inputs["P"], inputs["Y"]

    def equal_mass(p, y):
        groups = np.array_split(np.argsort(p, kind="stable"), 15)
        columns = [np.ones_like(p), p - y, p, (p - y) ** 2, np.ones_like(p)]
        return [np.array([x[g].sum() for g in groups]) for x in columns]

    top = Histogram(*equal_mass(probs.max(1), (probs.argmax(1) == targets).astype(float)))
    each = Histogram(*np.stack([equal_mass(probs[:, k], (targets == k).astype(float)) for k in range(4)], 1))
    group = {k: v["value"] for k, v in one("l2_calibration_error_15_equal_mass").items()}
    square, root = group["ref_debiased_[square,root]"]
    cases = (
        (classwise_calibration_error(norm=2, debiased=True), each, group["uc_debiased_marginal"]),
        (calibration_error(norm=2), top, group["uc_plugin_top"]),
        (calibration_error(norm=2, debiased=True), top, root),
        (calibration_error(norm=2, debiased=True), top, group["uc_debiased_top"]),
        (squared_calibration_error(), top, square),
        (calibration_error(debiased=True), top, group["ref_l1_debiased_folded_normal_exact"]),
        (classwise_calibration_error(norm=2), each, group["uc_plugin_marginal"]),
        (calibration_error(), top, one("top_label_ece_15_equal_mass")["ref_array_split"]["value"]),
    )
    on_device = jax.jit(lambda *all_sums: [metric.compute(x) for (metric, *_), x in zip(cases, all_sums, strict=True)])(
        *(Histogram(*(jnp.asarray(x, jnp.float32) for x in sums)) for _, sums, _ in cases)
    )
    for (metric, sums, value), device in zip(cases, on_device, strict=True):
        np.testing.assert_allclose(metric.compute(sums), value, rtol=1e-9, err_msg=metric.convention)
        np.testing.assert_allclose(device, value, rtol=2e-5, err_msg=metric.convention)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_row_order_does_not_matter(seed):
    probs, targets, weights = data()
    order = np.random.default_rng(seed).permutation(ROWS)
    ours = read(sums_of(probs[order], targets[order], weights[order]))
    for name, value in values(weighted=True).items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_duplicates_repetitions_splits_and_scale():
    probs, targets, weights = data()
    plain, weighted = values(), values(weighted=True)
    twice = read(sums_of(np.tile(probs, (2, 1)), np.tile(targets, 2)))
    repeated = np.repeat(np.arange(ROWS), weights.astype(int))
    repetition = read(sums_of(probs[repeated], targets[repeated]))
    first, second = (slice(0, 120), slice(120, None))
    parts = [
        sums_of(np.resize(probs[s], (ROWS, CLASSES)), np.resize(targets[s], ROWS), padded(s)) for s in (first, second)
    ]
    merged = read(jax.tree.map(np.add, *parts))
    scaled = read(sums_of(probs, targets, weights * 0.01))
    for name in plain:
        if name not in KISH:
            np.testing.assert_allclose(twice[name], plain[name], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(repetition[name], weighted[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(merged[name], plain[name], rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(scaled[name], weighted[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(twice["z"], math.sqrt(2) * plain["z"], rtol=1e-5)
    assert all(abs(twice[name] - plain[name]) > 1e-4 for name in ("debiased", "square")), "less noise, less bias"


def padded(rows):
    size = len(range(*rows.indices(ROWS)))
    return (np.arange(ROWS) < size).astype(np.float32)


def test_relations_between_the_metrics():
    ours, sums = values(), sums_of(*data()[:2])
    np.testing.assert_allclose(ours["one_bin"], abs(ours["gap"]), rtol=1e-6)
    coarse = coarsen(sums["fine"], 15)
    np.testing.assert_allclose(METRICS["ece"].compute(coarse), ours["ece"], rtol=1e-6)
    np.testing.assert_allclose(METRICS["debiased_2"].compute(coarse), ours["debiased_2"], rtol=1e-5)
    assert ours["debiased_2"] == pytest.approx(math.sqrt(max(ours["square"], 0)), rel=1e-6)
    assert ours["top_label"] >= ours["ece"] - 1e-7
    probs, targets, _ = data()
    np.testing.assert_allclose(ours["soft_flat"], abs(ours["gap"]), rtol=1e-4)
    cells = sums["avuc"]
    agree = cells.accurate_certain + cells.inaccurate_uncertain
    np.testing.assert_allclose(ours["avuc"], -math.log(agree / sum(cells)), rtol=1e-9)
    np.testing.assert_allclose(sum(sums["avu"]), ROWS)
    entropies = -(probs * np.log(probs)).sum(1)
    assert METRICS["avu"].compute(sums["avu"]) == np.mean((probs.argmax(1) == targets) == (entropies <= 0.5))


def test_undefined_is_nan():
    probs, targets, _ = data()
    right = read(sums_of(np.eye(CLASSES)[targets], targets))
    assert math.isnan(right["over"]) and math.isnan(right["auroc"]) and math.isnan(right["z"])
    assert right["under"] == right["ece"] == right["debiased"] == right["square"] == right["ks"] == 0
    nothing = jax.tree.map(np.zeros_like, sums_of(probs, targets))
    with np.errstate(invalid="ignore"):
        empty = read(nothing)
    assert all(map(math.isnan, empty.values())), empty
    for name in ("ece", "mce_10", "over", "square", "top_label", "auroc"):
        assert METRICS[name].interval(nothing[name])[0] is None, name
    few = calibration_error(norm=INF, min_count=500)
    assert math.isnan(few.compute(sums_of(probs, targets)["mce"])), "no bin has that many rows"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_error(num_bins=0), "`num_bins` must be a whole number of at least 1, got 0"),
        (lambda: classwise_calibration_error(num_bins=2.5), "`num_bins` must be a whole number of at least 1, got 2.5"),
        (
            lambda: top_label_conditional_calibration_error(num_bins=0),
            "`num_bins` must be a whole number of at least 1, got 0",
        ),
        (lambda: soft_binned_calibration_error(num_bins=0), "`num_bins` must be a whole number of at least 1, got 0"),
        (lambda: calibration_error(norm=0.5), "`norm` must be at least 1 .* got 0.5"),
        (lambda: classwise_calibration_error(norm=math.nan), "`norm` must be at least 1 .* got nan"),
        (lambda: calibration_error(norm=3, debiased=True), "`debiased` needs `norm` 1 or 2, got norm 3"),
        (
            lambda: top_label_conditional_calibration_error(norm=INF, debiased=True),
            "`debiased` needs `norm` 1 or 2, got norm inf",
        ),
        (lambda: calibration_error(weighting="equal"), "`weighting` must be 'mass' or 'uniform', got 'equal'"),
        (lambda: calibration_error(min_count=0), "`min_count` must be at least 1, got 0"),
        (lambda: confidence_histogram(closed="both"), "`closed` must be 'right' or 'left', got 'both'"),
        (lambda: classwise_calibration_error(closed="both"), "`closed` must be 'right' or 'left', got 'both'"),
        (
            lambda: top_label_conditional_calibration_error(closed="both"),
            "`closed` must be 'right' or 'left', got 'both'",
        ),
        (lambda: classwise_calibration_error(threshold=1.0), "`threshold` must lie in .0, 1., got 1.0"),
        (lambda: soft_binned_calibration_error(temperature=0), "`temperature` must be positive and finite, got 0"),
        (lambda: soft_binned_calibration_error(norm=INF), "`norm` must be at least 1 and finite, got inf"),
        (lambda: accuracy_versus_uncertainty(threshold=math.nan), "`threshold` must be a finite number, got nan"),
        (lambda: accuracy_versus_uncertainty_loss(threshold=INF), "`threshold` must be a finite number, got inf"),
        (lambda: soft_accuracy_versus_uncertainty_loss(threshold=0), "`threshold` must lie in .0, 1., got 0"),
        (lambda: soft_accuracy_versus_uncertainty_loss(temperature=-1), "`temperature` must be positive and .* -1"),
        (lambda: group_calibration_error(np.ones(3), np.ones(2), np.ones(3, int)), "same number of rows, at least one"),
        (lambda: group_calibration_error(np.ones(2), np.ones(2), np.array([0, -1])), "`groups` must be labels 0, 1, 2"),
        (lambda: group_calibration_error(np.ones(2), np.ones(2), np.ones(2)), "got float64 of shape"),
        (lambda: group_calibration_error(np.full(2, 1.5), np.ones(2), np.zeros(2, int)), r"in \[0, 1\], got 1.5"),
        (
            lambda: group_calibration_error(np.ones(2), np.ones(2), np.zeros(2, int), weights=np.zeros(2)),
            "`weights` must be finite and non-negative, not all zero",
        ),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["ece", "classwise", "top_label", "soft", "z", "avu"])
def test_too_many_rows_in_one_call(unchecked, name):
    rows = 2**20 + 1
    pred = jax.ShapeDtypeStruct((1, rows, 2), jnp.float32)
    with pytest.raises(ValueError, match="`targets` must have at most 1048576 rows a call, got 1048577"):
        jax.eval_shape(lambda p, y, w: METRICS[name].measure(Probabilities(p), y, w), pred, *shapes(rows))


def shapes(rows):
    return jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
