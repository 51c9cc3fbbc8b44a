"""Calibration of forecasts of numbers by F(y): probability integral transform, quantiles and intervals."""

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import bin_index, check_bins, namespace, wilson_interval
from bayescal.metrics.likelihood import check_rows
from bayescal.metrics.regression import mixture_cdf
from bayescal.predictive import Gaussian, float32_or_wider
from bayescal.types import Array, Key, Metric

Kind = Literal["quantile", "interval"]
Levels = Sequence[float] | Float[Array, "levels"]
LEVELS = tuple(i / 100 for i in range(1, 100))


class PITSums(NamedTuple):
    """Sums per bin of the PIT; merging is addition.

    weight: total weight, (dim, bins).
    weight_square: sum of squared weights of the rows.
    """

    weight: Float[Array, "dim bins"]
    weight_square: Float[Array, ""]


class PITDiagram(NamedTuple):
    """A PIT histogram as numbers, each (dim, bins).

    density: share of a bin times the number of bins: 1 everywhere if calibrated; a U = intervals too short, a hump = too
        long, more on the left = forecasts too high.
    low, high: where the density of calibrated forecasts lies in 95 of 100 cases, bin by bin.
    """

    density: np.ndarray
    low: np.ndarray
    high: np.ndarray


class LevelSums(NamedTuple):
    """Sums per level; merging is addition.

    inside: weight of the rows that are below the quantile, or inside the interval, (dim, levels).
    weight: of all rows.
    weight_square: sum of the squared weights of all rows.
    """

    inside: Float[Array, "dim levels"]
    weight: Float[Array, ""]
    weight_square: Float[Array, ""]


class LevelCurve(NamedTuple):
    """A regression calibration curve as numbers: `level` (levels,), the others (dim, levels).

    level: that was forecast.
    share: of targets that are below the quantile, or inside the interval; the level if calibrated.
    low, high: 95 % Wilson interval of the share.
    """

    level: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


