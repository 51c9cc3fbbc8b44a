"""Evaluation: metrics streamed over batches, totals in float64 on the host."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.binning import Z95
from bayescal.predictive import Predictive, all_good, check_predictive, check_targets_and_weights, take
from bayescal.sharding import sum_over_processes
from bayescal.types import Array, Estimate, Metric, WholeMetric

BATCH_NUMBERS = 2**21  # numbers of a predictive that go into one device call: larger ones leave the caches


def evaluate(
    pred: Predictive,
    targets,
    metrics: Mapping[str, Metric | WholeMetric],
    *,
    weights=None,
    groups=None,
    batch_size: int | None = None,
    across_processes: bool = False,
) -> dict[str, Estimate]:
    """The value of every metric, with 95 % interval, n and convention.

    The interval is the metric's own where it has one in closed form; else normal, with the standard error from the
    rows' influence; none where neither is sound. With `groups` it is from the influence summed over each group.

    Args:
        pred: predictive with batch shape (rows,).
        targets: one per row, as the family wants them.
        metrics: name -> metric.
        weights: non-negative weight of each row; None = ones. Rows of weight 0 count for nothing.
        groups: label of each row; rows of one group (patient, document, video) are not independent, groups are.
        batch_size: rows a device call, at most 2**20; None = as many as hold about 2**21 numbers.
        across_processes: the rows here are this process's share, and sums are added over all processes
            (`jax.distributed`); False = they are all there is. For streaming metrics.

    Returns:
        name -> Estimate, whose n is the number of rows of positive weight.

    Raises:
        ValueError: for NaN predictions, probabilities that are none, targets out of range or of the wrong shape or
            type, unusable weights, no rows, a metric of whole columns across processes.
    """
    wholes = [name for name, m in metrics.items() if isinstance(m, WholeMetric)]
    if across_processes and (wholes or groups is not None):
        raise ValueError(
            f"`across_processes` adds sums, got {wholes or 'groups'}, which need all rows in one place. Gather the "
            "predictions first, or use streaming metrics."
        )
    sums, columns = _pass(pred, targets, metrics, weights, batch_size)
    n = len(targets) if weights is None else int((np.asarray(weights) > 0).sum())
    if across_processes:
        sums, rows = sum_over_processes((sums, np.float64(n)))
        n = int(rows)
    result = {}
    for name, metric in metrics.items():
        if isinstance(metric, WholeMetric):
            known, value = (*columns[metric.read], _float32(weights)), _compute(metric, columns, weights)
        else:
            known, value = (sums[name],), _number(name, metric.compute(sums[name]))
        low, high = None, None
        if metric.interval and groups is None and n > 1:
            low, high = metric.interval(*known)
        if low is None and metric.regular and n > 1 and not across_processes:  # influence needs the sums of all
            influence = _influences(metric, pred, targets, weights, batch_size, sums.get(name), columns)
            half = Z95 * standard_error(influence, weights, groups)
            low, high = value - half, value + half
        low, high = (None if x is None or not np.isfinite(x) else float(x) for x in (low, high))
        result[name] = Estimate(value, low, high, n, metric.convention)
    return result


def measure(
    pred: Predictive, targets, metrics: Mapping[str, Metric], *, weights=None, batch_size: int | None = None
) -> dict:
    """The metrics' sums over all rows, float64 numpy, for those who merge or read them: name -> sums. As `evaluate`."""
    return _pass(pred, targets, metrics, weights, batch_size)[0]


def read_columns(
    pred: Predictive, targets, read, *, weights=None, batch_size: int | None = None
) -> tuple[np.ndarray, ...]:
    """The columns of all rows that `read(pred, targets)` gives, such as confidence and correctness of `top_label().read`.

    Numpy arrays (rows, ...), read batch by batch; checks, and raises, as `evaluate`.
    """
    metric = WholeMetric(read, lambda *columns: None)
    return _pass(pred, targets, {"it": metric}, weights, batch_size)[1][read]


