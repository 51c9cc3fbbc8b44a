"""Histogram binning: each bin of the probability gives the rate at which the event happened in it."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.binning import bin_edges, check_bins, histogram
from bayescal.calibrate.calibrator import Calibrator, Classes, like, pooled_log_probs, require_every_class, rows_for_fit
from bayescal.calibrate.one_vs_rest import check_mixture, distribution, events, outcomes
from bayescal.types import Array, pytree

Binning = Literal["mass", "width"]


@pytree
class HistogramBinning(Calibrator):
    """A step function of the probability of class 1, or of each class against the rest, normalised again.

    Args:
        edges: inner edges of the bins, closed on the right; equal ones have an empty bin between them.
        values: what each bin gives, in [0, 1].
        weight: total weight of the rows of the fit in each bin; 0 = empty, and a probability there stays as it is.
        mixture: weight of the original probabilities.
    """

    accuracy_preserving = False

    edges: Float[Array, "maps inner"]
    values: Float[Array, "maps bins"]
    weight: Float[Array, "maps bins"]
    mixture: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __call__(self, pred: Classes) -> Classes:
        """The value of each probability's bin; a row whose values are all zero stays as it was.

        Raises:
            ValueError: for another number of classes than in the fit.
        """
        log_probs = pooled_log_probs(pred)
        given = events(log_probs, len(self.values))
        rates = _look_up(self.edges, self.values, self.weight, given)
        return like(pred, distribution(rates, log_probs, self.mixture))


def fit_histogram(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    num_bins: int = 15,
    binning: Binning = "mass",
    mixture: float = 0.0,
    weights: Float[Array, "rows"] | None = None,
) -> HistogramBinning:
    """Rate of the event in each bin of its probability: for two classes class 1, for more each class against the rest.

    In the same bins the calibration error of the events is then 0 on the rows of the fit (of more than two classes before
    the division by the sum). Bins without an event give exactly 0, and the nll of other rows may be infinite: see
    `mixture`.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        num_bins: of each event.
        binning: "mass" = the same weight in all bins as far as ties allow, which are never parted; edges lie midway
            between neighbouring probabilities. "width" = edges k / num_bins.
        mixture: weight of the original probabilities in the result, in [0, 1).
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows, a class without a row, more bins than rows, another word for `binning`, or a
            mixture outside [0, 1).
    Source: Zadrozny and Elkan 2001 (recalled).
    """
    check_mixture(mixture)
    if binning not in get_args(Binning):
        raise ValueError(f"`binning` must be 'mass' or 'width', got {binning!r}. Equal mass leaves no bin empty.")
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    check_bins_of_rows(num_bins, len(targets))
    classes = log_probs.shape[-1]
    require_every_class(targets, weights, classes)
    bins = _fit(events(log_probs).T, outcomes(targets, classes).T, weights, num_bins, binning)
    return HistogramBinning(*bins, mixture=mixture)


def check_bins_of_rows(num_bins: int, rows: int) -> None:
    """Raises for what is no number of bins, or for more bins than rows."""
    check_bins(num_bins)
    if num_bins > rows:
        raise ValueError(f"`num_bins` must be at most the number of rows, {rows}, got {num_bins}. Use fewer bins.")


def equal_mass_edges(
    scores: Float[Array, "rows"], weights: Float[Array, "rows"], num_bins: int
) -> Float[jax.Array, "inner"]:
    """Inner edges of bins of equal weight, midway between neighbouring scores; ties are not parted, a weight is a repetition.

    Args:
        scores: in any order.
        weights: rows of weight 0 count for nothing.
        num_bins: one more than edges. Edges above every score are infinite.
    """
    scores = jnp.where(weights > 0, scores, jnp.inf)
    order = jnp.argsort(scores)
    scores, mass = scores[order], jnp.cumsum(weights[order])
    # Not mass[-1] / num_bins: under jit XLA may take the reciprocal, and bins that could be equal would not be.
    last = jnp.searchsorted(mass * num_bins, jnp.arange(1, num_bins) * mass[-1])
    below = scores[jnp.minimum(last, len(scores) - 1)]
    above = jnp.append(scores, jnp.inf)[jnp.searchsorted(scores, below, side="right")]
    return (below + above) / 2


def place(edges: Float[Array, "inner"], scores: Float[Array, "*batch"]) -> Int[jax.Array, "*batch"]:
    """Bin of each score, in [0, bins); closed on the right."""
    return jnp.searchsorted(edges, scores, side="left")


def sums_in_bins(edges, scores, outcome, weights):
    """`Histogram` (bins,) of (score, outcome) between these edges."""
    bins = len(edges) + 1
    sums = histogram(scores, outcome, weights, num_bins=1, groups=place(edges, scores), num_groups=bins)
    return jax.tree.map(lambda x: x[:, 0], sums)


@jax.jit(static_argnames=("num_bins", "binning"))
def _fit(scores, outcome, weights, num_bins, binning):
    def one(scores, outcome):
        if binning == "mass":
            edges = equal_mass_edges(scores, weights, num_bins)
        else:
            edges = jnp.asarray(bin_edges(num_bins)[1:-1], scores.dtype)
        sums = sums_in_bins(edges, scores, outcome, weights)
        return edges, sums.accuracy(), sums.weight

    return jax.vmap(one)(scores, outcome)


@jax.jit
def _look_up(edges, values, weight, scores):
    def one(edges, values, weight, scores):
        index = place(edges, scores)
        return jnp.where(weight[index] > 0, values[index], scores)

    return jax.vmap(one, in_axes=(0, 0, 0, -1), out_axes=-1)(edges, values, weight, scores)
