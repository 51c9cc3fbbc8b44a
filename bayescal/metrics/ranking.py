"""Ranking metrics: plain functions of whole arrays, since they are not sums."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from bayescal.types import Array, Estimate


def auroc(scores: Float[Array, "batch"], positive: Bool[Array, "batch"]) -> Float[jax.Array, ""]:
    """Area under the ROC curve: P(score of a positive > score of a negative) + half the probability of a tie.

    In [0, 1]; higher = positives score higher; 0.5 = no better than chance. Exact with ties, whatever the row order.
    NaN where one of the classes is absent or a score is NaN.

    Args:
        scores: higher = more likely positive; infinities are allowed.
        positive: which rows are of the positive class.
    Source: Mann and Whitney 1947.
    """
    below, _ = _placements(jnp.asarray(scores), jnp.asarray(positive))
    return jnp.where(positive, below, 0).sum() / positive.sum()


def auroc_estimate(scores: Float[Array, "batch"], positive: Bool[Array, "batch"], positive_class: str) -> Estimate:
    """`auroc` with its 95 % interval by DeLong's variance on the logit scale.

    At 0 or 1 the variance says nothing and the interval is left out.

    Args:
        scores: higher = more likely positive.
        positive: which rows are of the positive class.
        positive_class: its name, kept in the result's convention.

    Raises:
        ValueError: for NaN scores, other lengths, or an absent class.
    Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    scores, positive = np.asarray(scores), np.asarray(positive, bool)
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(
            f"`scores` and `positive` must be one axis of the same length, got {scores.shape} and {positive.shape}. "
            "Flatten them row by row."
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"`scores` must not be NaN, got {int(np.isnan(scores).sum())} of {len(scores)}. Find out which rows they are."
        )
    if positive.all() or not positive.any():
        raise ValueError(
            f"`positive` must hold both classes, got {int(positive.sum())} positives of {len(positive)}. "
            "Join in-distribution and out-of-distribution rows before calling."
        )
    of_positive, of_negative = (
        np.asarray(x, np.float64) for x in _placements(jnp.asarray(scores), jnp.asarray(positive))
    )
    of_positive, of_negative = of_positive[positive], of_negative[~positive]
    value = of_positive.mean()
    convention = f"positive class: {positive_class}; ties count one half"
    if not 0 < value < 1 or min(len(of_positive), len(of_negative)) < 2:
        return Estimate(float(value), n=len(scores), convention=convention)
    error = np.sqrt(of_positive.var(ddof=1) / len(of_positive) + of_negative.var(ddof=1) / len(of_negative))
    logit, half = np.log(value / (1 - value)), 1.959963984540054 * error / (value * (1 - value))
    low, high = (float(1 / (1 + np.exp(-x))) for x in (logit - half, logit + half))
    return Estimate(float(value), low, high, len(scores), convention)


def accuracy_rejection(scores: Float[Array, "batch"], correct: Bool[Array, "batch"]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of what is kept against the share rejected, the most uncertain rejected first.

    Higher is better. Rows with equal scores count as if in random order (each as the mean of its group). Host only.

    Args:
        scores: uncertainty; higher = rejected earlier.
        correct: whether each prediction was right.

    Returns:
        (rejected, accuracy), each (n,): rejected = 0, 1/n, ..., (n - 1)/n.
    """
    scores, correct = np.asarray(scores), np.asarray(correct, np.float64)
    _, group = np.unique(scores, return_inverse=True)
    group_mean = np.bincount(group, correct) / np.bincount(group)
    kept = group_mean[group][np.argsort(scores, kind="stable")]
    n = len(scores)
    accuracy = np.cumsum(kept) / np.arange(1, n + 1)
    return np.arange(n) / n, accuracy[::-1]


@jax.jit
def _placements(scores, positive):
    """For each row, the share of the other class it lies on the right side of (ties one half): above the negatives for
    a positive, below the positives for a negative."""
    order = jnp.argsort(scores)
    ordered, is_positive = scores[order], positive[order]
    zero = jnp.zeros(1, jnp.int32)
    positives, negatives = (
        jnp.concatenate([zero, jnp.cumsum(x, dtype=jnp.int32)]) for x in (is_positive, ~is_positive)
    )
    first, last = (jnp.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    negatives_below = (negatives[first] + negatives[last]) / (2 * negatives[-1])
    positives_above = 1 - (positives[first] + positives[last]) / (2 * positives[-1])
    undefined = jnp.isnan(scores).any()
    return tuple(jnp.where(undefined, jnp.nan, x) for x in (negatives_below, positives_above))
