"""Do nominal 95 % intervals hold the truth in 95 of 100 data sets? Simulated, with known truth and a fixed seed.

Logits of the true distribution are normal with standard deviation 2; the forecast is softmax(sharpness * logits),
which is calibrated for sharpness 1 and over-confident above. Set BAYESCAL_COVERAGE to a file name to keep the table.
"""

import json
import os
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

import bayescal as bc
from bayescal.binning import Histogram
from bayescal.compare import _poisson, bootstrap_intervals
from bayescal.metrics.calibration import calibration_error, squared_calibration_error
from bayescal.metrics.likelihood import MeanSums

pytestmark = pytest.mark.core

BINS = 15
CELLS = [(classes, sharpness, rows) for classes in (2, 10) for sharpness in (1.0, 1.15, 1.5) for rows in (500, 2000)]
SCORES = {"accuracy": bc.accuracy(), "nll": bc.nll(), "brier": bc.brier()}


class Draws(NamedTuple):
    """What is drawn and what is known: numpy arrays with rows last; `truth` is the chance of being right given inputs."""

    confidence: np.ndarray
    correct: np.ndarray
    truth: np.ndarray
    scores: dict[str, np.ndarray]  # of each row, given the label
    expected: dict[str, np.ndarray]  # of each row, over labels


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw(rng, classes, sharpness, shape):
    logits = 2 * rng.standard_normal((*shape, classes), dtype=np.float32)
    if classes == 2:
        logits[..., 1] = 0
    true, forecast = softmax(logits), softmax(np.float32(sharpness) * logits)
    label = (true.cumsum(-1)[..., :-1] < rng.random((*shape, 1), dtype=np.float32)).sum(-1)
    of_label = np.take_along_axis(forecast, label[..., None], -1)[..., 0]
    squares = (forecast**2).sum(-1)
    correct = (forecast.argmax(-1) == label).astype(np.float32)
    chance = true.max(-1)  # sharpening keeps the order
    return Draws(
        forecast.max(-1),
        correct,
        chance,
        {"accuracy": correct, "nll": -np.log(of_label), "brier": squares - 2 * of_label + 1},
        {
            "accuracy": chance,
            "nll": -(true * np.log(forecast)).sum(-1),
            "brier": squares - 2 * (true * forecast).sum(-1) + 1,
        },
    )


@cache
def truth(classes, sharpness, rows=10**7):
    """Expected values over inputs drawn afresh; labels are integrated out, so that only inputs are sampled."""
    rng, totals, confidences, chances = np.random.default_rng(1), {}, [], []
    histogram = np.zeros((2, BINS))
    for _ in range(0, rows, 250_000):
        d = draw(rng, classes, sharpness, (250_000,))
        for name, x in d.expected.items():
            totals[name] = totals.get(name, 0) + x.sum(dtype=np.float64)
        where = bin_of(d.confidence)
        gap = d.confidence.astype(np.float64) - d.truth
        histogram += np.stack([np.bincount(where, x, BINS) for x in (np.ones_like(gap), gap)])
        confidences.append(d.confidence), chances.append(d.truth)
    n = histogram[0].sum()
    share, gap = histogram[0] / n, histogram[1] / np.maximum(histogram[0], 1)
    if sharpness == 1:
        gap = 0 * gap
    chance = np.concatenate(chances)[np.argsort(np.concatenate(confidences))].astype(np.float64)
    below = np.cumsum(1 - chance) - (1 - chance) / 2  # wrong ones of lower confidence
    auroc = (chance * below).sum() / (chance.sum() * (1 - chance).sum())
    known = {name: total / n for name, total in totals.items()}
    return known | {"auroc": auroc, "ece": (share * abs(gap)).sum(), "squared": (share * gap**2).sum()}


def bin_of(confidence):
    return np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)


