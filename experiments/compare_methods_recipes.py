"""What `compare_methods.py` compares: how each method is built, how long it trains, and what it starts from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

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


def network(config, dropout: float = 0.0) -> bc.Model:
    return bc.models.mlp(64, config.hidden, 8, dropout=dropout)


def adamw(config) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)


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


def variational(config, num_data: int) -> bc.Method:
    return bc.variational(
        network(config),
        bc.Categorical,
        optax.adam(config.variational_learning_rate),
        num_data=num_data,
        num_draws=config.num_draws,
        prior=bc.priors.normal(config.prior_scale),
        temperature=config.temperature,
    )


def variational_ensemble(config, num_data: int) -> bc.Method:
    return bc.ensemble(variational(config, num_data), config.variational_members)


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
    "variational": Recipe(variational, _varied),
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
