"""Decompositions that belong to proper scores: total = G(p_mean), aleatoric = mean_s G(p_s), of a concave G."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bayescal.decompose.information import ClassPredictive
from bayescal.predictive import Bernoulli, weighted_sum


def class_variance_parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean_s sum_k p_sk (1 - p_sk), sum_k Var_s p_sk), in [0, 1), each (*batch,).

    The law of total variance for the indicator of every class, summed; also the decomposition of the Brier score, with
    total = 1 - sum_k p_mean_k^2. Higher epistemic = more unlike the training data.

    Args:
        pred: predictive of classes. Members of weight 0 are ignored.
    Source: Sale et al. 2024, label-wise uncertainty (recalled); Kull and Flach 2015 for proper scores (recalled).
    """
    probs, weights = _member_probs(pred)
    rest = 1 - probs
    centre = weighted_sum(probs - probs[:1], weights) + probs[0]  # equal members: no rounding
    spread = weighted_sum((probs - centre[None]) ** 2, weights).sum(-1)
    return weighted_sum(probs * rest, weights).sum(-1), spread


def zero_one_parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean_s 1 - max_k p_sk, mean_s max_k p_sk - max_k p_mean_k), in [0, 1), each (*batch,).

    The decomposition of the zero-one loss: total = 1 - max_k p_mean_k, the expected error of the pool. The epistemic
    part is what members lose by following the pool's label, each term >= 0. Higher = more unlike the training data.

    Args:
        pred: predictive of classes. Members of weight 0 are ignored.
    """
    probs, weights = _member_probs(pred)
    label = weighted_sum(probs, weights).argmax(-1)[None, ..., None]
    followed = jnp.take_along_axis(probs, jnp.broadcast_to(label, (*probs.shape[:-1], 1)), -1)[..., 0]
    most = probs.max(-1)
    lost = weighted_sum(most - followed, weights[..., 0])
    return 1 - weighted_sum(most, weights[..., 0]), lost


def proper_score_parts(entropy: Callable[[jax.Array], jax.Array]) -> Callable:
    """Measure of the proper score whose entropy is given: (mean_s G(p_s), mean_s D(p_s, p_mean)), each (*batch,).

    D(p, q) = G(q) + <grad G(q), p - q> - G(p) >= 0 is G's Bregman divergence. Its mean is G(p_mean) - mean_s G(p_s), and
    never below zero. For the log score `entropy_parts` is more accurate, for the Brier score `class_variance_parts`, and
    for the zero-one loss, whose G has corners, `zero_one_parts`.

    Args:
        entropy: G, concave and smooth: probabilities (classes,) -> number; expected loss of whoever knows them.

    Returns:
        Measure for `decompose`. Keep it in a variable: every call of this makes another one, which compiles again.
    """

    def divergence(p, q):
        at, slope = jax.jvp(entropy, (q,), (p - q,))
        return jnp.maximum(at + slope - entropy(p), 0)

    def parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
        probs, weights = _member_probs(pred)
        mean, over = weighted_sum(probs, weights), probs.shape[:-1]
        classes = probs.shape[-1]
        flat = probs.reshape(-1, classes)
        pools = jnp.broadcast_to(mean, probs.shape).reshape(-1, classes)
        own, apart = jax.vmap(entropy)(flat).reshape(over), jax.vmap(divergence)(flat, pools).reshape(over)
        return weighted_sum(own, weights[..., 0]), weighted_sum(apart, weights[..., 0])

    return parts


def _member_probs(pred: ClassPredictive):
    """Probabilities (member, *batch, classes) and weights (member, *batch or ones, 1)."""
    pred = pred.as_categorical() if isinstance(pred, Bernoulli) else pred
    return jnp.exp(pred.member_log_probs()), pred.weights()[..., None]
