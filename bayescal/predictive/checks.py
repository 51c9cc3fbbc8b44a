"""Checks of predictives and targets on the host, for whoever takes them from a user."""

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.predictive.axes import Predictive
from bayescal.predictive.dirichlet import Dirichlet
from bayescal.predictive.gaussian import Gaussian
from bayescal.predictive.mixture import float32_or_wider
from bayescal.predictive.probabilities import Probabilities

SUM_TOLERANCE = 1e-3  # how far the probabilities of a row may sum from one: float16 and text files with three decimals


def check_rows(pred: Predictive, targets, weights) -> None:
    """Raises unless predictions, targets and row weights belong together and are usable."""
    check_targets_and_weights(pred, targets, weights)
    check_predictive(pred)


def check_targets_and_weights(pred: Predictive, targets, weights) -> None:
    """Raises unless targets and row weights fit the shape of the predictive, whose values are not looked at."""
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
    if weights is not None:
        given = np.asarray(weights)
        if given.shape != targets.shape[:1] or not np.isfinite(given).all() or (given < 0).any() or not given.any():
            raise ValueError(
                f"`weights` must be one finite non-negative number per row, {targets.shape[:1]}, not all zero, got "
                f"shape {given.shape}. Leave them out for equal weights."
            )
        if not 1e-12 <= given.max() <= 1e12:
            raise ValueError(
                "`weights` must be largest between 1e-12 and 1e12, so that their squares are numbers in float32, got a "
                f"largest of {given.max():g}. Divide them by their mean: only their ratios count."
            )


def check_predictive(pred: Predictive, first: int = 0) -> None:
    """Raises where a member that counts is NaN or infinite, has no possible class, no positive variance or no
    probabilities, and for unusable member weights.

    Args:
        pred: the predictive, or a chunk of it.
        first: the chunk's first row, for the message.
    """
    if pred.member_weights is not None:
        given = np.asarray(pred.member_weights)
        if not np.isfinite(given).all() or (given < 0).any() or not (given.sum(0) > 0).all():
            raise ValueError(
                "`member_weights` must be finite, not negative and not all zero for any example, got values from "
                f"{given.min()} to {given.max()}. Give every example at least one member."
            )
    with jax.ensure_compile_time_eval():  # a jit around the caller may have closed over what is looked at here
        if all_good(pred):
            return
        undefined, wrong = (np.asarray(x) for x in _bad_rows(pred))
    if undefined.any():
        raise ValueError(
            f"`pred` must not hold NaN, +infinity or examples without a possible class, got some in {int(undefined.sum())} "
            f"of {undefined.size} examples, first at {first + int(undefined.ravel().argmax())}. "
            "Look for members that diverged, or inputs that were not finite."
        )
    if not wrong.any():
        return
    place = f"in {int(wrong.sum())} of {wrong.size} examples, first at {first + int(wrong.ravel().argmax())}"
    if isinstance(pred, Gaussian):
        raise ValueError(
            f"`variance` must be positive and `mean_variance` not negative, got others {place}. Pass variances, not "
            "log-variances."
        )
    if isinstance(pred, Dirichlet):
        raise ValueError(
            f"`concentration` must be positive, got zero or less {place}. Add one to evidence; take exp of logits."
        )
    raise ValueError(
        f"`probs` must lie in [0, 1] and sum to one within {SUM_TOLERANCE:g} over the classes, got others {place}. "
        "If these are logits, say so: `Categorical(logits)`, or the name `logits` in a file. Nothing is guessed or "
        "normalised."
    )


@jax.jit
def all_good(pred):
    """Whether sums show at a third of the cost of `_bad_rows` that it would find nothing. False says nothing.

    Sums, not least and largest values: those lose NaN on CPU where the array is large (jax 0.10.2 and 0.12.0).
    """
    if isinstance(pred, Probabilities):
        probs = float32_or_wider(pred.probs)
        total = jnp.matmul(probs, jnp.ones(probs.shape[-1], probs.dtype), precision="highest")
        # A sum bounds its non-negative terms. Half the tolerance: sums in two orders may differ by rounding.
        in_range = (probs.min() >= 0) & (total.min() >= 1 - SUM_TOLERANCE / 2) & (total.max() <= 1 + 1e-6)
        return in_range & jnp.isfinite(total.sum())
    if isinstance(pred, Gaussian):
        return False
    if isinstance(pred, Dirichlet):
        return (pred.concentration.min() > 0) & jnp.isfinite(float32_or_wider(pred.concentration).sum())
    return jnp.isfinite(float32_or_wider(pred.logits).sum())


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
    if isinstance(pred, Dirichlet):
        undefined = ~jnp.isfinite(pred.concentration).all(-1)
        return (undefined & counted).any(0), ((pred.concentration <= 0).any(-1) & counted).any(0)
    if isinstance(pred, Probabilities):
        probs = jnp.asarray(pred.probs)
        total = float32_or_wider(probs).sum(-1)
        wrong = (probs < 0).any(-1) | (probs > 1 + 1e-6).any(-1) | (abs(total - 1) > SUM_TOLERANCE)
        return (~jnp.isfinite(total) & counted).any(0), (wrong & counted).any(0)
    logits = pred.logits if pred.logits.ndim > counted.ndim else pred.logits[..., None]
    impossible = (logits == -jnp.inf).all(-1) & (logits.shape[-1] > 1)
    undefined = (jnp.isnan(logits) | (logits == jnp.inf)).any(-1) | impossible
    return (undefined & counted).any(0), jnp.zeros(counted.shape[1:], bool)
