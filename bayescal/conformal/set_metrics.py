"""How good sets of classes are: plain functions of bool sets (rows, classes) and labels (rows,)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bayescal.binning import wilson_interval
from bayescal.types import Array, Estimate


def covered(sets: Bool[Array, "rows classes"], targets: Int[Array, "rows"]) -> Bool[jax.Array, "rows"]:
    """Whether each row's set holds its target; False for a label that is no class."""
    return (jnp.asarray(sets) & (jnp.asarray(targets)[:, None] == jnp.arange(sets.shape[-1]))).any(-1)


def set_coverage(sets: Bool[Array, "rows classes"], targets: Int[Array, "rows"]) -> Estimate:
    """Share of rows whose set holds the target, with its 95 % Wilson interval for this fit.

    In [0, 1]; 1 - alpha is best, less is a broken promise, and more is bought with larger sets. Over fits it spreads by
    itself: with n calibration rows like Beta(k, n + 1 - k). On the host.

    Raises:
        ValueError: for no rows.
    """
    rows = len(targets)
    if not rows:
        raise ValueError("`targets` must have at least one row, got none. Check how the data were split.")
    share = float(np.asarray(covered(sets, targets)).mean())
    low, high = wilson_interval(share, rows)
    return Estimate(share, float(low), float(high), rows, "share of sets that hold the target, 95 % Wilson interval")


def mean_set_size(sets: Bool[Array, "rows classes"]) -> Float[jax.Array, ""]:
    """Mean number of classes in a set, in [0, classes]; lower is better at the same coverage. Empty sets count as 0."""
    return jnp.asarray(sets).sum(-1).mean(dtype=jnp.float32)


def singleton_share(sets: Bool[Array, "rows classes"]) -> Float[jax.Array, ""]:
    """Share of rows whose set is one class, in [0, 1]; higher = more rows with a clear answer."""
    return (jnp.asarray(sets).sum(-1) == 1).mean(dtype=jnp.float32)


def group_coverage(
    sets: Bool[Array, "rows classes"], targets: Int[Array, "rows"], groups: Int[Array, "rows"], *, num_groups: int
) -> Float[jax.Array, "groups"]:
    """Coverage within each group, in [0, 1]; NaN for a group without rows. `jnp.nanmin` of it is the worst.

    Args:
        sets: sets of classes.
        targets: labels.
        groups: group of each row, in [0, num_groups); rows of others count for nothing.
        num_groups: how many groups there are.
    """
    member = jnp.asarray(groups)[:, None] == jnp.arange(num_groups)
    return (member & covered(sets, targets)[:, None]).sum(0) / member.sum(0)


def classwise_coverage(sets: Bool[Array, "rows classes"], targets: Int[Array, "rows"]) -> Float[jax.Array, "classes"]:
    """Share of the rows of each class whose set holds it, in [0, 1]; NaN for a class without rows."""
    return group_coverage(sets, targets, targets, num_groups=sets.shape[-1])


def size_stratified_coverage(
    sets: Bool[Array, "rows classes"], targets: Int[Array, "rows"]
) -> Float[jax.Array, "sizes"]:
    """Coverage of the sets of each size 0, 1, ..., classes, in [0, 1]; NaN for a size that does not occur, 0 for empty sets.

    `jnp.nanmin` of it, 1 - alpha at best, says how far the sets adapt to the row.

    Source: Angelopoulos et al. 2021, section 4.3 (SSCV bins the sizes) (recalled).
    """
    return group_coverage(sets, targets, jnp.asarray(sets).sum(-1), num_groups=sets.shape[-1] + 1)
