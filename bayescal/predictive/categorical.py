"""Mixtures of distributions over classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.predictive.mixture import (
    Mixture,
    check_target_shape,
    float32_or_wider,
    host_targets,
    refuse,
    undefined_where,
    weighted_sum,
)
from bayescal.types import Array, Key, pytree


@pytree
class Categorical(Mixture):
    """Mixture over members of softmax distributions.

    Args:
        logits: unnormalised, one row of classes per member and example; -inf for an impossible class.
        member_weights: weight of each member, in total or per example; None = equal. A member of weight 0 is ignored.
        normalised: set on pooled or calibrated results: the logits are log-probabilities and carry no free energy.
    """

    per_member, event_axes = "logits", 1

    logits: Float[Array, "member *batch classes"]
    member_weights: Float[Array, "member *#batch"] | None = None
    normalised: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        self.check_shapes("(member, *batch, classes)")

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    def member_log_probs(self) -> Float[jax.Array, "member *batch classes"]:
        """Log-probabilities of every class for every member: log_softmax(logits), nats, float32 or wider."""
        return jax.nn.log_softmax(float32_or_wider(self.logits), axis=-1)

    def log_probs(self) -> Float[jax.Array, "*batch classes"]:
        """Log-probabilities of every class under the pool: log sum_s w_s p_s, nats."""
        return self.log_pooled(self.member_log_probs())

    def log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Log-probability of the target under the pool, nats, at most 0."""
        return gather(self.log_probs(), targets)

    def member_log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "member *batch"]:
        """Log-probability of the target under each member, nats, at most 0."""
        check_target_shape(jnp.shape(targets), self.batch_shape)
        log_probs = self.member_log_probs()
        return gather(log_probs, jnp.broadcast_to(jnp.asarray(targets), log_probs.shape[:-1]))

    def pooled_mean(self) -> Float[jax.Array, "*batch classes"]:
        """Class probabilities of the pool, in [0, 1]."""
        return jnp.exp(self.log_probs())

    def top_label(self) -> tuple[Float[jax.Array, "*batch"], Int[jax.Array, "*batch"]]:
        """Probability and index of the pool's most probable class; ties to the lowest index."""
        log_probs = self.log_probs()
        return jnp.exp(log_probs.max(-1)), log_probs.argmax(-1)

    def entropy(self) -> Float[jax.Array, "*batch"]:
        """Entropy of the pool, H[sum_s w_s p_s], nats in [0, log classes]; higher = less sure."""
        return _entropy(self.log_probs())

    def member_entropy(self) -> Float[jax.Array, "member *batch"]:
        """Entropy of each member, H[p_s], nats in [0, log classes]; higher = less sure."""
        return _entropy(self.member_log_probs())

    def free_energy(self) -> Float[jax.Array, "*batch"]:
        """Mean over members of the free energy -logsumexp(logits), nats; higher = more unlike the training data.

        The mean of energies, not the energy of mean logits.

        Raises:
            ValueError: for normalised logits, whose free energy is zero by construction.
        Source: Liu et al. 2020, Energy-based out-of-distribution detection.
        """
        if self.normalised:
            raise ValueError(
                "`free_energy` needs a network's raw logits, got normalised ones (a pooled or calibrated predictive). "
                "Take the score, or decompose, before pooling and calibrating."
            )
        return weighted_sum(_energy(float32_or_wider(self.logits)), self.weights())

    def sample(self, key: Key) -> Int[jax.Array, "*batch"]:
        """One class per example, drawn from the pool."""
        return jax.random.categorical(key, self.log_probs(), axis=-1)

    def check_targets(self, targets) -> None:
        """Raises unless `targets` are integer labels in [0, classes), one per example. Host only."""
        targets = host_targets(targets, self.batch_shape, "integer class labels", "(member, *batch, classes)")
        check_labels(targets, self.num_classes)


