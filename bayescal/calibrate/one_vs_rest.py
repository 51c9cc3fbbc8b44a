"""Several events of yes or no made of classes, and a distribution over classes made of their rates."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.predictive import undefined_where
from bayescal.types import Array


def events(log_probs: Float[Array, "*batch classes"], maps: int | None = None) -> Float[jax.Array, "*batch maps"]:
    """Probability of each event: of class 1 where there are two classes, else of every class against the rest.

    Args:
        log_probs: of the pool, nats.
        maps: of the fit, where it is past.

    Raises:
        ValueError: for another number of classes than in the fit.
    """
    classes = log_probs.shape[-1]
    own = 1 if classes == 2 else classes
    if maps is not None and own != maps:
        raise ValueError(
            f"`pred` must have the {2 if maps == 1 else maps} classes of the fit, got {classes}. Fit the calibrator on "
            "predictions over the same classes."
        )
    return jnp.exp(log_probs[..., -own:])


def outcomes(targets: Int[Array, "rows"], classes: int) -> Float[jax.Array, "rows maps"]:
    """1 where the event happened, else 0: one column for each of `events`."""
    return jax.nn.one_hot(targets, classes)[:, -(1 if classes == 2 else classes) :]


@jax.jit(static_argnames="mixture")
def distribution(
    rates: Float[Array, "*batch maps"], log_probs: Float[Array, "*batch classes"], mixture: float
) -> Float[jax.Array, "*batch classes"]:
    """Log-probabilities, nats: (1 - mixture) * rates / their sum + mixture * p, and p itself where every rate is zero.

    Args:
        rates: in [0, 1], of class 1 alone, or of every class.
        log_probs: log p of the pool, nats; NaN comes through in its row.
        mixture: weight of p, in [0, 1).
    """
    if rates.shape[-1] == 1:
        rates = jnp.concatenate([1 - rates, rates], -1)
    total = rates.sum(-1, keepdims=True)
    none = total == 0  # false for NaN, which must come through
    # Not log(rates / total): under jit XLA may take the reciprocal, and a certain class would not have log 0.
    mapped = jnp.where(none, log_probs, jnp.log(rates) - jnp.log(jnp.where(none, 1, total)))
    if mixture:
        mapped = jnp.logaddexp(mapped + jnp.log1p(-mixture), log_probs + jnp.log(mixture))
    return undefined_where(jnp.isnan(log_probs).any(-1, keepdims=True), mapped)


def check_mixture(mixture: float) -> None:
    """Raises for what is no weight in [0, 1)."""
    if not 0 <= mixture < 1:
        raise ValueError(
            f"`mixture` must lie in [0, 1), got {mixture!r}. 0 is the map itself; 1e-9 is enough to make no target impossible."
        )
