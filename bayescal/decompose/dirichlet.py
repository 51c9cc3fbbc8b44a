"""Dirichlet distributions taken apart, in closed form."""

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln
from jaxtyping import Float

from bayescal.decompose.information import entropy_parts
from bayescal.predictive import Dirichlet, float32_or_wider, weighted_sum

LARGE = 8.0  # from which the asymptotic series of digamma is right to float32's last digit


def dirichlet_parts(pred: Dirichlet) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean over members of E[H[p]], distributional uncertainty + that between members), nats.

    Each (*batch,). aleatoric = mean_s -sum_k a_k / a_0 (psi(a_k + 1) - psi(a_0 + 1)). The epistemic part is
    `distributional_uncertainty` plus the mutual information of the members' means: total = entropy of the pool.
    Source: Malinin and Gales 2018, Predictive uncertainty estimation via prior networks (recalled).
    """
    mean_entropy, between = entropy_parts(pred.as_categorical())
    within = distributional_uncertainty(pred)
    return mean_entropy - within, within + between


def distributional_uncertainty(pred: Dirichlet) -> Float[jax.Array, "*batch"]:
    """Mean over members of I[y; p] = H[E p] - E[H[p]] under the member's Dirichlet, nats in [0, log classes].

    Higher = more unlike the training data. As sum_k p_k (g(a_k) - g(a_0)) with the falling g(a) = psi(a + 1) - log a:
    every term is >= 0, and large concentrations lose no digits.

    Args:
        pred: mixture of Dirichlets. Members of weight 0 are ignored.
    """
    concentration = float32_or_wider(pred.concentration)
    precision = pred.precision()[..., None]
    excess = _above_log(concentration) - _above_log(precision)
    own = (concentration / precision * jnp.maximum(excess, 0)).sum(-1)
    return weighted_sum(own, pred.weights())


def vacuity(pred: Dirichlet) -> Float[jax.Array, "*batch"]:
    """Mean over members of classes / precision, in (0, 1] for evidential networks; higher = more unlike the training data.

    Args:
        pred: mixture of Dirichlets; concentrations below 1 can take it above 1.
    Source: Sensoy et al. 2018, Evidential deep learning (recalled).
    """
    return weighted_sum(pred.num_classes / pred.precision(), pred.weights())


def differential_entropy(pred: Dirichlet) -> Float[jax.Array, "*batch"]:
    """Mean over members of the differential entropy of the Dirichlet, nats, any sign; higher = more unlike the training data.

    sum_k log Gamma(a_k) - log Gamma(a_0) - sum_k (a_k - 1)(psi(a_k) - psi(a_0)).
    Source: Malinin and Gales 2018 (recalled).
    """
    a, total = float32_or_wider(pred.concentration), pred.precision()
    own = gammaln(a).sum(-1) - gammaln(total) - ((a - 1) * (digamma(a) - digamma(total)[..., None])).sum(-1)
    return weighted_sum(own, pred.weights())


def _above_log(a):
    """psi(a + 1) - log a, in (0, inf), falling, near 1 / (2 a) for large a, where the difference would cancel."""
    large = a > LARGE
    inverse = 1 / jnp.where(large, a, LARGE)
    square = inverse**2
    series = inverse * (1 / 2 - inverse * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240))))
    small = jnp.where(large, 1, a)
    return jnp.where(large, series, digamma(small + 1) - jnp.log(small))
