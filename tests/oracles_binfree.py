"""Slow, obvious float64 versions with loops, for the calibration metrics without bins."""

import math

import numpy as np


def reflected_gaussian(t, centre, sigma):
    """Density at t of a Gaussian around `centre`, folded back at 0 and at 1."""
    images = [2 * m + side * centre for m in range(-6, 7) for side in (-1, 1)]
    return sum(np.exp(-(((t - image) / sigma) ** 2) / 2) for image in images) / (sigma * math.sqrt(2 * math.pi))


def smoothed(probability, mass, sigma, t):
    return sum(m * reflected_gaussian(t, p, sigma) for p, m in zip(probability, mass))


def smooth_calibration_error(probability, outcome, weights, sigma, points=4001):
    t = np.linspace(0, 1, points)
    residual = smoothed(probability, weights * (probability - outcome), sigma, t) / weights.sum()
    return np.trapezoid(np.abs(residual), t)


def smooth_fixed_point(probability, outcome, weights, steps=17):
    low, high = 1e-3, 1.0
    for _ in range(steps):
        middle = math.sqrt(low * high)
        above = smooth_calibration_error(probability, outcome, weights, middle, 1001) > middle
        low, high = (middle, high) if above else (low, middle)
    return high


def cumulative(probability, outcome, weights):
    """D_0 = 0 and D at each distinct probability."""
    result = [0.0]
    for t in sorted(set(probability)):
        below = [w * (y - p) for p, y, w in zip(probability, outcome, weights) if p <= t]
        result.append(sum(below) / weights.sum())
    return result


def ks(probability, outcome, weights):
    return max(abs(d) for d in cumulative(probability, outcome, weights))


def kuiper(probability, outcome, weights):
    d = cumulative(probability, outcome, weights)
    return max(d) - min(d)


def cumulative_scale(probability, weights):
    return math.sqrt(sum(w * w * p * (1 - p) for p, w in zip(probability, weights))) / weights.sum()


def spiegelhalter(probability, outcome, weights):
    top = sum(w * (y - p) * (1 - 2 * p) for p, y, w in zip(probability, outcome, weights))
    return top / math.sqrt(sum(w * w * (1 - 2 * p) ** 2 * p * (1 - p) for p, w in zip(probability, weights)))


def pairs(h, weights, unbiased):
    top = bottom = 0.0
    for i, wi in enumerate(weights):
        for j, wj in enumerate(weights):
            if i != j or not unbiased:
                top, bottom = top + wi * wj * h(i, j), bottom + wi * wj
    return top / bottom


def mmce_square(probability, outcome, weights, width, unbiased):
    gap = outcome - probability
    return pairs(
        lambda i, j: gap[i] * gap[j] * math.exp(-abs(probability[i] - probability[j]) / width), weights, unbiased
    )


def skce(probs, targets, weights, bandwidth, unbiased):
    residual = np.eye(probs.shape[1])[targets] - probs

    def h(i, j):
        return math.exp(-np.abs(probs[i] - probs[j]).sum() / 2 / bandwidth) * (residual[i] @ residual[j])

    return pairs(h, weights, unbiased)


def skce_block(probs, targets, weights, bandwidth, size):
    top = bottom = 0.0
    for first in range(0, len(probs) - size + 1, size):
        for i in range(first, first + size):
            for j in range(i + 1, first + size):
                pair = skce(probs[[i, j]], targets[[i, j]], np.ones(2), bandwidth, True)
                top, bottom = top + weights[i] * weights[j] * pair, bottom + weights[i] * weights[j]
    return top / bottom


def median_distance(probs, weights):
    kept = probs[weights > 0]
    return np.median([np.abs(a - b).sum() / 2 for i, a in enumerate(kept) for b in kept[:i]])


def local_gaps(probability, outcome, features, weights, gamma, num_bins):
    place = [min(max(math.ceil(p * num_bins) - 1, 0), num_bins - 1) for p in probability]
    result = []
    for i in range(len(place)):
        top = bottom = 0.0
        for j in range(len(place)):
            if place[i] == place[j]:
                k = weights[j] * math.exp(-np.abs(features[i] - features[j]).mean() / gamma)
                top, bottom = top + k * (probability[j] - outcome[j]), bottom + k
        result.append(abs(top / bottom) if weights[i] > 0 else 0.0)
    return np.array(result)


def brownian_sup_cdf(x):
    """From the heat equation between two walls; slow to converge for large x, hence many terms."""
    terms = [(-1) ** k / (2 * k + 1) * math.exp(-(((2 * k + 1) * math.pi / x) ** 2) / 8) for k in range(200)]
    return 4 / math.pi * math.fsum(terms)


def brownian_range_tail(x):
    """Feller's series; slow to converge for small x, hence many terms."""
    return 8 * math.fsum((-1) ** (k - 1) * k * math.erfc(k * x / math.sqrt(2)) / 2 for k in range(1, 400))
