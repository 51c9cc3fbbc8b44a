"""Stacking: member weights that make the pool of held-out rows most probable."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import Calibrator, concrete
from bayescal.calibrate.proportions import STEPS, mixture_proportions
from bayescal.calibrate.selection import MemberSelection, check_counted_rows, usable_members
from bayescal.predictive import Predictive
from bayescal.types import Array, pytree

CONVERGED = 1e-3


@pytree
class Stacking(Calibrator):
    """Member weights on the simplex: `stacking(pred) -> pred` with those weights, and its members as they were.

    The order is: weigh the members, then pool, then calibrate (`fit_temperature` of what it gives), if at all.

    Args:
        member_weights: non-negative, of sum 1; 0 = the member does not help.
        nll: of the pool on the rows of the fit, mean nats per row; lower is better.
        gap: how much lower the best weights' nll can be at most, nats.
    """

    accuracy_preserving: ClassVar[bool] = False

    member_weights: Float[Array, "member"]
    nll: Float[Array, ""]
    gap: Float[Array, ""]

    def __call__(self, pred: Predictive) -> Predictive:
        """The same members with the weights found. The members must be those of the fit, in their order.

        Raises:
            ValueError: for another number of members; where a member that counts has weight 0 (it diverged, or was
                dropped); for members that are weighted already, other than by 0.
        """
        return MemberSelection(self.member_weights, jnp.zeros(0, jnp.int32), jnp.zeros(0))(pred)


def fit_stacking(pred: Predictive, targets: Array, *, weights: Float[Array, "rows"] | None = None) -> Stacking:
    """argmin_w of mean -log sum_m w_m p_m(y), w on the simplex.

    Concave in w, and EM climbs it at every step: w_m <- w_m mean_i p_m(y_i) / sum_j w_j p_j(y_i). The members' own
    predictions are left as they are: stacking mends what differs between members, not what they share. On the training
    rows it rewards over-fitting: use rows that trained no member. Of any family with members; of densities too.

    Args:
        pred: predictive of the validation rows, with its members; those of weight 0 (diverged) stay out.
        targets: one per row, as the family takes them.
        weights: weight of each row; None = ones.

    Returns:
        Stacking: as `MemberSelection` is used. `fit_member_selection` chooses whole members, a few at a time.

    Raises:
        ValueError: for one member; members weighted other than by 0, or row by row; unusable predictions, targets or
            weights; and where every member gives some target probability zero.
    Source: Wolpert 1992; Yao et al. 2018, equation 4, for log scores (recalled). The bound on the gap is ours.
    """
    if pred.num_members < 2:
        raise ValueError(
            "`pred` must have members to weigh, got 1. Pass the predictive of the ensemble, before pooling."
        )
    usable = usable_members(pred)
    if concrete(pred, targets, weights):
        check_counted_rows(pred, np.asarray(targets), weights)
    weights = jnp.ones(pred.batch_shape) if weights is None else jnp.asarray(weights, jnp.float32)
    found = mixture_proportions(pred.member_log_prob(jnp.asarray(targets)), weights, usable.astype(jnp.float32))
    if concrete(found):
        if not np.isfinite(found.log_density):
            raise ValueError(
                "`targets` must have positive probability, got some of probability zero under every member: the nll of "
                "each is infinite. Give impossible classes a finite logit."
            )
        if not found.gap < CONVERGED:
            raise ValueError(
                f"`pred` must let the weights converge in {STEPS} steps, got weights whose nll may be {found.gap:.3g} nats "
                "from the best. Drop members that are nearly alike, or use `fit_member_selection`."
            )
    return Stacking(found.shares, -found.log_density, found.gap)
