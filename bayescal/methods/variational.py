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
    tempered,
    weighted_mean,
)
from bayescal.methods.selection import Selection, path_names, selected
from bayescal.methods.variational_family import Family, by_parts, family, unvalidated
from bayescal.types import Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax


class VariationalState(NamedTuple):
    """The posterior of the chosen weights as one vector, and the rest of the network.

    posterior: the guide's parameters by NumPyro's names, unconstrained.
    point: params that have no posterior, None in place of those that do; () where all do.
    places: of single weights, where those are chosen.
    """

    posterior: dict[str, PyTree]
    point: PyTree
    places: PyTree
    stats: PyTree
    opt_state: PyTree
    step: jax.Array


def init(key: Key, start: PyTree | None, model: Model, optimizer, family: Family) -> VariationalState:
    """Posterior around the network's own initial weights, or those of `start`, with a fresh optimiser."""
    variables = model.init(key) if start is None else start_variables(start)
    _check_same(variables.params, family.params)
    places = family.selection.find(variables.params)
    posterior = family.start(ravel_pytree(family.selection.take(variables.params, places))[0])
    point = family.point(variables.params)
    opt_state = optimizer.init((posterior, point))
    return VariationalState(posterior, point, places, variables.stats, opt_state, jnp.zeros((), jnp.int32))


def _check_same(params: PyTree, wanted: PyTree) -> None:
    """Raises unless the network is one of the model's: as one vector, weights of other shapes would come apart unseen."""
    advice = "Pass a network that was trained with the same `model`."
    own, of_model = jax.tree.structure(params), jax.tree.structure(wanted)
    if own != of_model:
        raise ValueError(f"`start` must be a network of the model, a tree {of_model}, got {own}. {advice}")
    for (path, leaf), like in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(wanted), strict=True):
        if jnp.shape(leaf) != like.shape:
            name = "/".join(path_names(path)) or "params"
            raise ValueError(
                f"`start` must be a network of the model, with `{name}` of shape {like.shape}, got {jnp.shape(leaf)}. {advice}"
            )


def update(
    state: VariationalState, batch, key: Key, model: Model, likelihood, optimizer, family, num_data, factor_of_kl
):
    """One step on the negative evidence lower bound per example: mean nll + (penalty + factor * KL) / num_data."""
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
        temperature = jnp.asarray(factor_of_kl(state.step), loss.dtype)
        total = loss + (penalty + temperature * kl) / num_data
        return total, (result["mutable_state"]["stats"]["value"], {"loss": loss, "kl": kl, "temperature": temperature})

    trained = state.posterior, state.point
    gradient, (stats, info) = jax.grad(objective, has_aux=True)(trained)
    change, opt_state = optimizer.update(gradient, state.opt_state, trained)
    moved: Any = optax.apply_updates(trained, change)
    return VariationalState(moved[0], moved[1], state.places, stats, opt_state, state.step + 1), info


def draw(state: VariationalState, key: Key | None, family: Family) -> Variables:
    """One network from the posterior; None = the one at its median."""
    weights = family.median(state.posterior) if key is None else family.sample(state.posterior, key)
    return family.network(weights, state.point, state.places, state.stats)


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
        optimizer: any optax transformation; it sees the pair (posterior, point) of the state. Weight decay is for the
            second alone, `optax.adamw(rate, mask=(False, True))`: of the posterior it would shrink the scales, and the prior
            is in the KL.
        num_data: number of training rows, which scales the KL; never inferred.
        num_draws: members of the predictive.
        guide: `guides.normal`, `guides.low_rank(rank)`, `guides.full`, `guides.delta`, or NumPyro's own class, such as
            `AutoDiagonalNormal`, that takes `init_scale` (see `guides` for what one must be); None = `guides.normal`.
        prior: `priors.normal(scale)`, `priors.student_t(df, scale)`, `priors.scale_mixture(scales, weights)`, or your own
            `params -> numpyro distribution` of the chosen weights as one vector (see `priors` for what it is given);
            None = `priors.normal(1.0)`.
        subset: which parameters have a posterior: keys that lead to them, such as `last_layer(model)`; `subtrees(*paths)`,
            `without_biases()`, `subnetwork(number)`; None = all. The others are trained beside it as point estimates, by the
            same optimiser and without a prior.
        initial_scale: standard deviation of the posterior at the start.
        temperature: factor of the KL; 1 = Bayes.
        annealing: `step -> share of the KL` in [0, 1], such as `optax.linear_schedule(0.0, 1.0, 500)`; 1 once it is over,
            else what is found is not Bayes' posterior. None = 1 throughout.

    Returns:
        Method whose state is `VariationalState`, with `draw` unless the guide has no spread. Its info is `loss` (mean nats
        per example), `kl` (nats) and `temperature` (the KL's factor in this step). `key=None` predicts by the median network,
        which is `method.draw(state, None)`: what another method may start from. Of an ensemble of `method`,
        `jax.vmap(method.draw, (0, None))(state.members, None)` are those of its members. The posterior is in float32 or
        wider, the networks in the model's own precision.

    Raises:
        ValueError: for settings that are not positive and finite, a first share outside [0, 1], a prior of another shape, a
            subset without weights, several draws of a guide without spread; in `init`, a start of other shapes; for
            `key=None`, a guide without a median.
        TypeError: for annealing, a prior or a guide that is not the function it should be.
    Source: Blundell et al. 2015; scaling as in Graves 2011.
    """
    check_draws(num_draws)
    check_positive(num_data=num_data, initial_scale=initial_scale)
    factor_of_kl = tempered(temperature, annealing)
    prior = priors.normal(1.0) if prior is None else prior
    guide = guides.normal if guide is None else guide
    priors.check_prior(prior)
    guides.check_guide(guide)
    chosen = family(model, selected(subset), prior, guide, initial_scale)
    training = chosen._replace(unravel=by_parts(chosen.unravel))
    spreads = chosen.spreads()
    if num_draws > 1 and not spreads:
        raise ValueError(
            f"`num_draws` must be 1 for a guide without spread, got {num_draws}: its draws would all be the same network. "
            "Pass `num_draws=1`, or a guide with spread, such as `guides.normal`."
        )
    drawing: dict[str, Any] = {
        "model": model,
        "likelihood": likelihood,
        "draw": lambda state, key: draw(state, key if spreads else None, chosen),
        "centre": lambda state: draw(state, None, chosen),
        "num_draws": num_draws,
    }
    return Method(
        lambda key, start=None: init(key, start, model, optimizer, chosen),
        lambda state, batch, key: update(
            state, batch, key, model, likelihood, optimizer, training, num_data, factor_of_kl
        ),
        lambda state, inputs, key: predict_draws(state, inputs, key, **drawing),
        draw=drawing["draw"] if spreads else None,
    )
