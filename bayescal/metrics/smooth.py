"""Smooth calibration error, and the smoothed reliability curve, from one fine histogram."""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bayescal.binning import Histogram, bin_edges
from bayescal.metrics.calibration import confidence_histogram
from bayescal.metrics.events import Events, top_label
from bayescal.metrics.inversion import gap_norm_interval
from bayescal.types import Metric

FEWEST_BINS = 100
STRETCHES = 15  # of [0, 1], in each of which the noise is at least that of a proportion
FIELD_POINTS = 81  # where the interval looks at the smoothed gap: its inversion costs points cubed


class SmoothCurve(NamedTuple):
    """Smoothed reliability diagram as numbers, float64, each (num_bins + 1,) but `sigma`.

    Drawn as accuracy against confidence, calibrated predictions lie on the diagonal whatever the kernel's width.

    t: 0, 1 / num_bins, ..., 1.
    residual: smoothed confidence - correct, times density: positive = over-confident. Its L1 norm is the smooth error.
    density: smoothed density of the confidence; integrates to one.
    confidence, accuracy: kernel-weighted means around t, both in [0, 1]; NaN where next to nothing is near t.
    sigma: the kernel's standard deviation.
    """

    t: Float[np.ndarray, "points"]
    residual: Float[np.ndarray, "points"]
    density: Float[np.ndarray, "points"]
    confidence: Float[np.ndarray, "points"]
    accuracy: Float[np.ndarray, "points"]
    sigma: float


class GapField(NamedTuple):
    """The smoothed residual on a coarse grid, with what an interval for its norm needs.

    gap: smoothed confidence - correct at each point.
    covariance: sampling covariance of `gap`, rows being independent draws.
    share: width of each point's cell; they add up to one.
    """

    gap: Float[np.ndarray, "points"]
    covariance: Float[np.ndarray, "points points"]
    share: Float[np.ndarray, "points"]


@cache
def smooth_calibration_error(
    *, events: Events | None = None, num_bins: int = 3840, sigma: float | None = None
) -> Metric:
    """Smooth calibration error S(sigma) = int_0^1 |mean_i (confidence_i - correct_i) K_sigma(t, confidence_i)| dt.

    K is a Gaussian of standard deviation sigma reflected at 0 and 1, and sigma the root of S(sigma) = sigma, so that
    there is no width or number of bins to choose. In [0, 1]; lower is better; continuous in the predictions, unlike
    ECE. Positive for calibrated finite data. Read from a fine histogram whose bins count at their mean confidence: what
    that changes is a bin's width over sigma, times sampling noise. The kernel is never narrower than 2 / num_bins: an
    error below that (5e-4) is understated by less than it. `compute` is host only.

    Interval: 95 %, of the norm of a normal field, by test inversion at the sigma found. The error falls as sigma grows,
    so the interval holds for the fixed point too.

    Args:
        events: which events; default the top label.
        num_bins: bins of the histogram, at least 100.
        sigma: a fixed kernel width in [2 / num_bins, 1]; None = the fixed point.

    Raises:
        ValueError: for too few bins, or a width out of range.
    Source: Błasiok and Nakkiran 2024 (smECE).
    """
    base = confidence_histogram(events=events or top_label(), num_bins=num_bins)  # complains about what is no number
    if num_bins < FEWEST_BINS:
        raise ValueError(
            f"`num_bins` must be at least {FEWEST_BINS}, got {num_bins}. It is the histogram's resolution, not a number "
            "of bins to average over: leave it out."
        )
    if sigma is not None and not 2 / num_bins <= sigma <= 1:
        raise ValueError(
            f"`sigma` must lie in [2 / num_bins, 1] = [{2 / num_bins:g}, 1], got {sigma!r}. Leave it out for the fixed point "
            "S(sigma) = sigma."
        )

    def interval(sums):
        return gap_norm_interval(*gap_field(sums, sigma=sigma), norm=1)

    width = "width the fixed point" if sigma is None else f"width {sigma:g}"
    return base._replace(
        compute=lambda sums: _error(_Modes(sums), sigma),
        interval=interval,
        convention=f"{(events or top_label()).name}; reflected Gaussian kernel, {width}; {num_bins} fine bins",
    )


def smooth_curve(sums: Histogram, *, sigma: float | None = None) -> SmoothCurve:
    """The smoothed reliability curve E[correct | t] = sum_i correct_i K(t, c_i) / sum_i K(t, c_i). Host only.

    Args:
        sums: totals of `smooth_calibration_error` (or of any fine histogram), as `bayescal.evaluate.measure` gives them.
        sigma: the kernel's width; None = the fixed point of `smooth_calibration_error`.
    Source: Błasiok and Nakkiran 2024 (recalled, formula not checked against the paper).
    """
    modes = _Modes(sums)
    sigma = modes.fixed_point() if sigma is None else sigma
    total = np.asarray(sums.weight, np.float64).sum()
    residual = modes.smooth(modes.residual, sigma)
    density, confidence = (
        modes.smooth(modes.transform(np.asarray(x, np.float64) / total), sigma) for x in (sums.weight, sums.confidence)
    )
    near = np.where(density > 1e-6, density, np.nan)  # rounding of the transform is far below
    accuracy = np.clip((confidence - residual) / near, 0, 1)
    t = bin_edges(len(density) - 1)
    return SmoothCurve(t, residual, np.maximum(density, 0), np.clip(confidence / near, 0, 1), accuracy, float(sigma))


