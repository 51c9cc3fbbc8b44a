"""Distance to the nearest class mean, in standard deviations within classes; and the same against all rows together."""

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
from bayescal.types import Array, pytree


@pytree
class Mahalanobis:
    """Squared distance to the nearest class mean in whitened space: `fitted(features) -> (rows,)`.

    Args:
        centre: mean of all rows, in two parts that add up to it.
        means: of the classes, likewise.
        map: from features to the space in which classes have unit covariance.
        ridge: what was added to every variance.
    """

    centre: Float[Array, "2 features"]
    means: Float[Array, "classes 2 features"]
    map: Float[Array, "features features"]
    ridge: Float[Array, ""]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Squared standard deviations, >= 0; higher = more unlike the training data. NaN for rows that are not finite."""
        return _distance(self, as_rows(features, self.map.shape[0]))


@pytree
class RelativeMahalanobis:
    """Squared distance to the nearest class mean less that to the mean of all rows: `fitted(features) -> (rows,)`.

    Args:
        centre: mean of all rows, in two parts that add up to it.
        means: of the classes, likewise.
        map: from features to the directions in which class means differ, at unit covariance within classes.
        shrinkage: variance within classes over that of all rows, of each direction.
        ridge: what was added to every variance.
    """

    centre: Float[Array, "2 features"]
    means: Float[Array, "classes 2 features"]
    map: Float[Array, "features directions"]
    shrinkage: Float[Array, "directions"]
    ridge: Float[Array, ""]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Squared standard deviations, of any sign; higher = more unlike the training data. NaN as in `Mahalanobis`."""
        return _relative_distance(self, as_rows(features, self.map.shape[0]))


def fit_mahalanobis(
    features: Float[Array, "rows features"],
    labels: Int[Array, "rows"],
    *,
    num_classes: int | None = None,
    ridge: float = 0.0,
) -> Mahalanobis:
    """min_k (f - mu_k)^T S^-1 (f - mu_k), with one covariance S of all rows about their class's mean, divided by rows.

    Squared standard deviations, >= 0; higher = more unlike the training data. Unchanged by invertible affine maps of
    the features where `ridge` is 0. Fitted in float64 on the host, a few rows at a time; scored in float32 from
    differences, so that a mean of 1000 beside a spread of 0.05 costs no digits, and to 1 in 1000 or better: features that
    are too nearly collinear for that are refused. A unit that is dead on the training rows counts with variance
    `ridge` alone: one row in which it fires is very unlike them.

    Args:
        features: penultimate activations of the training rows.
        labels: their classes.
        num_classes: None = largest label + 1.
        ridge: added to every variance, in mean variances (of the columns, within classes). 1e-6 for dead units.

    Raises:
        ValueError: for directions without spread (their number is named), classes of fewer than two rows, features that
            are not finite, other shapes.
    Source: Lee et al. 2018 (recalled), single layer, without input perturbation.
    """
    rows = training_rows(features)
    centre, means, white, _ = _tied(rows, labels, num_classes, ridge)
    return Mahalanobis(halves(centre), halves(centre + means), _float32(white.map), _float32(white.added))


def fit_relative_mahalanobis(
    features: Float[Array, "rows features"],
    labels: Int[Array, "rows"],
    *,
    num_classes: int | None = None,
    ridge: float = 0.0,
) -> RelativeMahalanobis:
    """min_k (f - mu_k)^T S^-1 (f - mu_k) - (f - mu_0)^T S_0^-1 (f - mu_0), S_0 the covariance of all rows about their mean.

    Squared standard deviations, of any sign; higher = more unlike the training data. S_0 = S + the covariance of the
    class means, so both distances are equal outside the span of those means, and only its classes - 1 directions are
    computed: no digits are lost to what cancels. For the same reason the score is blind to rows that leave the training
    data in any other direction. Unchanged by invertible affine maps of the features where `ridge` is 0.

    Args:
        features: penultimate activations of the training rows.
        labels: their classes, at least two.
        num_classes: None = largest label + 1.
        ridge: added to every variance, of S and of S_0 alike, in mean variances within classes.

    Raises:
        ValueError: for a single class, and as in `fit_mahalanobis`.
    Source: Ren et al. 2021 (recalled); reduced to classes - 1 directions by us.
    """
    rows = training_rows(features)
    centre, means, white, shares = _tied(rows, labels, num_classes, ridge)
    if len(means) < 2:
        raise ValueError(
            "`labels` must have at least 2 classes, got 1: both distances are the same. Use `fit_mahalanobis`."
        )
    _, spread, directions = np.linalg.svd(np.sqrt(shares)[:, None] * (means @ white.map), full_matrices=False)
    kept = min(len(means) - 1, rows.shape[1])
    spread, directions = spread[:kept], directions[:kept].T
    return RelativeMahalanobis(
        halves(centre),
        halves(centre + means),
        *(_float32(x) for x in (white.map @ directions, 1 / (1 + spread**2), white.added)),
    )


def _tied(rows, labels, num_classes, ridge):
    """Mean of all rows, class means from it, the whitening within classes, and each class's share of the rows."""
    labels, counts = class_rows(rows, labels, num_classes)
    means, shares = class_means(rows, labels, counts), counts / len(rows)
    total, largest = scatter((block, means[labels[part]]) for part, block in blocks(rows))
    white = whitening(total, largest, normaliser=len(rows), ridge=ridge, of="within classes")
    centre = means[0] + shares @ (means - means[0])
    return centre, means - centre, white, shares


def _float32(x):
    return jnp.asarray(x, jnp.float32)


def _whitened(fitted, deviations):
    return jnp.matmul(deviations, fitted.map, precision="highest")


def _nearest(fitted, features, own):
    """min_k |whitened (f - mean_k)|^2, `own` being the features whitened from the centre.

    Which class is nearest is read off differences of whitened rows; how near, off the row less that class's mean, whitened
    after: where classes lie 10,000 spreads apart the first has lost four digits.
    """
    means = _whitened(fitted, from_centre(fitted.means[:, 0], fitted.centre) + fitted.means[:, 1])

    def nearer(found, one):
        best, index = found
        number, mean = one
        distance = jnp.square(own - mean[None]).sum(-1)
        return (jnp.minimum(distance, best), jnp.where(distance < best, number, index)), None

    start = jnp.full(own.shape[:1], jnp.inf, own.dtype), jnp.zeros(own.shape[:1], jnp.int32)
    index = jax.lax.scan(nearer, start, (jnp.arange(len(means), dtype=jnp.int32), means))[0][1]
    return jnp.square(_whitened(fitted, from_centre(features, fitted.means[index]))).sum(-1)


@jax.jit
def _distance(fitted, features):
    own = _whitened(fitted, from_centre(features, fitted.centre))
    return defined(features, _nearest(fitted, features, own))


@jax.jit
def _relative_distance(fitted, features):
    own = _whitened(fitted, from_centre(features, fitted.centre))
    return defined(features, _nearest(fitted, features, own) - (own**2 * fitted.shrinkage[None]).sum(-1))
