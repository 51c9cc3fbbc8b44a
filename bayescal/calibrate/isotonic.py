"""Isotonic regression: the non-decreasing map that fits best, one per event or one for all classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    concrete,
    like,
    pooled_log_probs,
    require_every_class,
    rows_for_fit,
)
from bayescal.calibrate.one_vs_rest import check_mixture, distribution, events, outcomes
from bayescal.types import Array, pytree


@pytree
class Isotonic(Calibrator):
    """A non-decreasing map of the probability of class 1, or of each class against the rest, normalised again.

    Args:
        knots: probabilities before, non-decreasing; the last is repeated where a map has fewer.
        values: probabilities after, non-decreasing.
        mixture: weight of the original probabilities.
    """

    accuracy_preserving = False

    knots: Float[Array, "maps knots"]
    values: Float[Array, "maps knots"]
    mixture: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __call__(self, pred: Classes) -> Classes:
        """Linear between knots, constant outside them; a row that is mapped to zeros alone stays as it was.

        Raises:
            ValueError: for another number of classes than in the fit.
        """
        log_probs = pooled_log_probs(pred)
        given = events(log_probs, len(self.knots))
        rates = jax.vmap(jnp.interp, in_axes=(-1, 0, 0), out_axes=-1)(given, self.knots, self.values)
        return like(pred, distribution(rates, log_probs, self.mixture))


@pytree
class SharedIsotonic(Calibrator):
    """One non-decreasing map of the probability of every class, normalised again: their order stays, ties aside.

    Args:
        knots: probabilities before, non-decreasing; the last is repeated at the end.
        values: probabilities after, non-decreasing.
        mixture: weight of the original probabilities; above 0 there are no new ties.
    """

    accuracy_preserving = True

    knots: Float[Array, "knots"]
    values: Float[Array, "knots"]
    mixture: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __call__(self, pred: Classes) -> Classes:
        """Linear between knots, constant outside them; a row that is mapped to zeros alone stays as it was."""
        log_probs = pooled_log_probs(pred)
        values = jnp.interp(jnp.exp(log_probs), self.knots, self.values)
        return like(pred, distribution(values, log_probs, self.mixture))


def fit_isotonic(
    pred: Classes, targets: Int[Array, "rows"], *, mixture: float = 0.0, weights: Float[Array, "rows"] | None = None
) -> Isotonic:
    """min over non-decreasing f of sum w (f(p) - y)^2: for two classes p = P(class 1), for more each class against the rest.

    Mapped probabilities of several classes are divided by their sum. Exactly 0 and 1 are common, so that the nll of other
    rows is often infinite: `mixture` = 1e-9 makes it finite, and more than about 1,000 rows a class are needed. Pools
    adjacent violators on the host, in float64; equal probabilities are averaged first.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        mixture: weight of the original probabilities in the result, in [0, 1); 0 = the isotonic map itself.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows, a class without a row, or a mixture outside [0, 1).
    Source: Zadrozny and Elkan 2002 (recalled).
    """
    check_mixture(mixture)
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    classes = log_probs.shape[-1]
    require_every_class(targets, weights, classes)
    return Isotonic(*_fit(events(log_probs).T, outcomes(targets, classes).T, weights), mixture)


def fit_shared_isotonic(
    pred: Classes, targets: Int[Array, "rows"], *, mixture: float = 0.0, weights: Float[Array, "rows"] | None = None
) -> SharedIsotonic:
    """min over one non-decreasing f of sum over rows and classes of w (f(p_k) - 1[y = k])^2; f(p) is divided by its sum.

    The order of classes stays but for ties, which a `mixture` above 0 breaks. Needs far fewer rows than a map per class,
    and mends what is wrong in the same way for all classes. Host, float64, as in `fit_isotonic`.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        mixture: weight of the original probabilities in the result, in [0, 1); 0 = the isotonic map itself.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows, or a mixture outside [0, 1).
    Source: Zhang, Kailkhura and Han 2020 (Mix-n-Match; IRM; recalled, there without the division).
    """
    check_mixture(mixture)
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    classes = log_probs.shape[-1]
    pairs = jnp.exp(log_probs).reshape(1, -1), jax.nn.one_hot(targets, classes).reshape(1, -1)
    knots, values = _fit(*pairs, jnp.repeat(weights, classes))
    return SharedIsotonic(knots[0], values[0], mixture)


def _fit(probability, outcome, weights):
    """Knots and values (maps, knots) of (maps, rows); as many as the longest map needs where that can be known."""
    knots, values = _regress(probability, outcome, weights)
    if concrete(knots):
        last = np.asarray(knots)
        needed = 1 + int((last < last[:, -1:]).sum(1).max())
        knots, values = knots[:, :needed], values[:, :needed]
    return knots, values


@jax.jit
def _regress(probability, outcome, weights):
    shape = jax.ShapeDtypeStruct(probability.shape, probability.dtype)
    return jax.pure_callback(_all_knots, (shape, shape), probability, outcome, weights, vmap_method="sequential")


def _all_knots(probability, outcome, weights):
    probability, outcome, weights = (np.asarray(x) for x in (probability, outcome, weights))
    found = [_knots(p, y, weights) for p, y in zip(probability, outcome, strict=True)]
    return tuple(np.stack(columns).astype(probability.dtype) for columns in zip(*found, strict=True))


def _knots(probability, outcome, weights):
    """Ends of the blocks of the isotonic fit, as many as there are rows, the last one repeated; NaN where undefined."""
    from scipy.optimize import isotonic_regression  # slow to import

    p, y, w = (x[weights > 0].astype(np.float64) for x in (probability, outcome, weights))
    if not p.size or np.isnan(p).any():
        return np.full((2, len(probability)), np.nan)
    knots, group = np.unique(p, return_inverse=True)
    weight = np.bincount(group, w)
    values = np.clip(isotonic_regression(np.bincount(group, w * y) / weight, weights=weight).x, 0, 1)
    steps = np.diff(values) != 0
    ends = np.r_[True, steps] | np.r_[steps, True]
    ends[-1] = True
    return tuple(np.pad(x[ends], (0, len(probability) - ends.sum()), mode="edge") for x in (knots, values))
