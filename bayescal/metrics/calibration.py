"""Binned calibration metrics, read from one mergeable histogram."""

from functools import cache
from typing import Literal

import numpy as np

from bayescal.binning import (
    Closed,
    Histogram,
    check_bins,
    folded_normal_mean,
    histogram,
    namespace,
)
from bayescal.metrics.events import Events, top_label
from bayescal.metrics.inversion import gap_norm_interval, signed_square_interval
from bayescal.metrics.likelihood import check_rows
from bayescal.types import Metric

Weighting = Literal["mass", "uniform"]

FEWEST_FOR_MAXIMUM = 20  # rows below which the worst bin's gap is too far from normal for an interval


@cache
def confidence_histogram(*, events: Events | None = None, num_bins: int = 15, closed: Closed = "right") -> Metric:
    """Sums of (probability, outcome) of events, from which diagrams and all binned metrics are read.

    The value is the `Histogram` itself. `bayescal.binning.reliability` makes a diagram of it, and a fine one serves many
    metrics after one pass: `calibration_error(num_bins=15).compute(coarsen(sums, 15))`.

    Args:
        events: which events; default the top label (confidence, correctness).
        num_bins: bins of equal width on [0, 1]; thousands cost little more than fifteen.
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.

    Raises:
        ValueError: for fewer than one bin or another `closed`; when measured, for more than 2**20 rows a call.
    """
    check_bins(num_bins, closed)
    events = events or top_label()

    def measure(pred, targets, weights) -> Histogram:
        check_rows(weights.shape[0])
        return histogram(*events.read(pred, targets), weights, num_bins=num_bins, closed=closed)

    convention = f"{events.name}; {num_bins} equal-width bins closed on the {closed}"
    return Metric(measure, lambda sums: sums, convention=convention, regular=False)


@cache
def calibration_error(
    *,
    events: Events | None = None,
    num_bins: int = 15,
    norm: float = 1,
    closed: Closed = "right",
    weighting: Weighting = "mass",
    min_count: float = 1,
    debiased: bool = False,
) -> Metric:
    """Expected calibration error (ECE): (sum_b n_b / n |confidence_b - accuracy_b|^norm)^(1 / norm).

    In [0, 1]; lower is better. The plug-in is biased upwards, by about sqrt(num_bins / n): compare at equal n, or debias.
    Debiased, norm 1 is 2 plug-in - sum_b n_b / n E|N(gap_b, a_b (1 - a_b) / n_b)|, the folded normal's mean in closed form,
    and may be negative; norm 2 is the root of `squared_calibration_error`, or 0 where that is negative. The n_b of
    both are Kish's effective rows. Interval: by test inversion, for the norm of the true gaps, whatever the estimator;
    the bootstrap does not cover for this metric. None for the maximum while a bin has fewer than 20 rows.

    Args:
        events: which events; default the top label (confidence, correctness). `one_class(1)` of two classes is what
            torchmetrics and netcal call binary.
        num_bins: bins of equal width on [0, 1].
        norm: 1 = ECE, 2 = root mean square, `float("inf")` = maximum calibration error, which weighs no bin.
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.
        weighting: "mass" weighs a bin by its rows; "uniform" all bins alike ("average" or region-balanced error).
        min_count: bins of fewer (effective) rows are left out. Empty ones always are.
        debiased: whether the bias of the plug-in is taken off, for norm 1 and 2.

    Raises:
        ValueError: for a norm below 1, another weighting, a `min_count` below 1, debiasing another norm.
    Source: Naeini et al. 2015; Guo et al. 2017; debiased: Kumar, Liang and Ma 2019; uniform: Neumann et al. 2018 as netcal
        has it, Dawkins and Nejadgholi 2022 (recalled, formula not checked against the papers).
    """
    check_norm(norm, debiased)
    if weighting not in ("mass", "uniform"):
        raise ValueError(f"`weighting` must be 'mass' or 'uniform', got {weighting!r}. The ECE weighs bins by mass.")
    if not min_count >= 1:
        raise ValueError(f"`min_count` must be at least 1, got {min_count!r}. 1 leaves out empty bins only.")
    base = confidence_histogram(events=events or top_label(), num_bins=num_bins, closed=closed)

    def share(sums):
        return bin_shares(sums, weighting, min_count)

    words = [base.convention, norm_words(norm, debiased)]
    words += ["all bins alike"] if weighting == "uniform" and norm != float("inf") else []
    words += [f"bins of at least {min_count:g} rows"] if min_count > 1 else []
    return base._replace(
        compute=lambda sums: norm_of_gaps(sums, share(sums), norm, debiased),
        interval=lambda sums: norm_interval(sums, share(sums), norm),
        convention="; ".join(words),
    )


