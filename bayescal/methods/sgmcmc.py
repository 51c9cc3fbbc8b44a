"""Markov chains on the posterior of a network's params, moved by minibatch gradients: kernels of blackjax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.map_estimate import (
    check_not_negative,
    check_positive,
    check_whole,
    one_member,
    start_variables,
    weighted_mean,
)
from bayescal.methods.samples import (
    Samples,
    check_collecting,
    draw_sample,
    holds_samples,
    is_due,
    keep,
    no_samples,
    predict_samples,
    sampled_networks,
)
from bayescal.types import Key, Method, Model, PyTree, Variables

_CARRIED = 0x43415252  # folded into the key of `init`, so that a momentum shares no stream with weights


class SGMCMCState(NamedTuple):
    """Where the chain is, what its kernel carries along (`()`, momentum, moments), what was kept, and the updates made."""

    variables: Variables
    carried: PyTree
    samples: Samples
    step: jax.Array

    ready = holds_samples
    networks = sampled_networks


class Kernel(NamedTuple):
    """A chain's move.

    init: `(key, params, temperature) -> carried`, what the kernel carries beside the position; () for nothing.
    step: `(key, params, carried, gradient, step_size, temperature) -> (params, carried)`; `gradient` estimates that of the
        log posterior density of all data.
    """

    init: Callable[[Key, PyTree, Any], PyTree]
    step: Callable[[Key, PyTree, PyTree, PyTree, Any, Any], tuple[PyTree, PyTree]]


def init(key: Key, start: PyTree | None, model: Model, kernel: Kernel, temperature: Callable, num_samples: int):
    """A chain that has kept nothing, at the network's own initial weights or at those of `start`."""
    variables = model.init(key) if start is None else start_variables(start)
    step = jnp.zeros((), jnp.int32)
    carried = kernel.init(jax.random.fold_in(key, _CARRIED), variables.params, temperature(step))
    return SGMCMCState(variables, carried, no_samples(variables.params, num_samples), step)


def update(state, batch, key, model, likelihood, kernel, num_data, prior_precision, step_size, temperature, due):
    """One move of the chain; its position is kept where one is due."""
    import optax

    network_key, noise_key = jax.random.split(key)

    def log_density(params):
        variables = state.variables._replace(params=params)
        outputs, stats, penalty = model.train(variables, batch.inputs, network_key)
        mean = weighted_mean(likelihood(one_member(outputs)).log_prob(batch.targets), batch.weights)
        prior = -0.5 * prior_precision * optax.tree.norm(params, squared=True)
        return num_data * mean + prior - penalty, (stats, -mean)

    old = state.variables.params, state.carried
    gradient, (stats, loss) = jax.grad(log_density, has_aux=True)(old[0])
    moved = kernel.step(noise_key, *old, gradient, step_size(state.step), temperature(state.step))
    # A schedule's float32 must not widen params in bfloat16, or the state would change its type.
    params, carried = jax.tree.map(lambda new, one: new.astype(one.dtype), moved, old)
    samples = keep(state.samples, params, due(state.step))
    info = {"loss": loss, "kept": samples.count}
    return SGMCMCState(Variables(params, stats), carried, samples, state.step + 1), info


def predict(state: SGMCMCState, inputs, key: Key | None, model: Model, likelihood: Callable):
    """The likelihood of all networks kept, as members; before the first, where the chain is. The key is not used."""
    return predict_samples(state.samples, state.variables.stats, inputs, model, likelihood)


def draw(state: SGMCMCState, key: Key) -> Variables:
    """One of the networks kept, each as likely; before the first, where the chain is."""
    return draw_sample(state.samples, state.variables.stats, key)


def sgmcmc(
    model: Model,
    likelihood: Callable,
    kernel: Kernel,
    *,
    num_data: int,
    num_samples: int,
    prior_precision: Any,
    step_size: Callable,
    temperature: Callable,
    due: Callable,
) -> Method:
    """Chain of any kernel on num_data * mean_i w_i log p(y_i | x_i) - prior_precision / 2 * |params|^2 - penalty.

    What the samplers below share: they differ by their kernel and by three functions of the number of updates made, 0 at
    the first. The log density is in nats for the whole data, estimated from each batch whatever its size.

    Networks kept share the last `stats`: with batch norm, draw networks and re-estimate their moments before use.

    Args:
        model: any network, run by its `train`: dropout stays on and adds to the noise of gradients; a penalty (nats for the
            whole data) counts as part of the prior.
        likelihood: outputs with a leading member axis -> predictive.
        kernel: how the chain moves.
        num_data: number of training rows; never inferred.
        num_samples: networks that are held; older ones are overwritten.
        prior_precision: inverse variance of the normal prior of mean 0 on every weight; 0 = a flat prior.
        step_size: `step -> step size` in the kernel's unit.
        temperature: `step -> temperature`; 1 = Bayes, 0 = no noise.
        due: `step -> bool`, whether the position after that update is kept.

    Returns:
        Method whose state is `SGMCMCState` and whose info is `loss` (mean nats per example of the batch, where the chain
        was) and `kept` (positions kept so far; `fit`'s history holds its mean over the epoch).

    Raises:
        ValueError: for `num_data` that is not positive, a negative `prior_precision`, or no samples.
    """
    check_whole("num_samples", num_samples, 1, "10 to 100 is usual.")
    check_positive(num_data=num_data)
    check_not_negative("0 means a flat prior.", prior_precision=prior_precision)
    moving = model, likelihood, kernel, num_data, prior_precision, step_size, temperature, due
    return Method(
        lambda key, start=None: init(key, start, model, kernel, temperature, num_samples),
        lambda state, batch, key: update(state, batch, key, *moving),
        lambda state, inputs, key: predict(state, inputs, key, model, likelihood),
        draw=draw,
    )


def scheduled(**setting) -> Callable:
    """A number as the schedule `step -> number`, or the schedule that was given.

    Raises:
        ValueError: for a number that is not positive.
    """
    ((_, value),) = setting.items()
    if callable(value):
        return value
    check_positive(**setting)
    return lambda step: value


def kept_every(burn_in: int, every: int) -> Callable[[jax.Array], jax.Array]:
    """`step -> bool`: every `every`-th position after `burn_in` updates is due.

    Raises:
        ValueError: for settings that are no whole numbers in range.
    """
    check_collecting(burn_in, every)
    return lambda step: is_due(step, burn_in, every)
