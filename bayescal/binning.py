"""Histograms of (confidence, correctness): sums that merge, from which binned metrics and diagrams are read."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.types import Array

Closed = Literal["right", "left"]


class Histogram(NamedTuple):
    """Sums per bin, each of shape (bins,); merging is addition.

    weight: total weight (the count, for unit weights).
    gap: weighted sum of confidence - correct: positive = over-confident.
    confidence: weighted sum of the confidence.
    """

    weight: Float[Array, "bins"]
    gap: Float[Array, "bins"]
    confidence: Float[Array, "bins"]


class Reliability(NamedTuple):
    """A reliability diagram as numbers, each of shape (bins,); NaN in empty bins.

    low, high: 95 % Wilson interval of the accuracy, given the bin's weight as a count.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def bin_edges(num_bins: int) -> np.ndarray:
    """Edges k / num_bins, k = 0..num_bins, correctly rounded (`linspace` is not), shape (num_bins + 1,)."""
    if not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"`num_bins` must be a whole number of at least 1, got {num_bins!r}. The usual choice is 15.")
    return np.arange(num_bins + 1) / num_bins


def bin_index(confidence: Float[Array, "batch"], num_bins: int, closed: Closed) -> jax.Array:
    """Equal-width bin of each confidence, int (batch,) in [0, num_bins).

    Args:
        confidence: in [0, 1].
        closed: "right" puts k / num_bins into bin k - 1, and 0 into the first (Guo et al. 2017, scikit-learn);
            "left" puts it into bin k, and 1 into the last (torchmetrics, netcal).
    """
    if closed not in ("right", "left"):
        raise ValueError(
            f"`closed` must be 'right' or 'left', got {closed!r}. Guo et al. 2017 close bins on the right."
        )
    edges = jnp.asarray(bin_edges(num_bins), jnp.asarray(confidence).dtype)
    index = jnp.searchsorted(edges, confidence, side="left" if closed == "right" else "right") - 1
    return jnp.clip(index, 0, num_bins - 1)


def histogram(
    confidence: Float[Array, "batch"],
    correct: Float[Array, "batch"],
    weights: Float[Array, "batch"],
    *,
    num_bins: int,
    closed: Closed = "right",
) -> Histogram:
    """Sums per equal-width bin of confidence; exact for at most 2**20 rows a call (then add).

    The gap is summed as differences: separate float32 sums of confidence and correctness lose three digits.

    Args:
        confidence: probability given to the prediction, in [0, 1].
        correct: 1 where the prediction was right, else 0.
        weights: 0 for padding.
        num_bins: number of bins of equal width.
        closed: which side of a bin is closed, see `bin_index`.
    """
    inside = bin_index(confidence, num_bins, closed)[:, None] == jnp.arange(num_bins)
    spread = jnp.where(inside, weights[:, None], 0)
    gap = jnp.where(spread == 0, 0, spread * (confidence - correct)[:, None])  # padding may hold anything
    total = jnp.where(spread == 0, 0, spread * confidence[:, None])
    return Histogram(spread.sum(0), gap.sum(0), total.sum(0))


def reliability(sums: Histogram) -> Reliability:
    """Mean confidence, accuracy and its 95 % Wilson interval per bin; NaN in empty bins. Host only."""
    weight, gap, confidence = (np.asarray(x, np.float64) for x in sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(weight > 0, confidence / weight, np.nan)
        accuracy = np.where(weight > 0, (confidence - gap) / weight, np.nan)
    low, high = wilson_interval(np.clip(accuracy, 0, 1), weight)
    return Reliability(mean, accuracy, low, high, weight)


def wilson_interval(rate, n, z: float = 1.959963984540054):
    """Wilson score interval of a proportion: (low, high), arrays like `rate`; NaN for n = 0.

    Args:
        rate: observed proportion, in [0, 1].
        n: number of trials.
        z: normal quantile, 1.96 = 95 %.
    Source: Wilson 1927.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
        return centre - half, centre + half
