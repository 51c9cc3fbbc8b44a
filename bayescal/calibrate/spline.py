"""Spline calibration of the top label: the slope of a smooth curve through the cumulative calibration gap."""

import dataclasses
from functools import partial
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

POINTS, SHARES = (x.astype(np.float32) / 2 for x in np.polynomial.legendre.leggauss(3))  # exact to the fifth power


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
    Linear algebra alone, finite for any rows. The authors' splines end in parabolas, these in straight lines (natural).

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
    known, level, heights = _fit(confidence, correct, weights, int(num_knots))
    return Spline(known, level, heights, float(clip))


@partial(jax.jit, static_argnames="knots")
def _fit(confidence, correct, weights, knots):
    order = jnp.argsort(confidence)
    confidence, gaps, weights = confidence[order], (correct - confidence)[order], (weights / weights.sum())[order]
    before = lambda x: jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(x)])
    below, gap = before(weights), before(weights * gaps)
    below = below / below[-1]
    first, last = (jnp.searchsorted(confidence, confidence, side=side) for side in ("left", "right"))
    level = (below[first] + below[last]) / 2

    # Between these places gap and spline are polynomials, so that few points a piece integrate them exactly.
    places, heights = jnp.append(below[first], 1), jnp.append(gap[first], gap[-1])
    pieces = jnp.sort(jnp.concatenate([places, np.linspace(0, 1, knots, dtype=np.float32)]))
    length = (pieces[1:] - pieces[:-1])[:, None]
    t = ((pieces[1:] + pieces[:-1])[:, None] / 2 + length * POINTS).ravel()
    target = (length * SHARES).ravel() * jnp.interp(t, places, heights)
    right = jnp.matmul(target, _basis(t, knots), precision="highest")
    return confidence, level, jnp.matmul(_inverse_gram(knots), right, precision="highest")


def _inverse_gram(knots: int) -> np.ndarray:
    """Inverse of the integrals over [0, 1] of products of the basis, (knots, knots): no data make it singular."""
    points, shares = np.polynomial.legendre.leggauss(4)
    t = (np.arange(knots - 1)[:, None] + (1 + points) / 2).ravel() / (knots - 1)
    hat, bend = _parts(t, knots)
    basis = hat + bend @ _curvature(knots)
    shares = np.tile(shares / 2 / (knots - 1), knots - 1)
    return np.linalg.inv((basis.T * shares) @ basis).astype(np.float32)


def _curvature(knots: int) -> np.ndarray:
    """Matrix (knots, knots) from heights at the knots of [0, 1] to the natural spline's second derivatives there."""
    h = 1 / (knots - 1)
    inner = np.arange(1, knots - 1)
    system, right = np.eye(knots), np.zeros((knots, knots))
    for offset, a, b in ((-1, h / 6, 1 / h), (0, 2 * h / 3, -2 / h), (1, h / 6, 1 / h)):
        system[inner, inner + offset], right[inner, inner + offset] = a, b
    return np.linalg.solve(system, right)


def _parts(t, knots):
    """What the values at t of a spline take from its heights and from its second derivatives at the knots, (t, knots)."""
    hat = (1 - abs(t[:, None] * (knots - 1) - np.arange(knots, dtype=t.dtype))).clip(0)
    return hat, (hat**3 - hat) / (6 * (knots - 1) ** 2)


def _basis(t, knots):
    """Value at t of the natural spline that is 1 at one knot and 0 at the others, (t, knots)."""
    hat, bend = _parts(t, knots)
    return hat + jnp.matmul(bend, _curvature(knots).astype(np.float32), precision="highest")


def _slope(heights, t):
    """Derivative at t of the natural spline with these heights."""
    knots = heights.shape[-1]
    bend = jnp.matmul(_curvature(knots).astype(np.float32), heights, precision="highest")
    cell = jnp.clip(jnp.floor(t * (knots - 1)), 0, knots - 2).astype(jnp.int32)
    right = t * (knots - 1) - cell
    left = 1 - right
    rise = (heights[cell + 1] - heights[cell]) * (knots - 1)
    return rise + ((3 * right**2 - 1) * bend[cell + 1] - (3 * left**2 - 1) * bend[cell]) / (6 * (knots - 1))
