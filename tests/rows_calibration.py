"""The rows and the tables that the binned calibration metrics are tested on: one program for each kind of sums."""

import math
from functools import cache

import numpy as np
import oracles_calibration as oracles

from bayescal.evaluate import measure
from bayescal.metrics.accuracy_uncertainty import (
    accuracy_versus_uncertainty,
    accuracy_versus_uncertainty_loss,
    soft_accuracy_versus_uncertainty_loss,
)
from bayescal.metrics.calibration import calibration_error, confidence_histogram, squared_calibration_error
from bayescal.metrics.classwise import classwise_calibration_error, top_label_conditional_calibration_error
from bayescal.metrics.events import one_class
from bayescal.metrics.fine import binned_auroc, binned_ks_error
from bayescal.metrics.signed import confidence_gap, overconfidence, spiegelhalter_z, underconfidence
from bayescal.metrics.soft import soft_binned_calibration_error
from bayescal.predictive import Probabilities


def least_confidence(pred):
    return 1 - pred.top_label()[0]


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
