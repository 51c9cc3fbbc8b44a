"""Prior precision and noise, from the marginal likelihood or from validation rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.methods.laplace.method import LaplaceState
from bayescal.methods.map_estimate import weighted_mean
from bayescal.types import Dataset, EnsembleState, Key, Method

STEPS = 200
LARGEST = 1e10  # a prior precision (or its inverse) beyond which there is no optimum


def fit_prior_precision(method: Method, state, *, noise: bool = False) -> Any:
    """The state with the prior precision that maximises log p(data), and the noise too: empirical Bayes.

    Newton's method in the logarithms; no data are looked at again. Every member of an ensemble gets its own, and every
    layer, where the method was given one prior precision a layer.

    Args:
        method: `laplace(...)`, or an ensemble of it.
        state: of it, after at least one pass over the data.
        noise: also multiply the likelihood's variance; for normal noise of a fixed variance, and `ggn`.

    Returns:
        The state with `prior_precision` and `noise_scale` replaced; `method.evidence(state)` is what was reached.

    Raises:
        TypeError: for a method without a marginal likelihood, or noise where there is none.
        ValueError: for a state that has seen no rows, a curvature that is indefinite or not finite, and where the marginal
            likelihood has no maximum.
    Source: MacKay 1992; Immer et al. 2021 (for networks).
    """
    evidence = _evidence(method)
    members, alive = _members(state)
    _check(members, alive)
    if noise and not np.asarray(members.numbers).all():
        raise TypeError(
            "`noise` needs normal noise of a fixed variance, and `ggn`, got another likelihood or curvature, which it would "
            "not divide. Leave `noise` out, or use `homoscedastic`."
        )
    settings = () if method.members is None else method.members.settings
    tuned, last = jax.jit(jax.vmap(partial(maximise, evidence, noise, STEPS)))(settings, members)
    found = np.stack([np.abs(np.log(np.asarray(x, float))).reshape(len(alive), -1).max(1) for x in tuned[:2]]).max(0)
    wrong = alive & ~((np.asarray(last) < 1e-3) & (found < np.log(LARGEST)))
    if wrong.any():
        raise ValueError(
            f"`state` must have a marginal likelihood with a maximum, got none for member(s) "
            f"{np.flatnonzero(wrong).tolist()}: prior precision {np.asarray(tuned[0])[wrong].tolist()} and going on. Train "
            "with a prior precision of your choice and keep it, or use `select_prior_precision`."
        )
    return _with(state, members._replace(prior_precision=tuned[0], noise_scale=tuned[1]))


def select_prior_precision(
    method: Method, state, validation: Dataset, key: Key, *, grid: Sequence[float] = tuple(np.logspace(-4, 4, 25))
) -> Any:
    """The state with that prior precision of the grid whose predictions of validation rows have the lowest NLL.

    All members of an ensemble get the same, chosen by the NLL of their pool.

    Args:
        method: `laplace(...)`, or an ensemble of it.
        state: of it, after at least one pass over the training data.
        validation: rows that were not trained on; they fit the device with one prediction.
        key: of the draws, the same for the whole grid.
        grid: prior precisions to try, positive.

    Raises:
        TypeError: for a method without a prior precision.
        ValueError: for a state that has seen no rows, one whose curvature is indefinite or not finite, a grid that is not
            positive, and where no value gives a finite NLL.
    """
    _evidence(method)
    members, alive = _members(state)
    _check(members, alive)
    values = np.asarray(grid, float)
    if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"`grid` must hold positive prior precisions, got {grid!r}. `np.logspace(-4, 4, 25)` is usual."
        )

    def own(members, value):
        """The same number for every member and layer."""
        return members._replace(prior_precision=jnp.full_like(members.prior_precision, value))

    weights = (
        jnp.ones(len(validation.targets)) if validation.weights is None else jnp.asarray(validation.weights, float)
    )
    weights = weights / weights.mean()

    @jax.jit
    def scores(members, values, inputs, targets, weights):
        def one(value):
            pred = method.predict(_with(state, own(members, value)), inputs, key)
            return -weighted_mean(pred.log_prob(targets), weights)

        return jax.lax.map(one, values)

    found = np.asarray(
        scores(members, jnp.asarray(values), validation.inputs, jnp.asarray(validation.targets), weights)
    )
    if not np.isfinite(found).any():
        raise ValueError(
            f"`grid` must hold a value with a finite NLL on the validation rows, got {found.tolist()}. Check the rows."
        )
    return _with(state, own(members, values[np.nanargmin(found)]))


def maximise(evidence: Callable, noise: bool, most: int, settings, state: LaplaceState):
    """((prior precision, noise scale), length of the last step in the logarithms) of one network.

    Args:
        evidence: `(settings, state) -> nats`.
        noise: whether the noise moves, too.
        most: Newton steps.
        settings: of the member, passed to `evidence`.
        state: where it starts.
    """
    first = state.prior_precision
    own = jnp.concatenate([jnp.log(first).ravel(), jnp.log(state.noise_scale)[None]])

    def value(logs):
        precision = jnp.exp(logs[:-1]).reshape(first.shape)
        scale = jnp.exp(logs[-1]) if noise else state.noise_scale
        return evidence(settings, state._replace(prior_precision=precision, noise_scale=scale))

    def step(at):
        """Newton's, uphill also where the evidence is not concave."""
        place, logs, _ = at
        slope, bend = jax.grad(value)(logs), jax.hessian(value)(logs)
        if not noise:
            bend = bend.at[-1, -1].set(-1)
        values, vectors = jnp.linalg.eigh(bend)
        steepness = jnp.maximum(jnp.abs(values), 1e-3 * jnp.abs(values).max())
        move = jnp.clip(vectors @ ((vectors.T @ slope) / steepness), -2, 2)
        return place + 1, logs + move, jnp.abs(move).max()

    goes_on = lambda at: (at[0] < most) & (at[2] > 1e-5)
    _, logs, last = jax.lax.while_loop(goes_on, step, (0, own, jnp.asarray(jnp.inf, own.dtype)))
    return (jnp.exp(logs[:-1]).reshape(first.shape), jnp.exp(logs[-1])), last


