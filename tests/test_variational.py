"""Variational inference: guides against exact posteriors, the KL and its share, priors, scopes, annealing."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from bands import all_rows
from exact import FEATURES, NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model
from methods import blobs, pure_model
from numpyro.infer.autoguide import AutoDiagonalNormal
from scipy.stats import multivariate_normal, norm, t

import bayescal as bc

pytestmark = pytest.mark.core


def linear(optimizer, guide=None, num_draws=2, **settings):
    settings = {"prior": bc.priors.normal(PRIOR**-0.5), "num_data": ROWS, **settings}
    return bc.variational(
        linear_model(), bc.homoscedastic(NOISE), optimizer, guide=guide, num_draws=num_draws, **settings
    )


def decaying(hold, over=200):
    """Adam whose rate falls as 1 / step after `hold` steps, the fastest that still averages the noise of the draws away."""
    return optax.adam(lambda step: 0.01 / (1 + jnp.maximum(step - hold, 0) / over))


def settled(method, steps, batch_size, key):
    """The state after `steps` updates in one program, by batches as `fit` makes them: the last of an epoch is padded."""
    data, number = all_rows(linear_data()), -(-ROWS // batch_size)

    def step(state, given):
        key, place = given
        rows = jnp.arange(batch_size) + place * batch_size
        index = jax.random.permutation(key, ROWS)[jnp.minimum(rows, ROWS - 1)]
        weights = (rows < ROWS) * (batch_size / (rows < ROWS).sum())
        batch = bc.Batch(data.inputs[index], data.targets[index], weights, index)
        return method.update(state, data if batch_size == ROWS else batch, key)[0], None

    @jax.jit
    def run(key):
        given = jax.random.split(key, steps), jnp.arange(steps) % number
        return jax.lax.scan(step, method.init(key, None), given)[0]

    return run(key)


def moments(state):
    """Mean and covariance of the posterior, in float64, from NumPyro's parameters."""
    p = {name.removeprefix("weights_"): np.asarray(x, float) for name, x in state.posterior.items()}
    scale = np.log1p(np.exp(p.get("auto_scale", np.zeros(1))))
    if "auto_scale_tril" in p:
        cholesky = dist.biject_to(dist.constraints.scaled_unit_lower_cholesky)(state.posterior["auto_scale_tril"])
        cholesky = np.asarray(cholesky, float)
        return p["auto_loc"], cholesky @ cholesky.T
    if "auto_cov_factor" in p:
        factor = p["auto_cov_factor"] * scale[:, None]
        return p["auto_loc"], factor @ factor.T + np.diag(scale**2)
    return p["auto_loc"], np.diag(scale**2)


def apart(got, wanted):
    """Distance relative to what is wanted: of covariances, in the Frobenius norm."""
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


# Of N draws a covariance of 20 weights is known to some sqrt(16 / N) in this norm, 0.9 % of 200,000; of batches to less.
GUIDES = {"mean field": bc.guides.normal, "full": bc.guides.full, "low rank": bc.guides.low_rank(FEATURES)}


@pytest.mark.parametrize(
    ("name", "batch_size", "steps", "hold"),
    [
        ("mean field", ROWS, 40_000, 0),
        pytest.param("mean field", 60, 60_000, 0, marks=pytest.mark.slow),  # 60 does not divide the 200 rows
        pytest.param("mean field", 50, 60_000, 0, marks=pytest.mark.slow),
        pytest.param("full", ROWS, 150_000, 0, marks=pytest.mark.slow),
        pytest.param("full", 60, 600_000, 20_000, marks=pytest.mark.slow),
        pytest.param("full", 50, 600_000, 20_000, marks=pytest.mark.slow),
        pytest.param("low rank", ROWS, 120_000, 20_000, marks=pytest.mark.slow),
        pytest.param("low rank", 50, 600_000, 10_000, marks=pytest.mark.slow),
    ],
)
def test_a_guide_finds_the_exact_optimum(key, name, batch_size, steps, hold):
    """Guides that hold the posterior find it; the mean-field one its mean and 1 / diagonal of its precision: to 2 %."""
    exact = exact_posterior(linear_data())
    # the low rank has many factors of one covariance to wander among: of batches its rate must fall more slowly
    over = 1000 if (name, batch_size) == ("low rank", 50) else 200
    state = settled(linear(decaying(hold, over), GUIDES[name]), steps, batch_size, key)
    mean, covariance = moments(state)
    wanted = np.diag(1 / np.diag(exact.precision)) if name == "mean field" else exact.covariance
    assert apart(mean, exact.mean) < 0.02
    assert apart(covariance, wanted) < 0.02


