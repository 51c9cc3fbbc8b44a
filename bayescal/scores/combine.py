"""Several scores as one: different scores on a common scale, and the same score of every member of an ensemble."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.predictive import float32_or_wider
from bayescal.sharding import fetch
from bayescal.types import Array, pytree


@pytree
class Combination:
    """Weighted sum of standardised scores: `fitted(scores) -> (rows,)`.

    Args:
        mean: of each score on the rows of the fit.
        spread: standard deviation there.
        weights: what each counts once standardised.
    """

    mean: Float[Array, "score"]
    spread: Float[Array, "score"]
    weights: Float[Array, "score"]

    def __call__(self, scores: Float[Array, "score rows"]) -> Float[jax.Array, "rows"]:
        """Standard deviations, of any sign; higher = more unlike the training data. NaN where one of the scores is.

        Raises:
            ValueError: for another number of scores than the fit's.
        """
        if scores.ndim != 2 or len(scores) != len(self.mean):
            raise ValueError(
                f"`scores` must have shape ({len(self.mean)}, rows), the scores in the order of the fit, got "
                f"{tuple(scores.shape)}. Join them by `jnp.stack([first, second])`."
            )
        standard = (float32_or_wider(scores) - self.mean[:, None]) / self.spread[:, None]
        return (self.weights[:, None] * standard).sum(0)


@pytree
class MemberScores:
    """Mean over members of each one's own score: `fitted(features) -> (rows,)`.

    Args:
        fitted: the members' fitted scores, leaves stacked on a leading member axis.
    """

    fitted: Callable

    def __call__(self, features: Float[Array, "member rows features"]) -> Float[jax.Array, "rows"]:
        """The unit of the score; higher = more unlike the training data. NaN where it is for one member.

        Raises:
            ValueError: for another number of members than the fit's.
        """
        members = jax.tree.leaves(self.fitted)[0].shape[0]
        if features.ndim != 3 or len(features) != members:
            raise ValueError(
                f"`features` must have shape ({members}, rows, features), got "
                f"{tuple(features.shape)}. Pass those of the members that were fitted, in their order."
            )
        return _mean_score(self.fitted, features)


def fit_combination(scores: Float[Array, "score rows"], *, weights: Float[Array, "score"] | None = None) -> Combination:
    """sum_s w_s (score_s - mean_s) / spread_s, means and standard deviations those of in-distribution validation rows.

    Standard deviations, of any sign; higher = more unlike the training data. Unchanged by positive affine maps of any of the
    scores. Not fitted on the rows that the scores themselves were fitted on, for which they are too low.

    Args:
        scores: of the validation rows, each higher = more unlike the training data.
        weights: what each counts, none negative; None = ones.

    Raises:
        ValueError: for scores that are not finite or all equal, weights of another shape, negative, infinite or all zero.
    """
    given = np.asarray(scores, np.float64)
    if given.ndim != 2 or given.shape[1] < 2 or not np.isfinite(given).all():
        raise ValueError(
            f"`scores` must be finite and of shape (score, rows) with at least two rows, got shape {given.shape} with "
            f"{int((~np.isfinite(given)).sum())} values that are not finite. Leave rows without a score out."
        )
    own = np.ones(len(given)) if weights is None else np.asarray(weights, np.float64)
    if own.shape != given.shape[:1] or not np.isfinite(own).all() or (own < 0).any() or not own.any():
        raise ValueError(
            f"`weights` must be {len(given)} finite numbers, none negative and not all zero, got {own.tolist()}. "
            "To turn a score round, negate it."
        )
    mean, spread = given.mean(1), given.std(1)
    flat = np.flatnonzero(np.ptp(given, axis=1) == 0)
    if flat.size:
        raise ValueError(
            f"`scores` must vary over the validation rows, got the same value for all in score {flat[0]}. Leave it out."
        )
    return Combination(*(jnp.asarray(x, jnp.float32) for x in (mean, spread, own)))


def fit_members(fit: Callable[..., Any], *arguments: Any) -> MemberScores:
    """mean_s fit(arguments of member s)(features of member s): any score of features, for an ensemble.

    Every argument has a leading member axis; what members share, `fit` closes over. Members are fitted and scored one after
    another. The mean is that of raw scores, so a member of larger spread counts for more: of free energies it is what
    `free_energy` is for logits.

        fit_members(lambda features: fit_mahalanobis(features, labels, ridge=1e-6), features)
        fit_members(lambda features, head: fit_vim(features, head, dim=32), features, Partial(model_head, variables))
        fit_members(lambda head: ash_s(head, quantile=0.9), Partial(model_head, variables))

    Args:
        fit: one member's arguments -> its fitted score.
        arguments: arrays or pytrees of arrays, leaves stacked on a leading member axis; a head as
            `jax.tree_util.Partial(model_head, variables)`.

    Raises:
        ValueError: for leaves without a common member axis, and what `fit` raises, with the member named.
    """
    arguments = fetch(arguments)  # trained networks are where they were trained, features on one device
    leaves = jax.tree.leaves(arguments)
    sizes = sorted({np.shape(leaf)[:1] for leaf in leaves})
    if len(sizes) != 1 or not any(sizes[0]):
        raise ValueError(
            f"`arguments` must be arrays with one leading member axis, got leading axes {sizes}. "
            "Close over what members share: `lambda features: fit(features, labels)`; a head is "
            "`Partial(model_head, variables)`, variables stacked."
        )
    fitted = []
    for member in range(sizes[0][0]):
        try:
            fitted.append(fit(*jax.tree.map(lambda x, s=member: x[s], arguments)))
        except ValueError as error:
            raise ValueError(f"Member {member}: {error}") from error
    return MemberScores(jax.tree.map(lambda *own: jnp.stack(own), *fitted))


@jax.jit
def _mean_score(fitted, features):
    return jax.lax.map(lambda own: own[0](own[1]), (fitted, features)).mean(0)
