"""Batch-norm moments of networks that were drawn or averaged: measured anew on the training data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.interpreters import partial_eval

from bayescal.methods.draws import check_draws
from bayescal.methods.map_estimate import start_variables, weighted_mean
from bayescal.sharding import run_members
from bayescal.types import EnsembleState, Key, Method, Model, PyTree, Variables

_REFRESH = (
    0x52465248  # folded into the key of `init`: draws share no stream with the weights that the key may have drawn
)
_ROUNDING = 1e-6  # of a momentum: within it a leaf's elements have the same one, and 1 is none


class RefreshState(NamedTuple):
    """Networks, drawn once, and the rows that their moments average so far, by relative weight.

    networks: leaves have a leading network axis.
    ready: whether the posterior that they were drawn from was.
    """

    networks: Variables
    rows: jax.Array
    ready: jax.Array

    @property
    def variables(self) -> Variables:
        """The network, where there is but one: what other methods start from."""
        number = jax.tree.leaves(self.networks.params)[0].shape[0]
        if number != 1:
            raise AttributeError(f"`variables` needs one network, got {number}. Take one of `networks`.")
        return jax.tree.map(lambda x: x[0], self.networks)


def init(key: Key, start: PyTree | None, method: Method, num_draws: int) -> RefreshState:
    """Networks of `start`, drawn or, of a finite set, taken; their moments are `start`'s until the first update."""
    if start is None or isinstance(start, EnsembleState):
        got = "None" if start is None else "the state of an ensemble"
        raise ValueError(
            f"`start` must be a state of the method to refresh, got {got}. Pass `fit(..., start=fitted.state)`; the state "
            "of an ensemble goes with `ensemble(refresh(...), num_members)`."
        )
    one = method.draw
    if one is None:
        networks = jax.tree.map(lambda x: x[None], start_variables(start))
    elif hasattr(start, "networks"):
        networks = take(start, num_draws)
    else:
        keys = jax.random.split(jax.random.fold_in(key, _REFRESH), num_draws)
        networks = run_members(lambda k, s: one(s, k), keys, shared=(start,))
    return RefreshState(networks, jnp.zeros((), jnp.float32), jnp.asarray(getattr(start, "ready", True)))


def take(start, number: int) -> Variables:
    """`number` different ones of the `networks` that a state holds, evenly spaced.

    Raises:
        ValueError: for more than it holds. Where the number held is traced, as in `fit`, the params are NaN instead.
    """
    networks: Variables = start.networks
    capacity = jax.tree.leaves(networks.params)[0].shape[0]
    samples = getattr(start, "samples", None)
    held = capacity if samples is None else samples.held
    most = capacity if isinstance(held, Tracer) else int(held)
    if number > most:
        raise ValueError(
            f"`num_draws` must be at most the number of networks that `start` holds, {most}, got {number}: taken twice, "
            "one would look like two. Take fewer, or let the chain keep more."
        )
    places = jnp.arange(number) * held // number
    params, stats = jax.tree.map(lambda x: x[places], networks)
    unknown = lambda x: jnp.where(number > held, jnp.nan, x).astype(x.dtype)
    return Variables(jax.tree.map(unknown, params), stats)


def update(state: RefreshState, batch, key: Key, model: Model, likelihood: Callable):
    """Every network's moments average in those of the batch; its params stay."""
    weight = batch.relative_weights().sum()
    rows = state.rows + weight
    share = jnp.where(weight > 0, weight / jnp.where(rows > 0, rows, 1), 0)

    def average(old, new):
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return old
        mixed = old + share.astype(old.dtype) * (new - old)
        # the first takes the place of what was there, finite or not; and what is kept is kept, finite or not
        return jnp.where((share == 1) | (new == old), new, mixed)

    def one(network, key, inputs):
        return batch_moments(network, inputs, key, model)

    number = jax.tree.leaves(state.networks.params)[0].shape[0]
    outputs, stats, moments = run_members(one, state.networks, jax.random.split(key, number), shared=(batch.inputs,))
    info = {
        "loss": weighted_mean(-likelihood(outputs).log_prob(batch.targets), batch.weights),
        "moments": moments.mean(),
    }
    networks = state.networks._replace(stats=jax.tree.map(average, state.networks.stats, stats))
    return state._replace(networks=networks, rows=rows), info


