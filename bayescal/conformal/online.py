"""Online conformal prediction: a threshold that follows a stream of scores, with coverage whatever the stream does.

Scores come from any `Conformity`, sets go back through it:

    scores = score.measure(pred, targets, key)                        # (time,), in order of time
    run = run_online(aci(alpha=0.1, gamma=0.005, window=500), scores)
    sets = score.region(pred, run.thresholds[:, None], key)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.conformal.threshold import check_alpha
from bayescal.conformal.window import Window, slide, start_window, window_threshold
from bayescal.types import Array, PyTree


class Online(NamedTuple):
    """A way to follow a stream: what is believed before a score is seen, and what is learnt from it. Pure functions.

    init: scores of the past (rows,), perhaps none -> state.
    threshold: state -> (threshold, alpha) of the coming step; alpha NaN for what works on the threshold itself.
    update: (state, score that came) -> state.
    """

    init: Callable[[Any], PyTree]
    threshold: Callable[[PyTree], tuple[jax.Array, jax.Array]]
    update: Callable[[PyTree, Any], PyTree]


class OnlineRun(NamedTuple):
    """A stream after the fact. Each threshold was known before its score.

    thresholds: +infinity = the set is everything, -infinity = it is empty.
    alphas: miscoverage that the step aimed at; NaN for what works on the threshold itself.
    covered: 1 where score <= threshold, else 0; NaN from a NaN score on.
    state: after the last step: `run_online(..., state=run.state)` goes on from there, to the same bits.
    """

    thresholds: Float[Array, "time"]
    alphas: Float[Array, "time"]
    covered: Float[Array, "time"]
    state: PyTree


def run_online(
    method: Online, scores: Float[Array, "time"], *, past: Float[Array, "rows"] | None = None, state: PyTree = None
) -> OnlineRun:
    """All steps of a stream in one scan; streams and their states go through `jax.vmap`.

    Args:
        method: such as `aci(...)`.
        scores: nonconformity in order of time, finite; higher = stranger.
        past: scores from before the stream, for a start that is no guess; None = none.
        state: where an earlier run ended, in place of a start.

    Raises:
        ValueError: for scores that are not finite or not (time,), or both a past and a state.
    """
    if past is not None and state is not None:
        raise ValueError("`past` must be None with a `state`, which has its own, got both. Leave `past` out.")
    past = np.zeros(0, np.float32) if past is None else past
    for name, values in (("scores", scores), ("past", past)):
        _check_scores(name, values)
    state = method.init(jnp.asarray(past, jnp.float32)) if state is None else state
    return _scan(method, state, jnp.asarray(scores, jnp.float32))


@partial(jax.jit, static_argnums=0)
def _scan(method, state, scores):
    def step(state, score):
        threshold, alpha = method.threshold(state)
        return method.update(state, score), (threshold, alpha, 1 - miss(score, threshold))

    state, (thresholds, alphas, covered) = jax.lax.scan(step, state, scores)
    return OnlineRun(thresholds, alphas, covered, state)


def local_coverage(covered: Float[Array, "time"], *, width: int) -> Float[jax.Array, "windows"]:
    """Coverage of every stretch of `width` steps, in [0, 1]: what an average over the whole stream hides.

    Args:
        covered: of an `OnlineRun`.
        width: steps in a stretch.

    Raises:
        ValueError: for a width outside [1, time].
    """
    if not 1 <= width <= covered.shape[0]:
        raise ValueError(
            f"`width` must lie in [1, {covered.shape[0]}], the length of the stream, got {width}. Take a shorter stretch."
        )
    total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(covered)])
    return (total[width:] - total[:-width]) / width


def miss(score: Float[Array, ""], threshold: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """1 where the score exceeds the threshold, 0 where not, NaN where either is."""
    return jnp.where(jnp.isnan(score) | jnp.isnan(threshold), jnp.nan, (score > threshold).astype(jnp.float32))


class ACIState(NamedTuple):
    """alpha: miscoverage aimed at next, in [-gamma, 1 + gamma]; window: the calibration set."""

    alpha: Float[Array, ""]
    window: Window


def aci(*, alpha: float, gamma: float | Float[Array, ""], window: int) -> Online:
    """ACI: alpha_{t+1} = alpha_t + gamma (alpha - miss_t); the threshold is the window's at alpha_t.

    For every stream of T steps |mean coverage - (1 - alpha)| <= (max(alpha, 1 - alpha) + gamma) / (gamma T), since
    alpha_t <= 0 gives the infinite set and alpha_t >= 1 the empty one.

    Args:
        alpha: miscoverage wanted, in (0, 1); alpha_1 too.
        gamma: step; larger follows faster and swings more. 0.005 is usual.
        window: latest scores that are kept.

    Raises:
        ValueError: for an alpha outside (0, 1), a gamma or window that is not positive.
    Source: Gibbs and Candès 2021, equation 2 and proposition 4.1 (recalled).
    """
    wanted = check_alpha(alpha)
    gamma = check_step("gamma", gamma, usual="0.005")

    def init(past):
        return ACIState(jnp.asarray(wanted, jnp.float32), start_window(past, window))

    def threshold(state):
        return window_threshold(state.window, state.alpha), state.alpha

    def update(state, score):
        missed = miss(score, window_threshold(state.window, state.alpha))
        return ACIState(state.alpha + gamma * (wanted - missed), slide(state.window, score))

    return Online(init, threshold, update)


class SFOGDState(NamedTuple):
    """threshold: of the next step; squares: sum of the squared gradients so far."""

    threshold: Float[Array, ""]
    squares: Float[Array, ""]


def sf_ogd(*, alpha: float, step_size: float | Float[Array, ""], start: float = 0.0) -> Online:
    """SF-OGD: q_{t+1} = q_t - step_size g_t / sqrt(g_1^2 + ... + g_t^2), g_t = alpha - miss_t: pinball descent on q.

    Sets are never infinite, and no scores are kept. For every stream of T steps |mean coverage - (1 - alpha)| <=
    (max q - min q) sqrt(sum g^2) / (step_size T), by summation by parts; q stays within a step of the scores' range.

    Args:
        alpha: miscoverage wanted, in (0, 1).
        step_size: in the unit of the scores; their range / sqrt(3) is the source's, 0.577 for LAC.
        start: threshold of the first step.

    Raises:
        ValueError: for an alpha outside (0, 1), a step size that is not positive, or past scores.
    Source: Bhatnagar et al. 2023, algorithm 2 (recalled; the bound is derived here).
    """
    wanted = check_alpha(alpha)
    step_size = check_step("step_size", step_size, usual="the scores' range / sqrt(3)")

    def init(past):
        if past.shape[0]:
            raise ValueError(
                f"`past` must be empty for SF-OGD, which keeps no scores, got {past.shape[0]}. Pass their quantile as `start`."
            )
        return SFOGDState(jnp.asarray(start, jnp.float32), jnp.zeros(()))

    def threshold(state):
        return state.threshold, jnp.full_like(state.threshold, jnp.nan)

    def update(state, score):
        gradient = wanted - miss(score, state.threshold)
        squares = state.squares + gradient**2
        return SFOGDState(state.threshold - step_size * gradient / jnp.sqrt(squares), squares)

    return Online(init, threshold, update)


def check_step(name: str, value, *, usual: str):
    """`value`, a positive number that `jax.vmap` may vary.

    Raises:
        ValueError: unless it is positive and finite.
    """
    if isinstance(value, Tracer):
        return value
    number = np.asarray(value)
    if number.ndim or number.dtype.kind not in "iuf" or not 0 < number < np.inf:
        raise ValueError(f"`{name}` must be a positive finite number, got {value!r}. Usual is {usual}.")
    return value


def _check_scores(name, values) -> None:
    if jnp.ndim(values) != 1:
        raise ValueError(
            f"`{name}` must have shape (time,), got {jnp.shape(values)}. `jax.vmap` over streams, or take one dimension."
        )
    if not isinstance(values, Tracer) and not np.isfinite(np.asarray(values)).all():
        bad = int((~np.isfinite(np.asarray(values))).sum())
        raise ValueError(
            f"`{name}` must be finite, got {bad} of {len(values)} that are not. An infinite set cannot cover an unknown "
            "score: repair or drop those steps."
        )
