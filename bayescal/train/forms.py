"""How a training will run on a device: streamed or not, members one after another or side by side; and its memory."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bayescal.liveness import tree_bytes
from bayescal.memory import Memory, device_budget, member_chunk, training_memory
from bayescal.methods.experiments import Runners
from bayescal.sharding import Execution, agree, default_execution
from bayescal.train.member import Plan, traced_once
from bayescal.train.rows import Stacked
from bayescal.train.stream import block_steps
from bayescal.types import Dataset

# On CPU members run one after another, but for tiny dense networks, whose steps cost as much as they have operations.
# Measured on two cores, Adam, batches of 32: with 552 or 3,102 parameters side by side is 0.7 x as fast for one member a
# device, 1.0 for two, 0.9 to 1.15 for three (another loss, another winner), 1.2 for four, 1.3 to 1.6 for ten and more; with
# 10^7 operations a step it is slower.
FEW = 4  # members a device
TINY = 3e5  # numbers in a member's state x rows of a batch


class Forms(NamedTuple):
    """block: steps whose rows stream in at a time, None = all data on the device. execution: see `run_members`.
    memory: the estimate, where one was made."""

    block: int | None
    execution: Execution
    memory: Memory | None

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run that is gone on with takes the same forms."""
        return {"block": self.block, "execution": self.execution}


def choose(
    apart: Runners,
    train: Stacked,
    plan: Plan,
    mesh: Mesh | None,
    width: int,
    init_keys,
    starts,
    *,
    stream: int | None,
    execution: Execution | None,
    earlier: dict[str, Any],
    estimate: bool,
) -> Forms:
    """What was asked for, else what an earlier process of this training took, else what fits and is fastest.

    Args:
        apart, train, plan, mesh, init_keys, starts: of the training.
        width: runners, with those that only fill up the devices.
        stream, execution: as given to `fit`.
        earlier: the forms that are on record.
        estimate: make the estimate of memory even where no form depends on it.
    """
    per_device = width // (1 if mesh is None else mesh.shape["member"])
    if stream is None and "block" in earlier:
        block = earlier["block"]
    else:
        block = block_steps(train, stream, width, plan.batch_size, plan.steps)
        block = agree(block or 0) or None
    if execution is None:
        execution = earlier.get("execution")
    how = default_execution(mesh) if execution is None else execution
    free = execution is None and how != "map"
    if execution is None and jax.default_backend() == "cpu" and _shares_no_rows(mesh) and per_device >= FEW:
        how = "vmap" if _is_tiny(apart, train, plan.batch_size, per_device, init_keys, starts) else "map"
    memory = None
    if estimate or free:
        memory = _memory(apart, train, plan, per_device, starts, block)
    if free and memory is not None:
        how = agree(_side_by_side(memory))
        how = "map" if how == 1 else "vmap" if how >= per_device else how
    if memory is not None:
        beside = per_device if how == "vmap" else how
        memory = memory._replace(concurrent=beside if isinstance(beside, int) else 1)
    return Forms(block, how, memory)


def _shares_no_rows(mesh: Mesh | None) -> bool:
    return mesh is None or mesh.shape.get("data", 1) == 1


def _is_tiny(apart: Runners, train: Stacked, batch_size: int, members: int, init_keys, starts) -> bool:
    """Whether members have little to compute and no convolution, and fit side by side, to judge by shapes alone.

    A dense network has at most as many activations a row as numbers in its state; one that uses its weights for every
    number of a row, so many times that. Tracing an estimate would take longer than a small training.
    """

    def begin(*of_all):
        settings, key, start = jax.tree.map(lambda x: x[0], of_all)
        return traced_once(apart.build(settings).init)(key, start)

    state = jax.tree.leaves(jax.eval_shape(begin, apart.settings, init_keys, starts))
    work = sum(x.size for x in state) * batch_size
    most = 4 * work * members * sum(int(np.prod(x.shape[1:])) for x in jax.tree.leaves(train.data.inputs))
    return work <= TINY and all(x.ndim <= 2 for x in state) and bool(most <= device_budget())


def _side_by_side(memory: Memory) -> int:
    """How many members fit side by side; 1 where by the estimate not even one does: estimates err, a try does not."""
    budget = device_budget()
    return 1 if memory._replace(concurrent=1).total > budget else member_chunk(memory, budget)


def _memory(apart: Runners, train: Stacked, plan: Plan, members: int, starts, block: int | None) -> Memory:
    first = jax.tree.map(lambda x: x[0], (apart.settings, starts))
    data = Dataset(train.data.inputs, train.data.targets, train.data.weights)
    memory = training_memory(apart.build(first[0]), data, plan.batch_size, members=members, start=first[1])
    if plan.validation_rows:
        memory = memory._replace(copies=3)
    if block is None:
        return memory
    rows = jax.tree.map(lambda x: x[:1], (data.inputs, data.targets))
    held = 2 * members * block * plan.batch_size * tree_bytes(rows)  # one in use, one on its way
    return memory._replace(data=held + train.data.weights.nbytes)
