"""Averages of the weights that training passes through: one averaged network (SWA), or a normal around it (SWAG)."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods.draws import check_draws, predict_draws
from bayescal.methods.map_estimate import MAPState, check_positive, check_whole, map_estimate
from bayescal.methods.samples import check_collecting, is_due
from bayescal.types import Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax


class Average(NamedTuple):
    """Mean of the weights collected, and how many they were; before the first, the weights in training."""

    mean: PyTree  # as params, float32 or wider
    count: jax.Array


class SWAState(NamedTuple):
    """The network in training, and the average of the weights that it passed through."""

    fit: MAPState
    average: Average

    @property
    def ready(self) -> jax.Array:
        """Whether there is an average: until then it predicts by the network in training."""
        return self.average.count > 0

    @property
    def variables(self) -> Variables:
        """The averaged network, with the batch-norm moments of the one in training: see `refresh`."""
        return _network(self.fit, self.average.mean)


class SWAGState(NamedTuple):
    """An average, and the spread of the weights around it.

    squares: sums of squared deviations from the mean; the diagonal variance is squares / count.
    deviations: (rank, *weights), theta_i - mean_i for the last that were collected, with the mean of that time; zeros
        where there is none yet.
    """

    fit: MAPState
    average: Average
    squares: PyTree
    deviations: PyTree

    @property
    def ready(self) -> jax.Array:
        """Whether there is a spread: one network that was collected has none."""
        return self.average.count >= 2

    @property
    def variables(self) -> Variables:
        """The averaged network, with the batch-norm moments of the one in training: see `refresh`."""
        return _network(self.fit, self.average.mean)


def init(key: Key, start: PyTree | None, base: Method, rank: int) -> SWAGState:
    """`base`'s own init, with nothing collected."""
    fit = base.init(key, start)
    mean = _wide(fit.variables.params)
    deviations = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), x.dtype), mean)
    return SWAGState(fit, Average(mean, jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, mean), deviations)


