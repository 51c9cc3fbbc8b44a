"""Selective prediction: what is gained by answering only where the confidence is high.

Each function takes (confidence, correct); any score may stand for the confidence (`uncertainty_events`). Rows of equal
confidence are accepted in random order: each counts as the mean of its group. A weight of 2 counts as two rows; where a
row's size matters (AURC and the like), the smallest positive weight is one row, so that the weights' scale is free.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import namespace
from bayescal.metrics.events import Events, top_label
from bayescal.metrics.ranked import DRAWN, Ranked, Rows, influence_interval, ranked, read, resampling_interval
from bayescal.metrics.whole import stated
from bayescal.types import Array


@cache
def uncertainty_events(score: Callable, name: str) -> Events:
    """The top label is right, ranked by an uncertainty instead of the confidence: (-score(pred), correctness).

    Args:
        score: `pred -> (rows,)`, higher = less certain.
        name: of the score, in words; it goes into the convention.
    """

    def read_rows(pred, targets):
        return -score(pred), top_label().read(pred, targets)[1]

    return Events(read_rows, f"top label, ranked by low {name}")


def _risks(groups: Ranked):
    """(errors of each group, errors before it, weight before it, its share of errors)."""
    xp, errors = namespace(groups.weight), groups.negatives()
    share = errors.positive / xp.where(groups.weight > 0, groups.weight, 1)
    return errors.positive, errors.positive_through - errors.positive, groups.through - groups.weight, share


def _harmonic(before, size):
    """sum_j 1 / (before + j), j = 1..size, for size that need not be whole: digamma's difference without cancellation.

    Right to 1e-9 for `before` of at least 1; where that is 0, its factor is.
    """
    after = before + size
    if isinstance(size, np.ndarray) and (size == 1).any():  # on the host single rows are most rows, and quick
        sums, many = 1 / after, size != 1
        sums[many] = _harmonic(before[many], size[many])
        return sums
    shifted = sum(size / ((before + j) * (after + j)) for j in (1, 2, 3, 4))  # the series below wants large numbers
    rest = [
        (1 - (7 / 40 - (31 / 336 - 127 / 1280 / x**2) / x**2) / x**2) / (24 * x**2) for x in (before + 4.5, after + 4.5)
    ]
    return shifted + namespace(before).log1p(size / (before + 4.5)) + rest[1] - rest[0]


def _mean_risk(groups: Ranked, start=None):
    """Selective risk averaged over the numbers of accepted rows from `start` (a weight; None = from the first) on."""
    xp = namespace(groups.weight)
    _, errors_before, before, share = _risks(groups)
    from_, size, total = before, groups.weight, groups.totals()[0]
    if start is not None:  # not with maximum, whose slope is halved where a row begins at `start`
        size = xp.where(start >= before, xp.where(groups.through > start, groups.through - start, 0), size)
        from_, total = xp.where(start >= before, start, before), total - start
    rows = _harmonic(from_ / groups.unit, size / groups.unit)
    return (share * size / total + (errors_before - share * before) / total * rows).sum()


def _least_mean_risk(groups: Ranked, start: Any = 0):
    """`_mean_risk` of the order that accepts every right prediction first."""
    xp, (total, correct) = namespace(groups.weight), groups.totals()
    from_ = xp.maximum(correct, start)
    size = total - from_
    return (size - correct * _harmonic(from_ / groups.unit, size / groups.unit)) / (total - start)


def _excess(groups: Ranked):
    return _mean_risk(groups) - _least_mean_risk(groups)


def _augrc(groups: Ranked):
    errors, errors_before, _, _ = _risks(groups)
    total = groups.totals()[0]
    return (groups.weight / total * ((errors_before + errors / 2) / total)).sum()


def _rejection_ratio(groups: Ranked, max_rejection=1.0):
    xp, (total, correct) = namespace(groups.weight), groups.totals()
    start = xp.where(max_rejection < 1, total - _whole_rows(groups, max_rejection, xp.floor, 1), 0)
    random = (total - correct) / total
    ratio = (random - _mean_risk(groups, start)) / (random - _least_mean_risk(groups, start))
    return xp.where((correct > 0) & (correct < total) & (start < total), ratio, xp.nan)


def _whole_rows(groups: Ranked, share, rounded, sign):
    """The share of all rows, in whole rows, as a weight; a share k / n is k rows despite rounding."""
    xp, rows = namespace(groups.weight), groups.totals()[0] / groups.unit
    whole_rows = rounded(share * rows + sign * 2 * xp.finfo(groups.weight.dtype).eps * rows)
    if xp is jnp:  # to the influence of a row the rounding is nothing: the share stays the share
        whole_rows = share * rows + jax.lax.stop_gradient(whole_rows - share * rows)
    return whole_rows * groups.unit


def _risk_at_coverage(groups: Ranked, coverage=0.8):
    xp, total = namespace(groups.weight), groups.totals()[0]
    _, _, before, share = _risks(groups)
    accepted = xp.minimum(_whole_rows(groups, coverage, xp.ceil, -1), total)
    return (share * xp.clip(accepted - before, 0, groups.weight)).sum() / accepted


def _coverage_at_risk(groups: Ranked, risk=0.05):
    xp, total = namespace(groups.weight), groups.totals()[0]
    errors, errors_before, before, share = _risks(groups)
    eps = xp.finfo(groups.weight.dtype).eps
    whole_group = errors_before + errors <= risk * groups.through * (1 + 4 * eps)
    # Inside a group the risk goes from that before it towards the group's own share of errors, and meets `risk` once.
    into = xp.where(share > risk, (risk * before - errors_before) / xp.where(share > risk, share - risk, 1), -1)
    rows = xp.floor((before + into) / groups.unit * (1 + 4 * eps)) * groups.unit
    part = xp.where(into >= 0, xp.minimum(rows, groups.through - groups.unit), 0)
    accepted = xp.where(groups.weight > 0, xp.where(whole_group, groups.through, part), 0)
    return xp.maximum(accepted.max(), 0) / total


@stated("mean selective risk over 1..n accepted rows; ties in random order", interval=influence_interval(_mean_risk))
def aurc(confidence: Rows, correct: Rows, *, weights: Rows | None = None) -> Float[Array, ""]:
    """Area under the risk-coverage curve: mean_k (1/k) sum_{i<=k} error_(i), the most confident rows first.

    In [0, 1]; lower is better; holds both accuracy and ranking. Other conventions in use (trapezoids, an added point at
    coverage 0) differ in the third digit for some hundred rows. Interval: by influence.

    Args:
        confidence: higher = accepted first; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.
    Source: Geifman and El-Yaniv 2017.
    """
    return read(_mean_risk, ranked(confidence, correct, weights))


@stated(
    "AURC less that of the best order of as many errors; ties in random order", interval=influence_interval(_excess)
)
def excess_aurc(confidence: Rows, correct: Rows, *, weights: Rows | None = None) -> Float[Array, ""]:
    """Excess AURC: `aurc` less the least AURC of any order of the same predictions (finite sample, not its limit).

    In [0, 1]; lower is better; 0 where every right prediction is more confident than every wrong one. Interval: by
    influence.

    Args:
        confidence: higher = accepted first; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.
    Source: Geifman, Uziel and El-Yaniv 2019.
    """
    return read(_excess, ranked(confidence, correct, weights))


@stated("area under errors accepted / n against coverage, trapezoid from (0, 0)", interval=influence_interval(_augrc))
def augrc(confidence: Rows, correct: Rows, *, weights: Rows | None = None) -> Float[Array, ""]:
    """Area under the generalised risk-coverage curve: int P(error and accepted) = (1 - AUROC) r (1 - r) + r^2 / 2.

    r is the error rate, AUROC that of correctness. In [0, 1/2]; lower is better; exact with ties, and defined without
    errors (0) or without right predictions (1/2). Interval: by influence.

    Args:
        confidence: higher = accepted first; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.
    Source: Traub et al. 2024.
    """
    return read(_augrc, ranked(confidence, correct, weights))


@stated(
    "area of selective accuracy over rejections, random = 0, best order = 1; ties in random order",
    better="higher",
    interval=influence_interval(_rejection_ratio),
)
def prediction_rejection_ratio(
    confidence: Rows, correct: Rows, *, weights: Rows | None = None, max_rejection: float = 1.0
) -> Float[Array, ""]:
    """Prediction-rejection ratio (A - A_random) / (A_best - A_random), A the mean accuracy of what is kept.

    The mean is over k = 1..n rows kept, or the last floor(max_rejection n) of these: (r - AURC) / (r - least AURC) for
    all. At most 1; higher is better; 0 = no better than rejecting at random. The other ratio of this name, with areas of
    errors kept / n, is 2 AUROC - 1. NaN where all or none are right. Interval: by influence.

    Args:
        confidence: higher = rejected later; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.
        max_rejection: largest share rejected, in (0, 1]; language-model benchmarks use 0.5.

    Raises:
        ValueError: for a share outside (0, 1].
    Source: Malinin, Mlodozeniec and Gales 2020 (recalled, formula not checked against the paper); areas as lm-polygraph.
    """
    return read(
        _rejection_ratio,
        ranked(confidence, correct, weights),
        max_rejection=_share("max_rejection", max_rejection, 1.0),
    )


@stated(
    f"the ceil(coverage n) most confident rows; ties in random order; {DRAWN}",
    order_statistic=True,
    interval=resampling_interval(_risk_at_coverage),
)
def risk_at_coverage(
    confidence: Rows, correct: Rows, *, weights: Rows | None = None, coverage: float = 0.8
) -> Float[Array, ""]:
    """Selective risk at a coverage: share of errors among the ceil(coverage n) most confident rows.

    In [0, 1]; lower is better. An order statistic, whose interval is by resampling.

    Args:
        confidence: higher = accepted first; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.
        coverage: least share of rows accepted, in (0, 1].

    Raises:
        ValueError: for a coverage outside (0, 1].
    Source: Geifman and El-Yaniv 2017.
    """
    return read(_risk_at_coverage, ranked(confidence, correct, weights), coverage=_share("coverage", coverage, 0.8))


@stated(
    f"greatest k / n, over all k; 0 if none; ties in random order; {DRAWN}",
    better="higher",
    order_statistic=True,
    interval=resampling_interval(_coverage_at_risk),
)
def coverage_at_risk(
    confidence: Rows, correct: Rows, *, weights: Rows | None = None, risk: float = 0.05
) -> Float[Array, ""]:
    """Coverage at a risk: the greatest k / n whose k most confident rows have a share of errors of at most `risk`.

    In [0, 1]; higher is better; 0 where no k does. All k are looked at, since the risk need not grow with k. An order
    statistic, whose interval is by resampling.

    Args:
        confidence: higher = accepted first; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.
        risk: in [0, 1].

    Raises:
        ValueError: for a risk outside [0, 1].
    Source: Geifman and El-Yaniv 2017.
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"`risk` must lie in [0, 1], got {risk!r}. The usual choice is 0.05.")
    return read(_coverage_at_risk, ranked(confidence, correct, weights), risk=risk)


