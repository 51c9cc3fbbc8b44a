"""Temperature scaling: one number, fitted on validation rows."""

from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    concrete,
    like,
    pooled_log_probs,
    require_possible,
    rows_for_fit,
)
from bayescal.calibrate.objectives import Found, check_objective, least_over_temperatures, sum_over_blocks
from bayescal.predictive import Bernoulli, Categorical, undefined_where
from bayescal.types import Array, Metric, WholeMetric, pytree

MOST_PASSES = 60
LARGEST_STEP = 3.0  # of log T, where the objective is flat
NEARLY, EXACT = 1e-3, 2e-7  # steps of log T: Newton's are squared from the first on; below the second is rounding
IMPOSSIBLE = 1e15  # gap of a class of probability zero: exp(-gap / T) is 0, and gap**2 still a number


@pytree
class Temperature(Calibrator):
    """Pooled log-probabilities divided by a temperature and normalised again: softmax(log p / T), one member.

    Args:
        temperature: above 1 = less confident than before.
        gradient: derivative of the mean objective by 1 / T where the search ended (nats for the nll); 0 = converged.
            Of another metric by differences, and not 0 where it has jumps.
        iterations: how often the rows were read.
    """

    accuracy_preserving: ClassVar[bool] = True

    temperature: Float[Array, ""]
    gradient: Float[Array, ""]
    iterations: Int[Array, ""]

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool, then the temperature.

        Args:
            pred: predictive over classes, any batch shape.

        Raises:
            TypeError: for another family.
        """
        return like(pred, jax.nn.log_softmax(pooled_log_probs(pred) / self.temperature))


def fit_temperature(
    pred: Classes, targets, *, objective: Metric | WholeMetric | None = None, weights=None
) -> Temperature:
    """argmin_T of mean nll(softmax(log p / T)), or of a metric of softmax(log p / T): the pool is scaled, not the members.

    The nll is convex in 1 / T, and least where the gap that the predictive expects between the top log-probability and
    that of the outcome, mean E_p[max z - z], equals the observed one. Newton's method in log T solves for the logarithm of
    their ratio, within what it has bracketed: about eight passes over the rows, and no bounds.

    Another metric may have several minima: 41 temperatures from 1e-3 to 1e3 are tried, equally spaced in log T, then 41
    between the neighbours of the best one, then the lowest point of a cubic through the five about it: the best to about
    1e-4 of itself, 1e-3 where the curve is sharp, 2 % where it has jumps. Of equal values the temperature nearest to 1
    wins. Brier score and soft-binned ECE are `bc.brier()` and `soft_binned_calibration_error()` of `bayescal.metrics`.
    AvUTS is `accuracy_versus_uncertainty(threshold=...)` or `soft_accuracy_versus_uncertainty_loss()`: the AvUC loss itself
    goes to 0 as T does, since wrong rows weigh 1 - confidence, and is refused.

    Args:
        pred: predictive of the validation rows, one batch axis.
        targets: integer labels (rows,).
        objective: metric to optimise, in its own direction; None = nll.
        weights: weight of each row (rows,); None = ones.

    Raises:
        TypeError: for a predictive that is not over classes, an objective that is no metric.
        ValueError: where no finite temperature is best: every label is already a top one (T -> 0), or the predictions
            are no better than chance (T -> infinity), or a metric is best at an end of the grid or never changes; for a
            metric without a direction; for unusable targets. Where values are traced such temperatures are NaN.
    Source: Guo et al. 2017; AvUTS: Krishnan and Tickoo 2020 (recalled).
    """
    if objective is not None:
        check_objective(objective)
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    if objective is None:
        require_possible(log_probs, targets, weights)
        found, infinite = _newton(log_probs, targets, weights)
        if concrete(found):
            _check_found(found, infinite)
    else:
        found, changes = least_over_temperatures(objective, log_probs, targets.astype(jnp.int32), weights)
        if concrete(found):
            _check_least(found, changes)
    return Temperature(*found)


def _check_found(found: Found, infinite) -> None:
    if jnp.isfinite(found.temperature):
        return
    end = "infinity (labels unrelated to predictions)" if infinite else "0 (every label is the most probable class)"
    raise ValueError(
        f"`targets` must leave a finite best temperature, got predictions for which it is {end}. "
        "Use more validation rows."
    )


def _check_least(found: Found, changes) -> None:
    if jnp.isfinite(found.temperature):
        return
    if not changes:
        raise ValueError(
            "`objective` must depend on the temperature, got one with the same value from 1e-3 to 1e3. Pass a metric of "
            "probabilities, such as `bc.brier()`."
        )
    raise ValueError(
        "`objective` must be best at a temperature between 1e-3 and 1e3, got one that is best at the end of them, or "
        "undefined. Use more validation rows, or fit the nll, which has no bounds."
    )


class _State(NamedTuple):
    inverse: jax.Array  # 1 / T
    step: jax.Array  # Newton's, of log(1 / T), from here
    previous: jax.Array
    low: jax.Array  # 1 / T that is too small, and too large
    high: jax.Array
    surplus: jax.Array
    passes: jax.Array


@jax.jit
def _newton(log_probs, targets, weights) -> tuple[Found, jax.Array]:
    """Also whether a temperature that is not found is infinite, rather than 0."""
    chosen = jnp.take_along_axis(log_probs, targets[:, None], -1)[:, 0]
    means = lambda function: [x / weights.sum() for x in sum_over_blocks(function, log_probs, chosen, weights=weights)]
    observed, above_chance = means(_at_chance)
    exists = (observed > 0) & (above_chance > 0)

    def at(inverse, previous, low, high, passes):
        surplus, spread = means(partial(_expected, inverse))
        step = jnp.log1p(surplus / observed) * (surplus + observed) / (inverse * spread)
        step = jnp.where(jnp.isfinite(step), step, LARGEST_STEP * jnp.sign(surplus))
        low, high = jnp.where(surplus > 0, inverse, low), jnp.where(surplus < 0, inverse, high)
        return _State(inverse, jnp.clip(step, -LARGEST_STEP, LARGEST_STEP), previous, low, high, surplus, passes + 1)

    def unfinished(state):
        size = abs(state.step)
        shrinking = (size > NEARLY) | (size < abs(state.previous) / 4)
        return exists & shrinking & (size > EXACT) & (state.passes < MOST_PASSES)

    def move(state):
        _, step, _, low, high, _, passes = state
        to = state.inverse * jnp.exp(step)
        to = jnp.where((low < to) & (to < high), to, jnp.sqrt(low) * jnp.sqrt(high))
        return at(to, step, low, high, passes)

    one = jnp.ones((), observed.dtype)
    start = at(one, jnp.inf * one, 0 * one, jnp.inf * one, jnp.int32(1))
    end = jax.lax.while_loop(unfinished, move, start)
    lost = ~(exists & (abs(end.step) <= NEARLY))
    found = Found(undefined_where(lost, 1 / end.inverse), undefined_where(lost, end.surplus), end.passes)
    return found, (above_chance <= 0) | (end.step < 0) & (observed > 0)


def _at_chance(log_probs, chosen, weights):
    """Sums of the observed gap, and of how far a uniform guess among the possible classes expects a larger one."""
    gaps, observed = _gaps(log_probs, chosen)
    possible = gaps < IMPOSSIBLE
    guess = jnp.where(possible, gaps, 0).sum(0) / possible.sum(0)
    return (weights * observed).sum(), (weights * (guess - observed)).sum()


def _expected(inverse, log_probs, chosen, weights):
    """Sums of how far the expected gap exceeds the observed one, the nll's derivative by 1 / T, and of its variance."""
    gaps, observed = _gaps(log_probs, chosen)
    mass = jnp.exp(-inverse * gaps)
    total = mass.sum(0)
    mean, square = (mass * gaps).sum(0) / total, (mass * gaps**2).sum(0) / total
    return (weights * (mean - observed)).sum(), (weights * (square - mean**2)).sum()


def _gaps(log_probs, chosen):
    """Gap of every class to the top one (classes, rows), and of the outcome: the class axis first is faster on a CPU."""
    by_class = log_probs.T
    top = by_class.max(0)
    return jnp.minimum(top - by_class, IMPOSSIBLE), top - chosen
