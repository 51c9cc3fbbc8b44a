"""Which of two scores tells outside rows better? The same rows, paired."""

import math

import numpy as np
from jaxtyping import Bool, Float

from bayescal.binning import Z95
from bayescal.compare import Comparison
from bayescal.detection.evaluation import FEWEST, WORDS
from bayescal.detection.influence import auroc_and_slopes
from bayescal.evaluate import standard_error
from bayescal.metrics import auroc_estimate
from bayescal.types import Array, Estimate


def compare_detection(
    score_a: Float[Array, "rows"], score_b: Float[Array, "rows"], outside: Bool[Array, "rows"]
) -> Comparison:
    """auroc(a) - auroc(b) of two scores on the same rows, with DeLong's paired 95 % interval and p-value.

    Above 0 = `a` tells outside rows better. Rows that both scores rank alike cancel. NaN p-value and no interval, also of
    each alone, for fewer than 100 rows of a class; nor of the difference where there is no row on which they differ.

    Args:
        score_a, score_b: of each row, higher = more unlike the training data; their scales may differ.
        outside: which rows are out of distribution.

    Raises:
        ValueError: for NaN scores, other lengths, outcomes other than 0 and 1, or an absent class.
    Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    scores = [np.asarray(x, np.float64) for x in (score_a, score_b)]
    a, b = (auroc_estimate(x, np.asarray(outside), "outside") for x in scores)
    outside, error = np.asarray(outside, bool), math.nan
    if min(outside.sum(), (~outside).sum()) >= FEWEST["auroc"]:
        moved = [_row_influences(x, outside) for x in scores]
        error = standard_error(moved[0] - moved[1])
    else:
        a, b = (x._replace(low=None, high=None) for x in (a, b))
    value, half, known = a.value - b.value, Z95 * error, error > 1e-12
    p_value = math.erfc(abs(value) / error / math.sqrt(2)) if known else math.nan
    ends = (value - half, value + half) if known else (None, None)
    words = f"{WORDS['auroc']}; a - b, paired, DeLong"
    return Comparison(Estimate(value, *ends, len(outside), words), p_value, a, b)


def _row_influences(scores, outside) -> np.ndarray:
    """Derivative of the AUROC in each row's weight, a little enlarged, so that squares add up to DeLong's variance."""
    _, place = np.unique(scores, return_inverse=True)
    number = np.where(outside, outside.sum(), (~outside).sum())
    value, of_inside, of_outside = auroc_and_slopes(np.bincount(place, ~outside), np.bincount(place, outside))
    return (np.where(outside, of_outside[place], of_inside[place]) - value) / np.sqrt(number * (number - 1.0))
