"""Methods against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.map_estimate import check_whole

pytestmark = pytest.mark.core
NOISE = 0.25


def linear_model(features):
    def init(key):
        return bc.Variables(jnp.zeros((features, 1)))

    def apply(variables, inputs, key):
        return inputs @ variables.params

    return bc.Model(init, apply, lambda v, x, k: (apply(v, x, None), (), 0.0))


def linear_data(rng, rows=80, features=4):
    inputs = rng.normal(size=(rows, features)) @ (np.eye(features) + 0.3)
    targets = inputs @ rng.normal(size=(features, 1)) + np.sqrt(NOISE) * rng.normal(size=(rows, 1))
    return bc.Dataset(inputs.astype(np.float32), targets.astype(np.float32))


def exact_posterior(data, prior_precision):
    precision = data.inputs.T.astype(float) @ data.inputs / NOISE + prior_precision * np.eye(data.inputs.shape[1])
    return np.linalg.solve(precision, data.inputs.T @ data.targets / NOISE), precision


@pytest.mark.parametrize("batch_size", [80, 16, 24])  # 24 does not divide the 80 rows
def test_map_with_a_prior_is_ridge_regression(rng, key, batch_size):
    data = linear_data(rng)
    mean, _ = exact_posterior(data, prior_precision=20.0)
    schedule = optax.cosine_decay_schedule(0.02, 400 * -(-80 // batch_size))
    method = bc.map_estimate(
        linear_model(4), bc.homoscedastic(NOISE), optax.adam(schedule), prior_precision=20.0, num_data=80
    )
    fitted = bc.fit(method, data, key, epochs=400, batch_size=batch_size, progress=False)
    np.testing.assert_allclose(fitted.state.variables.params, mean, rtol=0.02 if batch_size < 80 else 1e-3, atol=0.01)


def test_mc_dropout_variance_of_a_linear_network(key):
    """Dropout of rate p before a dense layer: variance p / (1 - p) sum w^2 x^2."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dropout, self.dense = nnx.Dropout(0.3, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.dropout(x))

    method = bc.mc_dropout(bc.from_nnx(Net), bc.homoscedastic(1.0), optax.sgd(0.1), num_draws=20_000)
    state = method.init(key, None)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    pred = bc.predict(method, state, x, key)
    kernel = np.asarray(state.variables.params["dense"]["kernel"])
    np.testing.assert_allclose(bc.decompose(pred).epistemic, 0.3 / 0.7 * (x**2 @ kernel**2), rtol=0.04)


def test_mc_dropout_draws_are_functions(key):
    """One mask a draw: equal inputs get equal outputs, wherever they stand."""
    method = bc.mc_dropout(bc.models.mlp(4, (8,), 3, dropout=0.5), bc.Categorical, optax.sgd(0.1), num_draws=4)
    pred = bc.predict(method, method.init(key, None), np.ones((5, 4), np.float32), key)
    assert (pred.logits == pred.logits[:, :1]).all() and (pred.logits[0] != pred.logits[1]).any()


def test_own_loss_and_objective(key):
    data = blobs()
    zero_targets = lambda outputs, targets: (outputs**2).sum(-1)
    method = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1), loss=zero_targets)
    fitted = bc.fit(method, data, key, epochs=80, batch_size=30, progress=False)
    assert np.abs(fitted.state.variables.params["w"]).max() < 0.05

    def objective(variables, batch, key, step):
        return ((variables.params["w"] - 2) ** 2).sum(), (variables.stats, {"loss": 1 + jnp.float32(step)})

    method = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1), objective=objective)
    fitted = bc.fit(method, data, key, epochs=60, batch_size=15, progress=False)
    np.testing.assert_allclose(fitted.state.variables.params["w"], 2, atol=0.05)
    np.testing.assert_allclose(fitted.history["loss"][:2, 0], [1.5, 3.5])  # mean step number of each epoch


