"""Laplace approximations: normal posteriors around a trained network."""

from bayescal.methods.laplace.evidence import fit_prior_precision, select_prior_precision
from bayescal.methods.laplace.kronecker import kronecker
from bayescal.methods.laplace.method import LaplaceState, laplace
from bayescal.methods.laplace.predictives import Posterior, bridge, monte_carlo, normal, probit, sampled
from bayescal.methods.laplace.structures import Structure, diagonal, full, low_rank
from bayescal.methods.laplace.training import marginal_likelihood_training
from bayescal.methods.laplace.view import empirical_fisher, ggn

__all__ = [
    "LaplaceState",
    "Posterior",
    "Structure",
    "bridge",
    "diagonal",
    "empirical_fisher",
    "fit_prior_precision",
    "full",
    "ggn",
    "kronecker",
    "laplace",
    "low_rank",
    "marginal_likelihood_training",
    "monte_carlo",
    "normal",
    "probit",
    "sampled",
    "select_prior_precision",
]
