"""Training and prediction loops: data on the device, members apart, one scan over the steps of an epoch."""

from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.data.checks import check_dataset, check_finite, check_rows_agree
from bayescal.methods.ensemble import Always, member_keys, member_start
from bayescal.predictive import Predictive, concatenate, take
from bayescal.progress import Progress
from bayescal.sharding import Execution, default_execution, run_members
from bayescal.types import Batch, Dataset, EnsembleState, Fit, Key, MemberReport, Members, Method, PyTree

# Words folded into a member's key, one a purpose, so that no two uses share a stream: users fold in small numbers.
_INIT, _TRAIN, _VALIDATE = 0x494E4954, 0x54524149, 0x56414C49


def fit(
    method: Method,
    data: Dataset,
    key: Key,
    *,
    epochs: int,
    batch_size: int,
    validation: Dataset | None = None,
    start: PyTree | None = None,
    execution: Execution | None = None,
    progress: bool = True,
) -> Fit:
    """Trains a method on data in memory: every member on its own shuffled batches, an epoch a program.

    Member m of an ensemble trains as the lone method would with the key `fold_in(key, m)`; its epoch e shuffles with
    a key folded with e. The last batch of an epoch is filled up with other rows at weight 0: they add nothing to the
    loss, but batch norm's statistics do see them. A member whose loss or state is not finite is reported and weighs
    nothing in predictions.

    Args:
        method: what to train.
        data: rows; moved to the device once. Weights count relative to their mean.
        key: random key; the same key gives the same result.
        epochs: passes over the data, at least 1.
        batch_size: rows an update, from 1 to the number of rows.
        validation: rows to score after every epoch: `validation_nll` in the history (nats per example, each member by
            itself, the same draws every epoch), and the state of each member's best epoch as `Fit.best`.
        start: passed to the method's `init`: `Variables` or a trained state (`fitted.state`); for an ensemble its own
            state, or one start for all members.
        execution: how members run, see `bayescal.sharding.run_members`.
        progress: show a progress line with rates, time left and the members' losses, where there is a terminal.

    Returns:
        Fit: last and best state, history of float arrays (epoch, member), and how the members fared.

    Raises:
        ValueError: for unusable data or settings, and where no member's state, last or best, is finite.
        TypeError: for data that are no Dataset, or a `Fit` as a start.
    """
    rows = check_dataset(data)
    _check_schedule(epochs, batch_size, rows)
    _check_state("start", start)
    members = method.members or Members(Always(method), (), 1)
    execution = execution or default_execution()

    def run(function, own, shared=()):
        return _run(function, members.build, execution, members.settings, own, shared)

    init_keys, train_keys, validate_keys = _keys(key, members.number if method.members else None)
    state = run(_init, (init_keys, member_start(start, members.number)))
    _check_targets(members, state, data)
    data = jax.device_put(data._replace(weights=_relative_weights(data, rows)))
    best, best_score = state, None
    if validation is not None:
        held_out = check_dataset(validation, "validation")
        _check_targets(members, state, validation, "validation.targets")
        validation = jax.device_put(validation._replace(weights=_relative_weights(validation, held_out)))
        best_score = jnp.full(members.number, jnp.inf)

    history, steps = [], -(-rows // batch_size)
    with Progress(epochs, steps * members.number, progress) as line:
        for epoch in range(epochs):
            orders, step_keys = _shuffle(train_keys, epoch, rows, steps, batch_size)
            state, info = run(_epoch, (state, step_keys, orders), (data,))
            if validation is not None:
                score = run(_validate, (state, validate_keys), (validation,))
                best, best_score = _keep_better(best, best_score, state, score)
                info = {**info, "validation_nll": score}
            history.append(info)
            line.update(info["loss"])

    history = {k: np.stack([np.asarray(h[k]) for h in history]) for k in history[0]}
    finite = np.asarray(_finite(state))
    best_finite = finite if best_score is None else np.isfinite(np.asarray(best_score))
    best = state if best_score is None else best
    report = _report(history["loss"], finite, best_finite)
    if not method.members:
        return Fit(_alone(state), _alone(best), history, report)
    before = start.alive if isinstance(start, EnsembleState) else True
    alive, best_alive = (jnp.asarray(x) & before for x in (report.alive, best_finite))
    return Fit(EnsembleState(state, alive), EnsembleState(best, best_alive), history, report)


def predict(method: Method, state, inputs, key: Key | None, *, chunk_size: int = 8192) -> Predictive:
    """The predictive of every row, streamed in chunks that all get the same key: a draw is one network throughout.

    Args:
        method: what was trained.
        state: its state, such as `Fit.state`.
        inputs: array (rows, ...), or a pytree of such, finite.
        key: random key of the draws; None = the mean network of each member.
        chunk_size: rows that go through the network at a time; results do not depend on it beyond rounding.

    Returns:
        Predictive with batch shape (rows,).

    Raises:
        ValueError: for empty, NaN or infinite inputs.
        TypeError: for a `Fit` where its state is meant.
    """
    check_finite("inputs", inputs)
    rows = check_rows_agree("inputs", inputs)
    _check_state("state", state)
    if not isinstance(chunk_size, Integral) or int(chunk_size) < 1:
        raise ValueError(f"`chunk_size` must be a whole number of at least 1, got {chunk_size!r}. 8192 is the default.")
    if rows <= chunk_size:
        return _predict(method.predict, state, inputs, key)
    chunks = []
    for first in range(0, rows, chunk_size):
        index = np.arange(first, first + chunk_size) % rows  # the last chunk is filled up with rows from the front
        chunk = jax.tree.map(lambda x, index=index: x[index], inputs)
        chunks.append(_predict(method.predict, state, chunk, key))
    left = rows - (len(chunks) - 1) * chunk_size
    chunks[-1] = take(chunks[-1], np.arange(left))
    return concatenate(chunks)


@partial(jax.jit, static_argnums=0)
def _predict(function, state, inputs, key):
    return function(state, inputs, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function, build, execution, settings, own, shared):
    """`function` of each member's method, its `own` arguments and the `shared` ones; equal functions compile once."""
    return run_members(lambda s, *args: function(build(s), *args, *shared), settings, *own, execution=execution)


def _init(method, key, start):
    return method.init(key, start)


def _epoch(method, state, key, order, data):
    """One pass of one member: a scan over its batches; info averaged over rows."""

    def step(state, batch_order):
        number, index, padding = batch_order
        batch = Batch(
            jax.tree.map(lambda x: x[index], data.inputs),
            jax.tree.map(lambda x: x[index], data.targets),
            data.weights[index] * padding * (len(padding) / padding.sum()),
            index,
        )
        state, info = method.update(state, batch, jax.random.fold_in(key, number))
        return state, (info, padding.sum())

    state, (info, weight) = jax.lax.scan(step, state, order)
    return state, {k: (v * weight).sum() / weight.sum() for k, v in info.items()}


def _validate(method, state, key, data):
    pred = method.predict(state, data.inputs, key)
    log_prob = pred.log_prob(data.targets)
    return -jnp.where(data.weights == 0, 0, data.weights * log_prob).sum() / data.weights.sum()


@jax.jit
def _keep_better(best, best_score, state, score):
    better = score < best_score
    choose = lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return jax.tree.map(choose, state, best), jnp.where(better, score, best_score)


@partial(jax.jit, static_argnums=1)
def _keys(key, number):
    """Each member's keys for init, training and validation; a lone method (number None) uses `key` as its own."""
    keys = key[None] if number is None else member_keys(key, number)
    return tuple(jax.vmap(partial(jax.random.fold_in, data=word))(keys) for word in (_INIT, _TRAIN, _VALIDATE))


@jax.jit
def _alone(tree):
    return jax.tree.map(lambda x: x[0], tree)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _shuffle(keys, epoch, rows, steps, batch_size):
    """Per member: (step number, rows of each batch, 0 where a row only fills up), and the key of its steps."""

    def one(key):
        order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, rows)
        places = jnp.arange(steps * batch_size).reshape(steps, batch_size)
        padding = (places < rows).astype(jnp.float32)
        return (jnp.arange(steps), order[places % rows].astype(jnp.int32), padding), step_key

    return jax.vmap(one)(keys)


