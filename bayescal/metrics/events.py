"""Which yes-or-no events a metric is about: probabilities that were given, and whether it happened."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
