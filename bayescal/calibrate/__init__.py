"""Post-hoc calibration: `fit_x(pred, targets) -> calibrator`, `calibrator(pred) -> pred`. Pool first, then calibrate."""

from bayescal.calibrate.bayesian import (
    BayesianTemperature,
    BayesianVector,
    fit_bayesian_temperature,
    fit_bayesian_vector,
)
from bayescal.calibrate.bayesian_binning import BayesianBinning, fit_bayesian_binning
from bayescal.calibrate.beta import BetaMap, fit_beta
from bayescal.calibrate.calibrator import Calibrator, Composition, clip_probabilities, compose
from bayescal.calibrate.density_aware import DensityAware, fit_density_aware
from bayescal.calibrate.dirichlet import DirichletMap, fit_diagonal_dirichlet, fit_dirichlet
from bayescal.calibrate.ensemble_temperature import EnsembleTemperature, fit_ensemble_temperature
from bayescal.calibrate.ensembles import (
    JointTemperature,
    MemberTemperatures,
    fit_joint_temperature,
    fit_members_then_pool,
)
from bayescal.calibrate.extra_logit import ExtraLogit, add_extra_class, fit_extra_logit
from bayescal.calibrate.histogram import HistogramBinning, fit_histogram
from bayescal.calibrate.isotonic import Isotonic, SharedIsotonic, fit_isotonic, fit_shared_isotonic
from bayescal.calibrate.label_shift import PriorShift, fit_label_shift_bbse, fit_label_shift_em, prior_shift
from bayescal.calibrate.order_preserving import OrderPreserving, fit_order_preserving
from bayescal.calibrate.parametrised_temperature import (
    AdaptiveTemperature,
    ParametrisedTemperature,
    fit_adaptive_temperature,
    fit_parametrised_temperature,
)
from bayescal.calibrate.platt import PlattScaling, fit_platt
from bayescal.calibrate.proximity import Proximity, fit_proximity
from bayescal.calibrate.pseudo_rows import PerturbedRows, PseudoTargetRows, perturbed_rows, pseudo_target_rows
from bayescal.calibrate.rank_preserving import RankPreserving, fit_rank_preserving
from bayescal.calibrate.region_temperature import (
    BinwiseTemperature,
    GroupwiseTemperature,
    fit_binwise_temperature,
    fit_groupwise_temperature,
)
from bayescal.calibrate.regression import (
    MappedQuantiles,
    QuantileMap,
    VarianceScaling,
    fit_quantile_map,
    fit_variance_scaling,
)
from bayescal.calibrate.scaling_binning import fit_scaling_binning
from bayescal.calibrate.selection import MemberSelection, fit_member_selection
from bayescal.calibrate.shift import (
    AccuracyEstimate,
    ConfidenceMatching,
    DensityRatioWeights,
    density_ratio_weights,
    effective_size,
    fit_confidence_matching,
    fit_transcal,
    shifted_accuracy,
)
from bayescal.calibrate.spline import Spline, fit_spline
from bayescal.calibrate.stacking import Stacking, fit_stacking
from bayescal.calibrate.temperature import Temperature, fit_temperature
from bayescal.calibrate.vector import MatrixScaling, VectorScaling, fit_matrix, fit_vector

__all__ = [
    "AccuracyEstimate",
    "AdaptiveTemperature",
    "BayesianBinning",
    "BayesianTemperature",
    "BayesianVector",
    "BetaMap",
    "BinwiseTemperature",
    "Calibrator",
    "Composition",
    "ConfidenceMatching",
    "DensityAware",
    "DensityRatioWeights",
    "DirichletMap",
    "EnsembleTemperature",
    "ExtraLogit",
    "GroupwiseTemperature",
    "HistogramBinning",
    "Isotonic",
    "JointTemperature",
    "MappedQuantiles",
    "MatrixScaling",
    "MemberSelection",
    "MemberTemperatures",
    "OrderPreserving",
    "ParametrisedTemperature",
    "PerturbedRows",
    "PlattScaling",
    "PriorShift",
    "Proximity",
    "PseudoTargetRows",
    "QuantileMap",
    "RankPreserving",
    "SharedIsotonic",
    "Spline",
    "Stacking",
    "Temperature",
    "VarianceScaling",
    "VectorScaling",
    "add_extra_class",
    "clip_probabilities",
    "compose",
    "density_ratio_weights",
    "effective_size",
    "fit_adaptive_temperature",
    "fit_bayesian_binning",
    "fit_bayesian_temperature",
    "fit_bayesian_vector",
    "fit_beta",
    "fit_binwise_temperature",
    "fit_confidence_matching",
    "fit_density_aware",
    "fit_diagonal_dirichlet",
    "fit_dirichlet",
    "fit_ensemble_temperature",
    "fit_extra_logit",
    "fit_groupwise_temperature",
    "fit_histogram",
    "fit_isotonic",
    "fit_joint_temperature",
    "fit_label_shift_bbse",
    "fit_label_shift_em",
    "fit_matrix",
    "fit_member_selection",
    "fit_members_then_pool",
    "fit_order_preserving",
    "fit_parametrised_temperature",
    "fit_platt",
    "fit_proximity",
    "fit_quantile_map",
    "fit_rank_preserving",
    "fit_scaling_binning",
    "fit_shared_isotonic",
    "fit_spline",
    "fit_stacking",
    "fit_temperature",
    "fit_transcal",
    "fit_variance_scaling",
    "fit_vector",
    "perturbed_rows",
    "prior_shift",
    "pseudo_target_rows",
    "shifted_accuracy",
]