@jax.jit
def _finite(state):
    """Per member, whether every number of its state is finite."""
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((~jnp.isfinite(x)).reshape(len(x), -1).any(1) for x in numbers) == 0


def _relative_weights(data: Dataset, rows: int):
    """Row weights with mean one, so that a loss stays per example whatever their scale."""
    if data.weights is None:
        return np.ones(rows, np.float32)
    weights = np.asarray(data.weights, np.float64)
    return (weights / weights.mean()).astype(np.float32)


def _report(loss: np.ndarray, finite_state: np.ndarray, best_finite: np.ndarray) -> MemberReport:
    finite = np.asarray(np.isfinite(loss))
    finite[-1] &= finite_state
    stopped = np.where(finite.all(0), len(loss), finite.argmin(0))
    shown = np.where(np.isfinite(loss), loss, np.nan)
    last = [next((x for x in shown[::-1, m] if np.isfinite(x)), np.nan) for m in range(loss.shape[1])]
    alive = np.asarray(finite.all(0))
    if not (alive | best_finite).any():
        raise ValueError(
            f"`loss` must stay finite for at least one member, got none of {len(alive)}; they diverged in epochs "
            f"{stopped.tolist()}. Lower the learning rate, or check the scale of the inputs."
        )
    return MemberReport(alive, stopped, np.asarray(last))


def _check_state(name: str, state) -> None:
    if isinstance(state, Fit):
        raise TypeError(f"`{name}` must be a state, got a Fit. Pass its `.state` or `.best`.")


def _check_schedule(epochs, batch_size, rows) -> None:
    if not isinstance(epochs, Integral) or int(epochs) < 1:
        raise ValueError(
            f"`epochs` must be a whole number of at least 1, got {epochs!r}. Pass how many passes to make."
        )
    if not isinstance(batch_size, Integral) or not 1 <= int(batch_size) <= rows:
        raise ValueError(
            f"`batch_size` must be a whole number from 1 to the {rows} rows of the data, got {batch_size!r}. "
            "Choose a smaller batch."
        )


def _check_targets(members: Members, state, data: Dataset, name: str = "targets") -> None:
    def one(settings, member_state):
        first = jax.tree.map(lambda x: x[0], (settings, member_state))
        return members.build(first[0]).predict(first[1], data.inputs, None)

    pred = jax.eval_shape(one, members.settings, state)
    try:
        pred.check_targets(data.targets)
    except ValueError as error:
        raise ValueError(str(error).replace("`targets`", f"`{name}`")) from None
