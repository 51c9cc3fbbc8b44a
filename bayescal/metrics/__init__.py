"""Metrics: (predictive, targets, weights) -> sums -> value, and plain functions of whole arrays."""

from bayescal.metrics.calibration import calibration_error, confidence_histogram
from bayescal.metrics.likelihood import accuracy, brier, mean_metric, nll
from bayescal.metrics.ranking import accuracy_rejection, auroc, auroc_estimate

__all__ = [
    "accuracy",
    "accuracy_rejection",
    "auroc",
    "auroc_estimate",
    "brier",
    "calibration_error",
    "confidence_histogram",
    "mean_metric",
    "nll",
]
