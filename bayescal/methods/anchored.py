"""Anchored networks: each is pulled towards its own draw from the prior instead of towards 0."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods.map_estimate import MAPState, check_positive, map_estimate
from bayescal.types import Key, Method, Model, PyTree

if TYPE_CHECKING:
    import optax

_ANCHOR = 0x414E4348  # folded into the key of `init`, so that the anchor shares no stream with the network


def anchored(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_data: int,
    prior_precision: Any,
    **settings,
) -> Method:
    """Minimises mean_i w_i loss_i + prior_precision / 2 * |params - anchor|^2 / num_data, anchor ~ the normal prior.

    `map_estimate` of a prior centred at the anchor, which is drawn from normal(0, 1 / prior_precision) by the key of
    `init`; made for `ensemble`, where each member has its own. The network starts where its own initialisation puts it
    (the authors' code starts at the anchor, but a draw from a wide prior is a bad place to begin), or at `start`.

    For Bayesian linear regression with posterior normal(mean, P^-1) the members are spread as normal(mean,
    P^-1 prior_precision P^-1): the right mean, but the posterior's spread only where data say nothing, and less elsewhere.
    Members would be draws from the exact posterior if noise were added to the targets too, which is not done here.

    Args:
        model: the network.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation; it is given the gradient with the pull.
        num_data: number of training rows, which scales the pull; never inferred.
        prior_precision: inverse variance of the prior, positive: one for every parameter, or a pytree whose structure
            is the top of the params' own, for one number a layer.
        **settings: `loss` and `objective` of `map_estimate`; the pull comes on top of either.

    Returns:
        Method whose state is `MAPState` (the anchor is the first part of its `opt_state`) and whose info is `loss`, mean
        nats per example without the pull.

    Raises:
        ValueError: for settings that are not positive, a `prior_precision` of another structure, and as `map_estimate`.
    Source: Pearce et al. 2020, "Uncertainty in neural networks: approximately Bayesian ensembling" (recalled; start
        and scaling read in the authors' code).
    """
    import optax

    for precision in jax.tree.leaves(prior_precision):
        check_positive(prior_precision=precision)

    def add_pull(updates, state, params=None):
        """The anchor is the optimiser's state: `map_estimate` carries it, checkpoints it, and need not know of it."""
        pulled = lambda g, p, anchor, precision: (g + precision / num_data * (p - anchor)).astype(g.dtype)
        return jax.tree.map(pulled, updates, params, state, _for_every_leaf(prior_precision, params)), state

    pull = optax.GradientTransformation(lambda params: params, add_pull)
    base = map_estimate(model, likelihood, optax.chain(pull, optimizer), num_data=num_data, **settings)

    def init(key: Key, start: PyTree | None = None) -> MAPState:
        state = base.init(key, start)
        anchor = draw_anchor(jax.random.fold_in(key, _ANCHOR), state.variables.params, prior_precision)
        return state._replace(opt_state=(anchor, *state.opt_state[1:]))

    return base._replace(init=init)


def draw_anchor(key: Key, params: PyTree, prior_precision: Any) -> PyTree:
    """One draw from normal(0, 1 / prior_precision), shaped as `params`; `prior_precision` as in `anchored`."""
    flat, unravel = ravel_pytree(params)  # one random draw compiles faster than one a layer
    normal = unravel(jax.random.normal(key, flat.shape, flat.dtype))
    precisions = _for_every_leaf(prior_precision, params)
    return jax.tree.map(lambda n, precision: (n / jnp.sqrt(precision)).astype(n.dtype), normal, precisions)


def _for_every_leaf(prior_precision, params):
    try:
        return jax.tree.broadcast(prior_precision, params)
    except ValueError as error:
        raise ValueError(
            "`prior_precision` must be one number, or a pytree whose structure is the top of the params', "
            f"{jax.tree.structure(params)}, got {jax.tree.structure(prior_precision)}. Give each of its parts a number."
        ) from error
