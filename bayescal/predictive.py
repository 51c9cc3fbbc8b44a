"""Predictive distributions as values: mixtures over members, the member axis first.

Pooling happens in one function, `log_pool`, in log space; axes join in one function, `merge_members`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num

from bayescal.types import Array, Key, pytree


def float32_or_wider(x: Array) -> jax.Array:
    """`x` in float32, or in its own precision where that is wider."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _check_axes(name: str, value, least: int, shape: str) -> None:
    if np.ndim(value) < least:
        raise ValueError(
            f"`{name}` must have shape {shape}, got {np.shape(value)}. "
            f"For one network add the member axis: `{name}[None]`."
        )


def _check_weights(weights, batch: tuple[int, ...], members: int) -> None:
    shape = np.shape(weights)
    trailing = shape[1:] if len(shape) > 1 else (1,) * len(batch)
    if not shape or shape[0] != members or any(a not in (1, b) for a, b in zip(trailing, batch)) or len(
        trailing
    ) != len(batch):
        raise ValueError(
            f"`member_weights` must have shape (member,) or (member, *batch) = {(members, *batch)} with ones where it "
            f"does not vary, got {shape}. Give one weight per member."
        )


def normalised_weights(
    weights: Float[Array, "member *#batch"] | None, members: int, batch_ndim: int
) -> Float[jax.Array, "member *#batch"]:
    """Member weights that sum to one over the member axis: w_s / sum w, or 1 / members where none are given.

    Args:
        weights: non-negative, (member,) or (member, *batch) with ones where they do not vary; None = equal.
        members: size of the member axis.
        batch_ndim: number of batch axes that the result must broadcast to.

    Returns:
        Float array (member, *ones or batch). NaN where every weight is zero.
    """
    if weights is None:
        return jnp.full((members,) + (1,) * batch_ndim, 1.0 / members, jnp.float32)
    weights = float32_or_wider(weights)
    if weights.ndim == 1:
        weights = weights.reshape((members,) + (1,) * batch_ndim)
    return weights / weights.sum(0, keepdims=True)


def weighted_sum(
    values: Float[Array, "member *shape"], weights: Float[Array, "member *#shape"]
) -> Float[jax.Array, "*shape"]:
    """Sum over members of w_s x_s, in which a member of weight zero counts for nothing even where x_s is NaN."""
    return jnp.where(weights == 0, 0, weights * jnp.where(weights == 0, 0, values)).sum(0)


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


def _refuse(family: str, what: str, remedy: str):
    raise TypeError(f"`{what}` does not exist for {family}: expected a family that has it, got {family}. {remedy}")


@pytree
class Categorical:
    """Mixture over members of softmax distributions.

    Args:
        logits: unnormalised, one row of classes per member and example; -inf for an impossible class.
        member_weights: weight of each member, in total or per example; None = equal. A member of weight 0 is ignored.
        normalised: set on pooled or calibrated results: the logits are log-probabilities and carry no free energy.
    """

    logits: Float[Array, "member *batch classes"]
    member_weights: Float[Array, "member *#batch"] | None = None
    normalised: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        _check_axes("logits", self.logits, 2, "(member, *batch, classes)")
        if self.member_weights is not None:
            _check_weights(self.member_weights, self.batch_shape, self.num_members)

    @property
    def num_members(self) -> int:
        return self.logits.shape[0]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.logits.shape[1:-1])

    def weights(self) -> Float[jax.Array, "member *#batch"]:
        """Member weights that sum to one, with as many batch axes as the predictive."""
        return normalised_weights(self.member_weights, self.num_members, len(self.batch_shape))

    def member_log_probs(self) -> Float[jax.Array, "member *batch classes"]:
        """Log-probabilities of every class for every member: log_softmax(logits), nats, float32 or wider."""
        return jax.nn.log_softmax(float32_or_wider(self.logits), axis=-1)

    def log_probs(self) -> Float[jax.Array, "*batch classes"]:
        """Log-probabilities of every class under the pool: log sum_s w_s p_s, nats."""
        return log_pool(self.member_log_probs(), self.weights()[..., None])

    def log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "*batch"]:
        """Log-probability of the target under the pool, nats, at most 0."""
        return _at(self.log_probs(), targets)

    def member_log_prob(self, targets: Int[Array, "*batch"]) -> Float[jax.Array, "member *batch"]:
        """Log-probability of the target under each member, nats, at most 0."""
        log_probs = self.member_log_probs()
        return _at(log_probs, jnp.broadcast_to(jnp.asarray(targets), log_probs.shape[:-1]))

    def pooled_mean(self) -> Float[jax.Array, "*batch classes"]:
        """Class probabilities of the pool, in [0, 1]."""
        return jnp.exp(self.log_probs())

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
        return weighted_sum(-jax.nn.logsumexp(float32_or_wider(self.logits), axis=-1), self.weights())

    def sample(self, key: Key) -> Int[jax.Array, "*batch"]:
        """One class per example, drawn from the pool."""
        return jax.random.categorical(key, self.log_probs(), axis=-1)

    def check_targets(self, targets) -> None:
        """Raises unless `targets` are integer labels in [0, classes), one per example. Host only."""
        targets = _host_targets(targets, self.batch_shape, "integer class labels", "(member, *batch, classes)")
        _check_integer(targets, self.num_classes)


