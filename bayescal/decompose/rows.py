"""Functions of rows, a block of rows at a time: what they need in between stays in the cache, and in memory."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from bayescal.predictive import Predictive
from bayescal.sharding import fetch, make_mesh, on, place, uncommitted

CACHE_NUMBERS = 2**15  # numbers of a predictive in a block on a CPU, whose second-level cache holds what comes of them
MEMORY_NUMBERS = 2**27  # on an accelerator: half a gigabyte in float32, and every core busy
FEWEST_BLOCKS = 8  # for each device, below which it is not worth to spread them


def row_by_row(function: Callable, pred: Predictive, *settings):
    """`function(pred, *settings)` as one compiled program, in blocks of rows where the predictive is large.

    On a CPU with several devices each takes its share of the rows, which it reads where they are. Where rows lie on several
    devices already, each computes those that it has, without blocks.

    Args:
        function: `(predictive, *settings) -> pytree of arrays that begin with its batch shape`, row by row.
        pred: any predictive.
        settings: hashable; part of the program.

    Returns:
        What `function` would, to rounding, where the predictive is.
    """
    leaves = jax.tree.leaves(pred)
    if any(isinstance(x, Tracer) for x in leaves):
        return in_blocks(function, pred, *settings, numbers=numbers_at_once(jax.default_backend()))
    devices = {d for x in leaves if isinstance(x, jax.Array) for d in x.devices()}
    if len(devices) > 1:
        return _here(function, settings, None, pred)
    platform = next((d.platform for d in devices), jax.default_backend())
    numbers, cores = numbers_at_once(platform), jax.local_devices(backend="cpu")
    blocks = math.prod(pred.batch_shape) // rows_at_once(pred, numbers)
    alone = platform != "cpu" or jax.process_count() > 1 or blocks < FEWEST_BLOCKS * len(cores) or len(cores) == 1
    traced = isinstance(jnp.zeros(()), Tracer)  # inside jit all operations are, though the predictive is a constant
    if alone or traced or not jax.sharding.get_abstract_mesh().empty:
        return _here(function, settings, numbers, pred)
    # Twice as many: one device's threads share a block, and here each device has one.
    found = _on_all(function, settings, 2 * numbers, make_mesh(len(cores), devices=cores), pred)
    committed = [x for x in leaves if isinstance(x, jax.Array) and x.committed]
    return jax.device_put(found, committed[0].sharding.device_set.pop()) if committed else uncommitted(found)


def _on_all(function, settings, numbers, mesh: Mesh, pred):
    # The memory of a jax array on a CPU is aligned, and every device takes it as it is; numpy's own would be copied for each.
    everywhere = place(jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), pred), mesh)
    with on(mesh):
        found = _spread(function, settings, numbers, mesh, everywhere)
    return fetch(jax.block_until_ready(found))


def in_blocks(function: Callable, pred: Predictive, *settings, numbers: int):
    """`function(pred, *settings)`, a block of rows after another where the predictive is large; for use inside jit.

    Args:
        function: as in `row_by_row`.
        pred: any predictive.
        settings: passed on.
        numbers: how many of the predictive's go into a block.
    """
    rows, size = math.prod(pred.batch_shape), rows_at_once(pred, numbers)
    if rows <= size:
        return function(pred, *settings)
    flat = flatten_batch(pred)
    found = map_blocks(lambda first: function(rows_of(flat, first, size), *settings), rows, size)
    return jax.tree.map(lambda x: x.reshape(*pred.batch_shape, *x.shape[1:]), found)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _here(function, settings, numbers, pred):
    return function(pred, *settings) if numbers is None else in_blocks(function, pred, *settings, numbers=numbers)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _spread(function, settings, numbers, mesh: Mesh, pred):
    rows, devices = math.prod(pred.batch_shape), mesh.size
    share = -(-rows // devices)
    size = min(share, rows_at_once(pred, numbers))

    def own(pred):
        start = jnp.minimum(jax.lax.axis_index("member") * share, rows - share)  # the last share reaches back
        return map_blocks(lambda first: function(rows_of(pred, first, size), *settings), share, size, start)

    spread = PartitionSpec(("member", "data"))
    found = jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(), out_specs=spread, check_vma=False)(
        flatten_batch(pred)
    )
    before, again = (devices - 1) * share, devices * share - rows
    joined = jax.tree.map(lambda x: jnp.concatenate([x[:before], x[before + again :]]) if again else x, found)
    return jax.tree.map(lambda x: x.reshape(*pred.batch_shape, *x.shape[1:]), joined)


def numbers_at_once(platform: str) -> int:
    """How many numbers of a predictive go into one block."""
    return CACHE_NUMBERS if platform == "cpu" else MEMORY_NUMBERS


def rows_at_once(pred: Predictive, numbers: int) -> int:
    """Rows of about so many numbers: a power of two, at least two (of a single one XLA makes much slower code on a CPU)."""
    each = sum(x.size for x in jax.tree.leaves(pred)) // max(1, math.prod(pred.batch_shape))
    return 2 ** max(1, (numbers // max(1, each)).bit_length() - 1)


def map_blocks(function: Callable, rows: int, size: int, start: jax.Array | int = 0):
    """function(first row of a block) -> pytree of arrays (size, ...), joined to (rows, ...); the last block reaches back.

    Args:
        function: of a traced whole number.
        rows: how many, at least `size`.
        size: of a block.
        start: the first row of all, added to each block's.
    """
    shapes = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    found = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), shapes)

    def step(found, first):
        first = jnp.minimum(first, rows - size)
        own = function(start + first)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)
        return jax.tree.map(put, found, own), None

    return jax.lax.scan(step, found, jnp.arange(0, rows, size))[0]


def flatten_batch(pred: Predictive) -> Predictive:
    """The same with one batch axis."""
    count, batch = len(pred.batch_shape), pred.batch_shape

    def flat(x):
        if x.ndim == 1:
            return x
        if x.shape[1 : 1 + count] != batch:  # member weights with ones where they do not vary
            x = jnp.broadcast_to(x, (x.shape[0], *batch, *x.shape[1 + count :]))
        return x.reshape(x.shape[0], -1, *x.shape[1 + count :])

    return pred if count == 1 else jax.tree.map(flat, pred)


def rows_of(pred: Predictive, first, size: int) -> Predictive:
    """`size` rows of the first batch axis from a traced one on."""
    whole = pred.batch_shape[0]
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 1) if x.ndim > 1 and x.shape[1] == whole else x
    return jax.tree.map(cut, pred)
