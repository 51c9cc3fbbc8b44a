"""Variational inference over the weights of any network, through NumPyro: its guides, priors and bound."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods import guides, priors
from bayescal.methods.draws import check_draws, predict_draws
from bayescal.methods.map_estimate import (
    check_positive,
    one_member,
    share_of_penalty,
    start_variables,
    weighted_mean,
)
from bayescal.methods.selection import Selection, selected
from bayescal.methods.variational_family import Family, family, unvalidated
from bayescal.types import Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax


class VariationalState(NamedTuple):
    """The posterior of the chosen weights as one vector, and the rest of the network.

    posterior: the guide's parameters by NumPyro's names, unconstrained.
    point: params that have no posterior, None in place of those that do; () where all do.
    places: of single weights, where those are chosen.
    """

    posterior: dict[str, jax.Array]
    point: PyTree
    places: PyTree
    stats: PyTree
    opt_state: PyTree
    step: jax.Array


def init(key: Key, start: PyTree | None, model: Model, optimizer, family: Family) -> VariationalState:
    """Posterior around the network's own initial weights, or those of `start`, with a fresh optimiser."""
    variables = model.init(key) if start is None else start_variables(start)
    places = family.selection.find(variables.params)
    posterior = family.start(ravel_pytree(family.selection.take(variables.params, places))[0])
    point = family.point(variables.params)
    opt_state = optimizer.init((posterior, point))
    return VariationalState(posterior, point, places, variables.stats, opt_state, jnp.zeros((), jnp.int32))


def update(state: VariationalState, batch, key: Key, model: Model, likelihood, optimizer, family, num_data, share):
    """One step on the negative evidence lower bound per example: mean nll + (penalty + share(step) * KL) / num_data."""
    import optax
    from numpyro import factor
    from numpyro.infer import TraceMeanField_ELBO
    from numpyro.primitives import mutable

    network_key, draw_key = jax.random.split(key)
    bound = TraceMeanField_ELBO(sum_sites=False)

    def objective(trained):
        posterior, point = trained

        def joint():
            start: Any = {"value": state.stats}
            carried: Any = mutable("stats", start)
            variables = family.network(family.prior(), point, state.places, carried["value"])
            outputs, carried["value"], penalty = model.train(variables, batch.inputs, network_key)
            log_prob = likelihood(one_member(outputs)).log_prob(batch.targets)
            factor("data", num_data * weighted_mean(log_prob, batch.weights))
            factor("penalty", -num_data * jnp.asarray(share_of_penalty(penalty, num_data), log_prob.dtype))

        with unvalidated():
            result: Any = bound.loss_with_mutable_state(draw_key, family.constrained(posterior), joint, family.guide)
        nats = dict(result["loss"])  # of the whole data set, per site
        loss, penalty = nats.pop("data") / num_data, nats.pop("penalty")
        kl = sum(nats.values())  # of the weights, and of the site that guides of one vector draw them through
        temperature = jnp.asarray(share(state.step), loss.dtype)
        total = loss + (penalty + temperature * kl) / num_data
        return total, (result["mutable_state"]["stats"]["value"], {"loss": loss, "kl": kl, "temperature": temperature})

    trained = state.posterior, state.point
    gradient, (stats, info) = jax.grad(objective, has_aux=True)(trained)
    change, opt_state = optimizer.update(gradient, state.opt_state, trained)
    moved: Any = optax.apply_updates(trained, change)
    return VariationalState(moved[0], moved[1], state.places, stats, opt_state, state.step + 1), info


def draw(state: VariationalState, key: Key, family: Family) -> Variables:
    """One network from the posterior."""
    return family.network(family.sample(state.posterior, key), state.point, state.places, state.stats)


def centre(state: VariationalState, family: Family) -> Variables:
    """The network at the posterior's median."""
    return family.network(family.median(state.posterior), state.point, state.places, state.stats)


