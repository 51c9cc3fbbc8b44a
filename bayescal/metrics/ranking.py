"""Ranking metrics: how well a score puts the positives first. Exact with ties, whatever the row order."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from bayescal.binning import namespace
from bayescal.metrics.ranked import (
    DRAWN,
    Z95,
    Ranked,
    Rows,
    groups_and_squares,
    influence_interval,
    ranked,
    read,
    resampling_interval,
)
from bayescal.metrics.whole import stated
from bayescal.types import Array, Estimate


def _auroc(groups: Ranked):
    other = groups.negatives()
    above, of_both = groups.positive_through - groups.positive, (groups.totals()[1], other.totals()[1])
    if namespace(groups.weight) is np:  # counts are exact, and the value never above 1
        return (other.positive * (above + groups.positive / 2)).sum() / (of_both[0] * of_both[1])
    beaten_by = (above + groups.positive / 2) / of_both[0]  # shares, so that no product leaves float32
    return (other.positive / of_both[1] * beaten_by).sum()


def _delong(groups: Ranked, squares: Ranked) -> tuple[float, float]:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        value, variance = _auroc(groups), 0.0
        below = groups.totals()[0] - groups.totals()[1] - groups.negatives().positive_through
        above = groups.positive_through - groups.positive
        for these, square, others in (
            (groups, squares, below + groups.negatives().positive / 2),
            (groups.negatives(), squares.negatives(), above + groups.positive / 2),
        ):
            total, all_others = these.totals()[1], groups.totals()[0] - these.totals()[1]
            spread = (square.positive * (others / all_others - value) ** 2).sum() / total**2
            variance += spread / (1 - square.positive.sum() / total**2)  # n / (n - 1) for rows that weigh the same
        logit, half = np.log(value / (1 - value)), Z95 * np.sqrt(variance) / (value * (1 - value))
        low, high = (float(1 / (1 + np.exp(-x))) for x in (logit - half, logit + half))
        return (low, high) if 0 < value < 1 and np.isfinite(half) else (np.nan, np.nan)


def _average_precision(groups: Ranked):
    precision = groups.positive_through / namespace(groups.weight).where(groups.through > 0, groups.through, 1)
    return (groups.positive / groups.totals()[1] * precision).sum()


def _fpr_at_tpr(groups: Ranked, tpr=0.95):
    xp, other = namespace(groups.weight), groups.negatives()
    enough = groups.positive_through >= tpr * groups.totals()[1] * (1 - 2 * xp.finfo(groups.weight.dtype).eps)
    fpr = xp.where(enough, other.positive_through / other.totals()[1], xp.inf).min()
    return xp.where(groups.totals()[1] > 0, fpr, xp.nan)


def delong_interval(scores: Rows, positive: Rows, *, weights: Rows | None = None) -> tuple[float, float]:
    """95 % interval of `auroc`: normal on the logit scale, with DeLong's variance. Host only.

    NaN at 0 and 1, where the variance says nothing, and for fewer than two rows of a class.

    Args:
        scores: higher = more likely positive.
        positive: which rows are of the positive class.
        weights: of each row; None = all alike.
    Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    return _delong(*groups_and_squares(scores, positive, weights))


@stated("positive class: the event; ties count one half", better="higher", interval=delong_interval)
def auroc(scores: Rows, positive: Rows, *, weights: Rows | None = None) -> Float[Array, ""]:
    """Area under the ROC curve: P(score of a positive > score of a negative) + half the probability of a tie.

    In [0, 1]; higher = positives score higher; 0.5 = no better than chance. With (confidence, correctness) the AUROC of
    correctness. Interval: logit DeLong, 95 %. NaN where one of the classes is absent; see `ranked` for NaN scores.

    Args:
        scores: higher = more likely positive; infinities are allowed.
        positive: which rows are of the positive class: 1 or True, else 0.
        weights: of each row; None = all alike.
    Source: Mann and Whitney 1947.
    """
    return read(_auroc, ranked(scores, positive, weights))


@stated(
    "positive class: the event; step-wise, not trapezoid",
    better="higher",
    interval=influence_interval(_average_precision),
)
def average_precision(scores: Rows, positive: Rows, *, weights: Rows | None = None) -> Float[Array, ""]:
    """Average precision sum_k (R_k - R_{k-1}) P_k over the distinct thresholds k, R the recall and P the precision.

    In (0, 1]; higher = positives score higher; of a score without information the share of positives, so that it is not
    comparable between data sets of other shares. The other way round (AUPR of the negatives) is
    `average_precision(-scores, ~positive)`. NaN where there is no positive; see `ranked` for NaN scores.

    Args:
        scores: higher = more likely positive.
        positive: which rows are of the positive class.
        weights: of each row; None = all alike.
    Source: Davis and Goadrich 2006 (recalled, formula not checked against the paper).
    """
    return read(_average_precision, ranked(scores, positive, weights))


