"""Calibration for rows that are distributed otherwise than the labelled ones: weights, and confidences to match."""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    check_classes,
    concrete,
    like,
    pooled_log_probs,
    rows_for_fit,
)
from bayescal.calibrate.newton import minimise
from bayescal.calibrate.temperature import fit_temperature
from bayescal.predictive import Bernoulli, Categorical, undefined_where
from bayescal.types import Array, pytree

EDGE = 27.0  # log temperatures are looked for within this of 0


class DensityRatioWeights(NamedTuple):
    """Weights of labelled source rows that make them stand for the target's.

    weights: p_target(x) / p_source(x) of each query row, as estimated; their mean is near 1 for source rows.
    effective_size: (sum w)^2 / sum w^2: of how many equal rows the estimate has the variance; small = hardly any overlap.
    gradient: largest absolute derivative of the classifier's objective where the fit ended, nats; 0 = converged.
    """

    weights: Float[Array, "query"]
    effective_size: Float[Array, ""]
    gradient: Float[Array, ""]


def density_ratio_weights(
    source_features: Float[Array, "source features"],
    target_features: Float[Array, "target features"],
    query: Float[Array, "query features"],
    *,
    penalty: float = 1e-3,
    clip: float | None = None,
) -> DensityRatioWeights:
    """w(x) = P(target | x) / P(source | x) of a logistic regression in which both domains weigh the same.

    Needs unlabelled target rows, and features of both domains. For rows whose label given x is as it was (covariate shift):
    `fit_temperature(pred, targets, weights=ratio.weights)` is then importance-weighted calibration (CPCS, whose authors weigh
    the Brier score). Exact where the log-ratio is linear in the features: normals of one covariance. Features are
    standardised over both domains together.

    Args:
        source_features: rows of the source; best others than the query, such as the training rows.
        target_features: unlabelled rows of the target.
        query: rows to weigh: those that calibrate.
        penalty: of half the sum of squared coefficients, beside the mean nll; 0 = none. It pulls weights towards 1.
        clip: largest weight, less variance for some bias; None = none is clipped.

    Raises:
        ValueError: for features that are not finite or of other shapes, a negative penalty, a clip that is not positive,
            domains that are separable with no penalty, query rows so far out that no clip makes their weights finite.
    Source: Bickel, Brueckner and Scheffer 2007; Park et al. 2020 (CPCS) (recalled); thuml/TransCal's `get_weight` and `CPCS`
        were looked at: there the smaller domain is resampled to the size of the larger.
    """
    parts = {"source_features": source_features, "target_features": target_features, "query": query}
    for name, part in parts.items():
        shape = jnp.shape(part)
        if len(shape) != 2 or not shape[0] or shape[1] != jnp.shape(query)[-1]:
            raise ValueError(
                f"`{name}` must have shape (rows, features), at least one row, and the features of the others, got {shape}. "
                "Take all from the same layer."
            )
        if concrete(part) and not np.isfinite(np.asarray(part)).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity. Drop or repair those rows.")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"`penalty` must be finite and not negative, got {penalty!r}. 1e-3 is the default.")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(
            f"`clip` must be a positive number or None, got {clip!r}. It is the largest weight, such as 10."
        )
    log_ratio, gradient = _log_ratio(*(jnp.asarray(x, jnp.float32) for x in parts.values()), float(penalty))
    if concrete(gradient) and not gradient < 1e-4:
        raise ValueError(
            f"`penalty` must be positive for domains that a plane separates, got {penalty!r} and a derivative of "
            f"{float(gradient):.3g} nats where the fit ended. There is no overlap to weigh by; 1e-3 gives finite weights."
        )
    weights = jnp.exp(log_ratio)
    weights = weights if clip is None else jnp.minimum(weights, clip)
    if concrete(weights) and not jnp.isfinite(weights).all():
        raise ValueError(
            f"`query` must have finite weights, got a log-ratio of up to {float(log_ratio.max()):.3g}: rows far outside both "
            "domains. Leave them out, or pass `clip`."
        )
    return DensityRatioWeights(weights, effective_size(weights), gradient)


def effective_size(weights: Float[Array, "rows"]) -> Float[jax.Array, ""]:
    """(sum w)^2 / sum w^2: rows of equal weight with as much information, from 1 to the number of rows."""
    scaled = jnp.asarray(weights) / jnp.max(jnp.asarray(weights))  # squares of large weights leave float32
    return scaled.sum() ** 2 / (scaled**2).sum()


