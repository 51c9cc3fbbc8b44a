"""SVGD against a plain float64 step, and its fixed point against the exact posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows
from exact import NOISE, PRIOR, exact_posterior, linear_data, linear_model
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.svgd import svgd

pytestmark = pytest.mark.core


def classifier(model=None, **settings):
    settings = {"num_data": 30, "num_particles": 3, "prior_precision": 1.0, **settings}
    return svgd(model or pure_model(), bc.Categorical, optax.adam(0.05), **settings)


def step_by_hand(particles, gradients):
    """mean_j [k(x_j, x_i) g_j + d k(x_j, x_i) / d x_j], in float64 and with loops."""
    number = len(particles)
    distances = [np.linalg.norm(particles[i] - particles[j]) for i in range(number) for j in range(i)]
    bandwidth = np.median(distances) ** 2 / np.log(number)
    moves = np.zeros_like(particles)
    for i in range(number):
        for j in range(number):
            gap = particles[j] - particles[i]
            k = np.exp(-(gap @ gap) / bandwidth)
            moves[i] += (k * gradients[j] - 2 / bandwidth * gap * k) / number
    return moves


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_step_by_hand(key, temperature):
    """A batch of 15 rows stands for 60, whatever its size; sgd moves by the step per row of the data."""
    (inputs, targets, _), lr = linear_data(15, 3), 0.7
    method = svgd(
        linear_model(3),
        bc.homoscedastic(NOISE),
        optax.sgd(lr),
        num_data=60,
        num_particles=5,
        prior_precision=PRIOR,
        temperature=temperature,
    )
    state = method.init(key, None)
    new, info = jax.jit(method.update)(state, all_rows(linear_data(15, 3)), key)
    x, y = inputs.astype(float), targets[:, 0].astype(float)
    particles = np.asarray(state.variables.params, float)[..., 0]
    residuals = y - particles @ x.T
    gradients = (60 / 15 * residuals @ x / NOISE - PRIOR * particles) / temperature
    moved = particles + lr * step_by_hand(particles, gradients) / 60
    np.testing.assert_allclose(new.variables.params[..., 0], moved, rtol=1e-5, atol=1e-6)
    nll = 0.5 * np.log(2 * np.pi * NOISE) + residuals**2 / (2 * NOISE)
    np.testing.assert_allclose(info["loss"], nll.mean(), rtol=1e-5)


@pytest.fixture(scope="module")
def particles():
    """Number of particles -> where they end on the regression with three features."""
    data, ended = linear_data(60, 3), {}
    for number in (5, 20):
        adam = optax.adam(optax.cosine_decay_schedule(0.02, 3000))
        method = svgd(
            linear_model(3), bc.homoscedastic(NOISE), adam, num_data=60, num_particles=number, prior_precision=PRIOR
        )
        fitted = bc.fit(method, data, jax.random.key(7), epochs=3000, batch_size=60, progress=False)
        ended[number] = np.asarray(fitted.state.variables.params, float)[..., 0]
    return ended


def test_mean_of_the_particles_is_the_posterior_mean(particles):
    """Not exact with this kernel: of five particles it is off by 0.02 of a standard deviation, of twenty by 2e-5."""
    exact = exact_posterior(linear_data(60, 3))
    deviation = np.sqrt(np.diag(exact.covariance))
    np.testing.assert_allclose(particles[5].mean(0), exact.mean, atol=0.05 * deviation.min())
    np.testing.assert_allclose(particles[20].mean(0), exact.mean, atol=1e-3 * deviation.min())
    wrong = exact_posterior(linear_data(60, 3), prior=1.5 * PRIOR)
    assert (np.abs(particles[20].mean(0) - wrong.mean) > 1e-2 * deviation).any()


def test_variance_of_the_particles_grows_towards_the_posterior(particles):
    """Of three dimensions 0.46 with 5 particles, 0.65 with 20 and 0.84 with 80; always too little."""
    covariance = exact_posterior(linear_data(60, 3)).covariance
    few, many = (particles[number].var(0) / np.diag(covariance) for number in (5, 20))
    assert (few > 0.35).all() and (few < many).all() and (many > 0.6).all() and (many < 0.8).all()
    shape = np.linalg.solve(covariance, np.cov(particles[20].T, bias=True))  # a multiple of the identity
    np.testing.assert_allclose(shape, np.trace(shape) / 3 * np.eye(3), atol=0.05)


def test_particles_start_as_members_of_an_ensemble(key):
    base = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1))
    members = bc.ensemble(base, 3).init(key, None)
    state = classifier().init(key, None)
    np.testing.assert_array_equal(state.variables.params["w"], members.members.variables.params["w"])
    again = classifier().init(jax.random.key(1), members.members)
    np.testing.assert_array_equal(again.variables.params["w"], members.members.variables.params["w"])
    own = classifier().init(jax.random.key(1), state)
    np.testing.assert_array_equal(own.variables.params["w"], state.variables.params["w"])


def test_fit_from_a_deep_ensemble(key):
    base = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1))
    trained = bc.fit(bc.ensemble(base, 3), blobs(), key, epochs=2, batch_size=10, progress=False).state
    still = svgd(pure_model(), bc.Categorical, optax.sgd(0.0), num_data=30, num_particles=3, prior_precision=1.0)
    fitted = bc.fit(still, blobs(), key, epochs=1, batch_size=10, start=trained.members, progress=False)
    np.testing.assert_array_equal(fitted.state.variables.params["w"], trained.members.variables.params["w"])


def test_predictions_and_draws_are_the_particles(key):
    method, inputs = classifier(), blobs().inputs
    state = method.init(key, None)
    pred = bc.predict(method, state, inputs, key)
    w, b = state.variables.params["w"], state.variables.params["b"]
    np.testing.assert_allclose(pred.logits, [inputs @ w[i] + b[i] for i in range(3)], rtol=1e-5, atol=1e-5)
    drawn = jax.vmap(lambda k: method.draw(state, k).params["w"])(jax.random.split(key, 300))
    counts = [int((drawn == w[i]).all((1, 2)).sum()) for i in range(3)]
    assert sum(counts) == 300 and min(counts) > 100 - 4 * np.sqrt(300 * 2 / 9)


def test_stats_are_each_particle_s_own(key):
    """Batch norm uses the moments that its particle came with, and leaves them alone, whatever the optimiser decays."""
    model = bc.models.mlp(4, (8,), 3, batch_norm=True)
    method = svgd(model, bc.Categorical, optax.adamw(0.1), num_data=30, num_particles=3, prior_precision=1.0)
    state = method.init(key, None)
    shifts = jnp.arange(3.0)
    stats = jax.tree.map(lambda x: x + shifts.reshape(3, *[1] * (x.ndim - 1)), state.variables.stats)
    state = state._replace(variables=state.variables._replace(stats=stats))
    data = blobs()
    new, info = jax.jit(method.update)(state, all_rows(data), key)
    jax.tree.map(np.testing.assert_array_equal, new.variables.stats, stats)
    pred = bc.predict(method, state, data.inputs, key)
    np.testing.assert_allclose(info["loss"], -pred.member_log_prob(data.targets).mean(), rtol=1e-5)


def test_an_ensemble_of_particle_sets(key):
    method = bc.ensemble(classifier(), 2)
    fitted = bc.fit(method, blobs(), key, epochs=40, batch_size=10, progress=False)
    assert fitted.state.members.variables.params["w"].shape == (2, 3, 4, 3)
    pred = bc.predict(method, fitted.state, blobs().inputs, key)
    assert pred.num_members == 6 and (fitted.history["loss"][-1] < fitted.history["loss"][0]).all()


def test_nan_inputs_come_through(key):
    method, batch = classifier(), all_rows(blobs())
    batch = batch._replace(inputs=batch.inputs.at[0, 0].set(jnp.nan))
    new, info = jax.jit(method.update)(method.init(key, None), batch, key)
    assert np.isnan(info["loss"]) and np.isnan(new.variables.params["w"]).any()


def test_equal_particles_are_refused(key):
    one = pure_model().init(key)
    with pytest.raises(ValueError, match=r"`start` must hold 3 networks on a leading axis.*Particles that are equal"):
        classifier().init(key, one)
    other = bc.ensemble(bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1)), 2).init(key, None)
    with pytest.raises(
        ValueError, match=r"`start` must hold 3 networks .*, \(3, 3\) at `.params\['b'\]`, got \(2, 3\)"
    ):
        classifier().init(key, other.members)
    wide = pure_model()
    members = jax.vmap(wide.init)(jax.random.split(key, 3))
    members.params["w"] = members.params["w"][:, :2]
    with pytest.raises(ValueError, match=r"\(3, 4, 3\) at `.params\['w'\]`, got \(3, 2, 3\)"):
        classifier().init(key, members)
    with pytest.raises(ValueError, match="`start` must hold 3 networks of this model, got a tree"):
        classifier().init(key, bc.Variables({"w": members.params["w"]}))


def test_copies_of_one_network_are_refused(key):
    one = pure_model().init(key)
    copies = jax.tree.map(lambda x: jnp.stack([x, x, x]), one)
    with pytest.raises(ValueError, match=r"`start` must hold 3 different networks, got 1\. Particles that are equal"):
        classifier().init(key, copies)
    copies.params["b"] = copies.params["b"].at[0, 0].add(1e-6)
    with pytest.raises(ValueError, match=r"`start` must hold 3 different networks, got 2\."):
        classifier().init(key, copies)
    with pytest.raises(
        ValueError, match=r"`loss` must stay finite|state not finite"
    ):  # whose values `fit` does not see
        copies = jax.tree.map(lambda x: jnp.stack([x, x, x]), one)
        bc.fit(classifier(), blobs(), key, epochs=2, batch_size=30, start=copies, progress=False)


def test_a_model_with_a_penalty_is_refused(key):
    base = pure_model()
    method = classifier(base._replace(train=lambda v, x, k: (base.train(v, x, k)[0], (), jnp.sum(v.params["b"]))))
    with pytest.raises(ValueError, match="`model` must have no penalty, got one that adds nats"):
        method.update(method.init(key, None), all_rows(blobs()), key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_particles": 1}, "`num_particles` must be a whole number of at least 2, got 1"),
        ({"prior_precision": 0.0}, "`prior_precision` must be positive, got 0.0"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"num_data": -1}, "`num_data` must be positive, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        svgd(pure_model(), bc.Categorical, optax.adam(0.1), num_particles=3, prior_precision=1.0)
