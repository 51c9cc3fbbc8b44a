"""Continuous ranked probability score and its kin for several dimensions: of mixtures of normals, and of samples."""

import math
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import folded_normal_mean
from bayescal.metrics.likelihood import mean_metric
from bayescal.metrics.regression import check_normals
from bayescal.predictive import Gaussian, float32_or_wider, weighted_sum
from bayescal.types import Array, Metric

Estimator = Literal["fair", "v"]


@cache
def crps(*, over_dim: Literal["mean", "sum"] = "mean") -> Metric:
    """Continuous ranked probability score of a mixture of normals, mean over rows of `mixture_crps`.

    In the targets' unit, at least 0; lower is better; for one member that of `crps_gaussian`, for a point the absolute
    error. Interval: normal, 95 %.

    Args:
        over_dim: "mean" or "sum" over `dim`; each dimension is scored by itself, `energy_score` scores them together.

    Raises:
        ValueError: for another word.
    Source: Gneiting and Raftery 2007; Grimit et al. 2006 for mixtures (recalled).
    """
    if over_dim not in ("mean", "sum"):
        raise ValueError(f"`over_dim` must be 'mean' or 'sum', got {over_dim!r}. For one dimension they are the same.")

    def score(pred, targets):
        each = mixture_crps(pred, targets)
        return each.mean(-1) if over_dim == "mean" else each.sum(-1)

    return mean_metric(score, f"closed form of the mixture of normals; {over_dim} over dim")


