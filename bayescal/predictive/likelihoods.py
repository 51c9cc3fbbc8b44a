"""Likelihoods: from a network's outputs, member axis first, to a predictive distribution.

The same one serves training and testing, so they cannot disagree. `Categorical` is itself the likelihood of class logits.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from bayescal.predictive.categorical import Bernoulli
from bayescal.predictive.gaussian import Gaussian
from bayescal.predictive.mixture import float32_or_wider
from bayescal.types import Array


def heteroscedastic(outputs: Float[Array, "member *batch twice_dim"]) -> Gaussian:
    """Likelihood of a network with two outputs per dimension: mean, and variance = softplus(raw).

    Args:
        outputs: last axis holds the `dim` means, then the `dim` raw variances.
    Raises:
        ValueError: for an odd number of outputs.
    """
    if outputs.shape[-1] % 2:
        raise ValueError(
            f"`outputs` must have an even last axis (means, then raw variances), got {outputs.shape[-1]}. "
            "Give the network twice as many outputs as targets, or use `homoscedastic(variance)`."
        )
    mean, raw = jnp.split(float32_or_wider(outputs), 2, axis=-1)
    return Gaussian(mean, jax.nn.softplus(raw) + jnp.finfo(raw.dtype).tiny)


def homoscedastic(variance: float):
    """Likelihood of a network whose outputs are means, with one known noise variance in the targets' unit squared.

    Raises:
        ValueError: for a variance that is not positive.
    """
    if not isinstance(variance, Tracer) and not variance > 0:
        raise ValueError(f"`variance` must be positive, got {variance!r}. It is in the targets' unit squared.")

    def likelihood(outputs: Float[Array, "member *batch dim"]) -> Gaussian:
        outputs = float32_or_wider(outputs)
        return Gaussian(outputs, jnp.broadcast_to(jnp.asarray(variance, outputs.dtype), outputs.shape))

    return likelihood


def one_logit(outputs: Float[Array, "member *batch one"]) -> Bernoulli:
    """Likelihood of a network with a single output: the log-odds of class 1."""
    if outputs.shape[-1] != 1:
        raise ValueError(
            f"`outputs` must have one logit in the last axis, got {outputs.shape[-1]}. Use `Categorical` for several."
        )
    return Bernoulli(outputs[..., 0])
