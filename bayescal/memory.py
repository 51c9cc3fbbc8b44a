"""Memory that training and prediction need, estimated from shapes: nothing is compiled, computed or allocated."""

import os
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bayescal.liveness import abstract, peak_bytes, tree_bytes
from bayescal.types import Batch, Dataset, Method, PyTree

MOST_ROWS = 8192  # that go through a network at a time
CACHE = 2**23  # bytes of temporaries beyond which a core works the slower; measured with 1 MiB of L2 and 32 MiB of L3


class Memory(NamedTuple):
    """What training holds on one device, in bytes.

    parameters: one member's `params`; 0 where its state has no `variables`.
    state: one member's whole state, parameters and optimiser.
    activations: one member's batch and the temporaries of its update, gradients among them.
    data: the data on the device.
    members: how many members the device holds.
    concurrent: how many of them run side by side; 1 = one after another.
    copies: states held of each member: the old and the new; one more where the best is kept.
    """

    parameters: int
    state: int
    activations: int
    data: int
    members: int
    concurrent: int = 1
    copies: int = 2

    @property
    def total(self) -> int:
        """members * copies * state + concurrent * activations + data, in bytes."""
        return self.members * self.copies * self.state + self.concurrent * self.activations + self.data

    def sentence(self) -> str:
        """The total and its terms on one line, in MB (1e6 bytes)."""
        return (
            f"memory per device, estimated: {_megabytes(self.total)} = {self.members} members x {self.copies} copies x "
            f"{_megabytes(self.state)} (parameters {_megabytes(self.parameters)}) + activations {self.concurrent} x "
            f"{_megabytes(self.activations)} + data {_megabytes(self.data)}"
        )


def training_memory(
    method: Method,
    data: Dataset,
    batch_size: int,
    *,
    members: int = 1,
    concurrent: int = 1,
    start: PyTree | None = None,
) -> Memory:
    """Bytes that training needs on a device that holds `members` members and all of the data.

    The total is 0.8 to 1.05 times what the compiler says on CPU (arguments, results and temporaries) of an epoch of four
    members, one after another or side by side.

    Args:
        method: one member's method.
        data: rows, on the host; missing weights count as float32 ones.
        batch_size: rows an update.
        members: how many members the device holds.
        concurrent: how many of them run side by side.
        start: what each member's `init` starts from, as in `fit`.

    Raises:
        ValueError: for a method with members.
    """
    if method.members is not None:
        raise ValueError(
            f"`method` must be one member's, got an ensemble of {method.members.number}. "
            "Pass the method inside it, and `members`."
        )
    rows = jax.tree.leaves(data.targets)[0].shape[0]
    weights = np.broadcast_to(np.float32(1), rows) if data.weights is None else data.weights
    index = np.broadcast_to(np.int32(0), rows)
    batch = with_rows(Batch(data.inputs, data.targets, weights, index), batch_size)
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(method.init, key, start)
    params = state.variables.params if hasattr(state, "variables") else ()
    activations = tree_bytes(batch) + peak_bytes(method.update, state, batch, key)
    held = tree_bytes(data._replace(weights=weights))
    return Memory(tree_bytes(params), tree_bytes(state), activations, held, members, concurrent)


def device_budget(device: jax.Device | None = None, share: float = 0.8) -> int:
    """Bytes that may be used on a device: `share` of its limit, or of its part of the host's available memory.

    The limit is the backend's (GPU, TPU) and does not change within a run; CPU devices divide evenly what the host has
    available at the moment.

    Args:
        device: None = the first local one.
        share: in (0, 1]; the rest is for what estimates do not see.

    Raises:
        ValueError: for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must lie in (0, 1], got {share!r}. 0.8 leaves room for an estimate's error.")
    chosen = jax.local_devices()[0] if device is None else device
    limit = (chosen.memory_stats() or {}).get("bytes_limit")
    return int(share * (limit or _host_bytes() // jax.local_device_count(chosen.platform)))


def prediction_chunk(
    predict: Callable, state, inputs: PyTree, key: PyTree, *, budget: int, most: int = MOST_ROWS
) -> int:
    """The largest power of two of rows, at most `most`, whose inputs, temporaries and predictive stay in `budget`.

    Args:
        predict: a method's `predict`, `(state, inputs, key) -> Predictive`.
        state: its state; not counted.
        inputs: pytree of arrays (rows, ...), of which only the shapes of a row matter.
        key: random key of the draws, as an array or abstract, or None.
        budget: bytes.
        most: upper bound on the rows, at least 1.

    Raises:
        ValueError: where a single row does not fit, or for `most` below 1.
    """
    if most < 1:
        raise ValueError(f"`most` must be at least 1 row, got {most!r}. 8192 is the default.")

    traced = jax.jit(predict)  # remembers what it traced: shapes and temporaries take one look together

    def needed(rows: int) -> int:
        chunk = with_rows(inputs, rows)
        pred = jax.eval_shape(traced, state, chunk, key)
        return tree_bytes((chunk, pred)) + peak_bytes(traced, state, chunk, key)

    sizes = [2**n for n in range(most.bit_length())]
    if needed(sizes[-1]) <= budget:  # the rule: one look
        return sizes[-1]
    fitting = bisect_right(sizes, budget, key=needed)
    if not fitting:
        raise ValueError(
            f"`inputs` must fit into the budget of {_megabytes(budget)} one row at a time, got "
            f"{_megabytes(needed(1))} for a row. Predict with fewer members or draws at once, or on a larger device."
        )
    return sizes[fitting - 1]


def prediction_block(predict: Callable, state: PyTree, inputs: PyTree, key: PyTree) -> tuple[int, int]:
    """Least and most rows that should go through a network at a time on CPU: powers of two, from 64 to 8192.

    At the most the temporaries of the rows fill `CACHE`; larger ones made convolutional networks 1.3 to 1.9 times as slow.
    At the least they take as much as what is made or read anew whatever the rows, such as weights that are drawn or those
    of a member, and there are 64 rows, where products of matrices come near their full speed.

    Args:
        predict, state, inputs, key: as in `prediction_chunk`.
    """
    few, many = (peak_bytes(predict, state, with_rows(inputs, rows), key) for rows in (64, 128))
    of_row = max((many - few) / 64, 1)
    at_once = max(few - 64 * of_row, 0)
    rows = lambda size: min(max(int(size / of_row), 1), MOST_ROWS)
    least = max(64, 1 << (rows(at_once) - 1).bit_length())
    return least, max(least, 1 << (rows(CACHE).bit_length() - 1))


def member_chunk(memory: Memory, budget: int) -> int:
    """How many of `memory.members` may run side by side: the most whose activations fit beside all states and data.

    Args:
        memory: what `training_memory` gave for all members of the device; its `concurrent` does not matter.
        budget: bytes.

    Raises:
        ValueError: where not even one fits.
    """
    one = memory._replace(concurrent=1)
    if one.total > budget:
        raise ValueError(
            f"`memory` must fit into the budget of {_megabytes(budget)} with one member at a time, got "
            f"{_megabytes(one.total)} ({one.sentence()}). Take a smaller `batch_size`, fewer members or more devices."
        )
    return min(memory.members, 1 + (budget - one.total) // max(memory.activations, 1))


def with_rows(tree: PyTree, rows: int) -> PyTree:
    """Shapes and types of a pytree of arrays, with another length of their first axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), abstract(tree))


def _host_bytes() -> int:
    """Memory the host has available; on Linux with the page cache, which it gives back when asked."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e6:.2g} MB"
