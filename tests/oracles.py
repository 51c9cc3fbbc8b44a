"""Slow, obvious float64 versions with loops: what the fast ones are compared with."""

import math

import numpy as np


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


def pool(logits, weights=None):
    """(member, n, classes) -> (n, classes), averaging probabilities."""
    logits = np.asarray(logits, np.float64)
    members, rows, classes = logits.shape
    weights = np.ones(members) if weights is None else np.asarray(weights, np.float64)
    out = np.zeros((rows, classes))
    for i in range(rows):
        for s in range(members):
            if weights[s] > 0:
                out[i] += weights[s] * softmax(logits[s, i])
        out[i] /= weights.sum()
    return out


def entropy(p):
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def mutual_information(logits, weights=None):
    """mean_s KL(p_s || mean p) in long double, (n,)."""
    logits = np.asarray(logits, np.longdouble)
    members, rows, classes = logits.shape
    weights = np.ones(members, np.longdouble) if weights is None else np.asarray(weights, np.longdouble)
    weights = weights / weights.sum()
    out = np.zeros(rows)
    for i in range(rows):
        shifted = logits[:, i] - logits[:, i].max(-1, keepdims=True)
        p = np.exp(shifted)
        p /= p.sum(-1, keepdims=True)
        mean = (weights[:, None] * p).sum(0)
        total = np.longdouble(0)
        for s in range(members):
            for k in range(classes):
                ratio = p[s, k] / mean[k] if mean[k] > 0 else np.longdouble(1)
                product = ratio * np.log(ratio) if ratio > 0 else 0
                total += weights[s] * mean[k] * (product - (ratio - 1))
        out[i] = float(total)
    return out


def bin_of(confidence, num_bins, closed):
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        if closed == "right" and (low < confidence <= high or (b == 0 and confidence == 0)):
            return b
        if closed == "left" and (low <= confidence < high or (b == num_bins - 1 and confidence == 1)):
            return b
    raise AssertionError(confidence)


def calibration_error(probs, targets, num_bins=15, norm=1, closed="right", weights=None):
    weights = np.ones(len(targets)) if weights is None else weights
    bins = [[0.0, 0.0] for _ in range(num_bins)]
    for p, y, w in zip(probs, targets, weights, strict=True):
        b = bins[bin_of(p.max(), num_bins, closed)]
        b[0] += w
        b[1] += w * (p.max() - (p.argmax() == y))
    gaps = [(w, abs(g) / w) for w, g in bins if w > 0]
    if norm == float("inf"):
        return max(g for _, g in gaps)
    return sum(w / sum(weights) * g**norm for w, g in gaps) ** (1 / norm)


def brier(probs, targets):
    return float(
        np.mean([sum((p[k] - (k == y)) ** 2 for k in range(len(p))) for p, y in zip(probs, targets, strict=True)])
    )


def nll(probs, targets):
    return float(np.mean([-math.log(p[y]) for p, y in zip(probs, targets, strict=True)]))


def auroc(scores, positive):
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, is_a in zip(scores, positive, strict=True)
        if is_a
        for b, is_b in zip(scores, positive, strict=True)
        if not is_b
    ]
    return float(np.mean(wins))


def normal_log_density(x, mean, variance):
    return -0.5 * (math.log(2 * math.pi * variance) + (x - mean) ** 2 / variance)


def greedy_selection(densities, num_members, weights, usable):
    """(member, rows) densities of the targets -> (order, nll after each step)."""
    order, curve = [], []
    for _ in range(num_members):
        best, best_nll = None, math.inf
        for member in range(len(densities)):
            if not usable[member]:
                continue
            total = 0.0
            for row, weight in enumerate(weights):
                if weight > 0:
                    pool = sum(float(densities[m, row]) for m in [*order, member]) / (len(order) + 1)
                    total -= weight * math.log(pool)
            if total / sum(weights) < best_nll:
                best, best_nll = member, total / sum(weights)
        order.append(best)
        curve.append(best_nll)
    return order, curve
