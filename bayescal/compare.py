"""Bootstrap intervals, and the difference of one metric between two predictions of the same rows."""

import math
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bayescal.evaluate import Z95, batches, evaluate, read_columns, row_influences, row_sums, standard_error
from bayescal.predictive import Predictive
from bayescal.types import Estimate, Key, Metric, WholeMetric

FEWEST = 40  # replicates, for the percentiles 2.5 and 97.5 to be between some of them
BLOCK_ROWS = 2**12  # rows resampled in one device call: their weights follow from the key and the block
BLOCK_NUMBERS = 2**22  # weights held at once where a metric needs all rows


class Comparison(NamedTuple):
    """How one metric differs between two predictions of the same rows.

    difference: metric(a) - metric(b), with its 95 % interval. Which sign is good: `Metric.better`.
    p_value: two-sided, of no difference; NaN where it is not known (one row, an infinite metric).
    a, b: the metric of each, with its own interval, which says little about the difference.
    """

    difference: Estimate
    p_value: float
    a: Estimate
    b: Estimate


def compare(
    metric: Metric | WholeMetric,
    pred_a: Predictive,
    pred_b: Predictive,
    targets,
    *,
    weights=None,
    groups=None,
    key: Key | None = None,
    num_replicates: int | None = None,
    batch_size: int | None = None,
) -> Comparison:
    """metric(a) - metric(b) on the same rows, with 95 % interval and p-value, row by row ("paired").

    What both find hard cancels, so that the interval is mostly far shorter than those of a and b suggest.

    Args:
        metric: a regular one.
        pred_a, pred_b: predictives of the same rows, of any families.
        targets: one per row.
        weights: of each row; None = ones.
        groups: label of each row; rows of one group are not independent, groups are.
        key: None = normal interval and p-value from the difference of the rows' influences; a key = percentiles of the
            paired bootstrap, where both are resampled alike, and p = twice the smaller tail beyond zero.
        num_replicates: of the bootstrap; None = 1000.
        batch_size: as in `evaluate`.

    Raises:
        ValueError: for an irregular metric, replicates without a key or fewer than 40, and as `evaluate`.
    Source: Jaeckel 1972 (influence); Efron 1979 (bootstrap).
    """
    _check_regular({"metric": metric}, resampling=key is not None)
    if key is None and num_replicates is not None:
        raise ValueError(
            f"`num_replicates` is of the bootstrap, which needs a key, got {num_replicates} and key None. "
            "Pass `key=jax.random.key(0)`, or leave both out for the interval by influence."
        )
    same = {"weights": weights, "groups": groups, "batch_size": batch_size}
    a, b = (evaluate(pred, targets, {"it": metric}, **same)["it"] for pred in (pred_a, pred_b))
    if key is None:
        moved = [row_influences(metric, p, targets, weights=weights, batch_size=batch_size) for p in (pred_a, pred_b)]
        value = a.value - b.value
        error = standard_error(moved[0] - moved[1], weights, groups) if (a.n or 0) > 1 else math.nan
        low, high, p_value, how = value - Z95 * error, value + Z95 * error, _normal_p(value, error, a.n), "influence"
    else:
        number = 1000 if num_replicates is None else num_replicates
        draws = [
            _replicates(pred, targets, {"it": metric}, key, number, weights, groups, batch_size)["it"]
            for pred in (pred_a, pred_b)
        ]
        moved = draws[0] - draws[1]
        value, (low, high) = a.value - b.value, np.quantile(moved, [0.025, 0.975])
        tail = min((moved <= 0).sum(), (moved >= 0).sum())
        p_value = min(2 * (float(tail) + 1) / (number + 1), 1.0) if np.isfinite(moved).all() else math.nan
        how = f"bootstrap, {number} replicates"
    words = f"{metric.convention}; a - b, paired {how}{'' if groups is None else ' of groups'}"
    return Comparison(_estimate(value, low, high, a.n, words), p_value, a, b)


