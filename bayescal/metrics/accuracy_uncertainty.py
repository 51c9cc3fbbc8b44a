"""Accuracy versus uncertainty: predictions should be certain where right and uncertain where wrong."""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.binning import namespace
from bayescal.metrics.events import class_probs
from bayescal.metrics.likelihood import check_rows
from bayescal.predictive import Bernoulli, Categorical, Probabilities
from bayescal.types import Array, Metric


class Cells(NamedTuple):
    """Weight of the rows in each cell, scalars; merging is addition."""

    accurate_certain: Float[Array, ""]
    accurate_uncertain: Float[Array, ""]
    inaccurate_certain: Float[Array, ""]
    inaccurate_uncertain: Float[Array, ""]


def predictive_entropy(pred: Categorical | Bernoulli | Probabilities) -> Float[jax.Array, "*batch"]:
    """Entropy of the pool, nats; higher = less sure."""
    return pred.entropy()


@cache
def accuracy_versus_uncertainty(
    *, threshold: float, uncertainty: Callable[..., jax.Array] = predictive_entropy
) -> Metric:
    """Accuracy versus uncertainty (AvU): (n_AC + n_IU) / n, the rows that are right and certain, or wrong and uncertain.

    In [0, 1]; higher is better. A row is certain where its uncertainty is at most the threshold. Interval: normal, by
    the rows' influence.

    Args:
        threshold: in the unit of the uncertainty. The authors' code takes the mean of the mean uncertainties of right and
            of wrong predictions, on data other than those evaluated.
        uncertainty: `pred -> (batch,)`, higher = less sure.

    Raises:
        ValueError: for a threshold that is not finite.
    Source: Krishnan and Tickoo 2020, equation 1; the closed side as in its code.
    """
    _check_threshold(threshold)

    def measure(pred, targets, weights) -> Cells:
        uncertain = (uncertainty(pred) > threshold).astype(jnp.float32)
        return _cells(pred, targets, weights, 1 - uncertain, uncertain)

    def compute(sums: Cells):
        xp, (agree, differ) = namespace(sums.accurate_certain), _agreement(sums)
        total = agree + differ
        return xp.where(total > 0, agree / xp.where(total > 0, total, 1), xp.nan)

    return Metric(measure, compute, None, _words(threshold, uncertainty), "higher")


@cache
def accuracy_versus_uncertainty_loss(
    *, threshold: float, uncertainty: Callable[..., jax.Array] = predictive_entropy
) -> Metric:
    """AvUC loss: log(1 + (n_AU + n_IC) / (n_AC + n_IU)), rows counted by confidence c and t = tanh(uncertainty).

    A right row counts c (1 - t) if certain and c t if not, a wrong one (1 - c)(1 - t) and (1 - c) t. In [0, infinity];
    lower is better; infinite where no right row is certain and no wrong one uncertain, since nothing is added to the
    denominator, and NaN where no row counts at all. Interval: normal, by the rows' influence.

    Args:
        threshold, uncertainty: as in `accuracy_versus_uncertainty`; the uncertainty non-negative.

    Raises:
        ValueError: for a threshold that is not finite.
    Source: Krishnan and Tickoo 2020, equation 3.
    """
    _check_threshold(threshold)

    def measure(pred, targets, weights) -> Cells:
        amount = uncertainty(pred)
        confidence, label = pred.top_label()
        size, t = jnp.where(label == targets, confidence, 1 - confidence), jnp.tanh(amount)
        uncertain = amount > threshold
        certain_size, uncertain_size = jnp.where(uncertain, 0, size * (1 - t)), jnp.where(uncertain, size * t, 0)
        return _cells(pred, targets, weights, certain_size, uncertain_size)

    return Metric(measure, _loss, None, f"log loss form; {_words(threshold, uncertainty)}")


@cache
def soft_accuracy_versus_uncertainty_loss(*, threshold: float = 0.5, temperature: float = 0.01) -> Metric:
    """Soft AvUC loss: log(1 + (n_AU + n_IC) / (n_AC + n_IU)), rows divided by q = sigmoid(logit shift / temperature).

    With H the predictive entropy in nats and e = H / log(classes), q = sigmoid((logit e - logit threshold) /
    temperature) is how uncertain a row is; it counts q tanh H as uncertain and (1 - q)(1 - tanh H) as certain.
    In [0, infinity]; lower is better. Interval: normal, by the rows' influence.

    Args:
        threshold: of e, where q is 1/2, in (0, 1).
        temperature: how softly rows are divided; 0.01 is nearly a hard threshold.

    Raises:
        ValueError: for a threshold outside (0, 1), a temperature that is not positive.
    Source: Karandikar et al. 2021, equation 15.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must lie in (0, 1), got {threshold!r}. It is a share of log(classes): say 0.5.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}. The usual choice is 0.01.")
    shift = math.log(threshold) - math.log1p(-threshold)

    def measure(pred, targets, weights) -> Cells:
        entropy = pred.entropy()
        share = jnp.clip(entropy / math.log(class_probs(pred).shape[-1]), 0, 1)  # rounding goes above 1
        q = jax.nn.sigmoid((jnp.log(share) - jnp.log1p(-share) - shift) / temperature)
        t = jnp.tanh(entropy)
        return _cells(pred, targets, weights, (1 - q) * (1 - t), q * t)

    words = f"entropy as a share of log(classes), soft threshold {threshold:g}, temperature {temperature:g}"
    return Metric(measure, _loss, None, f"log loss form; {words}")


def _cells(pred, targets, weights, certain, uncertain) -> Cells:
    check_rows(weights.shape[0])
    right = pred.top_label()[1] == targets
    parts = [
        jnp.where((weights == 0) | ~rows, 0, weights * x) for rows in (right, ~right) for x in (certain, uncertain)
    ]
    return Cells(*(x.sum() for x in parts))


def _agreement(sums: Cells):
    return (
        sums.accurate_certain + sums.inaccurate_uncertain,
        sums.accurate_uncertain + sums.inaccurate_certain,
    )


def _loss(sums: Cells):
    xp, (agree, differ) = namespace(sums.accurate_certain), _agreement(sums)
    ratio = xp.where(agree > 0, differ / xp.where(agree > 0, agree, 1), xp.where(differ > 0, xp.inf, xp.nan))
    return xp.log1p(ratio)


def _words(threshold: float, uncertainty: Callable) -> str:
    name = getattr(uncertainty, "__name__", repr(uncertainty)).replace("_", " ")
    return f"top label; certain where {name} <= {threshold:g}"


def _check_threshold(threshold: float) -> None:
    if not math.isfinite(threshold):
        raise ValueError(
            f"`threshold` must be a finite number, got {threshold!r}. For entropy take nats in [0, log(classes)]."
        )
