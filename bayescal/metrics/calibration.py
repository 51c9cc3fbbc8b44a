"""Binned calibration metrics, read from one mergeable histogram."""

from functools import cache

import jax.numpy as jnp

from bayescal.binning import Closed, Histogram, bin_edges, histogram
from bayescal.metrics.likelihood import check_rows
from bayescal.types import Metric


@cache
def confidence_histogram(*, num_bins: int = 15, closed: Closed = "right") -> Metric:
    """Sums of (confidence, correctness) of the pooled top label, from which diagrams and binned metrics are read.

    The value is the `Histogram` itself; `bayescal.binning.reliability` makes a diagram of it.

    Args:
        num_bins: bins of equal width on [0, 1].
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.
    """
    bin_edges(num_bins)  # complains about the number

    def measure(pred, targets, weights) -> Histogram:
        check_rows(weights.shape[0])
        confidence, label = pred.top_label()
        correct = (label == targets).astype(jnp.float32)
        return histogram(confidence, correct, weights, num_bins=num_bins, closed=closed)

    return Metric(
        measure,
        lambda sums: sums,
        None,
        regular=False,
        convention=f"top label, {num_bins} equal-width bins closed on the {closed}",
    )


@cache
def calibration_error(*, num_bins: int = 15, norm: float = 1, closed: Closed = "right") -> Metric:
    """Expected calibration error of the top label: (sum_b n_b / n |confidence_b - accuracy_b|^norm)^(1 / norm).

    In [0, 1]; lower is better. Biased upwards, by about sqrt(num_bins / n): compare at equal n. Empty bins count for
    nothing. No interval: the plain bootstrap does not cover for this metric.

    Args:
        num_bins: bins of equal width on [0, 1].
        norm: 1 = ECE, 2 = root mean square, `float("inf")` = maximum (unweighted) calibration error.
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.

    Raises:
        ValueError: for a norm below 1.
    Source: Naeini et al. 2015; Guo et al. 2017.
    """
    if not norm >= 1:
        raise ValueError(f"`norm` must be at least 1 (or infinity), got {norm!r}. 1 is the ECE of Guo et al. 2017.")
    base = confidence_histogram(num_bins=num_bins, closed=closed)

    def compute(sums: Histogram):
        gap = abs(sums.gaps())
        if norm == float("inf"):
            return gap.max()
        return ((sums.weight / sums.weight.sum()) * gap**norm).sum() ** (1 / norm)

    return base._replace(compute=compute, convention=f"{base.convention}, L{norm:g} norm", regular=False)
