"""`fit`: the loop over epochs, on the host; everything inside an epoch is a program of `member.py`."""

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bayescal.checkpoint import Checkpoint, facts
from bayescal.methods.experiments import Runners, runner_keys, runner_start, runners
from bayescal.metrics import nll
from bayescal.sharding import (
    Execution,
    check_mesh,
    default_execution,
    default_mesh,
    fetch_numpy,
    on,
    place,
    resize,
    round_up,
    run_members,
)
from bayescal.train.forms import choose
from bayescal.train.member import BLOCK, Plan, Runner, advance, begin, finish, several_epochs, shuffle, traced_once
from bayescal.train.predict import check_state
from bayescal.train.progress import Progress
from bayescal.train.result import result
from bayescal.train.resume import Resumable
from bayescal.train.rows import Stacked, check_schedule, own_weights, separate, stack
from bayescal.train.stream import resident, stream_epoch
from bayescal.types import Batch, Dataset, EnsembleState, Fit, Key, Method, Metric, PyTree

# Words folded into a member's key, one a purpose, so that no two uses share a stream: users fold in small numbers.
_INIT, _TRAIN, _VALIDATE = 0x494E4954, 0x54524149, 0x56414C49
VALIDATION_ROWS = 8192  # that go through a network at a time
BLOCK_SECONDS = (
    0.25  # of epochs that run as one program: starting one costs about a millisecond, and the line wants news
)


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

    Member m of an ensemble trains as the lone method would with the key `fold_in(key, m)`, to the bit under "map", else to
    rounding; its epoch e shuffles with a key folded with e. The last batch of an epoch is filled up with other rows at
    weight 0: they add nothing to the loss, but batch norm's statistics do see them. A member whose loss or state stops
    being finite, or whose mean loss of an epoch exceeds 1000 times that of its first batch (taken as 0.01 where it is
    nearer to zero), is frozen there, reported, and weighs nothing in predictions; the others do not notice.

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
        score: metric of the validation rows, by its own direction (`Metric.better`); None = `nll()`.
        patience: epochs without a better validation score after which a member stops; None = never.
        start: passed to the method's `init`: `Variables` or a trained state (`fitted.state`); for an ensemble its own
            state, or one start for all members.
        checkpoint: folder, or `Checkpoint`, to save to after every epoch and, where it holds checkpoints of this very
            training, to go on from: to the same bits, on the same number of devices, as if it had never been killed.
        execution: how members run on a device, see `bayescal.sharding.run_members`; None = on CPU "map", and "vmap" for
            four or more tiny dense networks a device; elsewhere "vmap", in groups of as many as fit.
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
    check_mesh(mesh)
    _check_control(score, patience, validation)
    mesh = mesh or default_mesh(apart.number)
    plan = Plan(
        int(train.rows), int(batch_size), score or nll(), patience, held_out.rows if held_out else 0, VALIDATION_ROWS
    )
    width = round_up(apart.number, 1 if mesh is None else mesh.shape["member"])
    starts = runner_start(method, start)
    init_keys, runner = _runners(apart, runner_keys(method, key), train, held_out)
    _check_targets(apart, init_keys, starts, train, "targets")
    if held_out is not None:
        _check_targets(apart, init_keys, starts, held_out, "validation.targets")
    saving = checkpoint if isinstance(checkpoint, Checkpoint | None) else Checkpoint(checkpoint)
    earlier = {} if saving is None else facts(saving.folder).get("forms", {})
    forms = choose(
        apart,
        train,
        plan,
        mesh,
        width,
        init_keys,
        starts,
        stream=stream,
        execution=execution,
        earlier=earlier,
        estimate=progress,
    )

    alive = np.zeros(width, bool)  # what fills up the devices never trains
    alive[: apart.number] = np.asarray(start.alive).ravel() if isinstance(start, EnsembleState) else True
    filled = resize((apart.settings, runner, init_keys, starts), width)
    settings, own, *begin_own = place((*filled, alive), mesh, "member")
    rows = place(resident(train, forms.block is not None), mesh)
    validation_rows = None if held_out is None else place(separate(held_out), mesh)
    begin_with = tuple(begin_own), (_example(train, plan),)

    def run(function, own, shared=(), execution=forms.execution):
        return _run(function, plan, apart.build, execution, settings, own, shared)

    form = "map" if forms.execution == "map" else default_execution(mesh)  # side by side it compiles slower on CPU
    begin_all = partial(run, begin, execution=form)

    def train_epochs(carry, first: int, number: int):
        """`number` epochs from `first` on: their carry, and info (member, epoch)."""
        if forms.block is None:
            return run(several_epochs, (carry, own), (first, number, rows, validation_rows))
        steps, step_keys = run(shuffle, (own,), (first,))
        parts = stream_epoch(train, np.asarray(runner.data), steps, forms.block, mesh)
        for done_parts, part in enumerate(parts, 1):
            carry = run(advance, (carry, own, part, step_keys), (rows,))
            line.block(done_parts)
        carry, info = run(finish, (carry, own), (first, validation_rows))
        return carry, jax.tree.map(lambda x: x[:, None], info)

    with on(mesh):
        carry: Any = jax.eval_shape(begin_all, *begin_with)
        steps, step_keys = jax.eval_shape(partial(run, shuffle), (own,), (0,))
    with contextlib.ExitStack() as contexts:
        saved = None
        if saving is not None:
            first = (settings, carry, own, steps, step_keys)
            identity = {
                **_identity(apart, epochs, batch_size, patience, plan, execution, stream, key, start),
                **{"data": data, "validation": validation, "resample": runner.weights},
                "program": _program(plan, apart.build, first, (train.data, validation_rows)),
            }
            saved = contexts.enter_context(Resumable(saving, identity, carry, mesh, forms.record()))
        done, carry, history = (saved and saved.resume(apart.number)) or (0, None, [])
        blocks = 1 if forms.block is None else -(-plan.steps // forms.block)
        line = contexts.enter_context(Progress(epochs, apart.number, plan.steps, done, progress, blocks))
        if forms.memory is not None and progress:
            line.say(forms.memory.sentence())
        contexts.enter_context(on(mesh))
        carry = begin_all(*begin_with) if carry is None else carry
        seconds = {"first_epoch": 0.0, "later_epochs": 0.0, "epochs": 0}
        began = last = time.perf_counter()
        most = 1 if forms.block is not None or jax.process_count() > 1 else BLOCK
        epoch, size, running = done, 1, None  # size: epochs of the next program
        while epoch < epochs and (not history or history[-1]["training"].any()):
            number = min(size, epochs - epoch, saved.until_due(epoch) if saved else epochs)
            carry, info = train_epochs(carry, epoch, number)
            before, running = running, (info, number)
            epoch, seconds["epochs"] = epoch + number, seconds["epochs"] + number
            told = _told(before)  # by the program before, while this one runs
            first = epoch == done + number
            if first or (saved and saved.due(epoch)):
                told, running = told + _told(running), None
            history += told
            if saved and saved.due(epoch):
                saved.save(carry, history)
            if told and epoch < epochs:
                line.update(len(history), history[-1:])
                now = time.perf_counter()
                size = max(1, min(most, 2 * size, int(BLOCK_SECONDS * len(told) / (now - last))))
                last = now
            if first:
                seconds["first_epoch"] = time.perf_counter() - began
        history += _told(running)
        line.update(len(history), history[-1:], over=True)
        if saved:
            saved.save(carry, history)
        jax.block_until_ready(carry)
        seconds["later_epochs"] = time.perf_counter() - began - seconds["first_epoch"]
    ensembled = len(apart.shape) == 2 or method.members is not None
    return result(apart, ensembled, carry, history, seconds, mesh)


def _told(block: tuple[dict, int] | None) -> list[dict]:
    """Each epoch's info, numpy arrays (member,), of the block (info, number of epochs) once it is over."""
    if block is None:
        return []
    info, number = fetch_numpy(block[0]), block[1]
    return [{k: v[:, i].copy() for k, v in info.items()} for i in range(number)]  # not views: the block is larger


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


def _runners(apart: Runners, keys, train: Stacked, held_out: Stacked | None) -> tuple[Key, Runner]:
    """Each member's key for init, and what it keeps for itself; on the host or one device."""
    init_keys, train_keys, validate_keys = _purposes(keys)
    each = lambda stacked: np.repeat(stacked.which, apart.number // len(stacked.which))
    which = each(train)
    weights: Any = () if apart.resample is None else own_weights(apart.resample, keys, train, which)
    validation = np.zeros_like(which) if held_out is None else each(held_out)
    return init_keys, Runner(train_keys, validate_keys, which, validation, weights)


def _example(train: Stacked, plan: Plan) -> Batch:
    """The first rows, for the shapes of a batch."""
    rows = jax.tree.map(lambda x: np.asarray(x[: plan.batch_size]), train.data)
    index = np.arange(plan.batch_size, dtype=np.int32)
    return Batch(rows.inputs, rows.targets, rows.weights, index, np.float32(plan.batch_size))


def _stack_both(data, validation, method) -> tuple[Stacked, Stacked | None]:
    number = None if method.experiments is None else method.experiments.number
    return stack(data, "data", number), None if validation is None else stack(validation, "validation", number)


def _identity(apart, epochs, batch_size, patience, plan, execution, stream, key, start) -> dict[str, Any]:
    """What must be the same for a training to be gone on with; of trees a digest is kept."""
    return {
        "epochs": int(epochs),
        "batch_size": int(batch_size),
        "patience": patience,
        "score": plan.score.convention,
        "execution": execution,
        "stream": stream,
        "members": list(apart.shape),
        "key": [str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()],
        "settings": apart.settings,
        "start": start,
    }


def _program(plan: Plan, build, first, data) -> str:
    """The text of one member's epoch and its end on one device: every number of network, loss, optimiser, score and order."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), data)

    def epoch(settings, carry, runner, steps, step_key, number, rows, validation):
        method = build(settings)
        carry = advance(plan, method, carry, runner, steps, step_key, rows)
        return finish(plan, method, carry, runner, number, validation), shuffle(plan, method, runner, number)

    return jax.jit(epoch).lower(*one, 0, *whole).as_text()


def _check_control(score, patience, validation) -> None:
    whole = isinstance(patience, int) and not isinstance(patience, bool) and patience >= 1
    if patience is not None and (validation is None or not whole):
        raise ValueError(
            f"`patience` must be a whole number of at least 1, with `validation` to score, got {patience!r} and "
            f"{'no ' if validation is None else ''}validation. Pass validation rows, or leave it out."
        )
    if score is not None and (validation is None or not isinstance(score, Metric)):
        raise ValueError(
            f"`score` must be a Metric such as `bc.brier()`, with `validation` to score, got {type(score).__name__} and "
            f"{'no ' if validation is None else ''}validation. Call the metric's builder, and pass validation rows."
        )


def _check_targets(apart: Runners, keys, starts, data: Stacked, name: str) -> None:
    """Asks the predictive that the first member would give whether it can score these targets."""

    try:
        pred = _first_predictive.eval_shape(apart.build, apart.settings, keys, starts, data.data.inputs)
    except _BRANCHES as error:
        raise _branch_error(error, apart.settings) from error
    try:
        pred.check_targets(data.data.targets)
    except ValueError as error:
        raise ValueError(str(error).replace("`targets`", f"`{name}`")) from None


@partial(jax.jit, static_argnums=0)
def _first_predictive(build, settings, keys, starts, inputs):
    first = jax.tree.map(lambda x: x[0], (settings, keys, starts))
    method = build(first[0])
    return method.predict(traced_once(method.init)(*first[1:]), inputs, None)
