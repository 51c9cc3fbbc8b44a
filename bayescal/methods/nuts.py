"""The no-U-turn sampler on all rows at once, through blackjax: the reference for small networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.methods.log_density import Posterior, as_stored, cast_floats, position, position_type
from bayescal.methods.map_estimate import check_whole, start_variables
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

WARMUP_ADVICE = (
    "It counts updates: a chain that has not adapted its step size samples nothing, and several hundred is usual."
)


class NUTSState(NamedTuple):
    """Where the chain is, what its warm-up has learnt, the positions kept, and the number of transitions made."""

    variables: Variables
    adaptation: "Adaptation"
    samples: Samples
    step: jax.Array

    ready = holds_samples
    networks = sampled_networks


class Adaptation(NamedTuple):
    """blackjax's states of the dual averaging of log step sizes, and of the window's running variances."""

    step_size: Any
    metric: Any


class Warmup(NamedTuple):
    """Stan's warm-up, one transition at a time: the step size always, the diagonal metric in windows that double.

    slow: (warmup,) whether the transition counts for the variances.
    window_end: (warmup,) whether they become the metric after it, and the step size starts anew.
    averaging: init, update and final of the step size.
    variances: init, update and final of the metric.
    """

    slow: np.ndarray
    window_end: np.ndarray
    averaging: tuple[Callable, Callable, Callable]
    variances: tuple[Callable, Callable, Callable]

    def init(self, dimensions: int, dtype=jnp.float32) -> Adaptation:
        first = 0.25 / dimensions**0.25  # a transition that goes too far costs one step, one too short hundreds
        return cast_floats(Adaptation(self.averaging[0](first), self.variances[0](dimensions)), dtype)

    def step_size(self, adaptation: Adaptation, step: jax.Array) -> jax.Array:
        """The one being tried in warm-up; the averaged one after."""
        tried, averaged = jnp.exp(adaptation.step_size.log_step_size), self.averaging[2](adaptation.step_size)
        return jnp.where(step < len(self.slow), tried, averaged).astype(tried.dtype)

    def update(self, adaptation: Adaptation, step: jax.Array, position: PyTree, acceptance: jax.Array) -> Adaptation:
        """What is learnt from transition `step`; after the warm-up nothing."""
        place = jnp.minimum(step, len(self.slow) - 1)
        warming = step < len(self.slow)
        seen = self.variances[1](adaptation.metric, position)
        metric = select(jnp.asarray(self.slow)[place], seen, adaptation.metric)
        learnt = Adaptation(self.averaging[1](adaptation.step_size, acceptance), metric)
        anew = Adaptation(self.averaging[0](self.averaging[2](learnt.step_size)), self.variances[2](metric))
        return select(warming, select(jnp.asarray(self.window_end)[place], anew, learnt), adaptation)


def stan_warmup(warmup: int, target_acceptance: float) -> Warmup:
    """blackjax's parts under Stan's schedule; fewer than 20 transitions adapt the step size alone."""
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
    from blackjax.adaptation.staged_adaptation import build_schedule
    from blackjax.adaptation.step_size import dual_averaging_adaptation

    schedule = np.asarray(build_schedule(warmup), bool)
    return Warmup(
        schedule[:, 0], schedule[:, 1], dual_averaging_adaptation(target_acceptance), mass_matrix_adaptation()
    )


def init(key: Key, start: PyTree | None, model: Model, warm_up: Warmup, num_samples: int) -> NUTSState:
    """A chain at a fresh network, or at the one in `start`, that has adapted nothing yet."""
    variables = model.init(key) if start is None else start_variables(start)
    dimensions = sum(x.size for x in jax.tree.leaves(variables.params))
    samples = no_samples(variables.params, num_samples)
    adaptation = warm_up.init(dimensions, position_type(variables.params))
    return NUTSState(variables, adaptation, samples, jnp.zeros((), jnp.int32))


def update(
    state: NUTSState, batch, key: Key, posterior: Posterior, warm_up: Warmup, every: int, max_num_doublings: int
):
    """One transition. Nothing of the density is kept between updates: another order of rows would round it differently."""
    import blackjax

    posterior.check_batch(batch)
    posterior.check_model(state.variables, batch.inputs)
    here = position(state.variables.params)
    density = posterior.relative_to(state.variables._replace(params=here), batch)
    step_size = warm_up.step_size(state.adaptation, state.step)
    moved, told = blackjax.nuts.build_kernel()(
        key,
        blackjax.nuts.init(here, density),
        density,
        step_size,
        state.adaptation.metric.inverse_mass_matrix,
        max_num_doublings,
    )
    variables = state.variables._replace(params=as_stored(moved.position, state.variables.params))
    adaptation = warm_up.update(state.adaptation, state.step, moved.position, told.acceptance_rate)
    samples = keep(state.samples, variables.params, is_due(state.step, len(warm_up.slow), every))
    info = {
        "loss": posterior.full_loss(variables, batch),
        "acceptance": told.acceptance_rate,
        "divergent": told.is_divergent,
        "step_size": step_size,
        "num_steps": told.num_integration_steps,
        "kept": samples.count,
    }
    info = {k: jnp.asarray(v, jnp.float32) for k, v in info.items()}
    return NUTSState(variables, adaptation, samples, state.step + 1), info


def nuts(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    prior_precision: Any,
    warmup: int,
    num_samples: int,
    every: int = 1,
    target_acceptance: float = 0.8,
    max_num_doublings: int = 8,
    temperature: Any = 1.0,
) -> Method:
    """Samples p(params) ~ exp[(sum_i w_i log_prob_i - prior_precision / 2 * |params|^2) / temperature] without bias.

    An update is one transition of the no-U-turn sampler, of up to 2**max_num_doublings gradients of the whole data:
    `fit(..., batch_size=num_data, epochs=warmup + every * num_samples)`. Parallel chains are `ensemble(nuts(...), 4)`;
    from a deep ensemble they start by `fit(..., start=fitted.state)`. The network is the deterministic one: dropout is
    off, and batch norm keeps the moments it starts with. Params in half precision move in float32, and are rounded where
    a position is stored.

    Args:
        model: a small network without a penalty.
        likelihood: outputs with a leading member axis -> predictive.
        num_data: number of training rows, all of which every batch must hold.
        prior_precision: inverse variance of the normal prior, of mean 0, on every parameter.
        warmup: updates that adapt step size and diagonal metric, and whose positions are not kept; several hundred.
            Fewer than 20 adapt the step size alone.
        num_samples: positions kept, the last ones; each is a member of the predictive.
        every: updates from one position that is kept to the next.
        target_acceptance: mean Metropolis acceptance of the steps tried in the warm-up, between 0 and 1; higher = shorter
            steps. That of the averaged step size, used after it, comes out above (0.9 for 0.8).
        max_num_doublings: of the trajectory in one transition.
        temperature: of the posterior; 1 = Bayes, below 1 = "cold", for likelihood and prior alike.

    Returns:
        Method whose state is `NUTSState` and whose info is `loss` (mean nats per example at the new position),
        `acceptance`, `divergent` (0 or 1), `step_size`, `num_steps` (gradients) and `kept` (positions kept so far).

    Raises:
        ValueError: for settings out of range; in `update`, a batch that is not all rows, or a model with a penalty.
    Source: Hoffman and Gelman 2014; warm-up as in Stan (recalled); kernel, dual averaging and variances are blackjax's.
    """
    posterior = Posterior(model, likelihood, num_data, prior_precision, temperature)
    posterior.check()
    check_whole("warmup", warmup, 1, WARMUP_ADVICE)
    check_keeping(num_samples, 0, every)
    if not 0 < target_acceptance < 1:
        raise ValueError(
            f"`target_acceptance` must be between 0 and 1, got {target_acceptance!r}. 0.8 is usual, 0.95 after divergences."
        )
    check_whole("max_num_doublings", max_num_doublings, 1, "8 to 10 is usual.")
    warm_up = stan_warmup(warmup, target_acceptance)
    return Method(
        lambda key, start=None: init(key, start, model, warm_up, num_samples),
        lambda state, batch, key: update(state, batch, key, posterior, warm_up, every, max_num_doublings),
        lambda state, inputs, key: predict_samples(state.samples, state.variables.stats, inputs, model, likelihood),
        draw=lambda state, key: draw_sample(state.samples, state.variables.stats, key),
    )


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition holds, else `old`, in the types that `old` has."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o).astype(jnp.result_type(o)), new, old)
