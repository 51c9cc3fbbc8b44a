"""The training of one member as pure functions of its carry: what every execution, device count and resume runs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.sharding import over_data
from bayescal.train.shuffle import permutation
from bayescal.types import REASONS, Array, Batch, Key, Method, Metric, PyTree

TRAINING, STOPPED_EARLY, LOSS_NOT_FINITE, STATE_NOT_FINITE, LOSS_TOO_HIGH, EXCLUDED = range(len(REASONS))
EXPLODED = 1e3  # an epoch loss above so many times the first batch's has diverged
BLOCK = 64  # epochs that one program can hold the info of
LEAST_FIRST = 1e-2  # nats: a first loss nearer to zero counts as this much, since a loss may start at or below zero


FLAGS = ("trained", "training", "alive")  # of an epoch's info: made an update, goes on, counts in predictions


class Plan(NamedTuple):
    """What is fixed for a whole training and known to the compiler."""

    rows: int
    batch_size: int
    score: Metric  # of validation
    patience: int | None
    validation_rows: int
    chunk_size: int  # validation rows that go through the network at a time

    @property
    def steps(self) -> int:
        """Updates an epoch."""
        return -(-self.rows // self.batch_size)


class Sums(NamedTuple):
    """Of the epoch so far: rows seen, and the sum of each entry of `update`'s info over them."""

    rows: jax.Array
    info: dict[str, jax.Array]


class Carry(NamedTuple):
    """One member's training so far: everything that decides how it goes on, and so what a checkpoint holds."""

    state: PyTree
    best: PyTree  # () without validation
    best_score: jax.Array  # its sign such that lower = better; infinite before the first
    best_epoch: jax.Array  # -1 before the first
    status: jax.Array  # place in `REASONS`
    stopped_epoch: jax.Array  # -1 while it trains
    updates: jax.Array
    first_loss: jax.Array  # of the first batch; NaN before
    last_loss: jax.Array  # the last that was finite
    sums: Sums


class Runner(NamedTuple):
    """What a member keeps for itself and never changes.

    data, validation: which of the data sets it trains on, and is scored on.
    weights: (rows,) of the rows it drew for itself, or () where it takes the data's.
    """

    train_key: Key
    validate_key: Key
    data: Array
    validation: Array
    weights: Any


class Rows(NamedTuple):
    """Data sets on the device, one after another on the row axis; inputs and targets are None where they stream in."""

    inputs: Any
    targets: Any
    weights: Array


class Steps(NamedTuple):
    """The batches of a block of steps; leaves have a leading step axis.

    number: place in the epoch. index: row of the data set. padding: 0 where a row only fills up. inputs, targets: the
    rows themselves where they stream in, else None.
    """

    number: Any
    index: Any
    padding: Any
    inputs: Any = None
    targets: Any = None


def begin(plan: Plan, method: Method, key: Key, start: PyTree, alive: jax.Array, example: Batch) -> Carry:
    """The carry before the first epoch; `example` is a batch of abstract rows, for the names in `update`'s info."""
    state = traced_once(method.init)(key, start)
    info = jax.eval_shape(traced_once(method.update), state, example, key)[1]
    for name, value in info.items():
        if value.shape != ():
            raise ValueError(
                f"`info` of an update must be scalars, got {name!r} of shape {value.shape}. Return its mean, or one entry "
                "for each number."
            )
    nan = jnp.array(jnp.nan, jnp.float32)
    return Carry(
        state=state,
        best=state if plan.validation_rows else (),
        best_score=jnp.array(jnp.inf, jnp.float32),
        best_epoch=jnp.array(-1, jnp.int32),
        status=jnp.where(alive, TRAINING, EXCLUDED).astype(jnp.int32),
        stopped_epoch=jnp.where(alive, -1, 0).astype(jnp.int32),
        updates=jnp.array(0, jnp.int32),
        first_loss=nan,
        last_loss=nan,
        sums=_no_sums({name: jnp.zeros((), jnp.float32) for name in info}),
    )


def shuffle(plan: Plan, method: Method, runner: Runner, epoch: jax.Array) -> tuple[Steps, Key]:
    """The batches of an epoch, and the key of its steps: both come from the epoch's number alone."""
    order_key, step_key = jax.random.split(jax.random.fold_in(runner.train_key, epoch))
    order = permutation(order_key, plan.rows)
    places = jnp.arange(plan.steps * plan.batch_size).reshape(plan.steps, plan.batch_size)
    padding = (places < plan.rows).astype(jnp.float32)
    return Steps(jnp.arange(plan.steps), order[places % plan.rows].astype(jnp.int32), padding), step_key


