"""Calibration of regression: one factor on the variance, and a monotone map of the distribution function."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Float

from bayescal.calibrate.calibrator import Calibrator, concrete
from bayescal.calibrate.selection import check_counted_rows
from bayescal.metrics.regression import mixture_cdf
from bayescal.predictive import Gaussian, float32_or_wider, undefined_where, weighted_sum
from bayescal.types import Array, pytree

HALVINGS = 60


@pytree
class VarianceScaling(Calibrator):
    """The pooled normal with its variance times a factor: `scaler(pred) -> Gaussian`, one member.

    The pool is N(mean, variance) of the mixture (law of total variance), and its variance is scaled whole: noise and
    spread of the members alike. Take pred apart (`decompose`) before, not after. The mean never changes.

    Args:
        factor: on the variance, for each dimension; above 1 = the forecasts were over-confident.
    """

    accuracy_preserving: ClassVar[bool] = True

    factor: Float[Array, "dim"]

    def __call__(self, pred: Gaussian) -> Gaussian:
        """The mixture's mean, and its variance times the factor.

        Raises:
            TypeError: for another family.
            ValueError: for another number of dimensions.
        """
        _check_gaussian(pred)
        _check_dim(pred, self.factor.shape[-1])
        return Gaussian(pred.pooled_mean()[None], (pred.pooled_variance() * self.factor)[None])


@pytree
class QuantileMap(Calibrator):
    """The distribution function after a monotone map R: F'(y) = R(F(y)), dimension by dimension.

    Args:
        pits: F(y) of the rows of the fit, sorted, between 0 and 1 themselves: where R is known.
        levels: R there, linear in between; the share of rows of the fit at or below.
    """

    accuracy_preserving: ClassVar[bool] = False  # the mean moves

    pits: Float[Array, "dim knots"]
    levels: Float[Array, "dim knots"]

    def __call__(self, pred: Gaussian) -> "MappedQuantiles":
        """The recalibrated distribution, which is no Gaussian: it answers `cdf`, `quantile` and `interval`.

        Raises:
            TypeError: for another family.
            ValueError: for another number of dimensions.
        """
        _check_gaussian(pred)
        _check_dim(pred, self.pits.shape[0])
        return MappedQuantiles(pred, self.pits, self.levels)


@pytree
class MappedQuantiles:
    """Distributions F'(y) = R(F(y)) of one number per row and dimension, F that of a mixture of normals.

    Args:
        base: the mixture of normals.
        pits, levels: the map R, as in `QuantileMap`.
    """

    base: Gaussian
    pits: Float[Array, "dim knots"]
    levels: Float[Array, "dim knots"]

    def cdf(self, values: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch dim"]:
        """F'(values), in [0, 1]."""
        return _interpolate(mixture_cdf(self.base, values), self.pits, self.levels)

    def quantile(self, level: float) -> Float[jax.Array, "*batch dim"]:
        """x with F'(x) = level, in the targets' unit: F's own quantile at R^-1(level).

        Infinite where targets of the fit at that level lie so far out that F is 0 or 1 in float32, 5 standard deviations up.

        Args:
            level: in (0, 1).

        Raises:
            ValueError: for a level outside.
        """
        _check_level(level)
        at = jax.vmap(lambda pits, levels: jnp.interp(level, levels, pits))(
            jnp.asarray(self.pits), jnp.asarray(self.levels)
        )
        return _mixture_quantiles(self.base, at)

    def interval(self, level: float) -> tuple[Float[jax.Array, "*batch dim"], Float[jax.Array, "*batch dim"]]:
        """(low, high): quantiles (1 - level) / 2 and (1 + level) / 2, in the targets' unit.

        Args:
            level: share of targets that it holds, in (0, 1).

        Raises:
            ValueError: for a level outside.
        """
        _check_level(level)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)


def fit_variance_scaling(
    pred: Gaussian, targets: Float[Array, "rows dim"], *, weights: Float[Array, "rows"] | None = None
) -> VarianceScaling:
    """factor = mean of (y - m)^2 / v, m and v the mixture's mean and variance: the nll's optimum, in closed form.

    Also what makes the mean squared standardised error 1. For one member it scales that member's variance. Its relative
    standard error is sqrt(2 / rows) where targets are normal.

    Args:
        pred: predictive of the validation rows (rows, dim).
        targets: floats (rows, dim).
        weights: weight of each row; None = ones.

    Raises:
        TypeError: for another family.
        ValueError: where all targets of a dimension equal their forecasts; for unusable predictions, targets or weights.
    Source: Levi et al. 2022, section 4 (recalled).
    """
    targets, weights = _rows(pred, targets, weights)
    factor = _factor(pred, targets, weights)
    if concrete(factor) and not (np.asarray(factor) > 0).all():
        raise ValueError(
            f"`targets` must differ from their forecasts, got a mean squared error of 0 in dimensions "
            f"{np.flatnonzero(~(np.asarray(factor) > 0)).tolist()}. Fit on rows that were not trained on."
        )
    return VarianceScaling(factor)


