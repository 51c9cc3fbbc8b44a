"""Weights of members, pooling in log space, and the checks that all families share."""

from typing import ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.types import Array


def float32_or_wider(x: Array) -> jax.Array:
    """`x` in float32, or in its own precision where that is wider."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def undefined_where(lost, values: jax.Array) -> jax.Array:
    """`values`, and NaN where `lost`: for NaN that further arithmetic has to carry.

    Not `jnp.where(lost, nan, values)`: under jit on CPU XLA folds the exponential of that constant to a number (seen in jax
    0.10.2 and 0.12.0), and what is undefined comes out as another row's value.
    """
    infinity = jnp.where(lost, jnp.asarray(jnp.inf, values.dtype), jnp.asarray(0, values.dtype))
    return values + (infinity - infinity)


def normalised_weights(
    weights: Float[Array, "member *#batch"] | None, members: int, batch_ndim: int, dtype=jnp.float32
) -> Float[jax.Array, "member *#batch"]:
    """Member weights that sum to one over the member axis: w_s / sum w, or 1 / members where none are given.

    Args:
        weights: non-negative, (member,) or (member, *batch) with ones where they do not vary; None = equal.
        members: size of the member axis.
        batch_ndim: number of batch axes that the result must broadcast to.
        dtype: of equal weights, at least float32: that of what they weigh.

    Returns:
        Float array (member, *ones or batch). NaN where every weight is zero.
    """
    if weights is None:
        return jnp.full((members,) + (1,) * batch_ndim, 1.0 / members, jnp.promote_types(dtype, jnp.float32))
    weights = float32_or_wider(weights)
    if weights.ndim == 1:
        weights = weights.reshape((members,) + (1,) * batch_ndim)
    return weights / weights.sum(0, keepdims=True)


def weighted_sum(
    values: Float[Array, "member *shape"], weights: Float[Array, "member *#shape"]
) -> Float[jax.Array, "*shape"]:
    """Sum over members of w_s x_s, in which a member of weight zero counts for nothing even where x_s is NaN."""
    return jnp.where(weights == 0, 0, weights * jnp.where(weights == 0, 0, values)).sum(0)


def weighted_variance(
    values: Float[Array, "member *shape"], weights: Float[Array, "member *#shape"]
) -> Float[jax.Array, "*shape"]:
    """Variance over members, sum_s w_s (x_s - mean)^2, in squared unit; exactly zero when all that count agree.

    Two passes over differences to the member of the largest weight: never E[x^2] - E[x]^2, which cancels.

    Args:
        values: of each member; anything where the weight is zero.
        weights: non-negative, summing to one over members.
    """
    lead = jnp.argmax(jnp.broadcast_to(weights, values.shape), axis=0, keepdims=True)
    reference = jnp.take_along_axis(values, lead, axis=0)
    difference = jnp.where(weights == 0, 0, values - reference)
    centre = weighted_sum(difference, weights)
    return weighted_sum((difference - centre[None]) ** 2, weights)


def log_pool(
    log_probs: Float[Array, "member *shape"], weights: Float[Array, "member *#shape"]
) -> Float[jax.Array, "*shape"]:
    """Log density of the mixture: log sum_s w_s exp(l_s). The one place where distributions are pooled.

    Averages probabilities, never logits; does not underflow (a logit gap of 150 stays -150 and not -inf).

    Args:
        log_probs: log-probabilities or log-densities of each member, nats.
        weights: as `normalised_weights` gives them.
    """
    shifted = jnp.where(weights == 0, -jnp.inf, log_probs + jnp.log(jnp.where(weights == 0, 1, weights)))
    return jax.nn.logsumexp(shifted, axis=0)


def check_axes(name: str, value, least: int, shape: str) -> None:
    """Raises unless `value` has at least `least` axes, the member axis among them."""
    if np.ndim(value) < least:
        raise ValueError(
            f"`{name}` must have shape {shape}, got {np.shape(value)}. "
            f"For one network add the member axis: `{name}[None]`."
        )


def check_weights(weights, batch: tuple[int, ...], members: int) -> None:
    """Raises unless `weights` have shape (member,) or (member, *batch), with ones where they do not vary."""
    shape = np.shape(weights)
    trailing = shape[1:] if len(shape) > 1 else (1,) * len(batch)
    if (
        not shape
        or shape[0] != members
        or any(a not in (1, b) for a, b in zip(trailing, batch))
        or len(trailing) != len(batch)
    ):
        raise ValueError(
            f"`member_weights` must have shape (member,) or (member, *batch) = {(members, *batch)} with ones where it "
            f"does not vary, got {shape}. Give one weight per member."
        )


class Mixture:
    """What all families share. A family names the array that sets its shape, and how many last axes are one outcome."""

    per_member: ClassVar[str]
    event_axes: ClassVar[int]
    member_weights: Float[Array, "member *#batch"] | None

    @property
    def num_members(self) -> int:
        return getattr(self, self.per_member).shape[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        shape = getattr(self, self.per_member).shape
        return tuple(shape[1 : len(shape) - self.event_axes])

    def weights(self) -> Float[jax.Array, "member *#batch"]:
        """Member weights that sum to one, with as many batch axes as the predictive."""
        dtype = jnp.result_type(getattr(self, self.per_member))
        return normalised_weights(self.member_weights, self.num_members, len(self.batch_shape), dtype)

    def log_pooled(self, log_probs: Float[jax.Array, "member *shape"]) -> Float[jax.Array, "*shape"]:
        """`log_pool` of the members' log-probabilities (member, *batch, ...) with their weights; of one, its own."""
        if self.num_members == 1 and self.member_weights is None:
            return log_probs[0]
        weights = self.weights()
        return log_pool(log_probs, weights.reshape(weights.shape + (1,) * (log_probs.ndim - weights.ndim)))

    def check_shapes(self, layout: str) -> None:
        """Raises for a missing member axis or weights that do not fit; `layout` is the family's, in words."""
        check_axes(self.per_member, getattr(self, self.per_member), 1 + self.event_axes, layout)
        if self.member_weights is not None:
            check_weights(self.member_weights, self.batch_shape, self.num_members)


def check_target_shape(got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises unless targets have the shape that the predictive sets: nothing is broadcast."""
    if tuple(got) != tuple(expected):
        raise ValueError(
            f"`targets` must have shape {tuple(expected)}, which the predictive sets, got {tuple(got)}. "
            "Pass one target per example; nothing is broadcast."
        )


def refuse(family: str, what: str, remedy: str) -> NoReturn:
    """Raises TypeError for what a family of predictives cannot have."""
    raise TypeError(f"`{what}` does not exist for {family}: expected a family that has it, got {family}. {remedy}")


def host_targets(targets, shape, what, layout) -> np.ndarray:
    """`targets` as numpy; raises unless they have the shape that the predictive sets."""
    targets = np.asarray(targets)
    if targets.shape != shape:
        raise ValueError(
            f"`targets` must be {what} of shape {shape}, which a predictive {layout} sets, got {targets.shape}. "
            "Pass one target per example; for one network add the member axis: `logits[None]`."
        )
    return targets
