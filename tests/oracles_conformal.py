"""Conformal prediction in float64 by loops, from the definitions: slow and obvious. u is how much a class counts itself."""

from fractions import Fraction

import numpy as np


def order(p):
    """Classes from the most to the least probable, ties to the lowest index."""
    return sorted(range(len(p)), key=lambda k: (-p[k], k))


def lac(p, u):
    return [1 - x for x in p]


def margin(p, u):
    return [max(p[j] for j in range(len(p)) if j != k) - p[k] for k in range(len(p))]


def top_k(p, u):
    places = order(p)
    return [places.index(k) + 1 for k in range(len(p))]


def aps(p, u):
    scores, before = [0.0] * len(p), 0.0
    for k in order(p):
        scores[k] = before + u * p[k]
        before += p[k]
    return scores


def raps(penalty, start):
    return lambda p, u: [s + penalty * max(r - start, 0) for s, r in zip(aps(p, u), top_k(p, u))]


def saps(penalty):
    return lambda p, u: [u * max(p) if r == 1 else max(p) + penalty * (r - 2 + u) for r in top_k(p, u)]


def never_empty(score):
    return lambda p, u: [-np.inf if k == order(p)[0] else s for k, s in enumerate(score(p, u))]


def threshold(scores, alpha, weights=None, own=1):
    """The smallest score t with sum_i w_i 1[s_i <= t] >= (1 - alpha)(sum_i w_i + own), in exact fractions; else infinity."""
    weights = [1] * len(scores) if weights is None else weights
    weights, own = [Fraction(float(w)) for w in weights], Fraction(float(own))
    wanted = (1 - Fraction(str(alpha))) * (sum(weights) + own)
    reached = Fraction(0)
    for i in np.argsort(scores, kind="stable"):
        reached += weights[i]
        if reached >= wanted:
            return float(scores[i])
    return np.inf


def sets(score, probs, targets, u, new, new_u, alpha):
    """(scores of the new rows' classes, threshold): the sets are where the former are at most the latter."""
    calibration = [score(p, v)[y] for p, y, v in zip(probs, targets, u)]
    return np.array([score(p, v) for p, v in zip(new, new_u)]), threshold(calibration, alpha)
