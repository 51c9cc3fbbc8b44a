"""A bounded buffer of networks that a chain has visited, and predictions from all that it holds."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.map_estimate import check_whole
from bayescal.sharding import run_members
from bayescal.types import Key, Model, PyTree, Variables


class Samples(NamedTuple):
    """The last positions of a chain that were kept.

    params: the network's params with a leading sample axis. Before the first sample slot 0 holds where the chain is; other
        slots without a sample hold where it began, and are never read.
    count: how many were ever kept; the buffer holds the last of them, the oldest overwritten first.
    """

    params: PyTree
    count: jax.Array

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.params)[0].shape[0]

    @property
    def held(self) -> jax.Array:
        """How many of the slots hold a sample: the first ones."""
        return jnp.minimum(self.count, self.capacity)

    def weights(self) -> jax.Array:
        """(sample,) 1 for a slot that holds a sample, 0 for others; before the first, 1 for where the chain is."""
        return (jnp.arange(self.capacity) < jnp.maximum(self.count, 1)).astype(jnp.float32)


def no_samples(params: PyTree, capacity: int) -> Samples:
    """An empty buffer of a chain that starts at `params`."""
    return Samples(jax.tree.map(lambda x: jnp.broadcast_to(x, (capacity, *x.shape)), params), jnp.zeros((), jnp.int32))


def keep(samples: Samples, params: PyTree, due: jax.Array) -> Samples:
    """The buffer with `params` in it where they are `due`; until the first, slot 0 follows the chain."""
    slot = samples.count % samples.capacity
    write = due | (samples.count == 0)

    def put(all_, one):
        old = jax.lax.dynamic_index_in_dim(all_, slot, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(all_, jnp.where(write, one, old).astype(all_.dtype), slot, 0)

    return Samples(jax.tree.map(put, samples.params, params), samples.count + due.astype(jnp.int32))


def is_due(step: jax.Array, burn_in: int, every: int) -> jax.Array:
    """Whether the position after update `step` (the first is 0) is kept: every `every`-th after `burn_in` updates."""
    return (step >= burn_in) & ((step - burn_in + 1) % every == 0)


def draw_sample(samples: Samples, stats: PyTree, key: Key) -> Variables:
    """One of the networks held, each as likely as the others."""
    held = jnp.maximum(samples.held, 1)
    return Variables(jax.tree.map(lambda x: x[jax.random.randint(key, (), 0, held)], samples.params), stats)


@property
def holds_samples(state) -> jax.Array:
    """Whether the chain holds a sample of the posterior: until then it predicts by where it is. Bool, `ready` of its state."""
    return state.samples.count > 0


@property
def sampled_networks(state) -> Variables:
    """All slots as networks, with a leading sample axis, of which the first `held` are samples: `networks` of its state."""
    stats = jax.tree.map(lambda x: jnp.broadcast_to(x, (state.samples.capacity, *x.shape)), state.variables.stats)
    return Variables(state.samples.params, stats)


def predict_samples(samples: Samples, stats: PyTree, inputs, model: Model, likelihood: Callable):
    """The likelihood of every network held, as members of equal weight; empty slots weigh nothing."""

    def outputs(params, stats, inputs):
        return model.apply(Variables(params, stats), inputs, None)

    pred = likelihood(run_members(outputs, samples.params, shared=(stats, inputs)))
    heads = pred.num_members // samples.capacity  # of a likelihood that makes several members of one network
    return dataclasses.replace(pred, member_weights=jnp.repeat(samples.weights(), heads))


def check_keeping(num_samples: int, burn_in: int, every: int) -> None:
    """Raises unless the settings of a buffer, and of what it keeps, are whole numbers in range."""
    check_whole("num_samples", num_samples, 1, "The buffer holds the last of those kept; 10 to 100 is usual.")
    check_collecting(burn_in, every)


def check_collecting(burn_in: int, every: int) -> None:
    """Raises unless the settings of `is_due` are whole numbers in range."""
    advice = "One of each `every` updates (not epochs) counts, after `burn_in` updates."
    check_whole("burn_in", burn_in, 0, advice)
    check_whole("every", every, 1, advice)
