"""DropConnect: dense layers and convolutions that drop single weights, for flax nnx networks."""

from functools import cache
from typing import Any

import jax

from bayescal.models.dropout import Rate, carried, check_dropout, has_dropout, own_stream, scaled_mask, value_of


def drop_connect(layer: Any, *, rate: Rate, rngs):
    """The layer with the kernel kernel * mask / (1 - rate), mask ~ Bernoulli(1 - rate) of its shape; the bias stays.

    Around the layers of an nnx network, or `dense=` and `conv=` of `models.mlp` and its like:

        def dense(a, b, *, rngs):
            return bc.models.drop_connect(nnx.Linear(a, b, rngs=rngs), rate=0.1, rngs=rngs)

        method = bc.mc_dropout(bc.models.mlp(4, (50,), 3, dense=dense), bc.Categorical, optax.adam(1e-2), num_draws=30)

    One mask a call, for all rows of a batch in training too: the paper's, one a row, would need a kernel a row. Gradients
    are as unbiased and vary more. With a key at prediction a draw has one mask, without one the kernel is whole: its mean.

    Args:
        layer: `nnx.Linear`, `nnx.Conv`, or what else has an `nnx.Param` of its own named `kernel`.
        rate: share of weights that are dropped, in [0, 1); may be traced, as that of `dropout_layer`: an array is a leaf of
            `Variables.stats`, and outside [0, 1) gives NaN.
        rngs: `nnx.Rngs` or one of its streams.

    Raises:
        TypeError: for a layer without such a kernel, or other `rngs`.
        ValueError: for a rate outside [0, 1), or more than one.
    Source: Wan et al. 2013 (recalled), who at prediction draw outputs from a normal of the same moments instead.
    """
    from flax import nnx

    # a `kernel` computed from other parameters could not be found, and so masked, among the layer's variables
    if not isinstance(getattr(layer, "__dict__", {}).get("kernel"), nnx.Param):
        raise TypeError(
            "`layer` must have an `nnx.Param` named `kernel`, as `nnx.Linear` and `nnx.Conv` do, got "
            f"{type(layer).__name__}. Wrap the layers that have weights, one by one."
        )
    check_dropout(rate, name="rate")
    return _module()(layer, rate, rngs)


@cache  # jax keeps every module class for ever: one, and none that closes over a traced rate
def _module():
    from flax import nnx

    class DropConnect(nnx.Module):
        def __init__(self, layer, rate, rngs):
            self.layer, self.rate, self.random = layer, carried(rate), has_dropout(rate)
            self.rngs = own_stream(rngs)
            self.deterministic = False

        def __call__(self, inputs):
            if self.deterministic or not self.random:
                return self.layer(inputs)
            key, rate = self.rngs(), value_of(self.rate)
            graph, kernel, rest = nnx.split(self.layer, lambda path, _: path == ("kernel",), ...)
            masked = jax.tree.map(lambda x: x * scaled_mask(key, rate, x.shape, x.dtype), kernel)
            return nnx.merge(graph, masked, rest)(inputs)

    return DropConnect