def bootstrap_intervals(
    pred: Predictive,
    targets,
    metrics: Mapping[str, Metric | WholeMetric],
    key: Key,
    *,
    num_replicates: int = 1000,
    weights=None,
    groups=None,
    batch_size: int | None = None,
) -> dict[str, Estimate]:
    """The value of every metric with its 95 % percentile interval over weighted resamples of the rows.

    Each replicate gives every row an independent Poisson(1) weight, which is resampling rows with replacement but for
    the total, and needs no row order. Sums are linear in the weights: all replicates of streaming metrics are one
    matrix product. The weights multiply the rows' own and are not repetition: what depends on effective numbers of rows
    (`squared_calibration_error`) stays unbiased. `evaluate` gives intervals without resampling; this is for small data
    and skewed metrics.

    Args:
        pred: predictive with batch shape (rows,).
        targets: one per row.
        metrics: name -> metric, each regular.
        key: of the weights; the same key gives the same replicates whatever the batch size.
        num_replicates: at least 40, for percentiles 2.5 and 97.5 to mean anything.
        weights: of each row; None = ones. They multiply the resampling weights.
        groups: label of each row; whole groups are resampled (clustered bootstrap).
        batch_size: as in `evaluate`.

    Returns:
        name -> Estimate; no interval where a replicate's value is undefined (a class absent) or infinite.

    Raises:
        ValueError: for an irregular metric (ECE and its kin), too few replicates, a single group, and as `evaluate`.
    Source: Efron 1979; Rubin 1981 and Hanley and MacGibbon 2006 for Poisson weights (recalled).
    """
    _check_regular(metrics, resampling=True)
    values = evaluate(pred, targets, metrics, weights=weights, batch_size=batch_size)
    draws = _replicates(pred, targets, metrics, key, num_replicates, weights, groups, batch_size)
    result = {}
    for name, estimate in values.items():
        undefined = int((~np.isfinite(draws[name])).sum())
        words = f"{estimate.convention}; percentile bootstrap, {num_replicates} replicates"
        words += "" if groups is None else " of groups"
        words += f", {undefined} undefined" if undefined else ""
        low, high = (math.nan, math.nan) if undefined else np.quantile(draws[name], [0.025, 0.975])
        result[name] = _estimate(estimate.value, low, high, estimate.n, words)
    return result


def _replicates(pred, targets, metrics, key, number, weights, groups, batch_size) -> dict[str, np.ndarray]:
    """name -> the metric's value in each replicate, float64 (replicates,); the same for the same key and rows."""
    if not isinstance(number, int) or number < FEWEST:
        raise ValueError(
            f"`num_replicates` must be a whole number of at least {FEWEST}, got {number!r}. 1000 is usual for 95 % intervals."
        )
    place = None
    if groups is not None:
        labels, place = np.unique(np.asarray(groups), return_inverse=True)
        if place.shape != (len(targets),) or len(labels) < 2:
            raise ValueError(
                f"`groups` must be one label per row, ({len(targets)},), of at least two groups, got shape {place.shape} "
                f"with {len(labels)}. Leave them out where rows are independent."
            )
    streaming = {name: m for name, m in metrics.items() if not isinstance(m, WholeMetric)}
    whole = {name: m for name, m in metrics.items() if isinstance(m, WholeMetric)}
    values = _of_sums(pred, targets, streaming, key, number, weights, place) if streaming else {}
    same = {"weights": weights, "batch_size": batch_size}
    read = {kind: read_columns(pred, targets, kind, **same) for kind in {m.read for m in whole.values()}}
    for name, metric in whole.items():
        values[name] = _of_columns(metric.compute, read[metric.read], key, number, weights, place)
    return values


