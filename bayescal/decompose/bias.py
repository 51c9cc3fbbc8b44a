"""What few members hide: mutual information corrected for their number, with an interval."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.decompose.information import ClassPredictive, check_classes, mutual_information
from bayescal.decompose.rows import row_by_row
from bayescal.decompose.uncertainty import check_raw
from bayescal.predictive import undefined_where


class Corrected(NamedTuple):
    """An estimate with the ends of its 95 % interval, each (*batch,)."""

    value: Float[jax.Array, "*batch"]
    low: Float[jax.Array, "*batch"]
    high: Float[jax.Array, "*batch"]


def corrected_mutual_information(pred: ClassPredictive) -> Corrected:
    """S I - (S - 1) mean_s I_without_s: mutual information as of endlessly many members, nats, with a 95 % interval.

    The plug-in I of S members drawn from the posterior is too low, by about a share 1 / S where they nearly agree, as a
    variance that is divided by S. The jackknife takes the term in 1 / S away; what is left is of order 1 / S^2. The value
    may fall slightly below zero where the truth is near zero. The interval is that of the jackknife of log I with Student's
    t of S - 1 degrees: for how often it covers, and for dissent so rare that few members show it, which no interval from
    the members can know of, see `docs/decomposition.md`. Neither value nor ends are above log classes, which the information
    cannot be. The interval is NaN where the members say nothing of it: where all, or all but one, agree to the bit, or leaving
    one out is the same for each. Higher = more unlike the training data.

    Args:
        pred: predictive of at least three members that weigh the same; members of weight 0 are left out. Not inside jit
            where there are weights, which decide how many members there are.

    Raises:
        ValueError: for fewer members, unequal weights or a pooled predictive.
        TypeError: for another family, or weights inside jit.
    Source: Quenouille 1956, Tukey 1958 (jackknife, recalled).
    """
    check_classes(pred, "corrected mutual information")
    check_raw(pred)
    from scipy.stats import t  # slow to import

    pred = _equal_members(pred)
    return row_by_row(_jackknife, pred, float(t.ppf(0.975, pred.num_members - 1)))


def _jackknife(pred, quantile):
    members = pred.num_members
    whole = mutual_information(pred)

    def without(left_out):
        kept = jnp.roll(jnp.arange(members), -left_out - 1)[: members - 1]
        return mutual_information(jax.tree.map(lambda x: x[kept], pred))

    parts = jax.lax.map(without, jnp.arange(members))
    most = jnp.log(jnp.asarray(pred.num_classes if hasattr(pred, "num_classes") else 2, whole.dtype))
    value = jnp.minimum(whole + (members - 1) * (whole - parts.mean(0)), most)
    mute = (parts.min(0) == parts.max(0)) | (parts.min(0) <= 0)
    logs, own = jnp.log(jnp.where(mute, 1, parts)), jnp.log(jnp.where(mute, 1, whole))
    pseudo = own + (members - 1) * (own - logs)
    centre, half = pseudo.mean(0), quantile * pseudo.std(0, ddof=1) / members**0.5
    ends = (undefined_where(mute, jnp.minimum(jnp.exp(x), most)) for x in (centre - half, centre + half))
    return Corrected(value, *ends)


def _equal_members(pred):
    weights = pred.member_weights
    if weights is not None:
        if isinstance(weights, Tracer):
            raise TypeError(
                "`member_weights` must be known here, got a tracer: they decide how many members there are. Call this outside "
                "of jit, or leave the weights out."
            )
        given = np.asarray(weights)
        flat = given.reshape(len(given), -1)
        kept = np.flatnonzero(flat[:, 0])
        if np.ptp(flat, axis=1).any() or len(set(flat[kept, 0].tolist())) > 1:
            raise ValueError(
                "`pred` must have members that weigh the same for all examples, got `member_weights` from "
                f"{given.min():g} to {given.max():g}. A jackknife leaves one of equals out."
            )
        changes: dict = {pred.per_member: getattr(pred, pred.per_member)[kept], "member_weights": None}
        pred = dataclasses.replace(pred, **changes)
    if pred.num_members < 3:
        raise ValueError(
            f"`pred` must have at least 3 members that count, got {pred.num_members}. Train more, or use "
            "`mutual_information`."
        )
    return pred
