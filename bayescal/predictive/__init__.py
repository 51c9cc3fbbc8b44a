"""Predictive distributions as values: mixtures over members, the member axis first.

Pooling happens in one function, `log_pool`, in log space; axes join in one, `join_members`, which `merge_members` weighs.
"""

from bayescal.predictive.axes import (
    Predictive,
    concatenate,
    join_members,
    merge_members,
    stack_experiments,
    swap_batch_axes,
    take,
)
from bayescal.predictive.categorical import Bernoulli, Categorical, exact_top, pool
from bayescal.predictive.checks import all_good, check_predictive, check_rows, check_targets_and_weights
from bayescal.predictive.dirichlet import Dirichlet
from bayescal.predictive.gaussian import Gaussian, rescale, variance_of_means
from bayescal.predictive.likelihoods import heteroscedastic, homoscedastic, one_logit
from bayescal.predictive.mixture import (
    float32_or_wider,
    log_pool,
    normalised_weights,
    refuse,
    undefined_where,
    weighted_sum,
    weighted_variance,
)
from bayescal.predictive.probabilities import Probabilities

__all__ = [
    "Bernoulli",
    "Categorical",
    "Dirichlet",
    "Gaussian",
    "Predictive",
    "Probabilities",
    "all_good",
    "check_predictive",
    "check_rows",
    "check_targets_and_weights",
    "concatenate",
    "exact_top",
    "float32_or_wider",
    "heteroscedastic",
    "homoscedastic",
    "join_members",
    "log_pool",
    "merge_members",
    "normalised_weights",
    "one_logit",
    "pool",
    "refuse",
    "rescale",
    "stack_experiments",
    "swap_batch_axes",
    "take",
    "undefined_where",
    "variance_of_means",
    "weighted_sum",
    "weighted_variance",
]
