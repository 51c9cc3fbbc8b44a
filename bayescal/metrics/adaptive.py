"""Calibration metrics whose bins follow the data: equal mass, swept, and by class. Whole columns, not sums."""

from functools import cache, partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.binning import Histogram, check_bins, histogram
from bayescal.metrics.calibration import (
    bin_shares,
    check_norm,
    debiased_squares,
    norm_interval,
    norm_of_gaps,
    norm_words,
    squared_calibration_error,
)
from bayescal.metrics.events import Outcome, RowWeights, check_values, class_probs
from bayescal.metrics.whole import stated
from bayescal.predictive import float32_or_wider
from bayescal.types import Array, WholeMetric

Ties = Literal["grouped", "rank"]
Scalar = Float[Array, ""]


def equal_mass_histogram(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    weights: RowWeights = None,
    num_bins: int = 15,
    ties: Ties = "grouped",
) -> Histogram:
    """Sums per bin of equal mass, in order of probability: `bayescal.binning.reliability` makes a diagram of it.

    Whatever the row order. Bins may be empty where there are fewer distinct probabilities than bins, or many ties.

    Args:
        probability: given to the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: non-negative; None = all alike.
        num_bins: bins of equal mass.
        ties: "grouped" never parts equal probabilities: those whose weights reach from A to B of the total T, in order,
            are in bin floor(num_bins (A + B) / 2T), and a weight is a repetition. "rank" gives all bins the same number of
            rows, or one more in the first ones (`array_split`), whatever the rows weigh; equal probabilities that a
            cut parts are shared out in proportion, which is their mean over all orders of rows.

    Raises:
        ValueError: for columns of different shapes, a number of bins below 1, another word for `ties`.
    """
    check_columns(probability, outcome, weights)
    check_values(probability, outcome, weights)
    return _equal_mass(probability, outcome, weights, num_bins, ties)


def _equal_mass_interval(probability, outcome, *, norm=1, debiased=False, **settings):
    del debiased  # the interval is for the norm of the true gaps, whatever its estimate
    sums = _on_host(equal_mass_histogram(probability, outcome, **settings))
    return norm_interval(sums, bin_shares(sums), norm)


@stated(
    "equal-mass bins",
    regular=False,
    interval=_equal_mass_interval,
)
def equal_mass_calibration_error(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    weights: RowWeights = None,
    num_bins: int = 15,
    norm: float = 1,
    ties: Ties = "grouped",
    debiased: bool = False,
) -> Scalar:
    """Adaptive calibration error: (sum_b n_b / n |confidence_b - accuracy_b|^norm)^(1 / norm) over bins of equal mass.

    In [0, 1]; lower is better; NaN without rows. Biased upwards, by about sqrt(num_bins / n), unless `debiased`; that may
    then be slightly negative for norm 1, and is 0 for norm 2 where its square is negative
    (`squared_equal_mass_calibration_error` keeps the sign). Interval: by inversion of a test, for the norm of the bins'
    true gaps.

    Args:
        probability, outcome, weights, num_bins, ties: see `equal_mass_histogram`.
        norm: 1 = ECE, 2 = root mean square, `float("inf")` = largest gap.
        debiased: take off the mean that noise alone adds: for norm 2, accuracy (1 - accuracy) / (n_b - 1) from each
            squared gap, and bins of one row count 0; for norm 1, twice the error less the folded normal's mean. n_b
            is Kish's number of rows.

    Raises:
        ValueError: as `equal_mass_histogram`, for a norm below 1, and for a debiased norm other than 1 and 2.
    Source: Nixon et al. 2019; Roelofs et al. 2022; debiased Kumar, Liang and Ma 2019.
    """
    check_norm(norm, debiased)
    sums = equal_mass_histogram(probability, outcome, weights=weights, num_bins=num_bins, ties=ties)
    return norm_of_gaps(sums, bin_shares(sums), norm, debiased)


def _square_interval(probability, outcome, **settings):
    interval = squared_calibration_error().interval
    assert interval is not None
    return interval(_on_host(equal_mass_histogram(probability, outcome, **settings)))


