"""Independent experiments (splits, folds, grid points, repetitions): an outer axis that is never pooled."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.methods.ensemble import Always, as_members, check_start, member_keys, member_start
from bayescal.predictive import stack_experiments
from bayescal.sharding import run_members
from bayescal.types import EnsembleState, Key, Members, Method, PyTree, Variables


class Runners(NamedTuple):
    """Every network that is trained by itself: the members of all experiments on one axis, experiment-major.

    build: one runner's settings -> its method, which has neither members nor experiments.
    settings: pytree of arrays with a leading runner axis.
    shape: (), (member,), (experiment,) or (experiment, member); its product is the number of runners.
    resample: of the members.
    """

    build: Callable[[PyTree], Method]
    settings: PyTree
    shape: tuple[int, ...]
    resample: Callable[[Key, int], jax.Array] | None

    @property
    def number(self) -> int:
        return int(np.prod(self.shape, dtype=int))


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """(settings of an experiment, member) -> that member's method; equal for equal builders, so jit keeps its cache."""

    build: Callable[[PyTree], Method]

    def __call__(self, settings) -> Method:
        own, member = settings
        inner = self.build(own)
        if inner.members is None:
            return inner
        return inner.members.build(jax.tree.map(lambda x: jnp.asarray(x)[member], inner.members.settings))


def runners(method: Method) -> Runners:
    """What of a method can be trained apart: the lone method itself, its members, or those of all its experiments."""
    outer = method.experiments
    if outer is None:
        members = method.members
        if members is None:
            return Runners(Always(method), (), (), None)
        return Runners(members.build, members.settings, (members.number,), members.resample)
    inner = _inner(outer)
    if inner is None:
        return Runners(outer.build, outer.settings, (outer.number,), None)
    number = outer.number * inner.number
    settings = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), inner.number, axis=0), outer.settings)
    members = jnp.arange(number, dtype=jnp.int32) % inner.number
    return Runners(_OneOf(outer.build), (settings, members), (outer.number, inner.number), inner.resample)


def runner_keys(method: Method, key: Key) -> Key:
    """One key a runner: experiment e has `fold_in(key, e)`, its member m has that folded with m."""
    return _keys(runners(method).shape, key)


@partial(jax.jit, static_argnums=0)
def _keys(shape: tuple[int, ...], key: Key) -> Key:
    keys = key[None]
    for number in shape:
        keys = jax.vmap(lambda k, number=number: member_keys(k, number))(keys).reshape(-1, *key.shape)
    return keys


def runner_start(method: Method, start: PyTree | None) -> PyTree | None:
    """`start` with a leading runner axis: one network for all, or the state that an earlier fit of it left.

    Raises:
        ValueError: for a state with other members or experiments.
    """
    shape = runners(method).shape
    if isinstance(start, EnsembleState):
        ensembled = method.members is not None or len(shape) == 2
        check_start(start, shape if ensembled else ())
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), start.members)
    of_all = method.experiments is not None and len(shape) == 1 and not isinstance(start, Variables)
    if of_all and start is not None and all(jnp.shape(x)[:1] == shape for x in jax.tree.leaves(start)):
        return start
    return member_start(start, runners(method).number)


def experiments(
    method: Method | Callable[[PyTree], Method],
    number: int | None = None,
    *,
    settings: PyTree | None = None,
) -> Method:
    """Independent repetitions of a method, alone or an ensemble, trained as one program and never pooled.

    `fit` takes a list with each experiment's data (or one data set for all) and gives experiment e what a lone `fit`
    would with the key `fold_in(key, e)`; states, history and report gain a leading experiment axis. `predict` takes a
    list of inputs (or one for all) and keeps the axis as the first batch axis: (member, experiment, rows, ...);
    `bc.take(pred, e)` is one experiment's predictive. Data sets of unequal size are filled up to the longest with rows
    of weight 0, so that their experiments make as many updates an epoch as the longest does. An experiment all of whose
    members diverged predicts NaN; the report names them.

    Args:
        method: the method to repeat; or, with `settings`, a function from one experiment's settings to its method.
        number: how many.
        settings: pytree of arrays whose leading axis is the experiment; each must be used arithmetically.

    Raises:
        ValueError: neither or both of `number` and `settings`; fewer than one experiment; ragged settings; experiments
            of experiments.
        TypeError: a function where a method is wanted, or the other way round.
    """
    outer = as_members(method, number, settings, "number")
    return Method(
        lambda key, start=None: init(key, start, outer),
        lambda state, batch, key: update(state, batch, key, outer),
        lambda state, inputs, key: predict(state, inputs, key, outer),
        experiments=outer,
        end_epoch=lambda state: end_epoch(state, outer),
    )


def init(key: Key, start: PyTree | None, outer: Members) -> PyTree:
    """Every experiment's own state, stacked; a start is one network for all."""
    return run_members(
        lambda k, settings, s: outer.build(settings).init(k, s),
        member_keys(key, outer.number),
        outer.settings,
        shared=(start,),
    )


def update(state: PyTree, batch, key: Key, outer: Members):
    """One update of every experiment on the same batch; `fit` instead gives each its own."""
    return run_members(
        lambda s, k, settings, b: outer.build(settings).update(s, b, k),
        state,
        member_keys(key, outer.number),
        outer.settings,
        shared=(batch,),
    )


def end_epoch(state: PyTree, outer: Members) -> PyTree:
    """Every experiment's own end of an epoch."""

    def end(state, settings):
        own = outer.build(settings).end_epoch
        return state if own is None else own(state)

    return run_members(end, state, outer.settings)


def predict(state: PyTree, inputs, key: Key | None, outer: Members):
    """Every experiment's predictive, (member, experiment, rows, ...); a list of inputs holds each experiment's own."""
    keys = None if key is None else member_keys(key, outer.number)
    one = lambda s, k, settings, x: outer.build(settings).predict(s, x, k)
    if not isinstance(inputs, list):
        return stack_experiments(run_members(one, state, keys, outer.settings, shared=(inputs,)))
    if len(inputs) != outer.number:
        raise ValueError(
            f"`inputs` must be a list of {outer.number} arrays, one for each experiment, got {len(inputs)}. "
            "Pass one array for all, or one each."
        )
    own = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    return stack_experiments(run_members(one, state, keys, outer.settings, own))


class _Inner(NamedTuple):
    """What is known of one experiment's ensemble without its settings."""

    number: int
    resample: Callable[[Key, int], jax.Array] | None


def _inner(outer: Members) -> _Inner | None:
    """The ensemble inside an experiment; None for a lone method."""
    found = []

    def look(settings):
        method = outer.build(jax.tree.map(lambda x: x[0], settings))
        if method.experiments is not None:
            raise ValueError("`method` must be one without experiments, got experiments of it. Make one grid of both.")
        found.append(method.members and _Inner(method.members.number, method.members.resample))

    jax.eval_shape(look, outer.settings)
    return found[0]
