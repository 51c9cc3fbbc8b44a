"""SWA and SWAG: moments of the trajectory against slow loops in float64, draws against the covariance they should have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import FEATURES, NOISE, linear_data, linear_model
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.swag import swa, swag, transform

pytestmark = pytest.mark.core
SGD = optax.sgd(0.02)


def batch_of(data, index):
    index = np.asarray(index)
    rows = lambda x: jnp.asarray(np.asarray(x)[index])
    return bc.Batch(rows(data.inputs), rows(data.targets), jnp.ones(len(index)), jnp.asarray(index))


def follow(table):
    """An optimiser that puts the weights on the rows of a table, one an update, whatever the gradient."""
    table = jnp.asarray(table, jnp.float32)

    def update(gradient, step, params):
        return jax.tree.map(lambda p: table[step].reshape(p.shape) - p, params), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def walk(build, table):
    """State and last info of a method, and the weights that its training really had, after each row of a table."""
    model = linear_model(np.shape(table)[1])
    method = build(model, bc.homoscedastic(1.0), follow(table))
    state, update, seen = method.init(jax.random.key(0), None), jax.jit(method.update), []
    batch = bc.Batch(jnp.ones((2, np.shape(table)[1])), jnp.ones((2, 1)), jnp.ones(2), jnp.arange(2))
    info = {}
    for step in range(len(table)):
        state, info = update(state, batch, jax.random.key(step))
        seen.append(np.asarray(state.fit.variables.params, float)[:, 0])
    return method, state, info, np.array(seen)


def swag_walk(table, *, rank=4, burn_in=0, every=1, scale=1.0, num_draws=3):
    settings = dict(rank=rank, burn_in=burn_in, every=every, scale=scale, num_draws=num_draws)
    return walk(lambda *parts: swag(*parts, **settings), table)


def loop(collected, rank):
    """Mean, diagonal variance and last deviations, as the paper's algorithm 1 gives them, in float64."""
    mean, mean_square, deviations = np.zeros_like(collected[0]), np.zeros_like(collected[0]), []
    for n, theta in enumerate(collected):
        mean = (n * mean + theta) / (n + 1)
        mean_square = (n * mean_square + theta**2) / (n + 1)
        deviations = [*deviations, theta - mean][-rank:]
    return mean, mean_square - mean**2, np.array(deviations)


def covariance(collected, rank, scale=1.0):
    _, variance, deviations = loop(collected, rank)
    return scale * (np.diag(variance) / 2 + deviations.T @ deviations / (2 * (len(deviations) - 1)))


def in_order(rows):
    return np.array(sorted(rows.tolist()))


def test_moments_of_sgd_on_a_linear_regression():
    """Minibatch SGD in float64 beside the method: 20 collected, of which the ring keeps the last 8."""
    data, rate, rank = linear_data(), 0.02, 8
    method = swag(linear_model(), bc.homoscedastic(NOISE), optax.sgd(rate), num_draws=2, rank=rank, burn_in=10, every=3)
    state, update = method.init(jax.random.key(3), None), jax.jit(method.update)
    theta = np.asarray(state.variables.params, float)
    rng, collected = np.random.default_rng(0), []
    for step in range(70):
        index = rng.permutation(len(data.inputs))[:40]
        state, info = update(state, batch_of(data, index), jax.random.key(step))
        x, y = data.inputs[index].astype(float), data.targets[index].astype(float)
        theta = theta - rate * x.T @ (x @ theta - y) / NOISE / 40
        if step >= 10 and (step - 9) % 3 == 0:
            collected.append(theta[:, 0])
    mean, variance, deviations = loop(np.array(collected), rank)
    assert state.average.count == info["collected"] == len(collected) == 20
    np.testing.assert_allclose(state.average.mean[:, 0], mean, rtol=1e-5, atol=1e-6)
    # float32 iterates err by 1e-7: of deviations of 0.01 that is 1e-5, of their squares twice that
    np.testing.assert_allclose(state.squares[:, 0] / 20, variance, rtol=1e-4)
    np.testing.assert_allclose(in_order(state.deviations[..., 0]), in_order(deviations), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.variables.params, state.average.mean)


def test_by_hand():
    """Weights 1, 3, 8: mean 4, variance 26/3; deviations 0, 1, 4, of which rank 2 keeps the last."""
    _, state, _, _ = swag_walk([[1.0], [3.0], [8.0]], rank=2)
    np.testing.assert_allclose(state.average.mean, 4, rtol=1e-6)
    np.testing.assert_allclose(state.squares / 3, 26 / 3, rtol=1e-6)
    np.testing.assert_allclose(np.sort(state.deviations.ravel()), [1, 4], rtol=1e-6)
    at = lambda diagonal, low: transform(state, jnp.full((1, 1), diagonal), jnp.array(low), 1.0).params.item() - 4
    np.testing.assert_allclose(at(1.0, [0.0, 0.0]), np.sqrt(13 / 3), rtol=1e-6)
    np.testing.assert_allclose(sorted([at(0.0, [1.0, 0.0]), at(0.0, [0.0, 1.0])]), np.array([1, 4]) / 2**0.5, rtol=1e-6)


