"""Distance to the k-th nearest training row: exact, in chunks, on the device."""

import dataclasses
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.scores.features import as_rows, defined, training_rows
from bayescal.types import Array, pytree

FEATURES_AT_ONCE = 16  # per pass over a chunk's squared distances: fewer are bound by memory


@pytree
class Neighbours:
    """Distance to the k-th nearest row of a bank: `fitted(features) -> (rows,)`.

    Args:
        bank: the training rows, at unit length where `normalise`.
        k: which neighbour, from 1.
        normalise: whether features are divided by their length.
        chunk: rows of the bank, and of the features, that are compared at once; memory grows with its square.
    """

    bank: Float[Array, "bank features"]
    k: int = dataclasses.field(metadata={"static": True})
    normalise: bool = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Distance, >= 0; higher = more unlike the training data.

        NaN for rows that are not finite and, where lengths are normalised, for rows of zeros.
        """
        return _kth_distance(self, as_rows(features, self.bank.shape[1]))


def fit_neighbours(
    features: Float[Array, "rows features"], *, k: int = 50, normalise: bool = True, chunk: int = 1024
) -> Neighbours:
    """Euclidean distance to the k-th nearest of the training rows, all at unit length.

    In [0, 2] where normalised, else >= 0; higher = more unlike the training data. Exact: squared distances are sums of
    squared differences, right for near duplicates too, where 2 - 2 cos keeps no digit below a distance of 3e-4; unit
    length itself is rounded by about 1e-7. About twice the time of that product on a CPU. Unchanged by rotations, and by
    the scale of each row where normalised. A training row is its own first neighbour.

    Args:
        features: penultimate activations of the training rows, which are kept on the device.
        k: which neighbour: 50 for 50,000 rows of 10 classes, more for more classes or rows.
        normalise: divide every row by its length.
        chunk: rows of the bank, and of the features, that are compared at once. Answers do not depend on it.

    Raises:
        ValueError: for a k outside [1, rows], a chunk below 1, a training row that is all zeros in float32 where
            normalised, features that are not finite in float32, other shapes.
    Source: Sun et al. 2022 (recalled).
    """
    rows = training_rows(features, least=1)
    if not isinstance(k, Integral) or not 1 <= k <= len(rows):
        raise ValueError(
            f"`k` must be a whole number from 1 to the number of training rows, {len(rows)}, got {k!r}. 50 is usual."
        )
    if not isinstance(chunk, Integral) or chunk < 1:
        raise ValueError(f"`chunk` must be a whole number of at least 1, got {chunk!r}. 1024 takes 4 MiB.")
    bank = jnp.asarray(rows, jnp.float32)
    if normalise:
        bank = _unit(bank)
        zero = ~np.asarray(
            jnp.isfinite(bank).all(1)
        )  # also of what is zero in float32 alone: NaN would be nearest of all
        if zero.any():
            raise ValueError(
                f"`features` must have a direction in every training row, got {int(zero.sum())} rows of zeros, first row "
                f"{int(zero.argmax())}. Leave them out, or pass `normalise=False`; values below 1e-38 are zeros in float32."
            )
    return Neighbours(bank, int(k), normalise, int(chunk))


@jax.jit
def _unit(rows):
    """Rows at length one, whatever their scale; NaN for a row of zeros."""
    rows = rows / abs(rows).max(-1, keepdims=True)
    return rows / jnp.sqrt((rows**2).sum(-1, keepdims=True))


@jax.jit
def _kth_distance(fitted, features):
    rows = _unit(features) if fitted.normalise else features
    size = len(fitted.bank)
    chunk = min(fitted.chunk, size)

    def search(row):
        def merge(best, start):
            begin = jnp.minimum(start, size - chunk)
            block = jax.lax.dynamic_slice_in_dim(fitted.bank, begin, chunk)
            squared = _squared_distances(block, row)
            squared = jnp.where(begin + jnp.arange(chunk) < start, jnp.inf, squared)  # seen in the chunk before
            return -jax.lax.top_k(-jnp.concatenate([best, squared]), fitted.k)[0], None

        nothing = jnp.full(fitted.k, jnp.inf, rows.dtype)
        return jax.lax.scan(merge, nothing, jnp.arange(0, size, chunk))[0][-1]

    return defined(rows, jnp.sqrt(jax.lax.map(search, rows, batch_size=fitted.chunk)))


def _squared_distances(block, row):
    """|b - row|^2 of every row b of the block, a few features at a time, so that no (rows, chunk, features) is held."""
    short = -row.shape[0] % FEATURES_AT_ONCE
    columns = jnp.pad(block.T, ((0, short), (0, 0))).reshape(-1, FEATURES_AT_ONCE, block.shape[0])
    own = jnp.pad(row, (0, short)).reshape(-1, FEATURES_AT_ONCE)

    def add(total, few):
        for column, value in zip(*few, strict=True):
            total = total + jnp.square(column - value)
        return total, None

    return jax.lax.scan(add, jnp.zeros(block.shape[0], row.dtype), (columns, own))[0]