def update(state: SWAGState, batch, key: Key, base: Method, burn_in: int, every: int):
    """One update of the network in training; where its weights are due, the moments take them in."""
    fit, info = base.update(state.fit, batch, key)
    due = is_due(state.fit.step, burn_in, every)
    theta, before = _wide(fit.variables.params), state.average
    average = collect(before, theta, due)
    # (n - 1) / n (theta - mean before)^2 is never negative, as mean of squares - square of mean is after rounding
    factor = jnp.where(due, (average.count - 1) / jnp.maximum(average.count, 1), 0)
    slot = before.count % jax.tree.leaves(state.deviations)[0].shape[0]

    def add(squares, theta, mean):
        return jnp.where(factor > 0, squares + factor.astype(squares.dtype) * (theta - mean) ** 2, squares)

    def put(all_, theta, mean):
        old = jax.lax.dynamic_index_in_dim(all_, slot, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(all_, jnp.where(due, theta - mean, old), slot, 0)

    squares = jax.tree.map(add, state.squares, theta, before.mean)
    deviations = jax.tree.map(put, state.deviations, theta, average.mean)
    return SWAGState(fit, average, squares, deviations), _told(info, average)


def transform(state: SWAGState, diagonal: PyTree, low_rank: jax.Array, scale: Any) -> Variables:
    """The network at mean + sqrt(scale) * (sqrt(variance / 2) * diagonal + deviations . low_rank / sqrt(2 (K - 1))).

    Affine in the noise, so that standard normal noise gives a normal. The second part is 0 for K < 2.

    Args:
        state: what was collected.
        diagonal: noise of each weight, a tree as params.
        low_rank: (rank,) noise of each deviation.
        scale: of the covariance.
    """
    count = jnp.maximum(state.average.count, 1)
    stored = jnp.minimum(count, low_rank.shape[0])

    def move(mean, squares, deviations, noise):
        spread = jnp.sqrt(squares / (2 * count).astype(mean.dtype)) * noise
        along = jnp.tensordot(low_rank.astype(mean.dtype), deviations, 1, precision="highest")
        along = along / jnp.sqrt(2 * jnp.maximum(stored - 1, 1)).astype(mean.dtype)
        return mean + jnp.sqrt(jnp.asarray(scale, mean.dtype)) * (spread + along)

    moved = jax.tree.map(move, state.average.mean, state.squares, state.deviations, diagonal)
    return _network(state.fit, moved)


def draw(state: SWAGState, key: Key, scale: Any) -> Variables:
    """One network from the normal; the averaged one as long as fewer than two were collected."""
    flat, unravel = ravel_pytree(state.average.mean)
    rank = jax.tree.leaves(state.deviations)[0].shape[0]
    noise = jax.random.normal(key, (flat.size + rank,), flat.dtype)
    return transform(state, unravel(noise[rank:]), noise[:rank], scale)


def swag(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_draws: int,
    burn_in: int,
    every: int,
    rank: int = 20,
    scale: float = 1.0,
    **settings,
) -> Method:
    """theta ~ Normal(mean, scale * (diag(variance) / 2 + D D^T / (2 (K - 1)))), moments of the weights in training.

    Trains as `map_estimate`; after `burn_in` updates every `every`-th leaves its weights to the mean, the variance
    (mean of squares - square of the mean, without its rounding errors) and the deviations D, the last K <= `rank`. Let the
    optimiser's learning rate stay high while they are collected: the spread is that of its iterates. Before two were
    collected there is no posterior: the variance is 0, all draws are one network, and `bayescal.predict` refuses;
    `state.average.count` tells. MultiSWAG is `ensemble(swag(...), num_members)`.

    Batch norm's moments are those of the network in training, which fit no drawn one: follow with `refresh`.
    The state holds `rank` + 3 times the params, beside the optimiser's.

    Args:
        model: the network.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation; SGD with a constant or cyclical learning rate in the papers.
        num_draws: members of the predictive.
        burn_in: updates (not epochs) before the first that counts, 0 or more.
        every: updates from one collection to the next; the papers collect once an epoch.
        rank: deviations that are kept, the oldest overwritten first; at least 2.
        scale: factor of the covariance, 1 = the paper's formula. The authors' code leaves the halves out and multiplies by
            its own `scale`: its 0.5 is 1 here, its default 1 is 2 here. It divides by its `rank` - 1 even while fewer
            deviations are stored; K is how many there are.
        **settings: those of `map_estimate`.

    Returns:
        Method whose state is `SWAGState`, whose central network (`key=None`, `state.variables`) is the mean, and whose
        info is that of `map_estimate` and `collected`, how many were collected so far (`fit`'s history holds its mean
        over the epoch).

    Raises:
        ValueError: for settings that are not whole numbers in range, or a `scale` that is not positive.
    Source: Maddox et al. 2019, section 3.3 (recalled); wjmaddox/swa_gaussian (looked up); Wilson and Izmailov 2020
        (MultiSWAG, recalled).
    """
    check_draws(num_draws)
    check_collecting(burn_in, every)
    check_positive(scale=scale)
    check_whole("rank", rank, 2, "One deviation spans no covariance; 20 is usual.")
    base = map_estimate(model, likelihood, optimizer, **settings)
    drawing = partial(draw, scale=scale)
    return Method(
        lambda key, start=None: init(key, start, base, rank),
        lambda state, batch, key: update(state, batch, key, base, burn_in, every),
        lambda state, inputs, key: predict_draws(
            state,
            inputs,
            key,
            model=model,
            likelihood=likelihood,
            draw=drawing,
            centre=lambda state: state.variables,
            num_draws=num_draws,
        ),
        draw=drawing,
    )


def swa(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    burn_in: int,
    every: int,
    **settings,
) -> Method:
    """The network at the mean of the weights that training passes through: sum_i theta_i / n, one member.

    Trains as `map_estimate`; after `burn_in` updates every `every`-th leaves its weights to the mean. Before the first there
    is no average and `bayescal.predict` refuses; `state.average.count` tells how many there were. Batch norm's moments
    are those of the network in training, which do not fit the mean: follow with `refresh(..., num_draws=1)`.

    Args:
        model: the network.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation; SGD with a constant or cyclical learning rate in the paper.
        burn_in: updates (not epochs) before the first that counts, 0 or more.
        every: updates from one collection to the next; the paper collects once an epoch.
        **settings: those of `map_estimate`.

    Returns:
        Method whose state is `SWAState`, whose `variables` are the averaged network, and whose info is that of
        `map_estimate` and `collected`, how many were collected so far (`fit`'s history holds its mean over the epoch).

    Raises:
        ValueError: for settings that are not whole numbers in range.
    Source: Izmailov et al. 2018 (recalled).
    """
    check_collecting(burn_in, every)
    base = map_estimate(model, likelihood, optimizer, **settings)

    def init(key, start=None):
        fit = base.init(key, start)
        return SWAState(fit, Average(_wide(fit.variables.params), jnp.zeros((), jnp.int32)))

    def update(state, batch, key):
        fit, info = base.update(state.fit, batch, key)
        due = is_due(state.fit.step, burn_in, every)
        average = collect(state.average, _wide(fit.variables.params), due)
        return SWAState(fit, average), _told(info, average)

    def predict(state, inputs, key):
        return base.predict(state.fit._replace(variables=state.variables), inputs, key)

    return Method(init, update, predict)


def collect(average: Average, theta: PyTree, due: jax.Array) -> Average:
    """mean + (theta - mean) / n where `theta` is due; until the first the mean follows it."""
    count = average.count + due.astype(jnp.int32)

    def move(mean, theta):
        moved = mean + (theta - mean) / jnp.maximum(count, 1).astype(mean.dtype)
        return jnp.where(average.count == 0, theta, jnp.where(due, moved, mean))

    return Average(jax.tree.map(move, average.mean, theta), count)


def _told(info: dict, average: Average) -> dict:
    return {**info, "collected": average.count.astype(jnp.float32)}


def _wide(params: PyTree) -> PyTree:
    """A mean of many needs more digits than the half precision that weights may have."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)


def _network(fit: MAPState, weights: PyTree) -> Variables:
    old = fit.variables
    return Variables(jax.tree.map(lambda new, x: new.astype(x.dtype), weights, old.params), old.stats)
