"""bayescal: predictive distributions you can take apart, in JAX.

data -> fit(method) -> state -> predict -> Predictive -> decompose / scores / calibrate / metrics -> evaluate -> report
"""

from bayescal import calibrate, data, metrics, models, plots, schedules, scores
from bayescal.calibrate import MemberSelection, Temperature, fit_member_selection, fit_temperature
from bayescal.checkpoint import Checkpoint, load, save
from bayescal.decompose import Uncertainty, decompose
from bayescal.evaluate import evaluate, mean_over_runs
from bayescal.methods import (
    Subsample,
    bootstrap,
    ensemble,
    experiments,
    map_estimate,
    mc_dropout,
    out_of_bag,
    variational,
)
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
from bayescal.sharding import make_mesh, use_all_cores
from bayescal.train import fit, predict
from bayescal.types import (
    Batch,
    Dataset,
    EnsembleState,
    Estimate,
    Fit,
    MemberReport,
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
    "Checkpoint",
    "Dataset",
    "EnsembleState",
    "Estimate",
    "Fit",
    "Gaussian",
    "MemberReport",
    "MemberSelection",
    "Members",
    "Method",
    "Metric",
    "Model",
    "Subsample",
    "Temperature",
    "Uncertainty",
    "Variables",
    "accuracy",
    "auroc",
    "auroc_estimate",
    "bootstrap",
    "brier",
    "calibrate",
    "calibration_error",
    "concatenate",
    "confidence_histogram",
    "data",
    "decompose",
    "ensemble",
    "evaluate",
    "experiments",
    "fit",
    "fit_member_selection",
    "fit_temperature",
    "from_linen",
    "from_nnx",
    "heteroscedastic",
    "homoscedastic",
    "load",
    "log_pool",
    "make_mesh",
    "map_estimate",
    "mc_dropout",
    "mean_over_runs",
    "merge_members",
    "metrics",
    "models",
    "nll",
    "one_logit",
    "out_of_bag",
    "plots",
    "pool",
    "predict",
    "rescale",
    "save",
    "schedules",
    "scores",
    "take",
    "use_all_cores",
    "variational",
]  # fmt: skip
