"""Nonconformity of regression: residuals, plain or scaled, one-sided bounds, and distances from a pair of quantiles."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.conformal.conformity import Conformity, Interval
from bayescal.conformal.threshold import check_alpha, order_statistic, rank
from bayescal.decompose.normal import variance_parts
from bayescal.metrics.regression import mixture_quantile
from bayescal.predictive import Gaussian, undefined_where
from bayescal.predictive.mixture import check_target_shape
from bayescal.types import Array, pytree

Scale = Callable[[Gaussian], jax.Array]


def check_gaussian(pred) -> None:
    """Raises unless `pred` is a Gaussian."""
    if not isinstance(pred, Gaussian):
        raise TypeError(
            f"`pred` must be a Gaussian, got {type(pred).__name__}. For classes use `lac()` and kin, for quantiles of a "
            "network `fit_quantile_interval`."
        )


def predictive_deviation(pred: Gaussian) -> Float[jax.Array, "*batch dim"]:
    """Standard deviation of the pool, noise and disagreement, in the targets' unit; higher = less sure."""
    return jnp.sqrt(pred.pooled_variance())


@cache
def epistemic_deviation(*, floor: float) -> Scale:
    """Scale of a score that looks at the ensemble's disagreement alone: sqrt(epistemic variance) + floor.

    In the targets' unit; the intervals grow where the members disagree, however noisy they say the targets are.

    Args:
        floor: what is added, in the targets' unit, positive: with less, where members agree the interval has no width
            and the score no bound. A tenth of the residuals' standard deviation is a start.

    Raises:
        ValueError: for a floor that is not positive.
    Source: Papadopoulos, Vovk and Gammerman 2011 for residuals over a deviation plus a constant (recalled).
    """
    if not 0 < floor < float("inf"):
        raise ValueError(
            f"`floor` must be positive and finite, in the targets' unit, got {floor!r}. A tenth of the residuals' standard "
            "deviation is a start."
        )
    return lambda pred: jnp.sqrt(variance_parts(pred)[1]) + floor


def _residuals(pred: Gaussian, targets) -> jax.Array:
    """targets - mean, (rows, dim)."""
    check_gaussian(pred)
    centre = pred.pooled_mean()
    check_target_shape(jnp.shape(targets), centre.shape)
    return jnp.asarray(targets) - centre


def _unit(pred: Gaussian) -> jax.Array:
    return jnp.ones_like(pred.pooled_mean())


def _compiled(measure, region, name: str) -> Conformity:
    return Conformity(jax.jit(measure), jax.jit(region), False, name)


def _residual_score(scale: Scale, name: str) -> Conformity:
    def positive(pred):
        check_gaussian(pred)
        value = scale(pred)
        return undefined_where(~(value > 0), value)

    def measure(pred, targets, key):
        value = positive(pred)
        return abs(_residuals(pred, targets)) / value

    def region(pred, threshold, key):
        centre, half = pred.pooled_mean(), threshold * positive(pred)
        return Interval(centre - half, centre + half)

    return _compiled(measure, region, name)


@cache
def absolute() -> Conformity:
    """s(x, y) = |y - mean(x)|: intervals of one width everywhere, mean -+ threshold. In the targets' unit.

    Source: Lei et al. 2018 (recalled).
    """
    return _residual_score(_unit, "absolute residual")


@cache
def normalised(scale: Scale = predictive_deviation) -> Conformity:
    """s(x, y) = |y - mean(x)| / scale(x): intervals mean -+ threshold * scale, wider where the scale is. No unit.

    The better the scale follows the residuals' spread, the closer coverage is to 1 - alpha at every input; the marginal
    coverage holds for any. A scale that is not positive is undefined: an error in the fit, NaN in an interval.

    Args:
        scale: `pred -> (rows, dim)`, positive: `predictive_deviation`, `epistemic_deviation(floor=...)`, or your own,
            defined once, since a score is known by it.
    Source: Papadopoulos, Vovk and Gammerman 2011; Lei et al. 2018, section 5.2 (recalled).
    """
    return _residual_score(scale, "residual over scale")


@cache
def above() -> Conformity:
    """s(x, y) = y - mean(x): upper bounds (-inf, mean + threshold]. In the targets' unit.

    With `below()`, each at alpha / 2, the two bounds are an interval for skewed residuals: `Interval(low.low, high.high)`.

    Source: Romano, Patterson and Candès 2019, theorem 2, for one threshold a side (recalled).
    """

    def measure(pred, targets, key):
        return _residuals(pred, targets)

    def region(pred, threshold, key):
        high = pred.pooled_mean() + threshold
        return Interval(_endless(high, -jnp.inf), high)

    return _compiled(measure, region, "residual above")


