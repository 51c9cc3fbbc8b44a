"""Conformal prediction whose coverage holds in every group of rows, or for every class, and not only on average."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from bayescal.conformal.conformity import Conformity, class_candidates
from bayescal.conformal.split import Split, calibration_scores, check_key
from bayescal.conformal.threshold import check_alpha, ranks
from bayescal.predictive import Predictive
from bayescal.types import Array, Key, pytree


@pytree
class Mondrian:
    """Sets {y : s(x, y) <= threshold of x's group}: `sets(pred, groups=...) -> bool (rows, classes)`, or `Interval`.

    Args:
        threshold: of each group, as in `Split`, from its own calibration rows alone; +infinity where they are too few.
        rows: how many each group had.
        score: what was thresholded.
        alpha: miscoverage wanted in each group.
    """

    threshold: Float[Array, "groups *dim"]
    rows: Int[Array, "groups"]
    score: Conformity = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Predictive, *, groups: Int[Array, "rows"], key: Key | None = None) -> Any:
        """Sets of new rows; P(y in set | group) >= 1 - alpha for every group.

        Args:
            pred: of the new rows.
            groups: group of each new row, known before its target. Where values are traced, a row of a group that the fit
                did not have gets everything.
            key: for a randomised score, and only for one; another than that of the fit.

        Raises:
            ValueError: for groups that the fit did not have, a missing or needless key, rows without a score.
        """
        check_key(self.score, key)
        _check_groups(groups, pred.batch_shape, len(self.rows))
        groups = jnp.asarray(groups, jnp.int32)
        padded = jnp.concatenate([self.threshold, jnp.full_like(self.threshold[:1], jnp.inf)])
        threshold = padded[jnp.where(groups < 0, len(self.rows), groups)]  # past the end clamps: to the infinite one
        return self.score.region(pred, threshold if threshold.ndim > 1 else threshold[:, None], key)


def fit_mondrian(
    pred: Predictive,
    targets,
    score: Conformity,
    *,
    alpha: float,
    groups: Int[Array, "rows"],
    num_groups: int,
    key: Key | None = None,
) -> Mondrian:
    """Threshold of group g = k_g-th smallest of s(x_i, y_i) over its own n_g rows, k_g = ceil((n_g + 1)(1 - alpha)).

    Coverage is at least 1 - alpha in every group. A group of fewer than 1 / alpha - 1 rows gets every class, or the whole
    line: see `threshold` and `rows` of the result.

    Args:
        pred: of calibration rows that neither trained nor selected the network, (rows,).
        targets: one per row, as the family takes them.
        score: such as `lac()`, `aps()`, `absolute()`.
        alpha: miscoverage wanted, in (0, 1).
        groups: group of each row, in [0, num_groups): of the inputs or the prediction, not the target (for that
            `fit_class_conditional`).
        num_groups: how many groups there are.
        key: for a randomised score, and only for one.

    Raises:
        ValueError: for an alpha outside (0, 1), groups out of range, a missing or needless key, unusable predictions or
            targets.
    Source: Vovk, Gammerman and Shafer 2005, section 4.5 (recalled).
    """
    alpha = check_alpha(alpha)
    scores = calibration_scores(pred, targets, score, key)
    _check_groups(groups, scores.shape[:1], num_groups)
    threshold, rows = group_thresholds(scores, groups, num_groups=num_groups, alpha=alpha)
    return Mondrian(threshold, rows, score, alpha)


def fit_class_conditional(
    pred: Predictive, targets, score: Conformity, *, alpha: float, key: Key | None = None
) -> Split:
    """Threshold of class y = k_y-th smallest of s(x_i, y) over the n_y rows of that class, k_y = ceil((n_y + 1)(1 - alpha)).

    P(y in set | y) is at least 1 - alpha for every class. A class of fewer than 1 / alpha - 1 rows is in every set:
    `jnp.isinf(sets.threshold)` says which.

    Args:
        pred: of calibration rows that neither trained nor selected the network, (rows,).
        targets: labels.
        score: of classes.
        alpha: miscoverage wanted, in (0, 1).
        key: for a randomised score, and only for one.

    Raises:
        ValueError: for an alpha outside (0, 1), a missing or needless key, unusable predictions or targets.
        TypeError: for a score of regression.
    Source: Vovk 2012, Conditional validity of inductive conformal predictors (recalled).
    """
    alpha = check_alpha(alpha)
    class_candidates(score)
    scores = calibration_scores(pred, targets, score, key)
    classes = jax.eval_shape(class_candidates(score), pred, key).shape[-1]
    return Split(group_thresholds(scores, targets, num_groups=classes, alpha=alpha)[0], score, alpha)


def group_thresholds(
    scores: Float[Array, "rows *dim"], groups: Int[Array, "rows"], *, num_groups: int, alpha: float
) -> tuple[Float[jax.Array, "groups *dim"], Int[jax.Array, "groups"]]:
    """The exact order statistic of each group, +infinity where it has too few rows, and how many rows each has.

    Args:
        scores: nonconformity, higher = stranger. NaN counts as the strangest.
        groups: in [0, num_groups); rows of others count for nothing.
        num_groups: how many groups there are.
        alpha: miscoverage.
    """
    scores, groups = jnp.asarray(scores), jnp.asarray(groups, jnp.int32)
    inside = (groups >= 0) & (groups < num_groups)
    rows = jnp.bincount(jnp.where(inside, groups, num_groups), length=num_groups + 1)[:-1].astype(jnp.int32)
    before = (groups < 0).sum() + jnp.cumsum(rows) - rows
    k = jnp.asarray(ranks(len(scores), alpha))[rows]
    place = jnp.minimum(before + k, len(scores)) - 1

    def one(scores):
        ordered = scores[jnp.lexsort((scores, groups))]
        return jnp.where(k > rows, jnp.inf, ordered[place])

    return one(scores) if scores.ndim == 1 else jax.vmap(one, 1, 1)(scores), rows


def _check_groups(groups, shape, num_groups: int) -> None:
    """Raises unless there is one group for each row, and it is in range where that can be seen."""
    given = groups if isinstance(groups, Tracer) else np.asarray(groups)
    if given.shape != tuple(shape) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"`groups` must be whole numbers of shape {tuple(shape)}, one per row, got {given.dtype} of shape {given.shape}. "
            "Number the groups 0, 1, 2, ..."
        )
    if not isinstance(given, Tracer) and given.size and not (given.min() >= 0 and given.max() < num_groups):
        raise ValueError(
            f"`groups` must lie in [0, {num_groups}), got values from {given.min()} to {given.max()}. Give `num_groups`, and "
            "calibration rows, for every group that can come."
        )