class RiskCoverage(NamedTuple):
    """A risk-coverage curve as numbers, each array (thresholds,), the strictest threshold first."""

    coverage: np.ndarray
    risk: np.ndarray  # share of errors among what is accepted
    generalised_risk: np.ndarray  # errors accepted / n
    threshold: np.ndarray  # rows of at least this confidence are accepted


def risk_coverage_curve(confidence: Rows, correct: Rows, *, weights: Rows | None = None) -> RiskCoverage:
    """Coverage, selective risk and generalised risk at every distinct confidence as threshold. Host only.

    Args:
        confidence: higher = accepted first; any score will do.
        correct: whether each prediction was right.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for NaN, outcomes other than 0 and 1, or no row of positive weight.
    """
    scores, kept = np.asarray(confidence), slice(None) if weights is None else np.asarray(weights) != 0
    groups = ranked(scores, np.asarray(correct), None if weights is None else np.asarray(weights))
    if np.isnan(groups.through).any():
        raise ValueError(
            "`confidence` must be free of NaN, with `correct` 0 or 1 and at least one row of positive weight, got "
            f"{len(scores)} rows that are not. Find out which rows they are."
        )
    errors, total = groups.negatives().positive_through, groups.totals()[0]
    curve = groups.through / total, errors / groups.through, errors / total, np.unique(scores[kept])[::-1]
    return RiskCoverage(*map(np.asarray, curve))


def _share(name, value, usual):
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must lie in (0, 1], got {value!r}. The usual choice is {usual}.")
    return value
