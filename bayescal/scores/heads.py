"""The last layer of a network, as the scores take it: `head(features (rows, features)) -> logits (rows, classes)`.

`jax.tree_util.Partial(model_head, variables)`, with a `model_head` defined once, is compiled once for all variables. A plain
function is taken too, but as a constant: each new object, such as every `lambda f: f @ w + b`, is compiled anew, with its
weights in the program, which jax keeps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from bayescal.predictive import float32_or_wider
from bayescal.scores.covariance import FLOAT32
from bayescal.scores.features import blocks
from bayescal.types import Array

Head = Callable[[Array], jax.Array]


LINEAR = "Of a linear layer pass `Partial(lambda w, b, f: f @ w + b, weights, bias)`"


def as_pytree(function: Callable, name: str = "head", instead: str = LINEAR) -> Callable:
    """`function` itself where it is a pytree (`Partial(model_head, variables)`), else wrapped: jit takes it as it is."""
    if not callable(function):
        raise TypeError(
            f"`{name}` must be a function of features (rows, features), got {type(function).__name__}. {instead}."
        )
    return Partial(function) if jax.tree_util.all_leaves([function]) else function


def logits_of(head: Head, features: jax.Array) -> jax.Array:
    """`head(features)` in float32 or wider; raises unless it has shape (rows, classes) with two classes or more."""
    logits = float32_or_wider(head(features))
    if logits.ndim != 2 or logits.shape[0] != features.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"`head` must give logits ({features.shape[0]}, classes) of at least two classes, got {logits.shape}. Of one "
            "logit z give [0, z]."
        )
    return logits


def energy(logits: jax.Array) -> jax.Array:
    """Free energy -logsumexp(logits) of each row, nats; NaN where a logit is +infinity or all are -infinity."""
    return jnp.where(jnp.isfinite(logits.max(-1)), -jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def affine(head: Head, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (features, classes) and bias (classes,) of an affine head, read off its derivative and its value at zero.

    Raises:
        ValueError: where the head is not affine on `features`.
    """
    zeros, unit = (jnp.asarray(x, jnp.float32) for x in (np.zeros((1, features.shape[1])), np.eye(features.shape[1])))
    with jax.default_matmul_precision("highest"), np.errstate(invalid="ignore"):  # infinite logits are refused below
        of_rows = lambda rows: np.asarray(logits_of(head, jnp.asarray(rows, jnp.float32)), np.float64)
        bias = of_rows(zeros)
        # no difference of logits, which a large bias would leave no digits
        slope = jax.jvp(lambda rows: logits_of(head, rows), (jnp.zeros_like(unit),), (unit,))[1]
        weights = np.asarray(slope, np.float64)
        off = largest = moved = 0.0
        for _, block in blocks(features):
            logits = of_rows(block)
            off = np.maximum(off, abs(block @ weights + bias - logits).max())
            largest, moved = np.maximum(largest, abs(logits).max()), np.maximum(moved, abs(logits - bias).max())
    # rounding of low-precision layers is below the first, that of a large bias below the second, a hidden layer far above
    if not np.isfinite(off) or off > 1e-2 * moved + 4 * FLOAT32 * largest:
        raise ValueError(
            f"`head` must be affine in the features, got logits that are off by {off:.3g} from its own weights and bias. Pass "
            "the features of the last layer, or an `origin`."
        )
    return weights, bias[0]
