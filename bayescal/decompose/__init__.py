"""Predictive -> Uncertainty: total, aleatoric and epistemic parts, and how unlike the training data."""

from bayescal.decompose.bias import Corrected, corrected_mutual_information
from bayescal.decompose.dirichlet import differential_entropy, dirichlet_parts, distributional_uncertainty, vacuity
from bayescal.decompose.draws import ClassDraws, NormalDraws, accumulate, decompose_draws, finish, merge
from bayescal.decompose.information import (
    entropy_parts,
    mutual_information,
    pairwise_divergence,
    pairwise_parts,
    reverse_mutual_information,
)
from bayescal.decompose.normal import (
    entropy_bound_parts,
    information_bounds,
    moment_matched_information,
    variance_parts,
)
from bayescal.decompose.proper import class_variance_parts, proper_score_parts, zero_one_parts
from bayescal.decompose.uncertainty import Uncertainty, decompose, free_energy

__all__ = [
    "ClassDraws",
    "Corrected",
    "NormalDraws",
    "Uncertainty",
    "accumulate",
    "class_variance_parts",
    "corrected_mutual_information",
    "decompose",
    "decompose_draws",
    "differential_entropy",
    "dirichlet_parts",
    "distributional_uncertainty",
    "entropy_bound_parts",
    "entropy_parts",
    "finish",
    "free_energy",
    "information_bounds",
    "merge",
    "moment_matched_information",
    "mutual_information",
    "pairwise_divergence",
    "pairwise_parts",
    "proper_score_parts",
    "reverse_mutual_information",
    "vacuity",
    "variance_parts",
    "zero_one_parts",
]
