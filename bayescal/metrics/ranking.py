"""Ranking metrics: plain functions of whole arrays, since they are not sums."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bayescal.types import Array, Estimate


def auroc(scores: Float[Array, "batch"], positive: Bool[Array, "batch"] | Int[Array, "batch"]) -> Float[jax.Array, ""]:
    """Area under the ROC curve: P(score of a positive > score of a negative) + half the probability of a tie.

    In [0, 1]; higher = positives score higher; 0.5 = no better than chance. Exact with ties, whatever the row order.
    NaN where one of the classes is absent or a score is NaN.

    Args:
        scores: higher = more likely positive; infinities are allowed.
        positive: which rows are of the positive class; integers count as booleans.
    Source: Mann and Whitney 1947.
    """
    return _auroc(jnp.asarray(scores), jnp.asarray(positive).astype(bool))


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
    inside, outside = np.sort(scores[~positive]), np.sort(scores[positive])
    of_positive = _share_below(inside, scores[positive])  # of the negatives, ties one half
    of_negative = 1 - _share_below(outside, scores[~positive])  # positives above each negative
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

    Raises:
        ValueError: for NaN scores or other shapes.
    """
    scores, correct = np.asarray(scores), np.asarray(correct, np.float64)
    if scores.shape != correct.shape or scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError(
            f"`scores` and `correct` must be one axis of the same length without NaN, got {scores.shape} and "
            f"{correct.shape}. Flatten them row by row, and find out which rows are NaN."
        )
    _, group = np.unique(scores, return_inverse=True)
    group_mean = np.bincount(group, correct) / np.bincount(group)
    kept = group_mean[group][np.argsort(scores, kind="stable")]
    n = len(scores)
    accuracy = np.cumsum(kept) / np.arange(1, n + 1)
    return np.arange(n) / n, accuracy[::-1]


def _share_below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    first, last = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (first + last) / (2 * len(ordered))


@jax.jit
def _auroc(scores, positive):
    ordered = jnp.argsort(scores)
    negatives = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(~positive[ordered], dtype=jnp.int32)])
    first, last = (jnp.searchsorted(scores[ordered], scores, side=side) for side in ("left", "right"))
    share_below = (negatives[first] + negatives[last]) / (2 * negatives[-1])
    value = jnp.where(positive, share_below, 0).sum() / positive.sum()
    return jnp.where(jnp.isnan(scores).any(), jnp.nan, value)
