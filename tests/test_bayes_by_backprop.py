"""Bayes by backprop: the KL's share, the optimum, and what it refuses."""

import shutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import NOISE, PRIOR, exact_posterior, linear_data
from methods import blobs, pure_model

import bayescal as bc
from bayescal.models import flipout, local_reparametrisation, shared_noise, variational_dense

pytestmark = pytest.mark.core
ESTIMATORS = (local_reparametrisation, flipout, shared_noise)
ADAM = optax.adam(1e-2)


def net(estimator=local_reparametrisation, prior_scale=1.0, **settings):
    dense = partial(variational_dense, estimator=estimator, prior_scale=prior_scale, initial_scale=0.3)
    return bc.models.mlp(4, (7,), 3, dense=dense, **settings)


def bayes(model, **settings):
    return bc.bayes_by_backprop(model, bc.Categorical, ADAM, **{"num_data": 30, "num_draws": 3, **settings})


def whole(inputs, targets):
    rows = len(inputs)
    return bc.Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(rows), jnp.arange(rows))


def silent(rows):
    """Rows of weight 0: what is left of the objective is the KL's share."""
    data = blobs()
    inputs, targets = np.resize(data.inputs, (rows, 4)), np.resize(data.targets, rows)
    return whole(inputs, targets)._replace(weights=jnp.zeros(rows))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_share_of_the_kl(estimator, key):
    """temperature * annealing(step) / num_data of the sum over layers, for batches of any size (peers have had the number
    of layers, of batches or 100 in there), and recorded.
    """
    settings: dict[str, Any] = {
        "num_data": 50,
        "num_draws": 1,
        "temperature": 0.1,
        "annealing": optax.linear_schedule(0.25, 1.0, 3),
    }
    method = bc.bayes_by_backprop(net(estimator, prior_scale=0.7), bc.Categorical, optax.sgd(1.0), **settings)
    state = jax.jit(method.init)(key, None)._replace(step=jnp.int32(1))  # of which the schedule gives a half
    layers = lambda state: [state.variables.params["dense"][0], state.variables.params["head"]]
    update = jax.jit(method.update)
    for rows in (1, 7, 50):
        new, info = update(state, silent(rows), key)
        np.testing.assert_allclose(info["temperature"], 0.05, rtol=1e-6)
        kl = 0.0
        for before, after in zip(layers(state), layers(new), strict=True):
            m, s = np.float64(before["mean"]), np.exp(np.float64(before["log_scale"]))
            kl += np.sum(np.log(0.7 / s) + (s**2 + m**2) / (2 * 0.7**2) - 0.5)
            change = jax.tree.map(lambda a, b: np.asarray(a - b), before, after)
            np.testing.assert_allclose(change["mean"], 0.05 / 50 * m / 0.7**2, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(change["log_scale"], 0.05 / 50 * (s**2 / 0.7**2 - 1), rtol=1e-3, atol=1e-6)
            assert not np.any(change["bias"])
        np.testing.assert_allclose(info["kl"], kl, rtol=1e-5)


def test_bayes_by_backprop_is_map_estimate_with_a_temperature(key):
    """To the bit at temperature 1; what multiplied the KL is in the history."""
    model, data = net(flipout), blobs()
    build = partial(bc.bayes_by_backprop, model, bc.Categorical, ADAM, num_data=30, num_draws=2)
    both = [bc.map_estimate(model, bc.Categorical, ADAM, num_data=30), build()]
    start, batch = jax.jit(both[0].init)(key, None), whole(data.inputs, data.targets)
    (plain, plain_info), (bayes, info) = (jax.jit(method.update)(start, batch, key) for method in both)
    jax.tree.map(np.testing.assert_array_equal, bayes, plain)
    assert info["loss"] == plain_info["loss"] and info["temperature"] == 1
    method = build(temperature=0.5, annealing=lambda step: jnp.minimum(1, step / 6))  # three steps an epoch
    annealed = bc.fit(method, data, key, epochs=3, batch_size=10, progress=False)
    np.testing.assert_allclose(annealed.history["temperature"][:, 0], 0.5 * np.array([1 / 6, 4 / 6, 1]), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [pytest.param(200, marks=pytest.mark.slow), 50])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_field_optimum(estimator, batch_size, key):
    """Bayesian linear regression: the exact mean, and the variance 1 / diagonal of the precision, to 2 %.

    A scale's gradient has noise of the order of itself whatever the batch (but for local reparametrisation), so that one run
    averages about 1,000 draws: 5 % of a variance. Over 64 members that is 0.6 %, of which 2 % is three times.
    """
    data = linear_data()
    exact = exact_posterior(data)
    dense = partial(variational_dense, estimator=estimator, prior_scale=PRIOR**-0.5, initial_scale=0.05, use_bias=False)
    steps = 4000
    adam = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    model = bc.models.mlp(20, (), 1, dense=dense)
    method = bc.bayes_by_backprop(model, bc.homoscedastic(NOISE), adam, num_data=200, num_draws=1)
    epochs = steps * batch_size // 200
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": False, "execution": "vmap"}
    members = bc.fit(bc.ensemble(method, 64), data, key, epochs=epochs, **settings).state.members
    layer = jax.tree.map(lambda x: np.asarray(x, float)[..., 0], members.variables.params["head"])
    assert np.abs(layer["mean"].mean(0) - exact.mean).max() < 0.02 * np.abs(exact.mean).max(), "the mean"
    variances = (np.exp(layer["log_scale"]) ** 2).mean(0)
    np.testing.assert_allclose(variances * np.diag(exact.precision), 1, atol=0.02)


def test_the_bound_is_that_of_variational(key, rng):
    """Two layers, normal posteriors of the kernels at the same place: loss in expectation and KL, by both methods."""
    inputs, targets = rng.normal(size=(16, 4)).astype(np.float32), np.arange(16) % 3
    settings: dict[str, Any] = {"num_data": 100, "num_draws": 1}
    layered = bc.bayes_by_backprop(net(shared_noise), bc.Categorical, optax.sgd(0.0), **settings)
    state = layered.init(key, None)
    params = state.variables.params
    plain = {
        "dense": {0: {"kernel": params["dense"][0]["mean"], "bias": params["dense"][0]["bias"]}},
        "head": {"kernel": params["head"]["mean"], "bias": params["head"]["bias"]},
    }
    guided = bc.variational(
        bc.models.mlp(4, (7,), 3),
        bc.Categorical,
        optax.sgd(0.0),
        subset=bc.without_biases(),
        initial_scale=0.3,
        **settings,
    )
    other = guided.init(key, bc.Variables(plain))
    batch, keys = whole(inputs, targets), jax.random.split(key, 20_000)
    run = lambda method, state: jax.jit(jax.vmap(lambda k: method.update(state, batch, k)[1]))(keys)
    one, two = run(layered, state), run(guided, other)
    np.testing.assert_allclose(one["kl"], two["kl"], rtol=1e-5)
    a, b = (np.asarray(info["loss"], float) for info in (one, two))
    assert abs(a.mean() - b.mean()) < 4.5 * np.sqrt((a.var() + b.var()) / 20_000), "standard errors"


def test_resumed_from_a_checkpoint_to_the_bit(key, tmp_path):
    """The last of three epochs again, after what was saved of it is taken away; batch norm between the layers."""
    method = bayes(net(batch_norm=True), annealing=optax.linear_schedule(0.0, 1.0, 5))
    run = partial(bc.fit, method, blobs(), key, epochs=3, batch_size=10, progress=False, checkpoint=tmp_path)
    whole = run()
    shutil.rmtree(tmp_path / "steps" / "3")
    resumed = run()
    assert resumed.seconds["epochs"] == 1
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    np.testing.assert_array_equal(resumed.history["temperature"], whole.history["temperature"])
    assert (resumed.state.variables.stats["norm"][0]["var"] != 1).all()


def test_networks_that_are_not_variational(key):
    method = bayes(bc.models.mlp(4, (8,), 3, dropout=0.5))
    with pytest.raises(ValueError, match="`model` must have variational layers, whose KL is its penalty, got a"):
        bc.fit(method, blobs(), key, epochs=1, batch_size=10, progress=False)
    plain = bayes(bc.models.mlp(4, (8,), 3))
    with pytest.raises(ValueError, match="`key` was given to a network without a random stream"):
        plain.predict(plain.init(key, None), blobs().inputs, key)
    pure = pure_model()
    silent = bayes(pure._replace(train=lambda v, x, k: (pure.apply(v, x, None), (), jnp.sum(v.params["b"]))))
    fitted = bc.fit(silent, blobs(), key, epochs=1, batch_size=10, progress=False)
    with pytest.raises(
        ValueError, match="`model` must draw random numbers, got one whose outputs do not depend on its key"
    ):
        bc.predict(silent, fitted.state, blobs().inputs, key)
    with pytest.raises(ValueError, match="`num_data` is required for a model with a penalty"):
        bc.fit(bc.map_estimate(net(), bc.Categorical, ADAM), blobs(), key, epochs=1, batch_size=10, progress=False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "`num_draws` must be a whole number of at least 1, got 0"),
        ({"num_data": 0}, ValueError, "`num_data` must be positive, got 0"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be positive, got -1.0"),
        ({"num_data": None}, ValueError, "`num_data` must be one number, got NoneType. Give"),
        ({"num_data": np.inf}, ValueError, "`num_data` must be finite, got inf. See"),
        ({"temperature": None}, ValueError, "`temperature` must be one number, got NoneType. Give"),
        (
            {"annealing": lambda step: None},
            ValueError,
            r"`annealing` must give one number in \[0, 1\], got NoneType at step 0",
        ),
        (
            {"annealing": lambda step: 2.0},
            ValueError,
            r"`annealing` must give one number in .*, got 2\.0 at step 0\. It is",
        ),
        ({"annealing": 0.5}, TypeError, "`annealing` must be a function of the step, got float. Pass a schedule"),
    ],
)
def test_bad_settings(unchecked, settings, error, message):
    with pytest.raises(error, match=message):
        bayes(net(), **settings)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        bc.bayes_by_backprop(net(), bc.Categorical, ADAM, num_draws=2)
