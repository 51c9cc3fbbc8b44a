"""IVON: a mean-field normal posterior for the cost of Adam, from gradients at networks drawn from it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bayescal.methods.draws import check_draws, predict_draws
from bayescal.methods.map_estimate import (
    check_positive,
    check_whole,
    one_member,
    share_of_penalty,
    start_variables,
    weighted_mean,
)
from bayescal.types import Key, Method, Model, PyTree, Variables


class IVONMoments(NamedTuple):
    """State of the optimiser: running gradient, diagonal Hessian (both of the mean nll, shaped as params), updates made."""

    momentum: PyTree
    hessian: PyTree
    step: jax.Array


class IVON(NamedTuple):
    """An optimiser that is also a posterior, normal(params, 1 / (num_data / temperature * (hessian + delta))).

    init: `params -> IVONMoments`.
    sample: `(key, params, moments) -> draw`, params of one network from the posterior.
    update: `(gradients, draws, moments, params) -> (change, moments)`; both pytrees have a leading axis of draws, and
        `gradients` are those of the mean nll at `draws`. `optax.apply_updates(params, change)` is the new mean.
    """

    init: Callable[[PyTree], IVONMoments]
    sample: Callable[[Key, PyTree, IVONMoments], PyTree]
    update: Callable[[PyTree, PyTree, IVONMoments, PyTree], tuple[PyTree, IVONMoments]]


def ivon_optimizer(
    learning_rate: Any,
    *,
    num_data: int,
    prior_precision: Any,
    temperature: Any = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.99999,
    initial_hessian: Any = 1.0,
    clip_radius: Any = math.inf,
) -> IVON:
    """Natural-gradient step m - learning_rate * (g + delta m) / (h + delta), delta = prior_precision / num_data.

    g is the running mean (beta1, bias-corrected) of the gradients at draws. h is that (beta2) of Price's unbiased
    estimate of the Hessian's diagonal, h_new = gradient * (draw - m) / variance, with the term that keeps h + delta
    positive: h + e + e^2 / (2 (h + delta)), where e = (1 - beta2) (h_new - h). Up to order 1 - beta2 its fixed point is
    the optimum of `variational`'s bound: E[gradient] + delta m = 0, and h = E[diagonal of the Hessian].

    Args: see `ivon`.
    Returns:
        `IVON`: init, sample and update, for training loops of your own.

    Raises:
        ValueError: for settings out of range.
    Source: Shen et al. 2024 (their algorithm recalled; the update checked against the authors' code), without that
        code's factor initial_hessian + delta on the learning rate.
    """
    check_positive(num_data=num_data, prior_precision=prior_precision, temperature=temperature)
    check_positive(initial_hessian=initial_hessian)
    if isinstance(clip_radius, Tracer) or clip_radius != math.inf:  # infinite = not clipped
        check_positive(clip_radius=clip_radius)
    if not callable(learning_rate):
        check_positive(learning_rate=learning_rate)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {beta!r}. It is the share of the old in a running mean.")
    delta, effective = prior_precision / num_data, num_data / temperature

    def init(params: PyTree) -> IVONMoments:
        full = lambda value: jax.tree.map(lambda p: jnp.full(p.shape, value, _float32_or_wider(p)), params)
        return IVONMoments(full(0.0), full(initial_hessian), jnp.zeros((), jnp.int32))

    def sample(key: Key, params: PyTree, moments: IVONMoments) -> PyTree:
        hessian, unravel = ravel_pytree(moments.hessian)  # one random draw compiles faster than one a layer
        normal = jax.random.normal(key, hessian.shape, hessian.dtype)
        noise = unravel(normal * jax.lax.rsqrt(effective * (hessian + delta)))
        return jax.tree.map(lambda p, n: (p + n).astype(p.dtype), params, noise)

    def update(gradients: PyTree, draws: PyTree, moments: IVONMoments, params: PyTree):
        step = moments.step + 1
        rate: Any = learning_rate(moments.step) if callable(learning_rate) else learning_rate

        def new_hessian(h, g, draw, p):
            noise = draw.astype(h.dtype) - p.astype(h.dtype)
            moved = (1 - beta2) * (effective * (h + delta) * (noise * g).mean(0) - h)
            return h + moved + 0.5 * moved**2 / (h + delta)

        def change(p, m, h):
            direction = (m / (1 - beta1**step) + delta * p) / (h + delta)
            return -rate * jnp.clip(direction, -clip_radius, clip_radius)

        hessian = jax.tree.map(new_hessian, moments.hessian, gradients, draws, params)
        momentum = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g.mean(0), moments.momentum, gradients)
        return jax.tree.map(change, params, momentum, hessian), IVONMoments(momentum, hessian, step)

    return IVON(init, sample, update)


class IVONState(NamedTuple):
    """The network at the posterior's mean, and what gives its variance."""

    variables: Variables
    moments: IVONMoments


def init(key: Key, start: PyTree | None, model: Model, optimizer: IVON) -> IVONState:
    """Posterior centred at the network's own initial weights, or at those of `start`, with fresh moments."""
    variables = model.init(key) if start is None else start_variables(start)
    return IVONState(variables, optimizer.init(variables.params))


def update(state: IVONState, batch, key: Key, model: Model, likelihood, optimizer: IVON, num_data, draws_per_update):
    """One step on the gradients of the mean nll at drawn networks; each passes its stats on to the next."""
    import optax

    (params, stats), moments = state

    def objective(params, stats, key):
        outputs, stats, penalty = model.train(Variables(params, stats), batch.inputs, key)
        log_prob = likelihood(one_member(outputs)).log_prob(batch.targets)
        loss = -weighted_mean(log_prob, batch.weights)
        return loss + share_of_penalty(penalty, num_data), (stats, loss)

    def at_a_draw(stats, key):
        draw_key, network_key = jax.random.split(key)
        drawn = optimizer.sample(draw_key, params, moments)
        gradient, (stats, loss) = jax.grad(objective, has_aux=True)(drawn, stats, network_key)
        return stats, (gradient, drawn, loss)

    keys = jax.random.split(key, draws_per_update)
    stats, (gradients, draws, losses) = jax.lax.scan(at_a_draw, stats, keys)
    change, moments = optimizer.update(gradients, draws, moments, params)
    return IVONState(Variables(optax.apply_updates(params, change), stats), moments), {"loss": losses.mean()}


def draw(state: IVONState, key: Key, optimizer: IVON) -> Variables:
    """One network from the posterior."""
    params, stats = state.variables
    return Variables(optimizer.sample(key, params, state.moments), stats)


def ivon(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    learning_rate: Any,
    num_draws: int,
    prior_precision: Any,
    temperature: Any = 1.0,
    draws_per_update: int = 1,
    **settings,
) -> Method:
    """Mean-field normal posterior: minimises num_data E[mean nll] + temperature * KL[q || prior^(1 / temperature)].

    q = normal(params, temperature / (num_data * hessian + prior_precision)), by `ivon_optimizer`: one gradient per draw
    and as much memory as Adam. Gradients are those of the mean nll, and num_data enters through the variance alone, once.
    `temperature` here tempers the likelihood and the prior alike (`variational` keeps the prior's variance).

    Args:
        model: any network; its `stats` are carried and never drawn.
        likelihood: outputs with a leading member axis -> predictive.
        num_data: number of training rows; never inferred.
        learning_rate: of the preconditioned step, so about 1e-3 to 1e-1 in units of a Newton step; or a schedule,
            `step -> learning rate`. A recipe for the authors' code: its rate times (initial_hessian + delta).
        num_draws: members of the predictive.
        prior_precision: inverse variance of the normal prior on every weight, whose mean is 0; positive.
        temperature: of the posterior; 1 = Bayes.
        draws_per_update: networks drawn for a gradient; more = less noise.
        **settings: those of `ivon_optimizer`. `beta1`: of the gradient. `beta2`: of the Hessian, which forgets its start
            after some 1 / (1 - beta2) updates, 1e5 by default: lower it for shorter runs. `initial_hessian`: of the mean
            nll, per weight; 0.1 to 1 is usual. `clip_radius`: bound on each number of (g + delta m) / (h + delta).

    Returns:
        Method whose state is `IVONState` and whose info is `loss`, mean nats per example at the draws.

    Raises:
        ValueError: for settings out of range.
    Source: Shen et al. 2024, "Variational learning is effective for large deep networks" (recalled), and its code.
    """
    check_draws(num_draws)
    check_whole("draws_per_update", draws_per_update, 1, "1 is usual.")
    optimizer = ivon_optimizer(
        learning_rate, num_data=num_data, prior_precision=prior_precision, temperature=temperature, **settings
    )
    drawing: dict[str, Any] = {
        "model": model,
        "likelihood": likelihood,
        "draw": lambda state, key: draw(state, key, optimizer),
        "centre": lambda state: state.variables,
        "num_draws": num_draws,
    }
    return Method(
        lambda key, start=None: init(key, start, model, optimizer),
        lambda state, batch, key: update(state, batch, key, model, likelihood, optimizer, num_data, draws_per_update),
        lambda state, inputs, key: predict_draws(state, inputs, key, **drawing),
        draw=drawing["draw"],
    )


def _float32_or_wider(leaf):
    """Of the moments: in bfloat16 steps of 1 - beta2 would be lost."""
    return jnp.promote_types(leaf.dtype, jnp.float32)
