"""Which way forecasts are off: signed gaps, over- and under-confidence, Spiegelhalter's z, as streaming sums."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from jaxtyping import Float

from bayescal.binning import Z95, namespace
from bayescal.metrics.events import Events, top_label
from bayescal.metrics.likelihood import check_rows, mean_metric
from bayescal.types import Array, Metric


class ZSums(NamedTuple):
    """Sums that Spiegelhalter's z is read from, each a scalar.

    value: weighted sum of (y - p)(1 - 2p).
    variance: sum of squared weights times (1 - 2p)^2 p (1 - p), the variance of `value` under calibration.
    """

    value: Float[Array, ""]
    variance: Float[Array, ""]


@cache
def confidence_gap(*, events: Events | None = None) -> Metric:
    """Mean confidence - accuracy: positive = over-confident, negative = under-confident.

    In [-1, 1]; nearest to 0 is best. Its size is the calibration error with a single bin. Interval: normal, 95 %.

    Args:
        events: which events; default the top label (confidence, correctness).
    """
    events = events or top_label()

    def score(pred, targets):
        probability, outcome = events.read(pred, targets)
        return probability - outcome

    return mean_metric(score, f"{events.name}; mean probability - frequency, signed")._replace(better="neither")


@cache
def overconfidence(*, events: Events | None = None) -> Metric:
    """Over-confidence E[confidence | wrong]: the mean confidence of the predictions that are wrong.

    In [0, 1]; lower is better; NaN where none is wrong. Interval: normal, 95 %, given how many are wrong.

    Args:
        events: which events; default the top label (confidence, correctness).
    Source: Mund, Triebel and Cremers 2015, as in pycalib (recalled, formula not checked against the paper).
    """
    return _mean_given(
        events or top_label(), "mean probability where it did not happen", lambda p: p, lambda outcome: 1 - outcome
    )


@cache
def underconfidence(*, events: Events | None = None) -> Metric:
    """Under-confidence E[1 - confidence | right]: the mean doubt of the predictions that are right.

    In [0, 1]; lower is better; NaN where none is right. Interval: normal, 95 %, given how many are right.

    Args:
        events: which events; default the top label (confidence, correctness).
    Source: Mund, Triebel and Cremers 2015, as in pycalib (recalled, formula not checked against the paper).
    """
    return _mean_given(
        events or top_label(), "mean 1 - probability where it happened", lambda p: 1 - p, lambda outcome: outcome
    )


@cache
def spiegelhalter_z(*, events: Events | None = None) -> Metric:
    """Spiegelhalter's z: sum (y - p)(1 - 2p) / sqrt(sum (1 - 2p)^2 p (1 - p)), standard normal for calibrated forecasts.

    Nearest to 0 is best, and it grows with the root of n; positive = the Brier score is worse than the probabilities
    themselves lead one to expect. NaN where every probability is 0, 1/2 or 1. Interval: z +- 1.96, its standard error being
    one under calibration: 0 inside = not rejected at 5 %. `spiegelhalter_test` is the same of whole columns, with p-value.

    Args:
        events: which events; default the top label. `one_class(1)` for the probabilities of class 1.
    Source: Spiegelhalter 1986.
    """
    events = events or top_label()

    def measure(pred, targets, weights) -> ZSums:
        check_rows(weights.shape[0])
        xp = namespace(weights)
        probability, outcome = events.read(pred, targets)
        slope = 1 - 2 * probability
        value = xp.where(weights == 0, 0, (outcome - probability) * slope)
        variance = xp.where(weights == 0, 0, slope**2 * probability * (1 - probability))
        return ZSums((weights * value).sum(), (weights**2 * variance).sum())

    def compute(sums):
        return _ratio(sums.value, sums.variance**0.5)

    def interval(sums):
        z = compute(sums)
        return z - Z95, z + Z95

    return Metric(measure, compute, interval, f"{events.name}; z of Spiegelhalter's test", "neither", regular=False)


def _mean_given(events: Events, words: str, score: Callable, given: Callable) -> Metric:
    """Mean of a score of the probability over the rows whose outcome is as given."""
    base = mean_metric(lambda pred, targets: score(events.read(pred, targets)[0]), f"{events.name}; {words}")

    def measure(pred, targets, weights):
        return base.measure(pred, targets, weights * given(events.read(pred, targets)[1]))

    def interval(sums):
        assert base.interval is not None
        return base.interval(sums) if sums.weight > 0 else (None, None)

    return base._replace(measure=measure, compute=lambda sums: _ratio(sums.value, sums.weight), interval=interval)


def _ratio(value, size):
    xp = namespace(size)
    return xp.where(size > 0, value / xp.where(size > 0, size, 1), xp.nan)