@pytest.mark.parametrize("batch_size", [ROWS, 60, pytest.param(50, marks=pytest.mark.slow)])
def test_delta_is_ridge_regression(key, batch_size):
    steps = 400
    rate = optax.cosine_decay_schedule(0.02, steps * -(-ROWS // batch_size))
    method = linear(optax.adam(rate), bc.guides.delta, num_draws=1)
    fitted = bc.fit(method, linear_data(), key, epochs=steps, batch_size=batch_size, progress=False)
    mean = exact_posterior(linear_data()).mean
    # of batches the rate's last hundred steps average: within the 2 %
    assert apart(fitted.state.posterior["weights_auto_loc"], mean) < (1e-4 if batch_size == ROWS else 0.02)
    pred = bc.predict(method, fitted.state, np.eye(FEATURES, dtype=np.float32), key)
    np.testing.assert_array_equal(pred.mean[0, :, 0], fitted.state.posterior["weights_auto_loc"])
    assert method.draw is None and not bc.decompose(pred).epistemic.any()


def one_batch(rows=5, features=FEATURES):
    """Inputs of zero: the likelihood of a linear model does not depend on its weights."""
    return bc.Batch(jnp.zeros((rows, features)), jnp.zeros((rows, 1)), jnp.ones(rows), jnp.arange(rows))


def with_posterior(state, mean, covariance):
    """The state of a full or low-rank guide at this normal."""
    tril = dist.biject_to(dist.constraints.scaled_unit_lower_cholesky).inv(jnp.linalg.cholesky(covariance))
    return state._replace(posterior={"auto_loc": jnp.asarray(mean), "auto_scale_tril": tril})


def sampled_kl(method, state, keys=20_000):
    """Mean of the info's KL over keys, and its standard error."""
    update = lambda key: method.update(state, one_batch(features=2), key)[1]["kl"]
    nats = np.asarray(jax.jit(jax.vmap(update))(jax.random.split(jax.random.key(3), keys)), float)
    return nats.mean(), nats.std() / np.sqrt(keys)


def two_weights(guide, prior, **settings):
    method = bc.variational(
        linear_model(2),
        bc.homoscedastic(1.0),
        optax.sgd(0.0),
        num_data=50,
        num_draws=1,
        guide=guide,
        prior=prior,
        **settings,
    )
    return method, method.init(jax.random.key(1), None)


def test_the_kl_of_normals_is_the_closed_form(key):
    """By the formula in float64 and by NumPyro, with a scale of its own for each layer; the same for every key."""
    scales = {"b": 0.4, "w": 0.7}
    method = bc.variational(
        pure_model(), bc.Categorical, optax.sgd(0.0), num_data=30, num_draws=1, prior=bc.priors.normal(scales),
        initial_scale=0.02,
    )  # fmt: skip
    fitted = bc.fit(method, blobs(), key, epochs=1, batch_size=10, progress=False)
    s, p = 0.02, np.repeat([0.4, 0.7], [3, 12])
    m = np.asarray(fitted.state.posterior["weights_auto_loc"], float)
    expected = np.sum(np.log(p / s) + (s**2 + m**2) / (2 * p**2) - 0.5)
    np.testing.assert_allclose(fitted.history["kl"][0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(dist.kl_divergence(dist.Normal(m, s), dist.Normal(0, p)).sum(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["normal", "student_t", "scale_mixture"])
@pytest.mark.parametrize("guide", [bc.guides.normal, bc.guides.full])
def test_the_kl_is_the_integral(name, guide):
    """Of two weights, on a grid in float64; where it is sampled, its mean over keys is within four standard errors."""
    prior, log_prior = {
        "normal": (bc.priors.normal(0.8), lambda w: norm.logpdf(w, 0, 0.8)),
        "student_t": (bc.priors.student_t(3.0, 0.5), lambda w: t.logpdf(w, 3, 0, 0.5)),
        "scale_mixture": (
            bc.priors.scale_mixture((1.0, 0.1), (0.25, 0.75)),
            lambda w: np.log(0.25 * norm.pdf(w, 0, 1.0) + 0.75 * norm.pdf(w, 0, 0.1)),
        ),
    }[name]
    method, state = two_weights(guide, prior, initial_scale=0.3)
    mean, covariance = np.array([0.5, -0.2]), 0.09 * np.eye(2)
    if guide is bc.guides.full:
        covariance = np.array([[0.09, 0.05], [0.05, 0.06]])
        state = with_posterior(state, jnp.asarray(mean, jnp.float32), jnp.asarray(covariance, jnp.float32))
    else:
        state = state._replace(posterior={**state.posterior, "weights_auto_loc": jnp.asarray(mean, jnp.float32)})
    axes = [np.linspace(m - 8 * s, m + 8 * s, 1201) for m, s in zip(mean, np.sqrt(np.diag(covariance)), strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    log_q = multivariate_normal(mean, covariance).logpdf(grid)
    cell = np.prod([a[1] - a[0] for a in axes])
    expected = float((np.exp(log_q) * (log_q - log_prior(grid).sum(-1))).sum() * cell)
    told, error = sampled_kl(method, state)
    closed = name == "normal" and guide is bc.guides.normal
    assert (error < 1e-6) == closed
    assert abs(told - expected) < (1e-4 * expected if closed else 4 * error)


def pull(rows=5, layers=1, scale=0.5, **settings):
    """What one step of rate 1 takes off a location of ones where the likelihood is flat: the gradient of the KL's share."""
    features = 12
    init = lambda key: bc.Variables({str(i): jnp.ones((features // layers, 1)) for i in range(layers)})
    apply = lambda v, x, key: x @ jnp.concatenate([v.params[str(i)] for i in range(layers)])
    model = bc.Model(init, apply, lambda v, x, k: (apply(v, x, None), (), 0.0))
    settings = {"num_data": 50, "num_draws": 1, "prior": bc.priors.normal(scale), **settings}
    method = bc.variational(model, bc.homoscedastic(1.0), optax.sgd(1.0), **settings)
    state = method.init(jax.random.key(0), None)
    new, info = jax.jit(method.update)(state, one_batch(rows, features), jax.random.key(1))
    return state.posterior["weights_auto_loc"] - new.posterior["weights_auto_loc"], info


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_the_share_of_the_kl_is_that_of_the_data_not_of_the_batch(rows):
    """location / (scale^2 num_data): kl / batch_size, as some have it, would be 50, 7 and 1 times as much."""
    np.testing.assert_allclose(pull(rows)[0], 1 / (0.25 * 50), rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 4])
def test_the_share_of_the_kl_does_not_depend_on_the_number_of_layers(layers):
    moved, info = pull(layers=layers)
    np.testing.assert_allclose(moved, 1 / (0.25 * 50), rtol=1e-5)
    expected = 12 * (
        np.log(0.5 / 0.01) + (0.01**2 + 1) / (2 * 0.25) - 0.5
    )  # a sum over weights, not a mean over layers
    np.testing.assert_allclose(info["kl"], expected, rtol=1e-5)


def test_temperature_is_one_unless_said_and_recorded():
    assert pull()[1]["temperature"] == 1.0
    moved, info = pull(temperature=0.1)
    np.testing.assert_allclose(moved, 0.1 / (0.25 * 50), rtol=1e-5)
    np.testing.assert_allclose(info["temperature"], 0.1)


def test_annealing_is_used_and_recorded(key):
    """With a flat likelihood every step takes temperature * share / (scale^2 num_data) of the location."""
    data = bc.Dataset(np.zeros((20, FEATURES), np.float32), np.zeros((20, 1), np.float32))
    method = linear(
        optax.sgd(1.0), num_data=20, temperature=0.5, prior=bc.priors.normal(1.0),
        annealing=optax.linear_schedule(0.0, 1.0, 4),
    )  # fmt: skip
    fitted = bc.fit(
        method, data, key, epochs=6, batch_size=20, start=bc.Variables(jnp.ones((FEATURES, 1))), progress=False
    )
    shares = 0.5 * np.array([0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(fitted.history["temperature"][:, 0], shares, rtol=1e-6)
    np.testing.assert_allclose(fitted.state.posterior["weights_auto_loc"], np.prod(1 - shares / 20), rtol=1e-5)


def test_scales_of_layers_reach_their_weights():
    moved, _ = pull(layers=4, scale={"0": 1.0, "1": 0.5, "2": 0.25, "3": 2.0})
    np.testing.assert_allclose(moved, np.repeat([1, 4, 16, 0.25], 3) / 50, rtol=1e-5)


def test_a_penalty_of_the_model_is_not_tempered(key):
    """It is divided by `num_data` once."""
    base = linear_model()
    model = base._replace(train=lambda v, x, k: (base.apply(v, x, None), (), 3.0 * jnp.sum(v.params)))
    settings = {"num_data": 50, "num_draws": 1, "temperature": 1e-6}
    method = bc.variational(model, bc.homoscedastic(1.0), optax.sgd(1.0), **settings)
    state = method.init(key, None)
    new, _ = method.update(state, one_batch(), key)
    moved = state.posterior["weights_auto_loc"] - new.posterior["weights_auto_loc"]
    np.testing.assert_allclose(moved, 3 / 50, rtol=1e-4)


NET = bc.models.mlp(4, (8,), 3)


def classes(**settings):
    settings = {"num_data": 30, "num_draws": 3, **settings}
    return bc.variational(settings.pop("model", NET), bc.Categorical, optax.adam(0.05), **settings)


def test_a_trained_network_is_where_it_starts(key):
    base = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.05))
    trained = bc.fit(base, blobs(), key, epochs=5, batch_size=10, progress=False).state
    for start in (trained, trained.variables):
        for guide in (bc.guides.normal, bc.guides.full, bc.guides.low_rank(2)):
            state = classes(model=pure_model(), guide=guide, subset=("w",), initial_scale=1e-4).init(key, start)
            location = state.posterior.get("weights_auto_loc", state.posterior.get("auto_loc"))
            np.testing.assert_array_equal(location, trained.variables.params["w"].ravel())
            np.testing.assert_array_equal(state.point["b"], trained.variables.params["b"])


@pytest.mark.parametrize("guide", [bc.guides.normal, bc.guides.low_rank(2), bc.guides.full, AutoDiagonalNormal])
def test_without_a_key_it_is_the_mean_network(key, guide):
    method = classes(model=pure_model(), guide=guide, num_draws=4000, initial_scale=0.5)
    state = method.init(key, None)
    inputs = jnp.eye(4)
    mean, drawn = (method.predict(state, inputs, k).logits for k in (None, key))
    variables = pure_model().init(key)
    np.testing.assert_array_equal(mean[0], pure_model().apply(variables, inputs, None))
    # a logit is the sum of a weight and a bias, each of deviation 0.5; mean and deviation within four standard errors
    deviation = 0.5 * np.sqrt(2)
    np.testing.assert_allclose(drawn.mean(0), mean[0], atol=4 * deviation / np.sqrt(4000))
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=4 / np.sqrt(2 * 4000))


@pytest.mark.slow
def test_an_ensemble_of_guides(key):
    """Members, on devices of their own, are the lone runs; their posteriors differ, and all draws are pooled."""
    lone = classes(model=pure_model(), guide=bc.guides.full)
    method = bc.ensemble(lone, 2)
    settings = {"epochs": 2, "batch_size": 10, "progress": False}
    fitted = bc.fit(method, blobs(), key, **settings)
    own = bc.fit(lone, blobs(), jax.random.fold_in(key, 1), **settings).state.posterior
    both = fitted.state.members.posterior
    for name in own:
        np.testing.assert_allclose(both[name][1], own[name], rtol=1e-4, atol=1e-6)
        assert (both[name][0] != both[name][1]).any()
    assert bc.predict(method, fitted.state, blobs().inputs, key).logits.shape == (6, 30, 3)


@pytest.mark.slow
def test_settings_on_the_member_axis(key):
    """Prior scale, initial scale and temperature may be a member's own."""
    build = lambda own: classes(
        model=pure_model(), prior=bc.priors.normal(own["prior"]), initial_scale=own["initial"], temperature=own["temperature"]
    )  # fmt: skip
    values = {"prior": jnp.array([1.0, 0.3]), "initial": jnp.array([0.01, 0.1]), "temperature": jnp.array([1.0, 0.5])}
    method = bc.ensemble(build, settings=values)
    fitted = bc.fit(method, blobs(), key, epochs=1, batch_size=30, progress=False)
    np.testing.assert_allclose(fitted.history["temperature"][0], [1.0, 0.5])
    for m in range(2):
        own = build({name: float(x[m]) for name, x in values.items()})
        lone = bc.fit(own, blobs(), jax.random.fold_in(key, m), epochs=1, batch_size=30, progress=False)
        np.testing.assert_allclose(fitted.history["kl"][0, m], lone.history["kl"][0, 0], rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_training_is_bitwise_the_one_that_was_not_stopped(key, tmp_path):
    method = classes(model=pure_model(), subset=("w",), guide=bc.guides.low_rank(2))
    settings = {"epochs": 3, "batch_size": 10, "progress": False, "checkpoint": bc.Checkpoint(tmp_path / "run")}
    whole = bc.fit(method, blobs(), key, **settings)
    shutil.rmtree(tmp_path / "run" / "steps" / "3")
    resumed = bc.fit(method, blobs(), key, **settings)
    assert resumed.seconds["epochs"] == 1
    for one, two in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(one, two)


def test_nan_stays(key):
    """In inputs it reaches the loss, in a network the posterior."""
    method = classes(model=pure_model())
    batch = all_rows(blobs())
    _, info = method.update(method.init(key, None), batch._replace(inputs=batch.inputs.at[0, 0].set(jnp.nan)), key)
    assert np.isnan(info["loss"])
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan), pure_model().init(key))
    state = method.init(key, spoilt)
    assert np.isnan(state.posterior["weights_auto_loc"]).sum() == 4
    for draw in (method.draw, jax.jit(method.draw)):
        assert np.isnan(draw(state, key).params["w"][0]).all()


def turned(model):
    """A network as many weights large, whose first kernel lies on its side."""
    params = model.init(jax.random.key(0)).params
    first = params["dense"][0]
    return bc.Variables({**params, "dense": {0: {**first, "kernel": first["kernel"].T}}})


METHOD_ERRORS = [
    (lambda: classes(num_draws=0), "`num_draws` must be a whole number of at least 1, got 0"),
    (lambda: classes(num_data=0), "`num_data` must be positive, got 0"),
    (lambda: classes(temperature=-1.0), "`temperature` must be positive, got -1.0"),
    (lambda: classes(initial_scale=0.0), "`initial_scale` must be positive, got 0.0"),
    (
        lambda: classes(guide=bc.guides.delta),
        "`num_draws` must be 1 for a guide without spread, got 3: its draws would all be the same network. Pass `num_draws=1`",
    ),
    (lambda: classes(num_data=None), "`num_data` must be one number, got NoneType. Give"),
    (lambda: classes(temperature=None), "`temperature` must be one number, got NoneType. Give"),
    (lambda: classes(temperature="cold"), "`temperature` must be one number, got str. Give"),
    (lambda: classes(initial_scale=np.inf), "`initial_scale` must be finite, got inf. See"),
    (lambda: classes(annealing=lambda step: None), r"`annealing` must give one number in \[0, 1\], got NoneType at step"),
    (lambda: classes(annealing=lambda step: -1.0), r"`annealing` must give one number in .*, got -1\.0 at step 0\. It"),
    (lambda: classes(annealing=lambda step: step + jnp.nan), r"`annealing` must give one number in .*, got nan at step 0\. It"),
    (lambda: classes(annealing=lambda step: jnp.ones(2)), r"`annealing` must give one number in .*, got shape \(2,\) at"),
    (
        lambda: classes().init(jax.random.key(0), turned(NET)),
        r"`start` must be a network of the model, with `dense/0/kernel` of shape \(4, 8\), got \(8, 4\)\. Pass",
    ),
    (
        lambda: classes().init(jax.random.key(0), pure_model().init(jax.random.key(0))),
        r"`start` must be a network of the model, a tree PyTreeDef\(.*dense.*\), got PyTreeDef\(.*'w'.*\)\. Pass",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), METHOD_ERRORS)
def test_errors(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_must_be_given_and_how(unchecked):
    with pytest.raises(TypeError, match="num_data"):
        bc.variational(pure_model(), bc.Categorical, optax.adam(1e-2), num_draws=2)
    with pytest.raises(TypeError, match=r"`annealing` must be a function of the step, got float\. Pass a schedule"):
        classes(annealing=0.5)
    with pytest.raises(TypeError, match=r"`start` must be Variables or a state .*, got dict\. Pass .*`method\.draw\("):
        classes().init(jax.random.key(0), {})
