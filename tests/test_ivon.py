"""IVON against a NumPy loop, its own fixed point, and the mean-field posterior of Bayesian linear regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import FEATURES, NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.ivon import IVONMoments, ivon, ivon_optimizer

pytestmark = pytest.mark.core


def linear(learning_rate=0.05, *, num_draws=20, prior_precision=PRIOR, **settings):
    likelihood = bc.homoscedastic(NOISE)
    required = dict(num_data=ROWS, learning_rate=learning_rate, num_draws=num_draws, prior_precision=prior_precision)
    return ivon(linear_model(), likelihood, **required, **settings)


def gradient_of_mean_nll(data):
    """Of Bayesian linear regression, for params (features, 1) in float32; its Hessian is X'X / (rows noise)."""
    inputs, targets = jnp.asarray(data.inputs), jnp.asarray(data.targets)
    return lambda params: inputs.T @ (inputs @ params - targets) / (NOISE * ROWS)


def cubature(params, hessian):
    """Draws m +- sqrt(features) sd e_i: mean m and covariance exactly that of the posterior, without chance."""
    deviation = 1 / jnp.sqrt(ROWS * (hessian[:, 0] + PRIOR / ROWS))
    steps = jnp.sqrt(FEATURES) * jnp.diag(deviation)
    return params + jnp.concatenate([steps, -steps])[..., None]


def test_one_step_by_hand():
    """delta = 1, noise 0.25: estimate 4 (1 + 1) 0.25 * 3 = 6, e = 2.5, h = 1 + 2.5 + 2.5^2 / 4 = 5.0625."""
    optimizer = ivon_optimizer(0.5, num_data=4, prior_precision=4.0, beta1=0.0, beta2=0.5)
    params = jnp.array([2.0])
    change, moments = optimizer.update(jnp.array([[3.0]]), jnp.array([[2.25]]), optimizer.init(params), params)
    np.testing.assert_allclose(moments.hessian, [5.0625], rtol=1e-6)
    np.testing.assert_allclose(change, [-0.5 * (3 + 1 * 2) / (5.0625 + 1)], rtol=1e-6)


@pytest.mark.parametrize(("number", "clip_radius", "temperature"), [(1, np.inf, 1.0), (3, 0.3, 0.5)])
def test_the_update_is_the_loop(rng, number, clip_radius, temperature):
    """In float64 with the same draws and gradients, number by number."""
    size, num_data, prior, beta1, beta2, start = 4, 40, 3.0, 0.8, 0.9, 0.7
    schedule = lambda step: 0.1 / (1 + step)
    optimizer = ivon_optimizer(
        schedule,
        num_data=num_data,
        prior_precision=prior,
        temperature=temperature,
        beta1=beta1,
        beta2=beta2,
        initial_hessian=start,
        clip_radius=clip_radius,
    )
    params, m, g_bar, h = jnp.ones(size), np.ones(size), np.zeros(size), np.full(size, start)
    moments, step = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(30):
        draws = np.asarray(params) + 0.3 * rng.normal(size=(number, size)).astype(np.float32)
        gradients = rng.normal(size=(number, size)).astype(np.float32)
        noise = draws.astype(float) - np.asarray(params, float)
        change, moments = step(jnp.asarray(gradients), jnp.asarray(draws), moments, params)
        params = optax.apply_updates(params, change)
        for i in range(size):
            delta, variance = prior / num_data, temperature / (num_data * (h[i] + prior / num_data))
            estimate = np.mean([gradients[s, i] * noise[s, i] for s in range(number)]) / variance
            correction = 0.5 * (1 - beta2) ** 2 * (h[i] - estimate) ** 2 / (h[i] + delta)
            h[i] = beta2 * h[i] + (1 - beta2) * estimate + correction
            g_bar[i] = beta1 * g_bar[i] + (1 - beta1) * np.mean([float(g) for g in gradients[:, i]])
            direction = (g_bar[i] / (1 - beta1 ** (t + 1)) + delta * m[i]) / (h[i] + delta)
            m[i] -= schedule(t) * min(max(direction, -clip_radius), clip_radius)
    np.testing.assert_allclose(moments.hessian, h, rtol=1e-5)
    np.testing.assert_allclose(moments.momentum, g_bar, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params, m, rtol=1e-5, atol=1e-5)


