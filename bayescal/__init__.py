"""bayescal: predictive distributions you can take apart, in JAX.

data -> fit(method) -> state -> predict -> Predictive -> decompose / scores / calibrate / metrics -> evaluate -> report
"""

from bayescal import calibrate, data, metrics, models, plots, scores
from bayescal.calibrate import Temperature, fit_temperature
from bayescal.decompose import Uncertainty, decompose
from bayescal.evaluate import evaluate, mean_over_runs
from bayescal.methods import ensemble, map_estimate, mc_dropout, variational
from bayescal.metrics import accuracy, auroc, auroc_estimate, brier, calibration_error, confidence_histogram, nll
from bayescal.models import from_linen, from_nnx
from bayescal.predictive import (
    Bernoulli,
    Categorical,
    Gaussian,
    concatenate,
    heteroscedastic,
    homoscedastic,
    log_pool,
    merge_members,
    one_logit,
    pool,
    rescale,
    take,
)
from bayescal.train import fit, predict
from bayescal.types import (
    Batch,
    Dataset,
    EnsembleState,
    Estimate,
    Fit,
    Members,
    Method,
    Metric,
    Model,
    Variables,
)

__version__ = "0.1.0"

__all__ = [  # in the order of the data flow
    "Batch",
    "Bernoulli",
    "Categorical",
    "Dataset",
    "EnsembleState",
    "Estimate",
    "Fit",
    "Gaussian",
    "Members",
    "Method",
    "Metric",
    "Model",
    "Temperature",
    "Uncertainty",
    "Variables",
    "accuracy",
    "auroc",
    "auroc_estimate",
    "brier",
    "calibrate",
    "calibration_error",
    "concatenate",
    "confidence_histogram",
    "data",
    "decompose",
    "ensemble",
    "evaluate",
    "fit",
    "fit_temperature",
    "from_linen",
    "from_nnx",
    "heteroscedastic",
    "homoscedastic",
    "log_pool",
    "map_estimate",
    "mc_dropout",
    "mean_over_runs",
    "merge_members",
    "metrics",
    "models",
    "nll",
    "one_logit",
    "plots",
    "pool",
    "predict",
    "rescale",
    "scores",
    "take",
    "variational",
]  # fmt: skip
