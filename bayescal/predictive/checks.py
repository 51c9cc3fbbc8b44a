"""Checks of predictives and targets on the host, for whoever takes them from a user."""

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.predictive.axes import Predictive
from bayescal.predictive.gaussian import Gaussian


def check_rows(pred: Predictive, targets, weights) -> None:
    """Raises unless predictions, targets and row weights belong together and are usable."""
    if not targets.size:
        raise ValueError("`targets` must have at least one row, got none. Check how the data were split.")
    if pred.batch_shape != targets.shape[:1]:
        raise ValueError(
            f"`pred` must have batch shape {targets.shape[:1]} like `targets`, got {pred.batch_shape} from leaves "
            f"{[tuple(x.shape) for x in jax.tree.leaves(pred)]}, member axis first. "
            + (
                "Of experiments take one at a time: `bc.take(pred, e)`."
                if len(pred.batch_shape) == 2
                else "For one network add the member axis: `logits[None]`."
            )
        )
    pred.check_targets(targets)
    check_predictive(pred)
    if weights is not None:
        given = np.asarray(weights)
        if given.shape != targets.shape[:1] or not np.isfinite(given).all() or (given < 0).any() or not given.any():
            raise ValueError(
                f"`weights` must be one finite non-negative number per row, {targets.shape[:1]}, not all zero, got "
                f"shape {given.shape}. Leave them out for equal weights."
            )


def check_predictive(pred: Predictive) -> None:
    """Raises where a member that counts is NaN or infinite, has no possible class or no positive variance, and for
    unusable member weights."""
    if pred.member_weights is not None:
        given = np.asarray(pred.member_weights)
        if not np.isfinite(given).all() or (given < 0).any() or not (given.sum(0) > 0).all():
            raise ValueError(
                "`member_weights` must be finite, not negative and not all zero for any example, got values from "
                f"{given.min()} to {given.max()}. Give every example at least one member."
            )
    undefined, variance = (np.asarray(x) for x in _bad_rows(pred))
    if undefined.any():
        raise ValueError(
            f"`pred` must not hold NaN, +infinity or examples without a possible class, got some in {int(undefined.sum())} "
            f"of {undefined.size} examples, first at {int(undefined.ravel().argmax())}. "
            "Look for members that diverged, or inputs that were not finite."
        )
    if variance.any():
        raise ValueError(
            f"`variance` must be positive, got zero or less in {int(variance.sum())} of {variance.size} examples, first at "
            f"{int(variance.ravel().argmax())}. Pass variances, not log-variances."
        )


@jax.jit
def _bad_rows(pred):
    counted = jnp.broadcast_to(pred.weights(), (pred.num_members, *pred.batch_shape)) != 0
    if isinstance(pred, Gaussian):
        parts = [x for x in (pred.mean, pred.variance, pred.mean_variance) if x is not None]
        undefined = sum((~jnp.isfinite(x)).any(-1) for x in parts) > 0
        variance = (pred.variance <= 0).any(-1) | (
            False if pred.mean_variance is None else (pred.mean_variance < 0).any(-1)
        )
        return (undefined & counted).any(0), (variance & counted).any(0)
    logits = pred.logits if pred.logits.ndim > counted.ndim else pred.logits[..., None]
    impossible = (logits == -jnp.inf).all(-1) & (logits.shape[-1] > 1)
    undefined = (jnp.isnan(logits) | (logits == jnp.inf)).any(-1) | impossible
    return (undefined & counted).any(0), jnp.zeros(counted.shape[1:], bool)
