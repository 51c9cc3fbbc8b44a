"""Split conformal prediction: a threshold from held-out rows, and sets that cover new rows like them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import concrete
from bayescal.conformal.conformity import Conformity, class_candidates
from bayescal.conformal.threshold import check_alpha, order_statistic, rank
from bayescal.predictive import Predictive, check_rows
from bayescal.types import Array, Key, pytree


@pytree
class Split:
    """Sets {y : s(x, y) <= threshold}: `sets(pred) -> bool (rows, classes)`, or `Interval` for regression.

    Args:
        threshold: the k-th smallest calibration score, k = ceil((n + 1)(1 - alpha)); +infinity where k > n, and then
            every set is everything. () for classes, (classes,) where every class has its own (`fit_class_conditional`,
            `fit_label_shift`), (dim,) for regression.
        score: what was thresholded.
        alpha: miscoverage wanted.
    """

    threshold: Float[Array, "*dim"]
    score: Conformity = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Predictive, *, key: Key | None = None) -> Any:
        """Sets of new rows; P(y in set) >= 1 - alpha over calibration rows and new rows together, if exchangeable.

        With the same key the sets of a smaller alpha hold those of a larger one.

        Args:
            pred: of the new rows, from the same network.
            key: for a randomised score, and only for one; another than that of the fit.

        Raises:
            ValueError: for a missing or needless key, rows without a score.
        """
        check_key(self.score, key)
        return self.score.region(pred, self.threshold, key)


def fit_split(pred: Predictive, targets, score: Conformity, *, alpha: float, key: Key | None = None) -> Split:
    """Threshold = k-th smallest of s(x_i, y_i), k = ceil((n + 1)(1 - alpha)).

    Marginal coverage is at least 1 - alpha, and at most 1 - alpha + 1 / (n + 1) where scores do not tie. In regression
    every dimension has its own threshold and its own coverage. With fewer than 1 / alpha - 1 rows every set is everything:
    see `smallest_alpha`.

    Args:
        pred: of calibration rows that neither trained nor selected the network, (rows,).
        targets: one per row, as the family takes them.
        score: such as `lac()`, `aps()`, `absolute()`.
        alpha: miscoverage wanted, in (0, 1).
        key: for a randomised score, and only for one.

    Raises:
        ValueError: for an alpha outside (0, 1), a missing or needless key, unusable predictions or targets.
    Source: Papadopoulos et al. 2002; Vovk et al. 2005 (recalled).
    """
    alpha = check_alpha(alpha)
    scores = calibration_scores(pred, targets, score, key)
    return Split(order_statistic(scores, rank(scores.shape[0], alpha)), score, alpha)


def p_values(
    pred: Predictive, score: Conformity, calibration: Float[Array, "rows"], *, key: Key | None = None
) -> Float[jax.Array, "*batch classes"]:
    """p(x, y) = (1 + number of calibration scores >= s(x, y)) / (n + 1), for every class y.

    In (0, 1]; lower = stranger. The set of `fit_split` is {y : p > alpha}, whatever alpha, and under exchangeability the
    target's is at most alpha with probability at most alpha. 1 where the score is NaN.

    Args:
        pred: of new rows.
        score: of classes.
        calibration: `score.measure(pred, targets, key)` of the calibration rows.
        key: for a randomised score, and only for one; another than that of the calibration rows.

    Raises:
        ValueError: for a missing or needless key.
        TypeError: for a score of regression.
    Source: Vovk, Gammerman and Shafer 2005 (recalled).
    """
    check_key(score, key)
    scores, rows = class_candidates(score)(pred, key), calibration.shape[0]
    stranger = rows - jnp.searchsorted(jnp.sort(jnp.asarray(calibration)), scores, side="left")
    return jnp.where(jnp.isnan(scores), 1, (1 + stranger) / (rows + 1))


def calibration_scores(pred: Predictive, targets, score: Conformity, key: Key | None) -> jax.Array:
    """Scores (rows,) or (rows, dim) of the calibration rows, after the checks that all methods share.

    Raises:
        ValueError: for a missing or needless key, unusable predictions or targets, scores that are NaN or of another shape
            than the targets.
    """
    check_key(score, key)
    if concrete(pred, targets):
        check_rows(pred, np.asarray(targets), None)
    if len(pred.batch_shape) != 1:
        raise ValueError(f"`pred` must have one batch axis, got batch shape {pred.batch_shape}. Flatten the rows.")
    scores = score.measure(pred, targets, key)
    if scores.shape != jnp.shape(targets):
        raise ValueError(
            f"`targets` must have the shape of their scores, {scores.shape} under {score.name}, got {jnp.shape(targets)}. "
            "Pass one target per row, (rows, dim) for regression; nothing is broadcast."
        )
    if concrete(scores) and np.isnan(np.asarray(scores)).any():
        lost = np.isnan(np.asarray(scores)).reshape(scores.shape[0], -1).any(1)
        raise ValueError(
            f"`pred` must have a score at every target, got NaN in {int(lost.sum())} of {lost.size} rows under {score.name}, "
            f"first at {int(lost.argmax())}. Look at what the score divides by."
        )
    return scores


def check_key(score: Conformity, key: Key | None) -> None:
    """Raises where a randomised score has no key, or another has one."""
    if score.randomised and key is None:
        raise ValueError(
            f"`key` must be given for a randomised score ({score.name}), got None. Pass `jax.random.key(...)`, or take the "
            "score with `randomised=False`."
        )
    if not score.randomised and key is not None:
        raise ValueError(f"`key` must be None for a score without randomness ({score.name}), got a key. Leave it out.")
