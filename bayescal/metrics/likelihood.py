"""Proper scores and accuracy: means over examples, kept as sums of weight, value and squared value."""

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import Z95, wilson_interval
from bayescal.metrics.events import class_probs
from bayescal.predictive import Gaussian, Predictive, weighted_sum
from bayescal.types import Array, Metric

MAX_ROWS = 2**20


class MeanSums(NamedTuple):
    """Sums that a mean and its standard error are read from, each a scalar.

    The interval's n is Kish's effective number of rows, (sum w)^2 / sum w^2: free of the weights' scale.
    """

    weight: Float[Array, ""]
    value: Float[Array, ""]
    square: Float[Array, ""]
    weight_square: Float[Array, ""]

    def effective_rows(self):
        """Kish's effective number of rows."""
        return self.weight**2 / self.weight_square


def check_rows(rows: int) -> None:
    """Raises for more rows than float32 sums count exactly."""
    if rows > MAX_ROWS:
        raise ValueError(
            f"`targets` must have at most {MAX_ROWS} rows a call, got {rows}: float32 counts stop at 2**24. "
            "Add the sums of several calls, as `evaluate` does."
        )


def mean_metric(score: Callable[[Predictive, Array], Float[Array, "batch"]], convention: str, interval=None) -> Metric:
    """A metric that is the weighted mean of a per-example score.

    Args:
        score: `(pred, targets) -> (batch,)`.
        convention: what differs in the field, in words.
        interval: `sums -> (low, high)`; default the normal interval, mean +- 1.96 standard errors.
    """

    def measure(pred, targets, weights):
        check_rows(weights.shape[0])
        value = jnp.where(weights == 0, 0, score(pred, targets))
        return MeanSums(weights.sum(), (weights * value).sum(), (weights * value**2).sum(), (weights**2).sum())

    def normal_interval(sums):
        mean, square, rows = sums.value / sums.weight, sums.square / sums.weight, sums.effective_rows()
        with np.errstate(invalid="ignore"):  # an infinite score has no interval: NaN
            variance = square - mean**2
            if np.ndim(variance) == 0 and variance < 1e-4 * square:
                return None, None  # float32 squares cancel: left to the rows' influence
            half = Z95 * (variance / rows) ** 0.5
            return mean - half, mean + half

    return Metric(measure, lambda sums: sums.value / sums.weight, interval or normal_interval, convention)


@cache
def accuracy() -> Metric:
    """Share of examples whose most probable class (of the pool; ties to the lowest index) is the target.

    In [0, 1]; higher is better. Interval: Wilson, 95 %, with Kish's effective number of rows.
    """

    def score(pred, targets):
        return (pred.log_probs().argmax(-1) == targets).astype(jnp.float32)

    def interval(sums):
        return wilson_interval(sums.value / sums.weight, sums.effective_rows())

    return mean_metric(score, "argmax of the pooled probabilities", interval)._replace(better="higher")


@cache
def nll(*, clip: float | None = None) -> Metric:
    """Negative log-likelihood of the pool, -mean log sum_s w_s p_s(y), nats per example; lower is better.

    Infinite where the target has probability zero (`zero_probability_rows` counts those), unless a clip is asked for.
    At most the mean of the members' own, `gibbs_nll`. Interval: normal, 95 %; none where it is infinite.

    Args:
        clip: smallest probability that is counted with, -log max(p, clip), nothing being renormalised; None = no such.

    Raises:
        ValueError: for a clip outside (0, 1).
        TypeError: when measured, for a clip of densities.
    """
    if clip is None:
        return mean_metric(lambda pred, targets: -pred.log_prob(targets), "of the pool, nats per example, no clipping")
    if not 0 < clip < 1:
        raise ValueError(f"`clip` must lie in (0, 1), got {clip!r}. The usual is 1e-12; None clips nothing.")

    def score(pred, targets):
        if isinstance(pred, Gaussian):
            raise TypeError(
                "`clip` is a smallest probability, got densities (Gaussian), whose size depends on the targets' unit. "
                "Leave it out."
            )
        return -jnp.maximum(pred.log_prob(targets), math.log(clip))

    return mean_metric(score, f"of the pool, nats per example, probabilities clipped at {clip:g}")