def advance(plan: Plan, method: Method, carry: Carry, runner: Runner, steps: Steps, step_key: Key, rows: Rows) -> Carry:
    """One update a batch for as long as the loss is finite; a member that has stopped makes none.

    A loop with a condition, so that freezing costs a member nothing that trains. In it stands what has to: on CPU a step of
    a small network takes as long as its number of operations, and the rest is done for all steps at once.
    """
    seen, weights = steps.padding.sum(1), _weights(plan, runner, steps, rows)
    number = steps.number.shape[0]
    number_if_training = jnp.where(carry.status == TRAINING, number, 0)
    update = traced_once(method.update)

    def step(at):
        place, state, _, told = at
        given, own = jax.tree.map(partial(_entry, place), (steps, weights))
        state, info = update(state, _batch(plan, runner, given, own, rows), jax.random.fold_in(step_key, given.number))
        info = {k: jnp.asarray(info[k], jnp.float32) for k in told}
        told = {k: jax.lax.dynamic_update_index_in_dim(v, info[k], place, 0) for k, v in told.items()}
        return place + 1, state, jnp.isfinite(info["loss"]), told

    goes_on = lambda at: (at[0] < number_if_training) & at[2]
    start = jnp.int32(0), carry.state, jnp.bool(True), {k: jnp.zeros(number, jnp.float32) for k in carry.sums.info}
    made, state, finite, told = jax.lax.while_loop(goes_on, step, start)
    sums = Sums(seen, {k: seen * v for k, v in told.items()})
    sums = jax.tree.map(lambda total, x: total + jnp.where(jnp.arange(number) < made, x, 0).sum(), carry.sums, sums)
    sound = jnp.where(finite, made, made - 1)  # updates with a finite loss: all, or all but the last
    first, last = told["loss"][0], _entry(jnp.maximum(sound - 1, 0), told["loss"])
    return carry._replace(
        state=state,
        status=jnp.where(finite, carry.status, LOSS_NOT_FINITE),
        updates=carry.updates + sound,
        first_loss=jnp.where((carry.updates == 0) & (made > 0), first, carry.first_loss),
        last_loss=jnp.where(sound > 0, last, carry.last_loss),
        sums=sums,
    )


def several_epochs(
    plan: Plan,
    method: Method,
    carry: Carry,
    runner: Runner,
    first: jax.Array,
    number: jax.Array,
    rows: Rows,
    validation: Rows | None,
) -> tuple[Carry, dict[str, jax.Array]]:
    """`number` epochs, at most `BLOCK`, from epoch `first` on; and their info, (BLOCK,) of which as many entries count."""

    def one(place, at):
        carry, told = at
        epoch = first + place
        steps, step_key = shuffle(plan, method, runner, epoch)
        carry = advance(plan, method, carry, runner, steps, step_key, rows)
        carry, info = finish(plan, method, carry, runner, epoch, validation)
        return carry, {k: jax.lax.dynamic_update_index_in_dim(told[k], v, place, 0) for k, v in info.items()}

    names = {**carry.sums.info, **({"validation_score": 0} if plan.validation_rows else {})}
    told = {k: jnp.zeros(BLOCK, jnp.float32) for k in names} | {k: jnp.zeros(BLOCK, bool) for k in FLAGS}
    return jax.lax.fori_loop(0, number, one, (carry, told))