def gap_field(sums: Histogram, *, sigma: float | None = None) -> GapField:
    """The smoothed residual at 81 points of [0, 1], its covariance and the points' shares. Host only.

    Weights are taken to be alike within a fine bin.

    Args:
        sums: totals of `smooth_calibration_error`.
        sigma: the kernel's width; None = the fixed point of `smooth_calibration_error`.
    """
    modes = _Modes(sums)
    sigma = modes.fixed_point() if sigma is None else sigma
    weight, square, weight_square = (np.asarray(x, np.float64) for x in (sums.weight, sums.square, sums.weight_square))
    total, bins = weight.sum(), len(weight)
    own = square * weight_square / np.where(weight > 0, weight, 1)  # sum of (w gap)^2
    spread = modes.place(_at_least_binomial(own, sums)) / total**2
    points = np.rint(np.linspace(0, bins, FIELD_POINTS)).astype(int)
    kernel = modes.smooth(modes.cosines((points[:, None] == np.arange(bins + 1)).astype(float)), sigma)
    gap = modes.smooth(modes.residual, sigma)[points]
    covariance = (kernel * spread) @ kernel.T - np.outer(gap, gap) * weight_square.sum() / total**2
    edges = np.concatenate([[0], (points[1:] + points[:-1]) / 2, [bins]]) / bins
    return GapField(gap, covariance, np.diff(edges))


def _at_least_binomial(own, sums: Histogram):
    """Each bin's sum of (w gap)^2; in a stretch of bins whose rows all went one way, what a proportion has for noise."""
    stretch = np.arange(len(own)) * STRETCHES // len(own)
    weight, gap, confidence, _, weight_square = (np.bincount(stretch, np.asarray(x, np.float64)) for x in sums)
    together = Histogram(weight, gap, confidence, np.zeros_like(weight), weight_square)
    least = weight**2 * together.error_variance()
    share = np.asarray(sums.weight_square, np.float64) / np.where(weight_square > 0, weight_square, 1)[stretch]
    return np.where((np.bincount(stretch, own) < least)[stretch], share * least[stretch], own)


class _Modes:
    """Cosine transform of the residuals: there the reflected Gaussian only damps, mode k by exp(-(pi k sigma)^2 / 2)."""

    def __init__(self, sums: Histogram):
        weight, gap, confidence = (np.asarray(x, np.float64) for x in sums[:3])
        self.bins = len(weight)
        self.narrowest = 2 / self.bins  # a narrower kernel would not fit the grid
        mean = np.where(weight > 0, confidence / np.where(weight > 0, weight, 1), 0).clip(0, 1) * self.bins
        self.left = np.minimum(mean.astype(int), self.bins - 1)
        self.right_share = mean - self.left
        self.total = weight.sum()
        with np.errstate(invalid="ignore"):  # no rows: NaN
            self.residual = self.transform(gap / self.total)

    def place(self, mass):
        """Each bin's mass, at its mean confidence, shared between the two nearest of the grid's points."""
        left = np.bincount(self.left, mass * (1 - self.right_share), self.bins + 1)
        return left + np.bincount(self.left + 1, mass * self.right_share, self.bins + 1)

    def cosines(self, masses):
        """sum_j mass_j cos(pi k t_j) for every mode k; the last axis holds the grid's points."""
        from scipy.fft import dct  # slow to import

        ends = np.ones(self.bins + 1)
        ends[[0, -1]] = 2
        return np.asarray(dct(masses * ends, 1)) / 2

    def transform(self, mass):
        return self.cosines(self.place(mass))

    def smooth(self, modes, sigma: float):
        """Values on the grid after smoothing; the last mode, counted half here, is damped below 1e-8."""
        from scipy.fft import dct

        return np.asarray(dct(modes * np.exp(-((np.pi * sigma * np.arange(self.bins + 1)) ** 2) / 2), 1))

    def norm(self, sigma: float) -> float:
        gap = abs(self.smooth(self.residual, sigma))
        return float((gap.sum() - (gap[0] + gap[-1]) / 2) / self.bins)

    def fixed_point(self) -> float:
        """The root of norm(sigma) = sigma by bisection on log sigma (the norm falls in sigma), never below `narrowest`."""
        low, high = np.log(self.narrowest), 0.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.norm(np.exp(middle)) > np.exp(middle) else (low, middle)
        return float(np.exp(high))


def _error(modes: _Modes, sigma: float | None) -> float:
    return modes.norm(modes.fixed_point() if sigma is None else sigma)
