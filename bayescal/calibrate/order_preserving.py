"""Gaps between classes in order of probability, each stretched by a positive factor of its own."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.calibrate.calibrator import Calibrator, Classes, like, pooled_log_probs, require_possible, rows_for_fit
from bayescal.calibrate.network import (
    Network,
    best_temperature,
    learn,
    new_network,
    softplus_inverse,
    surprisals,
    surprisals_for_use,
)
from bayescal.types import Array, Key, Metric, WholeMetric, pytree


@pytree
class OrderPreserving(Calibrator):
    """z'_(1) - z'_(k) = sum_{l < k} m_l (z_(l) - z_(l+1)), m = softplus(network) > 0: `calibrator(pred) -> pred`.

    z_(1) >= z_(2) >= ... are the row's log-probabilities; classes after the last m share it. One member; the order of
    classes is kept to the bit, though rounding may make two equal.

    Args:
        network: from surprisals of the most probable classes to the inverse softplus of m.
        loss: mean nll of the rows of the fit, nats, or the metric optimised, where the descent ended.
        gradient: largest absolute derivative there, penalty included.
        top_k: how many of the most probable classes the network sees.
    """

    accuracy_preserving = True

    network: Network
    loss: Float[Array, ""]
    gradient: Float[Array, ""]
    top_k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Classes):
        """The pool, then its gaps stretched.

        Raises:
            ValueError: for fewer classes than the fit had gaps, or another number where the network saw that many.
        """
        log_probs = pooled_log_probs(pred)
        gaps = self.network.biases[-1].shape[0]
        if log_probs.shape[-1] <= gaps:
            raise ValueError(
                f"`pred` must have more than {gaps} classes, got {log_probs.shape[-1]}. Pass predictions over the classes "
                "of the fit."
            )
        inputs = surprisals_for_use(log_probs, self.network, self.top_k)
        return like(pred, _stretched((self.network, ()), log_probs, inputs))


def fit_order_preserving(
    key: Key,
    pred: Classes,
    targets,
    *,
    hidden: tuple[int, ...] = (5, 5),
    top_k: int = 10,
    objective: Metric | WholeMetric | None = None,
    penalty: float = 1e-4,
    steps: int = 500,
    weights=None,
) -> OrderPreserving:
    """Positive factors of the gaps between sorted log-probabilities, by a network: intra-order-preserving map.

    It starts as plain temperature scaling (all factors 1 / T) and ends no worse on its rows. More free than one
    increasing function per row: each gap has its factor.

    Args:
        key: of the network's first weights.
        pred: predictive over classes of the validation rows.
        targets: integer labels (rows,).
        top_k: how many classes the network sees, and gaps have factors of their own (at least one gap has).
        hidden, objective, penalty, steps, weights: as in `fit_parametrised_temperature`.

    Raises:
        ValueError: for settings out of range; where no finite temperature is best; for unusable rows.
    Source: Rahimi et al. 2020 (recalled).
    """
    rows = rows_for_fit(pred, targets, weights)
    require_possible(*rows)
    inputs = surprisals(rows[0], top_k)
    factors = max(1, min(int(top_k), rows[0].shape[1] - 1))
    start = jnp.broadcast_to(softplus_inverse(1 / best_temperature(rows)), (factors,))
    network = new_network(key, inputs, rows[2], hidden, start)
    end = learn(_stretched, (network, ()), rows, inputs, objective=objective, penalty=penalty, steps=steps)
    return OrderPreserving(end.parts[0], end.loss, end.gradient, int(top_k))


def _stretched(parts, log_probs, inputs):
    factors = jax.nn.softplus(parts[0](inputs))
    order = jnp.argsort(-log_probs, axis=-1)
    ordered = jnp.take_along_axis(log_probs, order, axis=-1)
    upper, lower = ordered[..., :-1], ordered[..., 1:]
    gaps = jnp.where(jnp.isneginf(lower), jnp.inf, upper - lower)  # between impossible classes too: not NaN
    factors = jnp.take(factors, jnp.minimum(jnp.arange(gaps.shape[-1]), factors.shape[-1] - 1), axis=-1)
    below = jnp.cumsum(factors * gaps, axis=-1)
    below = jax.lax.cummax(below, axis=below.ndim - 1)  # sums of many terms round apart, and must not swap classes
    stretched = -jnp.concatenate([jnp.zeros_like(below[..., :1]), below], axis=-1)
    return jax.nn.log_softmax(jnp.take_along_axis(stretched, jnp.argsort(order, axis=-1), axis=-1))
