"""Greedy selection of members: which networks of a large pool to keep, and how much each should count."""

import dataclasses
from functools import partial
from numbers import Integral
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Calibrator, concrete
from bayescal.predictive import Predictive, check_predictive, check_targets_and_weights, take
from bayescal.types import Array, pytree


@pytree
class MemberSelection(Calibrator):
    """The members chosen, and how often: `selection(pred) -> pred` with those as member weights.

    Args:
        member_weights: times each member was chosen / number of choices; 0 = not chosen. They sum to 1.
        order: the member chosen at each step.
        nll: of the pool after each step on the rows of the fit, mean nats per row; lower is better, and it may rise.
    """

    accuracy_preserving: ClassVar[bool] = False

    member_weights: Float[Array, "member"]
    order: Int[Array, "step"]
    nll: Float[Array, "step"]

    def __call__(self, pred: Predictive) -> Predictive:
        """The same members, those not chosen at weight 0. The members must be those of the fit, in their order.

        Inside jit, where weights have no values to check, a chosen member that has weight 0 in `pred` gives NaN.

        Raises:
            ValueError: for another number of members; where a chosen member has weight 0 (it diverged, or was dropped);
                for members that are weighted already, other than by 0.
        """
        usable = usable_members(pred)
        weights = jnp.asarray(self.member_weights)
        if pred.num_members != weights.shape[0]:
            raise ValueError(
                f"`pred` must have the {weights.shape[0]} members that the selection was fitted on, got "
                f"{pred.num_members}. Pass all of them, before pooling, with as many draws each."
            )
        lost = (weights > 0) & ~usable
        if concrete(lost) and lost.any():
            raise ValueError(
                f"`pred` must have the members that were chosen, got members {np.flatnonzero(lost).tolist()} of them "
                "with weight 0. Fit the selection on a predictive of the same state."
            )
        return dataclasses.replace(pred, member_weights=jnp.where(lost, jnp.nan, weights))


def fit_member_selection(
    pred: Predictive, targets: Array, *, num_members: int, weights: Float[Array, "rows"] | None = None
) -> MemberSelection:
    """order_t = argmin_m of mean nll of the equally weighted pool of order_1, ..., order_(t-1) and m.

    Forward selection with replacement from an empty pool: a member chosen twice counts twice. Of equally good members
    the first is chosen. Steps do not depend on `num_members`, so a run with `selection.nll.argmin() + 1` choices is
    the best beginning of a longer one. Members of weight 0 (diverged) are never chosen. Pools are averaged in log
    space; nothing underflows. Hyper-deep ensembles, from settings drawn at random to the few networks that go together
    (Wenzel et al. stop instead once no addition helps, or enough different members are chosen):

        rates = 10 ** jax.random.uniform(key, (20,), minval=-4, maxval=-1)
        method = bc.ensemble(
            lambda own: bc.map_estimate(model, bc.Categorical, optax.adam(own["rate"])), settings={"rate": rates}
        )
        state = bc.fit(method, train, key, epochs=20, batch_size=128).state
        held_out = bc.predict(method, state, validation.inputs, key)
        select = bc.calibrate.fit_member_selection(held_out, validation.targets, num_members=5)
        pred = select(bc.predict(method, state, test.inputs, key))  # the same state and key: the same members and draws

    Args:
        pred: predictive of the validation rows, with its members; those that count must count equally.
        targets: one per row, as the family takes them.
        num_members: how many to choose, repeats counted; at least 1.
        weights: weight of each row; None = ones.

    Returns:
        MemberSelection: weights of all members, the order of choice, and the nll after each.

    Raises:
        TypeError: for something that is not a predictive.
        ValueError: for one member; weighted members; a number below 1; unusable predictions, targets or weights; and
            where every member gives some target probability zero.
    Source: Caruana et al. 2004 (ensemble selection, with replacement); Wenzel et al. 2020 (hyper-deep ensembles).
    """
    usable = usable_members(pred)
    if not isinstance(num_members, Integral) or int(num_members) < 1:
        raise ValueError(f"`num_members` must be a whole number of at least 1, got {num_members!r}. 5 is usual.")
    if pred.num_members < 2:
        raise ValueError(
            "`pred` must have members to choose from, got 1. Pass the predictive of the ensemble, before pooling."
        )
    targets = np.asarray(targets)
    check_counted_rows(pred, targets, weights)
    weights = np.ones(len(targets), np.float32) if weights is None else np.asarray(weights, np.float32)
    order, nll = _choose(pred, jnp.asarray(targets), weights, usable, int(num_members))
    if not np.isfinite(nll[0]):
        raise ValueError(
            "`targets` must have positive probability, got some of probability zero under every member: the nll of each "
            "is infinite. Give impossible classes a finite logit."
        )
    counts = np.bincount(np.asarray(order), minlength=pred.num_members)
    return MemberSelection(jnp.asarray(counts / num_members, jnp.float32), order, nll)


@partial(jax.jit, static_argnames="number")
def _choose(pred, targets, weights, usable, number):
    log_probs = jnp.where((weights == 0)[None], 0, pred.member_log_prob(targets))  # such rows may hold anything
    log_probs = jnp.where(usable[:, None], log_probs, -jnp.inf)
    shares = weights / weights.sum()

    def step(chosen, size):  # chosen: log of the sum of the chosen members' probabilities, per row
        together = jnp.logaddexp(chosen[None], log_probs)
        nll = -(shares[None] * (together - jnp.log(size))).sum(-1)
        best = jnp.where(usable, nll, jnp.inf).argmin()
        return together[best], (best.astype(jnp.int32), nll[best])

    nobody = jnp.full_like(log_probs[0], -jnp.inf)
    return jax.lax.scan(step, nobody, jnp.arange(1, number + 1, dtype=log_probs.dtype))[1]


def check_counted_rows(pred, targets, weights) -> None:
    """Raises unless predictions, targets and row weights are usable; rows of weight 0 may hold any prediction."""
    check_targets_and_weights(pred, targets, weights)
    check_predictive(pred if weights is None else take(pred, np.asarray(weights) > 0))


def usable_members(pred) -> jax.Array:
    """Bool (member,): not weight 0. Raises for what has no members that one could weigh as wholes."""
    if not isinstance(pred, Predictive):
        raise TypeError(f"`pred` must be a predictive, got {type(pred).__name__}. Pass what `predict` returns.")
    if pred.member_weights is None:
        return jnp.ones(pred.num_members, bool)
    given = jnp.asarray(pred.member_weights)
    if given.size != pred.num_members:
        raise ValueError(
            f"`member_weights` must not differ between examples, got shape {given.shape}. Members are chosen as wholes: "
            "take one experiment at a time, or leave the weights out."
        )
    given = given.reshape(-1)
    if concrete(given):
        counted = np.asarray(given)[np.asarray(given) != 0]
        if counted.size and not np.allclose(counted, counted[0], rtol=1e-5):
            raise ValueError(
                f"`member_weights` must be equal or 0, got values from {counted.min()} to {counted.max()}: the choice "
                "would replace them. Pass what `predict` returns."
            )
    return given != 0
