"""A function of rows, block by block inside one program: activations stay in the cache, and few sizes are compiled."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bayescal.memory import with_rows
from bayescal.sharding import fetch, round_up
from bayescal.types import PyTree

FEW, MANY = 4, 16  # blocks: of fewer too much of the last may be for nothing; no more for that reason alone


class Results(NamedTuple):
    """What a function gives, leaf by leaf, and along which axis of each its rows are; None = the same for any rows."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    axes: tuple[int | None, ...]

    def leaf_of(self, number: int, rows: int) -> jax.ShapeDtypeStruct:
        """Shape and type of a leaf for that many rows."""
        leaf, axis = self.leaves[number], self.axes[number]
        shape = leaf.shape if axis is None else (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)


class Sizes(NamedTuple):
    """Rows that a device has room for in a call, and those that go through the function at a time, which divide them."""

    capacity: int
    block: int


class Share(NamedTuple):
    """Rows of one call: `number` from `first` on, of which each device has the next `each`."""

    first: int
    number: int
    each: int


def results_of(function: Callable, state: PyTree, inputs: PyTree, key: PyTree) -> Results:
    """Looks at two numbers of rows: the axis whose length differs is that of the rows. Nothing is computed."""
    few, many = (jax.eval_shape(function, state, with_rows(inputs, rows), key) for rows in (64, 128))
    leaves, structure = jax.tree.flatten(few)

    def row_axis(a, b):
        return next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)

    return Results(structure, tuple(leaves), tuple(map(row_axis, leaves, jax.tree.leaves(many))))


def choose_sizes(rows: int, chunk: int, least: int, most: int) -> Sizes:
    """Room for `rows` rows: few go through at once, filled up by a quarter at most; more in blocks, the last of them too.

    From a power of two to the next there are at most four sizes of few rows, and one of many.

    Args:
        rows: of a device, at most `chunk`.
        chunk: rows that may go through at once.
        least, most: bounds on the rows of a block, powers of two.
    """
    if rows <= FEW * least:
        capacity = min(round_up(rows, max((1 << rows.bit_length()) // 8, 1)), chunk)
        return Sizes(capacity, capacity)
    capacity = 1 << (rows - 1).bit_length()
    block = min(max(capacity // MANY, least), most)
    return Sizes(min(capacity, round_up(chunk, block)), block)


def in_blocks(function: Callable, results: Results, sizes: Sizes, state, inputs, key, count) -> list[jax.Array]:
    """The leaves of `function(state, inputs, key)`, of which the first `count` blocks of rows are computed.

    On a mesh with a data axis each of its devices has rows of its own, and no device talks to another.

    Args:
        function: pure; a row's result does not depend on the rows beside it.
        results: what it gives.
        sizes: of each device.
        state, key: whole, on every device.
        inputs: (data devices * capacity, ...).
        count: blocks of each device; the rows after them come out as zeros.
    """

    def run(state, inputs, key, count):
        if sizes.block == sizes.capacity:
            return jax.tree.leaves(function(state, inputs, key))

        def one(number, whole):
            first = number * sizes.block
            block = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, sizes.block), inputs)
            put = lambda w, x, axis: x if axis is None else jax.lax.dynamic_update_slice_in_dim(w, x, first, axis)
            return list(map(put, whole, jax.tree.leaves(function(state, block, key)), results.axes))

        room = [results.leaf_of(i, sizes.capacity) for i in range(len(results.axes))]
        return jax.lax.fori_loop(0, count, one, [jnp.zeros(x.shape, x.dtype) for x in room])

    mesh = jax.sharding.get_abstract_mesh()
    shape = dict(mesh.shape)
    if shape.get("data", 1) > 1:
        on_rows = lambda axis: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")
        run = jax.shard_map(
            run,
            in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
            out_specs=list(map(on_rows, results.axes)),
            axis_names={"data"} if shape.get("member", 1) > 1 else set(mesh.axis_names),
            check_vma=False,
        )
    return run(state, inputs, key, count)


def shares(rows: int, each: int, devices: int) -> list[Share]:
    """Calls for all rows, of `each` rows a device, and of the last what is left, divided evenly."""
    firsts = range(0, rows, each * devices)
    numbers = [min(each * devices, rows - first) for first in firsts]
    return [Share(first, number, -(-number // devices)) for first, number in zip(firsts, numbers, strict=True)]


def lay_out(inputs: PyTree, share: Share, devices: int, capacity: int) -> PyTree:
    """The rows of a call as its devices have them, (devices * capacity, ...) on the host; others fill up their room."""
    index = share.each * np.arange(devices)[:, None] + np.arange(capacity)
    index = share.first + index.ravel() % share.number
    return jax.tree.map(lambda x: np.asarray(x)[index], inputs)


def fill_up(inputs: PyTree, share: Share, devices: int, capacity: int) -> PyTree:
    """`lay_out` for one device, wherever the rows are: they stay there."""
    if share.first == 0 and share.number == capacity == jax.tree.leaves(inputs)[0].shape[0]:
        return inputs
    index = share.first + np.arange(capacity) % share.number
    return jax.tree.map(lambda x: x[index], inputs)


def concatenate(calls: list[tuple[Share, list[jax.Array]]], results: Results) -> PyTree:
    """`join` for one device, whose results stay there."""

    def whole(leaves, axis):
        if axis is None:
            return leaves[-1]
        counted = zip(leaves, calls, strict=True)
        parts = [jax.lax.slice_in_dim(leaf, 0, share.number, axis=axis) for leaf, (share, _) in counted]
        return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]

    columns = zip(*(leaves for _, leaves in calls), strict=True)
    return jax.tree.unflatten(results.structure, list(map(whole, columns, results.axes)))


def join(calls: list[tuple[Share, list[jax.Array]]], results: Results, rows: int, capacity: int) -> PyTree:
    """What the function gives for all rows, on one device, from what calls gave for theirs, wherever it is.

    Put together on the host, where other numbers of rows compile no other programs.
    """
    joined = [np.empty(x.shape, x.dtype) for x in (results.leaf_of(i, rows) for i in range(len(results.axes)))]
    for share, leaves in calls:
        for whole, leaf, axis in zip(joined, leaves, results.axes, strict=True):
            leaf = leaf if leaf.is_fully_addressable else fetch(leaf)
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    _copy(whole, shard, axis, share, capacity)
    return jax.tree.unflatten(results.structure, jax.device_put(joined))


def _copy(whole: np.ndarray, shard, axis: int | None, share: Share, capacity: int) -> None:
    """Of a part of a call's leaf, however that is divided, what counts goes to where it belongs."""
    part, place = np.asarray(shard.data), list(shard.index)
    if axis is None:
        whole[tuple(place)] = part
        return
    start = place[axis].start or 0
    end = start + part.shape[axis]
    for device in range(start // capacity, -(-end // capacity)):
        room, first = capacity * device, share.each * device
        low, high = max(start, room), min(end, room + min(share.each, share.number - first))
        if low < high:
            place[axis] = slice(share.first + first + low - room, share.first + first + high - room)
            whole[tuple(place)] = part[(*[slice(None)] * axis, slice(low - start, high - start))]
