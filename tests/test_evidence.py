"""Prior precision and noise from the marginal likelihood, and from validation rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows
from exact import FEATURES, NOISE, ROWS, exact_posterior, linear_data, linear_model
from scipy.optimize import minimize
from test_laplace import evidence, passed

import bayescal as bc

pytestmark = pytest.mark.core


def linear(key, *, prior=1.0, structure=None, members=None):
    """Method and state of the regression, around the exact mode for a precision of 4."""
    data = linear_data()
    start = bc.Variables(jnp.asarray(exact_posterior(data).mean[:, None], jnp.float32))
    structure = structure or bc.full()
    method = bc.laplace(
        linear_model(), bc.homoscedastic(NOISE), num_data=ROWS, structure=structure, prior_precision=prior
    )
    method = method if members is None else bc.ensemble(method, members)
    return method, passed(method, data, start, key), data


def test_prior_precision_and_noise_maximise_the_marginal_likelihood(key):
    """Against scipy's search over the closed form in float64, at the mode held fixed."""
    method, state, data = linear(key)
    inputs, targets = np.asarray(data.inputs, float), np.asarray(data.targets, float)[:, 0]
    mode = np.asarray(state.variables.params, float)[:, 0]
    error = targets - inputs @ mode

    def value(logs):
        prior, noise = np.exp(logs[0]), NOISE * np.exp(logs[1])
        precision = inputs.T @ inputs / noise + prior * np.eye(FEATURES)
        fit = -0.5 * (ROWS * np.log(2 * np.pi * noise) + error @ error / noise)
        return -(fit - 0.5 * (np.linalg.slogdet(precision)[1] - FEATURES * logs[0] + prior * mode @ mode))

    only = minimize(lambda logs: value([logs[0], 0.0]), [0.0], tol=1e-10)
    both = minimize(value, [0.0, 0.0], tol=1e-10)
    tuned = bc.fit_prior_precision(method, state)
    np.testing.assert_allclose(tuned.prior_precision, np.exp(only.x[0]), rtol=1e-3)
    np.testing.assert_allclose(method.evidence(tuned), -only.fun, rtol=1e-5)
    assert tuned.noise_scale == 1
    tuned = bc.fit_prior_precision(method, state, noise=True)
    np.testing.assert_allclose([tuned.prior_precision, tuned.noise_scale], np.exp(both.x), rtol=1e-3)
    np.testing.assert_allclose(method.evidence(tuned), -both.fun, rtol=1e-5)
    far = bc.fit_prior_precision(method, state._replace(prior_precision=jnp.float32(1e-5)))
    np.testing.assert_allclose(far.prior_precision, np.exp(only.x[0]), rtol=1e-3)


def test_a_tuned_noise_is_in_the_predictive(key):
    """Exactly the posterior that the tuned prior and noise would have given."""
    method, state, data = linear(key, prior=4.0)
    scaled = state._replace(noise_scale=jnp.float32(2.0))
    pred = bc.predict(method, scaled, data.inputs[:5], key)
    exact = exact_posterior(data, noise=2 * NOISE)
    asked = data.inputs[:5].astype(float)
    np.testing.assert_allclose(pred.variance, 2 * NOISE, rtol=1e-6)
    np.testing.assert_allclose(
        pred.mean_variance[0, :, 0], np.einsum("bi,ij,bj->b", asked, exact.covariance, asked), rtol=1e-5
    )
    at_its_mode = bc.Variables(jnp.asarray(exact.mean[:, None], jnp.float32))
    state = passed(method, data, at_its_mode, key)._replace(noise_scale=jnp.float32(2.0))
    np.testing.assert_allclose(method.evidence(state), evidence(data, 4.0, 2 * NOISE), rtol=1e-5)


def test_every_layer_and_every_member_has_its_own(key):
    rng = np.random.default_rng(0)
    data = bc.Dataset(rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 3, 60).astype(np.int32))
    model = bc.models.mlp(4, (5,), 3)
    base = bc.map_estimate(model, bc.Categorical, optax.adam(3e-2), prior_precision=1.0, num_data=60)
    trained = bc.fit(bc.ensemble(base, 2), data, key, epochs=60, batch_size=60, progress=False).state
    lone = bc.laplace(model, bc.Categorical, num_data=60, structure=bc.kronecker(), prior_precision=np.ones(2))
    method = bc.ensemble(lone, 2)
    state = passed(method, data, trained, key)
    before = jax.vmap(lone.evidence)(state.members)
    tuned = bc.fit_prior_precision(method, state)
    assert tuned.members.prior_precision.shape == (2, 2)
    assert len(np.unique(np.asarray(tuned.members.prior_precision))) == 4
    after = jax.vmap(lone.evidence)(tuned.members)
    assert (after > before).all()
    for layer in range(2):  # a maximum in every direction
        for factor in (0.9, 1.1):
            other = tuned.members.prior_precision.at[:, layer].mul(factor)
            assert (jax.vmap(lone.evidence)(tuned.members._replace(prior_precision=other)) < after + 1e-5).all()


