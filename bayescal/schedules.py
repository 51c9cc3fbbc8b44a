"""Learning-rate schedules whose numbers may differ between members: `step -> learning rate`, as optax takes them.

optax's own branch in Python on their numbers of steps (and a few on more), which a traced setting does not survive.
What optax can trace is not repeated: `constant_schedule`, `join_schedules`, and any learning rate that multiplies a
schedule, `lambda step: peak * shape(step)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Num

from bayescal.types import Array

Scalar = float | Num[Array, ""]
Schedule = Callable[[Scalar], jax.Array]


def warmup_cosine(peak: Scalar, *, warmup_steps: Scalar, total_steps: Scalar, end: Scalar = 0.0) -> Schedule:
    """peak * step / warmup_steps, then end + (peak - end) * (1 + cos(pi * progress)) / 2; `end` after `total_steps`.

    With `progress` = (step - warmup_steps) / (total_steps - warmup_steps). Equals
    `optax.warmup_cosine_decay_schedule(0, peak, warmup_steps, total_steps, end)`; `warmup_steps=0` is its
    `cosine_decay_schedule`. Every number may be traced, that is a member's own setting in `ensemble`:

        schedule = lambda own: bc.schedules.warmup_cosine(own["peak"], warmup_steps=100, total_steps=1000)
        method = bc.ensemble(
            lambda own: bc.map_estimate(model, bc.Categorical, optax.adam(schedule(own))),
            settings={"peak": jnp.array([1e-3, 3e-3, 1e-2])},
        )

    Args:
        peak: learning rate at the end of the warm-up, positive.
        warmup_steps: updates (not epochs) from 0 to `peak`, 0 or more.
        total_steps: updates from the first to the last, warm-up included; more than `warmup_steps`.
        end: learning rate after the last, 0 or more.

    Returns:
        Function from the number of updates made to the learning rate, float32. A traced number cannot be checked:
        where one breaks the rules above the learning rate is NaN, so that `fit` reports the member as diverged.

    Raises:
        ValueError: for numbers outside these ranges.
    Source: Loshchilov and Hutter 2017 (SGDR); Goyal et al. 2017 (warm-up).
    """
    return _warmup(lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2, peak, warmup_steps, total_steps, end)


def warmup_linear(peak: Scalar, *, warmup_steps: Scalar, total_steps: Scalar, end: Scalar = 0.0) -> Schedule:
    """peak * step / warmup_steps, then peak + (end - peak) * progress; `end` after `total_steps`.

    As `warmup_cosine`, with a straight decay. `warmup_steps=0` is `optax.linear_schedule`, `end=peak` is
    `optax.warmup_constant_schedule`.

    Args:
        peak: learning rate at the end of the warm-up, positive.
        warmup_steps: updates (not epochs) from 0 to `peak`, 0 or more.
        total_steps: updates from the first to the last, warm-up included; more than `warmup_steps`.
        end: learning rate after the last, 0 or more.

    Returns:
        Function from the number of updates made to the learning rate, float32; NaN as in `warmup_cosine`.

    Raises:
        ValueError: for numbers outside these ranges.
    """
    return _warmup(lambda progress: 1 - progress, peak, warmup_steps, total_steps, end)


def cyclical_cosine(peak: Scalar, *, cycle_length: Scalar) -> Schedule:
    """peak / 2 * (1 + cos(pi * (step mod cycle_length) / cycle_length)): restarts at `peak` every `cycle_length` updates.

    It never reaches 0: a cycle's last step is peak * sin^2(pi / (2 * cycle_length)).

    Args:
        peak: learning rate, or step size, at the beginning of each cycle, positive.
        cycle_length: updates (not epochs) in a cycle, 1 or more.

    Returns:
        Function from the number of updates made to the learning rate, float32; NaN as in `warmup_cosine`.

    Raises:
        ValueError: for numbers outside these ranges.
    Source: Loshchilov and Hutter 2017 (warm restarts); Zhang et al. 2020 (cyclical SG-MCMC, recalled).
    """
    if not isinstance(peak, Tracer) and not peak > 0:
        raise ValueError(f"`peak` must be positive, got {peak!r}. It is the largest learning rate.")
    if not isinstance(cycle_length, Tracer) and not cycle_length >= 1:
        raise ValueError(f"`cycle_length` must be 1 or more, got {cycle_length!r}. It counts updates, not epochs.")

    def schedule(step: Scalar) -> jax.Array:
        now, top, length = (jnp.asarray(x, jnp.float32) for x in (step, peak, cycle_length))
        value = top * jnp.square(jnp.cos(jnp.pi / 2 * ((now % length) / length)))
        return jnp.where((top > 0) & (length >= 1), value, jnp.nan)

    return schedule


def _warmup(shape: Callable, *numbers: Scalar) -> Schedule:
    """From 0 to `peak`, then along `shape` (from 1 to 0 over the progress 0 to 1) to `end`."""
    _check(*numbers)

    def schedule(step: Scalar) -> jax.Array:
        now, peak, warmup, total, end = (jnp.asarray(x, jnp.float32) for x in (step, *numbers))
        left = shape(jnp.clip((now - warmup) / (total - warmup), 0, 1))
        decayed = left * peak + (1 - left) * end  # exactly `peak` at its start and `end` at its end
        value = jnp.where(now < warmup, peak * now / jnp.maximum(warmup, 1), decayed)
        usable = (peak > 0) & (warmup >= 0) & (total > warmup) & (end >= 0)
        return jnp.where(usable, value, jnp.nan)

    return schedule


def _check(peak, warmup_steps, total_steps, end) -> None:
    """Raises for numbers out of range, as far as they are known."""
    known = lambda *numbers: not any(isinstance(x, Tracer) for x in numbers)
    if known(peak) and not peak > 0:
        raise ValueError(f"`peak` must be positive, got {peak!r}. It is the largest learning rate.")
    if known(warmup_steps) and not warmup_steps >= 0:
        raise ValueError(f"`warmup_steps` must be 0 or more, got {warmup_steps!r}. 0 means no warm-up.")
    if known(warmup_steps, total_steps) and not total_steps > warmup_steps:
        raise ValueError(
            f"`total_steps` must be more than `warmup_steps`, {warmup_steps!r}, got {total_steps!r}. It counts all "
            "updates, the warm-up's among them."
        )
    if known(end) and not end >= 0:
        raise ValueError(f"`end` must be 0 or more, got {end!r}. It is the learning rate after the last step.")
