"""From a Laplace posterior to a predictive distribution: linearised with a link, or sampled."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.draws import check_draws
from bayescal.methods.laplace.structures import Structure
from bayescal.methods.laplace.view import View, only_member
from bayescal.methods.map_estimate import one_member
from bayescal.predictive import Bernoulli, Categorical, Dirichlet, Gaussian, Predictive
from bayescal.sharding import run_members
from bayescal.types import Key, PyTree, Variables


class Posterior(NamedTuple):
    """Normal posterior of the chosen parameters: mean at the mode, covariance temperature * P^-1."""

    view: View
    structure: Structure
    spectrum: PyTree
    precision: jax.Array
    temperature: Any
    likelihood: Callable

    def mean(self, inputs) -> Any:
        """(batch, ...) outputs of the network at the mode."""
        return self.view.outputs(self.view.chosen(), inputs)

    def covariance(self, inputs) -> jax.Array:
        """(batch, outputs, outputs) of the outputs of the linearised network: J P^-1 J^T * temperature."""
        return self.temperature * self.structure.covariance(self.spectrum, self.precision, self.view, inputs)

    def noise(self, key: Key) -> PyTree:
        """Like the chosen parameters: how far a draw lies from the mode."""
        chosen = self.view.chosen()
        noise = self.structure.noise(self.spectrum, self.precision, chosen, key)
        width = jnp.sqrt(jnp.asarray(self.temperature))
        return jax.tree.map(lambda x, z: (width * z).astype(x.dtype), chosen, noise)

    def draw(self, key: Key) -> Variables:
        """One network from the posterior."""
        return self.view.network(jax.tree.map(jnp.add, self.view.chosen(), self.noise(key)))

    def at_mode(self, inputs) -> Predictive:
        """The likelihood of the network at the mode, one member."""
        return self.likelihood(one_member(self.mean(inputs)))


Predict = Callable[[Posterior, Any, Key | None], Predictive]


def probit(posterior: Posterior, inputs, key: Key | None) -> Categorical | Bernoulli:
    """softmax(z / sqrt(1 + pi / 8 * var z)) of the logits z: one member, whose entropy is total; the key is not used.

    For the split into aleatoric and epistemic take `monte_carlo`, or `bridge`.

    Raises:
        TypeError: for a likelihood without logits, or with several members a network.
    Source: MacKay 1992; Daxberger et al. 2021, section 2 (multi-class).
    """
    pred = only_member(posterior.at_mode(inputs), "probit")
    if not isinstance(pred, (Categorical, Bernoulli)):
        raise TypeError(
            f"`likelihood` must have logits for `probit`, got {type(pred).__name__}. Use `normal` for normal noise, or "
            "`monte_carlo(20)`."
        )
    covariance = _covariance_of(posterior, inputs, lambda pred: pred.logits)
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1).reshape(pred.logits.shape)
    return dataclasses.replace(pred, logits=pred.logits / jnp.sqrt(1 + math.pi / 8 * variance))


def bridge(posterior: Posterior, inputs, key: Key | None) -> Dirichlet:
    """Dirichlet with concentration (1 - 2 / K + exp(f_k) / K^2 * sum_l exp(-f_l)) / var f_k, f made to sum to zero.

    Both mean and covariance are those of f conditioned on sum f = 0; the key is not used. Where the variance is large
    for the mean, concentrations are known to be off.

    Raises:
        TypeError: for a likelihood without class logits.
    Source: MacKay 1998; Hobbhahn et al. 2022 (Laplace bridge), equation 7 (recalled).
    """
    pred = only_member(posterior.at_mode(inputs), "bridge")
    if not isinstance(pred, Categorical):
        raise TypeError(
            f"`likelihood` must have class logits for `bridge`, got {type(pred).__name__}. Use `normal` for normal noise, "
            "`probit` for one logit, or `monte_carlo(20)`."
        )
    logits, covariance = pred.logits[0], _covariance_of(posterior, inputs, lambda pred: pred.logits)
    rows = covariance.sum(-1)
    total = rows.sum(-1, keepdims=True)
    mean = logits - rows * logits.sum(-1, keepdims=True) / total
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1) - rows**2 / total
    classes = logits.shape[-1]
    ratio = jnp.exp(mean + jax.nn.logsumexp(-mean, axis=-1, keepdims=True))
    return Dirichlet(((1 - 2 / classes + ratio / classes**2) / variance)[None])


def monte_carlo(num_draws: int) -> Predict:
    """`num_draws` members, each the likelihood of f + J d with d ~ N(0, temperature * P^-1): linearised networks, by key.

    A member is one linearised network for all rows. One forward pass and its tangent a draw; `key=None` is the mode alone.

    Raises:
        ValueError: for fewer than one draw.
    Source: Immer et al. 2021 (GLM predictive).
    """
    check_draws(num_draws)

    def outputs(posterior: Posterior, key: Key, inputs):
        noise = posterior.noise(key)
        values, change = jax.jvp(lambda x: posterior.view.outputs(x, inputs), (posterior.view.chosen(),), (noise,))
        return jax.tree.map(jnp.add, values, change)

    return _by_draws(outputs, num_draws)


def normal(posterior: Posterior, inputs, key: Key | None) -> Gaussian:
    """N(mean f, noise + var f), with the variance of the mean in `mean_variance`: epistemic, exact for linear networks.

    The likelihood's mean may be any function of the outputs, of which its Jacobian is taken; the key is not used.

    Raises:
        TypeError: for a likelihood that is not normal.
    Source: Foong et al. 2019; Immer et al. 2021.
    """
    pred = only_member(posterior.at_mode(inputs), "normal")
    if not isinstance(pred, Gaussian):
        raise TypeError(
            f"`likelihood` must be normal for `normal`, got {type(pred).__name__}. Use `probit`, `bridge` or "
            "`monte_carlo(20)`."
        )
    covariance = _covariance_of(posterior, inputs, lambda pred: pred.mean)
    return dataclasses.replace(pred, mean_variance=jnp.diagonal(covariance, axis1=-2, axis2=-1)[None])


def sampled(num_draws: int) -> Predict:
    """`num_draws` members, each the likelihood of a network drawn from the posterior; `key=None` is the mode alone.

    Networks far from the mode are taken at their word: where the posterior is wide this under-fits, and the linearised
    predictives do not.

    Raises:
        ValueError: for fewer than one draw.
    Source: Ritter et al. 2018; Immer et al. 2021 (why to linearise).
    """
    check_draws(num_draws)
    return _by_draws(
        lambda posterior, key, inputs: posterior.view.model.apply(posterior.draw(key), inputs, None), num_draws
    )


def _by_draws(outputs: Callable[[Posterior, Key, Any], Any], num_draws: int) -> Predict:
    """The likelihood of `outputs(posterior, key, inputs)` for so many keys; without one, of the mode."""

    def predict(posterior: Posterior, inputs, key: Key | None):
        if key is None:
            return posterior.at_mode(inputs)
        view = posterior.view
        fixed = posterior._replace(spectrum=None, view=view._replace(variables=None, places=None))

        def one(key, arrays, inputs):
            spectrum, variables, places, precision, temperature = arrays
            own = fixed.view._replace(variables=variables, places=places)
            whole = fixed._replace(view=own, spectrum=spectrum, precision=precision, temperature=temperature)
            return outputs(whole, key, inputs)

        arrays = (posterior.spectrum, view.variables, view.places, posterior.precision, posterior.temperature)
        return posterior.likelihood(run_members(one, jax.random.split(key, num_draws), shared=(arrays, inputs)))

    return predict


def _covariance_of(posterior: Posterior, inputs, part: Callable[[Any], jax.Array]) -> jax.Array:
    """(batch, numbers, numbers) of what the likelihood makes of the outputs, by its slope at the mode."""
    outputs, covariance = posterior.mean(inputs), posterior.covariance(inputs)
    of_row = lambda row: part(posterior.likelihood(row[None, None])).ravel()
    slope = jax.vmap(jax.jacfwd(of_row))(outputs).reshape(outputs.shape[0], -1, covariance.shape[-1])
    return jnp.einsum("bdi,bij,bej->bde", slope, covariance, slope)
