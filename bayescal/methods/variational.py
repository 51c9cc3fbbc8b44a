"""Mean-field variational inference over all weights of any network, through NumPyro."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods.draws import check_draws, predict_draws
from bayescal.methods.map_estimate import (
    check_positive,
    one_member,
    share_of_penalty,
    start_variables,
    weighted_mean,
)
from bayescal.types import Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax


class VariationalState(NamedTuple):
    """Normal posterior of all weights as one vector: mean `location` and unconstrained `raw_scale`, each (weights,)."""

    location: jax.Array
    raw_scale: jax.Array
    stats: PyTree
    opt_state: PyTree
    step: jax.Array


class MeanField(NamedTuple):
    """What NumPyro contributes, built once: prior and guide of one site, `weights`, and the guide's scale constraint."""

    prior: Callable
    guide: Callable
    to_scale: Callable[[jax.Array], jax.Array]
    to_raw: Callable[[jax.Array], jax.Array]
    unravel: Callable[[jax.Array], PyTree]  # vector of weights -> the network's params

    def guide_params(self, location: jax.Array, raw_scale: jax.Array) -> dict[str, jax.Array]:
        """The posterior under the names that NumPyro's AutoNormal gives its parameters."""
        return {"weights_auto_loc": location, "weights_auto_scale": self.to_scale(raw_scale)}


def mean_field(model: Model, prior_scale: float) -> MeanField:
    """Normal(0, prior_scale) on every weight, and an AutoNormal guide over them.

    One site for all weights: a random draw costs a third of a second to compile, so one is better than one a layer.

    Args:
        model: the network; only the structure of its params is used.
        prior_scale: standard deviation of the prior.
    """
    import numpyro  # heavy: only those who use it pay for it
    import numpyro.distributions as dist
    from numpyro.handlers import seed
    from numpyro.infer.autoguide import AutoNormal

    unravel: list = []

    def flat_init(key):
        flat, function = ravel_pytree(model.init(key).params)
        unravel.append(function)
        return flat

    size = jax.eval_shape(flat_init, jax.random.key(0)).size

    def prior():
        return numpyro.sample("weights", dist.Normal(0.0, prior_scale).expand((size,)).to_event(1))

    guide = AutoNormal(prior)
    # The guide inspects the prior at its first call: abstractly at once, eagerly in seconds. The values it finds are
    # never used; ours come from the network's own initial weights.
    jax.eval_shape(seed(guide, jax.random.key(0)))
    to_scale = dist.biject_to(AutoNormal.scale_constraint)
    return MeanField(prior, guide, to_scale, to_scale.inv, unravel[0])


def init(key: Key, start: PyTree | None, model: Model, optimizer, family: MeanField, initial_scale) -> VariationalState:
    """Posterior centred at the network's own initial weights, or at those of `start`, with a fresh optimiser."""
    variables = model.init(key) if start is None else start_variables(start)
    location = ravel_pytree(variables.params)[0]
    raw_scale = family.to_raw(jnp.full_like(location, initial_scale))
    opt_state = optimizer.init((location, raw_scale))
    return VariationalState(location, raw_scale, variables.stats, opt_state, jnp.zeros((), jnp.int32))


def update(state, batch, key, model, likelihood, optimizer, family, num_data, temperature):
    """One step on the negative evidence lower bound per example: mean nll + temperature * KL / num_data."""
    import optax
    from numpyro import factor
    from numpyro.infer import TraceMeanField_ELBO
    from numpyro.primitives import mutable

    network_key, draw_key = jax.random.split(key)

    def joint():
        start: Any = {"value": state.stats}
        carried: Any = mutable("stats", start)
        variables = Variables(family.unravel(family.prior()), carried["value"])
        outputs, carried["value"], penalty = model.train(variables, batch.inputs, network_key)
        log_prob = likelihood(one_member(outputs)).log_prob(batch.targets)
        factor("data", num_data * weighted_mean(log_prob, batch.weights))
        factor("penalty", -num_data * jnp.asarray(share_of_penalty(penalty, num_data), log_prob.dtype))

    bound = TraceMeanField_ELBO(sum_sites=False)

    def objective(posterior):
        result: Any = bound.loss_with_mutable_state(draw_key, family.guide_params(*posterior), joint, family.guide)
        nats = result["loss"]  # of the whole data set, per site
        loss = nats["data"] / num_data
        total = loss + (nats["penalty"] + temperature * nats["weights"]) / num_data
        return total, (result["mutable_state"]["stats"]["value"], {"loss": loss, "kl": nats["weights"]})

    posterior = state.location, state.raw_scale
    gradient, (stats, info) = jax.grad(objective, has_aux=True)(posterior)
    change, opt_state = optimizer.update(gradient, state.opt_state, posterior)
    moved: Any = optax.apply_updates(posterior, change)
    return VariationalState(moved[0], moved[1], stats, opt_state, state.step + 1), info


def draw(state: VariationalState, key: Key, family: MeanField) -> Variables:
    """One network from the posterior."""
    drawn = family.guide.sample_posterior(key, family.guide_params(state.location, state.raw_scale))
    return Variables(family.unravel(drawn["weights"]), state.stats)


def centre(state: VariationalState, family: MeanField) -> Variables:
    """The network at the posterior mean."""
    return Variables(family.unravel(state.location), state.stats)


def variational(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_data: int,
    num_draws: int,
    prior_scale: float = 1.0,
    initial_scale: float = 0.01,
    temperature: float = 1.0,
) -> Method:
    """Normal mean-field posterior over all weights: minimises mean nll + temperature * KL[q || prior] / num_data.

    NumPyro's normal prior, AutoNormal guide and mean-field bound (closed-form KL, one weight draw a step); batches are
    passed in. The posterior starts at the network's own initial weights. Where data are few, mean-field posteriors are
    known to under-fit; a `temperature` below 1 (a "cold" posterior) is then a choice to be reported.

    Args:
        model: any network; its `stats` are carried and never drawn.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation; it sees the pair (location, raw_scale).
        num_data: number of training rows, which scales the KL; never inferred.
        num_draws: members of the predictive.
        prior_scale: standard deviation of the normal prior on every weight.
        initial_scale: standard deviation of the posterior at the start.
        temperature: of the posterior; 1 = Bayes.

    Returns:
        Method whose state is `VariationalState` and whose info is `loss` (mean nats per example) and `kl` (nats).

    Raises:
        ValueError: for settings that are not positive.
    Source: Blundell et al. 2015; scaling as in Graves 2011.
    """
    check_draws(num_draws)
    check_positive(num_data=num_data, prior_scale=prior_scale, initial_scale=initial_scale, temperature=temperature)
    family = mean_field(model, prior_scale)
    drawing: dict[str, Any] = {
        "model": model,
        "likelihood": likelihood,
        "draw": lambda state, key: draw(state, key, family),
        "centre": lambda state: centre(state, family),
        "num_draws": num_draws,
    }
    return Method(
        lambda key, start=None: init(key, start, model, optimizer, family, initial_scale),
        lambda state, batch, key: update(
            state, batch, key, model, likelihood, optimizer, family, num_data, temperature
        ),
        lambda state, inputs, key: predict_draws(state, inputs, key, **drawing),
        draw=drawing["draw"],
    )