def row_influences(
    metric: Metric | WholeMetric, pred: Predictive, targets, *, weights=None, batch_size: int | None = None
) -> np.ndarray:
    """Derivative of the metric in each row's weight, float64 (rows,), in the metric's unit.

    The infinitesimal jackknife: the metric's standard error is the root of sum_i (w_i influence_i)^2, and that of the
    difference of one metric on two sets of predictions for the same rows comes from the difference of influences.

    Args:
        metric: streaming or whole; for an irregular one (`metric.regular` False) this says nothing near zero.
        pred: predictive with batch shape (rows,).
        targets: one per row.
        weights: of each row; None = ones.
        batch_size: as in `evaluate`.
    Source: Jaeckel 1972, The infinitesimal jackknife.
    """
    sums, columns = _pass(pred, targets, {"it": metric}, weights, batch_size)
    return _influences(metric, pred, targets, weights, batch_size, sums.get("it"), columns)


def standard_error(influences: np.ndarray, weights=None, groups=None) -> float:
    """Root of sum_i (w_i influence_i)^2, or of groups' sums G / (G - 1) sum_g (sum_i w_i influence_i)^2, metric's unit.

    Args:
        influences: of each row, as `row_influences` gives them.
        weights: of each row; None = ones.
        groups: label of each row, where rows of a group are not independent; None = rows are.

    Raises:
        ValueError: for labels of another length, or a single group.
    """
    moved = influences if weights is None else influences * np.asarray(weights, np.float64)
    if groups is None:
        return float(np.sqrt((moved**2).sum()))
    labels = np.asarray(groups)
    if labels.shape == moved.shape and weights is not None:
        moved, labels = moved[np.asarray(weights) > 0], labels[np.asarray(weights) > 0]
    _, place = np.unique(labels, return_inverse=True)
    if labels.shape != moved.shape or place.max() < 1:
        raise ValueError(
            f"`groups` must be one label per row, {moved.shape}, of at least two groups, got shape {labels.shape} with "
            f"{len(np.unique(labels))}. Leave them out where rows are independent."
        )
    total = np.bincount(place, moved)
    return float(np.sqrt(len(total) / (len(total) - 1) * (total**2).sum()))


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


def batches(
    pred: Predictive, targets, weights, batch_size: int | None
) -> Iterator[tuple[slice, Predictive, Any, Array]]:
    """(rows, predictive, targets, weights) of equal size: `rows` are the last of the batch, which are new; those before
    them, which only the last batch has, were in the one before and weigh 0.

    The predictive's values are not looked at: `check_predictive` does.

    Raises:
        ValueError: for rows that do not belong together, targets or weights that are unusable.
    """
    targets = np.asarray(targets)
    check_targets_and_weights(pred, targets, weights)
    if np.issubdtype(targets.dtype, np.unsignedinteger):  # arithmetic on bytes wraps round
        targets = targets.astype(np.int32)
    rows, size = len(targets), _rows_at_once(pred, batch_size)
    size = min(size, rows)
    pred, weights, ones = jax.tree.map(_on_host, pred), _float32(weights), jnp.ones(size, jnp.float32)
    for start in range(0, rows, size):
        first = min(start, rows - size)  # the last batch reaches back: filling up would copy all of it
        index = slice(first, first + size)
        mask = ones if weights is None else weights[index]
        if first < start:
            mask = np.where(np.arange(first, first + size) < start, 0, mask).astype(np.float32)
        batch = jax.device_put(pred if size == rows else take(pred, index))  # once, for all that read it
        yield slice(start, first + size), batch, targets[index], mask


