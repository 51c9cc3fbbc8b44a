"""Scores of forecasts of numbers: errors of the mean, quantiles and intervals of mixtures of normals."""

from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Float

from bayescal.binning import namespace, wilson_interval
from bayescal.metrics.likelihood import MeanSums, mean_metric
from bayescal.predictive import Gaussian, Predictive, float32_or_wider, weighted_sum
from bayescal.predictive.mixture import check_target_shape
from bayescal.types import Array, Metric

HALVINGS = 40  # of a bracket: past float32


@cache
def squared_error(*, over_dim: Literal["mean", "sum"] = "mean") -> Metric:
    """Mean squared error of the pooled mean, mean (m - y)^2, in squared unit; lower is better.

    Interval: normal, 95 %.

    Args:
        over_dim: "mean" or "sum" over `dim`.

    Raises:
        ValueError: for another word.
    """
    if over_dim not in ("mean", "sum"):
        raise ValueError(f"`over_dim` must be 'mean' or 'sum', got {over_dim!r}. For one dimension they are the same.")

    def score(pred, targets):
        check_normals(pred, targets)
        square = (pred.pooled_mean() - targets) ** 2
        return square.mean(-1) if over_dim == "mean" else square.sum(-1)

    return mean_metric(score, f"of the pooled mean; {over_dim} over dim")


@cache
def root_mean_squared_error(*, over_dim: Literal["mean", "sum"] = "mean") -> Metric:
    """Root mean squared error of the pooled mean, sqrt(mean (m - y)^2), in the targets' unit; lower is better.

    The root is taken once, of the mean over all rows. Interval: the roots of that of `squared_error`.

    Args:
        over_dim: as in `squared_error`.
    """
    return _root(squared_error(over_dim=over_dim))


@cache
def sharpness() -> Metric:
    """Sharpness sqrt(mean variance) of the mixture (noise and spread of the members), in the targets' unit.

    Smaller = sharper, which is better only among forecasts that are calibrated. Mean over rows and dim. Interval: normal
    for the variance, 95 %, and its roots.
    """

    def score(pred, targets):
        check_normals(pred, targets)
        return pred.pooled_variance().mean(-1)

    return _root(mean_metric(score, "root of the mean variance; mean over dim"))._replace(better="neither")


@cache
def interval_width(*, level: float = 0.9) -> Metric:
    """Mean width of the central interval of the mixture, in the targets' unit; smaller = sharper.

    Mean over rows and dim. Interval: normal, 95 %.

    Args:
        level: of the central interval, in (0, 1).

    Raises:
        ValueError: for a level outside (0, 1).
    """
    _check_share("level", level)

    def score(pred, targets):
        low, high = central_interval(pred, level=level)
        return (high - low).mean(-1)

    return mean_metric(score, f"central {100 * level:g} % interval of the mixture; mean over dim")._replace(
        better="neither"
    )


@cache
def coverage(*, level: float = 0.9) -> Metric:
    """Share of targets inside the central interval of the mixture, (1 - level) / 2 <= F(y) <= (1 + level) / 2.

    In [0, 1]; `level` is best, neither more nor less. Mean over dim. Interval: Wilson, 95 %, with Kish's effective rows.

    Args:
        level: of the central interval, in (0, 1).

    Raises:
        ValueError: for a level outside (0, 1).
    """
    _check_share("level", level)
    tail = (1 - level) / 2

    def score(pred, targets):
        reached = mixture_cdf(pred, targets)
        return ((reached >= tail) & (reached <= 1 - tail)).astype(jnp.float32).mean(-1)

    def interval(sums):
        return wilson_interval(sums.value / sums.weight, sums.effective_rows())

    words = f"central {100 * level:g} % interval of the mixture, ends included; mean over dim"
    return mean_metric(score, words, interval)._replace(better="neither")


@cache
def winkler_score(*, level: float = 0.9) -> Metric:
    """Mean `interval_score` of the central interval of the mixture, in the targets' unit; lower is better.

    Mean over rows and dim. Interval: normal, 95 %.

    Args:
        level: of the central interval, in (0, 1).

    Raises:
        ValueError: for a level outside (0, 1).
    Source: Winkler 1972; Gneiting and Raftery 2007.
    """
    _check_share("level", level)

    def score(pred, targets):
        return interval_score(*central_interval(pred, level=level), targets, level=level).mean(-1)

    return mean_metric(score, f"central {100 * level:g} % interval of the mixture; mean over dim")


@cache
def quantile_score(*, quantile: float) -> Metric:
    """Mean `pinball` loss of a quantile of the mixture, in the targets' unit; lower is better.

    Mean over rows and dim. Interval: normal, 95 %.

    Args:
        quantile: which one, in (0, 1).

    Raises:
        ValueError: for a quantile outside (0, 1).
    Source: Gneiting and Raftery 2007.
    """
    _check_share("quantile", quantile)

    def score(pred, targets):
        return pinball(mixture_quantile(pred, quantile=quantile), targets, quantile=quantile).mean(-1)

    return mean_metric(score, f"quantile {quantile:g} of the mixture; mean over dim")


