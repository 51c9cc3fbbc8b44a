"""Variational layers: the distribution of their outputs, their gradients and their KL."""

from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayescal as bc
from bayescal.models import flipout, local_reparametrisation, shared_noise, variational_conv, variational_dense

pytestmark = pytest.mark.core
ESTIMATORS = (local_reparametrisation, flipout, shared_noise)
KEYS = 20_000
STANDARD_ERRORS = 4.5  # of up to a few hundred means at once, none of which is outside by chance (probability < 1 %)


def net(estimator, hidden=(7,), **settings):
    dense = partial(variational_dense, estimator=estimator, initial_scale=0.3, **settings)
    return bc.models.mlp(4, hidden, 3, dense=dense)


def whole(inputs, targets):
    rows = len(inputs)
    return bc.Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(rows), jnp.arange(rows))


def deviates(values, expected):
    """Of the mean over the leading axis, in standard errors."""
    values = np.asarray(values, float)
    return np.abs(values.mean(0) - expected) / (values.std(0, ddof=1) / np.sqrt(len(values)))


# Outputs -------------------------------------------------------------------------------------------------------------------


def convolve(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


PRODUCTS = {
    "dense": (jnp.matmul, (3, 5), (5, 2)),
    "dense along time": (jnp.matmul, (2, 3, 5), (5, 2)),
    "convolution": (convolve, (2, 3, 3, 2), (3, 3, 2, 2)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["dense", "convolution", pytest.param("dense along time", marks=pytest.mark.slow)])
def test_outputs_have_the_moments_of_their_kernels(name, estimator, rng):
    """Mean and covariance over keys of all outputs, in float64 from the posterior: right wherever a row uses its kernel once.

    Rows share kernels under shared noise alone; under local reparametrisation no two outputs share anything, so that
    pixels of one image, which one kernel makes correlated, are not: the documented difference.
    """
    product, shape, kernel = PRODUCTS[name]
    inputs, mean = (rng.normal(size=s).astype(np.float32) for s in (shape, kernel))
    scale = rng.uniform(0.2, 1.0, kernel).astype(np.float32)
    draws = jax.jit(jax.vmap(lambda k: estimator(k, inputs, mean, scale, product)))(
        jax.random.split(jax.random.key(3), KEYS)
    )

    slopes = np.asarray(jax.jacfwd(partial(product, inputs))(mean), float).reshape(-1, mean.size)
    covariance = slopes * np.float64(scale).ravel() ** 2 @ slopes.T
    row = np.arange(len(slopes)) // (len(slopes) // shape[0])
    if estimator is flipout:
        covariance = covariance * (row[:, None] == row)
    if estimator is local_reparametrisation:
        covariance = np.diag(np.diag(covariance))
    noise = np.asarray(draws, float).reshape(KEYS, -1) - np.float64(product(inputs, mean)).ravel()
    assert deviates(noise, 0).max() < STANDARD_ERRORS
    first, second = np.triu_indices(noise.shape[1])
    assert deviates(noise[:, first] * noise[:, second], covariance[first, second]).max() < STANDARD_ERRORS


@pytest.mark.slow
def test_pixels_drawn_apart_follow_another_bound(rng):
    """E (sum of pixels)^2, a loss that sees covariances: one kernel an image gives about the double."""
    inputs, mean = rng.uniform(size=(1, 4, 4, 2)).astype(np.float32), np.zeros((3, 3, 2, 1), np.float32)
    keys = jax.random.split(jax.random.key(4), KEYS)
    scale = np.ones_like(mean)
    loss = lambda estimator: jax.vmap(lambda k: estimator(k, inputs, mean, scale, convolve).sum() ** 2)(keys)
    slopes = np.asarray(jax.jacfwd(partial(convolve, inputs))(mean), float).reshape(16, -1)
    together, apart = (slopes.sum(0) ** 2).sum(), (slopes**2).sum()
    assert together > 5 * apart
    for estimator in (flipout, shared_noise):
        assert deviates(loss(estimator), together) < STANDARD_ERRORS
    assert deviates(loss(local_reparametrisation), apart) < STANDARD_ERRORS


# Gradients -----------------------------------------------------------------------------------------------------------------


def gradients(method, state, batch):
    """Of the bound per example for every key, one vector each: what a step of gradient descent at rate 1 takes away."""
    flat = lambda state: jax.flatten_util.ravel_pytree(state.variables.params)[0]
    step = lambda key: flat(state) - flat(method.update(state, batch, key)[0])
    run = jax.jit(lambda keys: jax.lax.map(step, keys, batch_size=1000))
    return np.asarray(run(jax.random.split(jax.random.key(5), KEYS)), float)


def test_gradient_is_the_closed_form(key, rng):
    """A linear layer under normal noise: E nll and KL are quadratic, so that both gradients are known."""
    inputs, targets = rng.normal(size=(32, 4)).astype(np.float32), rng.normal(size=(32, 1)).astype(np.float32)
    noise, prior, num_data = 0.5, 0.7, 100
    spread = []
    for estimator in ESTIMATORS:
        dense = partial(variational_dense, estimator=estimator, initial_scale=0.3, prior_scale=prior, use_bias=False)
        model = bc.models.mlp(4, (), 1, dense=dense)
        settings: dict[str, Any] = {"num_data": num_data, "num_draws": 1}
        method = bc.bayes_by_backprop(model, bc.homoscedastic(noise), optax.sgd(1.0), **settings)
        state = method.init(key, None)
        layer = state.variables.params["head"]
        m, s = np.asarray(layer["mean"], float), np.exp(np.float64(layer["log_scale"]))
        x, y = np.float64(inputs), np.float64(targets)
        of_mean = x.T @ (x @ m - y) / 32 / noise + m / prior**2 / num_data
        of_scale = (x**2).mean(0)[:, None] * s / noise + (s / prior**2 - 1 / s) / num_data
        expected = np.concatenate([(of_scale * s).ravel(), of_mean.ravel()])  # in the order of their names
        got = gradients(method, state, whole(inputs, targets))
        assert deviates(got, expected).max() < STANDARD_ERRORS
        spread.append(got.var(0).sum())
    assert spread[0] < spread[1] < spread[2] / 2, spread


@pytest.mark.slow
def test_gradients_agree_and_local_varies_least_and_shared_most(key, rng):
    """Two layers and a categorical likelihood, where no closed form is: each mean against each other's; 64 rows."""
    inputs, targets = rng.normal(size=(64, 4)).astype(np.float32), np.arange(64) % 3
    got = []
    for estimator in ESTIMATORS:
        method = bc.bayes_by_backprop(net(estimator), bc.Categorical, optax.sgd(1.0), num_data=100, num_draws=1)
        got.append(gradients(method, method.init(key, None), whole(inputs, targets)))
    errors = [g.var(0, ddof=1) / KEYS for g in got]
    for a, b in combinations(range(3), 2):
        assert (np.abs(got[a].mean(0) - got[b].mean(0)) / np.sqrt(errors[a] + errors[b])).max() < STANDARD_ERRORS
    local, flipped, shared = (e.sum() for e in errors)
    assert local < flipped < shared / 2, (local, flipped, shared)


@pytest.mark.slow
def test_gradients_of_a_convolution(key, rng):
    inputs, targets = rng.normal(size=(32, 4, 4, 1)).astype(np.float32), np.arange(32) % 3
    got = []
    for estimator in (flipout, shared_noise):
        conv = partial(variational_conv, estimator=estimator, initial_scale=0.3)
        model = bc.models.convnet((4, 4, 1), (2,), 3, 3, conv=conv)
        method = bc.bayes_by_backprop(model, bc.Categorical, optax.sgd(1.0), num_data=100, num_draws=1)
        got.append(gradients(method, method.init(key, None), whole(inputs, targets)))
    flipped, shared = (g.var(0, ddof=1) / KEYS for g in got)
    noisy = flipped + shared > 1e-12 * KEYS**-1
    z = np.abs(got[0].mean(0) - got[1].mean(0))[noisy] / np.sqrt(flipped + shared)[noisy]
    assert z.max() < STANDARD_ERRORS
    assert flipped.sum() < 0.9 * shared.sum(), (flipped.sum(), shared.sum())


# The KL ----------------------------------------------------------------------------------------------------------------


def kl_by_hand(params, prior):
    """Float64, over every layer that has a posterior, wherever it is."""
    found = [node for node in jax.tree.leaves(params, is_leaf=lambda n: isinstance(n, dict) and "log_scale" in n)]
    total = 0.0
    for layer in (node for node in found if isinstance(node, dict)):
        m, s = np.asarray(layer["mean"], float), np.exp(np.float64(layer["log_scale"]))
        total += np.sum(np.log(prior / s) + (s**2 + m**2) / (2 * prior**2) - 0.5)
    return total


def test_kl_is_the_closed_form_summed_over_layers(key):
    """Layers in lists, dense and convolutional together, one plain among them; whatever the batch size."""
    import numpyro.distributions as dist

    settings = {"prior_scale": 0.7, "initial_scale": 0.05}
    dense, conv = partial(variational_dense, **settings), partial(variational_conv, **settings)
    image = (4, 4, 1)
    for model, shape, layers in (
        (bc.models.mlp(4, (8, 8), 3, dense=dense), (4,), 3),
        (bc.models.convnet(image, (2,), 8, 3, dense=dense, conv=conv), image, 3),
        (bc.models.convnet(image, (2,), 8, 3, conv=conv), image, 1),
    ):
        variables = jax.jit(model.init)(key)
        means = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables.params) if "mean" in str(path)]
        assert len(means) == layers
        expected = kl_by_hand(variables.params, 0.7)
        numpyros = sum(dist.kl_divergence(dist.Normal(m, 0.05), dist.Normal(0.0, 0.7)).sum() for m in means)
        np.testing.assert_allclose(numpyros, expected, rtol=1e-5)
        for rows in (1, 7):
            penalty = jax.jit(lambda v, x, m=model: m.train(v, x, key)[2])(variables, jnp.ones((rows, *shape)))
            np.testing.assert_allclose(penalty, expected, rtol=1e-5)