@pytest.mark.parametrize(("burn_in", "every", "which"), [(0, 1, range(9)), (2, 2, [3, 5, 7]), (3, 3, [5, 8])])
def test_which_are_collected(burn_in, every, which):
    table = np.random.default_rng(1).normal(size=(9, 3))
    _, state, info, seen = walk(lambda *parts: swa(*parts, burn_in=burn_in, every=every), table)
    np.testing.assert_allclose(state.variables.params[:, 0], seen[list(which)].mean(0), rtol=1e-5, atol=1e-6)
    assert state.average.count == info["collected"] == len(which)
    _, other, _, _ = swag_walk(table, burn_in=burn_in, every=every)
    np.testing.assert_array_equal(other.average.mean, state.average.mean)


def test_variance_beside_a_large_mean():
    """Mean 1000, deviations 0.05: mean of squares - square of the mean has no digit left in float32."""
    table = 1000 + 0.05 * np.random.default_rng(2).normal(size=(200, 3))
    _, state, _, seen = swag_walk(table)
    np.testing.assert_allclose(state.squares[:, 0] / 200, seen.var(0), rtol=5e-3)  # the mean is rounded to 6e-5
    naive = np.float32(seen.astype(np.float32) ** 2).mean(0) - seen.astype(np.float32).mean(0) ** 2
    assert np.abs(naive / seen.var(0) - 1).max() > 0.5, "the case must be one where the naive form fails"
    constant = np.full((5, 3), 1 / 3)
    assert not np.any(swag_walk(constant, burn_in=1)[1].squares), (
        "equal weights have no variance, and no rounding of one"
    )


@pytest.mark.parametrize("number", [2, 3, 4, 11])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_draws_are_an_affine_map_of_the_noise(number, scale):
    """Its matrix times its transpose is the covariance: with fewer deviations than rank, as many, and more."""
    rank, width = 4, 6
    _, state, _, seen = swag_walk(np.random.default_rng(3).normal(size=(number, width)), rank=rank)
    network = lambda noise: transform(
        state, jnp.asarray(noise[:width, None]), jnp.asarray(noise[width:]), scale
    ).params[:, 0]
    centre = network(jnp.zeros(width + rank))
    matrix = np.asarray(jax.vmap(network)(jnp.eye(width + rank)) - centre, float).T
    expected = covariance(seen, rank, scale)
    np.testing.assert_allclose(centre, seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, expected, rtol=1e-4, atol=1e-5 * expected.max())
    low = np.random.default_rng(4).normal(size=width + rank).astype(np.float32)
    np.testing.assert_allclose(network(low), centre + matrix @ low, rtol=1e-4, atol=1e-5)  # nothing but affine


def test_covariance_of_many_draws(key):
    """Within five standard errors, sqrt((S_ii S_jj + S_ij^2) / draws), in each of 210 entries."""
    rng, draws = np.random.default_rng(5), 20_000
    table = rng.normal(size=(30, FEATURES)) @ rng.normal(size=(FEATURES, FEATURES))
    method, state, _, seen = swag_walk(table, rank=8, burn_in=5)
    drawn = jax.jit(jax.vmap(lambda k: method.draw(state, k).params[:, 0]))(jax.random.split(key, draws))
    expected = covariance(seen[5:], 8)
    variance = np.diag(expected)
    error = np.sqrt((np.outer(variance, variance) + expected**2) / draws)
    assert np.abs((np.cov(np.asarray(drawn, float).T) - expected) / error).max() < 5
    assert np.abs((drawn.mean(0) - seen[5:].mean(0)) / np.sqrt(variance / draws)).max() < 5
    half = covariance(seen[5:], 8) - 0.5 * np.diag(seen[5:].var(0))
    assert np.abs((half - np.diag(np.diag(half))) / error).max() > 50, "without its low rank it would be another"


@pytest.mark.parametrize("number", [0, 1])
def test_before_two_are_collected_all_draws_are_one_network(number, key):
    method, state, info, seen = swag_walk(np.random.default_rng(6).normal(size=(4, 3)), burn_in=4 - number, num_draws=5)
    inputs = np.eye(3, dtype=np.float32)
    pred = method.predict(state, inputs, key)
    np.testing.assert_allclose(pred.mean[..., 0], np.tile(seen[-1], (5, 1)), rtol=1e-6)
    assert not np.any(bc.decompose(pred).epistemic) and info["collected"] == number
    with pytest.raises(ValueError, match=r"`state` must hold what its posterior is made of .* two weights of SWAG"):
        bc.predict(method, state, inputs, key)


