"""Entropy taken apart for classes: mutual information and its relatives, exact in float32 and never negative.

All of them are sums over classes of p_mean * mean_s f(u_s), u_s = log p_s - log p_mean, f >= 0, with

    mutual information          f(u) = u e^u - e^u + 1         mean_s KL(p_s || p_mean)
    reverse mutual information  f(u) = e^u - 1 - u             mean_s KL(p_mean || p_s)

Never computed as a difference of entropies, which loses all digits when members agree.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.predictive import (
    Bernoulli,
    Categorical,
    Probabilities,
    float32_or_wider,
    refuse,
    undefined_where,
    weighted_sum,
)

ClassPredictive = Categorical | Bernoulli | Probabilities

FEW_CLASSES = 64  # below which the classes are moved in front of the rows, where a CPU adds them up side by side
IMPOSSIBLE = -1e30  # stands for a logit of -infinity, so that differences stay numbers
NEAR = 0.35  # |u| below which the series is used; above it the closed form is good to four units in the last place
FAR_APART = 8.0  # nats between peaks: as far below its own peak a class still has a digit
TERMS = {4: 7, 8: 16}  # of the series, that leave nothing out by bytes of a number
_SERIES = tuple(1 / (math.factorial(j) * (j + 2)) for j in range(TERMS[8]))  # of (u e^u - e^u + 1) / u^2
_REVERSE_SERIES = tuple(1 / math.factorial(j + 2) for j in range(TERMS[8]))  # of (e^u - 1 - u) / u^2


class Ratios(NamedTuple):
    """Members against the one with the largest share of the pool, class by class: its probability q, (1, ...).

    log_ratio: log p_s / q, ratio: p_s / q, and excess: p_s / q - 1, each (member, ...), right to its own last digits.
    """

    lead: jax.Array
    log_ratio: jax.Array
    ratio: jax.Array
    excess: jax.Array


class Pooled(NamedTuple):
    """The pool against the lead: log_ratio = log p_mean / q, and ratio = p_mean / q, each (1, ...)."""

    log_ratio: jax.Array
    ratio: jax.Array


def mutual_information(pred: ClassPredictive) -> Float[jax.Array, "*batch"]:
    """Epistemic part of the predictive entropy: I[y; member] = H[mean p] - mean H[p] = mean_s KL(p_s || p_mean).

    Nats, in [0, log(num_members)]; zero when all members agree, and for one member; higher = more unlike the training
    data. Median relative error about 2e-7 in float32 for up to a few hundred members, whose sum rounds. With few members it
    is too low: see `corrected_mutual_information`.

    Args:
        pred: predictive; bfloat16 logits are promoted. Members of weight 0 are ignored.
    Source: Houlsby et al. 2011 (BALD); Depeweg et al. 2018. The sum over f is the Bregman form of the Jensen-Shannon
        divergence.
    """
    return entropy_parts(pred)[1]


def reverse_mutual_information(pred: ClassPredictive) -> Float[jax.Array, "*batch"]:
    """mean_s KL(p_mean || p_s), nats, >= 0; infinite where a member rules out a class that another allows.

    Zero when all members agree, and for one member; higher = more unlike the training data.

    Args:
        pred: predictive; bfloat16 logits are promoted. Members of weight 0 are ignored.
    Source: Malinin and Gales 2021, Uncertainty estimation in autoregressive structured prediction (recalled).
    """
    _, ratios, pooled, weights, axis = side_by_side(pred)
    return _over(ratios, _reverse_terms(ratios, pooled), weights, axis)


def pairwise_divergence(pred: ClassPredictive) -> Float[jax.Array, "*batch"]:
    """mean over pairs of members of KL(p_s || p_t) = mutual information + reverse mutual information, nats, >= 0.

    All pairs count, a member with itself among them. Higher = more unlike the training data.

    Args:
        pred: predictive; bfloat16 logits are promoted. Members of weight 0 are ignored.
    Source: Malinin and Gales 2021 (expected pairwise KL, recalled).
    """
    return pairwise_parts(pred)[1]


def entropy_parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean over members of H[p_s], mutual information), nats, each (*batch,).

    The decomposition that belongs to the log score: total = H[p_mean]. The aleatoric part is right to 1e-7 nats, which is
    all of it where every member is surer than that; the epistemic part to its own digits.
    """
    aleatoric, ratios, pooled, weights, axis = side_by_side(pred)
    return aleatoric, divergence_of(ratios, pooled, weights, axis)


def pairwise_parts(pred: ClassPredictive) -> tuple[jax.Array, jax.Array]:
    """(aleatoric, epistemic) = (mean over members of H[p_s], mean over pairs of KL(p_s || p_t)), nats, each (*batch,).

    total = mean over pairs of the cross-entropy of p_s under p_t: what one member expects of another's predictions.
    Source: Schweighofer et al. 2023 (recalled).
    """
    aleatoric, ratios, pooled, weights, axis = side_by_side(pred)
    both = _forward_terms(ratios, pooled) + _reverse_terms(ratios, pooled)
    return aleatoric, _over(ratios, both, weights, axis)