def histograms(d):
    """The sums of every data set: a `Histogram` of arrays (sets, bins)."""
    sets = len(d.confidence)
    where = (bin_of(d.confidence) + BINS * np.arange(sets)[:, None]).ravel()
    gap = d.confidence.astype(np.float64) - d.correct
    one = np.ones_like(gap)
    columns = {"weight": one, "gap": gap, "confidence": d.confidence, "correct": d.correct, "square": gap**2}
    columns["weight_square"] = one
    return Histogram(
        **{
            name: np.bincount(where, columns[name].ravel(), sets * BINS).reshape(sets, BINS)
            for name in Histogram._fields
        }
    )


def percentiles(replicates, low=0.025, high=0.975):
    return np.quantile(replicates, low, axis=0), np.quantile(replicates, high, axis=0)


def bias_corrected(replicates, value, acceleration=0.0):
    """BC and (with an acceleration) BCa percentiles; arrays (replicates, sets) and (sets,)."""
    below = ((replicates < value).mean(0) + (replicates <= value).mean(0)) / 2
    shift = ndtri(np.clip(below, 1e-4, 1 - 1e-4))
    ends = []
    for z in ndtri([0.025, 0.975]):
        place = ndtr(shift + (shift + z) / (1 - acceleration * (shift + z)))
        ends.append(np.array([np.quantile(x, p) for x, p in zip(replicates.T, place, strict=True)]))
    return ends


def simulate(classes, sharpness, rows, *, sets, replicates=1000, block=100, extra=500, seed=0, truth_rows=10**7):
    """Share of data sets whose interval holds the truth: name -> coverage. One set of weights serves a block of sets."""
    known, hits = truth(classes, sharpness, truth_rows), {}
    rng = np.random.default_rng([seed, classes, int(100 * sharpness), rows])

    def count(name, ends, value):
        low, high = (np.array(x, np.float64) for x in ends)
        hits.setdefault(name, []).extend((low <= value + 1e-12) & (value <= high))

    for start in range(0, sets, block):
        d = draw(rng, classes, sharpness, (block, rows))
        weights = np.asarray(_poisson(jax.random.key(seed * 10_000 + start), np.uint32(0), (replicates, rows)))
        total = weights.sum(1, dtype=np.float64)[:, None]
        for name, x in d.scores.items():
            drawn = weights @ np.ascontiguousarray(x.T) / total
            count(name, percentiles(drawn), known[name])
            count(f"{name}, BC", bias_corrected(drawn, x.mean(1, dtype=np.float64)), known[name])
            x = x.astype(np.float64)
            one = np.full(block, rows)
            count(f"{name}, evaluate", SCORES[name].interval(MeanSums(one, x.sum(1), (x**2).sum(1), one)), known[name])
        ends = [bc.auroc_estimate(*pair, "correct")[1:3] for pair in zip(d.confidence, d.correct > 0, strict=True)]
        count("auroc", np.array(ends, np.float64).T, known["auroc"])
        sums = histograms(d)
        each = [Histogram(*(x[i] for x in sums)) for i in range(block)]
        for name, metric in (("ece", calibration_error(debiased=True)), ("squared", squared_calibration_error())):
            count(name, np.array([metric.interval(one) for one in each]).T, known[name])
        if start < extra:
            ece_bootstrap(d, sums, weights, total, known, count)
    return {name: float(np.mean(x)) for name, x in hits.items()}


def ece_bootstrap(d, sums, weights, total, known, count):
    """What `bootstrap` refuses: intervals of the ECE and of its debiased square by resampling."""
    where = np.eye(BINS, dtype=np.float32)[bin_of(d.confidence)]  # (sets, rows, bins)
    gap = (d.confidence - d.correct)[..., None]
    n, g, a = (np.einsum("rn,snb->rsb", weights, where * x, optimize=True) for x in (1, gap, d.correct[..., None]))
    ece = np.abs(g).sum(-1) / total
    value = np.abs(sums.gap).sum(1) / len(d.confidence[0])
    sign = np.take_along_axis(np.sign(sums.gap), bin_of(d.confidence), 1)
    influence = sign * gap[..., 0] - value[:, None]
    acceleration = (influence**3).sum(1) / (6 * (influence**2).sum(1) ** 1.5)
    count("ece, percentile", percentiles(ece), known["ece"])
    count("ece, BCa", bias_corrected(ece, value, acceleration), known["ece"])

    def squared(n, g, a, n2):
        a, rows = a / np.maximum(n, 1), n**2 / np.maximum(n2, 1)
        return np.where(rows > 1.5, n * ((g / np.maximum(n, 1)) ** 2 - a * (1 - a) / np.maximum(rows - 1, 0.5)), 0).sum(
            -1
        )

    n2 = np.einsum("rn,snb->rsb", weights**2, where, optimize=True)
    drawn = squared(n, g, a, n2) / total
    count("squared, percentile of repetition", percentiles(squared(n, g, a, n) / total), known["squared"])
    value = squared(sums.weight, sums.gap, sums.confidence - sums.gap, sums.weight) / len(d.confidence[0])
    count("squared, percentile", percentiles(drawn), known["squared"])
    count("squared, BC", bias_corrected(drawn, value), known["squared"])


