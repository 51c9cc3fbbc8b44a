"""Exact order statistics: the threshold of every conformal method."""

from fractions import Fraction
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.predictive import undefined_where
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

    The sum on the left may lack what float32 rounds off, a few parts in a million of the total. With all weights one it is
    the k-th smallest score of `rank`: exactly for up to 2,000 rows and alphas of two decimals.

    Args:
        scores: nonconformity of the calibration rows. NaN counts as the strangest.
        weights: of the calibration rows, non-negative: density ratio new / old, up to a factor.
        own: weight of each new row, in the same unit. NaN gives NaN.
        alpha: miscoverage.
    Source: Tibshirani et al. 2019, lemma 3 and equation 9 (recalled).
    """
    scores, weights, own = (jnp.asarray(x) for x in (scores, weights, own))
    order = jnp.argsort(scores)
    total = jnp.cumsum(weights[order])
    wanted = (1 - check_alpha(alpha)) * (total[-1] + own)
    slack = float(np.finfo(np.float32).eps) * (scores.shape[0].bit_length() + 3)  # of a sum taken pair by pair
    place = jnp.searchsorted(total, wanted * (1 - slack), side="left")
    return undefined_where(jnp.isnan(wanted), jnp.append(scores[order], jnp.inf)[place])
