"""Scaling-binning: a scaling map, then bins that give the mean of what it gave."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Calibrator, Classes, Composition, compose, rows_for_fit
from bayescal.calibrate.histogram import HistogramBinning, check_bins_of_rows, equal_mass_edges, sums_in_bins
from bayescal.calibrate.one_vs_rest import check_mixture, events
from bayescal.calibrate.temperature import fit_temperature
from bayescal.predictive import take
from bayescal.types import Array


def fit_scaling_binning(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    fit_scaler: Callable[..., Calibrator] = fit_temperature,
    num_bins: int = 15,
    scaling_rows: int | None = None,
    mixture: float = 0.0,
    weights: Float[Array, "rows"] | None = None,
) -> Composition:
    """A scaling map g, then the mean of g(p) in bins of equal mass of g(p): for two classes class 1, else each class.

    The bins use no targets, so that their noise is that of g(p) within a bin, far below that of the rates of
    `fit_histogram`; and the result has few values, whose calibration can be measured.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        fit_scaler: `(pred, targets, *, weights) -> calibrator` that needs nothing else.
        num_bins: of each event.
        scaling_rows: how many of the first rows fit the scaling map, and the others the bins, as the theorem has it;
            None = all rows do both, as in the authors' package.
        mixture: weight of g(p) in the result, in [0, 1).
        weights: weight of each row; None = ones; a weight is a repetition.

    Returns:
        Composition: the scaler and a `HistogramBinning`.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows, a part without rows, more bins than rows, a mixture outside [0, 1), a scaler that
            needs features, and what the scaler's fit raises for.
    Source: Kumar, Liang and Ma 2019 (recalled).
    """
    check_mixture(mixture)
    _, targets, row_weights = rows_for_fit(pred, targets, weights)
    rows = len(targets)
    if scaling_rows is not None and not 0 < scaling_rows < rows:
        raise ValueError(
            f"`scaling_rows` must leave rows on both sides, in [1, {rows - 1}], got {scaling_rows!r}. Half of them is usual."
        )
    first, second = slice(0, scaling_rows), slice(scaling_rows or 0, None)
    check_bins_of_rows(num_bins, len(row_weights[second]))
    scaler = fit_scaler(take(pred, first), targets[first], weights=None if weights is None else row_weights[first])
    if scaler.needs:
        raise ValueError(
            f"`fit_scaler` must give a calibrator of the predictive alone, got one that needs {scaler.needs}. "
            "`fit_temperature` is usual."
        )
    scaled: Any = scaler(take(pred, second))
    log_probs, _, kept = rows_for_fit(scaled, targets[second], row_weights[second])
    edges, values, weight = _fit(events(log_probs).T, kept, num_bins)
    return compose(scaler, HistogramBinning(edges, values, weight, mixture))


@jax.jit(static_argnames="num_bins")
def _fit(scores, weights, num_bins):
    def one(scores):
        edges = equal_mass_edges(scores, weights, num_bins)
        sums = sums_in_bins(edges, scores, jnp.zeros_like(scores), weights)
        return edges, sums.gaps(), sums.weight  # with no event, the gap is the score

    return jax.vmap(one)(scores)
