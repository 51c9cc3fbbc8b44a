"""Row weights that each member of an ensemble draws for itself: bootstrap and bagging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.methods.experiments import runner_keys, runners
from bayescal.predictive import Predictive
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


def out_of_bag(pred: Predictive, method: Method, key: Key) -> Predictive:
    """The predictive of training rows by those members alone that never saw them: an estimate on unseen data for free.

    Members that weigh nothing, since they diverged, go on weighing nothing.

    Args:
        pred: of the very rows that `fit` had, in their order: batch shape (rows,), or (experiment, rows).
        method: what was trained: an ensemble with `resample`, or experiments of one whose data sets are of one size.
        key: the key of `fit`.

    Raises:
        ValueError: for a method whose members draw no weights, and where some rows were seen by every member.
    Source: Breiman 1996 (out-of-bag estimation).
    """
    apart = runners(method)
    if apart.resample is None:
        raise ValueError(
            "`method` must be an ensemble with `resample`, got one whose members see all rows. "
            "Build it with `ensemble(..., resample=bootstrap)`."
        )
    rows, members = pred.batch_shape[-1], apart.shape[-1]
    unseen = member_rows(apart.resample, runner_keys(method, key), rows).reshape(*apart.shape, rows) == 0
    unseen = jnp.repeat(jnp.moveaxis(unseen, -2, 0), pred.num_members // members, axis=0)  # draws beside their member
    weights = pred.weights() * unseen
    nobody = np.asarray(weights.sum(0) == 0)
    if nobody.any():
        raise ValueError(
            f"`pred` must have a member that never saw each row, got {int(nobody.sum())} rows that all (alive) members "
            f"saw, first {tuple(int(i) for i in np.argwhere(nobody)[0])}. Train more members, or take those rows out."
        )
    return dataclasses.replace(pred, member_weights=weights)