@pytree
class Bernoulli:
    """Mixture over members of two-class distributions given by one logit, P(y = 1) = sigmoid(logit).

    Args:
        logits: log-odds of class 1, one per member and example.
        member_weights: as in `Categorical`.
        normalised: as in `Categorical`.
    """

    logits: Float[Array, "member *batch"]
    member_weights: Float[Array, "member *#batch"] | None = None
    normalised: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        _check_axes("logits", self.logits, 1, "(member, *batch)")
        if self.member_weights is not None:
            _check_weights(self.member_weights, self.batch_shape, self.num_members)

    @property
    def num_members(self) -> int:
        return self.logits.shape[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.logits.shape[1:])

    def weights(self) -> Float[jax.Array, "member *#batch"]:
        """Member weights that sum to one, with as many batch axes as the predictive."""
        return normalised_weights(self.member_weights, self.num_members, len(self.batch_shape))

    def as_categorical(self) -> Categorical:
        """The same distribution over two classes, with logits (-z/2, z/2): everything else is computed there."""
        half = float32_or_wider(self.logits) / 2
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
        targets = _host_targets(targets, self.batch_shape, "integer labels 0 and 1", "(member, *batch)")
        _check_integer(targets, 2)


@pytree
class Gaussian:
    """Mixture over members of normal distributions, independent over `dim`.

    Args:
        mean: mean of each member, in the targets' unit.
        variance: noise variance of each member, in the targets' unit squared: aleatoric.
        mean_variance: variance of the mean where it is known in closed form (linearised Laplace): epistemic.
        member_weights: as in `Categorical`.
    """

    mean: Float[Array, "member *batch dim"]
    variance: Float[Array, "member *batch dim"]
    mean_variance: Float[Array, "member *batch dim"] | None = None
    member_weights: Float[Array, "member *#batch"] | None = None

    def __post_init__(self):
        _check_axes("mean", self.mean, 2, "(member, *batch, dim)")
        for name in ("variance", "mean_variance"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != np.shape(self.mean):
                raise ValueError(
                    f"`{name}` must have the shape of `mean`, {np.shape(self.mean)}, got {np.shape(value)}. "
                    "Broadcast it to one value per member, example and dimension."
                )
        if self.member_weights is not None:
            _check_weights(self.member_weights, self.batch_shape, self.num_members)

    @property
    def num_members(self) -> int:
        return self.mean.shape[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape[1:-1])

    def weights(self) -> Float[jax.Array, "member *#batch"]:
        """Member weights that sum to one, with as many batch axes as the predictive."""
        return normalised_weights(self.member_weights, self.num_members, len(self.batch_shape))

    def member_variance(self) -> Float[jax.Array, "member *batch dim"]:
        """Variance of each member: noise plus the variance of its mean, squared unit."""
        return self.variance if self.mean_variance is None else self.variance + self.mean_variance

    def member_log_prob(self, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "member *batch"]:
        """Log-density of the target under each member, nats, summed over `dim`."""
        variance = self.member_variance()
        terms = jnp.log(2 * math.pi * variance) + (jnp.asarray(targets) - self.mean) ** 2 / variance
        return -0.5 * terms.sum(-1)

    def log_prob(self, targets: Float[Array, "*batch dim"]) -> Float[jax.Array, "*batch"]:
        """Log-density of the target under the mixture, nats (not that of the moment-matched normal)."""
        return log_pool(self.member_log_prob(targets), self.weights())

    def pooled_mean(self) -> Float[jax.Array, "*batch dim"]:
        """Mean of the mixture, in the targets' unit."""
        return weighted_sum(self.mean, self.weights()[..., None])

    def pooled_variance(self) -> Float[jax.Array, "*batch dim"]:
        """Variance of the mixture by the law of total variance, in squared unit."""
        weights = self.weights()[..., None]
        return weighted_sum(self.member_variance(), weights) + variance_of_means(self)

    def member_entropy(self) -> Float[jax.Array, "member *batch"]:
        """Differential entropy of each member, nats, summed over `dim`; higher = less sure."""
        return 0.5 * jnp.log(2 * math.pi * math.e * self.member_variance()).sum(-1)

    def log_probs(self):
        """Normal distributions have no classes."""
        _refuse("Gaussian", "log_probs", "For densities use `log_prob(targets)`, and `nll` as the metric.")

    def entropy(self):
        """A mixture of normals has no entropy in closed form."""
        _refuse("Gaussian", "entropy", "Use `decompose` (variance) or `member_entropy`.")

    def free_energy(self):
        """Normal distributions come without logits."""
        _refuse("Gaussian", "free_energy", "Use `decompose(pred).epistemic` or a feature score.")

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
        targets = _host_targets(targets, tuple(self.mean.shape[1:]), "floats", "(member, *batch, dim)")
        if not np.issubdtype(targets.dtype, np.floating):
            raise ValueError(f"`targets` must be floats, got {targets.dtype}. Convert them with `astype(np.float32)`.")
        if not np.isfinite(targets).all():
            raise ValueError(
                f"`targets` must be finite, got {int((~np.isfinite(targets)).sum())} NaN or infinite of "
                f"{targets.size}. Drop or repair those rows."
            )


Predictive = Categorical | Bernoulli | Gaussian


def variance_of_means(pred: Gaussian) -> Float[jax.Array, "*batch dim"]:
    """Variance over members of their means, sum_s w_s (m_s - m)^2, in squared unit; exactly zero when all agree.

    Two passes over differences to the member of the largest weight: never E[x^2] - E[x]^2, which cancels.
    """
    weights = jnp.broadcast_to(pred.weights(), pred.mean.shape[:-1])[..., None]
    reference = jnp.take_along_axis(pred.mean, jnp.argmax(weights, axis=0, keepdims=True), axis=0)
    difference = jnp.where(weights == 0, 0, pred.mean - reference)
    centre = weighted_sum(difference, weights)
    return weighted_sum((difference - centre) ** 2, weights)


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
    _refuse(type(pred).__name__, "pool", "Use `pooled_mean`, `pooled_variance` and `log_prob`.")


def merge_members(stacked: Predictive, weights: Float[Array, "outer"] | None = None) -> Predictive:
    """Joins two leading axes (outer, inner) of every leaf into one member axis, outer-major.

    The only place where axes join: draws of each member of an ensemble, heads of each network.

    Args:
        stacked: predictive whose leaves carry an extra leading axis, as `vmap` over members returns it.
        weights: weight of each outer member; None = equal.
    """
    outer, inner = _leading(stacked)
    merged = jax.tree.map(lambda x: x.reshape((outer * inner, *x.shape[2:])), stacked)
    if weights is None:
        return merged
    own = merged.member_weights
    ones = (1,) * (0 if own is None else own.ndim - 1)
    repeated = jnp.repeat(jnp.asarray(weights, jnp.float32), inner).reshape(-1, *ones)
    return dataclasses.replace(merged, member_weights=repeated if own is None else repeated * own)


def take(pred: Predictive, index) -> Predictive:
    """The examples `index` (anything numpy takes) along the first batch axis."""

    def pick(name, x):
        shared = name == "member_weights" and (x.ndim == 1 or x.shape[1] == 1)
        return x if shared else x[:, index]

    return _map_fields(pick, pred)


def concatenate(preds: list[Predictive]) -> Predictive:
    """Joins predictives of the same members along the first batch axis: the chunks of a streamed prediction."""
    first = preds[0]
    if len(preds) == 1:
        return first

    def join(name, x):
        shared = name == "member_weights" and (x.ndim == 1 or x.shape[1] == 1)
        return x if shared else jnp.concatenate([getattr(p, name) for p in preds], axis=1)

    return _map_fields(join, first)


def rescale(pred: Gaussian, shift: Num[Array, "*dim"] | float, scale: Num[Array, "*dim"] | float) -> Gaussian:
    """Predictive of y = shift + scale * z for a predictive of standardised targets z: back to the targets' own unit.

    Args:
        pred: predictive of the standardised targets.
        shift: mean that was subtracted, () or (dim,).
        scale: standard deviation that was divided by, () or (dim,), positive.
    Raises:
        ValueError: for a scale that is not positive.
    """
    if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
        raise ValueError(
            f"`scale` must be positive, got {scale}. Pass the standard deviation the targets were divided by."
        )
    squared = lambda v: None if v is None else v * jnp.square(scale)
    return dataclasses.replace(
        pred,
        mean=shift + scale * pred.mean,
        variance=squared(pred.variance),
        mean_variance=squared(pred.mean_variance),
    )


def _map_fields(function, pred):
    arrays = {f.name: getattr(pred, f.name) for f in dataclasses.fields(pred) if not f.metadata.get("static")}
    return dataclasses.replace(pred, **{n: function(n, x) for n, x in arrays.items() if x is not None})


def _leading(pred) -> tuple[int, int]:
    return jax.tree.leaves(pred)[0].shape[:2]


def _at(log_probs, targets):
    return jnp.take_along_axis(log_probs, jnp.asarray(targets)[..., None], axis=-1)[..., 0]


def _entropy(log_probs):
    return -jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0).sum(-1)


def _host_targets(targets, shape, what, layout) -> np.ndarray:
    targets = np.asarray(targets)
    if targets.shape != shape:
        raise ValueError(
            f"`targets` must be {what} of shape {shape}, which a predictive {layout} sets, got {targets.shape}. "
            "Pass one target per example; for one network add the member axis: `logits[None]`."
        )
    return targets


def _check_integer(targets: np.ndarray, classes: int) -> None:
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"`targets` must be integer class labels, got {targets.dtype}. Convert them with `astype(np.int32)`."
        )
    if targets.size and (targets.min() < 0 or targets.max() >= classes):
        raise ValueError(
            f"`targets` must lie in [0, {classes}), got values from {targets.min()} to {targets.max()}. "
            "Relabel the classes 0, 1, 2, ... or give the network more outputs."
        )
