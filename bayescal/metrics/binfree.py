"""Calibration without bins: cumulative differences (Kolmogorov-Smirnov, Kuiper) and Spiegelhalter's test."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import proportion_variance
from bayescal.metrics.events import Outcome, RowWeights, check_values
from bayescal.metrics.whole import stated
from bayescal.types import Array

ROUNDING = 1e-6  # of probabilities in float32
SUP_95, RANGE_95 = 2.2414027273, 2.4976721610  # 95 % quantiles of the two laws below


class CalibrationTest(NamedTuple):
    """A test of calibration.

    statistic: in the metric's own unit.
    scaled: the same over its standard deviation under calibration.
    p_value: probability of at least this, were the probabilities right; small = miscalibrated.
    """

    statistic: float
    scaled: float
    p_value: float


def _ks_interval(probability, outcome, *, weights=None):
    return _band(_ks, SUP_95, probability, outcome, weights)


def _kuiper_interval(probability, outcome, *, weights=None):
    return _band(_kuiper, RANGE_95, probability, outcome, weights)


@stated("cumulative differences at distinct probabilities, D_0 = 0", regular=False, interval=_ks_interval)
def ks_error(
    probability: Float[Array, "batch"], outcome: Outcome, *, weights: RowWeights = None
) -> Float[jax.Array, ""]:
    """Kolmogorov-Smirnov calibration error max_t |D(t)|, D(t) = (1/n) sum over p_i <= t of (y_i - p_i).

    In [0, 1]; lower is better; about 1.25 sqrt(sum p (1 - p)) / n for calibrated data. Rows of equal probability are
    added before looking, so that their order does not matter. Interval: 95 % or more, from the law of the largest
    deviation of a Brownian motion that varies at least as much as D.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for other shapes or no rows.
    Source: Gupta et al. 2021.
    """
    return _ks(_cumulative(jnp, *columns(probability, outcome, weights)))


@stated("cumulative differences at distinct probabilities, D_0 = 0", regular=False, interval=_kuiper_interval)
def kuiper_error(
    probability: Float[Array, "batch"], outcome: Outcome, *, weights: RowWeights = None
) -> Float[jax.Array, ""]:
    """Kuiper calibration error (ECCE-R) max_t D(t) - min_t D(t), D(t) = (1/n) sum over p_i <= t of (y_i - p_i), D_0 = 0.

    The largest mean gap over an interval of probabilities, times the share of rows in it. In [0, 1]; lower is better;
    at least `ks_error` and at most twice it. Interval: 95 % or more, from the law of the range of a Brownian motion
    that varies at least as much as D.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for other shapes or no rows.
    Source: Arrieta-Ibarra et al. 2022 (ECCE).
    """
    return _kuiper(_cumulative(jnp, *columns(probability, outcome, weights)))


def ks_test(probability: Float[Array, "batch"], outcome: Outcome, *, weights: RowWeights = None) -> CalibrationTest:
    """Test of calibration by `ks_error` over sigma = sqrt(sum p (1 - p)) / n, under calibration sup |Brownian motion|.

    In float64. p-value for many rows; NaN where every probability is 0 or 1 and right. Host only.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for other shapes, no rows, or what is no probability.
    Source: Gupta et al. 2021; Arrieta-Ibarra et al. 2022 (the scale).
    """
    return _cumulative_test(_ks, brownian_sup_p_value, probability, outcome, weights)


def kuiper_test(probability: Float[Array, "batch"], outcome: Outcome, *, weights: RowWeights = None) -> CalibrationTest:
    """Test of calibration by `kuiper_error` over sigma = sqrt(sum p (1 - p)) / n, under calibration a Brownian range.

    In float64. p-value for many rows; NaN where every probability is 0 or 1 and right. Host only.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for other shapes, no rows, or what is no probability.
    Source: Arrieta-Ibarra et al. 2022 (ECCE).
    """
    return _cumulative_test(_kuiper, brownian_range_p_value, probability, outcome, weights)


def spiegelhalter_test(
    probability: Float[Array, "batch"], outcome: Outcome, *, weights: RowWeights = None
) -> CalibrationTest:
    """Spiegelhalter's test, z = sum (y - p)(1 - 2p) / sqrt(sum (1 - 2p)^2 p (1 - p)), two-sided normal p-value.

    Whether the Brier score is what the probabilities themselves lead one to expect; positive = worse. `statistic` is
    the mean difference, `scaled` is z. NaN where every probability is 0, 1/2 or 1. Float64. Host only.

    Args:
        probability: of the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: of each row; None = all alike.

    Raises:
        ValueError: for other shapes, no rows, or what is no probability.
    Source: Spiegelhalter 1986.
    """
    from scipy.special import ndtr  # slow to import

    p, y, w = _checked(probability, outcome, weights)
    slope = 1 - 2 * p
    with np.errstate(invalid="ignore", divide="ignore"):
        statistic = (w * (y - p) * slope).sum() / w.sum()
        scaled = statistic / (np.sqrt((w**2 * slope**2 * p * (1 - p)).sum()) / w.sum())
    return CalibrationTest(float(statistic), float(scaled), float(2 * ndtr(-abs(scaled))))


def brownian_sup_p_value(x: float) -> float:
    """P(max over [0, 1] of |Brownian motion| > x) = 4 sum_k (-1)^k (1 - Phi((2k + 1) x)), by a second series below 1.

    Precise to rounding everywhere: each series has a dozen terms, and the upper tail is never one minus something.
    """
    from scipy.special import ndtr

    odd = 2 * np.arange(12) + 1
    sign = (-1.0) ** np.arange(12)
    if not x < 1:  # NaN stays NaN
        return float(4 * (sign * ndtr(-odd * x)).sum())
    if x <= 0:
        return 1.0
    return float(1 - 4 / np.pi * (sign / odd * np.exp(-((odd * np.pi / x) ** 2) / 8)).sum())


def brownian_range_p_value(x: float) -> float:
    """P(range over [0, 1] of Brownian motion > x) = 8 sum_k (-1)^(k - 1) k (1 - Phi(k x)), by a second series below 1.6.

    The second is that of the theta function, 1 - sum over odd k of (8 / x^2 + 8 / (k pi)^2) exp(-(k pi / x)^2 / 2).

    Source: Feller 1951.
    """
    from scipy.special import ndtr

    if not x < 1.6:
        k = np.arange(1, 25)
        return float(8 * ((-1.0) ** (k - 1) * k * ndtr(-k * x)).sum())
    if x <= 0:
        return 1.0
    odd = np.pi * (2 * np.arange(12) + 1)
    return float(1 - 8 * ((1 / x**2 + 1 / odd**2) * np.exp(-((odd / x) ** 2) / 2)).sum())


def columns(probability, outcome, weights):
    """The columns of events as floats, weights of one where None.

    Raises:
        ValueError: where they are not one axis of the same length, have no rows, or numpy columns hold no events.
    """
    p, y = jnp.asarray(probability), jnp.asarray(outcome)
    p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
    _check_shapes(p, y, weights)
    check_values(probability, outcome, weights)
    y = y.astype(p.dtype)
    if weights is None:
        return p, y, jnp.ones_like(p)
    w = jnp.asarray(weights, p.dtype)
    return jnp.where(w == 0, 0, p), jnp.where(w == 0, 0, y), w  # rows of weight 0 may hold anything


def _check_shapes(p, y, weights):
    shapes = [x.shape for x in (p, y)] + ([] if weights is None else [np.shape(weights)])
    if len(set(shapes)) > 1 or p.ndim != 1 or not len(p):
        raise ValueError(
            "`probability`, `outcome` and `weights` must be one axis of the same length with at least one row, got "
            f"{', '.join(map(str, shapes))}. Pass one number per event."
        )


def _checked(probability, outcome, weights):
    """The columns in float64, with their values looked at; a pool in float32 may be 1e-6 above one, which counts as one."""
    p, y = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    _check_shapes(p, y, weights)
    w = np.ones_like(p) if weights is None else np.asarray(weights, np.float64)
    for name, x in (("probability", p), ("outcome", y)):
        inside = (x >= -ROUNDING) & (x <= 1 + ROUNDING)
        if not inside.all():
            raise ValueError(
                f"`{name}` must lie in [0, 1], got {x[~inside][0]:g}. Pass probabilities, not logits, and outcomes 0 or 1."
            )
    if not (w >= 0).all() or not 0 < w.sum() < np.inf:
        raise ValueError(
            f"`weights` must be non-negative and finite, and not all zero, got a smallest of {w.min():g} and a sum of "
            f"{w.sum():g}. Leave them out for rows that are all alike."
        )
    return p.clip(0, 1), y, w


def _cumulative(xp, p, y, w):
    """D at the last row of each distinct probability, and 0 = D_0 at all others."""
    order = xp.argsort(p)
    ordered, gap = p[order], (w * (y - p))[order]
    last = xp.concatenate([ordered[1:] != ordered[:-1], xp.ones(1, bool)])
    return xp.where(last, xp.cumsum(gap) / w.sum(), 0)


def _ks(cumulative):
    return abs(cumulative).max()


def _kuiper(cumulative):
    return cumulative.max().clip(0) - cumulative.min().clip(None, 0)


def _cumulative_test(norm, law, probability, outcome, weights) -> CalibrationTest:
    p, y, w = _checked(probability, outcome, weights)
    statistic = norm(_cumulative(np, p, y, w))
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = float(statistic / (np.sqrt((w**2 * p * (1 - p)).sum()) / w.sum()))
    return CalibrationTest(float(statistic), scaled, law(scaled))


def _band(norm, quantile, probability, outcome, weights):
    # D's estimate varies as a Brownian motion in the time sum (w (y - p))^2, less a part linear in D: by Anderson's
    # inequality the norm of its error exceeds that motion's no more often.
    p, y, w = _checked(probability, outcome, weights)
    value = norm(_cumulative(np, p, y, w))
    # Of rare events all rows may have gone one way: their noise is as in `Histogram.error_variance`.
    rate, rows = np.average(y, weights=w), w.sum() ** 2 / (w**2).sum()
    least = min((w**2 * p * (1 - p)).sum(), w.sum() ** 2 * proportion_variance(rate, rows))
    time = max((w**2 * (y - p) ** 2).sum(), least)
    half = quantile * np.sqrt(time) / w.sum()
    return max(value - half, 0.0), min(value + half, 1.0)
