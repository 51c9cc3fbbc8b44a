"""Scores in float64 by loops and numerical integration: slow and obvious."""

import math
from itertools import permutations, product

import numpy as np


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def shares(weights, members, rows):
    """Member weights (member, rows) that sum to one for every row."""
    if weights is None:
        weights = np.ones(members)
    weights = np.asarray(weights, np.float64)
    weights = np.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, (members, rows))
    return weights / weights.sum(0)


def classification(probs, targets, weights=None, clip=0.05):
    """Mean scores of (member, rows, classes) probabilities, name -> value."""
    members, rows, classes = probs.shape
    share = shares(weights, members, rows)
    each = {name: [] for name in ("nll", "clipped", "gibbs", "brier", "half", "spherical", "rps", "rps of one")}
    for i in range(rows):
        counted = [s for s in range(members) if share[s, i] > 0]
        p = sum(share[s, i] * probs[s, i] for s in counted)
        y = targets[i]
        each["nll"].append(-math.log(p[y]))
        each["clipped"].append(-math.log(max(p[y], clip)))
        each["gibbs"].append(-sum(share[s, i] * math.log(probs[s, i, y]) for s in counted))
        each["brier"].append(sum((p[k] - (k == y)) ** 2 for k in range(classes)))
        each["half"].append(each["brier"][-1] / 2)
        each["spherical"].append(p[y] / math.sqrt(sum(x**2 for x in p)))
        each["rps"].append(sum((sum(p[: k + 1]) - (y <= k)) ** 2 for k in range(classes)))
        each["rps of one"].append(each["rps"][-1] / (classes - 1))
    return {name: np.array(x) for name, x in each.items()}


def disagreement(probs, weights=None):
    """(over pairs, against the pool), each (rows,)."""
    members, rows, _ = probs.shape
    share = shares(weights, members, rows)
    pairs, pool = np.zeros(rows), np.zeros(rows)
    for i in range(rows):
        label = [int(probs[s, i].argmax()) for s in range(members)]
        mixed = int(sum(share[s, i] * probs[s, i] for s in range(members) if share[s, i] > 0).argmax())
        both = [(s, t) for s, t in permutations(range(members), 2) if share[s, i] * share[t, i] > 0]
        total = sum(share[s, i] * share[t, i] for s, t in both)
        pairs[i] = sum(share[s, i] * share[t, i] * (label[s] != label[t]) for s, t in both) / total
        pool[i] = sum(share[s, i] * (label[s] != mixed) for s in range(members) if share[s, i] > 0)
    return pairs, pool


def diversity(probs, weights=None):
    """Mean KL over ordered pairs of different members, (rows,)."""
    members, rows, classes = probs.shape
    share = shares(weights, members, rows)
    out = np.zeros(rows)
    for i in range(rows):
        both = [(s, t) for s, t in permutations(range(members), 2) if share[s, i] * share[t, i] > 0]
        for s, t in both:
            kl = sum(probs[s, i, k] * math.log(probs[s, i, k] / probs[t, i, k]) for k in range(classes))
            out[i] += share[s, i] * share[t, i] * kl
        out[i] /= sum(share[s, i] * share[t, i] for s, t in both)
    return out


def joint_nll(probs, targets, blocks, weights=None):
    """-log of the mixture's probability of each block of rows, (blocks,), nats per block."""
    members, rows, _ = probs.shape
    share = shares(weights, members, rows)[:, 0]
    return np.array(
        [
            -math.log(sum(share[s] * math.prod(probs[s, i, targets[i]] for i in block) for s in range(members)))
            for block in blocks
        ]
    )


def dyadic_nll(probs, targets, pairs, tau, weights=None):
    """Mean of `joint_nll` over all 2^tau ways to draw tau rows from a pair, (pairs,)."""
    draws = list(product((0, 1), repeat=tau))
    return np.array(
        [joint_nll(probs, targets, [[pair[d] for d in draw] for draw in draws], weights).mean() for pair in pairs]
    )


def phi(z):
    return math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def cdf(mean, variance, share, y):
    """Distribution function of a mixture of normals at one place."""
    return sum(
        w * 0.5 * math.erfc(-(y - m) / math.sqrt(2 * v)) for m, v, w in zip(mean, variance, share, strict=True) if w > 0
    )


