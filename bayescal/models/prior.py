"""Randomised prior functions: a network plus one of its kind that is never trained."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.types import Array, Key, Model, PyTree, Variables

Scale = float | Float[Array, ""]
_PRIOR = 0x5052494F  # folded into the key of `init`, so that the prior shares no stream with the network


class PriorStats(NamedTuple):
    """What `with_prior` carries: the trained network's own stats, and the whole network that is not trained."""

    network: PyTree
    prior: Variables


def with_prior(model: Model, *, scale: Scale) -> Model:
    """f(x) = network(x) + scale * prior(x): `prior` is a second network from `model.init`, drawn once and kept.

    Only the first network's params are in `params`; the prior is part of `stats`, so that whatever trains, draws or
    decays weights leaves it alone. It is one fixed function: deterministic (no dropout), with the batch-norm moments
    that it was made with. For `ensemble`, where each member draws its own: far from the data the members differ by it.

    For linear regression with a normal prior on the network it is `anchored` with anchor = scale * the prior's weights.
    There are no `features`: the outputs are not a function of the last layer's inputs alone.

    Args:
        model: the network, whose outputs can be added: arrays of numbers.
        scale: of the prior's outputs, in their unit; positive. May be traced, that is a member's own setting.

    Returns:
        Model with `model`'s own keys: one makes the network's pass stochastic, `None` deterministic.

    Raises:
        ValueError: for a scale that is not one positive number.
    Source: Osband et al. 2018, "Randomized prior functions for deep reinforcement learning" (recalled).
    """
    if np.shape(scale):
        raise ValueError(
            f"`scale` must be one number, got shape {np.shape(scale)}. Scale the outputs in the network itself, if each has "
            "its own unit."
        )
    if not isinstance(scale, Tracer) and not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale!r}. For no prior use `model` itself.")

    def init(key: Key) -> Variables:
        network, prior = model.init(key), model.init(jax.random.fold_in(key, _PRIOR))
        return Variables(network.params, PriorStats(network.stats, prior))

    def with_outputs_of_prior(outputs, variables: Variables, inputs):
        prior = model.apply(variables.stats.prior, inputs, None)
        return jax.tree.map(lambda own, fixed: own + jnp.asarray(scale, own.dtype) * fixed, outputs, prior)

    def apply(variables: Variables, inputs, key: Key | None):
        own = model.apply(Variables(variables.params, variables.stats.network), inputs, key)
        return with_outputs_of_prior(own, variables, inputs)

    def train(variables: Variables, inputs, key: Key):
        network = Variables(variables.params, variables.stats.network)
        own, stats, penalty = model.train(network, inputs, key)
        return with_outputs_of_prior(own, variables, inputs), variables.stats._replace(network=stats), penalty

    return Model(init, apply, train)
