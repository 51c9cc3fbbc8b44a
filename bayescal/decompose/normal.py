"""Normal distributions taken apart: the law of total variance, and bounds on what has no closed form."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.predictive import Gaussian, float32_or_wider, log_pool, variance_of_means, weighted_sum
from bayescal.types import Array


def variance_parts(pred: Gaussian) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) by the law of total variance, squared unit, each (*batch, dim).

    Aleatoric is the mean noise variance; epistemic the variance of the members' means plus the mean of `mean_variance`.
    """
    weights = pred.weights()[..., None]
    epistemic = variance_of_means(pred)
    if pred.mean_variance is not None:
        epistemic = epistemic + weighted_sum(pred.mean_variance, weights)
    return weighted_sum(pred.variance, weights), epistemic


def moment_matched_information(pred: Gaussian) -> Float[jax.Array, "*batch"]:
    """0.5 sum_dim log(1 + epistemic / aleatoric), nats, >= 0; higher = more unlike the training data.

    The mutual information of y and its mean if the mean were normal: free of the targets' unit.
    """
    return matched_information(*variance_parts(pred))


def matched_information(aleatoric: Float[Array, "*batch dim"], epistemic: Float[Array, "*batch dim"]) -> jax.Array:
    """0.5 sum_dim log(1 + epistemic / aleatoric) of two variances, nats, (*batch,)."""
    return 0.5 * jnp.log1p(epistemic / aleatoric).sum(-1)


def information_bounds(pred: Gaussian) -> tuple[Float[jax.Array, "*batch"], Float[jax.Array, "*batch"]]:
    """(lower, upper) bound of the mutual information of y and the member, nats, in [0, log(num_members)].

    Both are -sum_s w_s log sum_t w_t exp(-D(s, t)), with the Bhattacharyya distance below and the Kullback-Leibler
    divergence above. Zero when all members agree, and for one member; higher = more unlike the training data. The
    entropy of the mixture lies between the mean `member_entropy` plus either. Memory is (member, member, *batch, dim).

    Args:
        pred: mixture of normals; the variance of each member counts `mean_variance`, as far as it is known.
    Source: Kolchinsky and Tracey 2017, Estimating mixture entropy with pairwise distances (recalled).
    """
    mean, variance = float32_or_wider(pred.mean), pred.member_variance()
    weights = jnp.broadcast_to(pred.weights(), mean.shape[:-1])
    counted = (weights != 0)[..., None]
    mean, variance = jnp.where(counted, mean, 0), jnp.where(counted, variance, 1)
    square = (mean[:, None] - mean[None]) ** 2
    ratio = jnp.log(variance[:, None]) - jnp.log(variance[None])
    # log of arithmetic over geometric mean of two variances = log cosh(ratio / 2), without cancellation
    half = jnp.abs(ratio) / 2
    spread = jnp.where(half < 1, jnp.log1p(2 * jnp.sinh(jnp.minimum(half, 1) / 2) ** 2), _log_cosh(half))
    near = 0.25 * square / (variance[:, None] + variance[None]) + 0.5 * spread
    far = 0.5 * (square / variance[None] + jnp.expm1(ratio) - ratio)
    pooled = lambda distance: weighted_sum(-jax.vmap(log_pool, (0, None))(-distance.sum(-1), weights), weights)
    return jnp.maximum(pooled(near), 0), jnp.maximum(pooled(far), 0)


def entropy_bound_parts(pred: Gaussian) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean of the members' differential entropies, upper bound of the information), nats, (*batch,).

    total is an upper bound of the mixture's differential entropy; like the aleatoric part it may be negative.
    """
    return weighted_sum(pred.member_entropy(), pred.weights()), information_bounds(pred)[1]


def _log_cosh(x):
    return x + jnp.log1p(jnp.exp(-2 * x)) - jnp.log(2.0).astype(x.dtype)
