"""Mixtures of Dirichlet distributions over class probabilities: evidential and prior networks."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.predictive.categorical import Categorical, check_labels, gather
from bayescal.predictive.mixture import Mixture, check_target_shape, float32_or_wider, host_targets, weighted_sum
from bayescal.types import Array, Key, pytree


@pytree
class Dirichlet(Mixture):
    """Mixture over members of Dirichlet distributions of the class probabilities, each a distribution over predictions.

    The predictive probabilities of a member are its mean, concentration / their sum.

    Args:
        concentration: positive, one per class: evidence + 1 of an evidential network, exp(logits) of a prior network (which
            overflows float32 from logits of 88 on: such rows are refused on the host, and NaN).
        member_weights: as in `Categorical`.
    """

    per_member, event_axes = "concentration", 1

    concentration: Float[Array, "member *batch classes"]
    member_weights: Float[Array, "member *#batch"] | None = None

    def __post_init__(self):
        self.check_shapes("(member, *batch, classes)")

    @property
    def num_classes(self) -> int:
        return self.concentration.shape[-1]

    def precision(self) -> Float[jax.Array, "member *batch"]:
        """Sum of the concentrations of each member: how much it claims to know; higher = surer of its probabilities."""
        return float32_or_wider(self.concentration).sum(-1)

    def as_categorical(self) -> Categorical:
        """The members' means as distributions over classes, with log-concentrations for logits."""
        return Categorical(jnp.log(float32_or_wider(self.concentration)), self.member_weights, normalised=False)

    def member_log_probs(self) -> Float[jax.Array, "member *batch classes"]:
        """Log-probabilities of every class under each member's mean, nats."""
        return jnp.log(float32_or_wider(self.concentration)) - jnp.log(self.precision())[..., None]

    def log_probs(self) -> Float[jax.Array, "*batch classes"]:
        """Log-probabilities of every class under the pool: log sum_s w_s concentration_s / precision_s, nats."""
        return self.log_pooled(self.member_log_probs())

    def log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Log-probability of the target under the pool, nats, at most 0."""
        return gather(self.log_probs(), targets)

    def member_log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "member *batch"]:
        """Log-probability of the target under each member's mean, nats, at most 0."""
        check_target_shape(jnp.shape(targets), self.batch_shape)
        log_probs = self.member_log_probs()
        return gather(log_probs, jnp.broadcast_to(jnp.asarray(targets), log_probs.shape[:-1]))

    def pooled_mean(self) -> Float[jax.Array, "*batch classes"]:
        """Class probabilities of the pool, in [0, 1]."""
        return weighted_sum(
            float32_or_wider(self.concentration) / self.precision()[..., None], self.weights()[..., None]
        )

    def top_label(self) -> tuple[Float[jax.Array, "*batch"], Int[jax.Array, "*batch"]]:
        """Probability and index of the pool's most probable class; ties to the lowest index."""
        probs = self.pooled_mean()
        return probs.max(-1), probs.argmax(-1)

    def entropy(self) -> Float[jax.Array, "*batch"]:
        """Entropy of the pool, nats in [0, log classes]; higher = less sure."""
        return self.as_categorical().entropy()

    def member_entropy(self) -> Float[jax.Array, "member *batch"]:
        """Entropy of each member's mean, nats in [0, log classes]; higher = less sure."""
        return self.as_categorical().member_entropy()

    def sample(self, key: Key) -> Int[jax.Array, "*batch"]:
        """One class per example, drawn from the pool."""
        return jax.random.categorical(key, self.log_probs(), axis=-1)

    def check_targets(self, targets) -> None:
        """Raises unless `targets` are integer labels in [0, classes), one per example. Host only."""
        shape = "(member, *batch, classes)"
        check_labels(host_targets(targets, self.batch_shape, "integer class labels", shape), self.num_classes)
