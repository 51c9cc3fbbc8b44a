"""Bayesian binning (BBQ): the average over binnings of all sizes, each weighed by how well it explains the outcomes."""

import jax
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Calibrator, Classes, rows_for_fit
from bayescal.calibrate.histogram import HistogramBinning
from bayescal.calibrate.one_vs_rest import events, outcomes
from bayescal.types import Array, pytree


@pytree
class BayesianBinning(Calibrator):
    """Posterior mean rate of the event given its probability, for class 1 or for each class against the rest, normalised.

    Args:
        bins: the average of the binnings, which is itself a step function.
        num_bins: posterior mean number of bins of each map.
    """

    accuracy_preserving = False

    bins: HistogramBinning
    num_bins: Float[Array, "maps"]

    def __call__(self, pred: Classes) -> Classes:
        """The averaged rate of each probability, never 0 or 1.

        Raises:
            ValueError: for another number of classes than in the fit.
        """
        return self.bins(pred)


def fit_bayesian_binning(
    pred: Classes, targets: Int[Array, "rows"], *, prior: float = 2.0, weights: Float[Array, "rows"] | None = None
) -> BayesianBinning:
    """Mean rate over equal-mass binnings of B = N^(1/3) / 10 ... 10 N^(1/3) bins, each by its BDeu evidence; no B to choose.

    A bin's rate is a priori Beta(a, b) with a + b = prior / B and mean at the middle of the bin, so that the evidence of m
    events in n rows is G(prior / B) / G(n + prior / B) G(m + a) / G(a) G(n - m + b) / G(b), G the gamma function. All
    numbers of bins are as likely a priori. Host, float64, in logarithms; ties are not parted.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        prior: rows that the prior counts as, over all bins.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows, or a prior that is not positive.
    Source: Naeini, Cooper and Hauskrecht 2015 (recalled).
    """
    if not 0 < prior < np.inf:
        raise ValueError(f"`prior` must be positive and finite, got {prior!r}. 2 is usual.")
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    probability = events(log_probs).T
    maps, rows = probability.shape
    shapes = [
        jax.ShapeDtypeStruct(shape, probability.dtype)
        for shape in ((maps, rows - 1), (maps, rows), (maps, rows), (maps,))
    ]
    columns = probability, outcomes(targets, log_probs.shape[-1]).T, weights, prior
    edges, values, weight, num_bins = jax.pure_callback(_all_maps, tuple(shapes), *columns, vmap_method="sequential")
    return BayesianBinning(HistogramBinning(edges, values, weight), num_bins)


def _all_maps(probability, outcome, weights, prior):
    probability, outcome, weights, prior = (np.asarray(x) for x in (probability, outcome, weights, prior))
    found = [_average(p, y, weights, float(prior)) for p, y in zip(probability, outcome, strict=True)]
    return tuple(np.stack(columns).astype(probability.dtype) for columns in zip(*found, strict=True))


def _average(probability, outcome, weights, prior):
    """Steps between distinct probabilities, padded to the number of rows: edges, values, weights; and mean number of bins."""
    rows = len(probability)
    p, y, w = (x[weights > 0].astype(np.float64) for x in (probability, outcome, weights))
    if not p.size or np.isnan(p).any():
        return np.full(rows - 1, np.nan), np.full(rows, np.nan), np.ones(rows), np.nan
    distinct, group = np.unique(p, return_inverse=True)
    weight = np.bincount(group, w)
    mass, happened = np.cumsum(weight), np.cumsum(np.bincount(group, w * y))
    edges = (distinct[1:] + distinct[:-1]) / 2
    least, most = (mass[-1] ** (1 / 3) * x for x in (0.1, 10))
    sizes = np.arange(max(1, int(least)), min(len(distinct), int(np.ceil(most))) + 1)
    binnings = [_binning(size, mass, happened, edges, prior) for size in sizes]
    evidence = np.array([log_evidence for log_evidence, _, _ in binnings])
    posterior = np.exp(evidence - evidence.max())
    posterior /= posterior.sum()
    values = sum(share * np.repeat(rate, counts) for share, (_, rate, counts) in zip(posterior, binnings, strict=True))
    return (
        np.pad(edges, (0, rows - len(distinct)), constant_values=np.inf),
        np.pad(values, (0, rows - len(distinct))),
        np.pad(weight, (0, rows - len(distinct))),
        posterior @ sizes,
    )


def _binning(size, mass, happened, edges, prior):
    """Log-evidence of one binning, the posterior mean rate of its bins, and how many distinct probabilities each holds.

    Args:
        size: number of bins, those that ties leave empty among them.
        mass, happened: total weight, and that of events, up to each distinct probability.
        edges: between distinct probabilities.
        prior: rows that it counts as.
    """
    from scipy.special import gammaln  # slow to import

    last = np.unique(np.append(np.searchsorted(mass, np.arange(1, size) * mass[-1] / size), len(mass) - 1))
    n, m = (np.diff(x[last], prepend=0) for x in (mass, happened))
    ends = np.concatenate([[0], edges[last[:-1]], [1]])
    strength, middle = prior / size, (ends[1:] + ends[:-1]) / 2
    a, b = strength * middle, strength * (1 - middle)
    evidence = gammaln(strength) - gammaln(n + strength)
    evidence += gammaln(m + a) - gammaln(a) + gammaln(n - m + b) - gammaln(b)
    return evidence.sum(), (m + a) / (n + strength), np.diff(last, prepend=-1)
