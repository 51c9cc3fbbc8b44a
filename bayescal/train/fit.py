"""`fit`: the loop over epochs, on the host; everything inside an epoch is a program of `member.py`."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bayescal.checkpoint import Checkpoint
from bayescal.liveness import tree_bytes
from bayescal.memory import Memory, device_budget, member_chunk, training_memory
from bayescal.methods.experiments import Runners, runner_keys, runner_start, runners
from bayescal.metrics import nll
from bayescal.sharding import (
    Execution,
    default_execution,
    default_mesh,
    fetch_numpy,
    on,
    place,
    resize,
    round_up,
    run_members,
)
from bayescal.train.member import Plan, Runner, Steps, advance, begin, finish, shuffle
from bayescal.train.predict import check_state
from bayescal.train.progress import Progress
from bayescal.train.result import result
from bayescal.train.resume import Resumable
from bayescal.train.rows import Stacked, check_schedule, own_weights, separate, stack
from bayescal.train.stream import block_steps, resident, stream_epoch
from bayescal.types import (
    Batch,
    Dataset,
    EnsembleState,
    Fit,
    Key,
    Method,
    Metric,
    PyTree,
)

# Words folded into a member's key, one a purpose, so that no two uses share a stream: users fold in small numbers.
_INIT, _TRAIN, _VALIDATE = 0x494E4954, 0x54524149, 0x56414C49
VALIDATION_ROWS = 8192  # that go through a network at a time


def fit(
    method: Method,
    data: Dataset | list[Dataset],
    key: Key,
    *,
    epochs: int,
    batch_size: int,
    validation: Dataset | list[Dataset] | None = None,
    score: Metric | None = None,
    patience: int | None = None,
    start: PyTree | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    execution: Execution | None = None,
    mesh: Mesh | None = None,
    stream: int | None = None,
    progress: bool = True,
) -> Fit:
    """Trains a method: every member on its own shuffled batches, an epoch a program, whatever the devices.

    Member m of an ensemble trains as the lone method would with the key `fold_in(key, m)`; its epoch e shuffles with
    a key folded with e. The last batch of an epoch is filled up with other rows at weight 0: they add nothing to the
    loss, but batch norm's statistics do see them. A member whose loss or state stops being finite, or whose mean loss
    of an epoch exceeds 1000 times that of its first batch, is frozen there, reported, and weighs nothing in
    predictions; the others do not notice.

    Args:
        method: what to train.
        data: rows, moved to the device once, or kept on the host (numpy arrays, memory maps) and streamed; see
            `stream`. Weights count relative to their mean. For a method of `experiments` a list with each one's data,
            or one for all.
        key: random key; the same key gives the same result.
        epochs: passes over the data, at least 1.
        batch_size: rows an update, on all devices together, from 1 to the number of rows.
        validation: rows to score after every epoch: `validation_score` in the history (each member by itself, the same
            draws every epoch), and the state of each member's best epoch as `Fit.best`.
        score: of validation, lower = better; None = `nll()`, nats per example.
        patience: epochs without a better validation score after which a member stops; None = never.
        start: passed to the method's `init`: `Variables` or a trained state (`fitted.state`); for an ensemble its own
            state, or one start for all members.
        checkpoint: folder, or `Checkpoint`, to save to after every epoch and, where it holds checkpoints of this very
            training, to go on from: to the same bits, on the same number of devices, as if it had never been killed.
        execution: how members run on a device, see `bayescal.sharding.run_members`.
        mesh: devices, see `bayescal.sharding.make_mesh`; None = members spread over as many as there are.
        stream: steps whose rows are moved to the device at a time, while the data stay on the host; None = all data on
            the device where they fit, else as many steps as are reasonable. Needs the extra `bayescal[stream]`.
        progress: tell the memory that will be needed, and show a progress line with rates, time left and the members'
            losses; without a terminal, now and then a line of text.

    Returns:
        Fit: last and best state, history of arrays (epoch, member), how the members fared, and seconds.

    Raises:
        ValueError: for unusable data or settings, a checkpoint of another training, and where no member's state, last
            or best, is finite.
        TypeError: for data that are no Dataset, a `Fit` as a start, or settings that the method branches on.
    """
    apart = runners(method)
    train, held_out = _stack_both(data, validation, method)
    check_schedule(epochs, batch_size, train.rows)
    check_state("start", start)
    _check_patience(patience, validation)
    mesh = mesh or default_mesh(apart.number)
    keys, starts = runner_keys(method, key), runner_start(method, start)
    plan = Plan(
        train.rows, int(batch_size), score or nll(), patience, held_out.rows if held_out else 0, VALIDATION_ROWS
    )
    width = round_up(apart.number, 1 if mesh is None else mesh.shape["member"])

    block = block_steps(train, stream, width, plan.batch_size, plan.steps)
    memory = None
    if progress or (execution is None and default_execution(mesh) != "map"):
        memory = _memory(apart, train, plan, width // (1 if mesh is None else mesh.shape["member"]), starts, block)
    how = _execution(memory, mesh) if execution is None else execution

    def run(function, own, shared=(), by: Callable = _run):
        return by(function, plan, apart.build, how, settings, own, shared)

    init_keys, train_keys, validate_keys = _purposes(keys)
    own = _runners(apart, keys, train_keys, validate_keys, train, held_out)
    _check_targets(apart, init_keys, starts, train, "targets")
    if held_out is not None:
        _check_targets(apart, init_keys, starts, held_out, "validation.targets")
    alive = np.zeros(width, bool)  # what fills up the devices never trains
    alive[: apart.number] = np.asarray(start.alive).ravel() if isinstance(start, EnsembleState) else True
    spread = lambda tree: place(resize(tree, width), mesh, "member")
    which = np.asarray(resize(own.data, width))
    settings, own = spread(apart.settings), spread(own)
    first_rows = jax.tree.map(lambda x: np.asarray(x[:batch_size]), train.data)
    example = Batch(first_rows.inputs, first_rows.targets, first_rows.weights, np.arange(batch_size, dtype=np.int32))
    begin_with = (spread(init_keys), spread(starts), spread(alive)), (example,)

    with on(mesh):
        carry: Any = jax.eval_shape(partial(run, begin), *begin_with)
        rows = place(resident(train, block is not None), mesh)
        validation_rows = None if held_out is None else place(separate(held_out), mesh)

        with contextlib.ExitStack() as stack_:
            saved = None
            if checkpoint is not None:
                steps, step_keys = jax.eval_shape(partial(run, shuffle), (own,), (0,))
                if block is not None:
                    steps = _example_block(steps, train, block)
                program = run(advance, (carry, own, steps, step_keys), (rows,), _run.lower).as_text()
                identity = _identity(method, apart, epochs, batch_size, patience, score, execution, key, start)
                identity |= {"data": data, "validation": validation, "stream": block}
                saved = stack_.enter_context(Resumable(checkpoint, identity, carry, program, mesh))
            resumed = saved.resume(apart.number) if saved else None
            done = resumed[0] if resumed else 0
            parts = 1 if block is None else -(-plan.steps // block)
            line = stack_.enter_context(Progress(epochs, apart.number, plan.steps, done, progress, parts))
            if memory is not None:
                line.say(memory.sentence())
            first_epoch, carry, history = resumed or (0, run(begin, *begin_with), [])
            seconds = {"first_epoch": 0.0, "later_epochs": 0.0, "epochs": 0}
            began = time.perf_counter()
            for epoch in range(first_epoch, epochs):
                if epoch > first_epoch + 1:  # read the epoch before the last while the last one runs
                    history[-2] = fetch_numpy(history[-2])
                before = history[-1:] if epoch == first_epoch else history[-2:-1]
                if before and not before[0]["training"].any():
                    break
                line.update(epoch - (epoch > first_epoch), before)
                steps, step_keys = run(shuffle, (own,), (epoch,))
                blocks = [steps] if block is None else stream_epoch(train, which, steps, block, mesh)
                for number, part in enumerate(blocks, 1):
                    carry = run(advance, (carry, own, part, step_keys), (rows,))
                    line.block(number)
                carry, info = run(finish, (carry, own), (epoch, validation_rows))
                history.append(info)
                if saved and saved.due(epoch + 1):
                    history = fetch_numpy(history)
                    saved.save(carry, history)
                if epoch == first_epoch:
                    jax.block_until_ready(carry)
                    seconds["first_epoch"] = time.perf_counter() - began
                seconds["epochs"] += 1
            history = fetch_numpy(history)
            line.update(len(history), history[-1:], over=True)
            if saved:
                saved.save(carry, history)
            jax.block_until_ready(carry)
            seconds["later_epochs"] = time.perf_counter() - began - seconds["first_epoch"]
    ensembled = len(apart.shape) == 2 or method.members is not None
    return result(apart, ensembled, carry, history, seconds)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(function, plan, build, execution, settings, own, shared):
    """`function` of each member's method, its `own` arguments and the `shared` ones; equal functions compile once."""
    one = lambda s, *args: function(plan, build(s), *args)
    try:
        return run_members(one, settings, *own, shared=shared, execution=execution)
    except _BRANCHES as error:
        raise _branch_error(error, settings) from error


