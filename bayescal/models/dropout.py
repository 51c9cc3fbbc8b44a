"""Dropout whose rate may be a member's own setting."""

from collections.abc import Sequence
from functools import cache
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.types import Array, Key

Rate = float | Float[Array, ""]


def check_dropout(rate: Rate, *, name: str = "dropout") -> None:
    """Raises unless `rate` is one number in [0, 1); the value of a traced one cannot be checked."""
    check_number(rate, name, "rate")
    if not isinstance(rate, Tracer) and not 0 <= float(rate) < 1:  # a comparison of arrays would be traced inside jit
        raise ValueError(f"`{name}` must be a rate in [0, 1), got {rate!r}. It is the share that is dropped.")


def check_number(value: Any, name: str, noun: str = "number") -> None:
    """Raises unless `value` is one number, which may be an array and traced."""
    shape = np.shape(value)
    if shape or not isinstance(value, (Real, jax.Array, np.ndarray)):
        got = f"shape {shape}" if shape else repr(value)
        raise ValueError(
            f"`{name}` must be one {noun}, got {got}. In `ensemble` each member's builder is given its own entry of the "
            "settings."
        )


def has_dropout(rate: Rate) -> bool:
    """Whether a network of this rate needs dropout layers: not for the number 0, and always for an array."""
    return bool(_is_array(rate) or rate != 0)


def carried(setting: Rate) -> Any:
    """A number as it is; an array, which may be traced, as a variable of the layer, and so a leaf of `Variables.stats`."""
    from flax import nnx

    return nnx.Variable(jnp.asarray(setting, jnp.float32)) if _is_array(setting) else float(setting)


def value_of(setting: Any) -> Any:
    """What `carried` was given."""
    return setting if isinstance(setting, float) else setting[...]


def own_stream(rngs: Any):
    """A random stream of the layer's own.

    Args:
        rngs: `nnx.Rngs` or one of its streams.

    Raises:
        TypeError: for anything else.
    """
    from flax import nnx

    stream = rngs["dropout"] if isinstance(rngs, nnx.Rngs) else rngs
    if not isinstance(stream, nnx.RngStream):
        raise TypeError(
            f"`rngs` must be `nnx.Rngs` or one of its streams, got {type(rngs).__name__}. Pass on the `rngs` that your "
            "network is built with."
        )
    return stream.fork()


def scaled_mask(key: Key, rate: Rate, shape: Sequence[int], dtype) -> jax.Array:
    """mask / (1 - rate), mask ~ Bernoulli(1 - rate); NaN for a rate outside [0, 1).

    Multiply by it: values replaced where it is 0 would lose those that are not numbers.
    """
    keep = 1 - rate
    mask = jax.random.bernoulli(key, keep, tuple(shape))
    # a rate out of range must not look like another network, whichever mask it drew
    keep = jnp.where((keep > 0) & (keep <= 1), keep, jnp.nan).astype(dtype)
    return jnp.where(mask, 1 / keep, 0 * keep)


def _is_array(setting) -> bool:
    return isinstance(setting, (jax.Array, np.ndarray))


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

    The number 0 draws nothing, and Monte-Carlo dropout of such a network is an error. An array's value a traced program
    cannot know: 0 in a grid of rates is the plain network, all its draws are alike and its epistemic part is 0.

    Args:
        rate: share of units that are dropped, in [0, 1).
        rngs: `nnx.Rngs` or one of its streams, as `nnx.Dropout` takes them.
        broadcast_dims: axes along which all units share one mask.

    Returns:
        Module with `nnx.Dropout`'s attributes and call. It draws the mask that `nnx.Dropout` draws, up to units whose
        random number lies within a rounding of the rate, but NaN stays NaN where it is dropped. A traced rate outside
        [0, 1) gives NaN, so that `fit` reports the member as diverged.

    Raises:
        ValueError: for a rate outside [0, 1), or more than one.
    Source: Srivastava et al. 2014.
    """
    from flax import nnx

    check_dropout(rate, name="rate")
    layer = _variable_dropout() if _is_array(rate) else nnx.Dropout
    return layer(carried(rate), broadcast_dims=broadcast_dims, rngs=rngs)


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
            return inputs * scaled_mask(key, self.rate[...], shape, jnp.result_type(inputs, float))

    return VariableDropout