@pytree
class ConfidenceMatching(Calibrator):
    """Temperature at which the pool's mean confidence is a given accuracy: softmax(log p / T).

    Args:
        temperature: above 1 = less confident than before.
        accuracy: that was matched, estimated or given.
        gap: mean confidence - accuracy on the rows of the fit where the search ended; 0 = matched.
    """

    accuracy_preserving: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("unlabelled",)

    temperature: Float[Array, ""]
    accuracy: Float[Array, ""]
    gap: Float[Array, ""]

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool, then the temperature.

        Raises:
            TypeError: for a predictive that is not over classes.
        """
        return like(pred, jax.nn.log_softmax(pooled_log_probs(pred) / self.temperature))


def fit_confidence_matching(
    pred: Classes, *, accuracy: float | Float[Array, ""], weights: Float[Array, "rows"] | None = None
) -> ConfidenceMatching:
    """T with mean max softmax(log p / T) = accuracy, over unlabelled rows.

    Needs unlabelled rows of the target, and an estimate of the accuracy on them. There is one such T for every accuracy
    between 1 / classes and 1, since the mean falls as T rises. It makes the confidence right on average, and only so.

    Args:
        pred: predictive of the unlabelled target rows.
        accuracy: in (1 / classes, 1), of the top class on those rows.
        weights: weight of each row; None = ones.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for an accuracy that no temperature gives, unusable predictions or weights.
    """
    check_classes(pred)
    log_probs, _, weights = rows_for_fit(pred, np.zeros(pred.batch_shape, np.int32), weights)
    temperature, gap = _match(log_probs, weights, jnp.asarray(accuracy, jnp.float32))
    if concrete(temperature, accuracy) and not (np.isfinite(temperature) and accuracy < 1):
        raise ValueError(
            f"`accuracy` must lie between 1 / classes = {1 / log_probs.shape[-1]:.3g} and what confidence can reach, below 1, "
            f"got {float(accuracy):.4g}. Estimate it on more rows; no temperature brings a network below chance."
        )
    return ConfidenceMatching(temperature, jnp.asarray(accuracy, jnp.float32), gap)


class AccuracyEstimate(NamedTuple):
    """Accuracy on target rows, estimated from weighted source rows.

    accuracy: 1 - risk; it may leave [0, 1] for few rows or heavy weights.
    weighted: 1 - mean of w * error, without the control variates.
    effective_size: of the weights.
    """

    accuracy: Float[Array, ""]
    weighted: Float[Array, ""]
    effective_size: Float[Array, ""]


@jax.jit
def shifted_accuracy(
    correct: Float[Array, "rows"], weights: Float[Array, "rows"], confidence: Float[Array, ""]
) -> AccuracyEstimate:
    """1 - (mean(w e) + eta_1 (mean w - 1) + eta_2 (mean r - confidence)), e = 1 - r: two control variates, one by one.

    eta_1 = -Cov(w e, w) / Var w takes off what is due to weights whose mean is not 1 by chance, and then
    eta_2 = -Cov(w e + eta_1 (w - 1), r) / Var r what is due to the rows' own accuracy being off its expectation. Equal
    weights, or all rows right or all wrong: that term is left out.

    Args:
        correct: 1 where the source row's top class is its label, else 0.
        weights: density ratios of the rows; not normalised: their mean is expected to be 1.
        confidence: mean confidence of a network calibrated on the source: the expectation of `correct`.
    Source: Wang et al. 2020 (TransCal); thuml/TransCal's code was looked at.
    """
    weights, correct = (jnp.asarray(x, jnp.float32) for x in (weights, correct))
    weighted_error = weights * (1 - correct)
    first = _slope(weighted_error, weights)
    controlled = weighted_error + first * (weights - 1)
    second = _slope(controlled, correct)
    risk = controlled.mean() + second * (correct.mean() - confidence)
    return AccuracyEstimate(1 - risk, 1 - weighted_error.mean(), effective_size(weights))


def fit_transcal(
    pred: Classes,
    *,
    source: Classes,
    source_targets: Int[Array, "rows"],
    source_weights: Float[Array, "rows"],
    power: float = 1.0,
) -> ConfidenceMatching:
    """T with mean confidence on target rows = `shifted_accuracy` of the source rows weighted by w^power.

    Needs unlabelled rows of the target, and density ratios of labelled source rows (`density_ratio_weights`). The source is
    first calibrated by its own temperature, so that its confidence stands for its accuracy. The authors find (T, power)
    together by |confidence - accuracy|, T at least 1, which a whole curve of pairs brings to 0; here power is given, 1 =
    unbiased, less = less variance and more of the source's accuracy, and T may be below 1.

    Args:
        pred: predictive of the unlabelled target rows.
        source: predictive of labelled source rows that did not train the network.
        source_targets: integer labels of them (rows,).
        source_weights: p_target / p_source of each, as they are: their mean is expected to be 1; 0 is a value.
        power: of the weights, in [0, 1].

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for a power outside [0, 1]; weights that are unusable; an estimated accuracy that no temperature gives;
            unusable predictions or targets.
    Source: Wang et al. 2020; thuml/TransCal's `TransCal` was looked at.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"`power` must lie in [0, 1], got {power!r}. 1 is the full density ratio, 0 none.")
    rows_for_fit(source, source_targets, source_weights)  # checks; a ratio of 0 is a row like others, not an absent one
    log_probs, source_targets, _ = rows_for_fit(source, source_targets, None)
    source_weights = jnp.asarray(source_weights, jnp.float32)
    calibrated = fit_temperature(source, source_targets)(source)
    confidence = jnp.exp(calibrated.log_probs().max(-1)).mean()
    correct = (log_probs.argmax(-1) == source_targets).astype(jnp.float32)
    return fit_confidence_matching(pred, accuracy=shifted_accuracy(correct, source_weights**power, confidence).accuracy)