_BRANCHES = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


def _branch_error(error: Exception, settings) -> Exception:
    """What to tell of a method that branches in Python on a traced number: one of the settings, if there are any."""
    if not jax.tree.leaves(settings):
        return error
    return TypeError(
        "`settings` must be used arithmetically, got a method that branches in Python on one of them, or on what was "
        "computed from it: each is a traced number inside the member loop. Take a form that traces, such as "
        "`bc.schedules.warmup_cosine` or `bc.models.dropout_layer`, or fix the value outside `settings`. "
        f"Where: {str(error).strip().splitlines()[0]}"
    )


@jax.jit
def _purposes(keys):
    """Each member's keys for init, training and validation."""
    return tuple(jax.vmap(partial(jax.random.fold_in, data=word))(keys) for word in (_INIT, _TRAIN, _VALIDATE))


def _runners(apart: Runners, keys, train_keys, validate_keys, train: Stacked, held_out: Stacked | None) -> Runner:
    """What each member keeps for itself, on the host or one device."""
    per_experiment = apart.number // len(train.which) if len(train.which) > 1 else apart.number
    which = np.repeat(train.which, per_experiment)
    weights: Any = () if apart.resample is None else own_weights(apart.resample, keys, train, which)
    validation = (
        np.zeros_like(which) if held_out is None else np.repeat(held_out.which, apart.number // len(held_out.which))
    )
    return Runner(train_keys, validate_keys, which, validation, weights)


def _stack_both(data, validation, method) -> tuple[Stacked, Stacked | None]:
    number = None if method.experiments is None else method.experiments.number
    return stack(data, "data", number), None if validation is None else stack(validation, "validation", number)


def _memory(apart: Runners, train: Stacked, plan: Plan, members: int, starts, block: int | None) -> Memory:
    """What training needs on a device, estimated."""
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


def _execution(memory: Memory | None, mesh: Mesh | None) -> Execution:
    """The backend's form; side by side only as many members as fit."""
    how = default_execution(mesh)
    if how == "map" or memory is None:
        return how
    fitting = member_chunk(memory, device_budget())
    return how if fitting >= memory.members else fitting


def _example_block(steps, train: Stacked, block: int):
    """The abstract first block of an epoch that streams."""
    cut = lambda x: jax.ShapeDtypeStruct((x.shape[0], block, *x.shape[2:]), x.dtype)
    rows = lambda x: jax.ShapeDtypeStruct(
        (*steps.index.shape[:1], block, *steps.index.shape[2:], *x.shape[1:]), x.dtype
    )
    parts = jax.tree.map(rows, (train.data.inputs, train.data.targets))
    return Steps(*(cut(x) for x in (steps.number, steps.index, steps.padding)), *parts)


def _identity(method, apart, epochs, batch_size, patience, score, execution, key, start) -> dict[str, Any]:
    """What must be the same for a training to be gone on with."""
    return {
        "epochs": int(epochs),
        "batch_size": int(batch_size),
        "patience": patience,
        "score": (score or nll()).convention,
        "execution": execution,
        "members": list(apart.shape),
        "resample": None if apart.resample is None else getattr(apart.resample, "__name__", str(apart.resample)),
        "key": [str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()],
        "settings": apart.settings,
        "start": start,
    }


def _check_patience(patience, validation) -> None:
    if patience is not None and (validation is None or not isinstance(patience, int) or patience < 1):
        raise ValueError(
            f"`patience` must be a whole number of at least 1, with `validation` to score, got {patience!r} and "
            f"{'no ' if validation is None else ''}validation. Pass validation rows, or leave it out."
        )


def _check_targets(apart: Runners, keys, starts, data: Stacked, name: str) -> None:
    """Asks the predictive that the first member would give whether it can score these targets."""

    def predictive(settings, keys, starts):
        first = jax.tree.map(lambda x: x[0], (settings, keys, starts))
        method = apart.build(first[0])
        return method.predict(method.init(*first[1:]), data.data.inputs, None)

    try:
        pred = jax.eval_shape(predictive, apart.settings, keys, starts)
    except _BRANCHES as error:
        raise _branch_error(error, apart.settings) from error
    try:
        pred.check_targets(data.data.targets)
    except ValueError as error:
        raise ValueError(str(error).replace("`targets`", f"`{name}`")) from None