def check_classes(pred, what: str) -> None:
    """Raises TypeError for a predictive that is not given by logits or probabilities of classes."""
    if not isinstance(pred, ClassPredictive):
        remedy = {"Gaussian": "`variance_parts` or `information_bounds`", "Dirichlet": "`dirichlet_parts`"}
        other = remedy.get(type(pred).__name__, "a Categorical")
        refuse(type(pred).__name__, what, f"It is of class probabilities; see {other}.")


def side_by_side(pred: ClassPredictive):
    """(mean member entropy (*batch,), ratios, pooled, weights, axis of the classes)."""
    check_classes(pred, "mutual information")
    pred = pred.as_categorical() if isinstance(pred, Bernoulli) else pred
    values = float32_or_wider(pred.logits if isinstance(pred, Categorical) else pred.probs)
    axis = -1
    if values.shape[-1] < FEW_CLASSES and values.ndim > 2:
        values, axis = jnp.moveaxis(values, -1, 1), 1
    weights = None if pred.member_weights is None else jnp.expand_dims(pred.weights(), axis)
    if isinstance(pred, Categorical):
        found = standing_logits(values, weights, axis)
        entropy, (ratios, _) = found.entropy, ratios_against(found.against, found.probs, weights)
    else:
        entropy, ratios = jax.scipy.special.entr(values).sum(axis, keepdims=True), ratios_of_probs(values, weights)
    aleatoric = jnp.squeeze(member_mean(entropy, weights)[0], axis if axis < 0 else axis - 1)
    return aleatoric, ratios, pool_ratios(ratios, weights), weights, axis


def divergence_of(ratios: Ratios, pooled: Pooled, weights, axis: int = -1) -> Float[jax.Array, "*batch"]:
    """sum_k p_mean mean_s (u e^u - e^u + 1), nats, >= 0: the mutual information."""
    return _over(ratios, _forward_terms(ratios, pooled), weights, axis)


def _over(ratios, terms, weights, axis):
    return (ratios.lead * member_mean(terms, weights)).sum(axis)[0]


def member_mean(values, weights):
    """Weighted mean over members, whose axis stays with length one; equal weights where there are none.

    Args:
        values: (member, ...).
        weights: as `values` or with ones, those of a row sum to one; None = equal. Members of weight 0 may hold NaN.
    """
    return values.mean(0, keepdims=True) if weights is None else weighted_sum(values, weights)[None]


class Standing(NamedTuple):
    """Members side by side: log p_s = reference - peak - log_norm + against_s, whose differences keep all digits.

    reference: (1, ..., classes), the largest logit of each class; peak, log_norm: (1, ...), of a member that counts;
    against, probs: (member, ..., classes); entropy, energy (free): (member, ...), nats. Classes are along the given axis,
    and one there where there are none.
    """

    reference: jax.Array
    peak: jax.Array
    log_norm: jax.Array
    against: jax.Array
    probs: jax.Array
    entropy: jax.Array
    energy: jax.Array


def standing_logits(logits, weights, axis: int = -1) -> Standing:
    """Members of softmax distributions side by side; NaN where a member that counts has no possible class.

    Args:
        logits: (member, ...), classes along `axis`; -infinity is an impossible class.
        weights: (member, ...) with 1 along `axis`; those of a row sum to one. None = equal.
        axis: of the classes.
    """
    counted = None if weights is None else weights != 0
    logits = jnp.maximum(only(counted, logits, IMPOSSIBLE), IMPOSSIBLE)
    peak = logits.max(axis, keepdims=True)
    peak = only(counted, undefined_where(peak <= IMPOSSIBLE, peak), 0)
    shifted = logits - peak
    exponential = jnp.exp(shifted)
    at_peak = shifted == 0  # their exponentials are 1; what is above one of them is small where a member is sure
    others = jnp.where(at_peak, 0, exponential).sum(axis, keepdims=True)
    others = others + (at_peak.astype(logits.dtype).sum(axis, keepdims=True) - 1)
    norm, log_norm = only(counted, 1 + others, 1), only(counted, jnp.log1p(others), 0)
    entropy = log_norm - (exponential * shifted).sum(axis, keepdims=True) / norm
    pick = lambda x: x[:1]
    if weights is not None:
        own = jnp.argmax(weights, axis=0, keepdims=True)
        pick = lambda x: jnp.take_along_axis(x, jnp.broadcast_to(own, (1, *x.shape[1:])), axis=0)
    energy, own_peak, own_norm = -(peak + log_norm), pick(peak), pick(log_norm)
    # Logits of members that nearly agree keep all digits of their differences; those far apart only below their own peak.
    apart = only(counted, abs(peak - own_peak), 0).max(0, keepdims=True) > FAR_APART
    logits = jnp.where(apart, jnp.maximum(shifted, IMPOSSIBLE), logits)
    peak, own_peak = jnp.where(apart, 0, peak), jnp.where(apart, 0, own_peak)
    reference = logits.max(0, keepdims=True)
    against = (logits - reference) - ((peak - own_peak) + (log_norm - own_norm))
    return Standing(reference, own_peak, own_norm, against, exponential * (1 / norm), entropy, energy)


