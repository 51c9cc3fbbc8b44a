"""What a proper score is made of: miscalibration, discrimination, uncertainty; and the curve behind it. Host only."""

from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Float

from bayescal.binning import Z95, Closed, Histogram, bin_index, check_bins
from bayescal.metrics.binfree import ROUNDING
from bayescal.metrics.events import Outcome, RowWeights
from bayescal.types import Array, Estimate, Key

Score = Literal["brier", "log"]


class Corp(NamedTuple):
    """CORP decomposition of a mean score: score = miscalibration - discrimination + uncertainty."""

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


class Murphy(NamedTuple):
    """Murphy's decomposition of the Brier score by bins.

    score = reliability - resolution + uncertainty + within_variance - within_covariance.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float
    within_covariance: float


class Refinement(NamedTuple):
    """score = calibration + refinement, each with its 95 % interval."""

    score: Estimate
    calibration: Estimate
    refinement: Estimate


class ReliabilityCurve(NamedTuple):
    """CORP reliability diagram as numbers, each of shape (points,), in order of probability.

    probability: distinct probabilities that were given.
    frequency: that of the event, made non-decreasing.
    low, high: pointwise consistency band: where the frequency of a calibrated forecaster would be; NaN without one.
    weight: of the rows with that probability.
    """

    probability: np.ndarray
    frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def corp(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    score: Score = "brier",
    weights: RowWeights = None,
) -> Corp:
    """S(p) = MCB - DSC + UNC: MCB = S(p) - S(q), DSC = S(base rate) - S(q), UNC = S(base rate), q isotonic in p.

    All but S non-negative, in the score's unit. Miscalibration: lower is better, 0 = no monotone map improves the forecasts;
    discrimination: higher is better; uncertainty is the events' own. No bins: q is the non-decreasing function of p that
    fits the outcomes best, in sample. Of the log score, S and MCB are infinite where a probability of 0 or 1 was
    wrong. Host only.

    Args:
        probability: given to the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        score: "brier" = (p - y)^2, in [0, 1], half the sum over two classes; "log" = -log of what happened, nats.
        weights: non-negative; None = all alike; a weight is a repetition.

    Raises:
        ValueError: for columns that are no forecasts of yes-or-no events, another word for `score`.
    Source: Dimitriadis, Gneiting and Jordan 2021.
    """
    if score not in get_args(Score):
        raise ValueError(f"`score` must be 'brier' or 'log', got {score!r}. The Brier score is finite.")
    values, rate, weight, _ = _distinct(*_checked(probability, outcome, weights))
    base = np.full_like(rate, np.average(rate, weights=weight))
    given, isotonic, constant = (_mean_score(x, rate, weight, score) for x in (values, _isotonic(rate, weight), base))
    return Corp(given, given - isotonic, constant - isotonic, constant)


def murphy(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    num_bins: int = 15,
    closed: Closed = "right",
    weights: RowWeights = None,
) -> Murphy:
    """Brier = REL - RES + UNC + WBV - WBC: bins' own means, and two terms for what they hide; exact for any bins.

    REL = mean (p_b - y_b)^2, RES = mean (y_b - base rate)^2, UNC = base rate (1 - base rate), WBV = mean (p - p_b)^2, WBC =
    2 mean (p - p_b)(y - y_b), with p_b and y_b the means of a row's bin. All in [0, 1] but the last, which may be
    negative. Brier (p - y)^2 in [0, 1], half the sum over two classes. Host only.

    Args:
        probability: given to the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        num_bins: bins of equal width on [0, 1].
        closed: which side of a bin is closed, see `bayescal.binning.bin_index`.
        weights: non-negative; None = all alike; a weight is a repetition.

    Raises:
        ValueError: for columns that are no forecasts of yes-or-no events, fewer than one bin.
    Source: Murphy 1973; within-bin terms Stephenson et al. 2008 (recalled, formula not checked against the paper).
    """
    check_bins(num_bins)
    p, y, w = _checked(probability, outcome, weights)
    index = np.asarray(bin_index(p.astype(np.float32), num_bins, closed))
    total = np.bincount(index, w, num_bins)

    def of_bin(x):
        return (np.bincount(index, w * x, num_bins) / np.where(total > 0, total, 1))[index]

    def mean(x):
        return float(np.average(x, weights=w))

    base, forecast, rate = mean(y), of_bin(p), of_bin(y)
    return Murphy(
        score=mean((p - y) ** 2),
        reliability=mean((forecast - rate) ** 2),
        resolution=mean((rate - base) ** 2),
        uncertainty=base * (1 - base),
        within_variance=mean((p - forecast) ** 2),
        within_covariance=2 * mean((p - forecast) * (y - rate)),
    )


def refinement(
    scores: Float[Array, "batch"],
    recalibrated: Float[Array, "batch"],
    *,
    recalibration: str,
    weights: RowWeights = None,
) -> Refinement:
    """Score = calibration + refinement: refinement = mean score after recalibration, calibration = what that gained.

    In the score's unit; lower is better for each; of any number of classes. A recalibration that fits badly gives a
    calibration error too small, or negative; one fitted on these rows, too large. Intervals: normal, of the paired
    differences, given the fit. Host only.

    Args:
        scores: of each row, such as `-pred.log_prob(targets)`.
        recalibrated: of the same rows, after recalibration.
        recalibration: what was done and on which rows, for the convention: "temperature, in-sample".
        weights: of each row; None = all alike.

    Raises:
        ValueError: for other shapes, unusable weights, or an empty `recalibration`.
    Source: Berta, Holzmüller, Jordan and Bach 2025.
    """
    if not recalibration.strip():
        raise ValueError(
            "`recalibration` must say what was fitted, and on which rows, got ''. For example 'temperature, in-sample'."
        )
    before, after = (np.asarray(x, np.float64) for x in (scores, recalibrated))
    w = _checked_weights(before, after, weights)

    def estimate(x, words):
        mean = float(np.average(x, weights=w))
        half = Z95 * np.sqrt((w**2 * (x - mean) ** 2).sum()) / w.sum()
        return Estimate(mean, float(mean - half), float(mean + half), int((w > 0).sum()), words)

    with np.errstate(invalid="ignore"):
        return Refinement(
            estimate(before, "as forecast"),
            estimate(before - after, f"score less that after recalibration: {recalibration}"),
            estimate(after, f"score after recalibration: {recalibration}"),
        )


def reliability_curve(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    key: Key | None = None,
    *,
    weights: RowWeights = None,
    num_points: int = 200,
    num_draws: int = 400,
    level: float = 0.95,
) -> ReliabilityCurve:
    """CORP reliability curve: frequency of the event given its probability, made non-decreasing; no bins to choose.

    The band is of consistency: pointwise quantiles of the same curve for outcomes drawn from the probabilities themselves, so
    a curve outside it is evidence of miscalibration. (There is no bootstrap band around the curve: it is not
    consistent for isotonic regression.) Host only; about `num_draws` times the time without a band.

    Args:
        probability: given to the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        key: for the band; None = none.
        weights: non-negative; None = all alike.
        num_points: how many of the distinct probabilities the result keeps, evenly in their order.
        num_draws: of the outcomes.
        level: of the band.

    Raises:
        ValueError: for columns that are no forecasts of yes-or-no events, a level outside (0, 1).
    Source: Dimitriadis, Gneiting and Jordan 2021.
    """
    _check_level(level)
    p, y, w = _checked(probability, outcome, weights)
    values, rate, weight, group = _distinct(p, y, w)
    kept = np.unique(np.linspace(0, len(values) - 1, num_points).round().astype(int))
    low = high = np.full(len(kept), np.nan)
    if key is not None:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        draws = np.empty((num_draws, len(kept)))
        for i in range(num_draws):
            happened = np.bincount(group, w * (rng.random(len(p)) < p)) / weight
            draws[i] = _isotonic(happened, weight)[kept]
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ReliabilityCurve(values[kept], _isotonic(rate, weight)[kept], low, high, weight[kept])


def consistency_band(
    sums: Histogram, *, level: float = 0.95
) -> tuple[Float[np.ndarray, "bins"], Float[np.ndarray, "bins"]]:
    """(low, high): where a calibrated forecaster's accuracy in each bin would be, binomial(n_b, confidence_b) / n_b.

    Exact quantiles, so that at least `level` of calibrated bins are inside; a little wide where confidences in a bin
    differ. NaN in empty bins. n_b is Kish's number of rows, rounded. For the interval around an observed accuracy see
    `bayescal.binning.reliability`. Host only.

    Args:
        sums: per bin, of any bins: of equal width or `equal_mass_histogram`.
        level: of each bin, not of all together.

    Raises:
        ValueError: for a level outside (0, 1).
    Source: Bröcker and Smith 2007 (consistency bars, there by resampling).
    """
    from scipy.stats import binom

    _check_level(level)
    weight, confidence = np.asarray(sums.weight, np.float64), np.asarray(sums.confidence, np.float64)
    square = np.asarray(sums.weight_square, np.float64)
    full = weight > 0
    rows = np.maximum(np.round(weight**2 / np.where(full, square, 1)), 1)
    mean = np.clip(confidence / np.where(full, weight, 1), 0, 1)
    ends = (binom.ppf(q, rows, mean) / rows for q in ((1 - level) / 2, (1 + level) / 2))
    low, high = (np.where(full, np.maximum(x, 0), np.nan) for x in ends)
    return low, high


def _mean_score(forecast, rate, weight, score: Score) -> float:
    """Mean score of forecasts for groups of rows, of which the share `rate` happened."""
    from scipy.special import xlog1py, xlogy  # slow to import

    if score == "log":
        each = -xlogy(rate, forecast) - xlog1py(1 - rate, -forecast)
    else:
        each = rate * (1 - forecast) ** 2 + (1 - rate) * forecast**2
    return float(np.average(each, weights=weight))


def _isotonic(rate, weight):
    from scipy.optimize import isotonic_regression  # slow to import

    return np.clip(isotonic_regression(rate, weights=weight).x, 0, 1)


def _distinct(p, y, w):
    """Distinct probabilities in order: (value, share that happened, weight), and each row's place among them."""
    values, group = np.unique(p, return_inverse=True)
    weight = np.bincount(group, w)
    return values, np.bincount(group, w * y) / weight, weight, group