def test_the_mean_field_optimum_is_the_fixed_point():
    """At the exact mean and the diagonal of the exact precision nothing moves, and without chance it is where IVON ends."""
    data = linear_data()
    exact, gradient = exact_posterior(data), gradient_of_mean_nll(data)
    mean = jnp.asarray(exact.mean[:, None], jnp.float32)
    hessian = jnp.asarray((np.diag(exact.precision)[:, None] - PRIOR) / ROWS, jnp.float32)
    optimizer = ivon_optimizer(0.05, num_data=ROWS, prior_precision=PRIOR, beta2=0.9)

    def step(carry, _):
        params, moments = carry
        draws = cubature(params, moments.hessian)
        change, moments = optimizer.update(jax.vmap(gradient)(draws), draws, moments, params)
        return (params + change, moments), None

    there = IVONMoments(gradient(mean), hessian, jnp.int32(1000))
    (moved, moments), _ = jax.jit(step)((mean, there), None)
    np.testing.assert_allclose(moments.hessian, hessian, rtol=1e-4)
    np.testing.assert_allclose(moved, mean, atol=1e-6)

    start = jnp.zeros((FEATURES, 1))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2000)[0])
    params, moments = run((start, optimizer.init(start)))
    np.testing.assert_allclose(params, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.hessian, hessian, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [ROWS, 50])
def test_fit_finds_the_mean_field_posterior(key, batch_size):
    """Exact mean, and variance 1 / diagonal of the exact precision, as the average of four runs within their noise."""
    data, beta2, steps, runs = linear_data(), 0.998, 3000, 4
    exact = exact_posterior(data)
    deviation = 1 / np.sqrt(np.diag(exact.precision))
    method = bc.ensemble(linear(optax.cosine_decay_schedule(0.05, steps), beta2=beta2), runs)
    epochs = steps * batch_size // ROWS
    state = bc.fit(method, data, key, epochs=epochs, batch_size=batch_size, progress=False).state.members
    # The last 500 steps, of rates below 0.003, average over gradients of about one deviation (a Newton step's unit):
    # standard error sqrt(0.003 / 2) = 0.04 deviations a run; 4.5 of them are allowed.
    gap = (np.asarray(state.variables.params[..., 0], float).mean(0) - exact.mean) / deviation
    assert np.abs(gap).max() < 4.5 * 0.04 / np.sqrt(runs)
    # An estimate of h has variance h_i^2 + sum_j H_ij^2 sd_j^2 / sd_i^2 (normal draws), and the batch's noise in the
    # gradient, h_i^2 (rows / batch - 1), on top; a running mean has (1 - beta2) / 2 of it.
    hessian = (exact.precision - PRIOR * np.eye(FEATURES)) / ROWS
    h = np.diag(hessian)
    variance = h**2 + hessian**2 @ deviation**2 / deviation**2 + h**2 * (ROWS / batch_size - 1)
    error = np.sqrt(variance * (1 - beta2) / 2 / runs)
    off = (np.asarray(state.moments.hessian[..., 0], float).mean(0) - h) / error
    assert np.abs(off).max() < 4.5 and np.abs(off.mean()) < 4.5 / np.sqrt(FEATURES)
    assert (error < 0.045 * h).all(), "or the test would see nothing"


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_draws_have_the_stated_variance(key, temperature):
    method = linear(num_draws=4000, temperature=temperature, initial_hessian=2.0)
    state = jax.jit(method.init)(key, None)
    pred = bc.predict(method, state, np.eye(FEATURES, dtype=np.float32), key)
    expected = np.sqrt(temperature / (ROWS * 2.0 + PRIOR))
    mean = np.asarray(state.variables.params)[:, 0]
    np.testing.assert_allclose(pred.mean[..., 0].std(0), expected, rtol=4.5 / np.sqrt(2 * 4000))
    np.testing.assert_allclose(pred.mean[..., 0].mean(0), mean, atol=4.5 * expected / np.sqrt(4000))
    draws = jax.vmap(lambda k: method.draw(state, k).params)(jax.random.split(key, 4000))
    np.testing.assert_allclose(draws[..., 0], pred.mean[..., 0], atol=1e-6)  # the same networks
    centre = bc.predict(method, state, np.eye(FEATURES, dtype=np.float32), None)
    np.testing.assert_allclose(centre.mean[0, :, 0], mean, atol=1e-6)


def test_a_penalty_counts_once_for_the_data(key):
    """Rate 1, no momentum, a flat likelihood: the step is -(3 + prior m) / (num_data (h + delta)) of the new h."""
    base = linear_model()
    model = base._replace(train=lambda v, x, k: (0 * base.train(v, x, k)[0], (), 3 * jnp.sum(v.params)))
    method = ivon(
        model, bc.homoscedastic(1.0), num_data=50, learning_rate=1.0, num_draws=1, prior_precision=5.0, beta1=0.0
    )
    state = method.init(key, None)
    batch = bc.Batch(jnp.ones((8, FEATURES)), jnp.zeros((8, 1)), jnp.ones(8), jnp.arange(8))
    new, info = jax.jit(method.update)(state, batch, key)
    expected = -(3 + 5 * state.variables.params) / 50 / (new.moments.hessian + 0.1)
    np.testing.assert_allclose(new.variables.params - state.variables.params, expected, rtol=1e-4)
    np.testing.assert_allclose(info["loss"], 0.5 * np.log(2 * np.pi), rtol=1e-5)  # without the penalty


