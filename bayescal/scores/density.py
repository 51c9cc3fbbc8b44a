"""Log-density of features under one normal distribution per class, and the ratio of two densities."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.scores.covariance import scatter, whitening
from bayescal.scores.features import (
    as_rows,
    blocks,
    class_means,
    class_rows,
    defined,
    from_centre,
    halves,
    training_rows,
)
from bayescal.scores.heads import as_pytree
from bayescal.types import Array, pytree

STEEPEST = 0.99  # of the squared distance from a class, what the background may take away


@pytree
class GaussianDensity:
    """Minus the log-density of a mixture of normals, one per class: `fitted(features) -> (rows,)`.

    Args:
        centres: class means, in two parts that add up to them.
        maps: of each class, to the space in which it has unit covariance.
        log_scales: log of each class's share of the rows, times its density at its mean.
        ridges: what was added to every variance of each class.
    """

    centres: Float[Array, "classes 2 features"]
    maps: Float[Array, "classes features features"]
    log_scales: Float[Array, "classes"]
    ridges: Float[Array, "classes"]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Nats, of any sign; higher = more unlike the training data. NaN for rows that are not finite."""
        return _minus_log_density(self, as_rows(features, self.maps.shape[1]))


@pytree
class DensityRatio:
    """One score less a share of another, both minus log-densities: `ratio(features) -> (rows,)`.

    Args:
        numerator: of the training rows.
        background: of wider ones.
        weight: share of the background that is taken away.
    """

    numerator: Callable
    background: Callable
    weight: Float[Array, ""]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Nats, of any sign; higher = more unlike the training data.

        NaN for rows that are not finite, where one of the two is NaN, and where the background is infinite: both are.
        """
        return _ratio(self, as_rows(features))


def fit_gaussian_density(
    features: Float[Array, "rows features"],
    labels: Int[Array, "rows"],
    *,
    num_classes: int | None = None,
    ridge: float = 0.0,
) -> GaussianDensity:
    """-log sum_k pi_k N(f; mu_k, S_k), each class with its own mean, covariance (over its rows - 1) and share pi_k.

    Nats, of any sign: densities have the unit of the features, and so only differences count. Higher = more unlike the
    training data. Fitted in float64 on the host, a few rows at a time; scored in float32 from differences to each class's
    mean, squared distances to 1 in 1000 or better: features that are too nearly collinear for that are refused. Labels that
    are all 0 give one normal distribution for all rows. A class with no more rows than features needs a ridge. DDU's code
    tries jitters from 0 and 1e-308 upwards and keeps the first that a Cholesky decomposition survives, so that the least
    variances are rounding; here the ridge is stated, and recorded in the result.

    Args:
        features: penultimate activations of the training rows.
        labels: their classes.
        num_classes: None = largest label + 1.
        ridge: added to every variance of a class, in mean variances of that class. 1e-6 for dead units.

    Raises:
        ValueError: for directions without spread within a class (class and number are named), classes of fewer than two
            rows, features that are not finite, other shapes.
    Source: Mukhoti et al. 2023 (DDU); the jitter in its code, github.com/omegafragger/DDU, was looked at.
    """
    rows = training_rows(features)
    labels, counts = class_rows(rows, labels, num_classes)
    means = class_means(rows, labels, counts)
    maps, log_dets, ridges = [], [], []
    for k, count in enumerate(counts):
        own = np.flatnonzero(labels == k)
        total, largest = scatter((block, means[k]) for _, block in blocks(rows, own))
        white = whitening(total, largest, normaliser=float(count - 1), ridge=ridge, of=f"within class {k}")
        maps.append(white.map.astype(np.float32))
        log_dets.append(white.log_det)
        ridges.append(white.added)
    log_scales = np.log(counts / len(rows)) - 0.5 * (rows.shape[1] * math.log(2 * math.pi) + np.array(log_dets))
    return GaussianDensity(halves(means), *(jnp.asarray(x, jnp.float32) for x in (np.stack(maps), log_scales, ridges)))


def density_ratio(
    numerator: Callable[[Array], jax.Array], background: Callable[[Array], jax.Array], *, weight: float = 1.0
) -> DensityRatio:
    """-log p(f) + weight * log p_0(f), from two scores that are minus log-densities of the same features.

    Nats, of any sign; higher = more unlike the training data. What makes a row improbable under both cancels. Where a class
    is wider than the background the ratio falls without end far out, and takes what is unlike both for familiar: between two
    results of `fit_gaussian_density` this is looked for in every direction, and refused. So are most backgrounds fitted on
    the training rows themselves, as one class, unless the weight is small; a third of the smallest class's share of the rows
    is small enough. With one covariance for all classes such a ratio needs no weight: `fit_relative_mahalanobis`, which is
    twice that, to the nearest class alone. Of other functions nothing is known, and nothing is checked.

    Args:
        numerator: fitted on the training rows, such as `fit_gaussian_density(features, labels)`.
        background: fitted on a wider set, such as `fit_gaussian_density(others, np.zeros(len(others), int))`.
        weight: share of the background that is taken away. Of one normal distribution it is, but for a constant, the ratio
            to one with a covariance 1 / weight times as large.

    Raises:
        TypeError: for a part that is no function.
        ValueError: for a weight that is not positive or infinite, and one for which the ratio has no lowest point near a
            class: within the mean squared distance of its rows from their mean, which is the number of features. The largest
            weight that has is named.
    Source: Ren et al. 2019 (likelihood ratios; recalled), here of densities of features; the condition is ours.
    """
    instead = "Pass a fitted density, such as `fit_gaussian_density(features, labels)`"
    of, over = as_pytree(numerator, "numerator", instead), as_pytree(background, "background", instead)
    if not 0 < weight < math.inf:
        raise ValueError(
            f"`weight` must be positive and finite, got {weight!r}. 1 is the ratio; for the density alone use `numerator`."
        )
    if isinstance(numerator, GaussianDensity) and isinstance(background, GaussianDensity):
        if numerator.maps.shape[1] != background.maps.shape[1]:
            raise ValueError(
                f"`background` must be of as many features as `numerator`, {numerator.maps.shape[1]}, got "
                f"{background.maps.shape[1]}. Fit both on the same layer."
            )
        allowed = _allowed_weights(numerator, background)
        k = int(allowed.argmin())
        if weight > allowed[k]:
            raise ValueError(
                f"`weight` must be at most {0.995 * allowed[k]:.3g} for this background, got {weight:g}: class {k} of "
                "`numerator` is so wide in one direction that rows far out would be the most familiar. Pass that weight, a "
                "`background` fitted on a wider set, or use `fit_relative_mahalanobis`."
            )
    return DensityRatio(of, over, jnp.float32(weight))


def _allowed_weights(numerator, background):
    """(classes,), the largest weight for which each class of the numerator has the ratio's lowest point near its mean."""
    (means, maps), (centres, others) = (
        (np.asarray(fit.centres, np.float64).sum(1), np.asarray(fit.maps, np.float64))
        for fit in (numerator, background)
    )
    return np.array(
        [
            max(_allowed_weight(map, other, mean - centre) for other, centre in zip(others, centres, strict=True))
            for map, mean in zip(maps, means, strict=True)
        ]
    )


