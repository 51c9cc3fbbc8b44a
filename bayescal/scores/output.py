"""Scores read from a network's outputs alone: `score(pred) -> (*batch,)`, higher = more unlike the training data.

Where there are several members, the name or the docstring says what is averaged. NaN of a member that counts comes through.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.decompose import free_energy, mutual_information
from bayescal.decompose.information import ClassPredictive
from bayescal.predictive import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Gaussian,
    Probabilities,
    exact_top,
    float32_or_wider,
    refuse,
    undefined_where,
    weighted_sum,
)

__all__ = [
    "dempster_shafer",
    "entropy",
    "free_energy",
    "free_energy_of_mean",
    "generalised_entropy",
    "kl_from_uniform",
    "margin",
    "max_logit",
    "max_probability",
    "member_disagreement",
    "mutual_information",
    "variation_ratio",
]


def max_probability(pred: ClassPredictive | Dirichlet) -> Float[jax.Array, "*batch"]:
    """Minus the largest pooled log-probability, -max_k log p_k, nats, >= 0; higher = more unlike the training data.

    Ranks as 1 - max p does, and still tells apart predictions whose probability rounds to one, by what is left for the
    other classes.

    Source: Hendrycks and Gimpel 2017 (maximum softmax probability).
    """
    return -exact_top(pred.log_probs())[0].max(-1)


def margin(pred: ClassPredictive | Dirichlet) -> Float[jax.Array, "*batch"]:
    """log p_second - log p_first of the pool, nats, at most 0; higher = more unlike the training data.

    -inf for one-hot pools.

    Raises:
        ValueError: for a single class.
    """
    log_probs = pred.log_probs()
    if log_probs.shape[-1] < 2:
        raise ValueError(f"`margin` needs at least two classes, got {log_probs.shape[-1]}. Give both columns.")
    first, second = jnp.moveaxis(jax.lax.top_k(log_probs, 2)[0], -1, 0)
    return undefined_where(jnp.isnan(log_probs).any(-1), second - first)  # a sort puts NaN aside


def entropy(pred: ClassPredictive | Dirichlet) -> Float[jax.Array, "*batch"]:
    """Entropy of the pool, nats in [0, log classes]; higher = more unlike the training data."""
    return pred.entropy()


def generalised_entropy(
    pred: ClassPredictive | Dirichlet, *, gamma: float = 0.1, top: int = 100
) -> Float[jax.Array, "*batch"]:
    """sum over the `top` largest p_k of (p_k (1 - p_k))^gamma, of the pool, >= 0; higher = more unlike the training data.

    A small gamma looks at small differences of probabilities near zero and one, where most predictions are.

    Args:
        pred: predictive of classes.
        gamma: exponent in (0, 1).
        top: classes that count, at least one; more than there are = all.

    Raises:
        ValueError: for an exponent outside (0, 1), or fewer classes than one.
    Source: Liu et al. 2023, GEN (recalled).
    """
    if not 0 < gamma < 1 or top < 1:
        raise ValueError(
            f"`gamma` must lie in (0, 1) and `top` be at least 1, got {gamma!r} and {top!r}. The paper has 0.1 and 100."
        )
    log_probs, log_rest = exact_top(pred.log_probs())
    order = jax.lax.top_k(log_probs, min(top, log_probs.shape[-1]))[1]
    largest = jnp.take_along_axis(log_probs + log_rest, order, -1, mode="clip")
    return undefined_where(jnp.isnan(log_probs).any(-1), jnp.exp(gamma * largest).sum(-1))


def kl_from_uniform(pred: ClassPredictive | Dirichlet) -> Float[jax.Array, "*batch"]:
    """-KL(uniform || p) = log classes + mean_k log p_k of the pool, nats, at most 0; higher = more unlike the training data.

    -inf where a class is impossible.
    """
    log_probs = pred.log_probs()
    return log_probs.mean(-1) + jnp.log(log_probs.shape[-1]).astype(log_probs.dtype)


def max_logit(pred: Categorical | Bernoulli) -> Float[jax.Array, "*batch"]:
    """Mean over members of -max_k z_k, in the logits' unit; higher = more unlike the training data.

    The mean of maxima, not the maximum of mean logits.

    Raises:
        ValueError: for normalised logits, whose level is gone. TypeError: for probabilities, which have none.
    Source: Hendrycks et al. 2022, Scaling out-of-distribution detection (recalled).
    """
    pred = _raw(pred, "max_logit")
    return weighted_sum(-_defined(float32_or_wider(pred.logits)).max(-1), pred.weights())


def free_energy_of_mean(pred: Categorical | Bernoulli) -> Float[jax.Array, "*batch"]:
    """-logsumexp_k of the members' mean logits, nats; higher = more unlike the training data.

    The energy of mean logits, not the mean of energies (`free_energy`), from which it is never smaller (logsumexp is convex):
    it rises where members disagree.

    Raises:
        ValueError: for normalised logits, whose level is gone. TypeError: for probabilities, which have none.
    """
    pred = _raw(pred, "free_energy_of_mean")
    mean = weighted_sum(_defined(float32_or_wider(pred.logits)), pred.weights()[..., None])
    return -jax.nn.logsumexp(mean, axis=-1)


def dempster_shafer(pred: Categorical | Bernoulli) -> Float[jax.Array, "*batch"]:
    """Mean over members of classes / (classes + sum_k exp z_k), in (0, 1); higher = more unlike the training data.

    Ranks one member as its free energy does.

    Raises:
        ValueError: for normalised logits, whose level is gone. TypeError: for probabilities, which have none.
    Source: Sensoy et al. 2018; Liu et al. 2020 (SNGP) use it as a score (recalled).
    """
    pred = _raw(pred, "dempster_shafer")
    evidence = jax.nn.logsumexp(_defined(float32_or_wider(pred.logits)), axis=-1)
    return weighted_sum(jax.nn.sigmoid(jnp.log(float(pred.num_classes)) - evidence), pred.weights())


def variation_ratio(pred: ClassPredictive | Dirichlet) -> Float[jax.Array, "*batch"]:
    """1 - the weight of the members that vote for the most voted class, in [0, 1 - 1 / classes].

    Higher = more unlike the training data. Members' ties go to the lowest class. 0 for one member.
    """
    return 1 - _votes(pred).max(-1)


def member_disagreement(pred: ClassPredictive | Dirichlet) -> Float[jax.Array, "*batch"]:
    """Probability that two members, drawn by weight with replacement, vote for other classes: 1 - sum_k votes_k^2.

    In [0, 1 - 1 / classes]; higher = more unlike the training data. Members' ties go to the lowest class. 0 for one member.
    """
    return 1 - (_votes(pred) ** 2).sum(-1)


def _votes(pred):
    """Share of the members' weight that votes for each class, (*batch, classes); NaN where a member that counts is NaN."""
    if isinstance(pred, Gaussian):
        refuse("Gaussian", "a vote of members", "It is of classes; see `moment_matched_information`.")
    pred = pred.as_categorical() if isinstance(pred, Bernoulli | Dirichlet) else pred
    values = float32_or_wider(pred.probs if isinstance(pred, Probabilities) else pred.logits)
    votes = jax.nn.one_hot(values.argmax(-1), values.shape[-1], dtype=values.dtype)
    shares = weighted_sum(votes + 0 * _defined(values).max(-1, keepdims=True), pred.weights()[..., None])
    return shares / shares.sum(-1, keepdims=True)  # weights sum to one but for rounding


def _defined(logits):
    """NaN throughout where a logit is NaN or +infinity, or all are -infinity: neither says that a row is familiar."""
    return undefined_where(
        ~jnp.isfinite(logits.max(-1, keepdims=True)), jnp.where(jnp.isfinite(logits), logits, -jnp.inf)
    )


def _raw(pred, name: str) -> Categorical:
    pred = pred.as_categorical() if isinstance(pred, Bernoulli) else pred
    if not isinstance(pred, Categorical):
        refuse(type(pred).__name__, name, "It needs logits; see `max_probability` and `entropy`.")
    if pred.normalised:
        raise ValueError(
            f"`{name}` needs a network's raw logits, got normalised ones (a pooled or calibrated predictive). "
            "Take the score before pooling and calibrating."
        )
    return pred