def predict(state: RefreshState, inputs, key: Key | None, model: Model, likelihood: Callable):
    """The likelihood of the networks as members, the same ones for any key."""
    apply = lambda network, inputs: model.apply(network, inputs, None)
    return likelihood(run_members(apply, state.networks, shared=(inputs,)))


def refresh(method: Method, model: Model, likelihood: Callable, *, num_draws: int) -> Method:
    """Networks drawn from a posterior, with batch-norm moments sum_b n_b moments_b / sum_b n_b of the training data.

    Moments belong to weights: those of training fit no network that was drawn, or averaged, afterwards. `init` draws the
    networks once, by its key; of a state that holds a finite set of networks (a chain's samples, particles) it takes
    `num_draws` different ones, evenly spaced, whatever the key. Each `update` runs them over a batch in training mode
    (dropout on) and averages in the batch's own moments, n_b its rows by relative weight. One epoch does it, a further one
    takes other batches. The variance is the mean of the batches' variances, as in the authors' code, and so without what
    lies between their means: (b - 1) / b of the data's for independent rows in the first layer, b rows a batch.

    Moments are those leaves of `stats` that one pass of `model.train` replaces by m old + (1 - m) batch, with one m in
    [0, 1) for the leaf, and that nothing else in the pass depends on. All others are kept as they were: rates of dropout,
    counters, vectors of spectral norm. What is kept must fit the drawn weights as it is.

        swag = bc.swag(model, bc.Categorical, optimizer, num_draws=20, burn_in=1000, every=100)
        trained = bc.fit(swag, train, key, epochs=50, batch_size=128).state
        method = bc.refresh(swag, model, bc.Categorical, num_draws=20)
        refreshed = bc.fit(method, train, key, epochs=1, batch_size=128, start=trained).state

    Args:
        method: whose state is the start; of one without `draw` (such as `swa`) its `variables`, one network.
        model: the network.
        likelihood: outputs with a leading member axis -> predictive.
        num_draws: networks, each a member of the predictive; 1 for a method without `draw`, and at most as many as a chain
            has kept: beyond that `init` raises, and in `fit`, where their number is not known, the networks are NaN.

    Returns:
        Method whose state is `RefreshState`, whose members are the same for any key and for None, and whose info is
        `loss` (of the pooled networks, mean nats per example, under each batch's own moments) and `moments`, how many
        leaves were found to be some: 0 for a network without batch norm, which comes through unchanged.

    Raises:
        ValueError: for fewer than one draw, or more than one of a method that has none; for an ensemble; at `init`
            without a start, with the state of an ensemble, or one that holds fewer networks; in `update`, for moments in
            half precision.
        TypeError: at `init`, for a start that holds no network.
    Source: Izmailov et al. 2018, section 3.2 (recalled); Maddox et al. 2019, algorithm 1 (recalled); `bn_update` of
        wjmaddox/swa_gaussian (looked up).
    """
    check_draws(num_draws)
    if method.members is not None or method.experiments is not None:
        raise ValueError(
            "`method` must be one without members, got an ensemble or experiments. Refresh the method inside it, and "
            "ensemble that: `ensemble(refresh(...), num_members)`."
        )
    if method.draw is None and num_draws != 1:
        raise ValueError(
            f"`num_draws` must be 1 for a method without `draw`, got {num_draws}. It has one network; a posterior such as "
            "`swag` has many."
        )
    return Method(
        lambda key, start=None: init(key, start, method, num_draws),
        lambda state, batch, key: update(state, batch, key, model, likelihood),
        lambda state, inputs, key: predict(state, inputs, key, model, likelihood),
        draw=draw,
    )