def pinball(
    prediction: Float[Array, "*batch"], y: Float[Array, "*batch"], *, quantile: float
) -> Float[jax.Array, "*batch"]:
    """Pinball (quantile, check) loss max(q (y - f), (q - 1)(y - f)), in the targets' unit, at least 0; lower is better.

    The mean over all quantiles is half the CRPS.

    Args:
        prediction: of the quantile.
        y: what was seen.
        quantile: q, in (0, 1).

    Raises:
        ValueError: for a quantile outside (0, 1).
    Source: Gneiting and Raftery 2007.
    """
    _check_share("quantile", quantile)
    error = float32_or_wider(y) - prediction
    return jnp.maximum(quantile * error, (quantile - 1) * error)


def interval_score(
    low: Float[Array, "*batch"], high: Float[Array, "*batch"], y: Float[Array, "*batch"], *, level: float
) -> Float[jax.Array, "*batch"]:
    """Interval (Winkler) score (u - l) + 2/alpha max(l - y, 0) + 2/alpha max(y - u, 0), alpha = 1 - level; lower is better.

    In the targets' unit. It is 2/alpha times the pinball losses of l and u as quantiles alpha/2 and 1 - alpha/2, also where
    they cross.

    Args:
        low: lower end l.
        high: upper end u.
        y: what was seen.
        level: share that the interval should hold, in (0, 1); that of the rest is alpha.

    Raises:
        ValueError: for a level outside (0, 1).
    Source: Winkler 1972; Gneiting and Raftery 2007.
    """
    _check_share("level", level)
    low, high, y = (float32_or_wider(x) for x in (low, high, y))
    outside = jnp.maximum(low - y, 0) + jnp.maximum(y - high, 0)
    return high - low + 2 / (1 - level) * outside


def mixture_cdf(pred: Gaussian, values: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch dim"]:
    """Distribution function of the mixture, F(y) = sum_s w_s Phi((y - m_s) / sqrt(v_s)), in [0, 1], for each dimension.

    Args:
        pred: predictive; the variances of the means count too.
        values: where.
    """
    check_normals(pred, values)
    z = (jnp.asarray(values)[None] - float32_or_wider(pred.mean)) / jnp.sqrt(pred.member_variance())
    return jnp.minimum(weighted_sum(ndtr(z), pred.weights()[..., None]), 1)


def mixture_quantile(pred: Gaussian, *, quantile: float) -> Float[jax.Array, "*batch dim"]:
    """Quantile of the mixture, F(x) = quantile, in the targets' unit, for each dimension.

    By bisection between the least and the greatest of the members' own; to float32's precision, exact for one member. Not
    differentiable for several.

    Args:
        pred: predictive; the variances of the means count too.
        quantile: which one, in (0, 1).

    Raises:
        ValueError: for a quantile outside (0, 1).
    """
    _check_share("quantile", quantile)
    check_normals(pred)
    side, tail = (
        (1, quantile) if quantile <= 0.5 else (-1, 1 - quantile)
    )  # the upper tail by reflection: F near 1 is coarse
    mean, spread = side * float32_or_wider(pred.mean), jnp.sqrt(pred.member_variance())
    weights = jnp.broadcast_to(pred.weights()[..., None], mean.shape)
    counts = weights != 0
    own = mean + spread * ndtri(jnp.asarray(tail, mean.dtype))

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) / 2
        below = weighted_sum(ndtr((middle[None] - mean) / spread), weights) < tail
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.where(counts, own, jnp.inf).min(0), jnp.where(counts, own, -jnp.inf).max(0)
    low, high = jax.lax.fori_loop(0, HALVINGS if len(mean) > 1 else 0, halve, ends)
    return side * (low + (high - low) / 2)


def central_interval(
    pred: Gaussian, *, level: float = 0.9
) -> tuple[Float[jax.Array, "*batch dim"], Float[jax.Array, "*batch dim"]]:
    """(low, high): the quantiles (1 - level) / 2 and (1 + level) / 2 of the mixture, in the targets' unit.

    Args:
        pred: predictive.
        level: share that it holds, in (0, 1).

    Raises:
        ValueError: for a level outside (0, 1).
    """
    _check_share("level", level)
    return mixture_quantile(pred, quantile=(1 - level) / 2), mixture_quantile(pred, quantile=(1 + level) / 2)


def check_normals(pred: Predictive, targets=None) -> None:
    """Raises unless the predictive is a mixture of normals, and targets, where given, have its shape."""
    if not isinstance(pred, Gaussian):
        raise TypeError(
            f"`pred` must be a Gaussian, got {type(pred).__name__}. Metrics of numbers need means and variances; for "
            "classes see `brier` and `calibration_error`."
        )
    if targets is not None:
        check_target_shape(jnp.shape(targets), tuple(pred.mean.shape[1:]))


def _root(metric: Metric) -> Metric:
    """The square root of a mean, and of its interval's ends."""

    def compute(sums: MeanSums):
        return namespace(sums.value).sqrt(metric.compute(sums))

    def interval(sums: MeanSums):
        assert metric.interval is not None
        low, high = metric.interval(sums)
        if low is None or not np.isfinite(high):
            return None, None
        return np.sqrt(np.maximum(low, 0)), np.sqrt(high)

    return metric._replace(compute=compute, interval=interval)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must lie in (0, 1), got {value!r}. It is a share, 0.9 and not 90.")
