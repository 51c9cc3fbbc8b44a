"""Joining and slicing predictives along their axes."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.predictive.categorical import Bernoulli, Categorical
from bayescal.predictive.dirichlet import Dirichlet
from bayescal.predictive.gaussian import Gaussian
from bayescal.predictive.probabilities import Probabilities
from bayescal.types import Array

Predictive = Categorical | Bernoulli | Gaussian | Probabilities | Dirichlet
Same = TypeVar("Same", bound=Predictive)


def join_members(stacked: Predictive) -> Predictive:
    """Joins two leading axes (outer, inner) of every leaf into one member axis, outer-major; weights stay as they are.

    Args:
        stacked: predictive whose leaves carry an extra leading axis.
    """
    outer, inner = _leading(stacked)
    return jax.tree.map(lambda x: x.reshape((outer * inner, *x.shape[2:])), stacked)


def merge_members(stacked: Predictive, weights: Float[Array, "outer"] | None = None) -> Predictive:
    """Joins two leading axes (outer, inner) of every leaf into one member axis, outer-major.

    Here alone axes join: draws of each member of an ensemble, heads of each network.

    Args:
        stacked: predictive whose leaves carry an extra leading axis, as `vmap` over members returns it.
        weights: weight of each outer member; None = equal.
    """
    inner, merged = _leading(stacked)[1], join_members(stacked)
    own = stacked.member_weights
    if own is not None:  # each outer member's own weights sum to one, whatever scale they came in
        own = (own / own.sum(1, keepdims=True)).reshape(-1, *own.shape[2:])
    if weights is not None:
        repeated = jnp.repeat(jnp.asarray(weights), inner)
        own = repeated if own is None else repeated.reshape(-1, *[1] * (own.ndim - 1)) * own
    return merged if own is None else dataclasses.replace(merged, member_weights=own)


def stack_experiments(stacked: Predictive) -> Predictive:
    """Moves a leading experiment axis behind the members: (experiment, member, rows, ...) -> (member, experiment, rows,
    ...). The experiment becomes a batch axis, so that nothing ever pools over it.

    Args:
        stacked: predictive whose leaves carry an extra leading axis, as `run_members` returns it.
    """
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), stacked)
    weights = moved.member_weights
    if weights is None or weights.ndim > 2:
        return moved
    rows = len(moved.batch_shape) - 1
    return dataclasses.replace(moved, member_weights=weights.reshape(*weights.shape, *[1] * rows))


def swap_batch_axes(pred: Predictive) -> Predictive:
    """Exchanges the first two batch axes: (member, experiment, rows, ...) <-> (member, rows, experiment, ...)."""
    return jax.tree.map(lambda x: x if x.ndim < 3 else jnp.swapaxes(x, 1, 2), pred)


def take(pred: Same, index) -> Same:
    """The examples `index` (anything numpy takes) along the first batch axis.

    Raises:
        IndexError: for whole numbers outside the batch, where they are known.
    """
    if isinstance(index, (list, np.ndarray)) and np.issubdtype(np.asarray(index).dtype, np.integer):
        rows, given = pred.batch_shape[0], np.asarray(index)
        if given.size and (given.min() < -rows or given.max() >= rows):
            raise IndexError(
                f"`index` must lie in [{-rows}, {rows}), got {given.min()} to {given.max()}. Check the rows."
            )

    def pick(name, x):
        return x if name == "member_weights" and _same_for_all(x) else x[:, index]

    return _map_fields(pick, pred)


def concatenate(preds: list[Same]) -> Same:
    """Joins predictives of the same members along the first batch axis: the chunks of a streamed prediction.

    Raises:
        ValueError: where some are normalised and others not.
    """
    first = preds[0]
    if len(preds) == 1:
        return first
    if len({getattr(p, "normalised", False) for p in preds}) > 1:
        raise ValueError("`preds` must all be raw or all normalised, got both. Pool or calibrate all of them.")
    joined = _map_fields(
        lambda name, x: jnp.concatenate([getattr(p, name) for p in preds], axis=1), first, "member_weights"
    )
    weights = [p.member_weights for p in preds]
    if all(w is weights[0] for w in weights) or _equal_and_shared(weights):
        return dataclasses.replace(joined, member_weights=weights[0])
    spread = [_per_example_weights(p) for p in preds]
    return dataclasses.replace(joined, member_weights=jnp.concatenate(spread, axis=1))


def _per_example_weights(pred):
    weights = jnp.ones(pred.num_members) if pred.member_weights is None else pred.member_weights
    if weights.ndim == 1:
        weights = weights.reshape(-1, *[1] * len(pred.batch_shape))
    return jnp.broadcast_to(weights, (pred.num_members, *pred.batch_shape))


def _same_for_all(weights) -> bool:
    return weights.ndim == 1 or weights.shape[1] == 1


def _equal_and_shared(weights) -> bool:
    if any(w is None or isinstance(w, Tracer) or not _same_for_all(w) for w in weights):
        return False
    return all(np.array_equal(w, weights[0]) for w in weights)


def _map_fields(function, pred, *left_out) -> Any:
    fields = [f.name for f in dataclasses.fields(pred) if not f.metadata.get("static") and f.name not in left_out]
    arrays = {name: getattr(pred, name) for name in fields}
    changed = {n: None if x is None else function(n, x) for n, x in arrays.items()}
    return dataclasses.replace(pred, **changed, **dict.fromkeys(left_out))


def _leading(pred) -> tuple[int, int]:
    return jax.tree.leaves(pred)[0].shape[:2]
