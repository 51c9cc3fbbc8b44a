"""False-positive rates at 95 % true positives, with intervals from order statistics and counts: nothing is drawn."""

import math
from typing import NamedTuple

import numpy as np

from bayescal.binning import Z95, proportion_variance, wilson_interval
from bayescal.metrics import fpr_at_tpr

TPR = 0.95
ROUNDING = 1 - 1e-12  # of a TPR: one that is reached but for the rounding of sums of weights is reached
Counts = dict[str, np.ndarray]  # name of a set -> rows at each distinct score of all sets, rising


class Cut(NamedTuple):
    """One threshold, and what is read off there.

    positive: set -> weight of each row, of the class whose quantile the threshold is.
    read: set -> what its share beyond the threshold counts in the rate; of all cuts together 1.
    """

    positive: dict[str, float]
    read: dict[str, float]


def cuts(counts: Counts, row: dict[str, float], parts: list[list[str]]) -> dict[str, list[Cut]]:
    """The cuts of the mean over parts: each part has its own threshold, unless inside rows are the positive class.

    Args:
        counts: rows of each set.
        row: weight of a row of each inside set.
        parts: outside sets, pooled within a part.
    """
    rows = {name: x.sum() for name, x in counts.items()}
    total = sum(row[name] * rows[name] for name in row)
    inside = {name: row[name] * rows[name] / total / len(parts) for name in row}
    outside = {name: rows[name] / sum(rows[k] for k in part) / len(parts) for part in parts for name in part}
    return {
        "fpr95_out": [Cut(dict.fromkeys(part, 1.0), inside) for part in parts],
        "fpr95_in": [Cut(row, outside)],
    }


def false_positive_rate(
    counts: Counts, cuts: list[Cut], *, outside_positive: bool
) -> tuple[float, float | None, float | None]:
    """(rate, low, high): sum over cuts and sets of the share beyond the threshold; a 95 % interval, or None.

    The noise of each threshold: which order statistics the true one lies between, by the binomial distribution of how many
    positive rows are beyond it. The noise of the rows counted there: Wilson's interval. Both sides of each are distances
    from the rate, joined as squares. Sets of unlike weight, and rows that several cuts count, enter as the rows of one
    set that would be as noisy. Below 72 positive rows all of them may lie on one side of the true threshold: no interval.

    Args:
        counts: rows of each set.
        cuts: as `cuts` makes them.
        outside_positive: whether higher scores are those of the positive class.
    Source: Zou and Donner 2008 for joining intervals (recalled); the order statistics are textbook.
    """
    sign = 1 if outside_positive else -1
    shares = [_shares(counts, cut, [*cut.read], sign) for cut in cuts]
    own = [_joined(cut, share) for cut, share in zip(cuts, shares, strict=True)]
    rate = min(sum(own), 1.0)  # rounding
    weights = {name: [cut.read.get(name, 0.0) for cut in cuts] for cut in cuts for name in cut.read}
    counted = _like_one_set(counts, weights, {name: [share.get(name, 0.0) for share in shares] for name in weights})
    down, up = (abs(end - rate) ** 2 for end in wilson_interval(rate, counted))
    for cut, here in zip(cuts, own, strict=True):
        total = sum(cut.positive[name] * counts[name].sum() for name in cut.positive)
        weights = {name: [cut.positive[name] * counts[name].sum() / total] for name in cut.positive}
        beyond = {name: [share] for name, share in _shares(counts, cut, [*cut.positive], sign).items()}
        ends = _order_statistics(_like_one_set(counts, weights, beyond))
        if ends is None:
            return rate, None, None
        low, high = (_joined(cut, _shares(counts, cut, [*cut.read], sign, tpr)) for tpr in ends)
        down, up = down + (here - low) ** 2, up + (high - here) ** 2
    return rate, float(max(rate - math.sqrt(down), 0.0)), float(min(rate + math.sqrt(up), 1.0))


def _shares(counts: Counts, cut: Cut, names: list[str], sign: int, tpr: float = TPR) -> dict[str, float]:
    """Share of each set's rows that are beyond the cut's threshold at this TPR."""
    positive = np.sum([weight * counts[name] for name, weight in cut.positive.items()], 0)
    levels = sign * np.arange(len(positive))
    columns = np.append(levels, levels), np.arange(2 * len(levels)) < len(levels)
    tpr *= ROUNDING
    return {name: float(fpr_at_tpr(*columns, weights=np.append(positive, counts[name]), tpr=tpr)) for name in names}


def _joined(cut: Cut, shares: dict[str, float]) -> float:
    return float(sum(weight * shares[name] for name, weight in cut.read.items()))


def _order_statistics(rows: int) -> tuple[float, float] | None:
    """Two TPRs at whose empirical thresholds the interval of the true threshold ends."""
    from scipy.stats import binom  # slow to import

    least, most = binom.ppf([0.025, 0.975], rows, TPR)
    return (least / rows, (most + 1) / rows) if least > 0 and most < rows else None


def _like_one_set(counts: Counts, weights: dict[str, list[float]], shares: dict[str, list[float]]) -> int:
    """Rows of one set whose share would be as noisy as sum over sets and cuts of weight times share; at least 1.

    The shares of one set at several cuts are nested: a row beyond the stricter of two is beyond both.
    """
    rows = {name: counts[name].sum() for name in weights}
    total = sum(rows.values())
    shrink = Z95**2 / total  # as many more successes and failures as in `proportion_variance`, spread over the sets
    value, variance = 0.0, 0.0
    for name, n in rows.items():
        weight, share = np.array(weights[name]), np.array(shares[name])
        value += float(weight @ share)
        mean = (weight @ share + shrink / 2 * weight.sum()) / (1 + shrink)
        square = (weight @ np.minimum.outer(share, share) @ weight + shrink / 2 * weight.sum() ** 2) / (1 + shrink)
        variance += float(square - mean**2) / (n * (1 + shrink))
    return max(int(total * proportion_variance(value, total) / variance + 1e-6), 1)
