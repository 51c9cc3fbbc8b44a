"""Whitening by a covariance matrix, computed once, on the host, in float64."""

from typing import NamedTuple

import numpy as np

FLOAT32 = np.finfo(np.float32).eps


class Whitening(NamedTuple):
    """`deviations @ map` has covariance one; `log_det` is that of the covariance, `added` what its diagonal was given."""

    map: np.ndarray  # (features, features)
    log_det: float
    added: float


def whitening(deviations: np.ndarray, largest: np.ndarray, *, normaliser: float, ridge: float, of: str) -> Whitening:
    """S = deviations^T deviations / normaliser + ridge * mean variance * I, decomposed as D V diag(v) V^T D.

    D holds the standard deviations, so that columns of different units are no reason to call S singular. It is
    singular where a direction's variance v could be the features' rounding to float32 alone.

    Args:
        deviations: (rows, features), from their mean.
        largest: (features,), largest absolute feature: what was rounded.
        normaliser: number that the sums of squares are divided by.
        ridge: added to every variance, in mean variances.
        of: whose covariance it is, for the message.

    Raises:
        ValueError: for a singular S, and a ridge that is negative or infinite.
    """
    if not 0 <= ridge < np.inf:
        raise ValueError(f"`ridge` must be finite and not negative, got {ridge!r}. 1e-6 is enough for dead units.")
    size = deviations.shape[1]
    matrix = deviations.T @ deviations / normaliser
    added = ridge * np.trace(matrix) / size
    matrix[np.diag_indices(size)] += added
    scale = np.sqrt(np.diag(matrix))
    scale = np.where(scale > 0, scale, 1)
    values, vectors = np.linalg.eigh(matrix / scale[:, None] / scale)
    least = size * np.finfo(np.float64).eps * max(values[-1], 0)
    if ridge == 0:
        least = np.maximum(least, vectors.T**2 @ (FLOAT32 * largest / scale) ** 2)
    empty = int((values <= least).sum())
    if empty:
        raise ValueError(
            f"`features` must spread in every direction, got no spread in {empty} of {size} directions {of} with ridge "
            f"{ridge:g}: dead units, columns that are sums of others, or fewer rows than features. Pass a larger `ridge`, "
            "such as 1e-6 (times the mean variance, added to every variance), or leave such columns out."
        )
    return Whitening(
        vectors / np.sqrt(values) / scale[:, None], float(np.log(values).sum() + 2 * np.log(scale).sum()), added
    )
