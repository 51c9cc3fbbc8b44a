"""Mixtures of normal distributions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Num

from bayescal.predictive.mixture import (
    Mixture,
    check_target_shape,
    float32_or_wider,
    host_targets,
    refuse,
    weighted_sum,
    weighted_variance,
)
from bayescal.types import Array, Key, pytree


@pytree
class Gaussian(Mixture):
    """Mixture over members of normal distributions, independent over `dim`.

    Args:
        mean: mean of each member, in the targets' unit.
        variance: noise variance of each member, in the targets' unit squared: aleatoric.
        mean_variance: variance of the mean where it is known in closed form (linearised Laplace): epistemic.
        member_weights: as in `Categorical`.
    """

    per_member, event_axes = "mean", 1

    mean: Float[Array, "member *batch dim"]
    variance: Float[Array, "member *batch dim"]
    mean_variance: Float[Array, "member *batch dim"] | None = None
    member_weights: Float[Array, "member *#batch"] | None = None

    def __post_init__(self):
        self.check_shapes("(member, *batch, dim)")
        for name in ("variance", "mean_variance"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != np.shape(self.mean):
                raise ValueError(
                    f"`{name}` must have the shape of `mean`, {np.shape(self.mean)}, got {np.shape(value)}. "
                    "Broadcast it to one value per member, example and dimension."
                )

    def member_variance(self) -> Float[jax.Array, "member *batch dim"]:
        """Variance of each member: noise plus the variance of its mean, squared unit."""
        variance = float32_or_wider(self.variance)
        return variance if self.mean_variance is None else variance + self.mean_variance

    def member_log_prob(self, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "member *batch"]:
        """Log-density of the target under each member, nats, summed over `dim`."""
        check_target_shape(jnp.shape(targets), tuple(self.mean.shape[1:]))
        variance = self.member_variance()
        terms = (
            jnp.log(2 * math.pi * variance) + (jnp.asarray(targets)[None] - float32_or_wider(self.mean)) ** 2 / variance
        )
        return -0.5 * terms.sum(-1)

    def log_prob(self, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch"]:
        """Log-density of the target under the mixture, nats (not that of the moment-matched normal)."""
        return self.log_pooled(self.member_log_prob(targets))

    def pooled_mean(self) -> Float[jax.Array, "*batch dim"]:
        """Mean of the mixture, in the targets' unit."""
        return weighted_sum(float32_or_wider(self.mean), self.weights()[..., None])

    def pooled_variance(self) -> Float[jax.Array, "*batch dim"]:
        """Variance of the mixture by the law of total variance, in squared unit."""
        weights = self.weights()[..., None]
        return weighted_sum(self.member_variance(), weights) + variance_of_means(self)

    def member_entropy(self) -> Float[jax.Array, "member *batch"]:
        """Differential entropy of each member, nats, summed over `dim`; higher = less sure."""
        return 0.5 * jnp.log(2 * math.pi * math.e * self.member_variance()).sum(-1)

    def log_probs(self):
        """Normal distributions have no classes."""
        refuse("Gaussian", "log_probs", "For densities use `log_prob(targets)`, and `nll` as the metric.")

    def top_label(self):
        """Normal distributions have no classes."""
        refuse("Gaussian", "top_label", "Metrics of regression are in `docs/metrics.md`.")

    def entropy(self):
        """A mixture of normals has no entropy in closed form."""
        refuse("Gaussian", "entropy", "Use `decompose` (variance) or `member_entropy`.")

    def free_energy(self):
        """Normal distributions come without logits."""
        refuse("Gaussian", "free_energy", "Use `decompose(pred).epistemic` or a feature score.")

    def sample(self, key: Key) -> Float[jax.Array, "*batch dim"]:
        """One value per example and dimension, drawn from the mixture."""
        pick, noise = jax.random.split(key)
        log_weights = jnp.moveaxis(jnp.log(jnp.broadcast_to(self.weights(), self.mean.shape[:-1])), 0, -1)
        member = jax.random.categorical(pick, log_weights, axis=-1)[None, ..., None]
        mean = jnp.take_along_axis(self.mean, member, 0)[0]
        variance = jnp.take_along_axis(self.member_variance(), member, 0)[0]
        return mean + jnp.sqrt(variance) * jax.random.normal(noise, mean.shape, mean.dtype)

    def check_targets(self, targets) -> None:
        """Raises unless `targets` are finite floats of shape (*batch, dim). Host only."""
        targets = host_targets(targets, tuple(self.mean.shape[1:]), "floats", "(member, *batch, dim)")
        if not np.issubdtype(targets.dtype, np.floating):
            raise ValueError(f"`targets` must be floats, got {targets.dtype}. Convert them with `astype(np.float32)`.")
        if not np.isfinite(targets).all():
            raise ValueError(
                f"`targets` must be finite, got {int((~np.isfinite(targets)).sum())} NaN or infinite of "
                f"{targets.size}. Drop or repair those rows."
            )


def variance_of_means(pred: Gaussian) -> Float[jax.Array, "*batch dim"]:
    """Variance over members of their means, sum_s w_s (m_s - m)^2, in squared unit; exactly zero when all agree."""
    return weighted_variance(float32_or_wider(pred.mean), pred.weights()[..., None])


def rescale(pred: Gaussian, shift: Num[Array, "*dim"] | float, scale: Num[Array, "*dim"] | float) -> Gaussian:
    """Predictive of y = shift + scale * z for a predictive of standardised targets z: back to the targets' own unit.

    Args:
        pred: predictive of the standardised targets.
        shift: mean that was subtracted, () or (dim,).
        scale: standard deviation that was divided by, () or (dim,), positive.
    Raises:
        ValueError: for a scale that is not positive.
    """
    if not isinstance(scale, Tracer) and not np.all(np.asarray(scale) > 0):
        raise ValueError(
            f"`scale` must be positive, got {scale}. Pass the standard deviation the targets were divided by."
        )
    dim = pred.mean.shape[-1]
    for name, value in (("shift", shift), ("scale", scale)):
        if jnp.shape(value) not in ((), (dim,)):
            raise ValueError(
                f"`{name}` must have shape () or ({dim},), got {jnp.shape(value)}. Give one per dimension."
            )
    squared = lambda v: None if v is None else v * jnp.square(scale)
    return dataclasses.replace(
        pred,
        mean=shift + scale * pred.mean,
        variance=squared(pred.variance),
        mean_variance=squared(pred.mean_variance),
    )
