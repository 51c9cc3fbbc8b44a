"""Several scores as one: different scores on a common scale, and the same score of every member of an ensemble."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from bayescal.predictive import float32_or_wider, normalised_weights, weighted_sum
from bayescal.scores.features import refuse_explicit
from bayescal.scores.heads import as_pytree
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
    """Weighted mean over members of each one's own score: `fitted(features) -> (rows,)`.

    Args:
        fitted: the members' fitted scores, leaves stacked on a leading member axis, NaN for those of weight 0.
        member_weights: what each member counts; 0 = left out.
    """

    fitted: Callable
    member_weights: Float[Array, "member"]

    def __call__(self, features: Float[Array, "member rows features"]) -> Float[jax.Array, "rows"]:
        """The unit of the score; higher = more unlike the training data. NaN where it is for a member that counts.

        Raises:
            ValueError: for another number of members than the fit's.
        """
        refuse_explicit(features)
        members = len(self.member_weights)
        if features.ndim != 3 or len(features) != members:
            raise ValueError(
                f"`features` must have shape ({members}, rows, features), got "
                f"{tuple(features.shape)}. Pass those of the members that were fitted, in their order."
            )
        return _mean_score(self, features)


def fit_combination(scores: Float[Array, "score rows"], *, weights: Float[Array, "score"] | None = None) -> Combination:
    """sum_s w_s (score_s - mean_s) / spread_s, means and standard deviations those of in-distribution validation rows.

    Standard deviations, of any sign; higher = more unlike the training data. Unchanged by positive affine maps of any of the
    scores. Not fitted on the rows that the scores themselves were fitted on, for which they are too low.

    Args:
        scores: of the validation rows, each higher = more unlike the training data.
        weights: what each counts, none negative; None = ones.

    Raises:
        ValueError: for no scores, scores that are not finite or all equal in float32, and weights of another shape, negative,
            infinite or all zero.
    """
    given = _float32(scores)
    if given.ndim != 2 or not given.shape[0] or given.shape[1] < 2 or not np.isfinite(given).all():
        raise ValueError(
            "`scores` must be finite and of shape (score, rows) with at least one score and two rows, got shape "
            f"{given.shape} with {int((~np.isfinite(given)).sum())} values that are not finite in float32. Leave rows without "
            "a score out."
        )
    own = np.ones(len(given)) if weights is None else _float32(weights)
    if own.shape != given.shape[:1] or not np.isfinite(own).all() or (own < 0).any() or not own.any():
        raise ValueError(
            f"`weights` must be {len(given)} finite numbers, none negative and not all zero, got {own.tolist()}. "
            "To turn a score round, negate it."
        )
    mean, spread = given.mean(1), given.std(1)
    flat = np.flatnonzero(~(spread >= np.finfo(np.float32).tiny) | (np.ptp(given, axis=1) == 0))
    if flat.size:
        raise ValueError(
            f"`scores` must vary over the validation rows, got the same value for all in score {flat[0]}. Leave it out, or "
            "give it in a unit in which its values differ in float32."
        )
    return Combination(*(jnp.asarray(x, jnp.float32) for x in (mean, spread, own)))


def fit_members(
    fit: Callable[..., Any],
    *arguments: Any,
    member_weights: Float[Array, "member"] | Bool[Array, "member"] | None = None,
) -> MemberScores:
    """sum_s w_s fit(arguments of member s)(features of member s) / sum_s w_s: any score of features, for an ensemble.

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
        member_weights: what each member counts, none negative; 0 = left out: it is not fitted, and may be NaN. None = all
            alike. Of an ensemble that trained, `state.alive`.

    Raises:
        ValueError: for leaves without a common member axis; weights of another shape, negative, infinite or all zero;
            members whose scores are not of one structure, as where `fit` makes a head; and what `fit` raises, with the
            member named.
        TypeError: for what is no score, and what `fit` raises, likewise.
    """
    arguments = fetch(arguments)  # trained networks are where they were trained, features on one device
    sizes = sorted({np.shape(leaf)[:1] for leaf in jax.tree.leaves(arguments)})
    if len(sizes) != 1 or not any(sizes[0]):
        raise ValueError(
            f"`arguments` must be arrays with one leading member axis, got leading axes {sizes}. "
            "Close over what members share: `lambda features: fit(features, labels)`; a head is "
            "`Partial(model_head, variables)`, variables stacked."
        )
    number = sizes[0][0]
    weights = np.ones(number) if member_weights is None else _float32(member_weights)
    if weights.shape != (number,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"`member_weights` must be {number} finite numbers, none negative and not all zero, got {weights.tolist()}. Give "
            "one per member, 0 for those to be left out."
        )
    fitted = {}
    for member in np.flatnonzero(weights).tolist():
        try:
            own = fit(*jax.tree.map(lambda x, s=member: x[s], arguments))
            fitted[member] = as_pytree(own, "fit(...)", "Give a fitted score")
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"Member {member}: {error}") from error
    _check_alike(fitted)
    left_out = jax.tree.map(_nothing, next(iter(fitted.values())))
    every = [fitted.get(member, left_out) for member in range(number)]
    return MemberScores(jax.tree.map(lambda *own: jnp.stack(own), *every), jnp.asarray(weights, jnp.float32))


def _check_alike(fitted):
    """Raises unless all members' scores have one structure, functions included, and arrays of the same shapes."""
    (first, expected), *others = fitted.items()
    shapes = lambda score: [np.shape(leaf) for leaf in jax.tree.leaves(score)]
    for member, score in others:
        if jax.tree.structure(score) != jax.tree.structure(expected):
            raise ValueError(
                f"`fit` must give all members one structure, got member {member} unlike member {first}: a function that is "
                "made inside `fit`, such as a head, or another setting. Pass a head as an argument, `Partial(model_head, "
                "variables)`, its leaves stacked over members."
            )
        if shapes(score) != shapes(expected):
            raise ValueError(
                f"`fit` must give all members arrays of the same shapes, got {shapes(score)} for member {member} and "
                f"{shapes(expected)} for member {first}. Fit all on as many rows and classes."
            )


def _nothing(leaf):
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf


def _float32(values):
    """Rounded to float32, in which scores are combined, and held in float64; infinite where float32 cannot hold them."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32).astype(np.float64)


@jax.jit
def _mean_score(fitted, features):
    scores = jax.lax.map(lambda own: own[0](own[1]), (fitted.fitted, features))
    return weighted_sum(scores, normalised_weights(fitted.member_weights, len(features), 1))
