"""Spline calibration of the top label: the slope of a smooth curve through the cumulative calibration gap."""

import dataclasses
from numbers import Integral, Real
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import Calibrator, Classes, like, pooled_log_probs, rows_for_fit
from bayescal.predictive import undefined_where
from bayescal.predictive.categorical import exact_top
from bayescal.types import Array, pytree

POINTS, WEIGHTS = (x.astype(np.float32) / 2 for x in np.polynomial.legendre.leggauss(3))  # of a row's own stretch


@pytree
class Spline(Calibrator):
    """c + h'(t(c)) for the top label's confidence c, the rest of the row in proportion: `calibrator(pred) -> pred`.

    Not monotone, and of itself not within [0, 1]: it is cut to [clip, 1 - clip]. Where the new confidence is low, another
    class comes out on top. One member.

    Args:
        confidence: of the rows of the fit, ascending.
        level: t, the share of rows below each, ties shared, in [0, 1].
        heights: of h at equally spaced knots from t = 0 to 1.
        clip: closest that a confidence comes to 0 or 1.
    """

    accuracy_preserving: ClassVar[bool] = False

    confidence: Float[Array, "rows"]
    level: Float[Array, "rows"]
    heights: Float[Array, "knots"]
    clip: float = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Classes):
        """The pool, then the top label's confidence moved and the other classes rescaled.

        Others that have no mass at all (c = 1) share what is left evenly.
        """
        log_probs = pooled_log_probs(pred)
        classes = log_probs.shape[-1]
        top = jax.nn.one_hot(log_probs.argmax(-1), classes, dtype=bool)
        confidence = jnp.exp(log_probs.max(-1, keepdims=True))
        slope = _slope(self.heights, jnp.interp(confidence, self.confidence, self.level))
        moved = jnp.clip(confidence + slope, self.clip, 1 - self.clip)
        others = jnp.where(top, exact_top(log_probs)[1], -jnp.inf).max(-1, keepdims=True)  # log(1 - c)
        shares = jnp.where(jnp.isneginf(others), -jnp.log(classes - 1.0), log_probs - others)
        result = jnp.where(top, jnp.log(moved), jnp.log1p(-moved) + shares)
        return like(pred, undefined_where(jnp.isnan(log_probs).any(-1, keepdims=True), result))


def fit_spline(pred: Classes, targets, *, num_knots: int = 7, clip: float = 1e-3, weights=None) -> Spline:
    """Least-squares natural cubic spline h(t) of the cumulative gap int_0^t (correct - confidence), rows by confidence.

    t is the share of rows below; the gap's slope is what calibration lacks at t, and c + h'(t) mends it. The gap is linear
    between rows, and the squares are integrated over t: repeated rows and row weights are the same, and ties count as one.
    Linear algebra alone. The authors' splines end in parabolas, these in straight lines (natural).

    Args:
        pred: predictive over classes of the validation rows.
        targets: integer labels (rows,).
        num_knots: equally spaced in t, both ends counted; at least 3. More follow the rows more closely.
        clip: least confidence, and least doubt, that may come out; in (0, 1/2).
        weights: weight of each row; None = ones.

    Raises:
        ValueError: for settings out of range, and unusable rows.
    Source: Gupta et al. 2021 (recalled).
    """
    if not isinstance(num_knots, Integral) or num_knots < 3:
        raise ValueError(f"`num_knots` must be a whole number of at least 3, got {num_knots!r}. 7 is usual.")
    if not isinstance(clip, Real) or not 0 < clip < 0.5:
        raise ValueError(f"`clip` must lie in (0, 1/2), got {clip!r}. 1e-3 is usual.")
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    confidence, correct = jnp.exp(log_probs.max(-1)), log_probs.argmax(-1) == targets
    # Rows that weigh nothing join the top row's ties, where they change nothing.
    confidence = jnp.where(weights > 0, confidence, jnp.where(weights > 0, confidence, 0).max())
    known, level, heights = _fit(confidence, correct, weights, _curvature(int(num_knots)))
    return Spline(known, level, heights, float(clip))


@jax.jit
def _fit(confidence, correct, weights, curvature):
    order = jnp.argsort(confidence)
    confidence, gaps, weights = confidence[order], (correct - confidence)[order], (weights / weights.sum())[order]
    before = lambda x: jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(x)])
    below, gap = before(weights), before(weights * gaps)
    first, last = (jnp.searchsorted(confidence, confidence, side=side) for side in ("left", "right"))
    level = (below[first] + below[last]) / 2
    steepness = (gap[last] - gap[first]) / (below[last] - below[first])

    rows = len(weights)
    t = ((below[1:] + below[:-1]) / 2)[:, None] + weights[:, None] * POINTS
    target = gap[first][:, None] + steepness[:, None] * (t - below[first][:, None])
    share = (weights[:, None] * WEIGHTS).reshape(-1, 1)
    basis = _basis(t.reshape(3 * rows), curvature)
    square = jnp.matmul((share * basis).T, basis, precision="highest")
    right = jnp.matmul((share * basis).T, target.reshape(3 * rows, 1), precision="highest")
    return confidence, level, jnp.linalg.solve(square, right)[:, 0]


def _curvature(knots: int) -> np.ndarray:
    """Matrix (knots, knots) from heights at the knots of [0, 1] to the natural spline's second derivatives there."""
    h = 1 / (knots - 1)
    inner = np.arange(1, knots - 1)
    system, right = np.eye(knots), np.zeros((knots, knots))
    for offset, a, b in ((-1, h / 6, 1 / h), (0, 2 * h / 3, -2 / h), (1, h / 6, 1 / h)):
        system[inner, inner + offset], right[inner, inner + offset] = a, b
    return np.linalg.solve(system, right).astype(np.float32)


def _basis(t, curvature):
    """Value at t of the natural spline that is 1 at one knot and 0 at the others, (t, knots)."""
    knots = len(curvature)
    hat = jnp.maximum(0, 1 - abs(t[:, None] * (knots - 1) - np.arange(knots, dtype=np.float32)))
    return hat + jnp.matmul((hat**3 - hat) / (6 * (knots - 1) ** 2), curvature, precision="highest")


def _slope(heights, t):
    """Derivative at t of the natural spline with these heights."""
    knots = heights.shape[-1]
    bend = jnp.matmul(_curvature(knots), heights, precision="highest")
    cell = jnp.clip(jnp.floor(t * (knots - 1)), 0, knots - 2).astype(jnp.int32)
    right = t * (knots - 1) - cell
    left = 1 - right
    rise = (heights[cell + 1] - heights[cell]) * (knots - 1)
    return rise + ((3 * right**2 - 1) * bend[cell + 1] - (3 * left**2 - 1) * bend[cell]) / (6 * (knots - 1))