def _of_sums(pred, targets, metrics, key, number, weights, place):
    measures = tuple(m.measure for m in metrics.values())
    totals, grouped = 0.0, np.zeros(0)
    for new, batch, labels, mask in batches(pred, targets, weights, BLOCK_ROWS):
        if place is None:
            block = _resampled_sums(measures, batch, labels, mask, key, np.uint32(new.start), number)
            totals += np.asarray(block, np.float64)
        else:
            sums = np.asarray(_sums_of_rows(measures, batch, labels, mask), np.float64)
            grouped = grouped if grouped.size else np.zeros((place.max() + 1, sums.shape[1]))
            np.add.at(grouped, place[new], sums[new.start - new.stop :])
    if place is not None:
        for first in range(0, len(grouped), BLOCK_ROWS):
            part = grouped[first : first + BLOCK_ROWS]
            drawn = _poisson(key, np.uint32(first), (number, len(part)))
            totals += _weighted(np.asarray(drawn, np.float64), part, np.matmul)
    leaves, tree = jax.tree.flatten(
        jax.eval_shape(lambda *rows: tuple(m(*rows) for m in measures), batch, labels, mask)
    )
    parts = np.split(totals, np.cumsum([leaf.size for leaf in leaves])[:-1], axis=1)
    drawn = [part.reshape(number, *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    drawn = dict(zip(metrics, jax.tree.unflatten(tree, drawn), strict=True))

    def values(name):
        with np.errstate(invalid="ignore", divide="ignore"):  # a replicate may be without rows that the value needs
            return [float(metrics[name].compute(jax.tree.map(itemgetter(r), drawn[name]))) for r in range(number)]

    return {name: np.array(values(name)) for name in metrics}


def _of_columns(compute, read, key, number, weights, place):
    rows = len(read[0])
    given = np.ones(rows, np.float32) if weights is None else np.asarray(weights, np.float32)
    size = min(number, max(1, BLOCK_NUMBERS // rows))
    groups = rows if place is None else int(place.max()) + 1
    parts = [
        _resampled_columns(compute, read, given, place, key, np.uint32(start), (size, groups))
        for start in range(0, number, size)
    ]
    return np.concatenate(parts)[:number].astype(np.float64)


@partial(jax.jit, static_argnums=0)
def _sums_of_rows(measures, pred, targets, weights):
    """All metrics' sums of each row, one after another: those linear in the weights, then those quadratic in them."""

    def together(*one):
        return tuple(measure(*one) for measure in measures)

    once, twice = (
        row_sums(together, pred, targets, lambda sums: ravel_pytree(sums)[0], weights=k * weights) for k in (1, 2)
    )
    square = twice / 2 - once  # exact: what is linear doubles, a sum of squared weights quadruples
    return jnp.concatenate([once - square, square], 1)


def _weighted(drawn, sums, matmul):
    linear, square = (sums[:, : sums.shape[1] // 2], sums[:, sums.shape[1] // 2 :])
    return matmul(drawn, linear) + matmul(drawn**2, square)


@partial(jax.jit, static_argnums=(0, 6))
def _resampled_sums(measures, pred, targets, weights, key, block, number):
    sums = _sums_of_rows(measures, pred, targets, weights)
    return _weighted(_poisson(key, block, (number, len(sums))), sums, partial(jnp.matmul, precision="highest"))


@partial(jax.jit, static_argnums=(0, 6))
def _resampled_columns(compute, read, given, place, key, block, shape):
    drawn = _poisson(key, block, shape)
    drawn = drawn if place is None else drawn[:, place]
    return jax.vmap(lambda w: compute(*read, w))(drawn * given)


@partial(jax.jit, static_argnums=2)
def _poisson(key, block, shape):
    """Poisson(1) weights, float32, from 16 random bits each: right to 2e-5 in every probability, 8 at most."""
    bits = jax.random.bits(jax.random.fold_in(key, block), shape, jnp.uint16)
    at_least = 1 - np.cumsum([math.exp(-1) / math.factorial(k) for k in range(8)])
    return sum((bits < np.uint16(round(2**16 * p))).astype(jnp.float32) for p in at_least)


def _check_regular(metrics, resampling: bool) -> None:
    order = [name for name, m in metrics.items() if isinstance(m, WholeMetric) and m.order_statistic]
    if order and not resampling:
        raise ValueError(
            f"`metric` must be smooth in the rows' weights to be compared without resampling, got {order}, an order statistic. "
            "Pass `key=jax.random.key(0)` for the paired bootstrap."
        )
    irregular = [name for name, metric in metrics.items() if not metric.regular and name not in order]
    if irregular:
        raise ValueError(
            f"`metrics` must be regular to be resampled or compared, got {irregular}. Noise adds to a norm of gaps, and "
            "resampling adds it again: percentile and BCa intervals of an ECE cover the truth in down to 0 % of data sets. "
            "Take the interval of `evaluate`, which inverts a test; compare by `squared_calibration_error`, which is unbiased."
        )


def _normal_p(value, error, n) -> float:
    if n < 2 or not math.isfinite(value) or not math.isfinite(error):
        return math.nan
    if error == 0:
        return float(value == 0)
    return math.erfc(abs(value) / error / math.sqrt(2))


def _estimate(value, low, high, n, convention) -> Estimate:
    known = math.isfinite(low) and math.isfinite(high)
    return Estimate(value, float(low) if known else None, float(high) if known else None, n, convention)
