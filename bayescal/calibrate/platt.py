"""Platt scaling: a logistic regression of two classes on the log-odds."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    check_classes,
    like,
    pooled_log_probs,
    require_every_class,
    rows_for_fit,
)
from bayescal.calibrate.solve import blocked_sum, converged_parameters, require_positive_classes, solve
from bayescal.predictive import Bernoulli, Categorical
from bayescal.types import Array, pytree


@pytree
class PlattScaling(Calibrator):
    """P(y = 1) = sigmoid(slope * log(p_1 / p_0) + intercept) of the pool, two classes.

    Args:
        slope: below 1 = less confident than before; below 0 turns the order of the rows round.
        intercept: nats; above 0 = class 1 more probable than before.
        gradient: largest absolute derivative of the mean nll where the fit ended, nats; 0 = converged.
    """

    slope: Float[Array, ""]
    intercept: Float[Array, ""]
    gradient: Float[Array, ""]

    @property
    def accuracy_preserving(self) -> bool:  # type: ignore[override]
        """Whether slope > 0 and intercept = 0. An intercept moves the odds at which the other class wins."""
        return bool(self.slope > 0) and bool(self.intercept == 0)

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool, then the map; with a positive slope the order of the rows by P(y = 1) does not change.

        Raises:
            ValueError: for more than two classes.
        """
        check_two_classes(pred, "`fit_vector`")
        return like(pred, binary_log_probs(self.slope * log_odds(pooled_log_probs(pred)) + self.intercept))


def fit_platt(
    pred: Classes, targets, *, smooth_targets: bool = True, weights: Float[Array, "rows"] | None = None
) -> PlattScaling:
    """argmin_(a, b) of mean nll(t, sigmoid(a s + b)), s = log(p_1 / p_0) of the pool, two classes.

    Platt's targets are t = (N_1 + 1) / (N_1 + 2) for class 1 and 1 / (N_0 + 2) for class 0, with N the summed weights:
    the fit is then finite even for separable rows and for rows of one class, and where they are few it is drawn towards
    log((N_1 + 1) / (N_0 + 1)). For more classes use `fit_vector`; without smoothing it is this map for two.

    Args:
        pred: predictive of the calibration rows over two classes.
        targets: integers 0 and 1 (rows,).
        smooth_targets: Platt's targets, or 0 and 1.
        weights: weight of each row; None = ones. With smoothing, 2 = seen twice: not only their ratios count.

    Raises:
        ValueError: for more than two classes; a probability of zero; log-odds that are all equal; without smoothing,
            for rows of one class and for separable rows; and for unusable predictions, targets or weights.
    Source: Platt 1999 (recalled).
    """
    check_two_classes(pred, "`fit_vector`")
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    require_positive_classes(log_probs, weights, "Platt scaling")
    if not smooth_targets:
        require_every_class(targets, weights, 2)
    scores = log_odds(log_probs)
    total = blocked_sum(weights)
    centre = blocked_sum(weights * scores) / total  # so that slope and intercept have little to do with each other
    positive = targets == 1
    wanted = positive.astype(scores.dtype)
    if smooth_targets:
        ones = blocked_sum(weights * wanted)
        wanted = jnp.where(positive, (ones + 1) / (ones + 2), 1 / (total - ones + 2))
    features = jnp.stack([scores - centre, jnp.ones_like(scores)], -1)[:, None]
    soft = jnp.stack([1 - wanted, wanted], -1)
    solution = solve(features, soft, weights, np.zeros((1, 2)))
    remedy = "Use more calibration rows, or `smooth_targets=True` for separable ones."
    slope, intercept = converged_parameters(solution, remedy)[0]
    return PlattScaling(slope, intercept - slope * centre, solution.gradient)


def log_odds(log_probs):
    """log(p_1 / p_0), nats."""
    return log_probs[..., 1] - log_probs[..., 0]


def binary_log_probs(logits):
    """Log-probabilities of classes 0 and 1, from the log-odds."""
    return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], -1)


def check_two_classes(pred, instead: str) -> None:
    """Raises unless a predictive has two classes."""
    check_classes(pred)
    classes = 2 if isinstance(pred, Bernoulli) else pred.num_classes
    if classes != 2:
        raise ValueError(f"`pred` must have two classes, got {classes}. For more classes use {instead}.")