@stated(
    "equal-mass bins, debiased squared gaps, signed",
    interval=_square_interval,
)
def squared_equal_mass_calibration_error(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    weights: RowWeights = None,
    num_bins: int = 15,
    ties: Ties = "grouped",
) -> Scalar:
    """Debiased squared error: sum_b n_b / n ((confidence_b - accuracy_b)^2 - accuracy_b (1 - accuracy_b) / (n_b - 1)).

    In [-1, 1]; lower is better; about unbiased for the squared gaps of the bins, so negative half of the time where those are
    0. Bins of one row count 0. NaN without rows. Interval: score interval around the estimate.

    Args:
        probability, outcome, weights, num_bins, ties: see `equal_mass_histogram`.

    Raises:
        ValueError: as `equal_mass_histogram`.
    Source: Kumar, Liang and Ma 2019; the same idea in Bröcker 2012, Ferro and Fricker 2012 (recalled, formula not
        checked against the papers).
    """
    sums = equal_mass_histogram(probability, outcome, weights=weights, num_bins=num_bins, ties=ties)
    return (bin_shares(sums) * debiased_squares(sums)).sum()


def nixon_calibration_error(
    probs: Float[Array, "batch classes"],
    targets: Int[Array, "batch"],
    *,
    weights: RowWeights = None,
    num_bins: int = 15,
    threshold: float = 0.0,
    norm: float = 1,
    ties: Ties = "grouped",
    debiased: bool = False,
) -> Scalar:
    """Nixon's ACE: `equal_mass_calibration_error` of each class's probability, mean over classes; TACE with a threshold.

    (mean_k error_k^norm)^(1 / norm), in [0, 1]; lower is better; NaN without rows. A class that is never forecast above
    the threshold adds 0, and classes absent from the targets count. Not the ACE of Neumann et al. 2018, an unweighted
    mean over bins.

    Args:
        probs: of every class.
        targets: the true class.
        weights: of each row; None = all alike.
        num_bins: bins of equal mass, for each class its own.
        threshold: only probabilities above it are binned, and they are the whole of a class's weight; 0.01 in the paper.
        norm: 1 = the paper's; 2 = the "marginal" error of Kumar et al., whose debiased classes are each at least 0.
        ties, debiased: see `equal_mass_calibration_error`.

    Raises:
        ValueError: as `equal_mass_calibration_error`, for a threshold outside [0, 1), a norm of infinity.
    Source: Nixon et al. 2019; norm 2 Kumar, Liang and Ma 2019.
    """
    check_norm(norm, debiased)
    if not 0 <= threshold < 1:
        raise ValueError(f"`threshold` must lie in [0, 1), got {threshold!r}. The usual is 0.01, or 0 for all rows.")
    if norm == float("inf"):
        raise ValueError("`norm` must be finite for a mean over classes, got inf. The usual are 1 and 2.")
    probs, targets = jnp.asarray(probs), jnp.asarray(targets)
    if probs.ndim != 2 or targets.shape != probs.shape[:1]:
        raise ValueError(
            f"`probs` and `targets` must have shapes (rows, classes) and (rows,), got {probs.shape} and "
            f"{targets.shape}. For one event use `equal_mass_calibration_error`."
        )
    if weights is not None:
        check_columns(probs[:, 0], targets, weights)
    plain = jnp.ones(len(targets)) if weights is None else jnp.asarray(weights)

    def of_class(label):  # one after another: a class needs several columns of memory
        probability = probs[:, label]
        kept = weights if threshold == 0 else jnp.where(probability > threshold, plain, 0)
        happened = (targets == label).astype(probability.dtype)
        sums = _equal_mass(probability, happened, kept, num_bins, ties)
        error = norm_of_gaps(sums, bin_shares(sums), norm, debiased)
        return jnp.where(sums.weight.sum() > 0, error**norm, 0.0)

    errors = jax.lax.map(of_class, jnp.arange(probs.shape[1]))
    return jnp.where((plain > 0).any(), errors.mean() ** (1 / norm), jnp.nan)


