"""Mixtures of class probabilities as such: predictions of any framework, without the way through logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.predictive.categorical import Categorical, gather
from bayescal.predictive.mixture import Mixture, check_target_shape, float32_or_wider, weighted_sum
from bayescal.types import Array, Key, pytree


@pytree
class Probabilities(Mixture):
    """Mixture over members of distributions over classes, given by their probabilities.

    One member's probabilities come back to the bit, so that 1/5 stays on the edge of a bin; nothing is renormalised or
    clipped. There are no logits, hence no free energy.

    Args:
        probs: non-negative, one row of classes per member and example, summing to one.
        member_weights: as in `Categorical`.
    """

    per_member, event_axes = "probs", 1

    probs: Float[Array, "member *batch classes"]
    member_weights: Float[Array, "member *#batch"] | None = None

    def __post_init__(self):
        self.check_shapes("(member, *batch, classes)")

    @property
    def num_classes(self) -> int:
        return self.probs.shape[-1]

    def as_categorical(self) -> Categorical:
        """The same distributions with log-probabilities for logits."""
        return Categorical(jnp.log(float32_or_wider(self.probs)), self.member_weights, normalised=True)

    def pooled_mean(self) -> Float[jax.Array, "*batch classes"]:
        """Class probabilities of the pool, in [0, 1]."""
        probs = float32_or_wider(self.probs)
        if self.num_members == 1:
            return jnp.where((self.weights() > 0)[0, ..., None], probs[0], jnp.nan)
        return weighted_sum(probs, self.weights()[..., None])

    def top_label(self) -> tuple[Float[jax.Array, "*batch"], Int[jax.Array, "*batch"]]:
        """Probability and index of the pool's most probable class; ties to the lowest index."""
        probs = self.pooled_mean()
        return probs.max(-1), probs.argmax(-1)

    def log_probs(self) -> Float[jax.Array, "*batch classes"]:
        """Log-probabilities of every class under the pool, nats; -inf where the probability is zero."""
        return jnp.log(self.pooled_mean())

    def log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Log-probability of the target under the pool, nats, at most 0."""
        return jnp.log(gather(self.pooled_mean(), targets))

    def member_log_probs(self) -> Float[jax.Array, "member *batch classes"]:
        """Log-probabilities of every class for every member, nats."""
        return jnp.log(float32_or_wider(self.probs))

    def member_log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "member *batch"]:
        """Log-probability of the target under each member, nats, at most 0."""
        check_target_shape(jnp.shape(targets), self.batch_shape)
        probs = float32_or_wider(self.probs)
        return jnp.log(gather(probs, jnp.broadcast_to(jnp.asarray(targets), probs.shape[:-1])))

    def entropy(self) -> Float[jax.Array, "*batch"]:
        """Entropy of the pool, H[sum_s w_s p_s], nats in [0, log classes]; higher = less sure."""
        return jax.scipy.special.entr(self.pooled_mean()).sum(-1)

    def member_entropy(self) -> Float[jax.Array, "member *batch"]:
        """Entropy of each member, H[p_s], nats in [0, log classes]; higher = less sure."""
        return jax.scipy.special.entr(float32_or_wider(self.probs)).sum(-1)

    def sample(self, key: Key) -> Int[jax.Array, "*batch"]:
        """One class per example, drawn from the pool."""
        return jax.random.categorical(key, self.log_probs(), axis=-1)

    def check_targets(self, targets) -> None:
        """Raises unless `targets` are integer labels in [0, classes), one per example. Host only."""
        Categorical(self.probs).check_targets(targets)
