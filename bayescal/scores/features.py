"""What all feature scores share: features as they must be, passes over them, and rows of which nothing can be said.

A fit goes over the training rows in blocks: host memory beyond the rows themselves is a few of them, some 17 MiB (for a
quantile: the rows once more in float32). Features to be scored may be spread over Auto mesh axes, not over Explicit ones.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.predictive import float32_or_wider
from bayescal.types import Array

LARGEST = float(np.finfo(np.float32).max)
VALUES_AT_ONCE = 2**19  # of features in float64: 4 MiB, and few such blocks are held


def as_rows(features: Array, width: int | None = None) -> jax.Array:
    """`features` (rows, features) in float32 or wider; raises for another shape, or another width than the fit's."""
    refuse_explicit(features)
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise ValueError(
            f"`features` must have shape (rows, {width or 'features'}), got {tuple(features.shape)}. For one row add the "
            "axis: `features[None]`; of several members use `fit_members`."
        )
    return float32_or_wider(features)


def refuse_explicit(features: Array) -> None:
    """Raises for features spread over Explicit mesh axes: scores index and scan over rows."""
    spec = getattr(jax.typeof(features).sharding, "spec", ())  # Auto axes are not in it
    if any(axis is not None for axis in spec):
        raise ValueError(
            f"`features` must be spread over Auto mesh axes, got Explicit axes {tuple(spec)}. Make the mesh with "
            "`bc.make_mesh`, or `axis_types=(AxisType.Auto,)`."
        )


def training_rows(features: Array, least: int = 2) -> np.ndarray:
    """The rows of a fit on the host, in their own precision; raises unless they are finite in float32 and at least `least`."""
    if features.ndim != 2 or len(features) < least or not features.shape[1]:
        raise ValueError(
            f"`features` must have shape (rows, features) with at least {least} rows, got {tuple(features.shape)}. "
            "Flatten all but the first axis; of several members use `fit_members`."
        )
    rows = np.asarray(features)
    bad = np.concatenate([~(abs(block) <= LARGEST).all(1) for _, block in blocks(rows)])
    if bad.any():
        raise ValueError(
            f"`features` must be finite, got NaN or infinity in {int(bad.sum())} of {len(rows)} rows, first in row "
            f"{int(bad.argmax())}. Look for members that diverged, inputs that were not finite, or values beyond float32, in "
            "which rows are scored."
        )
    return rows


def blocks(rows: np.ndarray, index: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """A few rows at a time in float64, free to be overwritten, and their place (in `index`, where only those are meant)."""
    size = max(1, VALUES_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows if index is None else index), size):
        part = slice(start, start + size)
        yield part, rows[part if index is None else index[part]].astype(np.float64)


def class_rows(features: np.ndarray, labels: Array, num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels as whole numbers, and the rows of each class; raises where a class has fewer than two."""
    given = np.asarray(labels)
    if given.shape != features.shape[:1] or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"`labels` must be whole numbers of shape {features.shape[:1]}, one per row of `features`, got {given.dtype} "
            f"of shape {given.shape}. Of one-hot labels pass `labels.argmax(-1)`."
        )
    if given.min() < 0 or (num_classes is not None and given.max() >= num_classes):
        end = "classes" if num_classes is None else num_classes
        raise ValueError(
            f"`labels` must lie in [0, {end}), got {given.min()} to {given.max()}. Leave rows without a class out."
        )
    given = given.astype(np.int64)
    counts = np.bincount(given, minlength=num_classes or 0)
    few = np.flatnonzero(counts < 2)
    if few.size:
        raise ValueError(
            f"`labels` must have at least 2 rows of every class, got {counts[few[0]]} of class {few[0]} ({few.size} such "
            f"classes of {len(counts)}). Number the classes without gaps, and leave out those of one row."
        )
    return given, counts


def class_means(rows: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(classes, features), in float64; sums are of differences to the first row, so that a large mean costs no digits."""
    first, sums = rows[0].astype(np.float64), np.zeros((len(counts), rows.shape[1]))
    for part, block in blocks(rows):
        order = np.argsort(labels[part], kind="stable")
        present, starts = np.unique(labels[part][order], return_index=True)
        sums[present] += np.add.reduceat((block - first)[order], starts, axis=0)
    return first + sums / counts[:, None]


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