def _rows_at_once(pred: Predictive, batch_size: int | None) -> int:
    if batch_size is None:  # calls cost something, and so does memory
        numbers = max(1, sum(x.size for x in jax.tree.leaves(pred)) // max(1, pred.batch_shape[0]))
        return 2 ** min(20, max(0, (BATCH_NUMBERS // numbers).bit_length() - 1))
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or not 1 <= batch_size <= 2**20:
        raise ValueError(
            f"`batch_size` must be a whole number from 1 to 2**20, got {batch_size!r}: float32 sums stay exact up to there. "
            "Leave it out for a size that suits the predictive."
        )
    return int(batch_size)


def _pass(pred, targets, metrics, weights, batch_size):
    """One pass over the rows: name -> sums (float64), and read -> columns (float32, all rows).

    Metrics with the same `measure` or the same `read` share it.
    """
    streaming = {name: m.measure for name, m in metrics.items() if not isinstance(m, WholeMetric)}
    parts = tuple(dict.fromkeys(streaming.values()))
    reads = tuple(dict.fromkeys(m.read for m in metrics.values() if isinstance(m, WholeMetric)))
    totals, pieces = None, []
    for new, batch, labels, mask in batches(pred, targets, weights, batch_size):
        good, sums, columns = _measure(parts, reads, batch, labels, mask)
        if batch.member_weights is not None or not good:
            check_predictive(batch, new.stop - len(labels))
        sums = jax.tree.map(partial(np.asarray, dtype=np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        pieces.append(jax.tree.map(lambda x, new=new: np.asarray(x)[new.start - new.stop :], columns))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
    found = dict(zip(parts, totals or (), strict=True))
    return {name: found[part] for name, part in streaming.items()}, dict(zip(reads, joined, strict=True))


@partial(jax.jit, static_argnums=(0, 1))
def _measure(parts, reads, pred, targets, weights):
    sums = tuple(part(pred, targets, weights) for part in parts)
    return all_good(pred), sums, tuple(tuple(read(pred, targets)) for read in reads)


def _number(name: str, value) -> float:
    if np.ndim(value) or isinstance(value, tuple | dict):
        raise TypeError(
            f"`{name}` must be a metric of one number, got {type(value).__name__}. Read its sums with "
            "`bayescal.evaluate.measure`."
        )
    return float(value)


def _compute(metric: WholeMetric, columns, weights) -> float:
    # Not under one jit: functions sort numpy columns on the host, ten times faster than XLA does on a CPU.
    return float(metric.compute(*columns[metric.read], _float32(weights)))


def _influences(metric, pred, targets, weights, batch_size, sums, columns):
    if isinstance(metric, WholeMetric):
        given = _ones_or_float32(weights, len(targets))
        return np.asarray(_whole_gradient(metric.compute, columns[metric.read], given), np.float64)
    slope = jax.grad(metric.compute)(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sums))
    found = np.empty(len(targets))
    for new, batch, labels, mask in batches(pred, targets, weights, batch_size):
        found[new] = _row_slopes(metric.measure, batch, labels, mask, slope)[new.start - new.stop :]
    return found


@partial(jax.jit, static_argnums=0)
def _whole_gradient(compute, columns, weights):
    return jax.grad(lambda w: compute(*columns, w))(weights)


@partial(jax.jit, static_argnums=0)
def _row_slopes(measure, pred, targets, weights, slope):
    def along(w):
        return sum(map(jnp.vdot, jax.tree.leaves(slope), jax.tree.leaves(measure(pred, targets, w))))

    return jax.grad(along)(weights)


def row_sums(measure, pred: Predictive, targets, then=lambda sums: sums, weights=None):
    """`then` of every row's own sums: with leading axis (rows,). Sums are linear in the weights.

    Args:
        measure: of a streaming metric.
        pred: predictive with batch shape (rows,).
        targets: one per row.
        then: applied to one row's sums.
        weights: of each row; None = ones.
    """
    axes = jax.tree.map(lambda x: 1 if x.ndim > 1 and x.shape[1] == pred.batch_shape[0] else None, pred)

    def row(one, target, weight):
        one = jax.tree.map(lambda x, axis: x if axis is None else x[:, None], one, axes, is_leaf=lambda x: x is None)
        return then(measure(one, target[None], weight[None]))

    targets = jnp.asarray(targets)
    weights = jnp.ones(len(targets), jnp.float32) if weights is None else weights
    return jax.vmap(row, (axes, 0, 0))(pred, targets, weights)


def _on_host(x):
    """`x` as numpy where that is the device's own memory: slices of it are views, and nothing is copied."""
    on_cpu = isinstance(x, jax.Array) and {d.platform for d in x.devices()} == {"cpu"} and x.is_fully_addressable
    return np.asarray(x) if on_cpu else x


def _ones_or_float32(weights, rows: int) -> np.ndarray:
    return np.ones(rows, np.float32) if weights is None else np.asarray(weights, np.float32)


def _float32(weights):
    return None if weights is None else np.asarray(weights, np.float32)
