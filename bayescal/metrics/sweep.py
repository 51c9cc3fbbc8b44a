"""The calibration error of a number of bins that the data choose: as many as keep the accuracies in order."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.binning import Histogram, check_bins
from bayescal.metrics.adaptive import check_columns
from bayescal.metrics.calibration import check_norm, norm_of_gaps
from bayescal.metrics.events import Outcome, RowWeights, check_values
from bayescal.metrics.whole import stated
from bayescal.predictive import float32_or_wider
from bayescal.types import Array

Scheme = Literal["mass", "width"]
Scalar = Float[Array, ""]


@stated("ECE_SWEEP", regular=False)
def sweep_calibration_error(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    weights: RowWeights = None,
    scheme: Scheme = "mass",
    norm: float = 1,
    max_bins: int = 1000,
) -> Scalar:
    """ECE_SWEEP: the calibration error with the most bins for which their accuracies do not decrease, here or for fewer.

    In [0, 1]; lower is better; NaN without rows. Less biased than a fixed number of bins. No interval: the outcomes choose
    the bins.

    Args:
        probability: given to the event, in [0, 1].
        outcome: 1 where it happened, else 0.
        weights: non-negative; None = all alike; a weight is a repetition.
        scheme: "mass" = equal mass, equal probabilities grouped as in `equal_mass_histogram`; "width" = equal width, closed
            on the left, empty bins passed over.
        norm: as in `equal_mass_calibration_error`.
        max_bins: where the sweep ends, if nothing ends it before (all outcomes alike, say).

    Raises:
        ValueError: for columns of different shapes, another word for `scheme`, a norm or a number of bins below 1.
    Source: Roelofs et al. 2022.
    """
    check_columns(probability, outcome, weights)
    check_values(probability, outcome, weights)
    check_norm(norm, debiased=False)
    weight, gap, _ = _sweep(probability, outcome, weights, scheme, max_bins)
    share = weight / jnp.where(weight.sum() > 0, weight.sum(), jnp.nan)
    return norm_of_gaps(Histogram(weight, gap, *3 * (jnp.zeros_like(gap),)), share, norm)


def sweep_num_bins(
    probability: Float[Array, "batch"],
    outcome: Outcome,
    *,
    weights: RowWeights = None,
    scheme: Scheme = "mass",
    max_bins: int = 1000,
) -> Int[Array, ""]:
    """The number of bins that `sweep_calibration_error` settles on, at least 1.

    Args:
        probability, outcome, weights, scheme, max_bins: see `sweep_calibration_error`.
    """
    check_columns(probability, outcome, weights)
    check_values(probability, outcome, weights)
    return _sweep(probability, outcome, weights, scheme, max_bins)[2]


@partial(jax.jit, static_argnames=("scheme", "max_bins"))
def _sweep(probability, outcome, weights, scheme: Scheme, max_bins: int):
    """Weight and weighted gap of each bin, zero beyond the number of bins chosen, and that number."""
    check_bins(max_bins)
    if scheme not in get_args(Scheme):
        raise ValueError(f"`scheme` must be 'mass' or 'width', got {scheme!r}. Roelofs et al. 2022 prefer equal mass.")
    n = len(probability)
    if not n:
        return jnp.zeros(1), jnp.zeros(1), jnp.int32(1)
    limit = min(max_bins, n)
    probability, outcome = float32_or_wider(probability), float32_or_wider(outcome)
    order = jnp.argsort(probability)
    ordered = probability[order]

    def sums(values):  # of the first rows in order of probability: those of k rows at place k
        return jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(values[order])])

    if weights is None:
        mass, hits = jnp.arange(n + 1), sums((outcome > 0).astype(jnp.int32))
        gaps = sums(probability - outcome)
    else:
        mass, hits = sums(weights), sums(jnp.where(weights == 0, 0, weights * outcome))
        gaps = sums(jnp.where(weights == 0, 0, weights * (probability - outcome)))
    step = jnp.arange(limit + 1)

    if scheme == "width":
        position, total = ordered, jnp.float32(1)
    else:  # twice the middle of the mass of a row's ties
        first, last = (jnp.searchsorted(ordered, ordered, side=side) for side in ("left", "right"))
        position, total = (mass[first] + mass[last]).astype(jnp.float32), 2.0 * mass[-1]

    def places(number):  # how many rows lie before each cut; those after the last are none
        place = jnp.searchsorted(position, step * total / number)
        return jnp.where(step == 0, 0, jnp.where(step >= number, n, place))

    def rises(number):
        place = places(number)
        weight = jnp.diff(mass[place])
        accuracy = jnp.where(weight > 0, jnp.diff(hits[place]) / jnp.where(weight > 0, weight, 1), -jnp.inf)
        return ((weight == 0) | (accuracy >= jax.lax.cummax(accuracy))).all()

    number = jax.lax.while_loop(lambda m: (m < limit) & rises(m + 1), lambda m: m + 1, jnp.int32(1))
    place = places(number)
    return jnp.diff(mass[place]).astype(gaps.dtype), jnp.diff(gaps[place]), number
