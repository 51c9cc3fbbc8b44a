"""Kernel calibration errors: sums over pairs of rows, of yes-or-no events, of all classes, of neighbours in feature space."""

import math
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.binning import Closed, bin_index, check_bins
from bayescal.metrics.binfree import CalibrationTest, columns
from bayescal.metrics.events import Events, Outcome, RowWeights, class_probs
from bayescal.metrics.whole import stated
from bayescal.types import Array, Key

PAIRS_AT_ONCE = 2**22  # 16 MiB of float32 for each array of pairs
MEDIAN_ROWS = 1024


class LocalCalibrationError(NamedTuple):
    """Mean over rows (LCE) and maximum (MLCE) of the gap in each row's neighbourhood, in [0, 1]."""

    mean: Float[jax.Array, ""]
    maximum: Float[jax.Array, ""]


@cache
def all_classes() -> Events:
    """What the metrics of whole probability vectors read: the pool's probabilities of all classes, and the target."""
    return Events(lambda pred, targets: (class_probs(pred), targets), "all classes")


@stated("Laplace kernel of the probability", regular=False)
def mmce(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    weights: RowWeights = None,
    width: float = 0.4,
    estimator: Literal["V", "U"] = "V",
) -> Float[jax.Array, ""]:
    """Maximum mean calibration error sqrt((1/n^2) sum_ij (y_i - p_i)(y_j - p_j) exp(-|p_i - p_j| / width)).

    In [0, 1]; lower is better. In n log n: on sorted probabilities the kernel is that of a Markov chain, and the double
    sum is one of n non-negative terms, whatever the width, exact with ties.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: of each row; None = all alike.
        width: of the kernel.
        estimator: "V" is the formula above, biased upwards by about 1 / n under its root; "U" leaves out i = j, divides
            by n (n - 1) and takes *no* root: unbiased, and negative about half the time for calibrated data. With
            weights its pairs are of different rows: a weight is not a repetition.

    Raises:
        ValueError: for a width that is not positive, another estimator, other shapes or no rows.
    Source: Kumar, Sarawagi and Jain 2018.
    """
    _check_positive("width", width, "0.4 is that of Kumar et al. 2018")
    _check_choice("estimator", estimator, ("V", "U"))
    p, y, w = columns(probability, outcome, weights)
    order = jnp.argsort(p)
    gap, step = (w * (y - p))[order], jnp.diff(p[order]) / width
    # What a row adds to the chain's tail, given the row before, has variance 1 - decay^2: nothing, for a tie.
    tail = _tails(jnp.concatenate([jnp.exp(-step), jnp.zeros(1, p.dtype)]), gap)
    fresh = jnp.concatenate([jnp.ones(1, p.dtype), -jnp.expm1(-2 * step)])
    total = (fresh * tail**2).sum()
    if estimator == "V":
        return jnp.sqrt(total) / w.sum()
    return (total - (gap**2).sum()) / (w.sum() ** 2 - (w**2).sum())