def finish(
    plan: Plan, method: Method, carry: Carry, runner: Runner, epoch: jax.Array, validation: Rows | None
) -> tuple[Carry, dict[str, jax.Array]]:
    """Ends an epoch: is the member sound, is it the best so far, does it go on? Also gives the epoch's info."""
    trained = carry.sums.rows > 0
    info = {k: total / carry.sums.rows for k, total in carry.sums.info.items()}  # 0 / 0 = NaN: it did not train
    limit = EXPLODED * jnp.maximum(jnp.abs(carry.first_loss), LEAST_FIRST)
    if method.end_epoch is not None:
        end = traced_once(method.end_epoch)
        carry = carry._replace(state=jax.lax.cond(carry.status == TRAINING, end, lambda state: state, carry.state))
    status = carry.status
    for reason, wrong in ((LOSS_TOO_HIGH, info["loss"] > limit), (STATE_NOT_FINITE, ~_sound(carry.state))):
        status = jnp.where((status == TRAINING) & wrong, reason, status)
    if plan.validation_rows:
        measure = lambda: _score(plan, method, carry.state, runner, validation)
        score = jax.lax.cond(status == TRAINING, measure, lambda: jnp.array(jnp.nan, jnp.float32))
        signed = -score if plan.score.better == "higher" else score
        better = signed < carry.best_score
        best_epoch = jnp.where(better, epoch, carry.best_epoch)
        if plan.patience is not None:
            status = jnp.where((status == TRAINING) & (epoch - best_epoch >= plan.patience), STOPPED_EARLY, status)
        carry = carry._replace(
            best=jax.tree.map(lambda new, old: jnp.where(better, new, old), carry.state, carry.best),
            best_score=jnp.where(better, signed, carry.best_score),
            best_epoch=best_epoch,
        )
        info["validation_score"] = score
    stopped = (status != TRAINING) & (carry.stopped_epoch < 0)
    carry = carry._replace(
        status=status,
        stopped_epoch=jnp.where(stopped, epoch, carry.stopped_epoch),
        sums=_no_sums(carry.sums.info),
    )
    flags = (trained, status == TRAINING, status <= STOPPED_EARLY)
    return carry, {**info, **dict(zip(FLAGS, flags, strict=True))}


def traced_once(function: Callable) -> Callable:
    """The same function, traced once for all programs that call it; it leaves no mark in them. One that cannot be told
    apart from others (no hash) is traced anew each time."""
    try:
        hash(function)
    except TypeError:
        return function
    return jax.jit(function, inline=True)


def _weights(plan: Plan, runner: Runner, steps: Steps, rows: Rows) -> jax.Array:
    """(steps, batch): as in `Batch`, of all steps."""
    own = isinstance(runner.weights, tuple)
    weights = _rows(rows.weights, steps.index + runner.data * plan.rows) if own else _rows(runner.weights, steps.index)
    return weights * steps.padding * (plan.batch_size / steps.padding.sum(1, keepdims=True))


def _batch(plan: Plan, runner: Runner, given: Steps, weights: jax.Array, rows: Rows) -> Batch:
    index = over_data(given.index)
    if given.inputs is None:
        inputs, targets = jax.tree.map(lambda x: _rows(x, index + runner.data * plan.rows), (rows.inputs, rows.targets))
    else:
        inputs, targets = jax.tree.map(over_data, (given.inputs, given.targets))
    return Batch(inputs, targets, over_data(weights), index, given.padding.sum())


def _entry(place: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, place, keepdims=False)


def _rows(x: Array, index: jax.Array) -> jax.Array:
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds")


def _score(plan: Plan, method: Method, state: PyTree, runner: Runner, validation) -> jax.Array:
    """The validation score, its sums added over chunks of rows."""
    own = jax.tree.map(lambda x: x[runner.validation], validation)
    size = min(plan.chunk_size, plan.validation_rows)

    def measure(place):
        index = over_data(place % plan.validation_rows)
        inputs, targets, weights = own if size == plan.validation_rows else jax.tree.map(lambda x: x[index], own)
        weights = weights * (place < plan.validation_rows)
        return plan.score.measure(method.predict(state, inputs, runner.validate_key), targets, weights)

    number = -(-plan.validation_rows // size)
    places = jnp.arange(number * size).reshape(number, size)
    first = measure(places[0])
    if number > 1:
        add = lambda total, place: (jax.tree.map(jnp.add, total, measure(place)), None)
        first, _ = jax.lax.scan(add, first, places[1:])
    return jnp.asarray(plan.score.compute(first), jnp.float32)


def _no_sums(info) -> Sums:
    return Sums(jnp.zeros((), jnp.float32), {k: jnp.zeros((), jnp.float32) for k in info})


def _sound(state) -> jax.Array:
    """Parameters are finite, and nothing is NaN; an optimiser may well keep an infinity."""
    floats = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    params = floats(state.variables.params) if hasattr(state, "variables") else []
    wrong = [~jnp.isfinite(x).all() for x in params] + [jnp.isnan(x).any() for x in floats(state)]
    return ~jnp.array(wrong).any()
