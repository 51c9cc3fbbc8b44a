"""Calibration errors of many histograms at once: one per class, per predicted label, or per group of rows."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from bayescal.binning import Closed, Histogram, bin_index, check_bins, histogram, namespace
from bayescal.metrics.binfree import ROUNDING
from bayescal.metrics.calibration import bin_shares, check_norm, norm_interval, norm_of_gaps, norm_words
from bayescal.metrics.events import Outcome, RowWeights, class_probs
from bayescal.metrics.likelihood import check_rows
from bayescal.types import Array, Metric

CLASSES_AT_ONCE = 16  # bounds the memory for many classes


@cache
def classwise_calibration_error(
    *, num_bins: int = 15, norm: float = 1, closed: Closed = "right", debiased: bool = False, threshold: float = 0.0
) -> Metric:
    """Classwise (static, marginal) calibration error: (1/C sum_k error_k^norm)^(1 / norm), error_k that of P(class k).

    error_k = (sum_b n_kb / n |confidence_kb - frequency_kb|^norm)^(1 / norm), of the event that y = k. In [0, 1]; lower
    is better; shrinks with the number of classes, most of whose probabilities are small. Classes that no target has
    still count. The sums are a `Histogram` of shape (classes, bins). Interval: by test inversion, the
    wider end of two: all bins of all classes at once, as if classes were independent, and the mean of each class's
    ends, as if they erred together. Classes share their rows, and the truth lies between. None for the maximum.

    Args:
        num_bins: bins of equal width on [0, 1].
        norm: 1 = SCE, 2 = root mean square, `float("inf")` = the largest gap of any class and bin.
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.
        debiased: as in `calibration_error`, class by class; for norm 2 each class is at least 0, as in Kumar's code.
        threshold: only probabilities above it count (0 = all), n being each class's own number of those: TACE, but for bins of
            equal width. A class that is never forecast above it adds 0.

    Raises:
        ValueError: for a norm below 1, debiasing one other than 1 and 2, a threshold outside [0, 1).
    Source: Nixon et al. 2019 (SCE, TACE); Kull et al. 2019 (classwise ECE); Kumar, Liang and Ma 2019 (marginal).
    """
    check_norm(norm, debiased)
    check_bins(num_bins, closed)
    if not 0 <= threshold < 1:
        raise ValueError(f"`threshold` must lie in [0, 1), got {threshold!r}. 0 leaves out none.")

    def compute(sums: Histogram):
        xp, there = namespace(sums.weight), sums.weight.sum(-1) > 0
        errors = xp.where(there, norm_of_gaps(sums, bin_shares(sums), norm, debiased), 0)
        error = errors.max() if norm == float("inf") else (errors**norm).mean() ** (1 / norm)
        return xp.where(there.any(), error, xp.nan)

    def interval(sums: Histogram):
        if norm == float("inf"):
            return None, None
        there = sums.weight.sum(-1) > 0
        if not there.any():
            return None, None
        flat = Histogram(*(x[there].reshape(-1) for x in sums))
        together = norm_interval(flat, (bin_shares(sums)[there] / there.sum()).reshape(-1), norm)
        each = [Histogram(*(x[k] for x in sums)) for k in np.flatnonzero(there)]
        apart = (np.array([norm_interval(one, bin_shares(one), norm) for one in each]) ** norm).mean(0) ** (1 / norm)
        scale = there.mean() ** (1 / norm)
        return scale * min(together[0], apart[0]), scale * max(together[1], apart[1])

    words = f"mean over all classes; {num_bins} equal-width bins closed on the {closed}; {norm_words(norm, debiased)}"
    words += f"; probabilities above {threshold:g}" if threshold else ""
    return Metric(_per_class(num_bins, closed, threshold), compute, interval, words, regular=False)


@cache
def top_label_conditional_calibration_error(
    *, num_bins: int = 15, norm: float = 1, closed: Closed = "right", debiased: bool = False
) -> Metric:
    """Top-label-conditional calibration error: sum_l n_l / n ECE(rows whose predicted label is l).

    (sum_l sum_b n_lb / n |confidence_lb - accuracy_lb|^norm)^(1 / norm). In [0, 1]; lower is better; at least the ECE of
    the same bins. Each label weighs by how often it is predicted (an unweighted mean would let rare ones rule). The sums are a
    `Histogram` of shape (classes, bins). Interval: by test inversion, as that of `calibration_error`.

    Args:
        num_bins: bins of equal width on [0, 1].
        norm: 1, 2 = root mean square, `float("inf")` = the largest gap of any label and bin.
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.
        debiased: as in `calibration_error`.

    Raises:
        ValueError: for a norm below 1, debiasing one other than 1 and 2.
    Source: Gupta and Ramdas 2022.
    """
    check_norm(norm, debiased)
    check_bins(num_bins, closed)

    def flat(sums: Histogram) -> Histogram:
        return Histogram(*(x.reshape(-1) for x in sums))

    return Metric(
        _per_label(num_bins, closed),
        lambda sums: norm_of_gaps(flat(sums), bin_shares(flat(sums)), norm, debiased),
        lambda sums: norm_interval(flat(sums), bin_shares(flat(sums)), norm),
        f"within each predicted label, weighted by its rows; {num_bins} equal-width bins closed on the {closed}; "
        f"{norm_words(norm, debiased)}",
        regular=False,
    )


class GroupErrors(NamedTuple):
    """Calibration errors of groups of rows, float64 on the host.

    errors: of each group, NaN where it has no rows.
    weights: total weight of each group's rows.
    maximum: the largest of the errors.
    mean: their mean, weighted by the groups' weights.
    multicalibration: the largest, over groups and bins, of |gap| times the bin's share of all rows.
    """

    errors: Float[np.ndarray, "groups"]
    weights: Float[np.ndarray, "groups"]
    maximum: float
    mean: float
    multicalibration: float


def group_calibration_error(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    groups: Integer[Array, "batch"] | Bool[Array, "batch groups"],
    *,
    weights: RowWeights = None,
    num_bins: int = 15,
    norm: float = 1,
    closed: Closed = "right",
) -> GroupErrors:
    """Calibration error within each group, (sum_b n_gb / n_g |gap_gb|^norm)^(1 / norm), with maximum and mean over groups.

    In [0, 1]; lower is better. Biased upwards, by about sqrt(num_bins / n_g), most in small groups: read their errors
    with their weights. Host only.

    Args:
        probability: of each event, in [0, 1]; for the top label its confidence.
        outcome: 1 where it happened, else 0.
        groups: label 0, 1, 2, ... of each row; or columns of membership, for slices that overlap.
        weights: of each row; None = all alike.
        num_bins: bins of equal width on [0, 1].
        norm: as in `calibration_error`.
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.

    Raises:
        ValueError: for other shapes, no rows, labels below 0, what is no probability, a norm below 1.
    Source: Hébert-Johnson et al. 2018 (multicalibration).
    """
    check_norm(norm, debiased=False)
    probability, outcome, groups = np.asarray(probability), np.asarray(outcome, np.float64), np.asarray(groups)
    weights = np.ones(len(probability)) if weights is None else np.asarray(weights, np.float64)
    probability = np.where((probability > 1) & (probability <= 1 + ROUNDING), 1, probability)  # a pool in float32
    _check_groups(probability, outcome, groups, weights)
    in_bin = np.asarray(bin_index(probability.astype(np.float32), num_bins, closed))
    if groups.ndim == 1:
        row, group, number = np.arange(len(groups)), groups.astype(np.int64), int(groups.max()) + 1
    else:
        (row, group), number = np.nonzero(groups), groups.shape[1]
    index, gap = group * num_bins + in_bin[row], probability - outcome
    columns = (np.ones_like(gap), gap, probability, gap**2, weights)
    sums = [np.bincount(index, (weights * x)[row], number * num_bins).reshape(number, num_bins) for x in columns]
    errors = np.asarray(norm_of_gaps(Histogram(*sums), bin_shares(Histogram(*sums)), norm))
    mass = sums[0].sum(-1)
    return GroupErrors(
        errors,
        mass,
        float(np.nanmax(errors)),
        float(np.nansum(mass * errors) / mass.sum()),
        float(abs(sums[1]).max() / weights.sum()),
    )


@cache  # one function for all norms: `evaluate` then measures once
def _per_class(num_bins: int, closed: Closed, threshold: float):
    def measure(pred, targets, weights) -> Histogram:
        check_rows(weights.shape[0])
        probs = class_probs(pred)

        def one(label):
            forecast = probs[:, label]
            counted = weights if threshold == 0 else jnp.where(forecast > threshold, weights, 0)
            outcome = (targets == label).astype(probs.dtype)
            return histogram(forecast, outcome, counted, num_bins=num_bins, closed=closed)

        return jax.lax.map(one, jnp.arange(probs.shape[-1]), batch_size=CLASSES_AT_ONCE)

    return measure


@cache
def _per_label(num_bins: int, closed: Closed):
    def measure(pred, targets, weights) -> Histogram:
        check_rows(weights.shape[0])
        confidence, label = pred.top_label()
        correct = (label == targets).astype(confidence.dtype)
        sums = partial(histogram, num_bins=num_bins, closed=closed, groups=label)
        return sums(confidence, correct, weights, num_groups=class_probs(pred).shape[-1])

    return measure


def _check_groups(probability, outcome, groups, weights) -> None:
    rows = probability.shape
    wanted = (groups.ndim == 1 and np.issubdtype(groups.dtype, np.integer)) or (
        groups.ndim == 2 and groups.dtype == bool
    )
    if len(rows) != 1 or not rows[0] or outcome.shape != rows or weights.shape != rows or groups.shape[:1] != rows:
        raise ValueError(
            "`probability`, `outcome`, `groups` and `weights` must have the same number of rows, at least one, got shapes "
            f"{rows}, {outcome.shape}, {groups.shape} and {weights.shape}. Pass one of each per event."
        )
    if not wanted or (not groups.any() and groups.ndim == 2) or (groups.ndim == 1 and groups.min() < 0):
        raise ValueError(
            f"`groups` must be labels 0, 1, 2, ... or boolean columns (rows, groups) with members, got {groups.dtype} of shape "
            f"{groups.shape}. `np.unique(labels, return_inverse=True)` numbers labels."
        )
    if not ((probability >= 0) & (probability <= 1)).all():
        worst = probability[~((probability >= 0) & (probability <= 1))][0]
        raise ValueError(f"`probability` must lie in [0, 1], got {worst:g}. Pass probabilities, not logits.")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"`weights` must be finite and non-negative, not all zero, got a smallest of {weights.min():g}. Leave them out "
            "for rows that are all alike."
        )