def pit(pred: Gaussian, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch dim"]:
    """Probability integral transform u = F(y) of the mixture, for each dimension, in [0, 1]; uniform if calibrated.

    Near 0 = the forecast was too high, near 1 = too low.

    Args:
        pred: predictive.
        targets: what was seen.
    Source: Dawid 1984 (recalled); Gneiting, Balabdaoui and Raftery 2007.
    """
    return mixture_cdf(pred, targets)


def ensemble_pit(
    samples: Float[Array, "*batch member"], y: Float[Array, "*batch"], key: Key
) -> Float[jax.Array, "*batch"]:
    """Randomised PIT of samples: (#{x < y} + (#{x = y} + 1) V) / (m + 1), V uniform in [0, 1).

    Exactly uniform where y is drawn as the samples are, whatever their number and also with ties: the rank of y among
    samples and y, spread over its bin.

    Args:
        samples: of the forecast, all alike.
        y: what was seen.
        key: of the V.
    Source: Hamill 2001 for the rank; Czado, Gneiting and Held 2009 for randomising (recalled, formula not checked).
    """
    x, y = float32_or_wider(samples), jnp.asarray(y)[..., None]
    below, same = (x < y).sum(-1), (x == y).sum(-1)
    rank = below + (same + 1) * jax.random.uniform(key, below.shape, x.dtype)
    return jnp.where(jnp.isnan(x).any(-1) | jnp.isnan(y[..., 0]), jnp.nan, rank / (x.shape[-1] + 1))


@cache
def pit_histogram(*, num_bins: int = 10) -> Metric:
    """Counts of the PIT F(y) in bins of equal width, for each dimension; `pit_diagram` makes densities of them.

    The value is the `PITSums` itself: read it from measured sums, not in `evaluate`.

    Args:
        num_bins: of equal width on [0, 1], closed on the left, the last on both sides.

    Raises:
        ValueError: for fewer than one bin.
    """
    check_bins(num_bins)

    def measure(pred, targets, weights):
        check_rows(weights.shape[0])
        place = bin_index(mixture_cdf(pred, targets), num_bins, "left")
        inside = jnp.where(weights == 0, 0, weights)[:, None, None] * (place[..., None] == jnp.arange(num_bins))
        return PITSums(inside.sum(0), (weights**2).sum())

    return Metric(
        measure,
        lambda sums: sums,
        convention=f"{num_bins} equal-width bins closed on the left; each dimension",
        better="neither",
        regular=False,
    )


def pit_diagram(sums: PITSums) -> PITDiagram:
    """Density of the PIT per bin, with the band of calibrated forecasts. Host only.

    Args:
        sums: of `pit_histogram`.
    """
    from scipy.stats import binom  # slow to import

    weight = np.asarray(sums.weight, np.float64)
    total = weight.sum(-1, keepdims=True)
    rows, bins = np.round(total**2 / float(sums.weight_square)), weight.shape[-1]
    low, high = (np.broadcast_to(binom.ppf(q, rows, 1 / bins) / rows * bins, weight.shape) for q in (0.025, 0.975))
    return PITDiagram(weight / total * bins, low, high)


def calibration_curve(*, levels: Levels = LEVELS, kind: Kind = "quantile") -> Metric:
    """Share of targets below each quantile, mean 1[F(y) <= q], or inside each central interval of the mixture.

    The value is a `LevelCurve`, for plots: read it from measured sums, on the host, not in `evaluate`.

    Args:
        levels: that are looked at, in [0, 1].
        kind: "quantile"; "interval": the central one, (1 - q) / 2 <= F(y) <= (1 + q) / 2, which sees neither shift nor
            skewness.

    Raises:
        ValueError: for no levels, levels outside [0, 1], another kind.
    Source: Kuleshov, Fenner and Ermon 2018.
    """
    return _curve(_checked(levels), kind)


def quantile_calibration_error(*, levels: Levels = LEVELS, kind: Kind = "quantile", norm: float = 1) -> Metric:
    """Quantile calibration error (mean_q |share(q) - q|^norm)^(1 / norm), share(q) = mean 1[F(y) <= q]: of regression.

    In [0, 1]; lower is better; around 0.4 / sqrt(n) for calibrated forecasts. The mean is over levels and dim. Forecasts that
    are too high have shares above the level. Interval: 95 % or more, since no share of n independent rows is off by
    more than the Dvoretzky-Kiefer-Wolfowitz bound, n being Kish's.

    Args:
        levels: that are looked at, in [0, 1]. The value depends on them: they are named in the convention.
        kind: as in `calibration_curve`.
        norm: 1 = mean absolute, 2 = root mean square, `float("inf")` = the largest.

    Raises:
        ValueError: as `calibration_curve`, and for a norm below 1.
    Source: Kuleshov, Fenner and Ermon 2018; Chung et al. 2021.
    """
    return _quantile_error(_checked(levels), kind, norm)


def miscalibration_area(*, levels: Levels = LEVELS, kind: Kind = "quantile") -> Metric:
    """Area between the calibration curve and the diagonal, integral of |share(q) - q| dq over [0, 1].

    In [0, 1/2] for calibrated ends; lower is better. The curve is straight between levels, with no gap at 0 and 1 unless
    these are levels. Mean over dim. Interval: as that of `quantile_calibration_error`.

    Args:
        levels, kind: as in `calibration_curve`.

    Raises:
        ValueError: as `calibration_curve`.
    Source: Kuleshov, Fenner and Ermon 2018; Chung et al. 2021.
    """
    return _area(_checked(levels), kind)


@cache
def _curve(levels: tuple[float, ...], kind: Kind) -> Metric:
    if kind not in ("quantile", "interval"):
        raise ValueError(f"`kind` must be 'quantile' or 'interval', got {kind!r}. 'quantile' sees shifts too.")

    def measure(pred, targets, weights):
        check_rows(weights.shape[0])
        reached = mixture_cdf(pred, targets)
        # The interval of level q holds y when |2 F - 1| <= q: one comparison for both kinds.
        reached = reached if kind == "quantile" else jnp.abs(2 * reached - 1)
        inside = jnp.where(weights == 0, 0, weights)[:, None, None] * (reached[..., None] <= jnp.asarray(levels))
        return LevelSums(inside.sum(0), weights.sum(), (weights**2).sum())

    def compute(sums: LevelSums):
        share = np.asarray(sums.inside, np.float64) / float(sums.weight)
        low, high = wilson_interval(share, float(sums.weight) ** 2 / float(sums.weight_square))
        return LevelCurve(np.asarray(levels), share, low, high)

    return Metric(measure, compute, convention=_words(levels, kind), better="neither", regular=False)


@cache
def _quantile_error(levels: tuple[float, ...], kind: Kind, norm: float) -> Metric:
    if not norm >= 1:
        raise ValueError(f"`norm` must be at least 1 (or infinity), got {norm!r}. The usual are 1 and 2.")

    def compute(sums: LevelSums):
        xp = namespace(sums.inside)
        gap = abs(sums.inside / sums.weight - xp.asarray(levels, sums.inside.dtype))
        return gap.max() if norm == float("inf") else (gap**norm).mean() ** (1 / norm)

    return _with_bound(_curve(levels, kind), compute, f"L{norm:g} norm, mean over dim; {_words(levels, kind)}")


@cache
def _area(levels: tuple[float, ...], kind: Kind) -> Metric:
    def compute(sums: LevelSums):
        xp, order = namespace(sums.inside), np.argsort(levels)
        grid = np.concatenate([[0.0], np.asarray(levels)[order], [1.0]])  # an end that is a level adds no width
        gap = sums.inside / sums.weight - xp.asarray(levels, sums.inside.dtype)
        gap = xp.pad(gap[:, order], ((0, 0), (1, 1)))
        left, right = gap[:, :-1], gap[:, 1:]
        size = abs(left) + abs(right)
        crossing = (left**2 + right**2) / xp.where(size > 0, size, 1)  # two triangles
        height = xp.where(left * right < 0, crossing, size) / 2
        return (height * np.diff(grid)).sum(-1).mean()

    return _with_bound(_curve(levels, kind), compute, f"area, mean over dim; {_words(levels, kind)}")


def _with_bound(curve: Metric, compute, words: str) -> Metric:
    def interval(sums: LevelSums):
        # Massart's constant: in 95 of 100 cases no share of any dimension is off by more, and so is no norm of the gaps.
        rows = sums.weight**2 / sums.weight_square
        bound = np.sqrt(np.log(2 * len(sums.inside) / 0.05) / (2 * rows))
        value = compute(sums)
        return np.maximum(value - bound, 0), np.minimum(value + bound, 1)

    return curve._replace(compute=compute, interval=interval, convention=words, better="lower")


def _checked(levels: Levels) -> tuple[float, ...]:
    given = tuple(float(q) for q in levels)
    if not given or not all(0 <= q <= 1 for q in given):
        raise ValueError(
            f"`levels` must be one or more numbers in [0, 1], got {given}. Leave them out for 0.01 to 0.99."
        )
    return given


def _words(levels: tuple[float, ...], kind: Kind) -> str:
    what = "F(y) <= q" if kind == "quantile" else "y in the central interval"
    grid = ", ".join(f"{q:g}" for q in levels[:10])
    many = f"{len(levels)} levels from {min(levels):g} to {max(levels):g}"
    return f"{what}; {many if len(levels) > 10 else 'levels ' + grid}"
