"""Temperatures inside an ensemble, for the two orders other than pool-then-calibrate, which is `fit_temperature`."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Calibrator, Classes, concrete, rows_for_fit
from bayescal.calibrate.region_temperature import temperature_of_regions
from bayescal.predictive import Bernoulli, Categorical, Probabilities, normalised_weights
from bayescal.types import Array, pytree

EDGE = 9.0  # log temperatures are looked for within this of 0
CONVERGED = 1e-3  # nats: a larger derivative is no optimum


@pytree
class MemberTemperatures(Calibrator):
    """Members first, then the pool: p = sum_m w_m softmax(log p_m / T_m), each T_m fitted to its member alone.

    What comes out keeps its members, each calibrated; whatever is read of the pool (`log_probs`, `nll`, ...) is of the
    pool of calibrated members. That pool is under-confident, the more so the more its members differ: an average of
    calibrated forecasts is less sharp than the rows it is right on (it is over-dispersed). `fit_temperature` of the result
    then finds T < 1. Wherever the pool is what is used, calibrate the pool.

    Args:
        temperatures: T_m, above 1 = less confident than before; 1 for members that count for nothing.
        gradient: largest absolute derivative of a member's mean nll by its inverse temperature, nats; 0 = converged.
    """

    accuracy_preserving: ClassVar[bool] = False  # of each member it is; the pool's top class may change

    temperatures: Float[Array, "member"]
    gradient: Float[Array, ""]

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The members, each at its temperature. They must be those of the fit, in their order.

        Raises:
            TypeError: for a predictive that is not over classes.
            ValueError: for another number of members, such as a pool.
        """
        log_probs = _member_log_probs(pred, self.temperatures.shape[0])
        return _with_members(pred, log_probs / self.temperatures.reshape(-1, *[1] * (log_probs.ndim - 1)))


