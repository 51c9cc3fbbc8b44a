"""Decompositions that belong to proper scores: total = G(p_mean), aleatoric = mean_s G(p_s), of a concave G."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.decompose.information import ClassPredictive, check_classes, member_mean, side_by_side
from bayescal.predictive import (
    Bernoulli,
    Probabilities,
    exact_top,
    float32_or_wider,
    weighted_sum,
)

CLOSE = (
    0.05  # largest difference of probabilities below which a divergence is integrated, since a difference would cancel
)


def class_variance_parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean_s sum_k p_sk (1 - p_sk), sum_k Var_s p_sk), in [0, 1), each (*batch,).

    The law of total variance for the indicator of every class, summed; also the decomposition of the Brier score, with
    total = 1 - sum_k p_mean_k^2. Higher epistemic = more unlike the training data. Deviations are those of logits, and of the
    most probable class what the others leave, so that members which are sure, or agree, keep their digits.

    Args:
        pred: predictive of classes. Members of weight 0 are ignored.
    Source: Sale et al. 2024, label-wise uncertainty (recalled); Kull and Flach 2015 for proper scores (recalled).
    """
    probs, rest, weights = _member_probs(pred)
    aleatoric = weighted_sum((probs * rest).sum(-1), weights[..., 0])
    _, ratios, pooled, shares, axis = side_by_side(pred)
    apart = ratios.lead * (ratios.excess - member_mean(ratios.excess, shares))  # p_s - p_mean
    if not isinstance(
        pred, Probabilities
    ):  # deviations add up to zero: what rounding of a member's norm leaves is its own
        apart = apart - ratios.lead * pooled.ratio * apart.sum(axis, keepdims=True)
    return aleatoric, member_mean(apart**2, shares).sum(axis)[0]


def zero_one_parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean_s 1 - max_k p_sk, mean_s max_k p_sk - max_k p_mean_k), in [0, 1), each (*batch,).

    The decomposition of the zero-one loss: total = 1 - max_k p_mean_k, the expected error of the pool. The epistemic
    part is what members lose by following the pool's label, each term >= 0. Higher = more unlike the training data.

    Args:
        pred: predictive of classes. Members of weight 0 are ignored.
    """
    probs, rest, weights = _member_probs(pred)
    label = weighted_sum(probs, weights).argmax(-1)[None, ..., None]
    followed = jnp.take_along_axis(probs, jnp.broadcast_to(label, (*probs.shape[:-1], 1)), -1)[..., 0]
    lost = weighted_sum(probs.max(-1) - followed, weights[..., 0])
    return weighted_sum(rest.min(-1), weights[..., 0]), lost


def proper_score_parts(entropy: Callable[[jax.Array], jax.Array]) -> Callable:
    """Measure of the proper score whose entropy is given: (mean_s G(p_s), mean_s D(p_s, p_mean)), each (*batch,).

    D(p, q) = G(q) + <grad G(q), p - q> - G(p) >= 0 is G's Bregman divergence. Its mean is G(p_mean) - mean_s G(p_s). Where
    members are close it is the integral of -(1 - t) d^2/dt^2 G(q + t (p - q)), which does not cancel. For the log score
    `entropy_parts` is made, for the Brier score `class_variance_parts`, which are exact where probabilities round to one, as
    this is not, and for the zero-one loss, whose G has corners, `zero_one_parts`.

    Args:
        entropy: G, concave, with finite first and second derivatives wherever the members are: probabilities (classes,) ->
            number, the expected loss of whoever knows them. NaN where a derivative is not finite.

    Returns:
        Measure for `decompose`. Keep it in a variable: every call of this makes another one, which compiles again.
    """
    nodes, shares = np.polynomial.legendre.leggauss(6)

    def divergence(p, q):
        step = p - q
        at, slope = jax.jvp(entropy, (q,), (step,))

        def bend(t):  # second derivative along the way from q to p
            first = lambda t: jax.jvp(entropy, (q + t * step,), (step,))[1]
            return jax.jvp(first, (t,), (jnp.ones_like(t),))[1]

        near = sum(-w / 2 * (1 - (x + 1) / 2) * bend(jnp.asarray((x + 1) / 2, q.dtype)) for x, w in zip(nodes, shares))
        return jnp.where(abs(step).max() < CLOSE, near, at + slope - entropy(p))

    def parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
        probs, _, weights = _member_probs(pred)
        mean, over = weighted_sum(probs, weights), probs.shape[:-1]
        flat, pools = (x.reshape(-1, probs.shape[-1]) for x in (probs, jnp.broadcast_to(mean, probs.shape)))
        own, apart = jax.vmap(entropy)(flat).reshape(over), jax.vmap(divergence)(flat, pools).reshape(over)
        return weighted_sum(own, weights[..., 0]), weighted_sum(apart, weights[..., 0])

    return parts


def _member_probs(pred: ClassPredictive):
    """p and 1 - p (member, *batch, classes), each to its own digits where there are logits, and weights (member, *batch or
    ones, 1)."""
    check_classes(pred, "this measure")
    weights = pred.weights()[..., None]
    if isinstance(pred, Probabilities):
        probs = float32_or_wider(pred.probs)
        return probs, 1 - probs, weights
    pred = pred.as_categorical() if isinstance(pred, Bernoulli) else pred
    log_probs, log_rest = exact_top(pred.member_log_probs())
    return jnp.exp(log_probs), jnp.exp(log_rest), weights
