"""Intervals for norms of calibration gaps: a norm of noisy gaps is biased upwards, so tests are inverted.

The norm of the observed gaps is above the norm of the true ones by what the noise adds, most where the true ones are
zero; that is a boundary, and resampling rows adds the noise a second time. Percentile and BCa bootstrap intervals
then miss the truth, in up to 100 of 100 data sets. Here the interval is what the observed norm does not rule out.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from jaxtyping import Float


def gap_norm_interval(
    gap: Float[np.ndarray, "bins"],
    variance: Float[np.ndarray, "bins"] | Float[np.ndarray, "bins bins"],
    share: Float[np.ndarray, "bins"],
    *,
    norm: float = 1,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) for the true (sum_b share_b |mu_b|^norm)^(1 / norm), from observed gaps X ~ N(mu, variance).

    In [0, 1]; low is 0 where zero is not rejected. The values t are kept for which the norm of the observed gaps lies
    between the tails of the norm of t * shape + noise, for at least one of three shapes, since noise adds the less the
    more evenly the true gaps are spread: the observed gaps with their noise taken off, gaps in proportion to the noise
    (for norm 1 noise adds least), and the gaps that stand out alone (it adds most). Where the norm is below the median
    of noise alone, high is that of the median: luck is no evidence of perfection. Noise is a fixed set of stratified
    normal draws, the same at every call. Host only.

    Args:
        gap: observed mean gap of each bin, in [-1, 1].
        variance: sampling variance of each gap, or their covariance. NaN = unknown (a bin of one row): that of a
            calibrated event, |gap| (1 - |gap|). The maximum looks at the worst bin alone, so there it is no interval:
            (NaN, NaN). For the maximum call variances unknown up to some 20 rows: their gaps are far from normal.
        share: non-negative weight of each bin, of sum one; bins of share 0 count for nothing.
        norm: at least 1; `float("inf")` = the largest gap of a bin of positive share.
        level: of confidence.

    Raises:
        ValueError: for other shapes, shares that are none, a norm below 1, a level outside (0, 1).
    Source: Neyman 1937 for the inversion, Cowan et al. 2011 for the floor of the upper end (recalled); the rest ours.
    """
    unknown = np.isnan(variance)
    unknown, counts = (unknown if unknown.ndim == 1 else np.diag(unknown)), np.asarray(share) > 0
    gap, root, share = _normal(gap, variance, share)
    if not norm >= 1 or not 0 < level < 1:
        raise ValueError(
            f"`norm` must be at least 1 and `level` in (0, 1), got {norm!r} and {level!r}. The usual are 1 and 0.95."
        )
    if not len(gap) or (norm == float("inf") and unknown[counts].any()):
        return float("nan"), float("nan")
    spread = np.sqrt((root**2).sum(-1)) if root.ndim == 2 else root
    noise = _draws(len(gap))
    noise = noise @ root.T if root.ndim == 2 else noise * root

    room = np.empty_like(noise)  # memory of a megabyte costs more to get than to fill

    def size(x):
        x = np.abs(x, out=x)
        if norm == float("inf"):
            return x.max(-1)
        if norm != 1:
            x **= norm
        return (x @ share) ** (1 / norm)

    def order(unit, place, t):
        """Order statistic of the norm of t * unit + noise."""
        return float(np.partition(size(np.add(noise, t * unit, out=room)), place)[place])

    observed, last = float(size(gap.copy())), len(noise) - 1
    typical = max(observed, order(np.zeros_like(gap), last // 2, 0.0))
    tail = int((1 - level) / 2 * last)
    lows, highs = [], []
    for shape in (_without_noise(gap, spread**2), np.where(gap < 0, -spread, spread), _clearest(gap, spread)):
        length = float(size(shape.copy()))
        if length > 0:
            lows.append(_crossing(partial(order, shape / length, last - tail), observed))
            highs.append(_crossing(partial(order, shape / length, tail), typical))
    if not lows:  # neither a gap nor noise
        return observed, observed
    return min(min(lows), 1.0), min(max(highs), 1.0)


def signed_square_interval(
    gap: Float[np.ndarray, "bins"],
    variance: Float[np.ndarray, "bins"] | Float[np.ndarray, "bins bins"],
    share: Float[np.ndarray, "bins"],
    *,
    level: float = 0.95,
) -> tuple[float, float]:
    """(low, high) for sum_b share_b mu_b^2, around its unbiased estimate D = sum_b share_b (gap_b^2 - variance_b).

    Unlike a norm's interval it always holds the estimate, and both may be negative. The values t are kept for which |D - t|
    is at most z standard errors *at t*, z^2 (4 mu' W S W mu + 2 tr(W S W S)) with mu' W mu = max(t, 0): a score
    interval in closed form; with the error at D instead it would be too short when D is small by chance. Host only.

    Args:
        gap, variance, share, level: as in `gap_norm_interval`.

    Raises:
        ValueError: as `gap_norm_interval`.
    Source: for unbiased D Bröcker 2012, Ferro and Fricker 2012 (recalled); Wilson 1927 for the inversion; the rest ours.
    """
    from scipy.special import ndtri  # slow to import

    gap, root, share = _normal(gap, variance, share)
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level!r}. The usual is 0.95.")
    if not len(gap):
        return float("nan"), float("nan")
    covariance = root @ root.T if root.ndim == 2 else np.diag(root**2)
    noise = np.diag(covariance)
    value = float(share @ (gap**2 - noise))
    slopes = []
    for shape in (_without_noise(gap, noise), gap):
        pull = share * shape
        if shape.any():
            slopes.append(4 * pull @ covariance @ pull / (share @ shape**2))
    z = ndtri((1 + level) / 2)
    weighted = share[:, None] * covariance
    floor = z * np.sqrt(2 * (weighted * weighted.T).sum())
    shift = z**2 * (max(slopes) if slopes else 0) / 2
    half = np.sqrt(max((value + shift) ** 2 - value**2 + floor**2, 0))
    low = value + shift - half if value >= floor else value - floor
    high = value + shift + half if value >= -floor else value + floor
    return float(low), float(high)


def _normal(gap, variance, share):
    """Bins of positive share: their gaps, standard deviation (or a root of the covariance), and shares."""
    gap, variance, share = (np.asarray(x, np.float64) for x in (gap, variance, share))
    if gap.ndim != 1 or share.shape != gap.shape or variance.shape not in (gap.shape, gap.shape * 2):
        raise ValueError(
            f"`gap`, `variance` and `share` must have shapes (bins,), (bins,) or (bins, bins), and (bins,), got {gap.shape}, "
            f"{variance.shape} and {share.shape}. Take one histogram at a time."
        )
    if np.isnan(gap).any():
        raise ValueError("`gap` must not be NaN, got one that is. Give empty bins gap 0 and share 0.")
    if share.size and (not (share >= 0).all() or abs(share.sum() - 1) > 1e-4):
        raise ValueError(
            f"`share` must be non-negative of sum 1, got sum {share.sum():g} and least {share.min():g}. "
            "Divide each bin's weight by their total."
        )
    kept = share > 0
    gap, variance, share = gap[kept], variance[kept][:, kept] if variance.ndim == 2 else variance[kept], share[kept]
    single = np.abs(gap) * (1 - np.abs(gap))  # c (1 - c), whether the gap is c or c - 1
    if variance.ndim == 1:
        return gap, np.sqrt(np.maximum(np.where(np.isnan(variance), single, variance), 0)), share
    unknown = np.isnan(np.diag(variance))
    variance = np.where(unknown[:, None] | unknown, np.diag(single), variance)
    size, axes = np.linalg.eigh(variance)
    return gap, axes * np.sqrt(np.maximum(size, 0)), share


@cache
def _draws(bins: int) -> np.ndarray:
    """Standard normal draws, float64 (draws, bins): each bin's are the quantiles in an order of its own.

    Stratified, so that each bin's noise has its exact spread; fewer draws for many bins, whose norm varies little.
    """
    from scipy.special import ndtri  # slow to import

    number = int(np.clip(2**17 // bins, 250, 2000))
    rng = np.random.default_rng(0)
    orders = np.argsort(rng.random((number, bins)), axis=0)
    return ndtri((orders + 0.5) / number)


def _without_noise(gap, variance):
    return np.sign(gap) * np.sqrt(np.maximum(gap**2 - variance, 0))


def _clearest(gap, spread):
    """The gaps that stand out of the noise of as many bins, at least the one that does so most."""
    clear = np.abs(gap) / np.where(spread > 0, spread, np.inf)
    return np.where((spread == 0) | (clear >= min(clear.max(), np.sqrt(2 * np.log(len(gap))))), gap, 0)


def _crossing(rising: Callable[[float], float], value: float, high: float = 0.05) -> float:
    """The t >= 0 where a rising function passes a value; 0 where it starts above."""
    from scipy.optimize import root_scalar  # slow to import

    low = 0.0
    if rising(low) >= value:
        return low
    while rising(high) < value:
        low, high = high, 2 * high
    return float(root_scalar(lambda t: rising(t) - value, bracket=(low, high), xtol=1e-6).root)
