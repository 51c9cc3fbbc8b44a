"""Row weights that each member of an ensemble draws for itself: bootstrap and bagging."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from bayescal.types import Array, Key, Method

_RESAMPLE = 0x52534D50  # folded into a member's key, so that its weights share no stream with its training


def bootstrap(key: Key, rows: int) -> Float[Array, "rows"]:
    """How often each row is drawn in `rows` draws with replacement; the mean is 1.

    Source: Breiman 1996 (bagging).
    """
    drawn = jax.random.randint(key, (rows,), 0, rows)
    return jnp.zeros(rows).at[drawn].add(1.0)


@dataclasses.dataclass(frozen=True)
class Subsample:
    """Weight 1 for a share of the rows, drawn without replacement and rounded down to whole rows, and 0 for the others.

    Args:
        fraction: share of the rows, above 0 and at most 1.

    Raises:
        ValueError: for another share, or one that leaves no row.
    Source: Breiman 1999 (pasting).
    """

    fraction: float

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`fraction` must lie in (0, 1], got {self.fraction!r}. It is the share of rows kept.")

    def __call__(self, key: Key, rows: int) -> Float[Array, "rows"]:
        kept = int(self.fraction * rows)
        if kept < 1:
            raise ValueError(
                f"`fraction` must leave at least one of the {rows} rows, got {self.fraction}. Take a larger share."
            )
        return (jax.random.permutation(key, rows) < kept).astype(jnp.float32)


def member_rows(resample, keys: Key, rows: int) -> Float[Array, "member rows"]:
    """Each member's weights of the rows, from the members' own keys."""
    return jax.vmap(lambda key: resample(jax.random.fold_in(key, _RESAMPLE), rows))(keys)


def out_of_bag(method: Method, key: Key, rows: int) -> Bool[Array, "member rows"]:
    """Which rows each member never saw, for the key and the number of rows that `fit` had.

    As `member_weights` of the predictive on the training rows they give the out-of-bag prediction:
    `dataclasses.replace(pred, member_weights=out_of_bag(method, key, rows).astype(float))`.

    Args:
        method: an ensemble with `resample`.
        key: the key of `fit`.
        rows: rows of the data that `fit` had.

    Raises:
        ValueError: for a method whose members draw no weights.
    """
    from bayescal.methods.ensemble import member_keys

    if method.members is None or method.members.resample is None:
        raise ValueError(
            "`method` must be an ensemble with `resample`, got one whose members see all rows. "
            "Build it with `ensemble(..., resample=bootstrap)`."
        )
    return member_rows(method.members.resample, member_keys(key, method.members.number), rows) == 0