@cache
def gibbs_nll() -> Metric:
    """Gibbs negative log-likelihood: the mean over members of their own, -mean sum_s w_s log p_s(y), nats per example.

    Lower is better; at least `nll`, that of the pool; infinite where any member gives its target probability zero.
    Interval: normal, 95 %.
    """

    def score(pred, targets):
        return -weighted_sum(pred.member_log_prob(targets), pred.weights())

    return mean_metric(score, "mean of the members' own, nats per example, no clipping")


class RowCount(NamedTuple):
    """A number of rows, whatever they weigh."""

    rows: Float[Array, ""]


@cache
def zero_probability_rows() -> Metric:
    """Number of rows whose target has probability zero under the pool: those that make `nll` infinite.

    Rows of weight 0 do not count, and all others count as one. No interval.
    """

    def measure(pred, targets, weights):
        check_rows(weights.shape[0])
        return RowCount(((pred.log_prob(targets) == -jnp.inf) & (weights > 0)).astype(jnp.float32).sum())

    return Metric(measure, lambda sums: sums.rows, convention="rows of positive weight, of the pool", regular=False)


@cache
def brier(*, scale: Literal["sum", "half"] = "sum") -> Metric:
    """Brier score mean sum_k (p_k - 1[y = k])^2 of the pool, in [0, 2]; lower is better.

    Interval: normal, 95 %.

    Args:
        scale: "sum" over all classes, for two classes twice the binary (p - y)^2; "half" of that, in [0, 1], which for two
            classes is the binary one.

    Raises:
        ValueError: for another scale.
    Source: Brier 1950.
    """
    if scale not in ("sum", "half"):
        raise ValueError(f"`scale` must be 'sum' or 'half', got {scale!r}. Brier 1950 sums over all classes.")

    def score(pred, targets):
        probs = class_probs(pred)
        total = ((probs - jax.nn.one_hot(targets, probs.shape[-1])) ** 2).sum(-1)
        return total if scale == "sum" else total / 2

    words = {"sum": "sum over classes, range 0 to 2", "half": "half the sum over classes, range 0 to 1"}
    return mean_metric(score, words[scale])


@cache
def spherical_score() -> Metric:
    """Spherical score mean p(y) / sqrt(sum_k p_k^2) of the pool, in [0, 1]; higher is better.

    Strictly proper; other libraries may give its negative. Interval: normal, 95 %.

    Source: Gneiting and Raftery 2007 (recalled, formula not checked against the paper).
    """

    def score(pred, targets):
        return jnp.exp(pred.log_prob(targets)) / jnp.linalg.norm(class_probs(pred), axis=-1)

    return mean_metric(score, "of the pool, positive orientation")._replace(better="higher")


@cache
def ranked_probability_score(*, normalised: bool = False) -> Metric:
    """Ranked probability score mean sum_{k < C} (F_k - 1[y <= k])^2, F_k = p_0 + ... + p_k, of ordered classes.

    In [0, C - 1]; lower is better. Unlike the Brier score it minds how far off a class is. Interval: normal, 95 %.

    Args:
        normalised: divided by C - 1, for a range of [0, 1].
    Source: Epstein 1969 (recalled, formula not checked against the paper).
    """

    def score(pred, targets):
        cumulative = jnp.cumsum(class_probs(pred), -1)[..., :-1]
        reached = jnp.asarray(targets)[..., None] <= jnp.arange(cumulative.shape[-1])
        total = ((cumulative - reached.astype(cumulative.dtype)) ** 2).sum(-1)
        return total / cumulative.shape[-1] if normalised else total

    words = "mean over the C - 1 thresholds, range 0 to 1" if normalised else "sum over thresholds, range 0 to C - 1"
    return mean_metric(score, f"classes ordered as numbered; {words}")