def variational(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_data: int,
    num_draws: int,
    guide: guides.Guide | None = None,
    prior: priors.Prior | None = None,
    subset: Selection | tuple | None = None,
    initial_scale: Any = 0.01,
    temperature: Any = 1.0,
    annealing: Callable[[jax.Array], Any] | None = None,
) -> Method:
    """Minimises mean nll + temperature * annealing(step) * KL[q(w) || prior(w)] / num_data over the guide's q.

    NumPyro's priors, guides and mean-field bound: one draw of the weights a step, the KL in closed form where NumPyro has
    one (a normal guide and prior), else log q - log p of the draw. The posterior starts at the network's own initial
    weights, or at those of `start`. Where data are few, mean-field posteriors are known to under-fit; a `temperature`
    below 1 (a "cold" posterior) is then a choice to be reported.

    Args:
        model: any network; its `stats` are carried and never drawn, its penalty is divided by `num_data`.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation; it sees the pair (posterior, point) of the state.
        num_data: number of training rows, which scales the KL; never inferred.
        num_draws: members of the predictive.
        guide: `guides.normal`, `guides.low_rank(rank)`, `guides.full`, `guides.delta`, or NumPyro's own class, such as
            `AutoDiagonalNormal`, that takes `init_scale`; None = `guides.normal`.
        prior: `priors.normal(scale)`, `priors.student_t(df, scale)`, `priors.scale_mixture(scales, weights)`, or your own
            `params -> numpyro distribution` of the chosen weights as one vector; None = `priors.normal(1.0)`.
        subset: which parameters have a posterior: keys that lead to them, such as `last_layer(model)`; `subtrees(*paths)`,
            `without_biases()`, `subnetwork(number)`; None = all. The others are trained beside it as point estimates, by the
            same optimiser and without a prior.
        initial_scale: standard deviation of the posterior at the start.
        temperature: factor of the KL; 1 = Bayes.
        annealing: `step -> share of the KL`, such as `optax.linear_schedule(0.0, 1.0, 500)`; 1 once it is over, else what
            is found is not Bayes' posterior. None = 1 throughout.

    Returns:
        Method whose state is `VariationalState`, with `draw` unless the guide has no spread. Its info is `loss` (mean nats
        per example), `kl` (nats) and `temperature` (the KL's factor in this step). `key=None` predicts by the median network.

    Raises:
        ValueError: for settings that are not positive, a prior of another shape, several draws of a guide without spread.
        TypeError: for annealing that is not a function.
    Source: Blundell et al. 2015; scaling as in Graves 2011.
    """
    check_draws(num_draws)
    check_positive(num_data=num_data, initial_scale=initial_scale, temperature=temperature)
    if annealing is not None and not callable(annealing):
        raise TypeError(
            f"`annealing` must be a function of the step, got {type(annealing).__name__}. Pass a schedule, such as "
            "`optax.linear_schedule(0.0, 1.0, 500)`; a constant share of the KL is a `temperature`."
        )
    share = lambda step: temperature if annealing is None else temperature * annealing(step)
    chosen = family(model, selected(subset), prior or priors.normal(1.0), guide or guides.normal, initial_scale)
    spreads = chosen.spreads()
    if num_draws > 1 and not spreads:
        raise ValueError(
            f"`num_draws` must be 1 for a guide without spread, got {num_draws}: its draws would all be the same network. "
            "Pass `num_draws=1`, or a guide with spread, such as `guides.normal`."
        )
    drawing: dict[str, Any] = {
        "model": model,
        "likelihood": likelihood,
        "draw": lambda state, key: draw(state, key, chosen),
        "centre": lambda state: centre(state, chosen),
        "num_draws": num_draws,
    }
    return Method(
        lambda key, start=None: init(key, start, model, optimizer, chosen),
        lambda state, batch, key: update(state, batch, key, model, likelihood, optimizer, chosen, num_data, share),
        lambda state, inputs, key: predict_draws(state, inputs, key, **drawing),
        draw=drawing["draw"] if spreads else None,
    )
