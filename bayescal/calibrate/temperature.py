"""Temperature scaling: one number, fitted on validation rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.predictive import Categorical, check_rows, pool
from bayescal.types import Array, pytree


@pytree
class Temperature:
    """Pooled log-probabilities divided by a temperature and normalised again: `scaler(pred) -> Categorical`, one member.

    Args:
        temperature: above 1 = less confident than before.
        gradient: derivative of the mean nll by the inverse temperature where the search ended, nats; 0 = converged.
    """

    temperature: Float[Array, ""]
    gradient: Float[Array, ""]

    def __call__(self, pred: Categorical) -> Categorical:
        """The pool, then the temperature; accuracy does not change.

        Raises:
            TypeError: for another family.
        """
        check_categorical(pred)
        return Categorical(jax.nn.log_softmax(pool(pred).logits / self.temperature), normalised=True)


LARGEST = 1e4


def check_categorical(pred) -> None:
    """Raises unless `pred` is a Categorical."""
    if not isinstance(pred, Categorical):
        raise TypeError(
            f"`pred` must be a Categorical, got {type(pred).__name__}. For one logit pass `pred.as_categorical()`."
        )


def fit_temperature(pred: Categorical, targets, *, weights=None) -> Temperature:
    """argmin_T of mean nll(softmax(log p / T)): the pool is scaled, never the members.

    The nll is convex in 1 / T; its derivative is bisected on log T between 1e-4 and 1e4 to float32's end.

    Args:
        pred: predictive of the validation rows; of one network its logits may be raw.
        targets: integer labels (rows,).
        weights: weight of each row; None = ones.

    Raises:
        ValueError: where no finite temperature is best: every label is already the top one (T -> 0), or the
            predictions are worse than chance (T -> infinity); and for unusable targets.
    Source: Guo et al. 2017.
    """
    check_categorical(pred)
    targets = np.asarray(targets)
    check_rows(pred, targets, weights)
    if len(pred.batch_shape) != 1:
        raise ValueError(f"`pred` must have one batch axis, got batch shape {pred.batch_shape}. Flatten the rows.")
    weights = np.ones(len(targets), np.float32) if weights is None else np.asarray(weights, np.float32)
    temperature, gradient, low, high = (float(x) for x in _bisect(pool(pred).logits[0], jnp.asarray(targets), weights))
    if np.isneginf(np.asarray(pred.log_prob(targets))[weights > 0]).any():
        raise ValueError(
            "`targets` must have positive probability, got some of probability zero: their nll is infinite at every "
            "temperature. Give impossible classes a finite logit."
        )
    if not low * high < 0 or math.isnan(gradient):
        end = "0 (every label is the most probable class)" if high < 0 else "infinity (labels unrelated to predictions)"
        raise ValueError(
            f"`targets` must leave a finite best temperature, got predictions for which it is {end}. "
            "Use more validation rows."
        )
    return Temperature(jnp.float32(temperature), jnp.float32(gradient))


@jax.jit
def _bisect(log_probs, targets, weights):
    shifted = log_probs - log_probs.max(-1, keepdims=True)
    shifted = jnp.where(shifted > -jnp.inf, shifted, jnp.finfo(shifted.dtype).min / (2 * LARGEST))
    chosen = jnp.take_along_axis(shifted, targets[:, None], -1)[:, 0]

    def slope(log_temperature):  # d nll / d (1 / T) = mean(E_p[z] - z_y)
        probs = jax.nn.softmax(shifted * jnp.exp(-log_temperature))
        return (weights * ((probs * shifted).sum(-1) - chosen)).sum() / weights.sum()

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_hot = slope(middle) < 0
        return jnp.where(too_hot, low, middle), jnp.where(too_hot, middle, high)

    edge = math.log(LARGEST)
    low, high = jax.lax.fori_loop(0, 60, halve, (jnp.float32(-edge), jnp.float32(edge)))
    best = (low + high) / 2
    return jnp.exp(best), slope(best), slope(jnp.float32(-edge)), slope(jnp.float32(edge))
