"""Methods: data -> state -> predictive. One file a method, the same names in the same order: State, init, update,
predict, builder."""

from bayescal.methods import guides, priors
from bayescal.methods.anchored import anchored
from bayescal.methods.bayes_by_backprop import bayes_by_backprop
from bayescal.methods.chains import chain_diagnostics, chain_values
from bayescal.methods.cyclical import cyclical_sgld
from bayescal.methods.ensemble import ensemble
from bayescal.methods.experiments import experiments
from bayescal.methods.ivon import ivon, ivon_optimizer
from bayescal.methods.langevin import psgld, sgld
from bayescal.methods.laplace import (
    Posterior,
    Structure,
    bridge,
    diagonal,
    empirical_fisher,
    fit_prior_precision,
    full,
    ggn,
    kronecker,
    laplace,
    low_rank,
    marginal_likelihood_training,
    monte_carlo,
    normal,
    probit,
    sampled,
    select_prior_precision,
)
from bayescal.methods.map_estimate import map_estimate
from bayescal.methods.mc_dropout import mc_dropout
from bayescal.methods.mclmc import mclmc
from bayescal.methods.nuts import nuts
from bayescal.methods.refresh import refresh
from bayescal.methods.resample import Subsample, bootstrap, out_of_bag
from bayescal.methods.selection import Selection, last_layer, subnetwork, subtrees, without_biases
from bayescal.methods.sghmc import sghmc
from bayescal.methods.sgmcmc import Kernel, sgmcmc
from bayescal.methods.svgd import svgd
from bayescal.methods.swag import swa, swag
from bayescal.methods.variational import variational

__all__ = [
    "Kernel",
    "Posterior",
    "Selection",
    "Structure",
    "Subsample",
    "anchored",
    "bayes_by_backprop",
    "bootstrap",
    "bridge",
    "chain_diagnostics",
    "chain_values",
    "cyclical_sgld",
    "diagonal",
    "empirical_fisher",
    "ensemble",
    "experiments",
    "fit_prior_precision",
    "full",
    "ggn",
    "guides",
    "ivon",
    "ivon_optimizer",
    "kronecker",
    "laplace",
    "last_layer",
    "low_rank",
    "map_estimate",
    "marginal_likelihood_training",
    "mc_dropout",
    "mclmc",
    "monte_carlo",
    "normal",
    "nuts",
    "out_of_bag",
    "priors",
    "probit",
    "psgld",
    "refresh",
    "sampled",
    "select_prior_precision",
    "sghmc",
    "sgld",
    "sgmcmc",
    "subnetwork",
    "subtrees",
    "svgd",
    "swa",
    "swag",
    "variational",
    "without_biases",
]
