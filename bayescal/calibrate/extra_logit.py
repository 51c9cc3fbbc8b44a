"""Softmax with one more logit: mass for "none of these", spread over the classes or kept as a class."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    concrete,
    like,
    pooled_log_probs,
    require_possible,
    rows_for_fit,
)
from bayescal.calibrate.network import IMPOSSIBLE, best_temperature
from bayescal.calibrate.objectives import sum_over_blocks
from bayescal.predictive import Categorical, undefined_where
from bayescal.predictive.categorical import gather
from bayescal.types import Array, pytree

STEPS = 50
LARGEST_GRADIENT = 1e-3  # nats; searches on well-behaved rows end below 1e-5


@pytree
class ExtraLogit(Calibrator):
    """(exp(z_k) + exp(c) / classes) / (sum_j exp(z_j) + exp(c)), z = log p / T: `calibrator(pred) -> pred`, one member.

    No class falls below 1 / classes of the extra mass, so no single row can cost much. Log-probabilities of a pool carry
    no energy: the mass does not tell rows unlike the training data. For that see `add_extra_class`.

    Args:
        temperature: T; above 1 = less confident.
        extra: c, nats; -infinity = temperature scaling alone. At T = 1 the extra mass is sigmoid(c) in every row.
        gradient: largest absolute derivative of the mean nll by log T and c where the search ended, nats; 0 = converged.
    """

    accuracy_preserving: ClassVar[bool] = True

    temperature: Float[Array, ""]
    extra: Float[Array, ""]
    gradient: Float[Array, ""]

    def extra_mass(self, pred: Classes) -> Float[jax.Array, "*batch"]:
        """exp(c) / (sum_j exp(z_j) + exp(c)): what is spread evenly over the classes, in [0, 1]."""
        return jax.nn.sigmoid(self.extra - jax.nn.logsumexp(pooled_log_probs(pred) / self.temperature, axis=-1))

    def __call__(self, pred: Classes):
        """The pool, then T, c and the spread; the order of classes does not change."""
        return like(pred, _spread(pooled_log_probs(pred), self.temperature, self.extra))


def fit_extra_logit(pred: Classes, targets, *, weights=None) -> ExtraLogit:
    """argmin over T and c of the mean nll of a softmax with an extra logit c, whose mass is spread evenly.

    Were the mass left out instead, no label would ever speak for it, and c would go to -infinity. Not convex: damped
    Newton's method in (log T, c) from the best temperature and c 8, 4 and 1 below the usual log sum_j exp(z_j); the best end
    counts, or no extra mass, so that it is no worse on its rows than temperature scaling.

    Args:
        pred: predictive over classes of the validation rows.
        targets: integer labels (rows,).
        weights: weight of each row; None = ones.

    Raises:
        ValueError: where no finite temperature is best; for unusable rows.
        RuntimeError: where the search did not converge.
    Source: Miller 2023, "Attention is off by one" (recalled), for the softmax; the even spread is ours.
    """
    rows = rows_for_fit(pred, targets, weights)
    require_possible(*rows)
    temperature, extra, gradient = _fit(rows, best_temperature(rows), STEPS)
    if concrete(gradient) and not gradient <= LARGEST_GRADIENT:
        raise RuntimeError(
            f"`gradient` must end below {LARGEST_GRADIENT} nats, got {float(gradient):.3g} after {STEPS} steps. "
            "Please report it with your rows; until then use `fit_temperature`."
        )
    return ExtraLogit(temperature, extra, gradient)


def add_extra_class(pred: Categorical, extra: float | Float[Array, ""]) -> Categorical:
    """Every member's softmax over its logits and one more, `extra`: the last class is "none of these".

    P(none) = 1 / (1 + exp(-(extra + free energy))) of each member, so that after pooling
    `pred.pooled_mean()[..., -1]` is an out-of-distribution score in [0, 1]; higher = more unlike the training data. With
    extra = 0 the others are softmax-off-by-one. Targets stay what they were.

    Args:
        pred: a network's raw logits.
        extra: nats; -infinity = softmax.

    Raises:
        TypeError: for another family.
        ValueError: for normalised logits, which have no energy left.
    Source: Miller 2023 (recalled).
    """
    if not isinstance(pred, Categorical):
        raise TypeError(
            f"`pred` must be a Categorical, got {type(pred).__name__}. Probabilities have no logits to add one to."
        )
    if pred.normalised:
        raise ValueError(
            "`pred` must hold a network's raw logits, got normalised ones (a pooled or calibrated predictive). Add the class "
            "before pooling."
        )
    logits = jnp.asarray(pred.logits)
    more = jnp.broadcast_to(jnp.asarray(extra, logits.dtype), (*logits.shape[:-1], 1))
    return Categorical(jnp.concatenate([logits, more], axis=-1), pred.member_weights)


def _spread(log_probs, temperature, extra):
    scaled = log_probs / temperature
    whole = jnp.logaddexp(jax.nn.logsumexp(scaled, axis=-1, keepdims=True), extra)
    return jnp.logaddexp(scaled, extra - np.float32(np.log(log_probs.shape[-1]))) - whole


@partial(jax.jit, static_argnames="steps")
def _fit(rows, temperature, steps):
    log_probs, targets, weights = rows
    log_probs = jnp.where(jnp.isneginf(log_probs), IMPOSSIBLE, log_probs)

    def nll(point):
        def sums(log_probs, targets, weights):
            return -(weights * gather(_spread(log_probs, jnp.exp(point[0]), point[1]), targets)).sum()

        return sum_over_blocks(sums, log_probs, targets, weights=weights) / weights.sum()

    def step(point, _):
        values, vectors = jnp.linalg.eigh(jax.hessian(nll)(point))
        values = jnp.maximum(abs(values), 1e-6 * abs(values).max())
        move = -vectors @ ((vectors.T @ jax.grad(nll)(point)) / values)
        move = move / jnp.maximum(1, abs(move).max() / 3)
        tried = jnp.concatenate([point + 0.5 ** jnp.arange(12.0)[:, None] * move, point[None]])
        values = jax.lax.map(nll, tried)
        least = jnp.where(jnp.isnan(values), jnp.inf, values).min()
        # Of those that rounding does not tell apart the longest: near the end it is right, and values say no more.
        return tried[jnp.argmax(values <= least + 5e-7 * abs(least))], None

    def descend(extra):
        start = jnp.stack([jnp.log(temperature), extra])
        end, _ = jax.lax.scan(step, start, length=steps)
        return end, nll(end)

    level = jax.nn.logsumexp(log_probs / temperature, axis=-1)  # far from 0 where T is: c counts against it
    typical = (weights * jnp.where(weights > 0, level, 0)).sum() / weights.sum()
    ends, values = jax.lax.map(descend, typical + jnp.array([-8.0, -4.0, -1.0]))
    without = jnp.stack([jnp.log(temperature), jnp.where(weights > 0, level, jnp.inf).min() - 16])
    ends, values = jnp.concatenate([ends, without[None]]), jnp.append(values, nll(without))
    end = ends[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))]
    lost = jnp.isnan(temperature)
    return tuple(undefined_where(lost, x) for x in (jnp.exp(end[0]), end[1], abs(jax.grad(nll)(end)).max()))
