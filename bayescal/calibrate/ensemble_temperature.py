"""Ensemble temperature scaling: the tempered, the plain and the uniform distribution, mixed."""

from functools import partial
from typing import ClassVar, Literal

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
from bayescal.calibrate.objectives import sum_over_blocks
from bayescal.calibrate.temperature import fit_temperature
from bayescal.metrics import brier
from bayescal.predictive import Categorical, undefined_where
from bayescal.predictive.categorical import gather
from bayescal.predictive.mixture import log_pool
from bayescal.types import Array, pytree

STEPS = 35  # of Newton; the barrier reaches its least after 24
LEAST_BARRIER, RIDGE = 1e-8, 1e-6  # three times the first is what it may cost; the second is float32's rounding
LARGEST_GAP = 1e-4


@pytree
class EnsembleTemperature(Calibrator):
    """w1 softmax(log p / T) + w2 p + w3 / classes: `scaler(pred) -> pred`, one member.

    Args:
        temperature: T; above 1 = less confident.
        mixture: w, not negative, summing to 1.
        gap: most by which other weights could lower the mean objective at that T; 0 = converged.
    """

    accuracy_preserving: ClassVar[bool] = True

    temperature: Float[Array, ""]
    mixture: Float[Array, "3"]
    gap: Float[Array, ""]

    def __call__(self, pred: Classes):
        """The pool, then the mixture; the order of classes does not change."""
        log_probs = pooled_log_probs(pred)
        weights = self.mixture.reshape(3, *[1] * log_probs.ndim)
        return like(pred, log_pool(_components(log_probs, self.temperature), weights))


def fit_ensemble_temperature(
    pred: Classes, targets, *, objective: Literal["nll", "brier"] = "nll", weights=None
) -> EnsembleTemperature:
    """Temperature of least mean objective, then the mixture weights of least mean objective at that temperature.

    As the authors do, T first and alone. For both objectives the weights are then a convex problem, solved by Newton
    steps behind a barrier that falls; the result is never worse than the temperature alone on its rows. Where
    T is 1 the first two weights mean the same and only their sum is determined.

    Args:
        pred: predictive over classes of the validation rows.
        targets: integer labels (rows,).
        objective: "nll", or "brier" (the authors' code), for T and for the weights.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: for another objective; where no finite temperature is best; for unusable rows.
        RuntimeError: where the weights did not converge.
    Source: Zhang et al. 2020, Mix-n-Match (recalled).
    """
    if objective not in ("nll", "brier"):
        raise ValueError(
            f'`objective` must be "nll" or "brier", got {objective!r}. Only those make the weights convex.'
        )
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    if objective == "nll":
        require_possible(log_probs, targets, weights)
    metric = brier() if objective == "brier" else None
    pool = Categorical(log_probs[None], normalised=True)
    temperature = fit_temperature(pool, targets, objective=metric, weights=weights).temperature
    mixture, gap = _mix(log_probs, targets, weights, temperature, objective, STEPS)
    if concrete(gap) and not gap <= LARGEST_GAP:
        raise RuntimeError(
            f"`mixture` must be within {LARGEST_GAP} of the least objective, got weights that may be {float(gap):.3g} above "
            "it. Please report it with your rows; until then use `fit_temperature`."
        )
    return EnsembleTemperature(temperature, mixture, gap)


def _components(log_probs, temperature):
    """Log-probabilities (3, *batch, classes) of what is mixed; all NaN in a row that is."""
    uniform = jnp.full_like(log_probs, -np.log(log_probs.shape[-1]))
    tempered = jax.nn.log_softmax(log_probs / temperature)
    return jnp.stack([tempered, log_probs, undefined_where(jnp.isnan(log_probs), uniform)])


@partial(jax.jit, static_argnames=("objective", "steps"))
def _mix(log_probs, targets, weights, temperature, objective, steps):
    """Weights on the simplex, and the gap: mean objective minus its least value on the simplex is at most that."""
    mean = lambda function, *columns: jax.tree.map(
        lambda x: x / weights.sum(), sum_over_blocks(function, *columns, weights=weights)
    )
    if objective == "nll":
        chosen = jax.vmap(gather, (0, None))(_components(log_probs, temperature), targets).T
        shares = jnp.exp(chosen - chosen.max(-1, keepdims=True))  # nothing that counts underflows

        def value(mixture):
            return mean(lambda shares, weights: -(weights * jnp.log(shares @ mixture)).sum(), shares)

        def slopes(mixture):
            def sums(shares, weights):
                ratio = shares / (shares @ mixture)[:, None]
                return -(weights[:, None] * ratio).sum(0), (weights[:, None] * ratio).T @ ratio

            return mean(sums, shares)

    else:

        def sums(log_probs, targets, weights):
            probs = jnp.exp(_components(log_probs, temperature))
            right = jnp.einsum("crk,rk,r->c", probs, jax.nn.one_hot(targets, probs.shape[-1]), weights)
            return jnp.einsum("crk,drk,r->cd", probs, probs, weights, precision="highest"), right

        square, right = mean(sums, log_probs, targets)
        value = lambda mixture: 1 + mixture @ (square @ mixture) - 2 * right @ mixture
        slopes = lambda mixture: (2 * (square @ mixture - right), 2 * square)

    def step(mixture, barrier):
        """Newton's step for objective - barrier * sum log mixture, in units of each weight."""
        gradient, hessian = slopes(mixture)
        gradient = mixture * gradient - barrier
        hessian = mixture[:, None] * hessian * mixture + (barrier + RIDGE) * jnp.eye(3)  # T = 1: two are the same
        system = jnp.block([[hessian, mixture[:, None]], [mixture[None], jnp.zeros((1, 1))]])
        move = jnp.linalg.solve(system, jnp.append(-gradient, 0))[:3]
        longest = 1 / jnp.maximum(1, -move.min() / 0.95)
        tried = mixture * (1 + longest * 0.5 ** jnp.arange(12.0)[:, None] * move)
        tried = jnp.concatenate([tried / tried.sum(-1, keepdims=True), mixture[None]])
        values = jax.lax.map(lambda at: value(at) - barrier * jnp.log(at).sum(), tried)
        least = jnp.where(jnp.isnan(values), jnp.inf, values).min()
        # Of those that rounding does not tell apart the longest: near the end it is right, and values say no more.
        return tried[jnp.argmax(values <= least + 5e-7 * abs(least))], None

    barriers = jnp.maximum(0.1 * 0.5 ** jnp.arange(float(steps)), LEAST_BARRIER)
    mixture, _ = jax.lax.scan(step, jnp.full(3, 1 / 3), barriers)
    alone = jnp.array([1.0, 0.0, 0.0])
    gap, gap_alone = (at @ slopes(at)[0] - slopes(at)[0].min() for at in (mixture, alone))
    mixture = jnp.where(gap_alone <= gap, alone, mixture)  # the barrier keeps a little of everything
    lost = jnp.isnan(temperature)
    return undefined_where(lost, mixture), undefined_where(lost, jnp.minimum(gap, gap_alone))
