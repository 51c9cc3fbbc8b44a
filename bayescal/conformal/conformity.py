"""Nonconformity scores with their inverses: what any conformal method turns into sets or intervals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.predictive import Bernoulli, Categorical, Dirichlet, Predictive, Probabilities, undefined_where
from bayescal.predictive.categorical import gather
from bayescal.types import Array, Key

Classes = Categorical | Probabilities | Bernoulli | Dirichlet


class Interval(NamedTuple):
    """Closed intervals [low, high] in the targets' unit, (rows, dim); infinite where the threshold is."""

    low: Float[Array, "*batch dim"]
    high: Float[Array, "*batch dim"]


class Conformity(NamedTuple):
    """A score of how strange a target is under a prediction, higher = stranger, and the targets that are not too strange.

    measure: `(pred, targets, key) -> (rows,)`, or (rows, dim) for regression.
    region: `(pred, threshold, key) -> bool (rows, classes)` or `Interval`: targets with score <= threshold. The threshold
        broadcasts against (rows, classes) or (rows, dim).
    randomised: whether `measure` and `region` need a key; without one they take None.
    name: in words.
    candidates: for classes, `(pred, key) -> (rows, classes)`, the score that each class would have as the target; None for
        regression.
    """

    measure: Callable[[Predictive, Any, Key | None], jax.Array]
    region: Callable[[Predictive, Any, Key | None], Any]
    randomised: bool
    name: str
    candidates: Callable[[Predictive, Key | None], jax.Array] | None = None


def class_conformity(candidates: Callable[[Any, Key | None], jax.Array], *, randomised: bool, name: str) -> Conformity:
    """Conformity of classes from the scores that every class would have as the target: a new score is one function.

    The set of a row whose scores are NaN is every class where the values are traced, and an error where they are not: a
    bool has no NaN, and the empty set would say that no class is possible.

    A score that ties with the threshold is in, if fit and use round alike: a `jax.jit` that closes over the predictive
    folds it as a constant, and may round its last bit otherwise. Pass the predictive as an argument.

    Args:
        candidates: `(pred, key) -> (rows, classes)`, a pure function.
        randomised: whether it needs the key.
        name: in words.
    """

    @jax.jit  # one program for fit and use: a score that ties with the threshold does so to the bit
    def scored(pred, key):
        undefined = jnp.isnan(pred.log_probs()).any(-1, keepdims=True)
        return undefined_where(undefined, candidates(pred, key))

    def measure(pred, targets, key):
        return gather(scored(check_classes(pred), key), targets)

    def region(pred, threshold, key):
        scores = scored(check_classes(pred), key)
        if not isinstance(scores, Tracer) and np.isnan(np.asarray(scores)).any():
            lost = np.isnan(np.asarray(scores)).any(-1)
            raise ValueError(
                f"`pred` must have a score for every class, got NaN in {int(lost.sum())} of {lost.size} rows under {name}, "
                f"first at {int(lost.ravel().argmax())}. Look for members that diverged, or leave these rows out."
            )
        return ~(scores > threshold)

    return Conformity(measure, region, randomised, name, scored)


def class_candidates(score: Conformity) -> Callable[[Predictive, Key | None], jax.Array]:
    """The score's `candidates`.

    Raises:
        TypeError: for a score of regression.
    """
    if score.candidates is None:
        raise TypeError(
            f"`score` must be one of classes, with `candidates`, got {score.name}. Build it with `class_conformity`, or use "
            "`fit_split` or `fit_mondrian` for regression."
        )
    return score.candidates


def check_classes(pred) -> Any:
    """`pred` itself.

    Raises:
        TypeError: for a predictive that is not over classes.
    """
    if not isinstance(pred, Classes):
        raise TypeError(
            f"`pred` must be a predictive over classes, got {type(pred).__name__}. For regression use `absolute()` and kin."
        )
    return pred