def test_a_penalty_is_shared_by_the_data(key):
    base = pure_model()
    model = base._replace(train=lambda v, x, k: (base.train(v, x, k)[0], (), 3.0 * jnp.sum(v.params["b"])))
    with pytest.raises(ValueError, match="`num_data` is required for a model with a penalty"):
        bc.fit(
            bc.map_estimate(model, bc.Categorical, optax.sgd(1.0)),
            blobs(),
            key,
            epochs=1,
            batch_size=30,
            progress=False,
        )
    flat = lambda outputs, targets: jnp.zeros(outputs.shape[0])
    method = bc.map_estimate(model, bc.Categorical, optax.sgd(1.0), loss=flat, num_data=30)
    fitted = bc.fit(method, blobs(), key, epochs=1, batch_size=30, progress=False)
    np.testing.assert_allclose(fitted.state.variables.params["b"], -3 / 30, rtol=1e-5)


def test_settings_on_the_member_axis(key):
    build = lambda s: bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(s["learning_rate"]))
    method = bc.ensemble(build, settings={"learning_rate": jnp.array([0.0, 0.3])})
    start = method.init(key, None)
    fitted = bc.fit(method, blobs(), key, epochs=3, batch_size=10, start=start, progress=False)
    w, before = fitted.state.members.variables.params["w"], start.members.variables.params["w"]
    np.testing.assert_array_equal(w[0], before[0])
    lone = bc.fit(
        bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(0.3)),
        blobs(),
        jax.random.fold_in(key, 1),
        epochs=3,
        batch_size=10,
        start=jax.tree.map(lambda x: x[1], start.members),
        progress=False,
    )
    np.testing.assert_allclose(w[1], lone.state.variables.params["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m: bc.map_estimate(m, bc.Categorical, optax.adam(1e-2), prior_precision=1.0),
            "`num_data` is required with `prior_precision`, got None",
        ),
        (
            lambda m: bc.map_estimate(m, bc.Categorical, optax.adam(1e-2), objective=len, loss=len),
            "`objective` replaces the whole objective",
        ),
        (
            lambda m: bc.mc_dropout(m, bc.Categorical, optax.adam(1e-2), num_draws=0),
            "`num_draws` must be a whole number of at least 1, got 0",
        ),
        (
            lambda m: bc.map_estimate(m, bc.Categorical, optax.adam(1e-2), prior_precision=-1.0, num_data=9),
            "`prior_precision` must not be negative, got -1.0",
        ),
        (
            lambda m: bc.ensemble(bc.ensemble(bc.map_estimate(m, bc.Categorical, optax.adam(1e-2)), 2), 3),
            "`method` must be one without members, got an ensemble",
        ),
        (lambda m: bc.models.mlp(4, (8,), 3, dropout=1.5), r"`dropout` must be a rate in \[0, 1\), got 1.5"),
        (lambda m: bc.homoscedastic(0.0), "`variance` must be positive, got 0.0"),
        (
            lambda m: bc.ensemble(bc.map_estimate(m, bc.Categorical, optax.adam(1e-2)), 0),
            "`num_members` must be a whole number of at least 1, got 0",
        ),
        (
            lambda m: bc.ensemble(bc.map_estimate(m, bc.Categorical, optax.adam(1e-2))),
            "`num_members` or `settings` must be given, one of them",
        ),
        (
            lambda m: bc.ensemble(lambda s: None, settings={"a": jnp.ones(2), "b": jnp.ones(3)}),
            "`settings` must be arrays with the same leading member axis",
        ),
    ],
)
def test_bad_settings(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build(pure_model())


def test_ensemble_of_the_wrong_kind(unchecked):
    lone = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(1e-2))
    with pytest.raises(TypeError, match="`method` must be a Method when `num_members` is given, got function"):
        bc.ensemble(lambda settings: lone, 3)
    with pytest.raises(TypeError, match="`method` must be a function from one member's settings"):
        bc.ensemble(lone, settings=jnp.ones(3))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(7)])
def test_whole_numbers_of_python_and_numpy(value):
    check_whole("number", value, 3, "3 is usual.")


@pytest.mark.parametrize("value", [2, np.int64(-3), 3.0, True, np.bool_(True), "3", None])
def test_other_than_whole_numbers(value):
    with pytest.raises(ValueError, match=r"`number` must be a whole number of at least 3, got .*\. 3 is usual\."):
        check_whole("number", value, 3, "3 is usual.")