@stated(
    f"positive class: the event; least with at least that TPR, ties accepted together; {DRAWN}",
    order_statistic=True,
    interval=resampling_interval(_fpr_at_tpr),
)
def fpr_at_tpr(scores: Rows, positive: Rows, *, weights: Rows | None = None, tpr: float = 0.95) -> Float[Array, ""]:
    """False-positive rate at the highest threshold whose true-positive rate is at least `tpr`.

    In [0, 1]; lower is better. Which class is positive changes the value: for the other `fpr_at_tpr(-scores, ~positive)`.
    Rows of equal score are accepted together. NaN where one of the classes is absent; see `ranked` for NaN scores.
    An order statistic, whose interval is by resampling.

    Args:
        scores: higher = more likely positive.
        positive: which rows are of the positive class.
        weights: of each row; None = all alike.
        tpr: in (0, 1].

    Raises:
        ValueError: for a rate outside (0, 1].
    Source: Liang, Li and Srikant 2018 (recalled, formula not checked against the paper).
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"`tpr` must lie in (0, 1], got {tpr!r}. The usual choice is 0.95.")
    return read(_fpr_at_tpr, ranked(scores, positive, weights), tpr=tpr)


class ROC(NamedTuple):
    """Points of a ROC curve, each array (thresholds + 1,), from (0, 0) at threshold infinity to (1, 1)."""

    fpr: np.ndarray
    tpr: np.ndarray
    threshold: np.ndarray  # rows with a score of at least this are called positive


def roc_curve(scores: Rows, positive: Rows, *, weights: Rows | None = None) -> ROC:
    """False- and true-positive rate at every distinct score as threshold. Host only.

    Args:
        scores: higher = more likely positive.
        positive: which rows are of the positive class.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for NaN scores, outcomes other than 0 and 1, or an absent class.
    """
    scores, groups = _check_both_classes(scores, positive, weights)
    tpr, fpr = (np.append(0, x.positive_through / x.totals()[1]) for x in (groups, groups.negatives()))
    return ROC(fpr, tpr, np.append(np.inf, np.unique(scores)[::-1]))


def auroc_estimate(scores: Float[Array, "batch"], positive: Bool[Array, "batch"], positive_class: str) -> Estimate:
    """`auroc` with its 95 % interval by DeLong's variance on the logit scale.

    At 0 or 1 the variance says nothing and the interval is left out.

    Args:
        scores: higher = more likely positive.
        positive: which rows are of the positive class.
        positive_class: its name, kept in the result's convention.

    Raises:
        ValueError: for NaN scores, other lengths, or an absent class.
    Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    scores, groups = _check_both_classes(scores, positive)
    value, (low, high) = float(_auroc(groups)), _delong(groups, groups)
    ends = (low, high) if np.isfinite(low) else (None, None)
    return Estimate(value, *ends, len(scores), f"positive class: {positive_class}; ties count one half")


def accuracy_rejection(scores: Float[Array, "batch"], correct: Bool[Array, "batch"]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of what is kept against the share rejected, the most uncertain rejected first.

    Higher is better. Rows with equal scores count as if in random order (each as the mean of its group). Host only.

    Args:
        scores: uncertainty; higher = rejected earlier.
        correct: whether each prediction was right.

    Returns:
        (rejected, accuracy), each (n,): rejected = 0, 1/n, ..., (n - 1)/n.

    Raises:
        ValueError: for NaN scores or other shapes.
    """
    scores, correct = np.asarray(scores), np.asarray(correct, np.float64)
    if scores.shape != correct.shape or scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError(
            f"`scores` and `correct` must be one axis of the same length without NaN, got {scores.shape} and "
            f"{correct.shape}. Flatten them row by row, and find out which rows are NaN."
        )
    _, group = np.unique(scores, return_inverse=True)
    group_mean = np.bincount(group, correct) / np.bincount(group)
    kept = group_mean[group][np.argsort(scores, kind="stable")]
    n = len(scores)
    accuracy = np.cumsum(kept) / np.arange(1, n + 1)
    return np.arange(n) / n, accuracy[::-1]


def _check_both_classes(scores, positive, weights=None) -> tuple[np.ndarray, Ranked]:
    """(scores of the rows that weigh something, their groups) on the host; raises where `auroc` would be NaN."""
    scores, positive = np.asarray(scores), np.asarray(positive)
    groups = ranked(scores, positive, None if weights is None else np.asarray(weights))
    kept = slice(None) if weights is None else np.asarray(weights) != 0
    scores, positive = scores[kept], positive[kept]
    if np.isnan(scores).any():
        raise ValueError(
            f"`scores` must not be NaN, got {int(np.isnan(scores).sum())} of {len(scores)}. Find out which rows they are."
        )
    total, positives = groups.totals()
    if not 0 < positives < total:
        raise ValueError(
            f"`positive` must hold both classes, got {int((positive == 1).sum())} positives of {len(positive)}. "
            "Join in-distribution and out-of-distribution rows before calling, as 0 and 1."
        )
    return scores, groups
