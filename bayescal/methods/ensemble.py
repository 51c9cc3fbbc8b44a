"""Ensembles of any method: the combinator that adds a member axis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bayescal.predictive import merge_members
from bayescal.sharding import run_members
from bayescal.types import EnsembleState, Key, Members, Method, PyTree


class Always:
    """`settings -> method` for members that differ by their key alone; equal for the same method, so jit keeps its cache."""

    def __init__(self, method: Method):
        self.method = method

    def __call__(self, settings) -> Method:
        return self.method

    def __eq__(self, other):
        return isinstance(other, Always) and self.method is other.method

    def __hash__(self):
        return hash((Always, id(self.method)))


def member_keys(key: Key, number: int) -> jax.Array:
    """One key a member, `fold_in(key, member)`: member m of an ensemble is the lone run with that key."""
    return jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(number))


def init(key: Key, start: PyTree | None, members: Members) -> EnsembleState:
    """Every member's own init, from its own key; a start is one `EnsembleState`, or one network for all members."""
    states = run_members(
        lambda k, settings, s: members.build(settings).init(k, s),
        member_keys(key, members.number),
        members.settings,
        member_start(start, members.number),
    )
    alive = start.alive if isinstance(start, EnsembleState) else jnp.ones(members.number, bool)
    return EnsembleState(states, alive)


def member_start(start: PyTree | None, number: int) -> PyTree | None:
    """`start` with a leading member axis: an ensemble's own member states, or one start repeated for all.

    Raises:
        ValueError: for the state of an ensemble with another number of members.
    """
    if start is None:
        return None
    if isinstance(start, EnsembleState):
        check_start(start, (number,))
        return start.members
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *jnp.shape(x))), start)


def check_start(start: EnsembleState, shape: tuple[int, ...]) -> None:
    """Raises unless the state of an ensemble has that many members (of that many experiments)."""
    if jnp.shape(start.alive) != shape:
        raise ValueError(
            f"`start` must have members of shape {shape}, got the state of an ensemble with {jnp.shape(start.alive)}. "
            "Pass a state of the same ensemble, or one network for all."
        )


def update(state: EnsembleState, batch, key: Key, members: Members):
    """One update of every member on the same batch; `fit` instead runs members apart, each on its own batches."""
    states, info = run_members(
        lambda s, k, settings, b: members.build(settings).update(s, b, k),
        state.members,
        member_keys(key, members.number),
        members.settings,
        shared=(batch,),
    )
    return state._replace(members=states), info


def end_epoch(state: EnsembleState, members: Members) -> EnsembleState:
    """Every member's own end of an epoch; `fit` instead ends each member's when that member has trained."""

    def end(state, settings):
        own = members.build(settings).end_epoch
        return state if own is None else own(state)

    return state._replace(members=run_members(end, state.members, members.settings))


def predict(state: EnsembleState, inputs, key: Key | None, members: Members):
    """All members' predictives on one member axis, member-major; members that are not alive get weight 0."""
    keys = None if key is None else member_keys(key, members.number)
    stacked = run_members(
        lambda s, k, settings, x: members.build(settings).predict(s, x, k),
        state.members,
        keys,
        members.settings,
        shared=(inputs,),
    )
    return merge_members(stacked, state.alive.astype(jnp.float32))


def ensemble(
    method: Method | Callable[[PyTree], Method],
    num_members: int | None = None,
    *,
    settings: PyTree | None = None,
    resample: Callable[[Key, int], jax.Array] | None = None,
) -> Method:
    """Independent copies of a method, pooled: of `map_estimate` a deep ensemble, of `mc_dropout` or `variational` theirs.

    Args:
        method: the method to repeat; or, with `settings`, a function from one member's settings to its method.
        num_members: how many.
        settings: pytree of arrays whose leading axis is the member: learning rates, weight decays, ... Each must be
            used arithmetically; a Python branch on one is an error that says what to do.
        resample: `(key, rows) -> (rows,)` weights that each member draws for the rows of its training data, such as
            `bootstrap` or `Subsample(0.8)`; None = all members see all rows.

    Returns:
        Method whose state is `EnsembleState` and whose `members` let `fit` run each member apart.

    Raises:
        ValueError: neither or both of `num_members` and `settings`; fewer than one member; ragged settings.
        TypeError: a function where a method is wanted, or the other way round.
    Source: Lakshminarayanan et al. 2017 (deep ensembles); Wenzel et al. 2020 (settings that differ).
    """
    members = as_members(method, num_members, settings, "num_members")
    if isinstance(method, Method) and method.members is not None:
        raise ValueError(
            "`method` must be one without members, got an ensemble. Ensemble the method inside it, with as many "
            "members as both together."
        )
    members = members._replace(resample=resample)
    return Method(
        lambda key, start=None: init(key, start, members),
        lambda state, batch, key: update(state, batch, key, members),
        lambda state, inputs, key: predict(state, inputs, key, members),
        members,
        end_epoch=lambda state: end_epoch(state, members),
    )


def as_members(method, number: int | None, settings: PyTree | None, name: str) -> Members:
    """`Members` from a method and a number, or from a builder and its settings; `name` is the number's, for errors."""
    if (number is None) == (settings is None):
        raise ValueError(
            f"`{name}` or `settings` must be given, one of them, got {name}={number!r} and "
            f"settings={'None' if settings is None else 'given'}. The settings' leading axis counts them."
        )
    if settings is None:
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {number!r}. 5 is usual.")
        if not isinstance(method, Method):
            raise TypeError(
                f"`method` must be a Method when `{name}` is given, got {type(method).__name__}. "
                "A function from settings to a method goes with `settings`."
            )
        if method.experiments is not None:
            raise ValueError(
                "`method` must be one without experiments, got experiments of it. Repeat the method inside it."
            )
        return Members(Always(method), (), number)
    if isinstance(method, Method):
        raise TypeError(
            "`method` must be a function from one member's settings to its method when `settings` are given, got a "
            "Method. Write `lambda settings: map_estimate(...)`."
        )
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(settings)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"`settings` must be arrays with the same leading member axis, got sizes {sorted(sizes)}. "
            "Give one value per member in every array."
        )
    return Members(method, settings, sizes.pop()[0])
