"""Joining and slicing predictives along their axes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.predictive.categorical import Bernoulli, Categorical
from bayescal.predictive.gaussian import Gaussian
from bayescal.types import Array

Predictive = Categorical | Bernoulli | Gaussian


def merge_members(stacked: Predictive, weights: Float[Array, "outer"] | None = None) -> Predictive:
    """Joins two leading axes (outer, inner) of every leaf into one member axis, outer-major.

    The only place where axes join: draws of each member of an ensemble, heads of each network.

    Args:
        stacked: predictive whose leaves carry an extra leading axis, as `vmap` over members returns it.
        weights: weight of each outer member; None = equal.
    """
    outer, inner = _leading(stacked)
    merged = jax.tree.map(lambda x: x.reshape((outer * inner, *x.shape[2:])), stacked)
    if weights is None:
        return merged
    own = merged.member_weights
    ones = (1,) * (0 if own is None else own.ndim - 1)
    repeated = jnp.repeat(jnp.asarray(weights), inner).reshape(-1, *ones)
    return dataclasses.replace(merged, member_weights=repeated if own is None else repeated * own)


def take(pred: Predictive, index) -> Predictive:
    """The examples `index` (anything numpy takes) along the first batch axis."""

    def pick(name, x):
        shared = name == "member_weights" and (x.ndim == 1 or x.shape[1] == 1)
        return x if shared else x[:, index]

    return _map_fields(pick, pred)


def concatenate(preds: list[Predictive]) -> Predictive:
    """Joins predictives of the same members along the first batch axis: the chunks of a streamed prediction."""
    first = preds[0]
    if len(preds) == 1:
        return first

    def join(name, x):
        shared = name == "member_weights" and (x.ndim == 1 or x.shape[1] == 1)
        return x if shared else jnp.concatenate([getattr(p, name) for p in preds], axis=1)

    return _map_fields(join, first)


def _map_fields(function, pred):
    arrays = {f.name: getattr(pred, f.name) for f in dataclasses.fields(pred) if not f.metadata.get("static")}
    return dataclasses.replace(pred, **{n: function(n, x) for n, x in arrays.items() if x is not None})


def _leading(pred) -> tuple[int, int]:
    return jax.tree.leaves(pred)[0].shape[:2]
