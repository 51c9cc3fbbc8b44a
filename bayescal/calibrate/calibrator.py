"""What every calibrator is, and chains of them."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.predictive import (
    Bernoulli,
    Categorical,
    Predictive,
    Probabilities,
    check_predictive,
    check_targets_and_weights,
    take,
    undefined_where,
)
from bayescal.types import Array, pytree

Classes = Categorical | Probabilities | Bernoulli


class Calibrator:
    """A fitted map as a value: `calibrator(pred) -> Predictive`, a pytree that jit, vmap and `bc.save` take.

    A new calibrator is a pytree with `__call__` and a function `fit_<noun>(pred, targets, *, ...)` that returns it. The
    pool is calibrated, never the members (unless its name says so), and the result has one member.

    accuracy_preserving: the most probable class never changes, ties aside.
    needs: what it takes besides the predictive, by name: "features" (of the rows of the fit, and of every row it is used
        on: `calibrator(pred, features=...)`), "unlabelled" (rows without targets, for the fit alone).
    """

    accuracy_preserving: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, pred: Predictive, **given: Any) -> Predictive:
        """The calibrated predictive, of the family that came in where it can be."""
        raise NotImplementedError


@pytree
class Composition(Calibrator):
    """One calibrator after another: steps[-1](...steps[0](pred)).

    Args:
        steps: in the order of use.
    """

    steps: tuple[Any, ...]

    @property
    def accuracy_preserving(self) -> bool:  # type: ignore[override]
        """Whether every step is."""
        return all(step.accuracy_preserving for step in self.steps)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What any step needs."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.needs))

    def __call__(self, pred: Predictive, **given: Any) -> Predictive:
        """The predictive after the last step.

        Args:
            pred: what the first step takes.
            given: such as `features`; each step gets what it needs.
        """
        for step in self.steps:
            pred = step(pred, **{name: value for name, value in given.items() if name in step.needs})
        return pred


def compose(*steps: Calibrator) -> Composition:
    """Chain of fitted calibrators, used from the first to the last.

    Fit each on what the one before gives: Mix-n-Match's isotonic after temperature is

        scaler = bc.fit_temperature(pred, targets)
        chain = bc.compose(scaler, bc.calibrate.fit_isotonic(scaler(pred), targets))

    Raises:
        ValueError: for no step.
        TypeError: for a step that is no calibrator.
    """
    if not steps:
        raise ValueError("`steps` must be at least one calibrator, got none. Pass them in the order of use.")
    for step in steps:
        if not isinstance(step, Calibrator):
            raise TypeError(
                f"`steps` must be fitted calibrators, got {type(step).__name__}. Pass what `fit_temperature` and kin return."
            )
    return Composition(tuple(steps))


def concrete(*values) -> bool:
    """Whether all values can be looked at: none is traced by jit, vmap or grad."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def check_classes(pred) -> None:
    """Raises unless `pred` is a predictive over classes."""
    if not isinstance(pred, Categorical | Probabilities | Bernoulli):
        raise TypeError(
            f"`pred` must be a predictive over classes (Categorical, Probabilities or Bernoulli), got {type(pred).__name__}. "
            "For regression use `fit_variance_scaling` or `fit_quantile_map`."
        )


def pooled_log_probs(pred: Classes, classes: int | None = None) -> jax.Array:
    """Log-probabilities (*batch, classes) of the pool, nats: what calibrators of classes work on.

    Args:
        pred: predictive over classes.
        classes: of the fit, where the map belongs to their number; None = any number.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for another number of classes than in the fit.
    """
    check_classes(pred)
    log_probs = pred.log_probs()
    if classes is not None and log_probs.shape[-1] != classes:
        raise ValueError(
            f"`pred` must have the {classes} classes of the fit, got {log_probs.shape[-1]}. Use the same network, or fit a "
            "calibrator for these classes."
        )
    return log_probs


