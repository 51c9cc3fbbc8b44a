"""Slow, obvious float64 versions of the binned calibration metrics, with loops."""

import math
from collections import defaultdict

import numpy as np
from oracles import bin_of, entropy


class Bin:
    """The rows of one bin as lists, with what formulas ask of them."""

    def __init__(self):
        self.p, self.y, self.w = [], [], []

    def add(self, p, y, w):
        self.p.append(float(p))
        self.y.append(float(y))
        self.w.append(float(w))

    @property
    def weight(self):
        return sum(self.w)

    @property
    def rows(self):
        return sum(self.w) ** 2 / sum(w * w for w in self.w)

    @property
    def confidence(self):
        return sum(w * p for w, p in zip(self.w, self.p, strict=True)) / self.weight

    @property
    def accuracy(self):
        return sum(w * y for w, y in zip(self.w, self.y, strict=True)) / self.weight

    @property
    def gap(self):
        return abs(self.confidence - self.accuracy)


def bins(p, y, w=None, num_bins=15, closed="right"):
    """The bins that have weight, in order."""
    w = np.ones(len(p)) if w is None else w
    found = defaultdict(Bin)
    for p_i, y_i, w_i in zip(p, y, w, strict=True):
        if w_i > 0:
            found[bin_of(p_i, num_bins, closed)].add(p_i, y_i, w_i)
    return [found[b] for b in sorted(found)]


