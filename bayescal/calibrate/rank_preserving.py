"""One increasing function of each row's own for all its classes: ranks stay, confidence moves."""

import dataclasses
from numbers import Integral

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.calibrate.calibrator import Calibrator, Classes, like, pooled_log_probs, require_possible, rows_for_fit
from bayescal.calibrate.network import (
    Network,
    best_temperature,
    features_for_fit,
    features_for_use,
    learn,
    new_network,
    softplus_inverse,
    surprisals,
    surprisals_for_use,
)
from bayescal.types import Array, Key, Metric, WholeMetric, pytree


@pytree
class RankPreserving(Calibrator):
    """z'_k = z_k / T0 + sum_j a_j asinh((z_k - b_j(x)) / T_j(x)), z = log p - max log p: `calibrator(pred) -> pred`.

    Increasing in z, since a_j, T0 and T_j are positive; one member. Ranks are kept up to rounding.

    Args:
        network: from x to b_1, ..., b_H and the inverse softplus of T_1, ..., T_H.
        temperature: T0 through the inverse of softplus: the slope far from all b_j.
        amplitudes: a_1, ..., a_H likewise.
        loss: mean nll of the rows of the fit, nats, or the metric optimised, where the descent ended.
        gradient: largest absolute derivative there, penalty included.
        top_k: x is this many of the most probable classes; None = x is the features.
    """

    accuracy_preserving = True

    network: Network
    temperature: Float[Array, ""]
    amplitudes: Float[Array, "terms"]
    loss: Float[Array, ""]
    gradient: Float[Array, ""]
    top_k: int | None = dataclasses.field(metadata={"static": True})

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Features, where the fit had some."""
        return ("features",) if self.top_k is None else ()

    def __call__(self, pred: Classes, *, features: Float[Array, "*batch features"] | None = None):
        """The pool, then each row's function.

        Args:
            pred: predictive over classes.
            features: of each row, where the fit had some; else None.

        Raises:
            ValueError: for features of another shape, missing ones, or ones that the fit did not have; for another number of
                classes than in the fit, where the network saw that many.
        """
        log_probs = pooled_log_probs(pred)
        if (features is None) == (self.top_k is None):
            expected, got = ("the features that the fit had", "none") if features is None else ("None", "some")
            raise ValueError(f"`features` must be {expected}, got {got}. Use them in the fit and after, or in neither.")
        if self.top_k is not None:
            inputs = surprisals_for_use(log_probs, self.network, self.top_k)
        else:
            inputs = features_for_use(features, pred, self.network.centre.shape[0])
        return like(pred, _ranked((self.network, (self.temperature, self.amplitudes)), log_probs, inputs))


def fit_rank_preserving(
    key: Key,
    pred: Classes,
    targets,
    *,
    features: Float[Array, "rows features"] | None = None,
    num_terms: int = 4,
    hidden: tuple[int, ...] = (5, 5),
    top_k: int = 10,
    objective: Metric | WholeMetric | None = None,
    penalty: float = 1e-4,
    steps: int = 500,
    weights=None,
) -> RankPreserving:
    """Sum of increasing functions whose place and width a network gives for each row: neural rank-preserving transform.

    It starts close to plain temperature scaling, with amplitudes of 0.01. Functions that saturate, such as tanh alone,
    would make classes equal in float32; asinh grows for ever, and z / T0 keeps the slope positive. `top_k=0` without
    features is one function for all rows, as in the diagonal family of Rahimi et al. (there of logits).

    Args:
        key: of the network's first weights.
        pred: predictive over classes of the validation rows.
        targets: integer labels (rows,).
        features: x, finite; None = x is the row's own sorted probabilities.
        num_terms: functions in the sum, at least 1.
        hidden, top_k, objective, penalty, steps, weights: as in `fit_parametrised_temperature`.

    Raises:
        ValueError: for settings out of range; where no finite temperature is best; for unusable rows or features.
    Source: Bai et al., Improved Uncertainty Post-Calibration via Rank Preserving Transforms (recalled).
    """
    if not isinstance(num_terms, Integral) or num_terms < 1:
        raise ValueError(f"`num_terms` must be a whole number of at least 1, got {num_terms!r}. 4 is usual.")
    rows = rows_for_fit(pred, targets, weights)
    require_possible(*rows)
    inputs = surprisals(rows[0], top_k) if features is None else features_for_fit(features, rows[2])
    places = -jnp.linspace(0.0, 8.0, int(num_terms))  # nats below the most probable class: where probabilities live
    start = jnp.concatenate([places, softplus_inverse(jnp.full(num_terms, 2.0))])
    network = new_network(key, inputs, rows[2], hidden, start)
    others = (softplus_inverse(best_temperature(rows)), softplus_inverse(jnp.full(num_terms, 0.01)))
    end = learn(_ranked, (network, others), rows, inputs, objective=objective, penalty=penalty, steps=steps)
    network, (temperature, amplitudes) = end.parts
    seen = int(top_k) if features is None else None
    return RankPreserving(network, temperature, amplitudes, end.loss, end.gradient, seen)


def _ranked(parts, log_probs, inputs):
    network, (temperature, amplitudes) = parts
    places, widths = jnp.split(network(inputs)[..., None, :], 2, axis=-1)
    gaps = (log_probs - log_probs.max(-1, keepdims=True))[..., None]
    terms = jax.nn.softplus(amplitudes) * jnp.arcsinh((gaps - places) / jax.nn.softplus(widths))
    return jax.nn.log_softmax(gaps[..., 0] / jax.nn.softplus(temperature) + terms.sum(-1))
