"""Proper scores and accuracy: means over examples, kept as sums of weight, value and squared value."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import wilson_interval
from bayescal.predictive import Predictive
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
        mean = sums.value / sums.weight
        with np.errstate(invalid="ignore"):  # an infinite score has no interval: NaN
            variance = np.maximum(sums.square / sums.weight - mean**2, 0)
            half = 1.959963984540054 * (variance / sums.effective_rows()) ** 0.5
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
def nll() -> Metric:
    """Negative log-likelihood of the pool, -mean log sum_s w_s p_s(y), nats per example; lower is better.

    Infinite where the target has probability zero: nothing is clipped. At most the mean of the members' own ("Gibbs").
    Interval: normal, 95 %.
    """
    return mean_metric(lambda pred, targets: -pred.log_prob(targets), "of the pool, nats per example, no clipping")


@cache
def brier() -> Metric:
    """Brier score mean sum_k (p_k - 1[y = k])^2 of the pool, in [0, 2]; lower is better.

    The sum over all classes: for two classes twice the binary (p - y)^2. Interval: normal, 95 %.
    """

    def score(pred, targets):
        probs = jnp.exp(pred.log_probs())
        return ((probs - jax.nn.one_hot(targets, probs.shape[-1])) ** 2).sum(-1)

    return mean_metric(score, "sum over classes, range 0 to 2")
