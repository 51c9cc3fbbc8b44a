"""Normal distributions taken apart: the law of total variance, and bounds on what has no closed form."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.decompose.information import exponential_excess
from bayescal.predictive import Gaussian, float32_or_wider, refuse, variance_of_means, weighted_sum
from bayescal.types import Array


def variance_parts(pred: Gaussian) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) by the law of total variance, squared unit, each (*batch, dim).

    Aleatoric is the mean noise variance; epistemic the variance of the members' means plus the mean of `mean_variance`.

    Raises:
        TypeError: for classes, whose measure is `class_variance_parts`.
    """
    _check_normal(pred, "variance_parts")
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

    Raises:
        TypeError: for another family.
    Source: Kolchinsky and Tracey 2017, Estimating mixture entropy with pairwise distances (recalled).
    """
    _check_normal(pred, "information_bounds")
    mean, variance = float32_or_wider(pred.mean), pred.member_variance()
    weights = jnp.broadcast_to(pred.weights(), mean.shape[:-1])
    counted = (weights != 0)[..., None]
    mean, variance = jnp.where(counted, mean, 0), jnp.where(counted, variance, 1)
    square = (mean[:, None] - mean[None]) ** 2
    one, other = variance[:, None], variance[None]
    change = (one - other) / other
    close = jnp.abs(change) < 0.5
    ratio = jnp.where(close, jnp.log1p(jnp.where(close, change, 0)), jnp.log(one) - jnp.log(other))
    half = jnp.abs(ratio) / 2  # log of arithmetic over geometric mean of two variances = log cosh(ratio / 2)
    small = jnp.log1p(2 * jnp.sinh(jnp.minimum(half, 1) / 2) ** 2)
    spread = jnp.where(half < 1, small, half + jnp.log1p(jnp.exp(-2 * half)) - jnp.log(jnp.full_like(half, 2)))
    near = 0.25 * square / (one + other) + 0.5 * spread
    far = 0.5 * (square / other + exponential_excess(ratio))

    def pooled(distance):  # -log of a mean of exponentials that may all be near one
        within = jax.vmap(lambda d: weighted_sum(jnp.expm1(-d), weights))(distance.sum(-1))
        return weighted_sum(-jnp.log1p(jnp.minimum(within, 0)), weights)

    return pooled(near), pooled(far)


def entropy_bound_parts(pred: Gaussian) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean of the members' differential entropies, upper bound of the information), nats, (*batch,).

    total is an upper bound of the mixture's differential entropy; like the aleatoric part it may be negative.
    """
    upper = information_bounds(pred)[1]
    return weighted_sum(pred.member_entropy(), pred.weights()), upper


def _check_normal(pred, what: str) -> None:
    if not isinstance(pred, Gaussian):
        refuse(
            type(pred).__name__, what, "It is of normals; of classes see `class_variance_parts` and `entropy_parts`."
        )