def test_validation_rows_pick_from_a_grid(key):
    method, state, _ = linear(key, members=2)
    rng = np.random.default_rng(8)
    inputs = rng.normal(size=(50, FEATURES)).astype(np.float32)
    held_out = bc.Dataset(inputs, rng.normal(size=(50, 1)).astype(np.float32))
    grid = [0.1, 1.0, 10.0, 1000.0]
    chosen = bc.select_prior_precision(method, state, held_out, key, grid=grid)

    def score(value):
        members = state.members._replace(prior_precision=jnp.full(2, value))
        pred = bc.predict(method, state._replace(members=members), held_out.inputs, key)
        return -pred.log_prob(held_out.targets).mean()

    assert chosen.members.prior_precision[0] == grid[int(np.argmin([score(v) for v in grid]))]
    assert (chosen.members.prior_precision == chosen.members.prior_precision[0]).all()


def test_refusals(key, unchecked):
    method, state, data = linear(key)
    with pytest.raises(ValueError, match=r"`state` must have seen the training data, got one that saw no rows.*`fit"):
        bc.fit_prior_precision(method, method.init(key))
    with pytest.raises(TypeError, match=r"`method` must be `laplace\(...\)` or an ensemble of it"):
        bc.fit_prior_precision(bc.map_estimate(linear_model(), bc.homoscedastic(1.0), optax.sgd(0.1)), state)
    with pytest.raises(TypeError, match=r"`noise` needs normal noise of a fixed variance.*`homoscedastic`"):
        model = bc.models.mlp(4, (), 3)
        other = bc.laplace(model, bc.Categorical, num_data=6, structure=bc.diagonal(), prior_precision=1.0)
        rows = bc.Dataset(np.ones((6, 4), np.float32), np.arange(6, dtype=np.int32) % 3)
        bc.fit_prior_precision(other, passed(other, rows, None, key), noise=True)
    with pytest.raises(
        ValueError, match=r"must have a marginal likelihood with a maximum, got none for member\(s\) \[0\]"
    ):
        nothing = state.variables._replace(params=jnp.zeros((FEATURES, 1)))  # no weight: the tighter the better
        bc.fit_prior_precision(method, passed(method, data, nothing, key))
    for grid in ([], [1.0, 0.0], [np.nan]):
        with pytest.raises(ValueError, match=r"`grid` must hold positive prior precisions"):
            bc.select_prior_precision(method, state, data, key, grid=grid)


@pytest.mark.parametrize("structure", [bc.full(), bc.kronecker()], ids=["full", "kronecker"])
def test_an_indefinite_curvature_is_an_error_and_never_a_posterior(structure, key):
    """Curvature that no sum of squares can have, put there by hand."""
    data, model = linear_data(), bc.models.mlp(FEATURES, (), 1)
    method = bc.laplace(model, bc.homoscedastic(NOISE), num_data=ROWS, structure=structure, prior_precision=1.0)
    state, _ = method.update(method.init(key), all_rows(data), key)
    state = method.end_epoch(state._replace(sums=jax.tree.map(lambda x: -x if x.ndim == 2 else x, state.sums)))
    for tune in (
        lambda: bc.fit_prior_precision(method, state),
        lambda: bc.select_prior_precision(method, state, data, key),
    ):
        with pytest.raises(ValueError, match=r"positive semi-definite curvature, got an indefinite.*`ggn`.*float64"):
            tune()
    pred = method.predict(state, data.inputs[:3], key)
    assert np.isnan(pred.mean_variance).all()  # and evaluation refuses NaN
    drawn = method.draw(state, key)
    assert np.isnan(drawn.params["head"]["kernel"]).all()


def test_training_by_marginal_likelihood_finds_the_fixed_point(key):
    """Mode and precision of the regression that agree with each other: MacKay's equations."""
    data = linear_data()
    inputs, targets = np.asarray(data.inputs, float), np.asarray(data.targets, float)[:, 0]
    prior = 1.0
    for _ in range(200):
        precision = inputs.T @ inputs / NOISE + prior * np.eye(FEATURES)
        mode = np.linalg.solve(precision, inputs.T @ targets / NOISE)
        prior = (FEATURES - prior * np.trace(np.linalg.inv(precision))) / (mode @ mode)
    schedule = optax.cosine_decay_schedule(0.02, 600)
    method = bc.marginal_likelihood_training(
        linear_model(),
        bc.homoscedastic(NOISE),
        optax.adam(schedule),
        num_data=ROWS,
        structure=bc.full(),
        prior_precision=1.0,
        burn_in=100,
        every=10,
    )
    fitted = bc.fit(method, data, key, epochs=700, batch_size=ROWS, progress=False)
    np.testing.assert_allclose(fitted.state.prior_precision, prior, rtol=1e-3)
    np.testing.assert_allclose(fitted.state.variables.params[:, 0], mode, atol=1e-3)
    told = fitted.history["prior_precision"][:, 0]
    assert (told[:109] == 1).all() and told[-1] == pytest.approx(prior, rel=1e-3)
    np.testing.assert_allclose(fitted.history["log_evidence"][-1, 0], evidence(data, prior, NOISE), rtol=1e-4)
    pred = bc.predict(method, fitted.state, data.inputs, key)
    np.testing.assert_allclose(pred.mean[0, :, 0], inputs @ mode, atol=5e-3)
    for name, value in (("burn_in", -1), ("every", 1), ("newton_steps", 0)):
        settings = {"burn_in": 0, "every": 2, name: value}
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number"):
            bc.marginal_likelihood_training(
                linear_model(),
                bc.homoscedastic(NOISE),
                optax.adam(0.1),
                num_data=ROWS,
                structure=bc.full(),
                prior_precision=1.0,
                **settings,
            )
