"""Which yes-or-no events a metric is about: probabilities that were given, and whether it happened."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from bayescal.predictive import Gaussian, Predictive
from bayescal.predictive.mixture import refuse
from bayescal.types import Array

Outcome = Bool[Array, "batch"] | Integer[Array, "batch"] | Float[Array, "batch"]  # 1 where it happened, else 0
RowWeights = Integer[Array, "batch"] | Float[Array, "batch"] | None  # of each row; None = all alike


class Events(NamedTuple):
    """Events with the probabilities given to them; their name goes into the result's convention.

    read: `(predictive, targets) -> (probability, outcome)`, each float (rows,); the outcome is 1 where it happened.
    name: in words.
    """

    read: Callable[[Predictive, Array], tuple[Float[Array, "batch"], Float[Array, "batch"]]]
    name: str


@cache
def top_label() -> Events:
    """The pool's most probable class (ties to the lowest index) is the target: confidence and correctness."""

    def read(pred, targets):
        confidence, label = pred.top_label()
        return confidence, (label == targets).astype(jnp.float32)

    return Events(read, "top label")


@cache
def one_class(label: int) -> Events:
    """The target is class `label`, with the probability that the pool gives it: "binary" reliability for two classes.

    Args:
        label: the class, in [0, classes).

    Raises:
        ValueError: when read, for a label that the predictive does not have.
    """

    def read(pred, targets):
        probs = class_probs(pred)
        if not 0 <= label < probs.shape[-1]:
            raise ValueError(f"`label` must lie in [0, {probs.shape[-1]}), got {label}. Classes count from zero.")
        return probs[..., label], (targets == label).astype(jnp.float32)

    return Events(read, f"class {label}")


def check_values(probability, outcome, weights) -> None:
    """Raises for numpy columns of events whose numbers are none; what jax holds is not looked at (undefined is NaN there).

    Args:
        probability: in [0, 1], but for a rounding of a pool in float32; NaN passes, and makes the result NaN.
        outcome: 0 or 1.
        weights: non-negative, or None; rows of weight 0 may hold anything.

    Raises:
        ValueError: for a probability, outcome or weight out of range in a row that counts.
    """
    if any(x is not None and not isinstance(x, np.ndarray) for x in (probability, outcome, weights)):
        return
    if weights is not None and (weights < 0).any():
        raise ValueError(f"`weights` must be non-negative, got {weights.min():g}. Leave them out for equal weights.")
    counts = slice(None) if weights is None else weights > 0
    for name, x, wrong in (
        ("probability", probability[counts], lambda x: (x < 0) | (x > 1 + 1e-6)),
        ("outcome", outcome[counts], lambda x: (x != 0) & (x != 1)),
    ):
        bad = wrong(x)
        if bad.any():
            allowed = "lie in [0, 1]" if name == "probability" else "be 0 or 1"
            raise ValueError(
                f"`{name}` must {allowed}, got {x[bad][0]:g} in {int(bad.sum())} of {len(x)} rows. Pass probabilities, not "
                "logits, and whether each event happened."
            )


def class_probs(pred: Predictive) -> Float[jax.Array, "batch classes"]:
    """Probability of every class under the pool, two columns for a family of one logit.

    Args:
        pred: predictive of classes.

    Raises:
        TypeError: for normal distributions, which have no classes.
    """
    if isinstance(pred, Gaussian):
        refuse("Gaussian", "class_probs", "For densities use `nll`, `crps` and the metrics of regression.")
    probs = pred.pooled_mean()
    return jnp.stack([1 - probs, probs], -1) if probs.ndim == len(pred.batch_shape) else probs