def rows_for_fit(pred: Classes, targets: Array, weights: Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities (rows, classes) of the pool, targets (rows,) and row weights (rows,), checked where they can be.

    Rows of weight 0 may hold any prediction: they come back as uniform with target 0. Where labels are traced, one that is
    no class makes its row NaN.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable predictions, targets or weights, or more than one batch axis.
    """
    check_classes(pred)
    if len(pred.batch_shape) != 1:
        raise ValueError(
            f"`pred` must have one batch axis, got batch shape {pred.batch_shape}. Flatten the rows, or `jax.vmap` the fit "
            "over experiments."
        )
    if concrete(pred, targets, weights):
        targets = np.asarray(targets)
        check_targets_and_weights(pred, targets, weights)
        check_predictive(pred if weights is None else take(pred, np.asarray(weights) > 0))
    elif jnp.shape(targets) != pred.batch_shape or not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(
            f"`targets` must be integer labels of shape {pred.batch_shape}, got {jnp.result_type(targets)} "
            f"{jnp.shape(targets)}. Pass one label per row."
        )
    weights = jnp.ones(pred.batch_shape) if weights is None else jnp.asarray(weights, jnp.float32)
    log_probs, counted = pooled_log_probs(pred), weights > 0
    uniform = -jnp.log(jnp.float32(log_probs.shape[-1])).astype(log_probs.dtype)
    log_probs = jnp.where(counted[:, None], log_probs, uniform)
    targets = jnp.where(counted, jnp.asarray(targets, jnp.int32), 0)
    outside = (targets < 0) | (targets >= log_probs.shape[-1])
    return undefined_where(outside[:, None], log_probs), targets, weights


def require_possible(log_probs, targets, weights) -> None:
    """Raises where a target that counts has probability zero: its nll is infinite whatever the map."""
    if not concrete(log_probs, targets, weights):
        return
    chosen = jnp.take_along_axis(log_probs, targets[:, None], -1)[:, 0]
    lost = int((jnp.isneginf(chosen) & (weights > 0)).sum())
    if lost:
        raise ValueError(
            f"`targets` must have positive probability, got {lost} of {len(targets)} of probability zero: their nll is "
            "infinite under every map. Pass `bc.calibrate.clip_probabilities(pred, 1e-12)`."
        )


def require_every_class(targets, weights, classes: int) -> None:
    """Raises unless every class is the target of some row that counts."""
    if not concrete(targets, weights):
        return
    seen = np.bincount(np.asarray(targets)[np.asarray(weights) > 0], minlength=classes) > 0
    if not seen.all():
        missing = np.flatnonzero(~seen)
        raise ValueError(
            f"`targets` must hold every one of the {classes} classes, got none of {missing[:10].tolist()}. Use more "
            "calibration rows, or a map with one parameter for all classes (`fit_temperature`)."
        )


def like(pred: Classes, log_probs: jax.Array) -> Categorical | Bernoulli:
    """Normalised log-probabilities (*batch, classes) as a predictive of one member: Bernoulli for Bernoulli, else
    Categorical.
    """
    if isinstance(pred, Bernoulli):
        return Bernoulli((log_probs[..., 1] - log_probs[..., 0])[None], normalised=True)
    return Categorical(log_probs[None], normalised=True)


def clip_probabilities(pred: Classes, least: float) -> Categorical:
    """log max(p, least) as logits of one member, not normalised again: the pool with no class impossible.

    softmax(log max(p, least) / T) is what temperature scaling of recorded probabilities is quoted for. Of what the clip
    changes, `pred.pooled_mean()` sums to more than one by at most classes * least before the softmax.

    Args:
        pred: predictive over classes.
        least: smallest probability, in (0, 1 / classes).

    Raises:
        ValueError: for a least probability outside (0, 1 / classes).
    """
    log_probs = pooled_log_probs(pred)
    if not 0 < least < 1 / log_probs.shape[-1]:
        raise ValueError(
            f"`least` must lie in (0, 1 / classes), got {least!r} for {log_probs.shape[-1]} classes. 1e-12 is usual."
        )
    return Categorical(jnp.maximum(log_probs, np.log(least).astype(log_probs.dtype))[None], normalised=True)