@stated("kernel exp(-total variation / bandwidth) times the identity", regular=False)
def skce(
    probs: Float[Array, "batch classes"],
    targets: Int[Array, "batch"],
    *,
    weights: RowWeights = None,
    bandwidth: float | None = None,
    estimator: Literal["U", "V", "block"] = "U",
    block_size: int = 2,
) -> Float[jax.Array, ""]:
    """Squared kernel calibration error of all classes: mean over pairs of exp(-TV(p, p') / bandwidth) (e_y - p).(e_y' - p').

    Lower is better; 0 in expectation ("U", "block") where all probabilities are calibrated, not only the top one. TV is
    half the L1 distance. "V" is at most 2, and not negative. In n^2 time, in blocks of 2**22 pairs: memory does not
    grow with n^2.

    Args:
        probs: of the pool, rows that sum to one.
        targets: class indices.
        weights: of each row; None = all alike. In "U" and "block", pairs are of different rows: no repetition.
        bandwidth: None = `median_distance(probs)`.
        estimator: "U": pairs i != j, unbiased; "V": all pairs, biased upwards; "block": the mean of "U" over blocks of
            consecutive rows, in linear time, noisier, and dependent on the order of the rows, which must be random.
        block_size: rows of a block; rows left over are not used.

    Raises:
        ValueError: for another estimator, a bandwidth that is not positive, blocks of fewer than two rows or more than
            there are, other shapes or no rows.
    Source: Widmann, Lindsten and Zachariah 2019.
    """
    _check_choice("estimator", estimator, ("U", "V", "block"))
    probs, residual, w = _class_columns(probs, targets, weights)
    width = _bandwidth(bandwidth, probs, w)
    if estimator == "block":
        total, pairs = _blocks(probs, residual, w, width, block_size)
        return total.sum() / pairs.sum()
    reach = w * _row_sums(probs, residual, w[:, None], width)[:, 0]
    if estimator == "V":
        return reach.sum() / w.sum() ** 2
    own = w**2 * (residual**2).sum(-1)
    return (reach - own).sum() / (w.sum() ** 2 - (w**2).sum())


