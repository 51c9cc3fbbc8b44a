"""The last layer of a network, as the scores take it: `head(features (rows, features)) -> logits (rows, classes)`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from bayescal.predictive import float32_or_wider
from bayescal.types import Array

Head = Callable[[Array], jax.Array]


def as_pytree(head: Head) -> Head:
    """`head` itself where it is a pytree (such as `Partial(model_head, variables)`), else wrapped: jit takes it as it is."""
    if not callable(head):
        raise TypeError(
            f"`head` must be a function of features (rows, features), got {type(head).__name__}. Of a linear layer pass "
            "`lambda f: f @ weights + bias`."
        )
    return Partial(head) if jax.tree_util.all_leaves([head]) else head


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
    """Weights (features, classes) and bias (classes,) of an affine head, read off zeros and the unit vectors.

    Raises:
        ValueError: where the head is not affine on `features`.
    """
    size = features.shape[1]
    with jax.default_matmul_precision("highest"):
        bias, unit, logits = (
            np.asarray(logits_of(head, jnp.asarray(x, jnp.float32)), np.float64)
            for x in (np.zeros((1, size)), np.eye(size), features)
        )
    weights = unit - bias
    off = abs(features @ weights + bias - logits).max()
    if (
        not off <= 1e-2 * abs(logits - bias).max()
    ):  # rounding of low-precision layers is below, a hidden layer far above
        raise ValueError(
            f"`head` must be affine in the features, got logits that are off by {off:.3g} from its own weights and bias. Pass "
            "the features of the last layer, or an `origin`."
        )
    return weights, bias[0]
