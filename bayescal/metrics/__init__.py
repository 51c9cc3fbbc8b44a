"""Metrics: (predictive, targets, weights) -> sums -> value, and plain functions of whole columns.

Anything about yes-or-no events names them (`top_label`, `one_class`); `whole` makes a metric of a plain function.
"""

from bayescal.metrics.accuracy_uncertainty import (
    accuracy_versus_uncertainty,
    accuracy_versus_uncertainty_loss,
    soft_accuracy_versus_uncertainty_loss,
)
from bayescal.metrics.adaptive import (
    classwise_equal_mass_calibration_error,
    equal_mass_calibration_error,
    equal_mass_histogram,
    nixon_calibration_error,
    squared_equal_mass_calibration_error,
)
from bayescal.metrics.association import spearman, spearman_difference
from bayescal.metrics.binfree import ks_error, ks_test, kuiper_error, kuiper_test, spiegelhalter_test
from bayescal.metrics.calibration import calibration_error, confidence_histogram, squared_calibration_error
from bayescal.metrics.classwise import (
    classwise_calibration_error,
    group_calibration_error,
    top_label_conditional_calibration_error,
)
from bayescal.metrics.corp import consistency_band, corp, murphy, refinement, reliability_curve
from bayescal.metrics.crps import crps, crps_ensemble, crps_gaussian, energy_score, mixture_crps, variogram_score
from bayescal.metrics.events import Events, class_probs, one_class, top_label
from bayescal.metrics.fine import binned_auroc, binned_ks_error
from bayescal.metrics.inversion import gap_norm_interval, signed_square_interval
from bayescal.metrics.joint import dyadic_nll, joint_log_prob, joint_nll
from bayescal.metrics.kernel import all_classes, local_calibration_error, mmce, skce, skce_test
from bayescal.metrics.likelihood import (
    accuracy,
    brier,
    gibbs_nll,
    mean_metric,
    nll,
    ranked_probability_score,
    spherical_score,
    zero_probability_rows,
)
from bayescal.metrics.members import disagreement, diversity, member_metric
from bayescal.metrics.pit import (
    calibration_curve,
    ensemble_pit,
    miscalibration_area,
    pit,
    pit_diagram,
    pit_histogram,
    quantile_calibration_error,
)
from bayescal.metrics.ranked import percentile_interval
from bayescal.metrics.ranking import (
    accuracy_rejection,
    auroc,
    auroc_estimate,
    average_precision,
    fpr_at_tpr,
    roc_curve,
)
from bayescal.metrics.regression import (
    central_interval,
    coverage,
    interval_score,
    interval_width,
    mixture_cdf,
    mixture_quantile,
    pinball,
    quantile_score,
    root_mean_squared_error,
    sharpness,
    squared_error,
    winkler_score,
)
from bayescal.metrics.selective import (
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    prediction_rejection_ratio,
    risk_at_coverage,
    risk_coverage_curve,
    uncertainty_events,
)
from bayescal.metrics.signed import confidence_gap, overconfidence, spiegelhalter_z, underconfidence
from bayescal.metrics.smooth import smooth_calibration_error, smooth_curve
from bayescal.metrics.soft import soft_binned_calibration_error
from bayescal.metrics.sweep import sweep_calibration_error
from bayescal.metrics.variances import (
    ence,
    expected_normalised_calibration_error,
    uce,
    uncertainty_calibration_error,
    variance_bins,
)
from bayescal.metrics.whole import stated, whole

__all__ = [
    "Events",
    "accuracy",
    "accuracy_rejection",
    "accuracy_versus_uncertainty",
    "accuracy_versus_uncertainty_loss",
    "all_classes",
    "augrc",
    "aurc",
    "auroc",
    "auroc_estimate",
    "average_precision",
    "binned_auroc",
    "binned_ks_error",
    "brier",
    "calibration_curve",
    "calibration_error",
    "central_interval",
    "class_probs",
    "classwise_calibration_error",
    "classwise_equal_mass_calibration_error",
    "confidence_gap",
    "confidence_histogram",
    "consistency_band",
    "corp",
    "coverage",
    "coverage_at_risk",
    "crps",
    "crps_ensemble",
    "crps_gaussian",
    "disagreement",
    "diversity",
    "dyadic_nll",
    "ence",
    "energy_score",
    "ensemble_pit",
    "equal_mass_calibration_error",
    "equal_mass_histogram",
    "excess_aurc",
    "expected_normalised_calibration_error",
    "fpr_at_tpr",
    "gap_norm_interval",
    "gibbs_nll",
    "group_calibration_error",
    "interval_score",
    "interval_width",
    "joint_log_prob",
    "joint_nll",
    "ks_error",
    "ks_test",
    "kuiper_error",
    "kuiper_test",
    "local_calibration_error",
    "mean_metric",
    "member_metric",
    "miscalibration_area",
    "mixture_cdf",
    "mixture_crps",
    "mixture_quantile",
    "mmce",
    "murphy",
    "nixon_calibration_error",
    "nll",
    "one_class",
    "overconfidence",
    "percentile_interval",
    "pinball",
    "pit",
    "pit_diagram",
    "pit_histogram",
    "prediction_rejection_ratio",
    "quantile_calibration_error",
    "quantile_score",
    "ranked_probability_score",
    "refinement",
    "reliability_curve",
    "risk_at_coverage",
    "risk_coverage_curve",
    "roc_curve",
    "root_mean_squared_error",
    "sharpness",
    "signed_square_interval",
    "skce",
    "skce_test",
    "smooth_calibration_error",
    "smooth_curve",
    "soft_accuracy_versus_uncertainty_loss",
    "soft_binned_calibration_error",
    "spearman",
    "spearman_difference",
    "spherical_score",
    "spiegelhalter_test",
    "spiegelhalter_z",
    "squared_calibration_error",
    "squared_equal_mass_calibration_error",
    "squared_error",
    "stated",
    "sweep_calibration_error",
    "top_label",
    "top_label_conditional_calibration_error",
    "uce",
    "uncertainty_calibration_error",
    "uncertainty_events",
    "underconfidence",
    "variance_bins",
    "variogram_score",
    "whole",
    "winkler_score",
    "zero_probability_rows",
]