def check(coverage, slack=0.0):
    """The bars, widened by `slack` where the data sets are few."""
    for name in (*SCORES, "auroc"):
        assert 0.93 - slack <= coverage[name] <= 0.97 + slack, (name, coverage)
    assert coverage["squared"] >= 0.93 - slack and coverage["ece"] >= 0.9 - slack, coverage


def test_one_cell():
    coverage = simulate(10, 1.15, 500, sets=200, extra=100, truth_rows=500_000)
    check(coverage, slack=0.03)
    assert coverage["ece, percentile"] < 0.5, "the bootstrap that is refused"


def test_the_simulated_bootstrap_is_that_of_the_package(rng):
    """One set of weights serves many data sets here; for one of them `bootstrap` gives the same ends."""
    logits = 2 * rng.standard_normal((1, 500, 10)).astype(np.float32)
    pred, targets = bc.Categorical(logits), rng.integers(0, 10, 500)
    estimate = bootstrap_intervals(pred, targets, {"nll": bc.nll()}, jax.random.key(3))["nll"]
    weights = np.asarray(_poisson(jax.random.key(3), np.uint32(0), (1000, 500)))
    drawn = weights @ -np.asarray(pred.log_prob(targets)) / weights.sum(1)
    np.testing.assert_allclose(percentiles(drawn), [estimate.low, estimate.high], rtol=1e-5)


def test_truth_against_labels():
    """What is known of a cell agrees with a large sample of labels."""
    known, d = truth(10, 1.5, 500_000), draw(np.random.default_rng(5), 10, 1.5, (1, 400_000))
    for name, x in d.scores.items():
        assert abs(x.mean(dtype=np.float64) - known[name]) < 5 * x.std() / 400_000**0.5 * 1.5
    assert abs(bc.auroc_estimate(d.confidence[0], d.correct[0] > 0, "correct").value - known["auroc"]) < 0.004
    sums = Histogram(*(x[0] for x in histograms(d)))
    assert abs(float(calibration_error().compute(sums)) - known["ece"]) < 0.005
    assert abs(float(squared_calibration_error().compute(sums)) - known["squared"]) < 0.0015


@pytest.mark.slow
def test_every_cell():
    """2,000 data sets in each of twelve cells, about two minutes on one core."""
    table = []
    for classes, sharpness, rows in CELLS:
        coverage = simulate(classes, sharpness, rows, sets=2000)
        cell = {"classes": classes, "sharpness": sharpness, "rows": rows}
        table.append(cell | {"true_ece": truth(classes, sharpness)["ece"], "coverage": coverage})
        print(
            f"{classes:3d} {sharpness:5.2f} {rows:5d}  ", "  ".join(f"{k} {100 * v:.1f}" for k, v in coverage.items())
        )
    if os.environ.get("BAYESCAL_COVERAGE"):
        with open(os.environ["BAYESCAL_COVERAGE"], "w") as file:
            json.dump({"sets": 2000, "nominal": 0.95, "cells": table}, file, indent=1)
    for cell in table:
        check(cell["coverage"])
    assert min(cell["coverage"][name] for cell in table for name in ("ece, percentile", "ece, BCa")) < 0.01
