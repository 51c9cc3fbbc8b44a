"""Slow, obvious float64 versions of the ranking and selective-prediction metrics."""

import itertools
import math


def counts(scores, positive):
    """[(positives, rows) with a score of at least t] for every distinct score t, the highest first."""
    found = []
    for t in sorted(set(map(float, scores)), reverse=True):
        accepted = [bool(y) for s, y in zip(scores, positive, strict=True) if s >= t]
        found.append((sum(accepted), len(accepted)))
    return found


def average_precision(scores, positive):
    all_positives, before, total = sum(map(bool, positive)), 0, 0.0
    for hits, rows in counts(scores, positive):
        total += (hits - before) / all_positives * hits / rows
        before = hits
    return total


def fpr_at_tpr(scores, positive, tpr):
    positives = sum(map(bool, positive))
    for hits, rows in counts(scores, positive):
        if hits / positives >= tpr:
            return (rows - hits) / (len(scores) - positives)
    raise AssertionError


def risks(confidence, correct):
    """Share of errors among the k most confident rows, k = 1..n; a tied row counts as the mean of its group."""
    order = sorted(range(len(correct)), key=lambda i: -confidence[i])
    found, errors = [], 0.0
    for k, i in enumerate(order, 1):
        group = [not correct[j] for j in order if confidence[j] == confidence[i]]
        errors += sum(group) / len(group)
        found.append(errors / k)
    return found


def aurc(confidence, correct):
    return sum(risks(confidence, correct)) / len(correct)


def aurc_over_all_orders(confidence, correct):
    """Mean over every order of the rows that sorts by confidence: no rule for ties at all."""
    found = []
    for order in itertools.permutations(range(len(correct))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            errors = [not correct[i] for i in order]
            found.append(sum(sum(errors[:k]) / k for k in range(1, len(errors) + 1)) / len(errors))
    return sum(found) / len(found)


def best_order(correct):
    return [float(bool(y)) + i * 1e-9 for i, y in enumerate(correct)]


def excess_aurc(confidence, correct):
    return aurc(confidence, correct) - aurc(best_order(correct), correct)


def augrc(confidence, correct):
    """Trapezoids of errors accepted / n over coverage, from (0, 0)."""
    n, before, area = len(correct), (0.0, 0.0), 0.0
    for hits, rows in counts(confidence, correct):
        point = (rows / n, (rows - hits) / n)
        area += (point[0] - before[0]) * (point[1] + before[1]) / 2
        before = point
    return area


def prediction_rejection_ratio(confidence, correct, max_rejection):
    n = len(correct)
    last = math.floor(max_rejection * n + 1e-9)
    random, ours, best = (
        sum(1 - r for r in curve[n - last :]) / last
        for curve in (
            [1 - sum(map(bool, correct)) / n] * n,
            risks(confidence, correct),
            risks(best_order(correct), correct),
        )
    )
    return (ours - random) / (best - random)


def risk_at_coverage(confidence, correct, coverage):
    return risks(confidence, correct)[math.ceil(coverage * len(correct) - 1e-9) - 1]


def coverage_at_risk(confidence, correct, risk):
    accepted = [k for k, r in enumerate(risks(confidence, correct), 1) if r <= risk + 1e-12]
    return max(accepted, default=0) / len(correct)
