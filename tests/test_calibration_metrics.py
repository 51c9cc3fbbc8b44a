"""Binned calibration metrics: against loops, by hand, other libraries' values, invariances, peers' mistakes, intervals."""

import json
import math
import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles_calibration as oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayescal.binning import Histogram, bin_edges, bin_index, coarsen
from bayescal.evaluate import measure
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
from bayescal.metrics.events import one_class
from bayescal.metrics.fine import binned_auroc, binned_ks_error
from bayescal.metrics.signed import confidence_gap, overconfidence, spiegelhalter_z, underconfidence
from bayescal.metrics.soft import soft_binned_calibration_error
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


def least_confidence(pred):
    return 1 - pred.top_label()[0]


REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"
INF = math.inf
ROWS, CLASSES = 200, 4

METRICS = {
    "ece": calibration_error(),
    "ece_left": calibration_error(closed="left"),
    "ece_7": calibration_error(num_bins=7),
    "rms": calibration_error(norm=2),
    "l3": calibration_error(norm=3),
    "mce": calibration_error(norm=INF),
    "mce_10": calibration_error(norm=INF, min_count=10),
    "average": calibration_error(weighting="uniform"),
    "average_5": calibration_error(weighting="uniform", min_count=5),
    "debiased": calibration_error(debiased=True),
    "debiased_2": calibration_error(norm=2, debiased=True),
    "one_bin": calibration_error(num_bins=1),
    "square": squared_calibration_error(),
    "class_1": calibration_error(events=one_class(1)),
    "classwise": classwise_calibration_error(),
    "classwise_2": classwise_calibration_error(norm=2),
    "classwise_above": classwise_calibration_error(threshold=0.1),
    "top_label": top_label_conditional_calibration_error(),
    "top_label_max": top_label_conditional_calibration_error(norm=INF),
    "gap": confidence_gap(),
    "over": overconfidence(),
    "under": underconfidence(),
    "z": spiegelhalter_z(),
    "auroc": binned_auroc(num_bins=240),
    "ks": binned_ks_error(num_bins=240),
    "soft": soft_binned_calibration_error(),
    "soft_1": soft_binned_calibration_error(temperature=0.1, norm=1),
    "avu": accuracy_versus_uncertainty(threshold=0.5),
    "avuc": accuracy_versus_uncertainty_loss(threshold=0.5),
    "soft_avuc": soft_accuracy_versus_uncertainty_loss(),
    "fine": confidence_histogram(num_bins=240),
    "avu_1": accuracy_versus_uncertainty(threshold=1.0),
    "avuc_1": accuracy_versus_uncertainty_loss(threshold=1.0),
    "avu_confidence": accuracy_versus_uncertainty(threshold=0.5, uncertainty=least_confidence),
    "soft_avuc_7": soft_accuracy_versus_uncertainty_loss(threshold=0.7),
    "soft_avuc_warm": soft_accuracy_versus_uncertainty_loss(temperature=1.0),
    "soft_10": soft_binned_calibration_error(num_bins=10),
    "soft_hard": soft_binned_calibration_error(temperature=1e-6),
    "soft_flat": soft_binned_calibration_error(temperature=1e6),
    "auroc_4": binned_auroc(num_bins=4),
    "ks_4": binned_ks_error(num_bins=4),
}
ONE = one_class(1)
BINARY = {
    "top": calibration_error(),
    "conditional": top_label_conditional_calibration_error(),
    "ece": calibration_error(events=ONE),
    "one_bin": calibration_error(events=ONE, num_bins=1),
    "average": calibration_error(events=ONE, weighting="uniform"),
    "ten": calibration_error(events=ONE, num_bins=10),
    "ten_left": calibration_error(events=ONE, num_bins=10, closed="left"),
    "ten_debiased": calibration_error(events=ONE, num_bins=10, debiased=True),
    "ten_square": squared_calibration_error(events=ONE, num_bins=10),
    "gap": confidence_gap(events=ONE),
    "over": overconfidence(events=ONE),
    "under": underconfidence(events=ONE),
    "z": spiegelhalter_z(events=ONE),
    "auroc": binned_auroc(events=ONE),
    "auroc_10": binned_auroc(events=ONE, num_bins=10),
    "ks": binned_ks_error(events=ONE),
}
KISH = {"debiased", "debiased_2", "square", "mce_10", "average_5", "z"}  # read effective rows: weights are no counts
EXTENSIVE = {"z"}  # grows with the number of rows


