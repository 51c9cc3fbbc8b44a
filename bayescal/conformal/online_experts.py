"""Online conformal prediction without a step to choose: several ACI runs side by side, weighted by how they did."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.conformal.online import Online, check_step, miss
from bayescal.conformal.threshold import check_alpha
from bayescal.conformal.window import Window, slide, start_window, window_threshold
from bayescal.types import Array

GAMMAS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)  # of Gibbs and Candès 2022 (recalled)


class AgACIState(NamedTuple):
    """The experts and what Bernstein online aggregation remembers of them.

    alphas: miscoverage that each aims at next.
    window: the calibration set they share.
    regret: regularised, summed, half the unit of the scores.
    squares: sum of each expert's squared linearised regret.
    largest: greatest absolute linearised regret of any expert so far.
    """

    alphas: Float[Array, "experts"]
    window: Window
    regret: Float[Array, "experts"]
    squares: Float[Array, "experts"]
    largest: Float[Array, ""]


def agaci(
    *,
    alpha: float,
    window: int,
    bounds: tuple[float, float],
    gammas: Sequence[float] | Float[Array, "experts"] = GAMMAS,
) -> Online:
    """AgACI: q_t = sum_k w_k q_{k,t}, the thresholds of ACI runs averaged by Bernstein online aggregation (BOA).

    Each expert is `aci` with its own step and its own misses. With g the derivative of the pinball loss at q_t, the
    linearised regret is r_k = g (q_t - q_k), and w_k is proportional to eta_k exp(eta_k R_k), where R_k sums
    (r_k - eta_k r_k^2 + B [eta_k r_k > 1/2]) / 2 and eta_k = min(1 / B, sqrt(log K / sum r_k^2)). B is the largest |r|
    of any expert (the source's is each expert's own, which gives one without regret so far an infinite rate). There is
    no bound of the coverage for every stream; sets are never infinite.

    Args:
        alpha: miscoverage wanted, in (0, 1).
        window: latest scores that are kept.
        bounds: least and greatest score, (0, 1) for LAC: what stands in the average for an empty and an infinite set.
        gammas: steps of the experts, two or more.

    Raises:
        ValueError: for an alpha outside (0, 1), a step or window that is not positive, fewer than two steps, or bounds
            that are not ascending and finite.
    Source: Zaffran et al. 2022, algorithm 1; Wintenberger 2017 (both recalled).
    """
    wanted, steps = check_alpha(alpha), _steps(gammas)
    low, high = bounds
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"`bounds` must be finite and ascending, got {bounds}. For LAC they are (0.0, 1.0).")
    log_experts = math.log(len(gammas))

    def rates(state):
        range_ = jnp.where(state.largest > 0, state.largest, 1)
        fast = jnp.where(
            state.squares > 0, jnp.sqrt(log_experts / jnp.where(state.squares > 0, state.squares, 1)), jnp.inf
        )
        return jnp.minimum(1 / range_, fast)

    def weigh(state):
        eta, own = rates(state), window_threshold(state.window, state.alphas)
        weights = jax.nn.softmax(jnp.log(eta) + eta * state.regret)
        return own, jnp.clip(own, low, high), weights

    def init(past):
        zeros = jnp.zeros(len(gammas))
        return AgACIState(jnp.full(len(gammas), wanted), start_window(past, window), zeros, zeros, jnp.zeros(()))

    def threshold(state):
        _, finite, weights = weigh(state)
        return (weights * finite).sum(), (weights * state.alphas).sum()

    def update(state, score):
        own, finite, weights = weigh(state)
        pooled = (weights * finite).sum()
        regret = (wanted - miss(score, pooled)) * (pooled - finite)
        state = state._replace(
            alphas=state.alphas + steps * (wanted - miss(score, own)),
            window=slide(state.window, score),
            squares=state.squares + regret**2,
            largest=jnp.maximum(state.largest, abs(regret).max()),
        )
        eta = rates(state)
        bonus = state.largest * (eta * regret > 0.5)
        return state._replace(regret=state.regret + (regret - eta * regret**2 + bonus) / 2)

    return Online(init, threshold, update)


class DtACIState(NamedTuple):
    """alphas: miscoverage that each expert aims at next; weights: of the experts, one in sum; window: the scores."""

    alphas: Float[Array, "experts"]
    weights: Float[Array, "experts"]
    window: Window


def dtaci(
    *, alpha: float, window: int, horizon: int = 500, gammas: Sequence[float] | Float[Array, "experts"] = GAMMAS
) -> Online:
    """DtACI: alpha_t = sum_k p_k alpha_{k,t}, ACI runs averaged by exponential weights of their pinball losses.

    p_k becomes (1 - sigma) p_k exp(-eta l_k) / sum + sigma / K, with l_k = alpha (beta_t - alpha_k) -
    min(0, beta_t - alpha_k), beta_t = (1 + #{window >= score}) / (n + 1) the largest alpha whose set still covers,
    sigma = 1 / (2 I), and eta = sqrt(3 / I) sqrt((log(K I) + 2) / ((1 - alpha)^2 alpha^3 + alpha^2 (1 - alpha)^3)).
    The average is taken, not a random expert, so that the source's bound of the long-run coverage is not exact here.

    Args:
        alpha: miscoverage wanted, in (0, 1).
        window: latest scores that are kept.
        horizon: I, steps within which regret is to be small.
        gammas: steps of the experts, two or more.

    Raises:
        ValueError: for an alpha outside (0, 1), a step, window or horizon that is not positive, fewer than two steps.
    Source: Gibbs and Candès 2022, algorithm 2 and section 3 (recalled).
    """
    wanted, steps = check_alpha(alpha), _steps(gammas)
    check_step("horizon", horizon, usual="500")
    size = len(gammas)
    spread = (1 - wanted) ** 2 * wanted**3 + wanted**2 * (1 - wanted) ** 3
    eta = math.sqrt(3 / horizon * (math.log(size * horizon) + 2) / spread)
    share = 1 / (2 * horizon)

    def init(past):
        return DtACIState(jnp.full(size, wanted), jnp.full(size, 1 / size), start_window(past, window))

    def threshold(state):
        alpha = (state.weights * state.alphas).sum()  # no matrix product, which accelerators round to 10 bits
        return window_threshold(state.window, alpha), alpha

    def update(state, score):
        kept = state.window.ordered
        n = jnp.minimum(state.window.count, kept.shape[0])
        ahead = (1 + n - jnp.searchsorted(kept, score)) / (n + 1) - state.alphas
        loss = wanted * ahead - jnp.minimum(0, ahead)
        weights = jax.nn.softmax(jnp.log(state.weights) - eta * loss)
        missed = miss(score, window_threshold(state.window, state.alphas))
        return DtACIState(
            state.alphas + steps * (wanted - missed),
            (1 - share) * weights + share / size,
            slide(state.window, score),
        )

    return Online(init, threshold, update)


def _steps(gammas) -> jax.Array:
    if len(gammas) < 2:
        raise ValueError(
            f"`gammas` must be two steps or more, got {len(gammas)}. For one use `aci(alpha=..., gamma=..., window=...)`."
        )
    return jnp.stack(
        [jnp.asarray(check_step("gammas", gamma, usual="0.001 to 0.128"), jnp.float32) for gamma in gammas]
    )
