"""Concrete dropout: dense layers and convolutions that learn how much of their inputs to drop, for flax nnx networks."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.models.dropout import Rate, carried, check_number, own_stream, value_of


def concrete_dropout(
    layer: Any,
    *,
    rngs,
    rate: Rate = 0.1,
    prior_precision: Rate = 1.0,
    temperature: Rate = 0.1,
):
    """layer(x (1 - z) / (1 - p)), z = sigmoid((logit(p) + logit(u)) / temperature), u ~ Uniform(0, 1); the rate p is learnt.

    Around the layers of an nnx network, or `dense=` and `conv=` of `models.mlp` and its like:

        def dense(a, b, *, rngs):
            return bc.models.concrete_dropout(nnx.Linear(a, b, rngs=rngs), rngs=rngs)

        model = bc.models.mlp(4, (50,), 3, dense=dense)
        method = bc.mc_dropout(model, bc.Categorical, optax.adam(1e-2), num_data=len(data.targets), num_draws=30)

    Its `penalty()`, in nats for the whole data set, is

        prior_precision / 2 * (|kernel|^2 / (1 - p) + |bias|^2) - in_features * H(p),    H(p) = -p log p - (1 - p) log(1 - p),

    the KL, but for a constant, to a normal prior from weights that are kernel / (1 - p), or 0 with probability p, all those
    of an input together. So the rate falls with more data, and rises towards 1/2 where the kernel is small. It is the prior
    of these layers: leave the `prior_precision` of `map_estimate` at 0.

    Adam moves a logit by about its learning rate a step at most. At 1e-3, in 1,000 steps, rates end near where they began,
    whatever the data say; an optimiser of their own lets them move:

        parts = lambda params: jax.tree.map_with_path(
            lambda path, _: "rates" if "rate_logit" in jax.tree_util.keystr(path) else "weights", params
        )
        optimizer = optax.partition({"weights": optax.adam(1e-3), "rates": optax.adam(1e-2)}, parts)

    In training each row has a mask of its own, the same at all its places (a channel of its image, a feature of its
    sequence). With a key at prediction one mask serves all rows. It is still the relaxed one that was trained: for
    temperatures well below 1 its variance is about 1 - temperature of that of zeros and ones, its mean 1 but for terms of
    order temperature^2. At temperature 2/3 and rates of 0.1, 0.5 and 0.9 its mean is 0.95, 1 and 1.45. Without a key the layer
    runs as it is.

    Args:
        layer: `nnx.Linear`, `nnx.Conv`, or what else has a `kernel` and `in_features`, the last axis of its inputs.
        rngs: `nnx.Rngs` or one of its streams.
        rate: at the start, in (0, 1). From then on it is sigmoid of the parameter `rate_logit`.
        prior_precision: inverse variance of the normal prior of every weight.
        temperature: of the relaxation; lower = closer to zeros and ones, and gradients of the rate that vary more.

    Raises:
        TypeError: for another layer, or other `rngs`.
        ValueError: for a rate outside (0, 1) in float32, or settings that are not one positive, finite number. Any may be
            traced, as members' own; one out of range then gives NaN.
    Source: Gal, Hron and Kendall 2017, equations 3 to 5 (recalled); the penalty's factors as in their code, where
        weight_regularizer / dropout_regularizer = prior_precision / 2. Their convolutions use temperature 2/3.
    """
    _check(layer, rate, prior_precision, temperature)
    return _module()(layer, rate, prior_precision, temperature, rngs)


@cache  # jax keeps every module class for ever: one, and none that closes over a traced value
def _module():
    from flax import nnx

    class ConcreteDropout(nnx.Module):
        def __init__(self, layer, rate, prior_precision, temperature, rngs):
            rate = jnp.asarray(rate, jnp.float32)
            rate = jnp.where((rate > 0) & (rate < 1), rate, jnp.nan)  # an infinite logit could never be learnt
            self.layer, self.rate_logit = layer, nnx.Param(jnp.log(rate) - jnp.log1p(-rate))
            self.prior_precision, self.temperature = _positive(prior_precision), _positive(temperature)
            self.rngs = own_stream(rngs)
            self.deterministic, self.noise_rows = False, None

        @property
        def rate(self):
            return jax.nn.sigmoid(self.rate_logit[...])

        def penalty(self):
            """KL up to a constant, nats; see `concrete_dropout`."""
            logit, layer = self.rate_logit[...], self.layer
            # -log(1 - p) and -log p, which stay exact where the rate itself would round to 0 or 1
            keeping, dropping = jax.nn.softplus(logit), jax.nn.softplus(-logit)
            entropy = jax.nn.sigmoid(logit) * dropping + jax.nn.sigmoid(-logit) * keeping
            squares = _squares(layer.kernel[...]) * jnp.exp(keeping)
            if getattr(layer, "bias", None) is not None:
                squares = squares + _squares(layer.bias[...])
            return value_of(self.prior_precision) / 2 * squares - layer.in_features * entropy

        def __call__(self, inputs):
            if self.deterministic:
                return self.layer(inputs)
            shape = [1] * inputs.ndim
            shape[-1] = inputs.shape[-1]
            if self.noise_rows is not None:
                shape[0] = inputs.shape[0]
            logit, noise = self.rate_logit[...], jax.random.logistic(self.rngs(), tuple(shape), jnp.float32)
            # (1 - z) / (1 - p): as a sum of logarithms it is finite for every rate
            mask = jnp.exp(jax.nn.log_sigmoid(-(logit + noise) / value_of(self.temperature)) + jax.nn.softplus(logit))
            return self.layer(inputs * mask.astype(jnp.result_type(inputs, float)))

    return ConcreteDropout


def _positive(setting: Rate) -> Any:
    """The setting as the layer carries it; NaN for a traced one out of range, so that its member is reported."""
    own = carried(setting)
    if not isinstance(own, float):
        value = own[...]
        own[...] = jnp.where((value > 0) & (value < jnp.inf), value, jnp.nan)
    return own


def _squares(x):
    """Their sum, in float32 or wider: in half precision it overflows, or loses its digits."""
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) ** 2).sum()


def _check(layer, rate, prior_precision, temperature) -> None:
    if not hasattr(layer, "kernel") or not isinstance(getattr(layer, "in_features", None), int):
        raise TypeError(
            "`layer` must have a `kernel` and a number of `in_features`, as `nnx.Linear` and `nnx.Conv` do, got "
            f"{type(layer).__name__}. The penalty needs them; for a fixed rate put `dropout_layer` before the layer."
        )
    advice = {
        "rate": "0.1 is usual at the start.",
        "prior_precision": "It is an inverse variance; 1 is usual.",
        "temperature": "0.1 is usual.",
    }
    for name, value in (("rate", rate), ("prior_precision", prior_precision), ("temperature", temperature)):
        check_number(value, name)
        most = 1 if name == "rate" else jnp.inf
        if isinstance(value, Tracer):
            continue
        with np.errstate(over="ignore"):
            single = np.float32(value)  # as the layer takes it: a rate near 1 may round to it
        if not jnp.finfo(jnp.float32).tiny <= single < most:  # numbers below that are 0 on devices
            raise ValueError(f"`{name}` must lie between 0 and {most} in float32, got {value!r}. {advice[name]}")