@cache
def classwise_equal_mass_calibration_error(
    *,
    num_bins: int = 15,
    threshold: float = 0.0,
    norm: float = 1,
    ties: Ties = "grouped",
    debiased: bool = False,
) -> WholeMetric:
    """`nixon_calibration_error` of the pool's class probabilities, as a metric for `evaluate`: ACE, with a threshold TACE.

    In [0, 1]; lower is better. No interval: the classes' bins share their rows.

    Args:
        num_bins, threshold, norm, ties, debiased: see `nixon_calibration_error`.
    Source: Nixon et al. 2019.
    """

    def compute(probs, targets, weights):
        return nixon_calibration_error(
            probs,
            targets,
            weights=weights,
            num_bins=num_bins,
            threshold=threshold,
            norm=norm,
            ties=ties,
            debiased=debiased,
        )

    words = f"mean over all classes; {num_bins} equal-mass bins, ties {ties}; {norm_words(norm, debiased)}"
    words += f"; probabilities above {threshold:g}" if threshold else ""
    return WholeMetric(_class_columns, compute, None, words, regular=False)


def _class_columns(pred, targets):
    return class_probs(pred), jnp.asarray(targets)


@partial(jax.jit, static_argnames=("num_bins", "ties"))
def _equal_mass(probability, outcome, weights, num_bins: int, ties: Ties) -> Histogram:
    check_bins(num_bins)
    if ties not in get_args(Ties):
        raise ValueError(
            f"`ties` must be 'grouped' or 'rank', got {ties!r}. 'grouped' never parts equal probabilities."
        )
    n, cells = len(probability), 2 * num_bins - 1
    if not n:
        return Histogram(*5 * (jnp.zeros(num_bins),))
    probability, outcome = float32_or_wider(probability), float32_or_wider(outcome)
    # Only the groups of ties that hold a cut can lie in two bins. With each of them in a cell of its own, and a cell for
    # what is between two cuts, the bins are sums of cells, and nothing but M - 1 probabilities depends on ranks.
    step = jnp.arange(num_bins + 1)
    if weights is None:
        weights = jnp.ones(n)
        mass, total, ordered, reached = weights.astype(jnp.int32), n, jnp.sort(probability), None
    else:
        mass = weights if ties == "grouped" else (weights > 0).astype(jnp.int32)
        order = jnp.argsort(probability)
        ordered, reached = probability[order], jnp.cumsum(mass[order])
        total = reached[-1]
    if jnp.issubdtype(mass.dtype, jnp.floating):
        cuts = step * total / num_bins
    else:  # no product of a count and a bin, which could overflow
        rest = step * (total % num_bins) // num_bins if ties == "grouped" else jnp.minimum(step, total % num_bins)
        cuts = step * (total // num_bins) + rest
    rows = cuts[1:-1] if reached is None else jnp.searchsorted(reached, cuts[1:-1], side="right")
    edges = ordered[jnp.clip(rows, 0, n - 1)]
    method = "compare_all" if num_bins < 100 else "scan"
    first, last = (jnp.searchsorted(edges, probability, side=side, method=method) for side in ("left", "right"))
    sums = histogram(probability, outcome, weights, num_bins=1, groups=first + last, num_groups=cells)
    held = jnp.zeros(cells, mass.dtype).at[first + last].add(mass)
    start = jnp.where(jnp.tri(cells, k=-1, dtype=bool), held, 0).sum(-1)
    end = start + held
    if ties == "grouped":
        place = ((start + end).astype(jnp.float32) * num_bins / (2.0 * total)).astype(jnp.int32)
        share = jnp.clip(place, 0, num_bins - 1) == jnp.arange(num_bins)[:, None]
    else:
        overlap = jnp.minimum(end, cuts[1:, None]) - jnp.maximum(start, cuts[:-1, None])
        share = jnp.maximum(overlap, 0) / jnp.maximum(held, 1)  # whole numbers
    share = jax.lax.stop_gradient(share.astype(probability.dtype))
    return Histogram(*(jnp.matmul(share, x[:, 0], precision="highest") for x in sums))


def _on_host(sums: Histogram) -> Histogram:
    return Histogram(*(np.asarray(x, np.float64) for x in sums))


def check_columns(probability, outcome, weights) -> None:
    """Raises for columns that would be broadcast against each other."""
    shapes = [np.shape(x) for x in (probability, outcome, weights) if x is not None]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(
            f"`probability`, `outcome` and `weights` must be one axis of the same length, got {shapes}. "
            "Flatten them row by row."
        )