@cache
def squared_calibration_error(*, events: Events | None = None, num_bins: int = 15, closed: Closed = "right") -> Metric:
    """Debiased squared calibration error: sum_b n_b / n [(confidence_b - accuracy_b)^2 - a_b (1 - a_b) / (n_b - 1)].

    In [-1, 1]; lower is better; around 0, either side, for calibrated forecasts: nothing is clipped. Bins of fewer than
    two rows add 0; the n_b that is divided by is Kish's effective rows. A regular functional, unlike its root.
    Interval: score interval in closed form.

    Args:
        events: which events; default the top label.
        num_bins: bins of equal width on [0, 1].
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.
    Source: Kumar, Liang and Ma 2019; Bröcker 2012 and Ferro and Fricker 2012 have the same idea (recalled, formula not
        checked against the papers).
    """
    base = confidence_histogram(events=events or top_label(), num_bins=num_bins, closed=closed)

    def interval(sums):
        kept = sums.rows() > 1.5
        share = sums.weight[kept] / sums.weight.sum()
        counted = share.sum()
        if not counted > 0:
            return None, None
        ends = signed_square_interval(sums.gaps()[kept], sums.error_variance()[kept], share / counted)
        return counted * ends[0], counted * ends[1]

    return base._replace(
        compute=lambda sums: (bin_shares(sums) * debiased_squares(sums)).sum(),
        interval=interval,
        convention=f"{base.convention}; debiased, signed",
        regular=True,
    )


def bin_shares(sums: Histogram, weighting: Weighting = "mass", min_count: float = 1):
    """Weight of each bin in the metric, of sum one over the bins that count (last axis); NaN where no bin does."""
    xp = namespace(sums.weight)
    counts = (sums.weight > 0) & (sums.rows() >= min_count * (1 - 1e-5))  # one row of weight 0.1 is one, as rounded
    mass = xp.where(counts, sums.weight if weighting == "mass" else 1.0, 0.0)
    total = mass.sum(-1, keepdims=True)
    return xp.where(total > 0, mass / xp.where(total > 0, total, 1), xp.nan)


def norm_of_gaps(sums: Histogram, share, norm: float, debiased: bool = False):
    """(sum_b share_b |gap_b|^norm)^(1 / norm) over the last axis, debiased where wanted; NaN where the shares are."""
    xp, gap = namespace(sums.weight), abs(sums.gaps())
    if norm == float("inf"):
        return xp.where(share > 0, gap, share).max(-1)  # a bin that does not count has share 0
    if not debiased:
        return (share * gap**norm).sum(-1) ** (1 / norm)
    if norm == 1:
        return (share * (2 * gap - folded_normal_mean(gap, _outcome_variance(sums, sums.rows())))).sum(-1)
    return xp.maximum((share * debiased_squares(sums)).sum(-1), 0) ** 0.5


def debiased_squares(sums: Histogram):
    """Unbiased estimate of each bin's squared gap, gap_b^2 - a_b (1 - a_b) / (n_b - 1); 0 for fewer than two rows."""
    xp, rows = namespace(sums.weight), sums.rows()
    enough = rows > 1.5  # effective rows are rounded; whole ones are unaffected
    return xp.where(enough, sums.gaps() ** 2 - _outcome_variance(sums, xp.where(enough, rows - 1, 1)), 0)


def norm_interval(sums: Histogram, share, norm: float):
    """95 % interval for the norm of the true gaps, by test inversion, for histograms of bins that share no row. Host only."""
    kept = share > 0
    if not kept.any():
        return None, None
    fewest = FEWEST_FOR_MAXIMUM if norm == float("inf") else 2
    variance = np.where(sums.rows() > fewest - 0.5, sums.error_variance(), np.nan)
    return gap_norm_interval(np.asarray(sums.gaps())[kept], variance[kept], share[kept], norm=norm)


def check_norm(norm: float, debiased: bool) -> None:
    """Raises for a norm below 1, or one that cannot be debiased."""
    if not norm >= 1:
        raise ValueError(f"`norm` must be at least 1 (or infinity), got {norm!r}. 1 is the ECE of Guo et al. 2017.")
    if debiased and norm not in (1, 2):
        raise ValueError(
            f"`debiased` needs `norm` 1 or 2, got norm {norm!r}, of which no closed form is known. Use `debiased=False`."
        )


def norm_words(norm: float, debiased: bool) -> str:
    """The norm and its estimator in words."""
    return f"L{norm:g} norm; {'debiased' if debiased else 'plug-in'}"


def _outcome_variance(sums: Histogram, divisor):
    """Accuracy times one minus itself over `divisor`, 0 in empty bins."""
    xp, accuracy = namespace(sums.weight), sums.accuracy()
    return accuracy * (1 - accuracy) / xp.where(sums.weight > 0, divisor, 1)