def _allowed_weight(map, other, apart):
    """Largest w for which |g|^2 - w |g map^-1 other + apart other|^2 has its lowest point within |g|^2 <= features.

    In the eigenvectors of T T^T, T = map^-1 other, of values t, that point is w (T other^T apart) / (1 - w t), the farther
    out the larger w.
    """
    turned = np.linalg.solve(map, other)
    values, vectors = np.linalg.eigh(turned @ turned.T)
    offsets = turned @ (apart @ other) @ vectors
    low, high = 0.0, STEEPEST / values[-1]  # rounding of both parts, far out, is well below what is left
    for _ in range(50):
        middle = (low + high) / 2
        near = np.square(middle * offsets / (1 - middle * values)).sum() <= len(values)
        low, high = (middle, high) if near else (low, middle)
    return low


@jax.jit
def _minus_log_density(fitted, features):
    def of_class(parts):
        centre, map, log_scale = parts
        own = jnp.matmul(from_centre(features, centre), map, precision="highest")
        return log_scale - 0.5 * jnp.square(own).sum(-1)

    each = jax.lax.map(of_class, (fitted.centres, fitted.maps, fitted.log_scales))
    return defined(features, -jax.nn.logsumexp(each, axis=0))


@jax.jit
def _ratio(fitted, features):
    return defined(features, fitted.numerator(features) - fitted.weight * fitted.background(features))
