"""Does a score tell data unlike the training data from data like it? Sets, groups of sets, mixtures, thresholds."""

from bayescal.detection.comparison import compare_detection
from bayescal.detection.evaluation import WORDS, evaluate_detection
from bayescal.detection.sets import OpenDomain, open_domain
from bayescal.detection.threshold import detection_rates, detection_threshold

__all__ = [
    "WORDS",
    "OpenDomain",
    "compare_detection",
    "detection_rates",
    "detection_threshold",
    "evaluate_detection",
    "open_domain",
]
