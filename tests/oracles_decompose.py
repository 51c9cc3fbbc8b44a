"""Slow, obvious float64 versions of the decompositions, one example at a time."""

import numpy as np
import oracles


def kl(p, q):
    """Sum of p log(p / q), infinite where q is 0 and p is not."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += np.inf if b == 0 else a * np.log(a / b)
    return total


def shares(members, weights):
    weights = np.ones(members) if weights is None else np.asarray(weights, float)
    return weights / weights.sum()


def pairwise_divergence(probs, weights=None):
    """Mean over pairs of KL(p_s || p_t) of one example, probs (member, classes)."""
    w = shares(len(probs), weights)
    return sum(w[s] * w[t] * kl(probs[s], probs[t]) for s in range(len(w)) for t in range(len(w)) if w[s] * w[t])


def reverse_information(probs, weights=None):
    w = shares(len(probs), weights)
    return sum(w[s] * kl(w @ probs, probs[s]) for s in range(len(w)) if w[s])


def generalised(probs, entropy, weights=None):
    """(mean_s G(p_s), G(mean p) - mean_s G(p_s)) of one example."""
    w = shares(len(probs), weights)
    own = sum(w[s] * entropy(probs[s]) for s in range(len(w)))
    return own, entropy(w @ probs) - own


def gini(p):
    return 1 - (p**2).sum()


def zero_one(p):
    return 1 - p.max()


ENTROPIES = {"log": oracles.entropy, "brier": gini, "zero one": zero_one}
