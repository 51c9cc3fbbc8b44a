"""A threshold for rows that are seen one by one: chosen on in-distribution rows alone, and how often it flags."""

import math
from collections.abc import Mapping

import numpy as np

from bayescal.binning import wilson_interval
from bayescal.detection.false_positives import ROUNDING
from bayescal.detection.sets import Scores, checked_scores, named
from bayescal.types import Estimate


def detection_threshold(validation: Scores, *, tpr: float = 0.95) -> float:
    """Smallest threshold t with share(validation scores <= t) >= tpr: rows above it are flagged as out of distribution.

    In the score's unit. In-distribution is the positive class: at least `tpr` of its validation rows are kept, all rows of
    equal score together. Outside rows play no part, as they do not where a detector is used.

    Args:
        validation: score of each in-distribution validation row, higher = more unlike the training data.
        tpr: share to keep, in (0, 1].

    Raises:
        ValueError: for NaN scores (how many), no rows, or a share outside (0, 1].
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"`tpr` must lie in (0, 1], got {tpr!r}. The usual choice is 0.95.")
    rising = np.sort(checked_scores("validation", validation))
    return float(rising[math.ceil(tpr * ROUNDING * len(rising)) - 1])


def detection_rates(threshold: float, inside: Scores, outside: Mapping[str, Scores]) -> dict[str, Estimate]:
    """Share of rows with a score above the threshold, in each set, with its 95 % Wilson interval.

    In [0, 1]. Of `inside` (false alarms) lower is better, of the outside sets (detections) higher.

    Args:
        threshold: as `detection_threshold` gives it.
        inside: score of each in-distribution test row: other rows than the threshold was chosen on.
        outside: name -> scores of an out-of-distribution set.

    Raises:
        ValueError: for a threshold that is NaN, NaN scores (how many, and where), empty sets, names not distinct.
    """
    if math.isnan(threshold):
        raise ValueError("`threshold` must be a number, got nan. Choose it by `detection_threshold`.")
    result = {}
    for name, scores in named(inside, {}, outside).items():
        rate = float((scores > threshold).mean())
        low, high = wilson_interval(rate, len(scores))
        result[name] = Estimate(
            rate, float(low), float(high), len(scores), f"share above {threshold:g}; Wilson interval"
        )
    return result