def median_distance(probs: Float[Array, "batch classes"], *, weights: RowWeights = None) -> Float[jax.Array, ""]:
    """Median of the total variation between two rows: the usual bandwidth of `skce`, in [0, 1].

    Over all pairs of up to 1,024 rows; of more, over the pairs of 1,024 rows at even steps along a fixed direction of
    probability space, which does not depend on their order. Rows of weight 0 are left out, other weights do not matter.

    Args:
        probs: rows that sum to one.
        weights: of each row; None = all alike.
    """
    probs = jnp.asarray(probs)
    present = jnp.ones(len(probs), bool) if weights is None else jnp.asarray(weights) > 0
    place = probs @ jnp.asarray(np.sqrt(np.arange(1, probs.shape[1] + 1)), probs.dtype)
    order = jnp.argsort(jnp.where(present, place, jnp.inf))
    taken, rows = min(len(probs), MEDIAN_ROWS), present.sum()
    index = jnp.arange(taken)
    step = jnp.maximum(rows / taken, 1)
    some = probs[order[jnp.minimum((index + 0.5) * step, len(probs) - 1).astype(int)]]
    known = index < rows
    pair = (index[:, None] < index) & known[:, None] & known
    distance = jnp.sort(jnp.where(pair, _total_variation(some, some), jnp.inf), axis=None)
    last = pair.sum() - 1
    median = (distance[last // 2] + distance[(last + 1) // 2]) / 2
    # Where most pairs are equal the least distance that is none; without any pair of different rows all widths are alike.
    least = jnp.where(distance > 0, distance, jnp.inf).min()
    median = jnp.where(median > 0, median, least)
    return jnp.where(jnp.isfinite(median), median, 1)


def skce_test(
    probs: Float[Array, "batch classes"],
    targets: Int[Array, "batch"],
    key: Key | None = None,
    *,
    bandwidth: float | None = None,
    estimator: Literal["U", "block"] = "block",
    block_size: int = 2,
    num_resamples: int = 1000,
) -> CalibrationTest:
    """Test that all class probabilities are calibrated, by `skce`; one-sided, large = miscalibrated. Host only.

    "block": sqrt(blocks) mean / standard deviation of the blocks, against the normal law; linear time, little power.
    "U": n^2 time per 1 and for each resample, more power; against the wild bootstrap of the degenerate U-statistic,
    sum over i != j of s_i s_j h_ij with random signs s, p = (1 + number at least as large) / (1 + resamples).

    Args:
        probs: of the pool, rows that sum to one.
        targets: class indices.
        key: for the signs of "U"; None for "block".
        bandwidth: None = `median_distance(probs)`.
        estimator: as in `skce`.
        block_size: rows of a block, consecutive: the order of the rows must be random.
        num_resamples: of "U".

    Returns:
        The statistic, the same over its standard deviation under calibration, and the p-value.

    Raises:
        ValueError: for another estimator, a key where none is used or none where one is, and as in `skce`.
    Source: Widmann, Lindsten and Zachariah 2019; the signs: Dehling and Mikosch 1994 (recalled, formula not checked
        against the paper).
    """
    _check_choice("estimator", estimator, ("U", "block"))
    if (key is None) == (estimator == "U"):
        raise ValueError(
            f"`key` must be given for the estimator 'U' and for no other, got {'none' if key is None else 'one'} for "
            f"{estimator!r}. Pass `jax.random.key(seed)` for 'U'."
        )
    probs, residual, w = _class_columns(probs, targets, None)
    width = _bandwidth(bandwidth, probs, w)
    if key is None:
        from scipy.special import ndtr  # slow to import

        total, pairs = (np.asarray(x, np.float64) for x in _blocks(probs, residual, w, width, block_size))
        mean, spread = (total / pairs).mean(), (total / pairs).std(ddof=1)
        scaled = mean / (spread / np.sqrt(len(total)))
        return CalibrationTest(float(mean), float(scaled), float(ndtr(-scaled)))
    signs = jax.random.rademacher(key, (len(probs), num_resamples), probs.dtype)
    sums = np.asarray(_signed_sums(probs, residual, jnp.concatenate([w[:, None], signs], 1), width), np.float64)
    sums = (sums - float((residual**2).sum())) / (len(probs) * (len(probs) - 1))
    exceed = (sums[1:] >= sums[0]).sum()
    return CalibrationTest(float(sums[0]), float(sums[0] / sums[1:].std()), float((1 + exceed) / (1 + num_resamples)))


def local_calibration_error(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    features: Float[Array, "batch features"],
    *,
    weights: RowWeights = None,
    gamma: float = 0.2,
    num_bins: int = 15,
    closed: Closed = "right",
) -> LocalCalibrationError:
    """Gap in each row's neighbourhood |sum_j k_ij (p_j - y_j) / sum_j k_ij|: its mean over rows (LCE) and maximum (MLCE).

    j runs over the rows of i's bin of probability, i among them; k_ij = exp(-||x_i - x_j||_1 / (features gamma)). In
    [0, 1]; lower is better. Both are biased upwards, the more the smaller gamma is: at gamma = 0 they are those of
    single rows. In n^2 time, in blocks of 2**22 pairs.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        features: of each row, on scales that may be added: standardise the columns before.
        weights: of each row; None = all alike.
        gamma: width of the neighbourhood, in mean absolute difference of features.
        num_bins: bins of equal width on [0, 1].
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.

    Raises:
        ValueError: for a gamma that is not positive, unusable bins, other shapes or no rows.
    Source: Luo et al. 2022 (recalled, formula not checked against the paper).
    """
    _check_positive("gamma", gamma, "0.2 suits standardised features")
    check_bins(num_bins)
    p, y, w = columns(probability, outcome, weights)
    x = jnp.asarray(features)
    if x.ndim != 2 or len(x) != len(p):
        raise ValueError(
            f"`features` must have shape ({len(p)}, features), got {x.shape}. Flatten all but the first axis."
        )
    x = jnp.where(w[:, None] == 0, 0, x)
    place = bin_index(p, num_bins, closed)

    def near(row):
        feature, own = row
        kernel = jnp.exp(-abs(x - feature).mean(-1) / gamma)
        return jnp.where((place == own) & (w > 0), w * kernel, 0) @ jnp.stack([p - y, jnp.ones_like(p)], -1)

    sums = jax.lax.map(near, (x, place), batch_size=_rows_at_once(len(p)))
    local = jnp.where(w > 0, abs(sums[:, 0] / sums[:, 1]), 0)
    return LocalCalibrationError((w * local).sum() / w.sum(), local.max())


def _tails(decay, gap):
    """tail_i = gap_i + decay_i tail_(i + 1), by sqrt(n) blocks at a time: compiles ten times faster than a parallel scan."""
    rows, size = len(gap), math.isqrt(len(gap) - 1) + 1
    decay, gap = (jnp.pad(x, (0, size * size - rows)).reshape(size, size) for x in (decay, gap))

    def back(after, row):
        tail, reach = row[1] + row[0] * after[0], row[0] * after[1]
        return (tail, reach), (tail, reach)

    start = jnp.zeros_like(gap[0]), jnp.ones_like(gap[0])
    (first, through), (tail, reach) = jax.lax.scan(back, start, (decay.T, gap.T), reverse=True)
    _, (whole_tail, _) = jax.lax.scan(back, (start[0][0], start[1][0]), (through, first), reverse=True)
    after = jnp.append(whole_tail[1:], 0)
    return (tail + reach * after).T.reshape(-1)[:rows]


def _rows_at_once(rows: int) -> int:
    return max(1, PAIRS_AT_ONCE // rows)


def _total_variation(rows, others):
    return abs(rows[..., :, None, :] - others[..., None, :, :]).sum(-1) / 2


def _row_sums(probs, residual, right, width):
    """sum_j h_ij right_j for every row i, (rows, columns of `right`)."""

    def one(row):
        own, gap = row
        return (jnp.exp(-abs(probs - own).sum(-1) / 2 / width) * (residual @ gap)) @ right

    return jax.lax.map(one, (probs, residual), batch_size=_rows_at_once(len(probs)))


@jax.jit
def _signed_sums(probs, residual, signs, width):
    return (signs * _row_sums(probs, residual, signs, width)).sum(0)


def _blocks(probs, residual, w, width, size):
    """Sums over the pairs within each block of h and of the pairs' weights, (blocks,)."""
    if not isinstance(size, int) or not 2 <= size <= len(probs):
        raise ValueError(
            f"`block_size` must be a whole number from 2 to the number of rows, {len(probs)}, got {size!r}. The usual choice "
            "is 2."
        )
    used = len(probs) // size * size
    probs, residual, w = (x[:used].reshape(-1, size, *x.shape[1:]) for x in (probs, residual, w))
    pairs = w[:, :, None] * w[:, None, :] * jnp.asarray(1 - np.eye(size), w.dtype)
    h = jnp.exp(-_total_variation(probs, probs) / width) * (residual @ residual.mT)
    return (pairs * h).sum((1, 2)), pairs.sum((1, 2))


def _bandwidth(bandwidth, probs, w):
    if bandwidth is None:
        return median_distance(probs, weights=w)
    _check_positive("bandwidth", bandwidth, "leave it out for the median distance")
    return jnp.asarray(bandwidth, probs.dtype)


def _class_columns(probs, targets, weights):
    """Probabilities, one-hot targets less probabilities, weights; floats."""
    p, y = jnp.asarray(probs), jnp.asarray(targets)
    p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
    w = jnp.ones(p.shape[:1], p.dtype) if weights is None else jnp.asarray(weights, p.dtype)
    if p.ndim != 2 or not p.size or y.shape != p.shape[:1] or w.shape != y.shape:
        raise ValueError(
            "`probs` must have shape (rows, classes), `targets` and `weights` (rows,), with at least one row, got "
            f"{p.shape}, {y.shape} and {w.shape}. Pool the members first."
        )
    p, y = jnp.where(w[:, None] == 0, 0, p), jnp.where(w == 0, 0, y)  # rows of weight 0 may hold anything
    return p, jax.nn.one_hot(y, p.shape[1], dtype=p.dtype) - p, w


def _check_positive(name, value, hint):
    if not value > 0 or value == float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}. {hint[0].upper()}{hint[1:]}.")


def _check_choice(name, value, choices):
    if value not in choices:
        listed = " or ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be {listed}, got {value!r}. The result's convention names it.")