def _checked(probability, outcome, weights):
    """Columns in float64, rows of weight 0 left out."""
    p, y = (np.asarray(x, np.float64) for x in (probability, outcome))
    w = _checked_weights(p, y, weights)
    p, y, w = p[w > 0], y[w > 0], w[w > 0]
    p = np.where((p > 1) & (p <= 1 + ROUNDING), 1, p)  # a pool in float32
    if not ((p >= 0) & (p <= 1)).all():
        wrong = p[~((p >= 0) & (p <= 1))]
        raise ValueError(
            f"`probability` must lie in [0, 1], got {len(wrong)} of {len(p)} outside, the first {wrong[0]}. "
            "Logits need a softmax or sigmoid first."
        )
    if not ((y == 0) | (y == 1)).all():
        raise ValueError(f"`outcome` must be 0 or 1, got {y[(y != 0) & (y != 1)][0]}. Say which rows happened.")
    return p, y, w


def _checked_weights(first, second, weights):
    w = np.ones(len(first)) if weights is None else np.asarray(weights, np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.shape != w.shape:
        raise ValueError(
            f"The columns must be one axis of the same length, got shapes {first.shape}, {second.shape} and weights "
            f"{w.shape}. Flatten them row by row."
        )
    if not (np.isfinite(w) & (w >= 0)).all() or not w.sum() > 0:
        raise ValueError(
            f"`weights` must be finite, non-negative and not all zero, got sum {w.sum()} over {len(w)} rows. "
            "Leave them out for equal weights."
        )
    return w


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level!r}. The usual is 0.95.")
