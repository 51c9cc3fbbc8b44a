"""Dropout whose rate may be a member's own setting."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.types import Array

Rate = float | Float[Array, ""]


def check_dropout(rate: Rate) -> None:
    """Raises unless `rate` is one number in [0, 1); the value of a traced one cannot be checked."""
    if jnp.shape(rate) != ():
        raise ValueError(
            f"`dropout` must be one rate, got shape {jnp.shape(rate)}. In `ensemble` each member's builder is given its "
            "own entry of the settings."
        )
    if not isinstance(rate, Tracer) and not 0 <= rate < 1:
        raise ValueError(
            f"`dropout` must be a rate in [0, 1), got {rate!r}. It is the share of units that are dropped."
        )


def has_dropout(rate: Rate) -> bool:
    """Whether a network of this rate needs dropout layers: not for the number 0, and always for an array."""
    return isinstance(rate, (jax.Array, np.ndarray)) or rate != 0


def dropout_layer(rate: Rate, rngs, *, broadcast_dims: Sequence[int] = ()):
    """x * mask / (1 - rate), mask ~ Bernoulli(1 - rate): `nnx.Dropout`, whose rate may also be traced.

    For the layers of your own nnx networks inside `ensemble`'s builder, where `nnx.Dropout` fails on its `if rate == 0`:

        class Net(nnx.Module):
            def __init__(self, rate, rngs):
                self.dropout = bc.models.dropout_layer(rate, rngs)

        build = lambda own: bc.mc_dropout(bc.from_nnx(lambda rngs: Net(own["rate"], rngs)), ...)

    A Python number gives `nnx.Dropout` itself. An array, traced or not, becomes a variable of the layer, and so a leaf
    of `Variables.stats`: one per member, carried and never differentiated. What counts from then on is the rate in the
    state, so a state given as `start` brings its own.

    Args:
        rate: share of units that are dropped, in [0, 1); 0 changes nothing.
        rngs: `nnx.Rngs` or one of its streams, as `nnx.Dropout` takes them.
        broadcast_dims: axes along which all units share one mask.

    Returns:
        Module with `nnx.Dropout`'s attributes and call. It draws the mask that `nnx.Dropout` draws, up to units whose
        random number lies within a rounding of the rate. A traced rate outside [0, 1) gives NaN, so that `fit`
        reports the member as diverged.

    Raises:
        ValueError: for a rate outside [0, 1), or more than one.
    Source: Srivastava et al. 2014.
    """
    from flax import nnx

    check_dropout(rate)
    if not isinstance(rate, (jax.Array, np.ndarray)):
        return nnx.Dropout(rate, broadcast_dims=broadcast_dims, rngs=rngs)
    variable: Any = nnx.Variable(jnp.asarray(rate, jnp.float32))
    return _variable_dropout()(variable, broadcast_dims=broadcast_dims, rngs=rngs)


@cache
def _variable_dropout():
    """The layer's class; a function, since flax is heavy to import."""
    from flax import nnx

    class VariableDropout(nnx.Dropout):
        rate: Any

        def __call__(self, inputs, *, deterministic=None, rngs=None):
            deterministic = self.deterministic if deterministic is None else deterministic
            if deterministic:
                return inputs
            rngs = self.rngs if rngs is None else rngs
            rngs = rngs[self.rng_collection] if isinstance(rngs, nnx.Rngs) else rngs
            key: Any = rngs() if isinstance(rngs, nnx.RngStream) else rngs
            shape = list(inputs.shape)
            for axis in self.broadcast_dims:
                shape[axis] = 1
            keep = 1 - self.rate[...]
            mask = jax.random.bernoulli(key, keep, shape)
            # a rate out of range must not look like another network, whichever mask it drew
            keep = jnp.where((keep > 0) & (keep <= 1), keep, jnp.nan).astype(jnp.result_type(inputs, float))
            return jnp.where(mask, inputs / keep, 0 * keep)

    return VariableDropout
