"""Histograms of (confidence, correctness): sums that merge, from which binned metrics and diagrams are read."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.types import Array

Closed = Literal["right", "left"]
Z95 = 1.959963984540054  # normal quantile of a 95 % interval


class Histogram(NamedTuple):
    """Sums per bin, each of shape (bins,); merging is addition.

    weight: total weight (the count, for unit weights).
    gap: weighted sum of confidence - correct: positive = over-confident.
    confidence: weighted sum of the confidence.
    square: weighted sum of (confidence - correct)^2.
    weight_square: sum of squared weights.
    """

    weight: Float[Array, "*shape bins"]
    gap: Float[Array, "*shape bins"]
    confidence: Float[Array, "*shape bins"]
    square: Float[Array, "*shape bins"]
    weight_square: Float[Array, "*shape bins"]

    def gaps(self):
        """Mean confidence - accuracy of each bin; 0 in empty bins."""
        xp = namespace(self.weight)
        return self.gap / xp.where(self.weight > 0, self.weight, 1)

    def accuracy(self):
        """Share of correct predictions of each bin, in [0, 1]; 0 in empty bins."""
        xp = namespace(self.weight)
        return xp.clip((self.confidence - self.gap) / xp.where(self.weight > 0, self.weight, 1), 0, 1)

    def rows(self):
        """Kish's effective number of rows of each bin, (sum w)^2 / sum w^2; the count, for unit weights; 0 if empty."""
        xp = namespace(self.weight)
        return self.weight**2 / xp.where(self.weight_square > 0, self.weight_square, 1)

    def error_variance(self):
        """Sampling variance of each bin's mean gap, from the rows' own spread; 0 in bins of at most one row.

        At least what calibration implies, or Agresti and Coull's variance of the accuracy, whichever is less: where all
        rows went one way, as rare events do, their spread is nothing, and the noise is not.
        """
        xp, rows, gap = namespace(self.weight), self.rows(), self.gaps()
        per_row = 1 / xp.where(self.weight > 0, self.weight, 1)
        spread = xp.maximum(self.square * per_row - gap**2, 0)
        mean = xp.clip(self.confidence * per_row, 0, 1)
        implied = mean * (1 - mean) / xp.where(rows > 1, rows, 1)
        least = xp.minimum(implied, proportion_variance(self.accuracy(), rows))
        return xp.where(rows > 1, xp.maximum(spread / xp.where(rows > 1, rows - 1, 1), least), 0)


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
    check_bins(num_bins)
    return np.arange(num_bins + 1) / num_bins


def check_bins(num_bins: int, closed: Closed = "right") -> None:
    """Raises for what is no number of bins, or no side of them."""
    if not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"`num_bins` must be a whole number of at least 1, got {num_bins!r}. The usual choice is 15.")
    if closed not in ("right", "left"):
        raise ValueError(
            f"`closed` must be 'right' or 'left', got {closed!r}. Guo et al. 2017 close bins on the right."
        )


def bin_index(confidence: Float[Array, "*batch"], num_bins: int, closed: Closed) -> jax.Array:
    """Equal-width bin of each confidence, int (*batch,) in [0, num_bins).

    Args:
        confidence: in [0, 1].
        closed: "right" puts k / num_bins into bin k - 1, and 0 into the first (Guo et al. 2017, scikit-learn);
            "left" puts it into bin k, and 1 into the last (torchmetrics, netcal).
    """
    check_bins(num_bins, closed)
    confidence = jnp.asarray(confidence)
    edges = jnp.asarray(bin_edges(num_bins), confidence.dtype)
    # The product is rounded: it only tells which edge is nearest, and the edge itself decides on which side. A binary
    # search costs ten times as much.
    wide = confidence.astype(jnp.promote_types(confidence.dtype, jnp.float32))
    nearest = jnp.clip(jnp.round(wide * num_bins), 0, num_bins).astype(jnp.int32)
    edge = edges.at[nearest].get(mode="clip")
    below = confidence <= edge if closed == "right" else confidence < edge
    return jnp.clip(nearest - below.astype(jnp.int32), 0, num_bins - 1)


