"""The rows that the bin-free metrics are tested on, all of one size, so that few programs are compiled."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bayescal.binning import Histogram, histogram
from bayescal.metrics.events import one_class
from bayescal.metrics.smooth import smooth_calibration_error
from bayescal.predictive import Probabilities

REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"
ROWS, CLASSES = 200, 4


def numbers(result):
    return {name: float(value) for name, value in result.items()}


def events(rng, ties=True):
    """Over-confident above one half and under-confident below: the smoothed residual changes sign."""
    p = rng.uniform(size=ROWS)
    p = np.where(rng.uniform(size=ROWS) < 0.5, np.round(p, 1), p) if ties else p
    y = rng.uniform(size=ROWS) < p + 0.25 * np.sin(2 * np.pi * p)
    return p.astype(np.float32), y.astype(np.float32)


def class_rows(rng):
    logits = 2 * rng.normal(size=(ROWS, CLASSES))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs.astype(np.float32), rng.integers(0, CLASSES, ROWS)


def some_weights(rng):
    """About 60 rows that count, of weights 1/2 to 2."""
    return np.where(rng.uniform(size=ROWS) < 0.3, rng.uniform(0.5, 2, size=ROWS), 0).astype(np.float32)


def kept(w, *arrays):
    """Rows of positive weight, in float64 (whole numbers as they are)."""
    return [x[w > 0].astype(np.float64) if x.dtype.kind == "f" else x[w > 0] for x in (*arrays, w)]


def two(p):
    return Probabilities(np.stack([1 - p, p], 1)[None])


def sums_of(p, y, w=None, num_bins=3840):
    w = np.ones_like(p) if w is None else w
    sums = histogram(p, y, w, num_bins=num_bins)
    return Histogram(*(np.asarray(x, np.float64) for x in sums))


def smooth_value(p, y, w=None, **setting):
    return smooth_calibration_error(events=one_class(1), **setting).compute(sums_of(p, y, w))


def stored_oracles():
    """Values by group and key, and the inputs; skips where they are not there."""
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    oracle = json.loads(path.read_text())["oracles"]
    inputs = dict(np.load(REFERENCE / "metrics_oracle_inputs.npz"))
    return {group: {k: v["value"] for k, v in content.items()} for group, content in oracle.items()}, inputs
