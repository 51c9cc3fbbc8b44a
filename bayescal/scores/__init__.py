"""Scores of predictives or of features, `score(...) -> (rows,)`: higher = more unlike the training data, for every score."""

from bayescal.scores.combine import Combination, MemberScores, fit_combination, fit_members
from bayescal.scores.density import density_ratio, fit_gaussian_density
from bayescal.scores.gradient import grad_norm
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.output import (
    dempster_shafer,
    entropy,
    free_energy,
    free_energy_of_mean,
    generalised_entropy,
    kl_from_uniform,
    margin,
    max_logit,
    max_probability,
    member_disagreement,
    mutual_information,
    variation_ratio,
)
from bayescal.scores.shaping import ash_b, ash_p, ash_s, fit_react, scale
from bayescal.scores.subspace import fit_residual, fit_vim, head_origin

__all__ = [
    "Combination",
    "MemberScores",
    "ash_b",
    "ash_p",
    "ash_s",
    "dempster_shafer",
    "density_ratio",
    "entropy",
    "fit_combination",
    "fit_gaussian_density",
    "fit_mahalanobis",
    "fit_members",
    "fit_neighbours",
    "fit_react",
    "fit_relative_mahalanobis",
    "fit_residual",
    "fit_vim",
    "free_energy",
    "free_energy_of_mean",
    "generalised_entropy",
    "grad_norm",
    "head_origin",
    "kl_from_uniform",
    "margin",
    "max_logit",
    "max_probability",
    "member_disagreement",
    "mutual_information",
    "scale",
    "variation_ratio",
]
