"""Takes a predictive apart: total = aleatoric + epistemic, and an out-of-distribution score, in one jitted pass."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Float

from bayescal.decompose.dirichlet import dirichlet_parts, vacuity
from bayescal.decompose.information import entropy_parts
from bayescal.decompose.normal import moment_matched_information, variance_parts
from bayescal.decompose.rows import row_by_row
from bayescal.predictive import Bernoulli, Categorical, Dirichlet, Gaussian, Predictive, Probabilities, refuse
from bayescal.types import Array


class Uncertainty(NamedTuple):
    """Parts of each prediction's uncertainty; `total` = `aleatoric` + `epistemic` by construction.

    Classes: nats, each of shape (*batch,). Normal distributions: variances in squared unit, (*batch, dim). With another
    `measure`, what that measure says. `ood` has shape (*batch,); higher = more unlike the training data.
    """

    total: Float[Array, "*shape"]
    aleatoric: Float[Array, "*shape"]
    epistemic: Float[Array, "*shape"]
    ood: Float[Array, "*batch"]


def free_energy(pred: Categorical | Bernoulli) -> Float[jax.Array, "*batch"]:
    """Mean over members of -logsumexp(logits), nats; higher = more unlike the training data. See the family's method.

    Raises:
        ValueError: for normalised logits, whose level is gone. TypeError: for a family without logits.
    """
    if not hasattr(pred, "free_energy"):
        refuse(
            type(pred).__name__, "free_energy", "It needs logits; see `scores.max_probability` and `scores.entropy`."
        )
    return pred.free_energy()


DEFAULTS = {
    Categorical: (entropy_parts, free_energy),
    Bernoulli: (entropy_parts, free_energy),
    Gaussian: (variance_parts, moment_matched_information),
    Probabilities: (entropy_parts, Probabilities.entropy),
    Dirichlet: (dirichlet_parts, vacuity),
}


def decompose(
    pred: Predictive,
    *,
    measure: Callable[[Predictive], tuple[jax.Array, jax.Array]] | None = None,
    ood: Callable[[Predictive], jax.Array] | None = None,
) -> Uncertainty:
    """total = aleatoric + epistemic for every example, and an out-of-distribution score, in one jitted pass.

    Large predictives go through in blocks of rows, so that little memory is needed beside them, and on a CPU over all of
    its devices (`bc.use_all_cores()`). Where not even the predictive fits, see `decompose_draws`.

    Args:
        pred: predictive with its members, not pooled. A calibrator whose result has members (its own posterior's, or the
            ensemble's) leaves them to take apart, but no free energy.
        measure: `pred -> (aleatoric, epistemic)`, row by row; default entropy (nats) for classes, variance for normals,
            entropy with the Dirichlet's own share for Dirichlets. Others: `pairwise_parts`, `class_variance_parts`
            (Brier), `zero_one_parts`, `proper_score_parts(entropy)`, `entropy_bound_parts` (normals).
        ood: `pred -> (*batch,)`, row by row, higher = more unlike the training data; default free energy for raw logits, the
            pool's entropy for probabilities and calibrated members, `moment_matched_information` for normals, vacuity for
            Dirichlets. A function that is made anew for every call, such as a `partial` or a lambda in the call, compiles
            anew for every call.

    Raises:
        TypeError: for a family without defaults, when `measure` or `ood` is left out.
        ValueError: for a pooled or calibrated predictive of one member, whose parts are gone.
    """
    check_raw(pred)
    if type(pred) not in DEFAULTS and (measure is None or ood is None):
        families = ", ".join(family.__name__ for family in DEFAULTS)
        raise TypeError(
            f"`pred` must be a predictive ({families}), got {type(pred).__name__}. "
            "Wrap logits as `Categorical(logits)`, member axis first."
        )
    default_measure, default_ood = DEFAULTS.get(type(pred), (measure, ood))
    if getattr(pred, "normalised", False):
        default_ood = type(pred).entropy
    aleatoric, epistemic, score = row_by_row(_parts, pred, measure or default_measure, ood or default_ood)
    return Uncertainty(aleatoric + epistemic, aleatoric, epistemic, score)


def _parts(pred, measure, ood):
    return *measure(pred), ood(pred)


def check_raw(pred) -> None:
    """Raises for a pooled or calibrated predictive of one member."""
    if getattr(pred, "normalised", False) and pred.num_members == 1:
        raise ValueError(
            "`pred` must have raw members, got a pooled or calibrated one: its members and energies are gone. "
            "Decompose before pooling and calibrating."
        )