def histogram(
    confidence: Float[Array, "batch"],
    correct: Float[Array, "batch"],
    weights: Float[Array, "batch"],
    *,
    num_bins: int,
    closed: Closed = "right",
    groups: Int[Array, "batch"] | None = None,
    num_groups: int = 1,
) -> Histogram:
    """Sums per equal-width bin of confidence; exact for at most 2**20 rows a call (then add).

    The gap is summed as differences: separate float32 sums of confidence and correctness lose three digits.

    Args:
        confidence: probability given to the prediction, in [0, 1].
        correct: 1 where the prediction was right, else 0.
        weights: 0 for padding.
        num_bins: number of bins of equal width.
        closed: which side of a bin is closed, see `bin_index`.
        groups: group of each row, in [0, num_groups); None = one histogram of shape (bins,), else (groups, bins).
        num_groups: how many groups there are.
    """
    index = bin_index(confidence, num_bins, closed)
    shape: tuple[int, ...] = (num_bins,)
    if groups is not None:
        index, shape = groups * num_bins + index, (num_groups, num_bins)
    size = math.prod(shape)
    gap = confidence - correct
    columns = jnp.stack([jnp.ones_like(gap), gap, correct, gap**2, weights], -1)
    columns = jnp.where(weights[:, None] == 0, 0, weights[:, None] * columns)  # padding may hold anything
    # Long float32 sums lose digits: rows are added in blocks of about a thousand, and then the blocks; the confidence
    # is the gap, whose terms cancel, plus a count.
    blocks = max(1, min(len(confidence) // 1024, 2**16 // size))
    place = jnp.arange(len(confidence)) % blocks * size + index
    sums = jnp.zeros((blocks * size, 5), columns.dtype).at[place].add(columns, mode="drop")
    ones = jnp.ones(blocks, columns.dtype)  # a product with ones: on CPU `sum(0)` costs more than the scatter
    sums = jnp.matmul(ones, sums.reshape(blocks, -1), precision="highest").reshape(size, 5)
    weight, gap, correct, square, weight_square = (x.reshape(shape) for x in sums.T)
    return Histogram(weight, gap, gap + correct, square, weight_square)


def coarsen(sums: Histogram, num_bins: int) -> Histogram:
    """The same sums over fewer bins of equal width.

    Raises:
        ValueError: where the number of bins is no multiple of `num_bins`.
    """
    fine = sums.weight.shape[-1]
    if num_bins < 1 or fine % num_bins:
        raise ValueError(
            f"`num_bins` must divide {fine}, the histogram's number of bins, got {num_bins}. Use a divisor."
        )
    return Histogram(*(x.reshape(*x.shape[:-1], num_bins, -1).sum(-1) for x in sums))


def namespace(x):
    """numpy for its arrays (float64 totals on the host), jax.numpy for all others."""
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def reliability(sums: Histogram) -> Reliability:
    """Mean confidence, accuracy and its 95 % Wilson interval per bin; NaN in empty bins. Host only."""
    weight, gap, confidence = (np.asarray(x, np.float64) for x in sums[:3])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(weight > 0, confidence / weight, np.nan)
        accuracy = np.where(weight > 0, (confidence - gap) / weight, np.nan)
    low, high = wilson_interval(np.clip(accuracy, 0, 1), weight)
    return Reliability(mean, accuracy, low, high, weight)


def proportion_variance(rate, n):
    """Sampling variance of a proportion, of 1.92 successes and failures more than were seen; above 0 where all are alike.

    Args:
        rate: observed proportion, in [0, 1].
        n: number of trials.
    Source: Agresti and Coull 1998 (recalled, formula not checked against the paper).
    """
    shrunk = (rate * n + Z95**2 / 2) / (n + Z95**2)
    return shrunk * (1 - shrunk) / (n + Z95**2)


def folded_normal_mean(mean, variance):
    """Mean size of a normal variable, E|N(mean, variance)|, which is |mean| where the variance is 0; unit of the mean.

    Args:
        mean: of any shape.
        variance: non-negative, of the same shape.
    """
    xp = namespace(mean)
    if xp is np:
        from scipy.special import erf  # slow to import
    else:
        from jax.scipy.special import erf
    spread = xp.sqrt(xp.where(variance > 0, variance, 1))  # not a power, which XLA takes by logarithms
    ratio = mean / spread
    folded = spread * (2 / np.pi) ** 0.5 * xp.exp(-(ratio**2) / 2) + mean * erf(ratio / 2**0.5)
    return xp.where(variance > 0, folded, abs(mean))


def wilson_interval(rate, n, z: float = Z95):
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
