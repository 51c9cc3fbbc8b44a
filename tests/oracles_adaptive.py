"""Slow, obvious float64 versions of the metrics whose bins follow the data, and of the decompositions."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np


def tied(p):
    """Rows of equal probability, in order of probability: a list of lists of rows."""
    groups = {}
    for i, x in enumerate(p):
        groups.setdefault(float(x), []).append(i)
    return [groups[x] for x in sorted(groups)]


def grouped_bins(p, w, num_bins):
    """Rows of each bin as (row, share of the row): ties together, by the middle of their mass, in exact fractions."""
    w = [Fraction(float(x)) for x in w]
    bins, before, total = [[] for _ in range(num_bins)], Fraction(0), sum(w)
    for rows in tied(p):
        mass = sum(w[i] for i in rows)
        if mass > 0:
            bins[int(num_bins * (before + mass / 2) / total)] += [(i, 1.0) for i in rows if w[i] > 0]
        before += mass
    return bins


def rank_bins(p, w, num_bins):
    """As `np.array_split` of the sorted rows that weigh anything; each place is filled by its ties in equal shares."""
    places = []
    for rows in tied(p):
        rows = [i for i in rows if w[i] > 0]
        places += [[(i, 1 / len(rows)) for i in rows]] * len(rows)
    return [
        [pair for place in part for pair in places[place]] for part in np.array_split(np.arange(len(places)), num_bins)
    ]


def equal_width_bins(p, num_bins):
    """Closed on the left, the last on both sides."""
    bins = [[] for _ in range(num_bins)]
    for i, x in enumerate(p):
        bins[max(k for k in range(num_bins) if x >= np.asarray(k / num_bins, np.asarray(p).dtype))].append((i, 1.0))
    return bins


def facts(bins, p, y, w):
    """(share, mean probability, mean outcome, Kish's rows) of each bin that holds weight."""
    out, total = [], sum(float(w[i]) * s for rows in bins for i, s in rows)
    for rows in bins:
        mass = sum(float(w[i]) * s for i, s in rows)
        if mass > 0:
            confidence = sum(float(w[i]) * s * float(p[i]) for i, s in rows) / mass
            accuracy = sum(float(w[i]) * s * float(y[i]) for i, s in rows) / mass
            squares = sum(float(w[i]) ** 2 * s for i, s in rows)
            out.append((mass / total, confidence, accuracy, mass**2 / squares))
    return out


def norm_of_gaps(bins, p, y, w, norm=1, debiased=False):
    sums = facts(bins, p, y, w)
    if norm == math.inf:
        return max(abs(c - a) for _, c, a, _ in sums)
    plain = sum(share * abs(c - a) ** norm for share, c, a, _ in sums) ** (1 / norm)
    if not debiased:
        return plain
    if norm == 2:
        return math.sqrt(max(debiased_square(bins, p, y, w), 0))
    expected = 0.0
    for share, c, a, n in sums:
        d, sd = a - c, math.sqrt(a * (1 - a) / n)
        if sd > 0:
            below = 0.5 * math.erfc(d / sd / math.sqrt(2))
            expected += share * (sd * math.sqrt(2 / math.pi) * math.exp(-(d**2) / 2 / sd**2) + d * (1 - 2 * below))
        else:
            expected += share * abs(d)
    return 2 * plain - expected


def debiased_square(bins, p, y, w):
    return sum(
        share * ((c - a) ** 2 - a * (1 - a) / (n - 1)) for share, c, a, n in facts(bins, p, y, w) if n > 1.000001
    )


def sweep(p, y, w, scheme, max_bins):
    """(bins, number): grown until the accuracies decrease somewhere."""
    kept = None
    for number in range(1, max_bins + 1):
        bins = grouped_bins(p, w, number) if scheme == "mass" else equal_width_bins(p, number)
        accuracies = [a for _, _, a, _ in facts(bins, p, y, w)]
        if any(second < first - 1e-12 for first, second in pairwise(accuracies)):
            break
        kept = bins, number
    return kept


def nixon(probs, targets, w, num_bins, threshold=0.0, norm=1, debiased=False, rule=grouped_bins):
    total = 0.0
    for k in range(probs.shape[1]):
        p, y = probs[:, k], (targets == k).astype(float)
        counted = [float(w[i]) if threshold == 0 or p[i] > threshold else 0.0 for i in range(len(p))]
        if sum(counted) > 0:
            total += norm_of_gaps(rule(p, counted, num_bins), p, y, counted, norm, debiased) ** norm
    return (total / probs.shape[1]) ** (1 / norm)


def isotonic(rate, weight):
    """Weighted least squares among non-decreasing sequences, by the max-min formula."""
    n, out = len(rate), []
    for i in range(n):
        best = -math.inf
        for first in range(i + 1):
            means = [np.average(rate[first : last + 1], weights=weight[first : last + 1]) for last in range(i, n)]
            best = max(best, min(means))
        out.append(best)
    return np.array(out)


def score(p, y, name):
    if name == "brier":
        return (p - y) ** 2
    chance = p if y else 1 - p
    return -math.log(chance) if chance > 0 else math.inf


def corp(p, y, w, name):
    """(score, miscalibration, discrimination, uncertainty)"""
    groups = tied(p)
    weight = np.array([sum(w[i] for i in rows) for rows in groups])
    rate = np.array([sum(w[i] * y[i] for i in rows) / weight[g] for g, rows in enumerate(groups)])
    fitted, base = isotonic(rate, weight), np.average(y, weights=w)
    given = flat = after = 0.0
    for g, rows in enumerate(groups):
        for i in rows:
            given += w[i] * score(p[i], y[i], name) / sum(w)
            flat += w[i] * score(base, y[i], name) / sum(w)
            after += w[i] * score(fitted[g], y[i], name) / sum(w)
    return given, given - after, flat - after, flat


def murphy(p, y, w, bins):
    """(score, reliability, resolution, uncertainty, within-bin variance, within-bin covariance)"""
    base, total, out = np.average(y, weights=w), sum(w), np.zeros(6)
    for rows in bins:
        rows = [i for i, _ in rows]
        if not rows:
            continue
        mass = sum(w[i] for i in rows)
        forecast = sum(w[i] * p[i] for i in rows) / mass
        rate = sum(w[i] * y[i] for i in rows) / mass
        for i in rows:
            terms = (
                (p[i] - y[i]) ** 2,
                (forecast - rate) ** 2,
                (rate - base) ** 2,
                base * (1 - base),
                (p[i] - forecast) ** 2,
                2 * (p[i] - forecast) * (y[i] - rate),
            )
            out += w[i] / total * np.array(terms)
    return out
