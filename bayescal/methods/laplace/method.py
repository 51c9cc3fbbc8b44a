"""Laplace approximation: a normal posterior around a trained network, from the curvature of its loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bayescal.methods.laplace.predictives import Posterior, Predict, normal, probit
from bayescal.methods.laplace.structures import Eigen, Structure, count
from bayescal.methods.laplace.view import View, ggn, layers, noise_scales, of_leaves
from bayescal.methods.map_estimate import check_positive, one_member, start_variables, weighted_mean
from bayescal.methods.selection import Selection, selected
from bayescal.predictive import Gaussian
from bayescal.types import Batch, Key, Method, Model, PyTree, Variables


class LaplaceState(NamedTuple):
    """A network at its mode, what was summed up over the data, and the spectrum of its curvature.

    places: of single weights, where those are chosen.
    sums: of the structure, over `rows` rows; `spectrum` is of num_data / rows times them, as of the last end of an epoch,
        when `decomposed` of them had been seen.
    log_likelihood: nats, of the rows; `squares` and `numbers`: of normal noise of a fixed variance under `ggn`, sum of error^2
        / variance and its terms, else 0.
    prior_precision: () or (layers,); noise_scale: what the likelihood's variance is multiplied by. Both can be replaced:
        nothing else in the state depends on them.
    """

    variables: Variables
    places: PyTree
    sums: PyTree
    spectrum: PyTree
    rows: jax.Array
    decomposed: jax.Array
    log_likelihood: jax.Array
    squares: jax.Array
    numbers: jax.Array
    prior_precision: jax.Array
    noise_scale: jax.Array

    @property
    def ready(self) -> jax.Array:
        """Whether rows were seen, and all of them are in the spectrum: else `bc.predict` raises."""
        return (self.rows > 0) & (self.rows == self.decomposed)


class _Settings(NamedTuple):
    model: Model
    likelihood: Callable
    structure: Structure
    curvature: Callable
    selection: Selection
    num_data: int
    temperature: Any

    def view(self, state: LaplaceState) -> View:
        return View(self.model, self.curvature(self.likelihood), self.selection, state.variables, state.places)

    def posterior(self, state: LaplaceState) -> Posterior:
        """Noise divides the curvature: P = H / scale + prior, which is (H + scale * prior) / scale."""
        scale = state.noise_scale

        def likelihood(outputs):
            pred = self.likelihood(outputs)
            return dataclasses.replace(pred, variance=pred.variance * scale) if isinstance(pred, Gaussian) else pred

        precision, temperature = state.prior_precision * scale, self.temperature * scale
        return Posterior(self.view(state), self.structure, state.spectrum, precision, temperature, likelihood)


def init(key: Key, start: PyTree | None, settings: _Settings, prior_precision) -> LaplaceState:
    """Nothing summed up yet, around a fresh network or that of `start`: the posterior is the prior."""
    variables = settings.model.init(key) if start is None else start_variables(start)
    places = settings.selection.find(variables.params)
    chosen = settings.selection.take(variables.params, places)
    sums = settings.structure.init(chosen)
    precision = jnp.asarray(prior_precision, jnp.result_type(float))
    if precision.ndim and precision.shape != (len(layers(chosen)),):
        raise ValueError(
            f"`prior_precision` must be one number, or one for each of the layers {list(layers(chosen))}, got shape "
            f"{precision.shape}. Give them in that order."
        )
    zero = jnp.zeros((), precision.dtype)
    spectrum = _of_nothing(jax.eval_shape(settings.structure.decompose, sums, zero, settings.num_data))
    scale = jnp.asarray(getattr(start, "noise_scale", 1.0), precision.dtype)  # as tuned before
    return LaplaceState(variables, places, sums, spectrum, zero, zero, zero, zero, zero, precision, scale)


def _of_nothing(spectrum):
    """The spectrum of a curvature of zero, without a decomposition."""

    def one(x):
        if isinstance(x, Eigen):
            return Eigen(jnp.zeros(x.values.shape, x.values.dtype), jnp.eye(*x.vectors.shape, dtype=x.vectors.dtype))
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(one, spectrum, is_leaf=lambda x: isinstance(x, Eigen))


def update(state: LaplaceState, batch: Batch, key: Key, settings: _Settings):
    """Adds the curvature of a batch's rows; the network stays as it is, and the key is not used."""
    view, weights = settings.view(state), jnp.asarray(batch.relative_weights())
    sums = settings.structure.update(state.sums, view, batch, weights)
    outputs = view.outputs(view.chosen(), batch.inputs)
    pred = settings.likelihood(one_member(outputs))
    log_prob = pred.log_prob(batch.targets)
    total = lambda x: jnp.where(weights == 0, 0, weights * jnp.where(weights == 0, 0, x)).sum()
    squares = numbers = jnp.zeros(log_prob.shape)
    if noise_scales(settings.likelihood, settings.curvature, outputs):
        squares = ((batch.targets - pred.mean[0]) ** 2 / pred.variance[0]).sum(-1)
        numbers = jnp.full(log_prob.shape, pred.mean.shape[-1], log_prob.dtype)
    added = state._replace(
        sums=sums,
        rows=state.rows + weights.sum(),
        log_likelihood=state.log_likelihood + total(log_prob),
        squares=state.squares + total(squares),
        numbers=state.numbers + total(numbers),
    )
    same = jax.tree.map(lambda new, old: new.astype(old.dtype), added, state)
    return same, {"loss": -weighted_mean(log_prob, jnp.asarray(batch.weights))}


