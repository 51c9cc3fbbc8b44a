"""Microcanonical Langevin Monte Carlo on all rows at once, through blackjax: unadjusted, and cheap a step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.log_density import Posterior, as_stored, cast_floats, position, position_type
from bayescal.methods.map_estimate import check_positive, check_whole, start_variables
from bayescal.methods.nuts import WARMUP_ADVICE, select
from bayescal.methods.samples import (
    Samples,
    check_keeping,
    draw_sample,
    holds_samples,
    is_due,
    keep,
    no_samples,
    predict_samples,
    sampled_networks,
)
from bayescal.types import Key, Method, Model, PyTree, Variables

TRUST = 1.5  # width, in powers of the step size, of the energies that say something about another step size
LEAST = 1e-4  # squared energy change over the wanted one, below which float32 rounding is what it may be made of
MEMORY = 149 / 151  # of the running average of energies: 150 steps
NO_CEILING = 3e38  # not infinity, which comparisons of states cannot scale
MOST_ENERGY = 1e9  # beyond which a change of energy says only "far too long a step"; its square is still a float32
_DIRECTION = 0x44495243  # folded into the key of `init`, so that the direction shares no stream with the weights


class MCLMCState(NamedTuple):
    """Where the chain is and its direction, what it has tuned, the positions kept, and the number of updates made.

    momentum: a unit vector, shaped as params.
    mean: of the positions after all updates so far; once the warm-up is over, of those after it.
    """

    variables: Variables
    momentum: PyTree
    mean: PyTree
    tuning: "Tuning"
    samples: Samples
    step: jax.Array

    ready = holds_samples
    networks = sampled_networks


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


def init_tuning(dimensions: int, dtype=jnp.float32) -> Tuning:
    """A first step that moves every parameter by 0.01; one too short grows fourfold at once, one too long throws away
    where the chain starts."""
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

    root, zero = jnp.sqrt(jnp.float32(dimensions)), jnp.float32(0)
    tuning = Tuning(0.01 * root, root, mass_matrix_adaptation()[0](dimensions), zero, zero, jnp.float32(NO_CEILING))
    return cast_floats(tuning, dtype)


def tune_step_size(tuning: Tuning, energy_change: jax.Array, finite: jax.Array, wanted: Any) -> Tuning:
    """The step size at which the squared energy change, of order step_size^6, averages `wanted`."""
    ceiling = jnp.where(finite, tuning.ceiling, jnp.minimum(tuning.ceiling, 0.8 * tuning.step_size))
    ratio = jnp.minimum(jnp.abs(energy_change), MOST_ENERGY) ** 2 / wanted + LEAST
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
    fresh = init_tuning(dimensions, tuning.step_size.dtype)
    return fresh._replace(step_size=tuning.step_size * unit, metric=metric)


def init(key: Key, start: PyTree | None, model: Model, num_samples: int) -> MCLMCState:
    """A chain at a fresh network, or at the one in `start`, with a random direction."""
    from blackjax.util import generate_unit_vector

    variables = model.init(key) if start is None else start_variables(start)
    dimensions = sum(x.size for x in jax.tree.leaves(variables.params))
    if dimensions < 2:
        raise ValueError(
            f"`model` must have at least 2 parameters, got {dimensions}: in one dimension a direction cannot turn. "
            "Use `nuts`."
        )
    here = position(variables.params)
    momentum = generate_unit_vector(jax.random.fold_in(key, _DIRECTION), here)
    tuning = init_tuning(dimensions, position_type(here))
    samples = no_samples(variables.params, num_samples)
    return MCLMCState(variables, momentum, here, tuning, samples, jnp.zeros((), jnp.int32))


def update(state, batch, key, posterior: Posterior, warmup, every, steps_per_update, desired_energy_variance):
    """`steps_per_update` steps of the dynamics; a third each of the warm-up finds the typical set, the metric, the step."""
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
    from blackjax.mcmc.integrators import IntegratorState
    from blackjax.mcmc.mclmc import build_kernel

    posterior.check_batch(batch)
    posterior.check_model(state.variables, batch.inputs)
    dimensions = sum(x.size for x in jax.tree.leaves(state.variables.params))
    wanted = desired_energy_variance * dimensions
    here = position(state.variables.params)
    density = posterior.relative_to(state.variables._replace(params=here), batch)
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

    value, gradient = jax.value_and_grad(density)(here)
    first = IntegratorState(here, state.momentum, value, gradient)
    keys = jax.random.split(key, steps_per_update)
    (point, tuning), (energy_change, finite) = jax.lax.scan(one, (first, state.tuning), keys)
    tuning = select(state.step == 2 * third - 1, take_metric(tuning, dimensions), tuning)
    variables = state.variables._replace(params=as_stored(point.position, state.variables.params))
    samples = keep(state.samples, variables.params, is_due(state.step, warmup, every))
    seen = jnp.where(warming, state.step, state.step - warmup)
    mean = jax.tree.map(lambda m, x: m + (x - m) / (seen + 1).astype(x.dtype), state.mean, point.position)
    info = {
        "loss": posterior.full_loss(variables, batch),
        "energy_variance": jnp.mean(energy_change**2) / dimensions,
        "equipartition": equipartition(point, state.mean),
        "divergent": jnp.mean(~finite),
        "step_size": tuning.step_size,
        "kept": samples.count,
    }
    info = {k: jnp.asarray(v, jnp.float32) for k, v in info.items()}
    return MCLMCState(variables, point.momentum, mean, tuning, samples, state.step + 1), info


def equipartition(point, centre: PyTree) -> jax.Array:
    """-(x - centre) . grad log p(x) / number of params, whose mean over a density that `x` follows is 1, for any centre.

    By parts: each parameter's term is 1 (the virial theorem). A chain on its way to the density has other values, mostly
    negative, and one that hardly moves has about 0.
    """
    terms = jax.tree.map(lambda x, c, g: jnp.sum((c - x) * g), point.position, centre, point.logdensity_grad)
    return sum(jax.tree.leaves(terms), jnp.zeros(())) / sum(x.size for x in jax.tree.leaves(centre))


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
    deterministic one: dropout is off, and batch norm keeps the moments it starts with. Params in half precision move in
    float32, and are rounded where a position is stored.

    Start from a trained network. Nothing is rejected, so that a chain whose warm-up ends before it has come to the
    posterior looks sound by its steps: their energies are right anywhere. Two things tell. `equipartition`, averaged over
    the updates after the warm-up, is about 1 where the chain is among the posterior, and about 0 or far off elsewhere; its
    standard error is about sqrt(2 / (parameters * independent samples)). And `chain_diagnostics` of several chains.

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
        `energy_variance` (per parameter), `equipartition` (1 in the mean over the posterior), `divergent` (fraction of
        steps that were not finite and were taken back), `step_size` and `kept` (positions kept so far).

    Raises:
        ValueError: for settings out of range, and a model with fewer than two parameters; in `update`, a batch that is not
            all rows, or a model with a penalty.
    Source: Robnik et al. 2023 (recalled); the kernel is blackjax's, and so are the warm-up's formulas.
    """
    posterior = Posterior(model, likelihood, num_data, prior_precision, temperature)
    posterior.check()
    check_positive(desired_energy_variance=desired_energy_variance)
    check_whole("warmup", warmup, 6, WARMUP_ADVICE)
    check_keeping(num_samples, 0, every)
    check_whole("steps_per_update", steps_per_update, 1, "10 is usual.")
    settings = dict(warmup=warmup, every=every, steps_per_update=steps_per_update)
    moving = partial(update, posterior=posterior, desired_energy_variance=desired_energy_variance, **settings)
    return Method(
        lambda key, start=None: init(key, start, model, num_samples),
        moving,
        lambda state, inputs, key: predict_samples(state.samples, state.variables.stats, inputs, model, likelihood),
        draw=lambda state, key: draw_sample(state.samples, state.variables.stats, key),
    )
