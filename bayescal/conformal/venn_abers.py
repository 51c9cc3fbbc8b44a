"""Venn-Abers prediction: two probabilities of each class, one of which is calibrated, from isotonic regression."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Calibrator, Classes, like, pooled_log_probs, rows_for_fit
from bayescal.predictive import Bernoulli, Categorical, exact_top, undefined_where
from bayescal.types import Array, pytree


@pytree
class VennAbers(Calibrator):
    """Inductive Venn-Abers: p = p1 / (1 - p0 + p1) of each class against the rest, then divided by their sum.

    `calibrator(pred) -> Categorical` (`Bernoulli` for `Bernoulli`), one member. With two classes the sum is one, and the
    interval holds, in expectation over which end is right, a calibrated probability, whatever the scores; with more, that
    holds for every class against the rest, before the division.

    accuracy_preserving: no: with ties, or more than two classes, the order may change.
    Args:
        odds: sorted log-odds of each class on the calibration rows, nats, (classes, rows).
        low: p0 at each of them, after a 0 for odds below all, (classes, rows + 1).
        high: p1 at each of them, before a 1 for odds above all, (classes, rows + 1).
    """

    accuracy_preserving: ClassVar[bool] = False

    odds: Float[Array, "classes rows"]
    low: Float[Array, "classes intervals"]
    high: Float[Array, "classes intervals"]

    def interval(self, pred: Classes) -> tuple[Float[jax.Array, "*batch classes"], Float[jax.Array, "*batch classes"]]:
        """(p0, p1): isotonic regression's value at each row when the row itself joins it with label 0, and with label 1.

        p0 < p1; their distance is how little the calibration rows say there, about 1 / (rows nearby).

        Args:
            pred: of the new rows, from the same network.
        """
        odds = _odds(pooled_log_probs(pred, self.odds.shape[0]))
        return _look_up(self.odds, self.low, self.high, odds)

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The calibrated predictive: the interval's ends merged so that the log loss regrets neither."""
        low, high = self.interval(pred)
        return like(pred, _merged(low, high))


def fit_venn_abers(pred: Classes, targets: Int[Array, "rows"], *, weights=None) -> VennAbers:
    """p0 and p1 for every place among the calibration scores, exactly, in O(rows log rows) on the host in float64.

    Args:
        pred: predictive of the calibration rows, pooled first; only the order of its log-odds counts.
        targets: integer labels (rows,).
        weights: how many rows each row stands for, since a new row counts as one; None = ones. A row of weight 0 may hold
            anything.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable predictions, targets or weights, or more than one batch axis.
    Source: Vovk, Petej and Fedorova 2015, sections 2, 3 and 5 (recalled).
    """
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    odds = _odds(log_probs)
    rows, classes = odds.shape
    table = jax.ShapeDtypeStruct((classes, rows + 1), jnp.float32)
    shapes = (jax.ShapeDtypeStruct((classes, rows), jnp.float32), table, table)
    return VennAbers(*jax.pure_callback(_tables, shapes, odds, targets, weights, vmap_method="sequential"))


@jax.jit
def _odds(log_probs):
    """log p_k - log(1 - p_k) of every class, nats: tells apart probabilities that round to one."""
    own, rest = exact_top(log_probs)
    return own - rest


@jax.jit
def _look_up(known, low, high, odds):
    def of_class(known, low, high, at):
        below, above = jnp.searchsorted(known, at, side="right"), jnp.searchsorted(known, at, side="left")
        return low[below], high[above]

    low, high = jax.vmap(of_class, in_axes=(0, 0, 0, -1), out_axes=-1)(known, low, high, odds)
    lost = jnp.isnan(odds)
    return undefined_where(lost, low), undefined_where(lost, high)


@jax.jit
def _merged(low, high):
    return jax.nn.log_softmax(jnp.log(high) - jnp.log1p(high - low), axis=-1)


def _tables(odds: Any, targets: Any, weights: Any):
    odds, targets, weights = np.asarray(odds), np.asarray(targets), np.asarray(weights, np.float64)
    rows, classes = odds.shape
    known = np.empty((classes, rows), np.float32)
    low, high = np.empty((classes, rows + 1), np.float32), np.empty((classes, rows + 1), np.float32)
    for k in range(classes):
        order = np.argsort(odds[:, k], kind="stable")
        known[k] = odds[order, k]
        starts = np.flatnonzero(np.r_[True, known[k, 1:] != known[k, :-1]])  # tied scores share a value
        count = np.add.reduceat(weights[order], starts)
        ones = np.add.reduceat(weights[order] * (targets[order] == k), starts)
        upper = upper_values(count, ones)
        lower = 1 - upper_values(count[::-1], (count - ones)[::-1])[::-1]
        sizes = np.diff(np.r_[starts, rows])
        low[k], high[k] = np.r_[0, np.repeat(lower, sizes)], np.r_[np.repeat(upper, sizes), 1]
    lost = np.isnan(odds).any()
    return (known, np.where(lost, np.nan, low).astype(np.float32), np.where(lost, np.nan, high).astype(np.float32))


def upper_values(count: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """Isotonic regression's value at each group of rows when a row of label 1 joins it: max over a of min over b of

        (ones[a..b] + 1) / (count[a..b] + 1), a <= group <= b.

    That is the slope of the line under both the points before the group, moved by (-1, -1), and the points after it, of the
    cumulative sums. The slope rises from group to group, so both its ends only move right: O(groups).

    Args:
        count: weight of each group, in the order of its score.
        ones: weight of its rows of label 1.
    """
    x, y = np.r_[0.0, np.cumsum(count)].tolist(), np.r_[0.0, np.cumsum(ones)].tolist()
    groups = len(count)
    after = [groups] * (groups + 1)  # the next corner of the lower hull of the points from here on
    for i in range(groups - 1, -1, -1):
        j = i + 1
        while j < groups and (y[after[j]] - y[i]) * (x[j] - x[i]) <= (y[j] - y[i]) * (x[after[j]] - x[i]):
            j = after[j]
        after[i] = j

    values = np.empty(groups)
    left: list[int] = []  # corners of the lower hull of the points before, from `first` on
    first, right = 0, 0
    for i in range(groups):
        while len(left) - first >= 2:
            p, q = left[-2], left[-1]
            if (y[i] - y[p]) * (x[q] - x[p]) > (y[q] - y[p]) * (x[i] - x[p]):
                break
            left.pop()
        left.append(i)
        right = max(right, i + 1)
        while True:
            p = left[first]
            run, rise = x[right] - x[p] + 1, y[right] - y[p] + 1
            q = after[right]
            if right < groups and (y[q] - y[p] + 1) * run < rise * (x[q] - x[p] + 1):
                right = q
            elif first + 1 < len(left) and (y[left[first + 1]] - y[p]) * run < rise * (x[left[first + 1]] - x[p]):
                first += 1
            else:
                break
        values[i] = rise / run
    return values