@pytree
class JointTemperature(Calibrator):
    """One temperature inside all members, then the pool: p = sum_m w_m softmax(log p_m / T), T fitted to the pool.

    What comes out keeps its members. T makes up for the spread of the members too, so that single members come out
    over-confident where the pool is right; and T belongs to the number of members.

    Args:
        temperature: above 1 = less confident than before.
        gradient: absolute derivative of the pool's mean nll by log T where the search ended, nats; 0 = converged.
        num_members: of the fit.
    """

    accuracy_preserving: ClassVar[bool] = False  # of each member it is; the pool's top class may change

    temperature: Float[Array, ""]
    gradient: Float[Array, ""]
    num_members: int = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The members, all at the temperature.

        Raises:
            TypeError: for a predictive that is not over classes.
            ValueError: for another number of members, such as a pool.
        """
        return _with_members(pred, _member_log_probs(pred, self.num_members) / self.temperature)


def fit_members_then_pool(
    pred: Classes, targets: Int[Array, "rows"], *, weights: Float[Array, "rows"] | None = None
) -> MemberTemperatures:
    """T_m = argmin_T of mean nll(softmax(log p_m / T)), for each member alone: calibrate, then pool.

    For ensembles whose members are also used one by one. For the pool use `fit_temperature`: see `MemberTemperatures`.

    Args:
        pred: predictive of the validation rows, with its members. Rows in which a member has weight 0 do not count for it.
        targets: integer labels (rows,).
        weights: weight of each row; None = ones.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for a pool; where a member has no finite best temperature (members are named); for unusable
            predictions, targets or weights.
    Source: Rahaman and Thiery 2021 (recalled), on why the pool of these is under-confident.
    """
    log_probs, log_weights, targets, weights = _member_rows(pred, targets, weights)
    counts = weights * (log_weights > -jnp.inf)
    temperatures, gradients = _one_by_one(log_probs, targets, counts)
    _require_finite(temperatures)
    return MemberTemperatures(temperatures, gradients.max())


def fit_joint_temperature(
    pred: Classes, targets: Int[Array, "rows"], *, weights: Float[Array, "rows"] | None = None
) -> JointTemperature:
    """T = argmin_T of mean -log sum_m w_m softmax(log p_m / T)_y: one temperature in all members, for the pool's nll.

    Not convex in T: of 37 temperatures from e^-9 to e^9 the best is taken, and the zero of the derivative beside it. With
    one member, or members that agree, it is the temperature of every order.

    Args:
        pred: predictive of the validation rows, with its members.
        targets: integer labels (rows,).
        weights: weight of each row; None = ones.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for a pool; where no finite temperature is best; for unusable predictions, targets or weights.
    Source: Rahaman and Thiery 2021, the dynamic variant (recalled).
    """
    temperature, gradient = _search(*_member_rows(pred, targets, weights))
    _require_finite(temperature[None])
    return JointTemperature(temperature, gradient, pred.num_members)


def _member_rows(pred, targets, weights):
    """Log-probabilities (member, rows, classes), log weights (member, rows), targets and row weights, checked."""
    _, targets, weights = rows_for_fit(pred, targets, weights)
    log_probs = _member_log_probs(pred, pred.num_members)
    member_weights = normalised_weights(pred.member_weights, pred.num_members, 1)
    member_weights = jnp.broadcast_to(member_weights, log_probs.shape[:-1])
    log_probs = jnp.where(((member_weights > 0) & (weights > 0))[..., None], log_probs, 0)
    return log_probs, jnp.log(member_weights), targets, weights


def _member_log_probs(pred, number: int) -> jax.Array:
    if not isinstance(pred, Categorical | Probabilities | Bernoulli):
        raise TypeError(
            f"`pred` must be a predictive over classes (Categorical, Probabilities or Bernoulli), got {type(pred).__name__}. "
            "For regression use `fit_variance_scaling`."
        )
    pooled = pred.num_members == 1 and getattr(pred, "normalised", False)
    if pred.num_members != number or (pooled and number == 1):
        got = "1, pooled already" if pooled else str(pred.num_members)
        raise ValueError(
            f"`pred` must have {'its' if number == 1 else f'the {number}'} members, got {got}. This order works inside the "
            "members: pass what `predict` returns, or calibrate the pool with `fit_temperature`."
        )
    return (pred.as_categorical() if isinstance(pred, Bernoulli) else pred).member_log_probs()


def _with_members(pred, logits) -> Categorical | Bernoulli:
    log_probs = jax.nn.log_softmax(logits)
    if isinstance(pred, Bernoulli):
        return Bernoulli(log_probs[..., 1] - log_probs[..., 0], pred.member_weights, normalised=True)
    return Categorical(log_probs, pred.member_weights, normalised=True)


@jax.jit
def _one_by_one(log_probs, targets, counts):
    one = lambda log_probs, counts: temperature_of_regions(log_probs, targets, counts, jnp.zeros_like(targets), 1)
    temperatures, gradients = jax.vmap(one)(log_probs, counts)
    alive = counts.sum(-1) > 0
    return jnp.where(alive, temperatures[:, 0], 1), jnp.where(alive, gradients, 0)


@jax.jit
def _search(log_probs, log_weights, targets, weights):
    """(temperature, derivative) of the best of a grid, mended by bisection; NaN where the best is at its edge."""
    shifted = log_probs - log_probs.max(-1, keepdims=True)
    lowest = jnp.finfo(shifted.dtype).min / (2 * math.exp(EDGE))
    shifted = jnp.where(shifted == -jnp.inf, lowest, shifted)
    shares = weights / weights.sum()

    def nll(log_temperature):
        scaled = jax.nn.log_softmax(shifted * jnp.exp(-log_temperature))
        chosen = jnp.take_along_axis(scaled, targets[None, :, None], -1)[..., 0]
        return -jnp.dot(shares, jax.nn.logsumexp(chosen + log_weights, axis=0), precision="highest")

    slope = jax.grad(nll)
    grid = jnp.linspace(-EDGE, EDGE, 37)
    start = grid[jax.lax.map(nll, grid).argmin()]

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_hot = slope(middle) > 0
        return jnp.where(too_hot, low, middle), jnp.where(too_hot, middle, high)

    low, high = jax.lax.fori_loop(0, 25, halve, (start - 0.5, start + 0.5))
    best = (low + high) / 2
    gradient = abs(slope(best))
    finite = (abs(best) < EDGE - 0.75) & (gradient < CONVERGED)
    return jnp.where(finite, jnp.exp(best), jnp.nan), gradient


def _require_finite(temperatures) -> None:
    if not concrete(temperatures):
        return
    lost = np.flatnonzero(~np.isfinite(np.asarray(temperatures)))
    if lost.size:
        whose = f"for members {lost.tolist()}" if len(temperatures) > 1 else "for the pool"
        raise ValueError(
            f"`targets` must leave a finite best temperature, got none {whose}: every label is the most probable class, or "
            "they are no better than chance, or have probability zero. Use more validation rows, or `clip_probabilities`."
        )