def _slope(values, control):
    """-Cov(values, control) / Var(control), 0 where the control does not vary."""
    apart = control - control.mean()
    variance = (apart**2).mean()
    varies = variance > 1e-12
    return -jnp.where(varies, (apart * (values - values.mean())).mean() / jnp.where(varies, variance, 1), 0)


@jax.jit
def _match(log_probs, weights, accuracy):
    shares = weights / weights.sum()
    shifted = log_probs - log_probs.max(-1, keepdims=True)
    shifted = jnp.where(shifted == -jnp.inf, jnp.finfo(shifted.dtype).min / (2 * math.exp(EDGE)), shifted)

    def gap(log_temperature):
        """Mean of 1 / sum_k exp((log p_k - log p_top) / T), less the accuracy: falls in T."""
        scaled = shifted * jnp.exp(-log_temperature)
        return jnp.dot(shares, 1 / jnp.exp(scaled).sum(-1), precision="highest") - accuracy

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_cold = gap(middle) > 0
        return jnp.where(too_cold, middle, low), jnp.where(too_cold, high, middle)

    low, high = jax.lax.fori_loop(0, 42, halve, (jnp.float32(-EDGE), jnp.float32(EDGE)))
    best = (low + high) / 2
    left = gap(best)
    return jnp.where((abs(left) < 1e-4) & (abs(best) < EDGE - 0.5), jnp.exp(best), jnp.nan), left


@jax.jit
def _log_ratio(source, target, query, penalty):
    rows = jnp.concatenate([source, target])
    centre, spread = rows.mean(0), rows.std(0)
    spread = jnp.where(spread > 1e-6 * (abs(centre) + 1e-30), spread, 1)  # a constant feature says nothing
    with_one = lambda x: jnp.concatenate([(x - centre) / spread, jnp.ones((len(x), 1), x.dtype)], -1)
    features = with_one(rows)
    sign = jnp.concatenate([-jnp.ones(len(source)), jnp.ones(len(target))])
    shares = jnp.where(sign < 0, 0.5 / len(source), 0.5 / len(target))
    strength = jnp.full(features.shape[1], penalty).at[-1].set(0)

    def value(theta):
        score = jnp.matmul(features, theta, precision="highest")
        return jnp.dot(shares, jax.nn.softplus(-sign * score)) + 0.5 * (strength * theta**2).sum()

    def derivatives(theta):
        score = jnp.matmul(features, theta, precision="highest")
        lean = -shares * sign * jax.nn.sigmoid(-sign * score)
        curve = shares * jax.nn.sigmoid(score) * jax.nn.sigmoid(-score)
        hessian = jnp.matmul((curve[:, None] * features).T, features, precision="highest")
        return jnp.matmul(lean, features, precision="highest") + strength * theta, hessian + jnp.diag(strength + 1e-9)

    theta, gradient = minimise(value, derivatives, jnp.zeros(features.shape[1]))
    # Towards an optimum at infinity the derivative vanishes too.
    separated = (penalty == 0) & (sign * jnp.matmul(features, theta, precision="highest") > 0).all()
    gradient = jnp.where(separated, jnp.nan, gradient)
    return undefined_where(separated, jnp.matmul(with_one(query), theta, precision="highest")), gradient
