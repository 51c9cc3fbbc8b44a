"""Checks of data on the host: what is wrong is said once, before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.types import Dataset


def check_finite(name: str, value) -> None:
    """Raises unless `value` has rows and holds no NaN or infinity."""
    for leaf in jax.tree.leaves(value):
        if np.ndim(leaf) < 1 or not np.size(leaf):
            raise ValueError(
                f"`{name}` must have at least one row, got shape {np.shape(leaf)}. Check how it was loaded."
            )
        host = np.asarray(leaf)
        if jnp.issubdtype(host.dtype, jnp.floating):
            bad = _rows_not_finite(host)
            if not bad.any():
                continue
            raise ValueError(
                f"`{name}` must be finite, got NaN or infinity in {int(bad.sum())} of {len(host)} rows, "
                f"first in row {int(bad.argmax())}. Drop or repair them."
            )


def _rows_not_finite(host: np.ndarray, most: int = 2**22) -> np.ndarray:
    """Which rows hold NaN or infinity; a few million numbers at a time, so that a memory map is never copied whole."""
    rows = max(1, most * len(host) // max(host.size, 1))
    finite = lambda part: np.isfinite(part.astype(np.float32))
    return np.concatenate(
        [~finite(host[i : i + rows]).reshape(len(host[i : i + rows]), -1).all(1) for i in range(0, len(host), rows)]
    )


def check_rows_agree(name: str, value) -> int:
    """The number of rows of every leaf; raises where they differ."""
    rows = {np.shape(leaf)[0] for leaf in jax.tree.leaves(value)}
    if len(rows) != 1:
        raise ValueError(
            f"`{name}` must have the same rows in every leaf, got {sorted(rows)}. Check how they were joined."
        )
    return rows.pop()


def check_dataset(data: Dataset, name: str = "data") -> int:
    """Raises unless inputs, targets and weights are finite and of the same number of rows, which is returned."""
    if not isinstance(data, Dataset):
        raise TypeError(
            f"`{name}` must be a Dataset(inputs, targets), got {type(data).__name__}. Wrap the arrays: "
            "`bc.Dataset(inputs, targets)`."
        )
    check_finite(f"{name}.inputs", data.inputs)
    rows = check_rows_agree(f"{name}.inputs", data.inputs)
    for field in ("targets", "weights"):
        for leaf in jax.tree.leaves(getattr(data, field)):
            if np.shape(leaf)[:1] != (rows,):
                raise ValueError(
                    f"`{name}.{field}` must have the {rows} rows of `{name}.inputs`, got shape {np.shape(leaf)}. "
                    "Pass one per row."
                )
    if data.weights is not None:
        weights = np.asarray(data.weights)
        if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(
                f"`{name}.weights` must be one non-negative number a row, not all zero, got shape {weights.shape} with "
                f"minimum {weights.min()}. Leave them out for equal weights."
            )
    return rows
