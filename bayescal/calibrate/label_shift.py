"""Label shift: classes have become more or less frequent, and rows of a class look as they did."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    check_classes,
    concrete,
    like,
    pooled_log_probs,
    require_every_class,
    rows_for_fit,
)
from bayescal.calibrate.proportions import STEPS, mixture_proportions
from bayescal.predictive import Bernoulli, Categorical, check_predictive
from bayescal.types import Array, pytree

SINGULAR = 1e-4


@pytree
class PriorShift(Calibrator):
    """p'(k | x) prop. to p(k | x) target_prior_k / source_prior_k: the pool, corrected for new class frequencies.

    Args:
        source_prior: class frequencies that the predictive was made for, of sum 1.
        target_prior: those of the new rows; 0 = the class does not occur.
        gap: nats per row by which the EM's log-likelihood may be below its maximum; NaN where the prior was not found by EM.
        estimated: whether the new frequencies were found from unlabelled rows, or known.
    """

    accuracy_preserving: ClassVar[bool] = False

    source_prior: Float[Array, "classes"]
    target_prior: Float[Array, "classes"]
    gap: Float[Array, ""]
    estimated: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Unlabelled rows, where the new frequencies were estimated."""
        return ("unlabelled",) if self.estimated else ()

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool under the new frequencies; NaN where it has no class left.

        Raises:
            TypeError: for a predictive that is not over classes.
            ValueError: for another number of classes.
        """
        log_probs = pooled_log_probs(pred)
        _check_prior_shape("pred", (log_probs.shape[-1],), self.source_prior.shape[-1])
        shifted = log_probs + jnp.log(self.target_prior) - jnp.log(self.source_prior)
        return like(pred, jax.nn.log_softmax(shifted))


def prior_shift(source_prior: Float[Array, "classes"], target_prior: Float[Array, "classes"]) -> PriorShift:
    """p'(k | x) prop. to p(k | x) target_prior_k / source_prior_k, both priors known.

    Needs no unlabelled rows.

    Args:
        source_prior: class frequencies of the training rows, positive, of sum 1.
        target_prior: those of the new rows, of sum 1; 0 = the class does not occur.

    Raises:
        ValueError: for priors that are none, or of different length.
    """
    source, target = _check_prior("source_prior", source_prior, True), _check_prior("target_prior", target_prior, False)
    _check_prior_shape("target_prior", target.shape, len(source))
    return PriorShift(source, target, jnp.float32(jnp.nan), estimated=False)


def fit_label_shift_em(
    pred: Classes, *, source_prior: Float[Array, "classes"], weights: Float[Array, "rows"] | None = None
) -> PriorShift:
    """argmax_q of mean log sum_k q_k p(k | x) / source_prior_k over unlabelled rows, by EM.

    Needs unlabelled rows of the target, as predicted by a calibrated network: what is wrong with p comes out as a shift
    (calibrate on source rows first, best with `fit_vector`, which mends each class). No labels. The mean is concave in q and
    every step raises it.

    Args:
        pred: predictive of the unlabelled target rows.
        source_prior: class frequencies of the training rows, positive, of sum 1.
        weights: weight of each row; None = ones.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for a prior that is none, unusable predictions or weights, no convergence.
    Source: Saerens, Latinne and Decaestecker 2002; Alexandari et al. 2020 for calibrating first (recalled).
    """
    check_classes(pred)
    if concrete(pred, weights):
        rows_for_fit(pred, np.zeros(pred.batch_shape, np.int32), weights)
    log_probs = pooled_log_probs(pred)
    prior = _check_prior("source_prior", source_prior, True)
    _check_prior_shape("source_prior", prior.shape, log_probs.shape[-1])
    weights = jnp.ones(pred.batch_shape) if weights is None else jnp.asarray(weights, jnp.float32)
    found = mixture_proportions((log_probs - jnp.log(prior)).T, weights, prior)
    if concrete(found) and not found.gap < 1e-3:
        raise ValueError(
            f"`pred` must tell the classes apart, got proportions {float(found.gap):.3g} nats from the best after {STEPS} "
            "steps. Merge classes, or use `fit_label_shift_bbse`."
        )
    return PriorShift(prior, found.shares, found.gap)


def fit_label_shift_bbse(
    pred: Classes,
    targets: Int[Array, "rows"],
    unlabelled: Classes,
    *,
    weights: Float[Array, "rows"] | None = None,
    least: float | None = None,
) -> PriorShift:
    """q = C^-1 mu, C_jk = P(top class is j | label k) on source rows, mu_j = P(top class is j) on unlabelled target rows.

    Needs labelled source rows and unlabelled target rows. p need not be calibrated to find q; it must be for what comes out
    to be. The source prior is the labels' frequencies in `targets`. Noise can make shares of rare classes negative; nothing
    is clipped unless `least` says so.

    Args:
        pred: predictive of the labelled source rows.
        targets: integer labels (rows,) of them, every class among them.
        unlabelled: predictive of the target rows.
        weights: weight of each source row; None = ones.
        least: share below which q is raised to it, before q is made to sum to 1; None = a negative share is an error.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for a class without rows, a confusion matrix that is singular, negative shares, another number of
            classes, a `least` outside [0, 1 / classes), unusable predictions, targets or weights.
    Source: Lipton, Wang and Smola 2018 (recalled), with the conditional confusion matrix for the joint one.
    """
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    classes = log_probs.shape[-1]
    if least is not None and not 0 <= least < 1 / classes:
        raise ValueError(f"`least` must lie in [0, 1 / classes), got {least!r} for {classes} classes. 0 is usual.")
    check_classes(unlabelled)
    if concrete(unlabelled):
        if not unlabelled.batch_shape or not unlabelled.batch_shape[0]:
            raise ValueError("`unlabelled` must have at least one row, got none. Pass predictions of target rows.")
        check_predictive(unlabelled)
    new = pooled_log_probs(unlabelled)
    _check_prior_shape("unlabelled", (new.shape[-1],), classes)
    require_every_class(targets, weights, classes)
    prior, shares, smallest = _black_box(log_probs, targets, weights, new.reshape(-1, classes))
    if concrete(shares):
        if not smallest > SINGULAR:
            raise ValueError(
                f"`pred` must tell the classes apart, got a confusion matrix of smallest singular value {float(smallest):.2g}. "
                "Merge classes that are taken for each other, use a better network, or `fit_label_shift_em`."
            )
        if least is None and (shares < 0).any():
            raise ValueError(
                f"`unlabelled` must give shares that are not negative, got {float(shares.min()):.3g} for class "
                f"{int(shares.argmin())}. Pass more rows, `least=0`, or use `fit_label_shift_em`."
            )
    if least is not None:
        shares = jnp.maximum(shares, least)
        shares = shares / shares.sum()
    return PriorShift(prior, shares, jnp.float32(jnp.nan))


@jax.jit
def _black_box(log_probs, targets, weights, new):
    classes = log_probs.shape[-1]
    onehot = jax.nn.one_hot(targets, classes) * (weights / weights.sum())[:, None]
    top = jax.nn.one_hot(log_probs.argmax(-1), classes)
    prior = onehot.sum(0)
    confusion = jnp.matmul(top.T, onehot, precision="highest") / prior
    found = jax.nn.one_hot(new.argmax(-1), classes).mean(0)
    shares = jnp.linalg.solve(confusion, found)
    undefined = jnp.isnan(new).any()
    return prior, jnp.where(undefined, jnp.nan, shares), jnp.linalg.svd(confusion, compute_uv=False)[-1]


def _check_prior(name: str, prior, positive: bool) -> jax.Array:
    if concrete(prior):
        given = np.asarray(prior, np.float64)
        if given.ndim != 1 or not np.isfinite(given).all() or (given < 0).any() or abs(given.sum() - 1) > 1e-4:
            raise ValueError(
                f"`{name}` must be one share per class, not negative, of sum 1, got {given.shape} of sum {given.sum():g}. "
                "Divide the counts of the classes by their sum."
            )
        if positive and (given == 0).any():
            raise ValueError(
                f"`{name}` must be positive for every class, got 0 for {np.flatnonzero(given == 0).tolist()}. A class that "
                "was never seen cannot be corrected for: leave it out of the predictive."
            )
    return jnp.asarray(prior, jnp.float32)


def _check_prior_shape(name: str, shape: tuple[int, ...], classes: int) -> None:
    if shape != (classes,):
        raise ValueError(
            f"`{name}` must have {classes} classes, got shape {shape}. Pass the same classes, in the same order."
        )
