"""Log-density of features under one normal distribution per class, and the ratio of two densities."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.scores.covariance import whitening
from bayescal.scores.features import as_rows, class_rows, defined, from_centre, halves, training_rows
from bayescal.types import Array, pytree


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
    """One score less another, both minus log-densities: `ratio(features) -> (rows,)`."""

    numerator: Callable
    background: Callable

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Nats, of any sign; higher = more unlike the training data. NaN where one of the two is, or both are infinite."""
        return self.numerator(features) - self.background(features)


def fit_gaussian_density(
    features: Float[Array, "rows features"],
    labels: Int[Array, "rows"],
    *,
    num_classes: int | None = None,
    ridge: float = 0.0,
) -> GaussianDensity:
    """-log sum_k pi_k N(f; mu_k, S_k), each class with its own mean, covariance (over its rows - 1) and share pi_k.

    Nats, of any sign: densities have the unit of the features, and so only differences count. Higher = more unlike the
    training data. Fitted in float64 on the host; scored in float32 from differences to each class's mean. Labels that are
    all 0 give one normal distribution for all rows. A class with no more rows than features needs a ridge. DDU's code
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
    centres, whites = [], []
    for k, count in enumerate(counts):
        own = rows[labels == k]
        centres.append(own.mean(0))
        largest = abs(own).max(0)
        whites.append(whitening(own - centres[-1], largest, normaliser=count - 1, ridge=ridge, of=f"within class {k}"))
    log_scales = np.log(counts / len(rows)) - 0.5 * (
        rows.shape[1] * math.log(2 * math.pi) + np.array([w.log_det for w in whites])
    )
    return GaussianDensity(
        halves(np.stack(centres)),
        *(
            jnp.asarray(x, jnp.float32)
            for x in (np.stack([w.map for w in whites]), log_scales, [w.added for w in whites])
        ),
    )


def density_ratio(numerator: Callable[[Array], jax.Array], background: Callable[[Array], jax.Array]) -> DensityRatio:
    """-log p(f) + log p_0(f), from two scores that are minus log-densities of the same features.

    Nats, of any sign; higher = more unlike the training data. What makes a row improbable under both cancels.

    Args:
        numerator: fitted on the training rows, such as `fit_gaussian_density(features, labels)`.
        background: fitted on a wider set, or on the same rows as one class:
            `fit_gaussian_density(features, np.zeros_like(labels))`.
    Source: Ren et al. 2019 (likelihood ratios; recalled), here of densities of features.
    """
    return DensityRatio(numerator, background)


@jax.jit
def _minus_log_density(fitted, features):
    def of_class(parts):
        centre, map, log_scale = parts
        own = jnp.matmul(from_centre(features, centre), map, precision="highest")
        return log_scale - 0.5 * jnp.square(own).sum(-1)

    each = jax.lax.map(of_class, (fitted.centres, fitted.maps, fitted.log_scales))
    return defined(features, -jax.nn.logsumexp(each, axis=0))
