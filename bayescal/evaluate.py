"""Evaluation: metrics streamed over batches, totals in float64 on the host."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from bayescal.predictive import Predictive, check_rows, take
from bayescal.sharding import sum_over_processes
from bayescal.types import Estimate, Metric


def evaluate(
    pred: Predictive,
    targets,
    metrics: Mapping[str, Metric],
    *,
    weights=None,
    batch_size: int = 2**16,
    across_processes: bool = False,
) -> dict[str, Estimate]:
    """The value of every metric, with interval, n and convention.

    Args:
        pred: predictive with batch shape (rows,).
        targets: one per row, as the family wants them.
        metrics: name -> metric.
        weights: non-negative weight of each row; None = ones. Rows of weight 0 count for nothing.
        batch_size: rows a device call; the last batch is filled up with rows of weight 0. At most 2**20.
        across_processes: the rows here are this process's share, and sums are added over all processes
            (`jax.distributed`); False = they are all there is.

    Returns:
        name -> Estimate, whose n is the number of rows of positive weight.

    Raises:
        ValueError: for NaN predictions, targets out of range or of the wrong shape or type, unusable weights, no rows.
    """
    sums = measure(pred, targets, metrics, weights=weights, batch_size=batch_size)
    n = len(targets) if weights is None else int((np.asarray(weights) > 0).sum())
    if across_processes:
        sums, n = sum_over_processes((sums, np.float64(n)))
        n = int(n)
    result = {}
    for name, metric in metrics.items():
        low, high = metric.interval(sums[name]) if metric.interval else (None, None)
        low, high = (None if x is None or not np.isfinite(x) else float(x) for x in (low, high))
        result[name] = Estimate(float(metric.compute(sums[name])), low, high, n, metric.convention)
    return result


def measure(pred: Predictive, targets, metrics: Mapping[str, Metric], *, weights=None, batch_size: int = 2**16) -> dict:
    """The metrics' sums over all rows, float64 numpy, for those who merge or read them: name -> sums. As `evaluate`."""
    targets = np.asarray(targets)
    check_rows(pred, targets, weights)
    if not isinstance(batch_size, int) or not 1 <= batch_size <= 2**20:
        raise ValueError(
            f"`batch_size` must be a whole number from 1 to 2**20, got {batch_size!r}: float32 sums stay exact up to there. "
            "Leave it out for 2**16."
        )
    rows = len(targets)
    weights = np.ones(rows, np.float32) if weights is None else np.asarray(weights, np.float32)
    names, parts = tuple(metrics), tuple(m.measure for m in metrics.values())
    size = min(batch_size, rows)
    totals: Any = None
    for first in range(0, rows, size):
        index = np.arange(first, first + size)
        mask = weights[index % rows] * (index < rows)
        batch = take(pred, index % rows) if size < rows else pred
        sums = _measure(parts, batch, targets[index % rows], mask)
        sums = jax.tree.map(partial(np.asarray, dtype=np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return dict(zip(names, totals, strict=True))


@partial(jax.jit, static_argnums=0)
def _measure(parts, pred, targets, weights):
    return tuple(part(pred, targets, weights) for part in parts)


def mean_over_runs(values: Sequence[float], convention: str = "") -> Estimate:
    """Mean over independent runs with its 95 % interval by Student's t; no interval for a single run.

    Args:
        values: one figure per run.
        convention: added to what the interval is.
    """
    runs = np.asarray(values, np.float64)
    mean, n = float(runs.mean()), len(runs)
    if n < 2:
        return Estimate(mean, n=n, convention=convention)
    from scipy.stats import t  # slow to import

    half = float(t.ppf(0.975, n - 1) * runs.std(ddof=1) / np.sqrt(n))
    note = f"mean over {n} runs, 95 % t interval"
    return Estimate(mean, mean - half, mean + half, n, f"{convention}; {note}" if convention else note)