def folded_normal_mean(mean, sd):
    """E|N(mean, sd^2)| as an integral."""
    if sd == 0:
        return abs(mean)
    x = np.linspace(mean - 12 * sd, mean + 12 * sd, 200001)
    density = np.exp(-(((x - mean) / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))
    return float(np.trapezoid(np.abs(x) * density, x))


def norm_of(cells, shares, norm=1, debiased=False):
    if norm == math.inf:
        return max(b.gap for b in cells)
    plug_in = sum(s * b.gap**norm for s, b in zip(shares, cells, strict=True)) ** (1 / norm)
    if not debiased:
        return plug_in
    if norm == 1:
        expected = 0.0
        for s, b in zip(shares, cells, strict=True):
            expected += s * folded_normal_mean(b.gap, math.sqrt(max(b.accuracy * (1 - b.accuracy), 0) / b.rows))
        return 2 * plug_in - expected
    return math.sqrt(max(square_of(cells, shares), 0))


def square_of(cells, shares):
    total = 0.0
    for s, b in zip(shares, cells, strict=True):
        if b.rows > 1.5:
            total += s * (b.gap**2 - b.accuracy * (1 - b.accuracy) / (b.rows - 1))
    return total


def calibration_error(p, y, w=None, *, num_bins=15, closed="right", weighting="mass", min_count=1, **how):
    cells = [b for b in bins(p, y, w, num_bins, closed) if b.rows > min_count - 1e-3]
    mass = [b.weight if weighting == "mass" else 1.0 for b in cells]
    return norm_of(cells, [m / sum(mass) for m in mass], **how)


def squared_calibration_error(p, y, w=None, num_bins=15):
    cells = bins(p, y, w, num_bins)
    return square_of(cells, [b.weight / sum(c.weight for c in cells) for b in cells])


def classwise_calibration_error(probs, targets, w=None, *, num_bins=15, threshold=0.0, **how):
    w = np.ones(len(targets)) if w is None else w
    classes = probs.shape[1]
    cells, shares = [], []
    for k in range(classes):
        kept = np.array([p > threshold or threshold == 0 for p in probs[:, k]])
        own = bins(probs[kept, k], targets[kept] == k, w[kept], num_bins)
        cells += own
        shares += [b.weight / sum(c.weight for c in own) / classes for b in own]
    return norm_of(cells, shares, **how)


def top_label_conditional_calibration_error(probs, targets, w=None, *, num_bins=15, **how):
    w = np.ones(len(targets)) if w is None else w
    cells = []
    for label in range(probs.shape[1]):
        rows = probs.argmax(1) == label
        cells += bins(probs[rows].max(1), targets[rows] == label, w[rows], num_bins)
    return norm_of(cells, [b.weight / w.sum() for b in cells], **how)


def soft_binned_calibration_error(p, y, w=None, num_bins=15, temperature=0.01, norm=2):
    w = np.ones(len(p)) if w is None else w
    centres = [(2 * b - 1) / (2 * num_bins) for b in range(1, num_bins + 1)]
    size, confidence, accuracy = np.zeros(num_bins), np.zeros(num_bins), np.zeros(num_bins)
    for p_i, y_i, w_i in zip(p, y, w, strict=True):
        if w_i > 0:
            member = np.exp([-((p_i - g) ** 2) / temperature for g in centres])
            member = w_i * member / member.sum()
            size += member
            confidence += member * p_i
            accuracy += member * y_i
    total = 0.0
    for s, c, a in zip(size, confidence, accuracy, strict=True):
        total += s / size.sum() * abs(c / s - a / s) ** norm
    return total ** (1 / norm)


def cells(probs, targets, w, how, threshold, temperature=0.01):
    """(AC, AU, IC, IU), `how` rows are counted: "hard", "loss" or "soft"."""
    found = dict.fromkeys(["AC", "AU", "IC", "IU"], 0.0)
    for p, y, w_i in zip(probs, targets, w, strict=True):
        h = entropy(p)
        t, c, right = math.tanh(h), p.max(), p.argmax() == y
        if how == "soft":
            e = h / math.log(len(p))
            q = 1 / (1 + math.exp(min(700, -math.log(e * (1 - threshold) / ((1 - e) * threshold)) / temperature)))
            found["AC" if right else "IC"] += w_i * (1 - q) * (1 - t)
            found["AU" if right else "IU"] += w_i * q * t
        else:
            uncertain = h > threshold
            size = 1 if how == "hard" else (c if right else 1 - c) * (t if uncertain else 1 - t)
            found[("A" if right else "I") + ("U" if uncertain else "C")] += w_i * size
    return found


def accuracy_versus_uncertainty(probs, targets, w, threshold):
    n = cells(probs, targets, w, "hard", threshold)
    return (n["AC"] + n["IU"]) / sum(n.values())


def accuracy_versus_uncertainty_loss(probs, targets, w, how, threshold, temperature=0.01):
    n = cells(probs, targets, w, how, threshold, temperature)
    return math.log(1 + (n["AU"] + n["IC"]) / (n["AC"] + n["IU"]))


def spiegelhalter_z(p, y, w):
    value = sum(w_i * (y_i - p_i) * (1 - 2 * p_i) for p_i, y_i, w_i in zip(p, y, w, strict=True))
    variance = sum(w_i**2 * (1 - 2 * p_i) ** 2 * p_i * (1 - p_i) for p_i, w_i in zip(p, w, strict=True))
    return value / math.sqrt(variance)


def mean_where(values, rows, w):
    return sum(w_i * v for v, r, w_i in zip(values, rows, w, strict=True) if r) / sum(
        w_i for r, w_i in zip(rows, w, strict=True) if r
    )


def binned_auroc(p, y, w, num_bins):
    index = [bin_of(x, num_bins, "right") for x in p]
    wins = pairs = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if y[i] and not y[j]:
                pairs += w[i] * w[j]
                wins += w[i] * w[j] * (1.0 if index[i] > index[j] else 0.5 if index[i] == index[j] else 0.0)
    return wins / pairs


def binned_ks_error(p, y, w, num_bins):
    index = [bin_of(x, num_bins, "right") for x in p]
    largest = running = 0.0
    for b in sorted(set(index)):
        running += sum(w[i] * (y[i] - p[i]) for i in range(len(p)) if index[i] == b)
        largest = max(largest, abs(running))
    return largest / sum(w)
