"""Scores read from a network's outputs alone."""

import jax
from jaxtyping import Float

from bayescal.decompose import free_energy, mutual_information
from bayescal.predictive import Bernoulli, Categorical

__all__ = ["entropy", "free_energy", "max_probability", "mutual_information"]


def max_probability(pred: Categorical | Bernoulli) -> Float[jax.Array, "*batch"]:
    """Minus the largest pooled log-probability, -max_k log p_k, nats, >= 0; higher = more unlike the training data.

    Ranks as 1 - max p does, and still tells apart predictions whose probability rounds to one.

    Source: Hendrycks and Gimpel 2017 (maximum softmax probability).
    """
    return -pred.log_probs().max(-1)


def entropy(pred: Categorical | Bernoulli) -> Float[jax.Array, "*batch"]:
    """Entropy of the pool, nats in [0, log classes]; higher = more unlike the training data."""
    return pred.entropy()
