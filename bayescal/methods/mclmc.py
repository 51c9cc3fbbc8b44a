"""Microcanonical Langevin Monte Carlo on all rows at once, through blackjax: unadjusted, and cheap a step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.log_density import Posterior
from bayescal.methods.map_estimate import check_positive, start_variables
from bayescal.methods.nuts import arrays, check_warmup, select
from bayescal.methods.samples import Samples, check_keeping, draw_sample, is_due, keep, no_samples, predict_samples
from bayescal.types import Key, Method, Model, PyTree, Variables

TRUST = 1.5  # width, in powers of the step size, of the energies that say something about another step size
MEMORY = 149 / 151  # of the running average of energies: 150 steps
NO_CEILING = 3e38  # not infinity, which comparisons of states cannot scale
MOST_ENERGY = 1e9  # beyond which a change of energy says only "far too long a step"; its square is still a float32


class MCLMCState(NamedTuple):
    """Where the chain is and its direction, what it has tuned, the positions kept, and the number of updates made."""

    variables: Variables
    momentum: PyTree  # a unit vector
    tuning: "Tuning"
    samples: Samples
    step: jax.Array


class Tuning(NamedTuple):
    """Step size, length over which the direction is forgotten, running variances with the metric, and what is averaged.

    weight, energy: sums over the steps seen of their weights, and of weight * squared energy change / wanted, both in units
        of the step size as it is now.
    ceiling: of the step size, lowered where a step was not finite.
    """

    step_size: jax.Array
    length: jax.Array
    metric: PyTree
    weight: jax.Array
    energy: jax.Array
    ceiling: jax.Array


def init_tuning(dimensions: int) -> Tuning:
    """A first step that moves every parameter by 0.01; one too short grows twentyfold at once, one too long throws away
    where the chain starts."""
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

    metric = arrays(mass_matrix_adaptation()[0](dimensions))
    root, zero = jnp.sqrt(jnp.float32(dimensions)), jnp.float32(0)
    return Tuning(0.01 * root, root, metric, zero, zero, jnp.float32(NO_CEILING))


def tune_step_size(tuning: Tuning, energy_change: jax.Array, finite: jax.Array, wanted: Any) -> Tuning:
    """The step size at which the squared energy change, of order step_size^6, averages `wanted`."""
    ceiling = jnp.where(finite, tuning.ceiling, jnp.minimum(tuning.ceiling, 0.8 * tuning.step_size))
    ratio = jnp.minimum(jnp.abs(energy_change), MOST_ENERGY) ** 2 / wanted + 1e-8
    trusted = jnp.exp(-0.5 * (jnp.log(ratio) / (6 * TRUST)) ** 2)
    weight = MEMORY * tuning.weight + trusted
    energy = MEMORY * tuning.energy + trusted * ratio
    factor = jnp.minimum((weight / energy) ** (1 / 6), ceiling / tuning.step_size)
    # `energy` moves to the unit of the new step size, for the plain sum of energy / step_size^6 overflows float32.
    return tuning._replace(
        step_size=factor * tuning.step_size, weight=weight, energy=energy * factor**6, ceiling=ceiling
    )


def take_metric(tuning: Tuning, dimensions: int) -> Tuning:
    """The running variances become the metric; in its unit the posterior has size 1, and the step size is tuned anew."""
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

    metric = mass_matrix_adaptation()[2](tuning.metric)
    unit = jnp.sqrt(dimensions / metric.inverse_mass_matrix.sum())
    fresh = init_tuning(dimensions)
    return fresh._replace(step_size=tuning.step_size * unit, metric=metric)


def init(key: Key, start: PyTree | None, model: Model, num_samples: int) -> MCLMCState:
    """A chain at a fresh network, or at the one in `start`, with a random direction."""
    from blackjax.util import generate_unit_vector

    network_key, direction_key = jax.random.split(key)
    variables = model.init(network_key) if start is None else start_variables(start)
    dimensions = sum(x.size for x in jax.tree.leaves(variables.params))
    if dimensions < 2:
        raise ValueError(
            f"`model` must have at least 2 parameters, got {dimensions}: in one dimension a direction cannot turn. "
            "Use `nuts`."
        )
    momentum = generate_unit_vector(direction_key, variables.params)
    samples = no_samples(variables.params, num_samples)
    return MCLMCState(variables, momentum, init_tuning(dimensions), samples, jnp.zeros((), jnp.int32))


def update(state, batch, key, posterior: Posterior, warmup, every, steps_per_update, desired_energy_variance):
    """`steps_per_update` steps of the dynamics; a third each of the warm-up finds the typical set, the metric, the step."""
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
    from blackjax.mcmc.integrators import IntegratorState
    from blackjax.mcmc.mclmc import build_kernel

    posterior.check_batch(batch)
    posterior.check_model(state.variables, batch.inputs)
    dimensions = sum(x.size for x in jax.tree.leaves(state.variables.params))
    wanted = desired_energy_variance * dimensions
    density = posterior.relative_to(state.variables, batch)
    kernel, see = build_kernel(), mass_matrix_adaptation()[1]
    third = warmup // 3
    warming = state.step < warmup
    measuring = (state.step >= third) & (state.step < 2 * third)

    def one(carry, step_key):
        # Without it the compiler rounds a step differently for a lone chain than for a member of an ensemble.
        point, tuning = jax.lax.optimization_barrier(carry)
        told: Any
        point, told = kernel(
            step_key, point, density, tuning.metric.inverse_mass_matrix, tuning.length, tuning.step_size
        )
        tuned = tune_step_size(tuning, told.energy_change, told.nonans, wanted)
        metric = select(measuring, see(tuning.metric, point.position), tuning.metric)
        tuning = select(warming, tuned, tuning)._replace(metric=metric)
        return (point, tuning), (told.energy_change, told.nonans)

    value, gradient = jax.value_and_grad(density)(state.variables.params)
    first = IntegratorState(state.variables.params, state.momentum, value, gradient)
    keys = jax.random.split(key, steps_per_update)
    (point, tuning), (energy_change, finite) = jax.lax.scan(one, (first, state.tuning), keys)
    tuning = select(state.step == 2 * third - 1, take_metric(tuning, dimensions), tuning)
    variables = state.variables._replace(params=point.position)
    due = is_due(state.step, warmup, every)
    info = {
        "loss": posterior.full_loss(variables, batch),
        "energy_variance": jnp.mean(energy_change**2) / dimensions,
        "divergent": jnp.mean(~finite),
        "step_size": tuning.step_size,
        "kept": due,
    }
    info = {k: jnp.asarray(v, jnp.float32) for k, v in info.items()}
    samples = keep(state.samples, point.position, due)
    return MCLMCState(variables, point.momentum, tuning, samples, state.step + 1), info


def mclmc(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    prior_precision: Any,
    warmup: int,
    num_samples: int,
    every: int = 1,
    steps_per_update: int = 10,
    desired_energy_variance: float = 5e-4,
    temperature: Any = 1.0,
) -> Method:
    """Samples p(params) ~ exp[(sum_i w_i log_prob_i - prior_precision / 2 * |params|^2) / temperature], nearly.

    Motion at constant energy and speed in a random direction that is slowly forgotten. Nothing is rejected, so that samples
    have a bias, which the energy variance bounds; a step costs two gradients of the whole data however many parameters
    there are: `fit(..., batch_size=num_data, epochs=warmup + every * num_samples)`. Parallel chains are
    `ensemble(mclmc(...), 4)`; from a deep ensemble they start by `fit(..., start=fitted.state)`. The network is the
    deterministic one: dropout is off, and batch norm keeps the moments it starts with.

    Args:
        model: a network without a penalty and with at least two parameters.
        likelihood: outputs with a leading member axis -> predictive.
        num_data: number of training rows, all of which every batch must hold.
        prior_precision: inverse variance of the normal prior, of mean 0, on every parameter.
        warmup: updates that tune, and whose positions are not kept; at least 6, a hundred or more is usual.
        num_samples: positions kept, the last ones; each is a member of the predictive.
        every: updates from one position that is kept to the next.
        steps_per_update: steps of the dynamics in an update.
        desired_energy_variance: mean squared energy change of a step per parameter, nats squared; lower = less bias,
            shorter steps.
        temperature: of the posterior; 1 = Bayes, below 1 = "cold", for likelihood and prior alike.

    Returns:
        Method whose state is `MCLMCState` and whose info is `loss` (mean nats per example at the new position),
        `energy_variance` (per parameter), `divergent` (fraction of steps that were not finite and were taken back),
        `step_size` and `kept` (0 or 1).

    Raises:
        ValueError: for settings out of range, and a model with fewer than two parameters; in `update`, a batch that is not
            all rows, or a model with a penalty.
    Source: Robnik et al. 2023 (recalled); the kernel is blackjax's, and so are the warm-up's formulas.
    """
    posterior = Posterior(model, likelihood, num_data, prior_precision, temperature)
    posterior.check()
    check_positive(desired_energy_variance=desired_energy_variance)
    check_warmup(warmup, least=6)
    check_keeping(num_samples, 0, every)
    if not isinstance(steps_per_update, int) or steps_per_update < 1:
        raise ValueError(
            f"`steps_per_update` must be a whole number of at least 1, got {steps_per_update!r}. 10 is usual."
        )
    settings = dict(warmup=warmup, every=every, steps_per_update=steps_per_update)
    moving = partial(update, posterior=posterior, desired_energy_variance=desired_energy_variance, **settings)
    return Method(
        lambda key, start=None: init(key, start, model, num_samples),
        moving,
        lambda state, inputs, key: predict_samples(state.samples, state.variables.stats, inputs, model, likelihood),
        draw=lambda state, key: draw_sample(state.samples, state.variables.stats, key),
    )