@cache
def below() -> Conformity:
    """s(x, y) = mean(x) - y: lower bounds [mean - threshold, inf). In the targets' unit; see `above`."""

    def measure(pred, targets, key):
        return -_residuals(pred, targets)

    def region(pred, threshold, key):
        low = pred.pooled_mean() - threshold
        return Interval(low, _endless(low, jnp.inf))

    return _compiled(measure, region, "residual below")


def _endless(end, infinity):
    """Infinite, and NaN where the other end is."""
    return undefined_where(jnp.isnan(end), jnp.full_like(end, infinity))


@cache
def quantile_score(*, alpha: float) -> Conformity:
    """CQR: s(x, y) = max(low(x) - y, y - high(x)), low and high the pool's quantiles alpha / 2 and 1 - alpha / 2.

    In the targets' unit; negative inside. Intervals [low - threshold, high + threshold]: a negative threshold shrinks
    them, and where it shrinks one by more than its width, low > high, which holds nothing.

    Args:
        alpha: of the quantiles; that of the fit is usual, another is as valid.

    Raises:
        ValueError: for an alpha outside (0, 1).
    Source: Romano, Patterson and Candès 2019, equations 6 to 8 (recalled).
    """
    check_alpha(alpha)

    def quantiles(pred):
        check_gaussian(pred)
        centre, tail = pred.pooled_mean(), alpha / 2
        ends = mixture_quantile(pred, quantile=tail), mixture_quantile(pred, quantile=1 - tail)
        return Interval(*(undefined_where(jnp.isnan(centre), end) for end in ends))

    return _compiled(
        lambda pred, targets, key: outside(quantiles(pred), targets),
        lambda pred, threshold, key: widen(quantiles(pred), threshold),
        f"distance from the quantiles at {alpha:g}",
    )


def outside(interval: Interval, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch dim"]:
    """max(low - y, y - high): how far a target lies outside, in its unit; negative inside."""
    check_target_shape(jnp.shape(targets), interval.low.shape)
    targets = jnp.asarray(targets)
    return jnp.maximum(interval.low - targets, targets - interval.high)


def widen(interval: Interval, by) -> Interval:
    """[low - by, high + by]; low > high, an empty interval, where a negative `by` takes more than there is."""
    return Interval(interval.low - by, interval.high + by)


@pytree
class QuantileInterval:
    """Intervals [low - threshold, high + threshold]: `intervals(Interval) -> Interval`, for networks that give quantiles.

    Args:
        threshold: the k-th smallest distance outside, k = ceil((n + 1)(1 - alpha)), in the targets' unit; negative where
            the intervals were too wide, +infinity where k > n. (dim,).
        alpha: miscoverage wanted.
    """

    threshold: Float[Array, "dim"]
    alpha: float = dataclasses.field(metadata={"static": True})

    def __call__(self, interval: Interval) -> Interval:
        """Intervals of new rows, from the same network; low > high where one is empty."""
        return widen(interval, self.threshold)


def fit_quantile_interval(interval: Interval, targets: Float[Array, "rows dim"], *, alpha: float) -> QuantileInterval:
    """CQR of a quantile network: threshold = k-th smallest of max(low_i - y_i, y_i - high_i).

    Quantiles that cross (low > high) are allowed, as the theory allows any two functions.

    Args:
        interval: predicted quantiles of calibration rows that did not train the network, each (rows, dim).
        targets: in the same unit.
        alpha: miscoverage wanted.

    Raises:
        ValueError: for other shapes, no rows, values that are not finite, an alpha outside (0, 1).
    Source: Romano, Patterson and Candès 2019 (recalled).
    """
    shapes = [jnp.shape(x) for x in (interval.low, interval.high, targets)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or not shapes[0][0]:
        raise ValueError(
            "`interval` must hold `low` and `high` of the shape (rows, dim) of `targets`, with at least one row, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}. For one dimension add the axis: `targets[:, None]`."
        )
    values: tuple[Any, ...] = (interval.low, interval.high, targets)
    if not any(isinstance(x, Tracer) for x in values) and not all(np.isfinite(x).all() for x in values):
        raise ValueError(
            "`interval` and `targets` must be finite, got NaN or infinite values. Drop those rows, and look for a network "
            "that diverged."
        )
    alpha = check_alpha(alpha)
    return QuantileInterval(order_statistic(outside(interval, targets), rank(shapes[0][0], alpha)), alpha)
