"""Dirichlet distributions taken apart, in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln, polygamma
from jaxtyping import Float

from bayescal.decompose.information import mutual_information
from bayescal.predictive import Dirichlet, Probabilities, float32_or_wider, refuse, undefined_where, weighted_sum

LARGE = (
    8.0  # from which the asymptotic series of digamma and of the logarithm of gamma are right to float32's last digit
)


def dirichlet_parts(pred: Dirichlet) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean over members of E[H[p]], distributional uncertainty + that between members), nats.

    Each (*batch,), both >= 0. aleatoric = mean_s sum_k a_k / a_0 (psi(a_0 + 1) - psi(a_k + 1)). The epistemic part is
    `distributional_uncertainty` plus the mutual information of the members' means: total = entropy of the pool.

    Raises:
        TypeError: for another family.
    Source: Malinin and Gales 2018, Predictive uncertainty estimation via prior networks (recalled).
    """
    _check_dirichlet(pred, "dirichlet_parts")
    concentration, precision = float32_or_wider(pred.concentration), pred.precision()[..., None]
    probs = concentration / precision
    aleatoric = weighted_sum((probs * _digamma_step(concentration, _others(concentration))).sum(-1), pred.weights())
    between = mutual_information(Probabilities(probs, pred.member_weights))
    return aleatoric, distributional_uncertainty(pred) + between


def distributional_uncertainty(pred: Dirichlet) -> Float[jax.Array, "*batch"]:
    """Mean over members of I[y; p] = H[E p] - E[H[p]] under the member's Dirichlet, nats in [0, log classes].

    Higher = more unlike the training data. As sum_k p_k (g(a_k) - g(a_0)) with the falling g(a) = psi(a + 1) - log a:
    every term is >= 0, and large concentrations lose no digits.

    Args:
        pred: mixture of Dirichlets. Members of weight 0 are ignored.

    Raises:
        TypeError: for another family.
    """
    _check_dirichlet(pred, "distributional_uncertainty")
    concentration, precision = float32_or_wider(pred.concentration), pred.precision()[..., None]
    excess = _above_log(concentration) - _above_log(precision)
    own = (concentration / precision * jnp.maximum(excess, 0)).sum(-1)  # below 0 by rounding alone, where a_k is a_0
    return weighted_sum(own, pred.weights())


def vacuity(pred: Dirichlet) -> Float[jax.Array, "*batch"]:
    """Mean over members of classes / precision, in (0, 1] for evidential networks; higher = more unlike the training data.

    Args:
        pred: mixture of Dirichlets; concentrations below 1 can take it above 1. NaN where one that counts is not positive
            or not finite.

    Raises:
        TypeError: for another family.
    Source: Sensoy et al. 2018, Evidential deep learning (recalled).
    """
    _check_dirichlet(pred, "vacuity")
    precision = pred.precision()
    lost = ~jnp.isfinite(precision) | (pred.concentration <= 0).any(-1)
    return weighted_sum(undefined_where(lost, pred.num_classes / precision), pred.weights())


def differential_entropy(pred: Dirichlet) -> Float[jax.Array, "*batch"]:
    """Mean over members of the differential entropy of the Dirichlet, nats, any sign; higher = more unlike the training data.

    sum_k log Gamma(a_k) - log Gamma(a_0) - sum_k (a_k - 1)(psi(a_k) - psi(a_0)), with the terms in a log a, which cancel,
    left out: 1/2 sum_k log p_k - (K - 1)/2 log(a_0 / 2 pi) + sum_k (R(a_k) + (a_k - 1) d(a_k)) - R(a_0) - (a_0 - K) d(a_0),
    where R is Stirling's remainder of log Gamma and d(a) = log a - psi(a).

    Raises:
        TypeError: for another family.
    Source: Malinin and Gales 2018 (recalled).
    """
    _check_dirichlet(pred, "differential_entropy")
    a, classes = float32_or_wider(pred.concentration), pred.num_classes
    total = pred.precision()
    parts = _stirling_rest(a) + (a - 1) * _below_log(a)
    whole = _stirling_rest(total) + (total - classes) * _below_log(total)
    logs = 0.5 * jnp.log(a / total[..., None]).sum(-1) - 0.5 * (classes - 1) * jnp.log(total / (2 * math.pi))
    return weighted_sum(logs + parts.sum(-1) - whole, pred.weights())


def _check_dirichlet(pred, what: str) -> None:
    if not isinstance(pred, Dirichlet):
        refuse(type(pred).__name__, what, "It is of Dirichlets: `Dirichlet(evidence + 1)`.")


def _others(a):
    """a_0 - a_k, the sum of the others: for the largest one a sum of its own, since the difference would cancel."""
    largest = jax.nn.one_hot(a.argmax(-1), a.shape[-1], dtype=bool)
    rest = jnp.where(largest, 0, a).sum(-1, keepdims=True)
    return jnp.where(largest, rest, a.sum(-1, keepdims=True) - a)


def _digamma_step(a, step):
    """psi(a + step + 1) - psi(a + 1) >= 0, for a short step as the integral of psi', whose terms are all positive."""
    nodes, shares = np.polynomial.legendre.leggauss(4)
    short = step < 0.5 * (a + 1)
    within = jnp.where(short, step, 0)
    slopes = sum(w / 2 * polygamma(1, a + 1 + within * (x + 1) / 2) for x, w in zip(nodes, shares, strict=True))
    return jnp.where(short, within * slopes, digamma(a + step + 1) - digamma(a + 1))


def _above_log(a):
    """psi(a + 1) - log a, in (0, inf), falling, near 1 / (2 a) for large a, where the difference would cancel."""
    small, inverse = _split(a)
    square = inverse**2
    series = inverse * (1 / 2 - inverse * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240))))
    return jnp.where(a > LARGE, series, digamma(small + 1) - jnp.log(small))


def _below_log(a):
    """log a - psi(a), in (0, inf), falling, near 1 / (2 a) for large a."""
    small, inverse = _split(a)
    square = inverse**2
    series = inverse * (1 / 2 + inverse * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240))))
    return jnp.where(a > LARGE, series, jnp.log(small) - digamma(small))


def _stirling_rest(a):
    """log Gamma(a) - ((a - 1/2) log a - a + 1/2 log 2 pi), near 1 / (12 a) for large a."""
    small, inverse = _split(a)
    square = inverse**2
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    own = gammaln(small) - ((small - 0.5) * jnp.log(small) - small + 0.5 * math.log(2 * math.pi))
    return jnp.where(a > LARGE, series, own)


def _split(a):
    """`a` where it is small, else 1; and 1 / a where it is large, else 1 / LARGE."""
    return jnp.where(a > LARGE, 1, a), 1 / jnp.where(a > LARGE, a, LARGE)