@pytree
class Bernoulli(Mixture):
    """Mixture over members of two-class distributions given by one logit, P(y = 1) = sigmoid(logit).

    Args:
        logits: log-odds of class 1, one per member and example.
        member_weights: as in `Categorical`.
        normalised: as in `Categorical`.
    """

    per_member, event_axes = "logits", 0

    logits: Float[Array, "member *batch"]
    member_weights: Float[Array, "member *#batch"] | None = None
    normalised: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        self.check_shapes("(member, *batch)")

    def as_categorical(self) -> Categorical:
        """The same distribution over two classes, with logits (-z/2, z/2): everything else is computed there."""
        half = float32_or_wider(self.logits) / 2
        largest = jnp.finfo(half.dtype).max / 4  # an infinite logit is a certain class, not NaN
        half = jnp.clip(half, -largest, largest)
        return Categorical(jnp.stack([-half, half], axis=-1), self.member_weights, self.normalised)

    def log_probs(self) -> Float[jax.Array, "*batch two"]:
        """Log-probabilities of both classes under the pool, nats."""
        return self.as_categorical().log_probs()

    def log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Log-probability of the target (0 or 1) under the pool, nats, at most 0."""
        return self.as_categorical().log_prob(targets)

    def member_log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "member *batch"]:
        """Log-probability of the target (0 or 1) under each member, nats, at most 0."""
        return self.as_categorical().member_log_prob(targets)

    def pooled_mean(self) -> Float[jax.Array, "*batch"]:
        """P(y = 1) under the pool, in [0, 1]."""
        return self.as_categorical().pooled_mean()[..., 1]

    def top_label(self) -> tuple[Float[jax.Array, "*batch"], Int[jax.Array, "*batch"]]:
        """Probability and index of the pool's more probable class; ties to class 0."""
        return self.as_categorical().top_label()

    def entropy(self) -> Float[jax.Array, "*batch"]:
        """Entropy of the pool, nats in [0, log 2]; higher = less sure."""
        return self.as_categorical().entropy()

    def member_entropy(self) -> Float[jax.Array, "member *batch"]:
        """Entropy of each member, nats in [0, log 2]; higher = less sure."""
        return self.as_categorical().member_entropy()

    def free_energy(self) -> Float[jax.Array, "*batch"]:
        """Mean over members of -log(2 cosh(z/2)), nats; higher = more unlike the training data (logits near zero)."""
        return self.as_categorical().free_energy()

    def sample(self, key: Key) -> Int[jax.Array, "*batch"]:
        """One class (0 or 1) per example, drawn from the pool."""
        return self.as_categorical().sample(key)

    def check_targets(self, targets) -> None:
        """Raises unless `targets` are integers 0 or 1, one per example. Host only."""
        targets = host_targets(targets, self.batch_shape, "integer labels 0 and 1", "(member, *batch)")
        check_labels(targets, 2)


def pool(pred: Categorical | Bernoulli) -> Categorical | Bernoulli:
    """The mixture as one member with normalised logits: what calibrators take and give.

    Decompose before pooling: one member has no epistemic part, and normalised logits no free energy.

    Raises:
        TypeError: for `Gaussian`, since a mixture of normals is not normal.
    """
    match pred:
        case Categorical():
            return Categorical(pred.log_probs()[None], normalised=True)
        case Bernoulli():
            log_probs = pred.log_probs()
            return Bernoulli((log_probs[..., 1] - log_probs[..., 0])[None], normalised=True)
    refuse(type(pred).__name__, "pool", "Use `pooled_mean` and `log_prob`.")


def gather(log_probs, targets):
    """The target's entry; NaN for labels outside [0, classes), which would otherwise count from the end."""
    targets = jnp.asarray(targets)
    check_target_shape(targets.shape, log_probs.shape[:-1])
    inside = (targets >= 0) & (targets < log_probs.shape[-1])
    return jnp.where(inside, _take_class(log_probs, jnp.where(inside, targets, 0)), jnp.nan)


def _take_class(log_probs, targets):
    return jnp.take_along_axis(log_probs, jnp.asarray(targets)[..., None], axis=-1)[..., 0]


def _energy(logits):
    """NaN where a logit is +infinity, or all are -infinity: neither says that a row is familiar."""
    return undefined_where(~jnp.isfinite(logits.max(-1)), -jax.nn.logsumexp(logits, axis=-1))


def exact_top(log_probs: Float[Array, "*shape classes"]) -> tuple[jax.Array, jax.Array]:
    """(log p, log(1 - p)) of every class, nats, with those of the most probable one from the sum of the others.

    Where p rounds to one, its logarithm and 1 - p are still right to their own digits: log p = -log(1 + others / p).

    Args:
        log_probs: of distributions that sum to one but for rounding.
    """
    top = jax.nn.one_hot(jnp.argmax(log_probs, axis=-1), log_probs.shape[-1], dtype=bool)
    most = log_probs.max(-1, keepdims=True)
    others = jax.nn.logsumexp(jnp.where(top, -jnp.inf, log_probs), axis=-1, keepdims=True)
    above = jnp.where(most == -jnp.inf, 0, most) - others
    small = jnp.where(top, -jnp.inf, jnp.minimum(log_probs, 0))
    rest = jnp.where(top, -jax.nn.softplus(above), jnp.log1p(-jnp.exp(small)))
    return jnp.where(top, -jax.nn.softplus(-above), log_probs), rest


def _entropy(log_probs):
    log_probs, _ = exact_top(log_probs)
    possible = log_probs != -jnp.inf  # true for NaN, which must come through
    return -jnp.where(possible, jnp.exp(log_probs) * jnp.where(possible, log_probs, 0), 0).sum(-1)


def check_labels(targets: np.ndarray, classes: int) -> None:
    """Raises unless all are integers in [0, classes). Host only."""
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"`targets` must be integer class labels, got {targets.dtype}. Convert them with `astype(np.int32)`."
        )
    if targets.size and (targets.min() < 0 or targets.max() >= classes):
        raise ValueError(
            f"`targets` must lie in [0, {classes}), got values from {targets.min()} to {targets.max()}. "
            "Relabel the classes 0, 1, 2, ... or give the network more outputs."
        )
