"""The latest scores of a stream, kept in order so that their quantiles cost no sort."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.types import Array


class Window(NamedTuple):
    """The latest scores: a calibration set that grows until it is full and rolls from then on.

    recent: in a ring; +infinity where none has come yet.
    ordered: the same, ascending: one score in and one out costs no sort.
    count: scores seen.
    """

    recent: Float[Array, "window"]
    ordered: Float[Array, "window"]
    count: Int[Array, ""]


def start_window(past: Float[Array, "rows"], size: int) -> Window:
    """Window of `size` with the last of the past scores in it.

    Raises:
        ValueError: for a size that is no positive whole number.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"`window` must be a whole number of scores, at least 1, got {size!r}. As many as there are steps = keep all."
        )
    kept = past[max(0, past.shape[0] - size) :]
    recent = jnp.concatenate([kept, jnp.full(size - kept.shape[0], jnp.inf)]).astype(jnp.float32)
    return Window(recent, jnp.sort(recent), jnp.asarray(kept.shape[0], jnp.int32))


def slide(window: Window, score: Float[Array, ""]) -> Window:
    """The window with the new score, and without its oldest where it is full."""
    size = window.recent.shape[0]
    slot, place = window.count % size, jnp.arange(size)
    left = jnp.searchsorted(window.ordered, window.recent[slot])  # of infinity that stands for none: its first
    others = jnp.where(place < left, window.ordered, jnp.append(window.ordered[1:], jnp.inf))
    entered = jnp.searchsorted(others, score)
    ordered = jnp.where(place < entered, others, jnp.where(place == entered, score, jnp.roll(others, 1)))
    return Window(jnp.asarray(window.recent).at[slot].set(score), ordered, window.count + 1)


def window_threshold(window: Window, alpha: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """The k-th smallest of n scores in the window, k = n + 1 - floor((n + 1) alpha); +infinity where k > n.

    +infinity for alpha <= 0 and -infinity for alpha >= 1, which no score reaches. Float32: alpha is what arithmetic left
    of it, and counts as the multiple of 1 / (n + 1) that it is within rounding of.
    """
    size = window.ordered.shape[0]
    n = jnp.minimum(window.count, size)
    outside = jnp.floor((n + 1) * alpha * (1 + 8 * float(np.finfo(np.float32).eps)))
    k = n + 1 - jnp.clip(outside, 0, n).astype(jnp.int32)
    threshold = jnp.where(k > n, jnp.inf, window.ordered[jnp.clip(k - 1, 0, size - 1)])
    threshold = jnp.where(alpha <= 0, jnp.inf, jnp.where(alpha >= 1, -jnp.inf, threshold))
    return jnp.where(jnp.isnan(alpha), jnp.nan, threshold)