def mixture_crps(pred: Gaussian, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch dim"]:
    """CRPS of a mixture of normals: sum_s w_s A(y - m_s, v_s) - 1/2 sum_s sum_t w_s w_t A(m_s - m_t, v_s + v_t).

    A(m, v) = E|N(m, v)|. In the targets' unit, at least 0 up to rounding; lower is better. Time grows with the square of
    the number of members, memory does not.

    Args:
        pred: predictive; the variances of the means count too.
        targets: what was seen.
    Source: Grimit, Gneiting, Berrocal and Johnson 2006.
    """
    check_normals(pred, targets)
    mean, variance = float32_or_wider(pred.mean), pred.member_variance()
    weights = jnp.broadcast_to(pred.weights()[..., None], mean.shape)
    error = weighted_sum(folded_normal_mean(jnp.asarray(targets)[None] - mean, variance), weights)
    own = weighted_sum(weights * jnp.sqrt(variance / math.pi), weights)  # 1/2 A(0, 2 v) = sqrt(v / pi)

    def distance(one, other):
        (m, v, w), (n, u, q) = one, other
        size = folded_normal_mean(m - n, v + u)
        return jnp.where(w * q == 0, 0, w * q * jnp.where(w * q == 0, 0, size))

    return error - own - _over_pairs(distance, (mean, variance, weights))


def crps_gaussian(
    mean: Float[Array, "*batch"], std: Float[Array, "*batch"], y: Float[Array, "*batch"]
) -> Float[jax.Array, "*batch"]:
    """CRPS of a normal forecast: s [z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)], z = (y - mean) / s.

    In the targets' unit, at least 0; lower is better; |y - mean| where the standard deviation is 0.

    Args:
        mean: of the forecast.
        std: standard deviation of the forecast (not the variance), at least 0.
        y: what was seen.
    Source: Gneiting and Raftery 2007.
    """
    mean, std, y = (float32_or_wider(x) for x in (mean, std, y))
    return folded_normal_mean(y - mean, std**2) - std / math.sqrt(math.pi)


def crps_ensemble(
    samples: Float[Array, "*batch member"], y: Float[Array, "*batch"], *, estimator: Estimator = "fair"
) -> Float[jax.Array, "*batch"]:
    """CRPS from samples: mean |x - y| - 1/2 mean |x - x'|, in the targets' unit, at least 0; lower is better.

    In O(m log m): with the samples sorted it is the integral of a step function over the gaps between them, a sum of
    terms that are all at least 0, so that nothing cancels.

    Args:
        samples: of the forecast, all alike.
        y: what was seen.
        estimator: "fair" takes the mean |x - x'| over pairs of different samples: unbiased for the forecast that they
            were drawn from. "v" takes it over all pairs, the CRPS of the samples' own step function; what most
            libraries have; larger by mean |x - x'| / 2m.

    Raises:
        ValueError: for another estimator, no samples, or a single one where "fair".
    Source: Gneiting and Raftery 2007; fair: Ferro 2014 (recalled, formula not checked against the paper).
    """
    m = samples.shape[-1]
    _check_estimator(estimator, m)
    # numpy's sort of short rows is some twenty times XLA's on a CPU; jax arrays and traces are sorted where they are.
    if isinstance(samples, np.ndarray) and isinstance(y, np.ndarray):
        wide = np.result_type(samples, y, np.float32)
        x = jnp.asarray(np.sort(np.subtract(samples, y[..., None], dtype=wide), axis=-1))
        return _crps_of_sorted(float32_or_wider(x), estimator)
    return _crps_of_sorted(jnp.sort(float32_or_wider(samples) - jnp.asarray(y)[..., None], axis=-1), estimator)


@partial(jax.jit, static_argnames="estimator")
def _crps_of_sorted(x, estimator):
    m = x.shape[-1]
    below, above = jnp.diff(jnp.minimum(x, 0)), jnp.diff(jnp.maximum(x, 0))  # parts of each gap on either side of y
    rank = jnp.arange(1, m, dtype=x.dtype)
    # Of F^2 below y and (1 - F)^2 above it, F = rank / m; fair draws the two samples without replacement.
    apart = m * (m - 1) if estimator == "fair" else m * m
    off = 1 if estimator == "fair" else 0
    inside = below * (rank * (rank - off)) + above * ((m - rank) * (m - rank - off))
    return inside.sum(-1) / apart + jnp.maximum(x[..., 0], 0) + jnp.maximum(-x[..., -1], 0)


def energy_score(
    samples: Float[Array, "*batch member dim"], y: Float[Array, "*batch dim"], *, estimator: Estimator = "fair"
) -> Float[jax.Array, "*batch"]:
    """Energy score from samples: mean ||x - y|| - 1/2 mean ||x - x'||, in the targets' unit; lower is better.

    Euclidean norm over `dim`; for one dimension `crps_ensemble`. Proper for the joint distribution, but says little about
    dependence: see `variogram_score`. Time grows with the square of the number of samples, memory does not.

    Args:
        samples: of the forecast, all alike.
        y: what was seen.
        estimator: as in `crps_ensemble`; "fair" may be negative.

    Raises:
        ValueError: as `crps_ensemble`.
    Source: Gneiting and Raftery 2007.
    """
    m = samples.shape[-2]
    _check_estimator(estimator, m)
    x = jnp.moveaxis(float32_or_wider(samples) - jnp.asarray(y)[..., None, :], -2, 0)
    pairs = _over_pairs(lambda one, other: _length(one - other), x)
    return _length(x).mean(0) - pairs / (m * (m - 1) if estimator == "fair" else m * m)


def variogram_score(
    samples: Float[Array, "*batch member dim"],
    y: Float[Array, "*batch dim"],
    *,
    p: float = 0.5,
    pair_weights: Float[Array, "dim dim"] | None = None,
) -> Float[jax.Array, "*batch"]:
    """Variogram score sum_ij w_ij (|y_i - y_j|^p - mean |x_i - x_j|^p)^2 over ordered pairs of dimensions; lower is better.

    In the targets' unit to the power of 2p, at least 0. Sensitive to dependence, blind to a shift of all dimensions
    together. The mean is over all samples ("v").

    Args:
        samples: of the forecast, all alike.
        y: what was seen.
        p: order, positive.
        pair_weights: of each pair of dimensions, in both orders; None = ones.

    Raises:
        ValueError: for an order that is not positive.
    Source: Scheuerer and Hamill 2015.
    """
    if not p > 0:
        raise ValueError(f"`p` must be positive, got {p!r}. The usual are 0.5 and 1.")
    y, x = float32_or_wider(y), jnp.moveaxis(float32_or_wider(samples), -2, 0)
    add = lambda total, one: (total + _variogram(one, p), None)
    expected = jax.lax.scan(add, jnp.zeros((*x.shape[1:], x.shape[-1]), x.dtype), x)[0] / len(x)
    square = (_variogram(y, p) - expected) ** 2
    return (square if pair_weights is None else square * pair_weights).sum((-2, -1))


def _length(x):
    """Euclidean length over the last axis, with a gradient at 0 too."""
    square = (x**2).sum(-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), square)


def _variogram(x, p):
    return jnp.abs(x[..., :, None] - x[..., None, :]) ** p


def _over_pairs(distance, columns):
    """Sum over unordered pairs of members of a symmetric distance, one shift of the member axis after another."""
    members = len(jax.tree.leaves(columns)[0])
    shape = jax.eval_shape(distance, columns, columns)

    def add(total, shift):
        other = jax.tree.map(lambda x: x[(jnp.arange(members) + shift) % members], columns)
        once = jnp.where(2 * shift == members, 0.5, 1.0).astype(shape.dtype)  # that shift meets every pair twice
        return total + once * distance(columns, other).sum(0), None

    return jax.lax.scan(add, jnp.zeros(shape.shape[1:], shape.dtype), jnp.arange(1, members // 2 + 1))[0]


def _check_estimator(estimator: str, members: int) -> None:
    if estimator not in ("fair", "v"):
        raise ValueError(f"`estimator` must be 'fair' or 'v', got {estimator!r}. 'fair' is unbiased.")
    least = 2 if estimator == "fair" else 1
    if members < least:
        raise ValueError(
            f"`samples` must have at least {least} members for estimator {estimator!r}, got {members}. "
            "With one sample use 'v', which is then the distance to it."
        )
