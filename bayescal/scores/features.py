"""What all feature scores share: features as they must be, and rows of which nothing can be said."""

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.predictive import float32_or_wider
from bayescal.types import Array


def as_rows(features: Array, width: int | None = None) -> jax.Array:
    """`features` (rows, features) in float32 or wider; raises for another shape, or another width than the fit's."""
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise ValueError(
            f"`features` must have shape (rows, {width or 'features'}), got {tuple(features.shape)}. For one row add the "
            "axis: `features[None]`; of several members use `fit_members`."
        )
    return float32_or_wider(features)


def training_rows(features: Array, least: int = 2) -> np.ndarray:
    """The rows of a fit in float64 on the host; raises unless they are finite and at least `least`."""
    if features.ndim != 2 or len(features) < least or not features.shape[1]:
        raise ValueError(
            f"`features` must have shape (rows, features) with at least {least} rows, got {tuple(features.shape)}. "
            "Flatten all but the first axis; of several members use `fit_members`."
        )
    rows = np.asarray(features, np.float64)
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise ValueError(
            f"`features` must be finite, got NaN or infinity in {int(bad.sum())} of {len(rows)} rows, first in row "
            f"{int(bad.argmax())}. Look for members that diverged, or inputs that were not finite."
        )
    return rows


def class_rows(features: np.ndarray, labels: Array, num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels as whole numbers, and the rows of each class; raises where a class has fewer than two."""
    given = np.asarray(labels)
    if given.shape != features.shape[:1] or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"`labels` must be whole numbers of shape {features.shape[:1]}, one per row of `features`, got {given.dtype} "
            f"of shape {given.shape}. Of one-hot labels pass `labels.argmax(-1)`."
        )
    if given.min() < 0 or (num_classes is not None and given.max() >= num_classes):
        raise ValueError(
            f"`labels` must lie in [0, {num_classes or 'classes'}), got {given.min()} to {given.max()}. Leave rows "
            "without a class out."
        )
    counts = np.bincount(given, minlength=num_classes or 0)
    few = np.flatnonzero(counts < 2)
    if few.size:
        raise ValueError(
            f"`labels` must have at least 2 rows of every class, got {counts[few[0]]} of class {few[0]} ({few.size} such "
            f"classes of {len(counts)}). Number the classes without gaps, and leave out those of one row."
        )
    return given, counts


def defined(features: jax.Array, score: jax.Array) -> jax.Array:
    """`score`, and NaN for rows that are not finite and where it overflowed to -infinity, which would rank as familiar."""
    return jnp.where(jnp.isfinite(features).all(-1) & (score > -jnp.inf), score, jnp.nan)


def halves(centre: np.ndarray) -> jax.Array:
    """A float64 vector as two of float32, (..., 2, features): one alone would round a mean of 1000 by a thousandth of a
    spread of 0.05."""
    high = centre.astype(np.float32)
    return jnp.asarray(np.stack([high, (centre - high).astype(np.float32)], -2))


def from_centre(features: jax.Array, centre: jax.Array) -> jax.Array:
    """features - centre, one for all rows or one each, in `halves`: the large part first, exact for features close to it."""
    centre = centre.reshape(-1, 2, features.shape[-1])
    return features - centre[:, 0] - centre[:, 1]
