"""Exact order statistics: the threshold of every conformal method."""

from fractions import Fraction
from functools import cache, partial
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.types import Array


def check_alpha(alpha) -> float:
    """`alpha` as a float.

    Raises:
        ValueError: unless it is a number in (0, 1).
    """
    if not isinstance(alpha, Real) or not 0 < float(alpha) < 1:
        raise ValueError(
            f"`alpha` must be the miscoverage wanted, a number in (0, 1), got {alpha!r}. 0.1 gives 90 % coverage."
        )
    return float(alpha)


def rank(rows: int, alpha: float) -> int:
    """k = ceil((rows + 1)(1 - alpha)) in exact arithmetic: which smallest score is the threshold. rows + 1 = none is.

    `alpha` is read as the decimal number it prints as: 0.1 is one tenth.
    """
    wanted = (rows + 1) * (1 - Fraction(repr(check_alpha(alpha))))
    return -(-wanted.numerator // wanted.denominator)


def ranks(most: int, alpha: float) -> np.ndarray:
    """`rank` of 0, 1, ..., `most` rows, int32: for groups whose size is not known beforehand."""
    miss = Fraction(repr(check_alpha(alpha)))
    p, q = miss.numerator, miss.denominator  # whole numbers of Python, which do not overflow
    return np.array([n - n * p // q for n in range(1, most + 2)], np.int32)


def order_statistic(scores: Float[Array, "rows *shape"], k: int) -> Float[jax.Array, "*shape"]:
    """The k-th smallest score along the first axis, counted from 1; +infinity where k exceeds the rows. NaN scores last.

    Args:
        scores: nonconformity, higher = stranger.
        k: from `rank`.
    """
    if k > scores.shape[0]:
        return jnp.full(scores.shape[1:], jnp.inf, scores.dtype)
    return jnp.sort(jnp.asarray(scores), axis=0)[k - 1]


def smallest_alpha(rows: int) -> float:
    """1 / (rows + 1): with less, the threshold is infinite and every set is everything."""
    return 1 / (rows + 1)


def weighted_threshold(
    scores: Float[Array, "rows"], weights: Float[Array, "rows"], own: Float[Array, "*batch"], alpha: float
) -> Float[jax.Array, "*batch"]:
    """inf{t : sum_i w_i 1[s_i <= t] >= (1 - alpha)(sum_i w_i + w)}, +infinity where there is none.

    On the host, in float64: with equal weights it is the k-th smallest score of `rank`, exactly. Sums that differ by less
    than one part in 10^12 count as equal.

    Args:
        scores: nonconformity of the calibration rows. NaN counts as the strangest.
        weights: of the calibration rows, non-negative: density ratio new / old, up to a factor. NaN, a negative one, or
            nothing but zeros give NaN.
        own: weight of each new row, in the same unit. NaN or a negative one gives NaN.
        alpha: miscoverage.
    Source: Tibshirani et al. 2019, lemma 3 and equation 9 (recalled).
    """
    scores, weights, own = (jnp.asarray(x) for x in (scores, weights, own))
    shape = jax.ShapeDtypeStruct(own.shape, scores.dtype)
    return jax.pure_callback(_at_level(check_alpha(alpha)), shape, scores, weights, own, vmap_method="expand_dims")


@cache  # the same function again, so that its program is compiled once
def _at_level(alpha: float):
    return partial(_reached, float(1 - Fraction(repr(alpha))))


def _reached(keep: float, *arrays) -> np.ndarray:
    """`weighted_threshold` of arrays with any number of axes before their own."""
    scores, weights, own = (np.asarray(x) for x in arrays)
    axes = scores.ndim - 1
    lead = np.broadcast_shapes(scores.shape[:-1], weights.shape[:-1], own.shape[:axes])
    scores, weights = (np.broadcast_to(x, (*lead, x.shape[-1])) for x in (scores, weights))
    own = np.broadcast_to(own, (*lead, *own.shape[axes:])).astype(np.float64)
    thresholds = np.empty(own.shape, scores.dtype)
    for place in np.ndindex(lead):
        order = np.argsort(scores[place])
        total = np.cumsum(weights[place][order], dtype=np.float64)
        wanted = keep * (total[-1] + own[place])
        found = np.append(scores[place][order], np.inf)[np.searchsorted(total, wanted * (1 - 1e-12))]
        usable = (own[place] >= 0) & (total[-1] > 0) & (weights[place] >= 0).all()
        thresholds[place] = np.where(usable, found, np.nan)
    return thresholds
