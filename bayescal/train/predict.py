"""Prediction over data of any length, in chunks that all get the same key."""

from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Integral

import jax
import numpy as np
from jax.sharding import Mesh

from bayescal.data.checks import check_finite, check_rows_agree
from bayescal.liveness import abstract, tree_bytes
from bayescal.memory import device_budget, prediction_chunk
from bayescal.methods.experiments import runners
from bayescal.predictive import Predictive, concatenate, swap_batch_axes, take
from bayescal.sharding import check_mesh, default_mesh, fetch, on, place
from bayescal.types import EnsembleState, Fit, Key, Method


def predict(
    method: Method, state, inputs, key: Key | None, *, chunk_size: int | None = None, mesh: Mesh | None = None
) -> Predictive:
    """The predictive of every row, streamed in chunks that all get the same key: a draw is one network throughout.

    Args:
        method: what was trained.
        state: its state, such as `Fit.state`.
        inputs: array (rows, ...), or a pytree of such, finite. For a method of `experiments`, a list holds each
            experiment's own.
        key: random key of the draws; None = the mean network of each member.
        chunk_size: rows that go through the network at a time; results do not depend on it beyond rounding. None = as
            many as fit the device's memory by `bayescal.memory.prediction_chunk`, at most 8192.
        mesh: devices that members are spread over; None = as many as there are members.

    Returns:
        Predictive with batch shape (rows,), or (experiment, rows) for a method of `experiments`, on one device.

    Raises:
        ValueError: for empty, NaN or infinite inputs.
        TypeError: for a `Fit` where its state is meant.
    """
    networks = runners(method).shape[0] if method.members or method.experiments else 1
    chunks, last = in_chunks(method.predict, state, inputs, key, networks=networks, chunk_size=chunk_size, mesh=mesh)
    if method.experiments is None:
        return join(chunks, last)
    return swap_batch_axes(join([swap_batch_axes(pred) for pred in chunks], last))


def in_chunks(
    function: Callable, state, inputs, key: Key | None, *, networks: int, chunk_size: int | None, mesh: Mesh | None
) -> tuple[list, int]:
    """What `function(state, chunk of inputs, key)` gives for each chunk, and how many rows count in the last.

    All chunks have as many rows, so that one program serves them; the last is filled up with rows from the front.

    Args:
        function: hashable, and equal where it is the same function, so that it compiles once.
        state, inputs, key, chunk_size, mesh: as in `predict`.
        networks: how many the state holds, over which devices are spread.

    Raises:
        ValueError: for empty, NaN or infinite inputs.
        TypeError: for a `Fit` where its state is meant.
    """
    check_finite("inputs", inputs)
    rows = check_rows_agree("inputs", inputs)
    check_state("state", state)
    check_mesh(mesh)
    if chunk_size is None:
        chunk_size = _fitting_chunk(function, state, inputs, key)
    if not isinstance(chunk_size, Integral) or int(chunk_size) < 1:
        raise ValueError(f"`chunk_size` must be a whole number of at least 1, got {chunk_size!r}. 8192 is the default.")
    mesh = mesh or default_mesh(networks)
    if mesh is not None:
        state, key = _place_state(state, mesh), None if key is None else place(key, mesh)
    chunks, last = [], rows
    for first in range(0, rows, chunk_size):
        chunk = inputs
        if rows > chunk_size:
            index = np.arange(first, first + chunk_size) % rows
            chunk, last = jax.tree.map(lambda x, index=index: x[index], inputs), min(chunk_size, rows - first)
        with on(mesh):
            result = _call(function, state, chunk if mesh is None else place(chunk, mesh), key)
        if mesh is not None:  # where members do not divide the devices these talk to each other, and on CPU many such
            jax.block_until_ready(result)  # programs in flight use up the threads that they wait for
        chunks.append(fetch(result))
    return chunks, last


def join(preds: list[Predictive], last: int) -> Predictive:
    """One predictive from those of the chunks, of whose last only `last` rows count."""
    return concatenate([*preds[:-1], take(preds[-1], np.arange(last))] if len(preds) > 1 else preds)


@partial(jax.jit, static_argnums=0)
def _call(function, state, inputs, key):
    return function(state, inputs, key)


def _fitting_chunk(function, state, inputs, key) -> int:
    """The largest chunk that fits beside the state; the estimate is traced once for the same shapes."""
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jax.dtypes.result_type(x)), inputs)
    leaves, structure = jax.tree.flatten(abstract((state, row, key)))
    return _chunk_of_shapes(function, structure, tuple((x.shape, x.dtype) for x in leaves))


@lru_cache(maxsize=16)
def _chunk_of_shapes(function, structure, shapes) -> int:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    state, row, key = jax.tree.unflatten(structure, leaves)
    return prediction_chunk(function, state, row, key, budget=max(device_budget() - tree_bytes(state), 0))


def _place_state(state, mesh: Mesh):
    """Members where their devices are, if they divide them; else everything everywhere."""
    width = mesh.shape["member"]
    if isinstance(state, EnsembleState) and len(state.alive) % width == 0:
        return EnsembleState(place(state.members, mesh, "member"), place(state.alive, mesh))
    return place(state, mesh)


def check_state(name: str, state) -> None:
    """Raises for a `Fit` where a state is meant."""
    if isinstance(state, Fit):
        raise TypeError(f"`{name}` must be a state, got a Fit. Pass its `.state` or `.best`.")
