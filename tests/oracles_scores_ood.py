"""Out-of-distribution scores of features in float64 by loops: slow and obvious."""

import math

import numpy as np


def class_means(train, labels):
    return [np.mean([f for f, y in zip(train, labels, strict=True) if y == k], axis=0) for k in range(max(labels) + 1)]


def outer_mean(deviations, divisor):
    total = np.zeros((len(deviations[0]),) * 2)
    for d in deviations:
        total += np.outer(d, d)
    return total / divisor


def ridged(covariance, ridge):
    return covariance + ridge * np.mean(np.diag(covariance)) * np.eye(len(covariance))


def tied_covariance(train, labels):
    means = class_means(train, labels)
    return outer_mean([f - means[y] for f, y in zip(train, labels, strict=True)], len(train))


def distance(f, mean, covariance):
    return float((f - mean) @ np.linalg.inv(covariance) @ (f - mean))


def mahalanobis(train, labels, features, ridge=0.0):
    covariance = ridged(tied_covariance(train, labels), ridge)
    return np.array([min(distance(f, m, covariance) for m in class_means(train, labels)) for f in features])


def relative_mahalanobis(train, labels, features, ridge=0.0):
    within, centre = tied_covariance(train, labels), train.mean(0)
    added = ridge * np.mean(np.diag(within)) * np.eye(len(within))
    background = outer_mean([f - centre for f in train], len(train)) + added
    means = class_means(train, labels)
    return np.array(
        [min(distance(f, m, within + added) for m in means) - distance(f, centre, background) for f in features]
    )


def gaussian_density(train, labels, features, ridge=0.0):
    means, parts = class_means(train, labels), []
    for k, mean in enumerate(means):
        own = [f - mean for f, y in zip(train, labels, strict=True) if y == k]
        parts.append((len(own) / len(train), mean, ridged(outer_mean(own, len(own) - 1), ridge)))
    out = []
    for f in features:
        logs = [
            math.log(share)
            - 0.5 * (len(f) * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + distance(f, mean, covariance))
            for share, mean, covariance in parts
        ]
        top = max(logs)
        out.append(-top - math.log(sum(math.exp(x - top) for x in logs)))
    return np.array(out)


def kth_neighbour(bank, features, k, normalise):
    unit = lambda f: np.asarray(f, np.float64) / (math.sqrt(sum(float(x) ** 2 for x in f)) if normalise else 1)
    return np.array([sorted(float(np.linalg.norm(unit(f) - unit(b))) for b in bank)[k - 1] for f in features])


def residual(train, features, dim, origin):
    directions = np.linalg.svd(train - origin)[2]
    return np.array([math.sqrt(sum(float((f - origin) @ v) ** 2 for v in directions[dim:])) for f in features])


def energy(logits):
    return np.array([-max(z) - math.log(sum(math.exp(x - max(z)) for x in z)) for z in np.asarray(logits, np.float64)])


def vim(train, features, weights, bias, dim, origin):
    logits = train @ weights + bias
    alpha = np.mean([max(z) for z in logits]) / np.mean(residual(train, train, dim, origin))
    return alpha * residual(train, features, dim, origin) + energy(features @ weights + bias)


def shaped(features, quantile, kind):
    """Activations after ASH-P, ASH-B, ASH-S or SCALE."""
    out = []
    for f in np.asarray(features, np.float64):
        kept = len(f) - round(len(f) * quantile)
        order = sorted(range(len(f)), key=lambda j: (-f[j], j))[:kept]
        top, total = sum(f[j] for j in order), sum(f)
        new = list(f) if kind == "scale" else [f[j] if j in order else 0 for j in range(len(f))]
        if kind == "b":
            new = [total / kept if j in order else 0 for j in range(len(f))]
        if kind in ("s", "scale"):
            new = [x * math.exp(total / top) for x in new]
        out.append(new)
    return np.array(out)


def gradient_norm(features, weights, bias):
    """Entry by entry: d KL(uniform || softmax) / d W_jk = f_j (softmax_k - 1 / classes)."""
    out = []
    for f in np.asarray(features, np.float64):
        z = f @ weights + bias
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        out.append(-sum(abs(f[j] * (p[k] - 1 / len(p))) for j in range(len(f)) for k in range(len(p))))
    return np.array(out)


def combination(validation, scores, weights):
    total = np.zeros(scores.shape[1])
    for fitted, new, weight in zip(validation, scores, weights, strict=True):
        centre = sum(fitted) / len(fitted)
        spread = math.sqrt(sum((x - centre) ** 2 for x in fitted) / len(fitted))
        total += weight * (new - centre) / spread
    return total
