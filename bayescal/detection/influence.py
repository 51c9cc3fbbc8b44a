"""AUROC and average precision from how many rows have each score, and how far each row moves them.

Why not `metrics.auroc` and `metrics.average_precision`, with which the values agree: the slopes, set by set, come from the
sums that give the value, the scores are sorted once for all comparisons, and a separated pair of sets gives 1 to the bit.
"""

import math

import numpy as np

from bayescal.binning import Z95


def auroc_and_slopes(inside, outside):
    """(value, its slope in each level's share of inside, and of outside) from the weight at each level, rising scores."""
    total = outside.sum()
    below = (np.cumsum(inside) - inside / 2) / inside.sum()
    above = (total - np.cumsum(outside) + outside / 2) / total
    return (outside * below).sum() / total, above, below


def average_precision_and_slopes(positive, negative, share):
    """(value, its slope in each level's share of the positives, and of the negatives); the most positive level first."""
    total = positive.sum()
    recall, alarms = np.cumsum(positive) / total, np.cumsum(negative) / negative.sum()
    flagged = share * recall + (1 - share) * alarms
    flagged = np.where(flagged > 0, flagged, 1)
    precision, slope = share * recall / flagged, share * (1 - share) * positive / total / flagged**2
    later = lambda x: np.cumsum(x[::-1])[::-1]  # a row counts at its own threshold and all that come after
    return (positive * precision).sum() / total, precision + later(slope * alarms), -later(slope * recall)


def variance_of_sum(moved, counts) -> float:
    """Of a sum of what each row moves, the rows drawn independently and their number fixed."""
    number = counts.sum()
    mean = (counts * moved).sum() / number
    return float((counts * (moved - mean) ** 2).sum() * number / (number - 1))


def logit_interval(value, variance) -> tuple[float, float] | tuple[None, None]:
    """95 % interval, normal on the logit scale; (None, None) where the variance says nothing."""
    if not 0 < value < 1 or not variance > 1e-24:
        return None, None
    middle, half = math.log(value / (1 - value)), Z95 * math.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-x)) for x in (middle - half, middle + half))
    return low, high
