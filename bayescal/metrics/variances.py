"""Calibration of forecast variances: do squared errors match them, bin by bin (UCE, ENCE)."""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import check_bins
from bayescal.metrics.inversion import gap_norm_interval
from bayescal.metrics.regression import check_normals
from bayescal.predictive import float32_or_wider
from bayescal.types import Array, WholeMetric

Binning = Literal["mass", "width"]
BLOCK = 1024  # rows added one by one; longer float32 sums lose digits


class VarianceBins(NamedTuple):
    """Sums per bin of forecast variance, each (bins,).

    weight: total weight.
    variance, squared_error: weighted sums.
    gap: weighted sum of variance - squared error, as differences: positive = under-confident.
    square: weighted sum of the squares of those.
    weight_square: sum of squared weights.
    """

    weight: Float[Array, "bins"]
    variance: Float[Array, "bins"]
    squared_error: Float[Array, "bins"]
    gap: Float[Array, "bins"]
    square: Float[Array, "bins"]
    weight_square: Float[Array, "bins"]


def variance_bins(
    variance: Float[Array, "batch"],
    squared_error: Float[Array, "batch"],
    *,
    weights: Float[Array, "batch"] | None = None,
    num_bins: int = 10,
    binning: Binning = "mass",
    of_std: bool = False,
) -> VarianceBins:
    """Sums of variance and squared error per bin of forecast variance: what UCE, ENCE and their plots read.

    Args:
        variance: forecast, at least 0.
        squared_error: (mean - y)^2.
        weights: of each row; None = all alike.
        num_bins: number of bins.
        binning: "mass", bins of equal mass, equal variances never parted: those whose weights reach, in order, from A to B
            of the total T are in bin floor(num_bins (A + B) / 2T); "width", of equal width from the least to the
            greatest, closed on the left, where most may be nearly empty.
        of_std: whether bins of equal width are of standard deviation.

    Raises:
        ValueError: for columns of other shapes, no rows, fewer than one bin, another binning.
    """
    check_bins(num_bins)
    if binning not in ("mass", "width"):
        raise ValueError(f"`binning` must be 'mass' or 'width', got {binning!r}. 'mass' fills all bins.")
    shapes = [np.shape(x) for x in (variance, squared_error, weights) if x is not None]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1 or not shapes[0][0]:
        raise ValueError(
            "`variance`, `squared_error` and `weights` must be one axis of the same length with at least one row, got "
            f"{', '.join(map(str, shapes))}. Take one dimension of the targets at a time."
        )
    return _bins(variance, squared_error, weights, num_bins, binning, of_std)


def uce(
    variance: Float[Array, "batch"],
    squared_error: Float[Array, "batch"],
    *,
    weights: Float[Array, "batch"] | None = None,
    num_bins: int = 10,
    binning: Binning = "mass",
) -> Float[jax.Array, ""]:
    """Uncertainty calibration error sum_b n_b / n |MSE_b - MV_b|, mean squared error and mean variance of bins of variance.

    In the targets' unit squared, at least 0; lower is better; biased upwards by noise, the more bins the more.

    Args:
        variance, squared_error, weights, num_bins: see `variance_bins`.
        binning: "mass"; or "width", of the variance.

    Raises:
        ValueError: as `variance_bins`.
    Source: Laves et al. 2020 (recalled, formula not checked against the paper; there bins have equal width).
    """
    bins = variance_bins(variance, squared_error, weights=weights, num_bins=num_bins, binning=binning)
    return jnp.abs(bins.gap).sum() / bins.weight.sum()


def ence(
    variance: Float[Array, "batch"],
    squared_error: Float[Array, "batch"],
    *,
    weights: Float[Array, "batch"] | None = None,
    num_bins: int = 10,
    binning: Binning = "mass",
) -> Float[jax.Array, ""]:
    """Expected normalised calibration error mean_b |RMV_b - RMSE_b| / RMV_b, over the bins of variance that have rows.

    Without unit, at least 0; lower is better; biased upwards by noise, the more bins the more. Roots are of
    the bin's mean variance and mean squared error; all bins count alike.

    Args:
        variance, squared_error, weights, num_bins: see `variance_bins`.
        binning: "mass"; or "width", of the standard deviation.

    Raises:
        ValueError: as `variance_bins`.
    Source: Levi et al. 2022 (recalled, formula not checked against the paper).
    """
    bins = variance_bins(variance, squared_error, weights=weights, num_bins=num_bins, binning=binning, of_std=True)
    filled = bins.weight > 0
    ratio = bins.squared_error / jnp.where(filled, bins.variance, 1)
    off = jnp.abs(1 - jnp.where(ratio > 0, jnp.sqrt(jnp.where(ratio > 0, ratio, 1)), ratio))
    return jnp.where(filled, off, 0).sum() / jnp.where(filled.any(), filled.sum(), jnp.nan)


@cache
def uncertainty_calibration_error(*, dim: int = 0, num_bins: int = 10, binning: Binning = "mass") -> WholeMetric:
    """`uce` of the mixture's variance and the squared error of its mean, in one dimension, as a metric for `evaluate`.

    In squared unit, at least 0; lower is better. Interval: by test inversion, for the bins' true gaps; none with a bin of
    a single row.

    Args:
        dim: which dimension of the targets.
        num_bins, binning: see `variance_bins`.

    Raises:
        ValueError: when read, for a dimension that the targets do not have; as `variance_bins`.
    Source: Laves et al. 2020 (recalled, formula not checked against the paper).
    """

    def interval(variance, squared_error, weights):
        bins = _on_host(variance, squared_error, weights, num_bins, binning, False)
        gap = bins.gap / bins.weight
        return _inverted(gap, _gap_variance(bins), bins.weight / bins.weight.sum())

    return _metric(uce, interval, dim, num_bins, binning, "variance")


