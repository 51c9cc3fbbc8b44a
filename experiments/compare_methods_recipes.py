"""What `compare_methods.py` compares: how each method is built, how long it trains, and what it starts from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from compare_methods_data import source
from flax import nnx

import bayescal as bc


class Recipe(NamedTuple):
    """One row of the comparison.

    build: `(config, num_data) -> method`.
    epochs: `config -> passes over the data`.
    start: the row whose trained state it begins from; its seconds count.
    whole: every update sees all rows.
    tune: `(method, state, validation, key) -> state` after training.
    """

    build: Callable[[Any, int], bc.Method]
    epochs: Callable[[Any], int]
    start: str | None = None
    whole: bool = False
    tune: Callable[[bc.Method, Any, bc.Dataset, Any], Any] | None = None


def network(config, dropout: float = 0.0, dense: Callable | None = None) -> bc.Model:
    data = source(config.data)
    return bc.models.mlp(data.features, config.hidden, data.classes, dropout=dropout, dense=dense)


def adamw(config) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)


def _apart(word: str, own, others) -> optax.GradientTransformation:
    """An optimiser of its own for the parameters in whose path the word is."""
    label = lambda path, _: "own" if word in jax.tree_util.keystr(path) else "others"
    return optax.partition({"own": own, "others": others}, partial(jax.tree.map_with_path, label))


def single(config, num_data: int) -> bc.Method:
    return bc.map_estimate(network(config), bc.Categorical, adamw(config))


def deep_ensemble(config, num_data: int) -> bc.Method:
    return bc.ensemble(single(config, num_data), config.num_members)


def anchored_ensemble(config, num_data: int) -> bc.Method:
    optimizer = optax.adam(config.learning_rate)
    settings: dict[str, Any] = dict(num_data=num_data, prior_precision=config.anchor_precision)
    return bc.ensemble(bc.anchored(network(config), bc.Categorical, optimizer, **settings), config.num_members)


def randomised_prior_ensemble(config, num_data: int) -> bc.Method:
    model = bc.models.with_prior(network(config), scale=config.prior_function_scale)
    return bc.ensemble(bc.map_estimate(model, bc.Categorical, adamw(config)), config.num_members)


def mc_dropout(config, num_data: int) -> bc.Method:
    model = network(config, config.dropout)
    return bc.mc_dropout(model, bc.Categorical, adamw(config), num_draws=config.num_draws)


def concrete_dropout(config, num_data: int) -> bc.Method:
    def dense(a, b, *, rngs):
        layer = nnx.Linear(a, b, rngs=rngs)
        return bc.models.concrete_dropout(layer, rngs=rngs, prior_precision=config.concrete_precision)

    # Adam moves a rate's logit by its learning rate a step at most: at the weights' own it would end near its start
    optimizer = _apart("rate_logit", optax.adam(config.rate_learning_rate), optax.adam(config.learning_rate))
    model = network(config, dense=dense)
    return bc.mc_dropout(model, bc.Categorical, optimizer, num_data=num_data, num_draws=config.num_draws)


def drop_connect(config, num_data: int) -> bc.Method:
    def dense(a, b, *, rngs):
        return bc.models.drop_connect(nnx.Linear(a, b, rngs=rngs), rate=config.drop_connect, rngs=rngs)

    model = network(config, dense=dense)
    return bc.mc_dropout(model, bc.Categorical, adamw(config), num_draws=config.num_draws)


def variational(config, num_data: int, optimizer=None, **settings) -> bc.Method:
    return bc.variational(
        network(config),
        bc.Categorical,
        optimizer or optax.adam(config.variational_learning_rate),
        num_data=num_data,
        num_draws=config.num_draws,
        prior=bc.priors.normal(config.prior_scale),
        temperature=config.temperature,
        **settings,
    )


def variational_ensemble(config, num_data: int) -> bc.Method:
    return bc.ensemble(variational(config, num_data), config.variational_members)


def variational_last_layer(config, num_data: int) -> bc.Method:
    alone = (False, True)  # decay of the point estimates, not of the posterior's own parameters
    optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay, mask=alone)
    return variational(config, num_data, optimizer, subset=bc.last_layer(network(config)))


def variational_low_rank(config, num_data: int) -> bc.Method:
    return variational(config, num_data, guide=bc.guides.low_rank(config.rank))


def _bayes_by_backprop(config, num_data: int, dense: Callable, optimizer) -> bc.Method:
    return bc.bayes_by_backprop(
        network(config, dense=dense),
        bc.Categorical,
        optimizer,
        num_data=num_data,
        num_draws=config.num_draws,
        temperature=config.temperature,
    )


def local_reparametrisation(config, num_data: int) -> bc.Method:
    dense = partial(bc.models.variational_dense, prior_scale=config.prior_scale)
    return _bayes_by_backprop(config, num_data, dense, optax.adam(config.variational_learning_rate))


def flipout(config, num_data: int) -> bc.Method:
    dense = partial(bc.models.variational_dense, prior_scale=config.prior_scale, estimator=bc.models.flipout)
    return _bayes_by_backprop(config, num_data, dense, optax.adam(config.variational_learning_rate))


def rank_one(config, num_data: int) -> bc.Method:
    settings = {"num_components": config.components, "prior_scale": config.rank_one_prior_scale}
    dense = partial(bc.models.rank_one_dense, component_scale=config.component_scale, **settings)
    optimizer = _apart("components", optax.adam(config.learning_rate), adamw(config))
    return _bayes_by_backprop(config, num_data, dense, optimizer)


def ivon(config, num_data: int) -> bc.Method:
    return bc.ivon(
        network(config),
        bc.Categorical,
        num_data=num_data,
        learning_rate=config.ivon_learning_rate,
        num_draws=config.num_draws,
        prior_precision=config.prior_precision,
        beta2=config.ivon_beta2,
        initial_hessian=config.ivon_hessian,
    )


def svgd(config, num_data: int) -> bc.Method:
    return bc.svgd(
        network(config),
        bc.Categorical,
        optax.adam(config.learning_rate),
        num_data=num_data,
        num_particles=config.num_members,
        prior_precision=config.prior_precision,
    )


def _laplace(config, num_data: int, structure, **settings) -> bc.Method:
    layers = len(config.hidden) + 1 if "subset" not in settings else 1
    return bc.laplace(
        network(config),
        bc.Categorical,
        num_data=num_data,
        structure=structure,
        prior_precision=(config.prior_precision,) * layers,
        predictive=bc.monte_carlo(config.num_draws),
        **settings,
    )


def laplace(config, num_data: int) -> bc.Method:
    return _laplace(config, num_data, bc.kronecker())


def laplace_diagonal(config, num_data: int) -> bc.Method:
    return _laplace(config, num_data, bc.diagonal())


def laplace_last_layer(config, num_data: int) -> bc.Method:
    return _laplace(config, num_data, bc.kronecker(), subset=bc.last_layer(network(config)))


def laplace_ensemble(config, num_data: int) -> bc.Method:
    return bc.ensemble(laplace(config, num_data), config.num_members)


def swag(config, num_data: int) -> bc.Method:
    steps = -(-num_data // config.batch_size)  # one network an epoch is collected
    return bc.swag(
        network(config),
        bc.Categorical,
        optax.sgd(config.swag_learning_rate, momentum=0.9),
        num_draws=config.num_draws,
        burn_in=0,
        every=steps,
    )


def multi_swag(config, num_data: int) -> bc.Method:
    return bc.ensemble(swag(config, num_data), config.num_members)


def _chains(config, num_data: int, build: Callable[..., bc.Method], **settings) -> bc.Method:
    chain = build(
        network(config),
        bc.Categorical,
        num_data=num_data,
        num_samples=config.num_draws,
        prior_precision=config.prior_precision,
        **settings,
    )
    return bc.ensemble(chain, config.chains)


def _kept(config, num_data: int) -> dict[str, int]:
    """The first half is left out, and the buffer spread over the rest."""
    updates = config.chain_epochs * -(-num_data // config.batch_size)
    return {"burn_in": updates // 2, "every": max(updates // 2 // config.num_draws, 1)}


def sgld(config, num_data: int) -> bc.Method:
    kept = _kept(config, num_data)
    return _chains(config, num_data, bc.sgld, step_size=config.sgld_step / num_data, **kept)


def psgld(config, num_data: int) -> bc.Method:
    kept = _kept(config, num_data)
    return _chains(config, num_data, bc.psgld, step_size=config.psgld_step / num_data, **kept)


def sghmc(config, num_data: int) -> bc.Method:
    kept, step = _kept(config, num_data), (config.sghmc_step / num_data) ** 0.5
    return _chains(config, num_data, bc.sghmc, step_size=step, friction=config.sghmc_friction / step, **kept)


def cyclical_sgld(config, num_data: int) -> bc.Method:
    cycle = config.chain_epochs * -(-num_data // config.batch_size) // config.cycles
    return _chains(
        config,
        num_data,
        bc.cyclical_sgld,
        step_size=config.cyclical_step / num_data,
        cycle_length=cycle,
        samples_per_cycle=max(config.num_draws // config.cycles, 1),
        exploration=0.8,
    )


def nuts(config, num_data: int) -> bc.Method:
    settings = dict(warmup=config.nuts_warmup, max_num_doublings=config.nuts_doublings)
    return _chains(config, num_data, bc.nuts, every=max(config.nuts_warmup // config.num_draws, 1), **settings)


def mclmc(config, num_data: int) -> bc.Method:
    every = max(config.mclmc_updates // 2 // config.num_draws, 1)
    settings = dict(warmup=config.mclmc_updates // 2, steps_per_update=config.mclmc_steps, every=every)
    return _chains(config, num_data, bc.mclmc, **settings)


def marginal_likelihood(config, num_data: int) -> bc.Method:
    return bc.marginal_likelihood_training(
        network(config),
        bc.Categorical,
        optax.adam(config.learning_rate),
        num_data=num_data,
        structure=bc.kronecker(),
        prior_precision=(config.prior_precision,) * (len(config.hidden) + 1),
        burn_in=config.epochs // 5,
        every=5,
    )


def by_validation(method, state, validation, key):
    """The prior precision whose predictions of the validation rows are best."""
    return bc.select_prior_precision(method, state, validation, key)


def by_evidence(method, state, validation, key):
    """The prior precision, of each layer, of the largest marginal likelihood; validation rows are not looked at."""
    return bc.fit_prior_precision(method, state)


_trained = lambda config: config.epochs
_varied = lambda config: config.variational_epochs
_once = lambda config: 1
_chained = lambda config: config.chain_epochs

RECIPES: dict[str, Recipe] = {
    "single": Recipe(single, _trained),
    "deep_ensemble": Recipe(deep_ensemble, _trained),
    "anchored_ensemble": Recipe(anchored_ensemble, _trained),
    "randomised_prior_ensemble": Recipe(randomised_prior_ensemble, _trained),
    "mc_dropout": Recipe(mc_dropout, _trained),
    "concrete_dropout": Recipe(concrete_dropout, _trained),
    "drop_connect": Recipe(drop_connect, _trained),
    "variational": Recipe(variational, _varied),
    "variational_last_layer": Recipe(variational_last_layer, _trained),
    "variational_low_rank": Recipe(variational_low_rank, _varied),
    "local_reparametrisation": Recipe(local_reparametrisation, _varied),
    "flipout": Recipe(flipout, _varied),
    "rank_one": Recipe(rank_one, _varied),
    "variational_ensemble": Recipe(variational_ensemble, _varied),
    "ivon": Recipe(ivon, _varied),
    "marginal_likelihood": Recipe(marginal_likelihood, _trained),
    "svgd": Recipe(svgd, _trained),
    "laplace": Recipe(laplace, _once, "single", tune=by_validation),
    "laplace_evidence": Recipe(laplace, _once, "marginal_likelihood", tune=by_evidence),
    "laplace_diagonal": Recipe(laplace_diagonal, _once, "single", tune=by_validation),
    "laplace_last_layer": Recipe(laplace_last_layer, _once, "single", tune=by_validation),
    "laplace_ensemble": Recipe(laplace_ensemble, _once, "deep_ensemble", tune=by_validation),
    "swag": Recipe(swag, lambda config: config.swag_epochs, "single"),
    "multi_swag": Recipe(multi_swag, lambda config: config.swag_epochs, "deep_ensemble"),
    "sgld": Recipe(sgld, _chained, "single"),
    "psgld": Recipe(psgld, _chained, "single"),
    "sghmc": Recipe(sghmc, _chained, "single"),
    "cyclical_sgld": Recipe(cyclical_sgld, _chained, "single"),
    "mclmc": Recipe(mclmc, lambda config: config.mclmc_updates, "single", whole=True),
    "nuts": Recipe(nuts, lambda config: 2 * config.nuts_warmup, "single", whole=True),
}