def test_members_of_the_prediction_are_the_networks_drawn(key):
    method, state, _, _ = swag_walk(np.random.default_rng(7).normal(size=(9, 3)), num_draws=4)
    inputs = np.random.default_rng(8).normal(size=(5, 3)).astype(np.float32)
    pred = bc.predict(method, state, inputs, key)
    for member, draw_key in zip(pred.mean, jax.random.split(key, 4), strict=True):
        np.testing.assert_allclose(member, inputs @ method.draw(state, draw_key).params, rtol=1e-4, atol=1e-5)
    assert np.asarray(pred.mean).std(0).min() > 0
    centre = bc.predict(method, state, inputs, None)
    np.testing.assert_allclose(centre.mean[0], inputs @ state.average.mean, rtol=1e-5)


def test_multiswag_draws_each_member_around_its_own_mean(key):
    data, model = blobs(), pure_model()
    method = swag(model, bc.Categorical, optax.sgd(0.3), num_draws=3, burn_in=3, every=1)
    both = bc.ensemble(method, 2)
    fitted = bc.fit(both, data, key, epochs=5, batch_size=10, execution="map", progress=False)
    assert fitted.history["collected"].shape == (5, 2)
    np.testing.assert_allclose(fitted.history["collected"][:, 0], [0, 2, 5, 8, 11])  # means over three updates
    pred = bc.predict(both, fitted.state, data.inputs, key)
    assert pred.logits.shape == (6, 30, 3)
    for m in range(2):
        state = jax.tree.map(lambda x, m=m: x[m], fitted.state.members)
        own = bc.predict(method, state, data.inputs, jax.random.fold_in(key, m)).logits
        np.testing.assert_allclose(pred.logits[3 * m : 3 * m + 3], own, rtol=1e-4, atol=1e-5)
    means = fitted.state.members.average.mean["w"]
    spread = np.asarray(bc.decompose(pred).epistemic)
    assert np.abs(means[0] - means[1]).max() > 1e-3 and (spread > 0).all()


def test_the_average_is_what_others_start_from(key):
    model = pure_model()
    method = swa(model, bc.Categorical, optax.sgd(0.5), burn_in=2, every=2)
    fitted = bc.fit(method, blobs(), key, epochs=4, batch_size=10, progress=False)
    average, last = fitted.state.variables.params["w"], fitted.state.fit.variables.params["w"]
    assert np.abs(average - last).max() > 1e-3
    follower = bc.map_estimate(model, bc.Categorical, SGD)
    np.testing.assert_array_equal(follower.init(key, fitted.state).variables.params["w"], average)
    again = method.init(key, fitted.state)
    np.testing.assert_array_equal(again.fit.variables.params["w"], average)
    assert again.average.count == 0
    pred = bc.predict(method, fitted.state, blobs().inputs, key)
    np.testing.assert_allclose(pred.logits[0], model.apply(fitted.state.variables, blobs().inputs, None), rtol=1e-4)


def test_half_precision_weights_are_averaged_in_float32(key):
    model = linear_model(3)
    half = lambda v: v._replace(params=v.params.astype(jnp.bfloat16))
    method = swag(model._replace(init=lambda k: half(model.init(k))), bc.homoscedastic(1.0), SGD, **DRAWS)
    state = method.init(key, None)
    batch = bc.Batch(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16), jnp.ones(2), jnp.arange(2))
    new, _ = jax.jit(method.update)(state, batch, key)
    types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert types(new) == types(state) and new.average.mean.dtype == new.deviations.dtype == jnp.float32
    assert method.draw(new, key).params.dtype == new.variables.params.dtype == jnp.bfloat16


def test_what_is_not_finite_comes_through(key):
    method, state, _, _ = swag_walk([[1.0], [2.0], [np.nan]])
    assert np.isnan(state.average.mean).all() and np.isnan(method.draw(state, key).params).all()
    _, before, _, _ = swag_walk([[1.0], [2.0], [np.nan]], burn_in=1, every=5)
    assert np.isnan(before.average.mean).all(), "until the first is collected the mean is the network in training"
    _, between, _, _ = swag_walk([[1.0], [2.0], [3.0], [np.nan]], every=3)
    assert between.average.mean == 3, "what is not due does not count"


DRAWS = dict(num_draws=2, burn_in=0, every=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 0}, "`num_draws` must be a whole number of at least 1, got 0"),
        ({"rank": 1}, "`rank` must be a whole number of at least 2, got 1. One deviation spans no covariance; 20 is"),
        ({"rank": 2.5}, "`rank` must be a whole number of at least 2, got 2.5"),
        ({"scale": 0.0}, "`scale` must be positive, got 0.0"),
        ({"burn_in": -1}, "`burn_in` must be a whole number of at least 0, got -1"),
        ({"every": 0}, "`every` must be a whole number of at least 1, got 0"),
        ({"prior_precision": 1.0}, "`num_data` is required with `prior_precision`"),
    ],
)
def test_errors(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        swag(linear_model(), bc.homoscedastic(1.0), SGD, **{**DRAWS, **settings})
    shared = {k: v for k, v in settings.items() if k in ("burn_in", "every", "prior_precision")}
    if shared:
        with pytest.raises(ValueError, match=message):
            swa(linear_model(), bc.homoscedastic(1.0), SGD, **{"burn_in": 0, "every": 1, **shared})