def _evidence(method: Method) -> Callable:
    """`(settings of a member, its state) -> log marginal likelihood`."""
    build = (lambda settings: method) if method.members is None else method.members.build
    first = () if method.members is None else jax.tree.map(lambda x: x[0], method.members.settings)
    if build(first).evidence is None:
        raise TypeError(
            "`method` must be `laplace(...)` or an ensemble of it, got a method without a marginal likelihood. Start one "
            "from the trained state."
        )

    def evidence(settings, state):
        own: Any = build(settings).evidence
        return own(state)

    return evidence


def _members(state) -> tuple[LaplaceState, np.ndarray]:
    """The states with a leading member axis, and which of them count."""
    if isinstance(state, EnsembleState):
        return state.members, np.asarray(state.alive)
    return jax.tree.map(lambda x: x[None], state), np.ones(1, bool)


def _with(state, members: LaplaceState):
    if isinstance(state, EnsembleState):
        return state._replace(members=members)
    return jax.tree.map(lambda x: x[0], members)


def _check(members: LaplaceState, alive: np.ndarray) -> None:
    rows = np.asarray(members.rows)
    if not (rows[alive] > 0).all():
        raise ValueError(
            "`state` must have seen the training data, got one that saw no rows. Pass the `state` of "
            "`fit(method, data, key, epochs=1, batch_size=..., start=...)`."
        )
    if not (np.asarray(members.decomposed) == rows)[alive].all():
        raise ValueError(
            f"`state` must be one after the end of an epoch, got a curvature of {np.asarray(members.decomposed).tolist()} rows "
            f"where {rows.tolist()} were seen. Call `method.end_epoch(state)` after your own loop, as `fit` does."
        )
    finite = np.ones(len(alive), bool)
    for leaf in jax.tree.leaves(members.spectrum):
        finite &= np.isfinite(np.asarray(leaf)).reshape(len(alive), -1).all(1)
    if not finite[alive].all():
        raise ValueError(
            f"`state` must have a finite, positive semi-definite curvature, got an indefinite or infinite one for member(s) "
            f"{np.flatnonzero(alive & ~finite).tolist()}. Use `ggn` or `empirical_fisher`, which cannot be indefinite, "
            "check the network for NaN, or sum it up in float64 (`jax.enable_x64`)."
        )