def ratios_against(against, probs, weights) -> tuple[Ratios, jax.Array]:
    """`Ratios`, and the `against` of the lead (1, ...), of members that stand as `Standing` has them."""
    leads = _leads(against, weights)
    most = only(leads, against, IMPOSSIBLE).max(0, keepdims=True)
    log_ratio = against - most
    excess = jnp.expm1(log_ratio)
    # Where members weigh the same, no ratio that matters is so small that the sum would have lost it.
    ratio = 1 + excess if weights is None else jnp.exp(log_ratio)
    return Ratios(only(leads, probs, 0).max(0, keepdims=True), log_ratio, ratio, excess), most


def ratios_of_probs(probs, weights) -> Ratios:
    """`Ratios` of probabilities (member, ...), whose differences keep all digits; weights as in `standing_logits`."""
    probs = only(None if weights is None else weights != 0, probs, 0)
    lead = only(_leads(jnp.log(probs), weights), probs, 0).max(0, keepdims=True)
    inverse = 1 / jnp.where(lead == 0, 1, lead)
    excess, ratio = (probs - lead) * inverse, probs * inverse
    small = excess < -0.5
    far = jnp.maximum(jnp.log(jnp.where(small, ratio, 1)), IMPOSSIBLE)
    return Ratios(lead, jnp.where(small, far, jnp.log1p(jnp.where(small, 0, excess))), ratio, excess)


def _leads(log_probs, weights):
    """Which member has the largest share w_s p_s of the pool, class by class; None = whoever has the largest p_s."""
    if weights is None:
        return None
    share = log_probs + jnp.log(jnp.where(weights == 0, 1, weights)) + jnp.where(weights == 0, IMPOSSIBLE, 0)
    return share == share.max(0, keepdims=True)


def only(counted, values, otherwise):
    """`values` of the members that count; None = all do."""
    return values if counted is None else jnp.where(counted, values, otherwise)


def pool_ratios(ratios: Ratios, weights) -> Pooled:
    """The members' weighted mean against the lead."""
    excess = member_mean(ratios.excess, weights)
    if weights is None:
        return Pooled(jnp.log1p(excess), 1 + excess)
    ratio = member_mean(ratios.ratio, weights)
    heavy = excess > -0.5
    near = jnp.log1p(jnp.where(heavy, excess, 0))
    return Pooled(jnp.where(heavy, near, jnp.log(jnp.where(heavy, 1, ratio))), ratio)


def _forward_terms(ratios: Ratios, pooled: Pooled):
    """p_mean / q * (u e^u - e^u + 1) of each member: >= 0."""
    u = ratios.log_ratio - pooled.log_ratio
    far = u * ratios.ratio - (ratios.ratio - pooled.ratio)
    return jnp.where(jnp.abs(u) < NEAR, _near(u, _SERIES) * pooled.ratio, far)


def _reverse_terms(ratios: Ratios, pooled: Pooled):
    """p_mean / q * (e^u - 1 - u) of each member: >= 0, infinite where it rules out what the pool allows."""
    u = ratios.log_ratio - pooled.log_ratio
    ruled_out = u < IMPOSSIBLE / 2
    far = (ratios.ratio - pooled.ratio) - pooled.ratio * jnp.where(ruled_out, 0, u)
    terms = jnp.where(jnp.abs(u) < NEAR, _near(u, _REVERSE_SERIES) * pooled.ratio, far)
    terms = jnp.where(ruled_out, jnp.inf, terms)  # whatever weight it has: one of weight 0 is left out of the mean
    return jnp.where(ratios.lead == 0, 0, terms)


def exponential_excess(u):
    """e^u - 1 - u >= 0, to full relative accuracy: a series near 0, where it is u^2 / 2."""
    return jnp.where(jnp.abs(u) < NEAR, _near(u, _REVERSE_SERIES), jnp.expm1(u) - u)


def _near(u, series):
    """u^2 * sum_j series_j u^j where |u| < NEAR; 0 elsewhere, so that gradients stay finite."""
    small = jnp.where(jnp.abs(u) < NEAR, u, 0)
    total = 0.0
    for factor in reversed(series[: TERMS[u.dtype.itemsize]]):
        total = total * small + factor
    return small**2 * total
