"""Whitening by a covariance matrix, computed once, on the host, in float64."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

FLOAT32 = np.finfo(np.float32).eps
ROUNDING = 1e-3  # the most that rounding to float32 may change a squared distance by, relative to it


class Whitening(NamedTuple):
    """`deviations @ map` has covariance one; `log_det` is that of the covariance, `added` what its diagonal was given."""

    map: np.ndarray  # (features, features)
    log_det: float
    added: float


def scatter(blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """sum of (f - centre)(f - centre)^T, and the largest |f| of each feature, over (rows, their centres), which are
    overwritten: float64 in blocks, added as they come."""
    total, largest = np.zeros(()), np.zeros(())
    for rows, centre in blocks:
        largest = np.maximum(largest, np.maximum(rows.max(0), -rows.min(0)))
        rows -= centre
        total = total + rows.T @ rows
    return total, largest


def whitening(total: np.ndarray, largest: np.ndarray, *, normaliser: float, ridge: float, of: str) -> Whitening:
    """S = total / normaliser + ridge * mean variance * I, decomposed as D V diag(v) V^T D.

    D holds the standard deviations, so that columns of different units are no reason to call S singular. It is singular
    where a direction's variance v could be the features' rounding to float32 alone, or is so far below the largest that
    squared distances scored in float32 would be off by more than 1 in 1000: their relative error is at most
    eps * sqrt(largest v / least v), which a single direction in two features comes close to, and many features a tenth of.

    Args:
        total: (features, features), sum of the outer products of deviations from their mean.
        largest: (features,), largest absolute feature: what was rounded.
        normaliser: number that the sums of squares are divided by.
        ridge: added to every variance, in mean variances.
        of: whose covariance it is, for the message.

    Raises:
        ValueError: for a singular S, and a ridge that is negative or infinite.
    """
    if not 0 <= ridge < np.inf:
        raise ValueError(f"`ridge` must be finite and not negative, got {ridge!r}. 1e-6 is enough for dead units.")
    size = len(total)
    matrix = total / normaliser
    added = ridge * np.trace(matrix) / size
    matrix[np.diag_indices(size)] += added
    scale = np.sqrt(np.diag(matrix))
    scale = np.where(scale > 0, scale, 1)
    values, vectors = np.linalg.eigh(matrix / scale[:, None] / scale)
    least = (FLOAT32 / ROUNDING) ** 2 * max(values[-1], 0)
    if ridge == 0:
        least = np.maximum(least, vectors.T**2 @ (FLOAT32 * largest / scale) ** 2)
    empty = int((values <= least).sum())
    if empty:
        raise ValueError(
            f"`features` must spread in every direction, got no spread in {empty} of {size} directions {of} with ridge "
            f"{ridge:g}, or too little for float32 to score: dead units, columns that are (nearly) sums of others, or fewer "
            "rows than features. Pass a larger `ridge`, such as 1e-6 (times the mean variance, added to every variance), or "
            "leave such columns out."
        )
    return Whitening(
        vectors / np.sqrt(values) / scale[:, None], float(np.log(values).sum() + 2 * np.log(scale).sum()), float(added)
    )
