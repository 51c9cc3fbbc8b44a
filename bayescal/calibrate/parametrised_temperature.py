"""A temperature of each row's own: from its sorted probabilities, or from features."""

import dataclasses

import jax
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
class ParametrisedTemperature(Calibrator):
    """softmax(log p / T), T = softplus(network(sorted p)): `scaler(pred) -> pred`, one member.

    Args:
        network: from surprisals of the most probable classes to one number.
        loss: mean nll of the rows of the fit, nats, or the metric optimised, where the descent ended.
        gradient: largest absolute derivative there, penalty included; it tells how far from flat the descent stopped.
        top_k: how many of the most probable classes the network sees.
    """

    accuracy_preserving = True

    network: Network
    loss: Float[Array, ""]
    gradient: Float[Array, ""]
    top_k: int = dataclasses.field(metadata={"static": True})

    def temperature(self, pred: Classes) -> Float[jax.Array, "*batch"]:
        """Of each row; above 1 = less confident than before."""
        inputs = surprisals_for_use(pooled_log_probs(pred), self.network, self.top_k)
        return jax.nn.softplus(self.network(inputs))[..., 0]

    def __call__(self, pred: Classes):
        """The pool, then each row's temperature; the order of its classes does not change.

        Raises:
            ValueError: for another number of classes than in the fit, where the network saw that many.
        """
        log_probs = pooled_log_probs(pred)
        inputs = surprisals_for_use(log_probs, self.network, self.top_k)
        return like(pred, _tempered((self.network, ()), log_probs, inputs))


@pytree
class AdaptiveTemperature(Calibrator):
    """softmax(log p / T), T = softplus(network(features)): `scaler(pred, features=features) -> pred`, one member.

    Args:
        network: from features to one number.
        loss, gradient: as in `ParametrisedTemperature`.
    """

    accuracy_preserving = True
    needs = ("features",)

    network: Network
    loss: Float[Array, ""]
    gradient: Float[Array, ""]

    def temperature(self, features: Float[Array, "*batch features"]) -> Float[jax.Array, "*batch"]:
        """Of each row; above 1 = less confident than before."""
        return jax.nn.softplus(self.network(features))[..., 0]

    def __call__(self, pred: Classes, *, features: Float[Array, "*batch features"]):
        """The pool, then each row's temperature; the order of its classes does not change.

        Raises:
            ValueError: for features of another shape.
        """
        log_probs = pooled_log_probs(pred)
        inputs = features_for_use(features, pred, self.network.centre.shape[0])
        return like(pred, _tempered((self.network, ()), log_probs, inputs))


def fit_parametrised_temperature(
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
) -> ParametrisedTemperature:
    """T(p) = softplus(network of the sorted probabilities), learnt on the rows: parametrised temperature scaling.

    It starts as plain temperature scaling (of the nll) and ends no worse on its rows. The network sees 1 - 1 / (1 - log p),
    which is bounded, of the `top_k` most probable classes; the authors' sees logits clipped at 100. `top_k=0` is plain
    temperature scaling. Not convex: another key is another map.

    Args:
        key: of the network's first weights.
        pred: predictive over classes of the validation rows.
        targets: integer labels (rows,).
        hidden: widths of the tanh layers.
        top_k: at most this many classes are looked at.
        objective: differentiable metric to optimise in its own direction, such as `bc.brier()` (the authors'); None = nll.
        penalty: times the sum of squared weights, added to the mean loss.
        steps: of Adam, each over all rows. There is no test of convergence: see `gradient`.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: for settings out of range; where no finite temperature is best; for unusable rows.
    Source: Tomani et al. 2022 (recalled).
    """
    rows = rows_for_fit(pred, targets, weights)
    require_possible(*rows)
    end = _fit_temperatures(key, rows, surprisals(rows[0], top_k), hidden, objective, penalty, steps)
    return ParametrisedTemperature(end.parts[0], end.loss, end.gradient, int(top_k))


def fit_adaptive_temperature(
    key: Key,
    pred: Classes,
    targets,
    *,
    features: Float[Array, "rows features"],
    hidden: tuple[int, ...] = (5, 5),
    objective: Metric | WholeMetric | None = None,
    penalty: float = 1e-4,
    steps: int = 500,
    weights=None,
) -> AdaptiveTemperature:
    """T(x) = softplus(network of features), learnt on the rows: temperature by what is known of the input.

    Features may be a network's, a group's indicator, or an out-of-distribution score; they are standardised on the rows.
    It starts as plain temperature scaling and ends no worse on its rows. Joy et al. put a variational autoencoder between
    features and temperature; here is none.

    Args:
        key, pred, targets, hidden, objective, penalty, steps, weights: as in `fit_parametrised_temperature`.
        features: finite, of each row.

    Raises:
        ValueError: for settings out of range; where no finite temperature is best; for unusable rows or features.
    Source: Joy et al. 2023 (recalled), without its autoencoder.
    """
    rows = rows_for_fit(pred, targets, weights)
    require_possible(*rows)
    end = _fit_temperatures(key, rows, features_for_fit(features, rows[2]), hidden, objective, penalty, steps)
    return AdaptiveTemperature(end.parts[0], end.loss, end.gradient)


def _fit_temperatures(key, rows, inputs, hidden, objective, penalty, steps):
    start = softplus_inverse(best_temperature(rows))[None]
    network = new_network(key, inputs, rows[2], hidden, start)
    return learn(_tempered, (network, ()), rows, inputs, objective=objective, penalty=penalty, steps=steps)


def _tempered(parts, log_probs, inputs):
    return jax.nn.log_softmax(log_probs / jax.nn.softplus(parts[0](inputs)))