def fit_quantile_map(
    pred: Gaussian, targets: Float[Array, "rows dim"], *, weights: Float[Array, "rows"] | None = None
) -> QuantileMap:
    """R(p) = share of rows with F(y) <= p, ties at their middle, linear in between: isotonic regression of the PIT's ranks.

    The k-th smallest of n PITs is mapped to (k - 1/2) / n, and 0 and 1 to themselves, so that quantiles beyond the rows
    stay finite; the paper's k / n gives the largest PIT of the fit all the probability there is. Exact in the limit of many
    rows for every level at once; coverage at level q has a standard error of sqrt(q (1 - q) / rows) from the fit alone.

    Args:
        pred: predictive of the validation rows (rows, dim); a mixture is taken as such.
        targets: floats (rows, dim).
        weights: weight of each row; None = ones.

    Raises:
        TypeError: for another family.
        ValueError: for fewer than two rows, unusable predictions, targets or weights.
    Source: Kuleshov, Fenner and Ermon 2018, algorithm 1 (recalled).
    """
    targets, weights = _rows(pred, targets, weights)
    if len(targets) < 2:
        raise ValueError(
            "`targets` must have at least two rows for a map of quantiles, got 1. Use more validation rows."
        )
    pits = jnp.where(weights[:, None] > 0, mixture_cdf(pred, targets), 1)
    return QuantileMap(*jax.vmap(_mid_ranks, (1, None))(pits, weights))


@jax.jit
def _factor(pred, targets, weights):
    counted = (weights > 0)[:, None]
    squares = (targets - pred.pooled_mean()) ** 2 / pred.pooled_variance()
    return jnp.matmul(weights / weights.sum(), jnp.where(counted, squares, 0), precision="highest")


@jax.jit
def _mid_ranks(pits, weights):
    """Knots of the map: sorted PITs, and the share of weight below them and half of that at them."""
    order = jnp.argsort(pits)
    pits = pits[order]
    total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(weights[order])])
    below, upto = (total[jnp.searchsorted(pits, pits, side=side)] for side in ("left", "right"))
    ends = jnp.array([0.0, 1.0], pits.dtype)
    pits, levels = (jnp.concatenate([ends[:1], x, ends[1:]]) for x in (pits, (below + upto) / (2 * total[-1])))
    undefined = jnp.isnan(pits).any()
    return pits, jnp.where(undefined, jnp.nan, levels)


def _interpolate(at, xs, ys):
    """Piecewise linear, with a map for each dimension (the last axis)."""
    return undefined_where(jnp.isnan(at), jax.vmap(jnp.interp, (-1, 0, 0), -1)(at, jnp.asarray(xs), jnp.asarray(ys)))


@jax.jit
def _mixture_quantiles(pred, levels):
    """x with F(x) = level of each dimension, by bisection between the members' own; the upper half by reflection."""
    side = jnp.where(levels <= 0.5, 1, -1)
    tail = jnp.minimum(levels, 1 - levels)
    mean, spread = side * float32_or_wider(pred.mean), jnp.sqrt(pred.member_variance())
    weights = jnp.broadcast_to(pred.weights()[..., None], mean.shape)
    own = mean + spread * ndtri(tail)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) / 2
        below = weighted_sum(ndtr((middle[None] - mean) / spread), weights) < tail
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.where(weights != 0, own, jnp.inf).min(0), jnp.where(weights != 0, own, -jnp.inf).max(0)
    low, high = jax.lax.fori_loop(0, HALVINGS if len(mean) > 1 else 0, halve, ends)
    middle = low + (high - low) / 2
    nothing = undefined_where(jnp.isnan(pred.pooled_mean()), jnp.full_like(middle, -jnp.inf))
    return side * jnp.where(tail == 0, nothing, middle)


def _rows(pred, targets, weights):
    _check_gaussian(pred)
    if len(pred.batch_shape) != 1:
        raise ValueError(
            f"`pred` must have one batch axis, got batch shape {pred.batch_shape}. Flatten the rows, or `jax.vmap` the fit "
            "over experiments."
        )
    if concrete(pred, targets, weights):
        check_counted_rows(pred, np.asarray(targets), weights)
    weights = jnp.ones(pred.batch_shape) if weights is None else jnp.asarray(weights, jnp.float32)
    return float32_or_wider(targets), weights


def _check_gaussian(pred) -> None:
    if not isinstance(pred, Gaussian):
        raise TypeError(
            f"`pred` must be a Gaussian, got {type(pred).__name__}. For classes use `fit_temperature`; intervals of any "
            "forecast come from `bc.conformal`."
        )


def _check_dim(pred, dim: int) -> None:
    if pred.mean.shape[-1] != dim:
        raise ValueError(
            f"`pred` must have the {dim} dimensions of the fit, got {pred.mean.shape[-1]}. Pass forecasts of the same targets."
        )


def _check_level(level) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level!r}. 0.9 is usual.")
