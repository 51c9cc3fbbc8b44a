"""Conformal prediction for new rows that are distributed otherwise than the calibration rows, in a way that is known."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.conformal.conformity import Conformity, class_candidates
from bayescal.conformal.split import Split, calibration_scores, check_key
from bayescal.conformal.threshold import check_alpha, weighted_threshold
from bayescal.predictive import Predictive
from bayescal.types import Array, Key, pytree


@pytree
class Weighted:
    """Sets {y : s(x, y) <= threshold(w(x))}: `sets(pred, weights=...) -> bool (rows, classes)`, or `Interval`.

    Args:
        scores: of the calibration rows.
        weights: density ratio of the calibration rows, new inputs / old, up to a factor.
        score: what is thresholded.
        alpha: miscoverage wanted.
    """

    scores: Float[Array, "rows *dim"]
    weights: Float[Array, "rows"]
    score: Conformity = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})

    @property
    def effective_rows(self) -> Float[jax.Array, ""]:
        """(sum w)^2 / sum w^2, in [1, rows]: how many calibration rows the weights leave; higher = narrower spread."""
        share = jnp.asarray(self.weights) / jnp.max(jnp.asarray(self.weights))
        return share.sum() ** 2 / (share**2).sum()

    def __call__(self, pred: Predictive, *, weights: Float[Array, "new"], key: Key | None = None) -> Any:
        """Sets of new rows; P(y in set) >= 1 - alpha over calibration rows and new rows together, if the ratio is right.

        A new row whose own weight is more than alpha of all weights gets every class, or the whole line. The thresholds
        are found on the host.

        Args:
            pred: of the new rows.
            weights: their density ratio, in the unit of the fit's.
            key: for a randomised score, and only for one; another than that of the fit.

        Raises:
            ValueError: for weights that are no density ratio, a missing or needless key, rows without a score.
        """
        check_key(self.score, key)
        _check_ratio("weights", weights, pred.batch_shape)
        return self.score.region(pred, self._threshold(weights), key)

    def _threshold(self, weights):
        at = lambda scores: weighted_threshold(scores, self.weights, weights, self.alpha)
        return at(self.scores)[:, None] if self.scores.ndim == 1 else jax.vmap(at, 1, 1)(self.scores)


def fit_weighted(
    pred: Predictive,
    targets,
    score: Conformity,
    *,
    alpha: float,
    weights: Float[Array, "rows"],
    key: Key | None = None,
) -> Weighted:
    """Threshold of x = the smallest t with sum_i w_i 1[s_i <= t] >= (1 - alpha)(sum_i w_i + w(x)), w = new density / old.

    For covariate shift: the inputs come from another distribution, and the targets given the inputs from the same. With
    equal weights it is `fit_split`. Weights that are estimated cost coverage: up to half their mean absolute error.

    Args:
        pred: of calibration rows that neither trained nor selected the network, (rows,).
        targets: one per row, as the family takes them.
        score: such as `lac()`, `aps()`, `absolute()`.
        alpha: miscoverage wanted, in (0, 1).
        weights: density ratio of each row, up to a factor: non-negative, not all zero.
        key: for a randomised score, and only for one.

    Raises:
        ValueError: for an alpha outside (0, 1), weights that are no density ratio, a missing or needless key, unusable
            predictions or targets.
    Source: Tibshirani, Barber, Candès and Ramdas 2019; Lei and Candès 2021 for the cost of estimating (recalled).
    """
    alpha = check_alpha(alpha)
    scores = calibration_scores(pred, targets, score, key)
    _check_ratio("weights", weights, scores.shape[:1], some=True)
    return Weighted(scores, jnp.asarray(weights, jnp.float32), score, alpha)


def fit_label_shift(
    pred: Predictive,
    targets,
    score: Conformity,
    *,
    alpha: float,
    prior_ratio: Float[Array, "classes"],
    key: Key | None = None,
) -> Split:
    """Threshold of class y = the smallest t with sum_i w(y_i) 1[s_i <= t] >= (1 - alpha)(sum_i w(y_i) + w(y)).

    For label shift: classes come with other shares, w(y) = new share / old, and the inputs given the class from the same
    distribution. Marginal coverage of the new rows is at least 1 - alpha. Every class has its own threshold, since it would
    add its own weight.

    Args:
        pred: of calibration rows that neither trained nor selected the network, (rows,).
        targets: labels.
        score: of classes.
        alpha: miscoverage wanted, in (0, 1).
        prior_ratio: w(y) of each class, up to a factor: non-negative, not zero for all classes that are there.
        key: for a randomised score, and only for one.

    Raises:
        ValueError: for an alpha outside (0, 1), a ratio that is none, a missing or needless key, unusable predictions or
            targets.
        TypeError: for a score of regression.
    Source: Podkopaev and Ramdas 2021, section 3 (recalled).
    """
    alpha = check_alpha(alpha)
    candidates = class_candidates(score)
    scores = calibration_scores(pred, targets, score, key)
    _check_ratio("prior_ratio", prior_ratio, jax.eval_shape(candidates, pred, key).shape[-1:], some=True)
    ratio = jnp.asarray(prior_ratio, jnp.float32)
    weights = ratio[jnp.asarray(targets)]
    _check_ratio("prior_ratio[targets]", weights, scores.shape, some=True)
    return Split(weighted_threshold(scores, weights, ratio, alpha), score, alpha)


def _check_ratio(name: str, given, shape, *, some: bool = False) -> None:
    """Raises unless `given` has that shape and, where that can be seen, is finite and non-negative, with `some` above 0."""
    known = not isinstance(given, Tracer)
    with np.errstate(over="ignore"):
        values = np.asarray(given, np.float32) if known else given  # what float32 cannot hold is no ratio
    if values.shape != tuple(shape) or (
        known
        and (
            not np.isfinite(values).all()
            or (values < 0).any()
            or (some and not (values >= np.finfo(np.float32).tiny).any())
        )
    ):
        least = ", not all zero" if some else ""
        raise ValueError(
            f"`{name}` must be finite non-negative numbers of shape {tuple(shape)}{least}, got shape {values.shape}"
            + (f" with values from {values.min()} to {values.max()}" if known and values.size else "")
            + " in float32. Pass the density ratio, new rows to calibration rows, up to a factor."
        )