def draw(state: RefreshState, key: Key) -> Variables:
    """One of the networks held, each as likely as the others."""
    number = jax.tree.leaves(state.networks.params)[0].shape[0]
    return jax.tree.map(lambda x: x[jax.random.randint(key, (), 0, number)], state.networks)


def batch_moments(variables: Variables, inputs, key: Key, model: Model) -> tuple[PyTree, PyTree, jax.Array]:
    """A batch's own moments, from a `model.train` that only tells m old + (1 - m) batch, with m unknown.

    The pass is told old = 0 and old = L for all leaves that may be moments: (1 - m) batch, and m L + (1 - m) batch with
    an L so large that m is exact to rounding. `vmap` gives the two an axis, and with it nothing that they do not reach, so
    that the network runs once.

    Returns:
        outputs of the pass; stats in which moments are the batch's and other leaves what they were; number of moments.
    """
    leaves, structure = jax.tree.flatten(variables.stats)
    alone = _reach_only_themselves(variables, inputs, key, model)

    def run(told):
        values = iter(told)
        stats = structure.unflatten([next(values) if a else x for x, a in zip(leaves, alone, strict=True)])
        outputs, new, _ = model.train(variables._replace(stats=stats), inputs, key)
        return outputs, [x for x, a in zip(jax.tree.leaves(new), alone, strict=True) if a]

    if not any(alone):
        return run([])[0], variables.stats, jnp.zeros((), jnp.float32)
    candidates = [x for x, a in zip(leaves, alone, strict=True) if a]
    narrow = [x.dtype.name for x in candidates if jnp.finfo(x.dtype).bits < 32]
    if narrow:
        raise ValueError(
            f"`stats` must hold running moments in float32, got {narrow[0]}: 1 - momentum is lost in its rounding. Let the "
            "model keep them in float32, as flax does by default, or cast those of the start."
        )
    told = [jnp.stack([jnp.zeros_like(x), jnp.full_like(x, _far(x.dtype))]) for x in candidates]
    outputs, found = jax.vmap(run, out_axes=(None, 0))(told)
    number, results = jnp.zeros((), jnp.float32), []
    for old, (at_zero, at_far) in zip(candidates, found, strict=True):
        momentum = (at_far - at_zero) / _far(old.dtype)
        low, high = jnp.nanmin(momentum), jnp.nanmax(momentum)
        # put so that a batch that is not finite gives moments that are not: NaN is in no order
        moment = ~((high - low > _ROUNDING) | (low < -_ROUNDING) | (high > 1 - _ROUNDING))
        results.append(jnp.where(moment, at_zero / jnp.where(moment, 1 - momentum, 1), old))
        number += moment
    values = iter(results)
    return outputs, structure.unflatten([next(values) if a else x for x, a in zip(leaves, alone, strict=True)]), number


def _far(dtype) -> float:
    return 2.0 ** (jnp.finfo(dtype).maxexp // 2)


def _reach_only_themselves(variables: Variables, inputs, key: Key, model: Model) -> list[bool]:
    """Which leaves of `stats`, in their order, reach their own new value in a pass, and nothing else of it."""
    leaves, structure = jax.tree.flatten(variables.stats)

    def run(leaves):
        outputs, stats, penalty = model.train(variables._replace(stats=structure.unflatten(leaves)), inputs, key)
        return jax.tree.leaves(stats), (outputs, penalty)

    jaxpr = jax.make_jaxpr(run)(leaves).jaxpr
    places = range(len(jaxpr.outvars))
    reaching = lambda results: partial_eval.dce_jaxpr(jaxpr, [i in results for i in places])[1]
    rest = reaching(places[len(leaves) :])
    each = [reaching([i]) for i in range(len(leaves))]
    own = lambda i: not rest[i] and all(each[j][i] == (j == i) for j in range(len(leaves)))
    return [jnp.issubdtype(x.dtype, jnp.floating) and own(i) for i, x in enumerate(leaves)]