@cache
def data(seed=0):
    """Probabilities (rows, classes), float32, over-confident above 0.7 and under-confident below; targets; weights, some 0."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(ROWS, CLASSES))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = probs ** np.where(probs.max(1, keepdims=True) > 0.7, 0.3, 3)
    targets = np.array([rng.choice(CLASSES, p=q) for q in truth / truth.sum(1, keepdims=True)])
    weights = rng.integers(0, 4, ROWS).astype(np.float32)
    return probs.astype(np.float32), targets.astype(np.int32), weights


def sums_of(probs, targets, weights=None, metrics=METRICS):
    """All sums in calls of `ROWS` rows, each kind once: one program for every test."""
    kinds = {m.measure: m for m in metrics.values()}
    pred = Probabilities(np.asarray(probs, np.float32)[None])
    sums = measure(pred, targets, {str(i): m for i, m in enumerate(kinds.values())}, weights=weights, batch_size=ROWS)
    of = dict(zip(kinds, sums.values(), strict=True))
    return {name: of[m.measure] for name, m in metrics.items()}


def read(sums, metrics=METRICS):
    return {name: float(metrics[name].compute(s)) for name, s in sums.items() if name != "fine"}


@cache
def values(weighted=False):
    probs, targets, weights = data()
    return read(sums_of(probs, targets, weights if weighted else None))


def binary(p, y):
    """All of BINARY for probabilities of class 1, filled up to `ROWS` rows of which the last have weight 0."""
    p = np.asarray(p, np.float32)
    probs = np.resize(np.stack([1 - p, p], -1), (ROWS, 2))
    weights = (np.arange(ROWS) < len(p)).astype(np.float32)
    return read(sums_of(probs, np.resize(np.asarray(y, np.int32), ROWS), weights, BINARY), BINARY)


def expected(probs, targets, w):
    c, a = probs.max(1), probs.argmax(1) == targets
    ece = oracles.calibration_error
    return {
        "ece": ece(c, a, w),
        "ece_left": ece(c, a, w, closed="left"),
        "ece_7": ece(c, a, w, num_bins=7),
        "rms": ece(c, a, w, norm=2),
        "l3": ece(c, a, w, norm=3),
        "mce": ece(c, a, w, norm=INF),
        "mce_10": ece(c, a, w, norm=INF, min_count=10),
        "average": ece(c, a, w, weighting="uniform"),
        "average_5": ece(c, a, w, weighting="uniform", min_count=5),
        "debiased": ece(c, a, w, debiased=True),
        "debiased_2": ece(c, a, w, norm=2, debiased=True),
        "one_bin": abs((w * (c - a)).sum()) / w.sum(),
        "square": oracles.squared_calibration_error(c, a, w),
        "class_1": ece(probs[:, 1], targets == 1, w),
        "classwise": oracles.classwise_calibration_error(probs, targets, w),
        "classwise_2": oracles.classwise_calibration_error(probs, targets, w, norm=2),
        "classwise_above": oracles.classwise_calibration_error(probs, targets, w, threshold=0.1),
        "top_label": oracles.top_label_conditional_calibration_error(probs, targets, w),
        "top_label_max": oracles.top_label_conditional_calibration_error(probs, targets, w, norm=INF),
        "gap": (w * (c - a)).sum() / w.sum(),
        "over": oracles.mean_where(c, ~a, w),
        "under": oracles.mean_where(1 - c, a, w),
        "z": oracles.spiegelhalter_z(c, a, w),
        "auroc": oracles.binned_auroc(c, a, w, 240),
        "ks": oracles.binned_ks_error(c, a, w, 240),
        "soft": oracles.soft_binned_calibration_error(c, a, w),
        "soft_1": oracles.soft_binned_calibration_error(c, a, w, temperature=0.1, norm=1),
        "avu": oracles.accuracy_versus_uncertainty(probs, targets, w, 0.5),
        "avuc": oracles.accuracy_versus_uncertainty_loss(probs, targets, w, "loss", 0.5),
        "soft_avuc": oracles.accuracy_versus_uncertainty_loss(probs, targets, w, "soft", 0.5),
        "avu_1": oracles.accuracy_versus_uncertainty(probs, targets, w, 1.0),
        "avuc_1": oracles.accuracy_versus_uncertainty_loss(probs, targets, w, "loss", 1.0),
        "avu_confidence": (w * ((1 - c <= 0.5) == a)).sum() / w.sum(),
        "soft_avuc_7": oracles.accuracy_versus_uncertainty_loss(probs, targets, w, "soft", 0.7),
        "soft_avuc_warm": oracles.accuracy_versus_uncertainty_loss(probs, targets, w, "soft", 0.5, 1.0),
        "soft_10": oracles.soft_binned_calibration_error(c, a, w, num_bins=10),
        "soft_hard": ece(c, a, w, norm=2),
        "soft_flat": oracles.soft_binned_calibration_error(c, a, w, temperature=1e6),
        "auroc_4": oracles.binned_auroc(c, a, w, 4),
        "ks_4": oracles.binned_ks_error(c, a, w, 4),
    }


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


def test_relabelling_classes():
    probs, targets, _ = data()
    order = np.array([2, 0, 3, 1])  # class k becomes order[k]
    moved = read(sums_of(probs[:, np.argsort(order)], order[targets].astype(np.int32)))
    for name, value in values().items():
        if name == "class_1":
            assert moved[name] != value
        else:
            np.testing.assert_allclose(moved[name], value, rtol=1e-5, err_msg=name)


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


def test_rare_labels_weigh_by_their_rows():
    """Pitfall 31: 98 calibrated rows of one label and two of another with gap 0.9 make 0.018, not their mean 0.45."""
    p = np.r_[np.full(98, 0.0), np.full(2, 0.9)]
    ours = binary(p, np.zeros(100))
    np.testing.assert_allclose([ours["conditional"], ours["one_bin"]], 0.018, rtol=1e-5)
    assert 0 <= values()["ece"] <= values()["rms"] <= values()["l3"] <= values()["mce"] <= 1


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
