"""Metrics read from a fine histogram, approximately: what would be no sum becomes one."""

from functools import cache

import numpy as np

from bayescal.binning import Z95, Histogram, namespace
from bayescal.metrics.binfree import SUP_95
from bayescal.metrics.calibration import confidence_histogram
from bayescal.metrics.events import Events, top_label
from bayescal.types import Metric


@cache
def binned_auroc(*, events: Events | None = None, num_bins: int = 3840) -> Metric:
    """Area under the ROC curve of binned probabilities: P(bin of a positive > of a negative) + half P(same bin).

    In [0, 1]; higher is better; NaN where an outcome is absent. For the top label: whether confidence tells right from
    wrong. It merges where the exact `auroc` needs all rows; the error is at most half the share of (positive, negative)
    pairs that meet in one bin, which is large where most confidences lie above 1 - 1 / num_bins: take the exact one
    there. Interval: 95 %, DeLong's variance of the binned scores on the logit scale; none at 0 or 1.

    Args:
        events: which events; default the top label (confidence, correctness).
        num_bins: bins of equal width on [0, 1].
    Source: Mann and Whitney 1947; DeLong, DeLong and Clarke-Pearson 1988.
    """
    base = confidence_histogram(events=events or top_label(), num_bins=num_bins)

    def interval(sums: Histogram):
        value, positive, negative, below, above = _ranks(sums)
        if not 0 < value < 1:
            return None, None
        effective = sums.weight.sum() / sums.weight_square.sum()  # Kish's: 1 for unit weights
        error = 0.0
        for mass, placement in ((positive, below), (negative, above)):
            rows = mass.sum() * effective
            if not rows > 1:
                return None, None
            error += (mass * (placement - value) ** 2).sum() / mass.sum() / (rows - 1)
        half = Z95 * error**0.5 / (value * (1 - value))
        logit = np.log(value / (1 - value))
        return 1 / (1 + np.exp(half - logit)), 1 / (1 + np.exp(-half - logit))

    return base._replace(
        compute=lambda sums: _ranks(sums)[0],
        interval=interval,
        convention=f"{base.convention}; positive: it happened; same bin counts one half",
        better="higher",
        regular=True,
    )


@cache
def binned_ks_error(*, events: Events | None = None, num_bins: int = 3840) -> Metric:
    """Kolmogorov-Smirnov calibration error at the edges of bins: max_t |(1/n) sum over p_i <= t of (p_i - y_i)|.

    In [0, 1]; lower is better. Merges where the exact `ks_error` needs all rows; at most that, and less by no more than
    the largest share of rows in one bin. Interval: 95 % or more, from the largest deviation of a Brownian motion.

    Args:
        events: which events; default the top label (confidence, correctness).
        num_bins: bins of equal width on [0, 1].
    Source: Gupta et al. 2021.
    """
    base = confidence_histogram(events=events or top_label(), num_bins=num_bins)

    def compute(sums: Histogram):
        xp, total = namespace(sums.weight), sums.weight.sum()
        return xp.where(total > 0, abs(sums.gap.cumsum()).max() / xp.where(total > 0, total, 1), xp.nan)

    def interval(sums: Histogram):
        per_weight = sums.weight_square / np.where(sums.weight > 0, sums.weight, 1)  # the mean weight, bin by bin
        half = SUP_95 * (per_weight * sums.square).sum() ** 0.5 / sums.weight.sum()
        value = compute(sums)
        return max(value - half, 0.0), min(value + half, 1.0)

    return base._replace(
        compute=compute, interval=interval, convention=f"{base.convention}; cumulative differences at their edges"
    )


def _ranks(sums: Histogram):
    """AUROC, weights of both outcomes per bin, and their placements: shares of the other outcome below, and above."""
    xp = namespace(sums.weight)
    positive = xp.clip(sums.confidence - sums.gap, 0, sums.weight)
    negative = sums.weight - positive
    positives, negatives = positive.sum(), negative.sum()
    below = (negative.cumsum() - negative / 2) / xp.where(negatives > 0, negatives, 1)
    above = (positives - positive.cumsum() + positive / 2) / xp.where(positives > 0, positives, 1)
    defined = (positives > 0) & (negatives > 0)
    value = (positive * below).sum() / xp.where(positives > 0, positives, 1)
    return xp.where(defined, value, xp.nan), positive, negative, below, above