def crps(mean, variance, share, y, points=200_001):
    """Integral of (F(x) - 1[y <= x])^2 on a fine grid that has y on it: the definition."""
    from scipy.special import ndtr

    reach = 12 * math.sqrt(max(variance))
    lower, upper = min(min(mean) - reach, y), max(max(mean) + reach, y)
    total = 0.0
    for low, high, step in ((lower, y, 0.0), (y, upper, 1.0)):
        x = np.linspace(low, high, points // 2)
        f = sum(w * ndtr((x - m) / math.sqrt(v)) for m, v, w in zip(mean, variance, share, strict=True))
        total += np.trapezoid((f - step) ** 2, x)
    return total


def crps_samples(samples, y, fair):
    m = len(samples)
    apart = sum(abs(a - b) for a in samples for b in samples) / (2 * m * (m - 1 if fair else m))
    return sum(abs(a - y) for a in samples) / m - apart


def energy(samples, y, fair):
    m = len(samples)
    length = lambda v: math.sqrt(sum(x**2 for x in v))
    apart = sum(length(a - b) for a in samples for b in samples) / (2 * m * (m - 1 if fair else m))
    return sum(length(a - y) for a in samples) / m - apart


def variogram(samples, y, p, weights):
    total = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            total += weights[i, j] * (abs(y[i] - y[j]) ** p - np.mean([abs(x[i] - x[j]) ** p for x in samples])) ** 2
    return total


def quantile(mean, variance, share, q):
    """Root of F(x) = q by scipy."""
    from scipy.optimize import brentq

    reach = 12 * math.sqrt(max(variance))
    return brentq(lambda x: cdf(mean, variance, share, x) - q, min(mean) - reach, max(mean) + reach, xtol=1e-12)


def interval_score(low, high, y, level):
    alpha = 1 - level
    return high - low + 2 / alpha * ((low - y) * (y < low) + (y - high) * (y > high))


def pinball(f, y, q):
    return q * (y - f) if y >= f else (1 - q) * (f - y)


def level_gaps(u, levels, kind, weights=None):
    """share(q) - q for each level, of PIT values (rows,)."""
    w = np.ones(len(u)) if weights is None else np.asarray(weights, np.float64)
    gaps = []
    for q in levels:
        inside = [(x <= q) if kind == "quantile" else ((1 - q) / 2 <= x <= (1 + q) / 2) for x in u]
        gaps.append(sum(w[i] for i in range(len(u)) if inside[i]) / w.sum() - q)
    return np.array(gaps)


def area(levels, gaps):
    """Integral of |gap|, straight between levels, on a fine grid."""
    x = np.linspace(0, 1, 1_000_001)
    return np.trapezoid(abs(np.interp(x, [0, *levels, 1], [0, *gaps, 0])), x)


def variance_groups(variance, num_bins, weights=None):
    """Rows of each bin of equal mass, whole groups of equal variance by the middle of their ranks."""
    w = np.ones(len(variance)) if weights is None else np.asarray(weights, np.float64)
    bins = [[] for _ in range(num_bins)]
    for i, v in enumerate(variance):
        start = sum(w[j] for j in range(len(w)) if variance[j] < v)
        end = sum(w[j] for j in range(len(w)) if variance[j] <= v)
        bins[min(int(num_bins * (start + end) / (2 * w.sum())), num_bins - 1)].append(i)
    return bins


def uce_and_ence(variance, squared_error, bins, weights=None):
    w = np.ones(len(variance)) if weights is None else np.asarray(weights, np.float64)
    uce, ence, filled = 0.0, 0.0, 0
    for rows in bins:
        mass = sum(w[i] for i in rows)
        if mass > 0:
            mv, mse = (sum(w[i] * x[i] for i in rows) / mass for x in (variance, squared_error))
            uce += mass / w.sum() * abs(mse - mv)
            ence += abs(math.sqrt(mv) - math.sqrt(mse)) / math.sqrt(mv)
            filled += 1
    return uce, ence / filled
