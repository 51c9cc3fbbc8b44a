"""Prediction over data of any length, in chunks that all get the same key."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from bayescal.data.checks import check_finite, check_rows_agree
from bayescal.liveness import tree_bytes
from bayescal.memory import MOST_ROWS, device_budget, prediction_block, prediction_chunk
from bayescal.methods.experiments import runners
from bayescal.predictive import Predictive
from bayescal.sharding import check_mesh, fetch_numpy, make_mesh, on, place
from bayescal.train.blocks import (
    Results,
    choose_sizes,
    concatenate,
    fill_up,
    in_blocks,
    join,
    lay_out,
    results_of,
    shares,
)
from bayescal.types import EnsembleState, Fit, Key, Method

WORTH = 256  # rows of a device that are worth spreading them


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
        chunk_size: rows that go through the network at a time at the most; results do not depend on it beyond rounding.
            None = as many a device as fit its memory by `bayescal.memory.prediction_chunk`, at most 8192.
        mesh: devices, over whose member axis members are spread and over whose data axis rows. Where members cannot be
            shared evenly, and for None, of which all devices are: members over as many as they can, rows over the others.

    Returns:
        Predictive with batch shape (rows,), or (experiment, rows) for a method of `experiments`, on one device.

    Raises:
        ValueError: for empty, NaN or infinite inputs; for the state of a chain that has kept no sample, of weights that
            were not averaged yet, or of a curvature that was not summed up.
        TypeError: for a `Fit` where its state is meant.
    """
    check_ready("state", state)
    networks = runners(method).shape[0] if method.members or method.experiments else 1
    return over_rows(method.predict, state, inputs, key, networks=networks, chunk_size=chunk_size, mesh=mesh)


def over_rows(
    function: Callable, state, inputs, key: Key | None, *, networks: int, chunk_size: int | None, mesh: Mesh | None
) -> Any:
    """`function(state, inputs, key)` for all rows, a chunk of them at a time, and each chunk in blocks.

    Rows are filled up to one of a few numbers, for each of which there is one program, and what is too much is cut.

    Args:
        function: hashable, and equal where it is the same function, so that it compiles once. Every leaf of its result
            has an axis of rows, none of which depends on another, or is the same for any rows.
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
    if chunk_size is not None and (not isinstance(chunk_size, Integral) or int(chunk_size) < 1):
        raise ValueError(f"`chunk_size` must be a whole number of at least 1, got {chunk_size!r}. 8192 is the default.")
    mesh = _evenly(mesh, networks, rows)
    devices = dict(mesh.shape).get("data", 1) if mesh else 1
    seen = _look(function, state, inputs, key, chunk_size is None)
    chunk = -(-int(chunk_size) // devices) if chunk_size else seen.chunk
    each = min(chunk, -(-rows // devices))
    sizes = choose_sizes(each, chunk, seen.least, seen.most)
    if mesh is not None:
        state, key = _place_state(state, mesh), None if key is None else place(key, mesh)
    # to an accelerator and back is slower by far than a small program for every number of rows
    on_host = mesh is not None or jax.default_backend() == "cpu"
    calls = []
    for share in shares(rows, each, devices):
        own = (lay_out if on_host else fill_up)(inputs, share, devices, sizes.capacity)
        blocks = np.int32(-(-share.each // sizes.block))
        if mesh is not None:
            own = place(own, mesh, *["data"] * (devices > 1))
        with on(mesh):
            result = _call(function, seen.results, sizes, state, own, key, blocks)
        if mesh is not None:  # one at a time: where a method's devices talk to each other, many programs in flight use
            jax.block_until_ready(result)  # up the threads that they wait for on CPU
        calls.append((share, jax.tree.leaves(result)))
    return join(calls, seen.results, rows, sizes.capacity) if on_host else concatenate(calls, seen.results)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _call(function, results, sizes, state, inputs, key, count):
    leaves = in_blocks(function, results, sizes, state, inputs, key, count)
    return jax.tree.unflatten(results.structure, leaves)


class _Looked(NamedTuple):
    """What is known of a function before it is compiled: its results, and bounds on the rows of a block and a chunk."""

    results: Results
    least: int
    most: int
    chunk: int


def _look(function, state, inputs, key, budgeted: bool) -> _Looked:
    """Traced once for the same shapes of the state, of a row and of the key."""
    row = lambda x: (1, *np.shape(x)[1:])
    return _look_at(function, budgeted, _shapes(state, np.shape), _shapes(inputs, row), _shapes(key, np.shape))


def _shapes(tree, shape: Callable) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    types = map(jax.typeof, leaves)
    return structure, tuple((shape(x), type.dtype, type.weak_type) for x, type in zip(leaves, types, strict=True))


@lru_cache(maxsize=16)
def _look_at(function, budgeted, *shapes) -> _Looked:
    state, row, key = (
        tree.unflatten([jax.ShapeDtypeStruct(x, dtype, weak_type=weak) for x, dtype, weak in leaves])
        for tree, leaves in shapes
    )
    traced, chunk = jax.jit(function), MOST_ROWS  # one trace a number of rows for all who look
    if budgeted:
        chunk = prediction_chunk(traced, state, row, key, budget=max(device_budget() - tree_bytes(state), 0))
    results = results_of(traced, state, row, key)
    if jax.default_backend() == "cpu":
        return _Looked(results, *prediction_block(traced, state, row, key), chunk)
    return _Looked(results, MOST_ROWS, MOST_ROWS, chunk)


def _evenly(mesh: Mesh | None, networks: int, rows: int) -> Mesh | None:
    """Networks over as many devices as they can be shared evenly between, rows over the others; None for one device."""
    if mesh is not None and networks % dict(mesh.shape).get("member", 1) == 0:
        return mesh
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    members = math.gcd(networks, len(devices))
    data = len(devices) // members
    if mesh is None and jax.process_count() == 1:  # of several processes all devices take part
        data = max(1, min(data, rows // WORTH))
    return None if members * data == networks == 1 else make_mesh(members, data, devices=devices)


def _place_state(state, mesh: Mesh):
    """Members where their devices are, if they divide them; else everything everywhere."""
    width = dict(mesh.shape).get("member", 1)
    if isinstance(state, EnsembleState) and len(state.alive) % width == 0:
        return EnsembleState(place(state.members, mesh, *["member"] * (width > 1)), place(state.alive, mesh))
    return place(state, mesh)


def check_ready(name: str, state) -> None:
    """Raises where a member that is alive says by its `ready` that it has nothing of its posterior to predict from yet."""
    ensembled = isinstance(state, EnsembleState)
    ready = getattr(state.members if ensembled else state, "ready", None)
    if ready is None or isinstance(ready, Tracer):
        return
    ready, alive = fetch_numpy((ready, state.alive if ensembled else ready))
    without = np.argwhere(alive & ~ready) if ensembled else np.argwhere(~ready)
    if len(without):
        which = (
            f" in members {[tuple(map(int, w)) if len(w) > 1 else int(w[0]) for w in without]}" if ready.ndim else ""
        )
        raise ValueError(
            f"`{name}` must hold what its posterior is made of (a sample of a chain, an average, two weights of SWAG, the "
            f"curvature of an epoch that is over), got too few{which}. Train for more: `burn_in`, `warmup` and `every` count "
            "updates, not epochs; a loop of your own calls `method.end_epoch`."
        )


def check_state(name: str, state) -> None:
    """Raises for a `Fit` where a state is meant."""
    if isinstance(state, Fit):
        raise TypeError(f"`{name}` must be a state, got a Fit. Pass its `.state` or `.best`.")