def end_epoch(state: LaplaceState, settings: _Settings) -> LaplaceState:
    """Decomposes what was summed up, once for all predictions and prior precisions."""
    spectrum = settings.structure.decompose(state.sums, state.rows, settings.num_data)
    spectrum = jax.tree.map(lambda new, old: new.astype(old.dtype), spectrum, state.spectrum)
    return state._replace(spectrum=spectrum, decomposed=state.rows)


def log_evidence(state: LaplaceState, settings: _Settings) -> jax.Array:
    """log p(data) = log p(data | mode) - (log det P - log det prior + prior precision * |mode|^2) / 2, nats.

    Of the whole data, num_data / rows times what was seen; at temperature 1.
    """
    chosen = settings.selection.take(state.variables.params, state.places)
    scale, share = state.noise_scale, settings.num_data / state.rows
    fit = state.log_likelihood - 0.5 * (state.numbers * jnp.log(scale) + state.squares * (1 / scale - 1))
    each = of_leaves(state.prior_precision, chosen)
    leaves = jax.tree.leaves(chosen)
    pull = jnp.stack([p * (x**2).sum() for p, x in zip(each, leaves, strict=True)]).sum()
    prior = jnp.stack([x.size * jnp.log(p) for p, x in zip(each, leaves, strict=True)]).sum()
    precision = state.prior_precision * scale
    log_det = settings.structure.log_det(state.spectrum, precision, chosen) - count(chosen) * jnp.log(scale)
    return share * fit - 0.5 * (log_det - prior + pull)


def laplace(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    structure: Structure,
    prior_precision: Any,
    subset: Selection | tuple | None = None,
    curvature: Callable[[Callable], Callable] = ggn,
    predictive: Predict | None = None,
    temperature: Any = 1.0,
) -> Method:
    """N(mode, temperature * (H + prior_precision * I)^-1), H the curvature of the negative log-likelihood of all data.

    Start it from a trained network and pass over the data once; the network stays as it is (and a noise that was tuned):

        fitted = bc.fit(bc.map_estimate(..., prior_precision=1.0, num_data=n), train, key, epochs=50, batch_size=128)
        method = bc.laplace(model, bc.Categorical, num_data=n, structure=bc.kronecker(), prior_precision=1.0)
        posterior = bc.fit(method, train, key, epochs=1, batch_size=128, start=fitted.state)
        state = bc.fit_prior_precision(method, posterior.state)  # optional

    H is num_data times the mean over the rows seen, so more passes change nothing. `ensemble(laplace(...), M)`, started
    from an ensemble, is a mixture of Laplace approximations. Dropout is off and batch norm at its running moments.

    Args:
        model: any network; `kronecker()` needs its `taps`.
        likelihood: outputs with a leading member axis -> `Categorical`, `Bernoulli` or `Gaussian`.
        num_data: number of training rows, which the curvature is scaled to; never inferred.
        structure: `diagonal()`, `kronecker()`, `full()` or `low_rank(rank)`.
        prior_precision: inverse variance of the normal prior on every parameter, mean 0, above 0; or one number a layer
            (a layer: the leaves under the same keys), in the parameters' order.
        subset: which parameters have a posterior: keys that lead to them, such as `last_layer(model)`;
            `subnetwork(number)`, `subtrees(*paths)` or `without_biases()`, which `kronecker()` refuses; None = all.
        curvature: `ggn` or `empirical_fisher`.
        predictive: `probit`, `bridge`, `monte_carlo(n)`, `normal` or `sampled(n)`; None = `normal` for normal noise,
            else `probit`.
        temperature: factor of the covariance; 1 = Bayes.

    Returns:
        Method whose state is `LaplaceState`, with `draw`, and `evidence`, the log marginal likelihood in nats; its info
        is `loss`, mean nats per example at the mode.

    Raises:
        ValueError: for settings that are not positive, and parameters that the structure cannot treat.
    Source: MacKay 1992; Daxberger et al. 2021 (Laplace Redux).
    """
    check_positive(num_data=num_data, temperature=temperature)
    known = not any(isinstance(x, Tracer) for x in jax.tree.leaves(prior_precision))
    if known and not (jnp.isfinite(jnp.asarray(prior_precision)) & (jnp.asarray(prior_precision) > 0)).all():
        raise ValueError(
            f"`prior_precision` must be positive, got {prior_precision!r}: the data alone do not determine all directions, "
            "and those have no variance. Pass the precision that was trained with, or tune it: `fit_prior_precision`."
        )
    settings = _Settings(model, likelihood, structure, curvature, selected(subset), num_data, temperature)

    def predict(state, inputs, key):
        posterior = settings.posterior(state)
        chosen = predictive
        if chosen is None:
            family: list = []
            jax.eval_shape(lambda inputs: family.append(type(posterior.at_mode(inputs))), inputs)
            chosen = normal if issubclass(family[0], Gaussian) else probit
        return chosen(posterior, inputs, key)

    return Method(
        lambda key, start=None: init(key, start, settings, prior_precision),
        lambda state, batch, key: update(state, batch, key, settings),
        predict,
        draw=lambda state, key: settings.posterior(state).draw(key),
        end_epoch=lambda state: end_epoch(state, settings),
        evidence=lambda state: log_evidence(state, settings),
    )
