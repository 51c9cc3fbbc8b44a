"""Proximity-informed calibration: confidence mended by how it and the proximity go with being right."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    concrete,
    like,
    pooled_log_probs,
    rows_for_fit,
)
from bayescal.predictive import exact_top, undefined_where
from bayescal.types import Array, pytree

ROWS_AT_ONCE = 256  # whose kernels are held together: the memory is this times the rows of the fit


@pytree
class Proximity(Calibrator):
    """P(right | confidence, proximity) as the top class's probability: `calibrator(pred, features=proximity)`.

    The other classes keep their shares of what is left, equal ones where they had no probability. Where the top class is
    left with less than another, the most probable class changes.

    Args:
        points: confidence and proximity of the rows of the fit.
        right: 1 where the top class was the target, else 0.
        weights: of the rows of the fit; 0 = absent.
        bandwidth: widths of the normal kernels of confidence and proximity, for wrong rows (first) and right ones.
    """

    accuracy_preserving = False
    needs = ("features",)

    points: Float[Array, "bank two"]
    right: Float[Array, "bank"]
    weights: Float[Array, "bank"]
    bandwidth: Float[Array, "two two"]

    def __call__(self, pred: Classes, *, features: Float[Array, "*batch"]) -> Classes:
        """The pool, with each row's confidence as the rows of the fit near it in confidence and proximity were right.

        Args:
            pred: predictive over classes.
            features: proximity of each row, as in the fit.

        Raises:
            ValueError: for proximities of another shape.
        """
        _check_shape(features, pred.batch_shape)
        log_probs = pooled_log_probs(pred)
        return like(pred, _mapped(self, log_probs, jnp.asarray(features, log_probs.dtype)))


def fit_proximity(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    features: Float[Array, "rows"],
    weights: Float[Array, "rows"] | None = None,
) -> Proximity:
    """P(right | c, d) = f_1 / (f_1 + f_0), f_1 and f_0 the kernel densities of (c, d) over right and wrong rows, unnormalised.

    c is the confidence and d the proximity, such as `jnp.exp(-neighbours(features))` with `bc.scores.fit_neighbours`: nets
    are over-confident where training rows are sparse more than a map of the confidence can tell. Widths are the normal
    reference rule's, 1.06 * standard deviation * n^(-1/6), for right and wrong rows apart. The time of a row grows with
    the rows of the fit, which are kept.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        features: proximity, finite; higher = nearer to the training data, though only its values' nearness counts.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows or proximities, and where confidences or proximities of right rows, or of wrong
            ones, are all the same or absent.
    Source: Xiong et al. 2023 (density-ratio calibration; recalled).
    """
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    _check_shape(features, pred.batch_shape)
    fitted = _fit(log_probs, targets, weights, jnp.asarray(features, jnp.float32))
    if concrete(fitted):
        if not np.isfinite(np.asarray(fitted.points)).all():
            raise ValueError("`features` must be finite, got NaN or infinite ones. Leave out rows without a proximity.")
        if not (np.asarray(fitted.bandwidth) > 0).all():
            raise ValueError(
                "`pred` must have right rows and wrong ones of several confidences and proximities, got standard deviations / "
                f"width {np.asarray(fitted.bandwidth).tolist()} (wrong, right). Use more calibration rows."
            )
    return fitted


def _check_shape(features, shape) -> None:
    if jnp.shape(features) != shape:
        raise ValueError(
            f"`features` must be one proximity per row, of shape {shape}, got {jnp.shape(features)}. Several layers need one "
            "number each, such as their mean."
        )


def _confidence(log_probs):
    return jnp.exp(log_probs.max(-1))


@jax.jit
def _fit(log_probs, targets, weights, proximity):
    points = jnp.stack([_confidence(log_probs), jnp.where(weights > 0, proximity, 0)], -1)
    right = (log_probs.argmax(-1) == targets).astype(points.dtype)

    def widths(mass):
        total = mass.sum()
        mean = lambda values: jnp.matmul(mass, values, precision="highest") / total
        apart = points - points[mass.argmax()]  # exactly 0 where all are the same
        return 1.06 * jnp.sqrt(mean((apart - mean(apart)) ** 2)) * total ** (-1 / 6)

    return Proximity(points, right, weights, jnp.stack([widths(weights * (1 - right)), widths(weights * right)]))


@jax.jit
def _mapped(fitted, log_probs, proximity):
    points = jnp.stack([_confidence(log_probs), proximity], -1).reshape(-1, 2)
    log_odds = _log_odds(fitted, points).reshape(*proximity.shape, 1)
    top = jax.nn.one_hot(log_probs.argmax(-1), log_probs.shape[-1], dtype=bool)
    _, rest = exact_top(log_probs)
    left = jnp.where(top, rest, 0).sum(-1, keepdims=True)
    nothing = left == -jnp.inf  # a certain row: no shares are known, and all are the same
    shares = jnp.where(nothing, -jnp.log(log_probs.shape[-1] - 1.0), log_probs - jnp.where(nothing, 0, left))
    mapped = jnp.where(top, jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds) + shares)
    return undefined_where(jnp.isnan(log_probs).any(-1, keepdims=True), mapped)


def _log_odds(fitted, points):
    """log(f_1 / f_0) of each point (rows, 2): sums of logarithms, so that far from all rows it is the nearest that count."""

    def log_density(point, mass, width):
        kernels = -(((fitted.points - point) / width) ** 2).sum(-1) / 2
        return jax.nn.logsumexp(kernels, b=mass) - jnp.log(width).sum()

    def one(point):
        wrong = log_density(point, fitted.weights * (1 - fitted.right), fitted.bandwidth[0])
        return log_density(point, fitted.weights * fitted.right, fitted.bandwidth[1]) - wrong

    return jax.lax.map(one, points, batch_size=ROWS_AT_ONCE)