def test_several_draws_are_the_mean_of_their_gradients(key):
    """The step of four draws, by hand from the four networks that `draw` gives for their keys."""
    data = linear_data()
    method = linear(1.0, draws_per_update=4, beta1=0.0, beta2=0.5)
    state = method.init(key, None)
    batch = bc.Batch(jnp.asarray(data.inputs), jnp.asarray(data.targets), jnp.ones(ROWS), jnp.arange(ROWS))
    new, _ = jax.jit(method.update)(state, batch, key)
    keys = [jax.random.split(k)[0] for k in jax.random.split(key, 4)]
    draws = jnp.stack([method.draw(state, k).params for k in keys])
    gradients = jax.vmap(gradient_of_mean_nll(data))(draws)
    optimizer = ivon_optimizer(1.0, num_data=ROWS, prior_precision=PRIOR, beta1=0.0, beta2=0.5)
    change, moments = optimizer.update(gradients, draws, state.moments, state.variables.params)
    np.testing.assert_allclose(new.moments.hessian, moments.hessian, rtol=1e-3)
    np.testing.assert_allclose(new.variables.params, state.variables.params + change, rtol=1e-3, atol=1e-4)


def test_the_precision_stays_positive(key):
    """Whatever the draws say of the curvature: here it is -5, a hill."""
    optimizer = ivon_optimizer(0.1, num_data=10, prior_precision=1.0, beta2=0.5)
    params = jnp.zeros(100)

    def step(moments, key):
        draws = optimizer.sample(key, params, moments)[None]
        moments = optimizer.update(-5 * draws, draws, moments, params)[1]
        return moments, moments.hessian

    _, hessians = jax.lax.scan(step, optimizer.init(params), jax.random.split(key, 200))
    assert (hessians + 0.1 > 0).all() and jnp.isfinite(hessians).all()
    assert (hessians < 0).any()


def test_small_steps_are_not_lost_in_bfloat16(key):
    optimizer = ivon_optimizer(0.1, num_data=10, prior_precision=1.0)
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    moments = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves((moments.hessian, moments.momentum))} == {jnp.dtype("float32")}
    draws = jax.tree.map(lambda x: x[None], optimizer.sample(key, params, moments))
    assert draws["w"].dtype == jnp.bfloat16
    change, new = optimizer.update(jax.tree.map(jnp.ones_like, draws), draws, moments, params)
    assert (new.hessian["w"] != moments.hessian["w"]).any()
    assert optax.apply_updates(params, change)["w"].dtype == jnp.bfloat16


def test_what_is_not_a_number_comes_through(key):
    method = linear(clip_radius=1.0)
    batch = bc.Batch(jnp.full((8, FEATURES), jnp.nan), jnp.zeros((8, 1)), jnp.ones(8), jnp.arange(8))
    new, info = jax.jit(method.update)(method.init(key, None), batch, key)
    assert jnp.isnan(info["loss"]) and jnp.isnan(new.variables.params).all() and jnp.isnan(new.moments.hessian).all()


def test_ensemble_with_settings_and_start(key):
    """Rates of their own, from one trained network; what it leaves starts another method."""
    trained = bc.fit(
        bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1)),
        blobs(),
        key,
        epochs=2,
        batch_size=10,
        progress=False,
    ).state
    required = dict(num_data=30, num_draws=3, prior_precision=1.0)
    build = lambda own: ivon(pure_model(), bc.Categorical, learning_rate=own["rate"], **required)
    lone = build({"rate": 0.1})
    np.testing.assert_array_equal(lone.init(key, trained).variables.params["w"], trained.variables.params["w"])
    both = bc.ensemble(build, settings={"rate": jnp.array([1e-3, 0.1])})
    fitted = bc.fit(both, blobs(), key, epochs=4, batch_size=10, progress=False)
    assert fitted.history["loss"][-1, 1] < fitted.history["loss"][0, 1]
    assert bc.predict(both, fitted.state, blobs().inputs, key).num_members == 6
    one = jax.tree.map(lambda x: x[1], fitted.state.members)
    after = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1)).init(key, one)
    np.testing.assert_array_equal(after.variables.params["w"], one.variables.params["w"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_precision": 0.0}, "`prior_precision` must be positive, got 0.0"),
        ({"learning_rate": -0.1}, "`learning_rate` must be positive, got -0.1"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"initial_hessian": 0.0}, "`initial_hessian` must be positive, got 0.0"),
        ({"clip_radius": -1.0}, "`clip_radius` must be positive, got -1.0"),
        ({"beta1": 1.0}, r"`beta1` must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"`beta2` must be in \[0, 1\), got -0.1"),
        ({"num_draws": 0}, "`num_draws` must be a whole number of at least 1, got 0"),
        ({"draws_per_update": 0}, "`draws_per_update` must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        linear(**settings)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        ivon(pure_model(), bc.Categorical, learning_rate=0.1, num_draws=2, prior_precision=1.0)