@cache
def expected_normalised_calibration_error(
    *, dim: int = 0, num_bins: int = 10, binning: Binning = "mass"
) -> WholeMetric:
    """`ence` of the mixture's variance and the squared error of its mean, in one dimension, as a metric for `evaluate`.

    Without unit, at least 0; lower is better. Interval: by test inversion, for the bins' true gaps; none with a bin of a
    single row, or without error.

    Args:
        dim: which dimension of the targets.
        num_bins, binning: see `variance_bins`.

    Raises:
        ValueError: when read, for a dimension that the targets do not have; as `variance_bins`.
    Source: Levi et al. 2022 (recalled, formula not checked against the paper).
    """

    def interval(variance, squared_error, weights):
        bins = _on_host(variance, squared_error, weights, num_bins, binning, True)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.sqrt(bins.squared_error / bins.variance)
            slope = bins.weight / bins.variance / (2 * root)  # of 1 - RMSE / RMV in the gap of squares
        return _inverted(1 - root, _gap_variance(bins) * slope**2, np.full(len(root), 1 / len(root)))

    return _metric(ence, interval, dim, num_bins, binning, "standard deviation")


@cache
def variance_and_error(dim: int):
    """Reads (variance of the mixture, squared error of its mean) of one dimension of the targets."""

    def read(pred, targets):
        check_normals(pred, targets)
        if not 0 <= dim < pred.mean.shape[-1]:
            raise ValueError(
                f"`dim` must lie in [0, {pred.mean.shape[-1]}), got {dim}. Dimensions of the targets count from zero."
            )
        return pred.pooled_variance()[..., dim], (pred.pooled_mean()[..., dim] - targets[..., dim]) ** 2

    return read


def _metric(function, interval, dim, num_bins, binning, width_of) -> WholeMetric:
    def compute(variance, squared_error, weights):
        return function(variance, squared_error, weights=weights, num_bins=num_bins, binning=binning)

    how = "equal-mass bins of variance" if binning == "mass" else f"bins of equal width of the {width_of}"
    words = f"dimension {dim}; {num_bins} {how}; plug-in"
    return WholeMetric(variance_and_error(dim), compute, interval, words, regular=False)


@partial(jax.jit, static_argnames=("num_bins", "binning", "of_std"))
def _bins(variance, squared_error, weights, num_bins, binning, of_std) -> VarianceBins:
    v, e = float32_or_wider(variance), float32_or_wider(squared_error)
    w = jnp.ones_like(v) if weights is None else jnp.asarray(weights, v.dtype)
    place = _by_mass(v, w, num_bins) if binning == "mass" else _by_width(jnp.sqrt(v) if of_std else v, w, num_bins)
    gap = v - e
    columns = jnp.where(w[:, None] == 0, 0, w[:, None] * jnp.stack([jnp.ones_like(v), v, e, gap, gap**2, w], -1))
    blocks = max(1, len(v) // BLOCK)
    row = jnp.arange(len(v)) % blocks * num_bins + place
    sums = jnp.zeros((blocks * num_bins, 6), v.dtype).at[row].add(columns)
    return VarianceBins(*sums.reshape(blocks, num_bins, 6).sum(0).T)


def _by_mass(key, weights, num_bins: int):
    order = jnp.argsort(key)
    ordered = key[order]
    reached = jnp.concatenate([jnp.zeros(1, weights.dtype), jnp.cumsum(jax.lax.stop_gradient(weights)[order])])
    start, end = (reached[jnp.searchsorted(ordered, key, side=side)] for side in ("left", "right"))
    return jnp.clip((num_bins * (start + end) / (2 * reached[-1])).astype(jnp.int32), 0, num_bins - 1)


def _by_width(key, weights, num_bins: int):
    low = jnp.where(weights > 0, key, jnp.inf).min()
    high = jnp.where(weights > 0, key, -jnp.inf).max()
    wide = high > low
    return jnp.clip(
        jnp.where(wide, (key - low) / jnp.where(wide, high - low, 1), 0) * num_bins, 0, num_bins - 1
    ).astype(jnp.int32)


def _on_host(variance, squared_error, weights, num_bins, binning, of_std) -> VarianceBins:
    sums = variance_bins(variance, squared_error, weights=weights, num_bins=num_bins, binning=binning, of_std=of_std)
    filled = np.asarray(sums.weight) > 0
    return VarianceBins(*(np.asarray(x, np.float64)[filled] for x in sums))


def _gap_variance(bins: VarianceBins):
    """Sampling variance of each bin's mean gap; NaN for a single row."""
    rows = bins.weight**2 / bins.weight_square
    spread = np.maximum(bins.square / bins.weight - (bins.gap / bins.weight) ** 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rows > 1.5, spread / (rows - 1), np.nan)


def _inverted(gap, variance, share):
    """Interval for the mean size of gaps in any unit."""
    if not np.isfinite(gap).all() or not np.isfinite(variance).all():
        return None, None
    unit = 100 * float((abs(gap) + 3 * np.sqrt(variance)).max())  # `gap_norm_interval` is for gaps in [-1, 1]
    if unit == 0:
        return 0.0, 0.0
    low, high = gap_norm_interval(gap / unit, variance / unit**2, share)
    return low * unit, high * unit
