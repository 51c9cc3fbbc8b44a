"""bayescal: predictive distributions you can take apart, in JAX.

data -> fit(method) -> state -> predict -> Predictive -> decompose / scores / calibrate / metrics -> evaluate -> report
"""

from bayescal import calibrate, data, metrics, models, plots, scores
from bayescal.calibrate import Temperature, fit_temperature
from bayescal.decompose import Uncertainty, decompose
from bayescal.evaluate import evaluate, mean_over_runs
from bayescal.likelihoods import heteroscedastic, homoscedastic, one_logit
from bayescal.methods import ensemble, map_estimate, mc_dropout, variational
from bayescal.metrics import accuracy, auroc, auroc_estimate, brier, calibration_error, confidence_histogram, nll
from bayescal.models import from_linen, from_nnx
from bayescal.predictive import (
    Bernoulli,
    Categorical,
    Gaussian,
    concatenate,
    log_pool,
    merge_members,
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
    "Variables", "Model", "Batch", "Dataset", "Method", "Members", "EnsembleState", "Metric", "Fit", "Estimate",
    "models", "from_nnx", "from_linen", "data",
    "Categorical", "Gaussian", "Bernoulli", "heteroscedastic", "homoscedastic", "one_logit",
    "log_pool", "pool", "merge_members", "take", "concatenate", "rescale",
    "map_estimate", "ensemble", "mc_dropout", "variational",
    "fit", "predict",
    "decompose", "Uncertainty", "scores",
    "calibrate", "fit_temperature", "Temperature",
    "metrics", "accuracy", "nll", "brier", "calibration_error", "confidence_histogram", "auroc", "auroc_estimate",
    "evaluate", "mean_over_runs", "plots",
]  # fmt: skip
