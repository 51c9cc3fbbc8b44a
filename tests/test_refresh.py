"""Refreshed batch-norm moments against slow loops in float64 over the batches."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.refresh import _REFRESH, batch_moments, refresh
from bayescal.methods.swag import swa, swag
from bayescal.types import EnsembleState

pytestmark = pytest.mark.core
SGD = optax.sgd(0.05)
EPSILON = 1e-5


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        for i, momentum in enumerate((0.99, 0.9)):
            x = nn.Dense(6, name=f"dense{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=momentum, name=f"norm{i}")(x)
            x = nn.relu(x)
        return nn.Dense(3)(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.dense0, self.dense1 = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.norm0, self.norm1 = nnx.BatchNorm(6, momentum=0.999, rngs=rngs), nnx.BatchNorm(6, momentum=0.0, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.dense0(x)))
        return self.head(nnx.relu(self.norm1(self.dense1(x))))


def linen(module=None):
    return bc.from_linen(module or Linen(), jnp.ones((1, 4)), train={"train": True}, evaluate={"train": False})


NETS = {
    "linen": lambda: (linen(), lambda tree, name, i: tree.get("batch_stats", tree)[f"{name}{i}"]),
    "nnx": lambda: (bc.from_nnx(NNX), lambda tree, name, i: tree[f"{name}{i}"]),
    "mlp": lambda: (bc.models.mlp(4, (6, 6), 3, batch_norm=True), lambda tree, name, i: tree[name][i]),
}


def moments_of(network, inputs, layer):
    """Mean and variance of each of two hidden layers' batch, in float64, every layer normalised with its own."""
    x, found = np.asarray(inputs, float), []
    for i in range(2):
        dense = jax.tree.map(lambda a: np.asarray(a, float), dict(layer(network.params, "dense", i)))
        norm = jax.tree.map(lambda a: np.asarray(a, float), dict(layer(network.params, "norm", i)))
        x = x @ dense["kernel"] + dense["bias"]
        found.append((x.mean(0), x.var(0)))
        x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) * norm["scale"] + norm["bias"], 0)
    return found


def agree(network, expected, layer, rtol=1e-4):
    for i, (mean, variance) in enumerate(expected):
        stats = layer(network.stats, "norm", i)
        np.testing.assert_allclose(stats["mean"], mean, rtol=rtol, atol=rtol * np.abs(mean).max())
        np.testing.assert_allclose(stats["var"], variance, rtol=rtol)


def refreshing(model, num_draws=2):
    method = swag(model, bc.Categorical, SGD, num_draws=num_draws, burn_in=1, every=1)
    return method, refresh(method, model, bc.Categorical, num_draws=num_draws)


@partial(jax.jit, static_argnums=0)
def trained(method, key):
    """State after some updates on all rows: by hand, since a `fit` compiles for seconds."""
    batch = batch_of(*blobs()[:2])
    step = lambda i, state: method.update(state, batch, jax.random.fold_in(key, i))[0]
    return jax.lax.fori_loop(0, 5, step, method.init(key, None))


@cache
def net(name):
    """Of a kind of network: model, where its layers are, SWAG and its refresh, a trained state and that refreshed."""
    model, layer = NETS[name]()
    method, after = refreshing(model)
    both = lambda key: (state := trained(method, key), after.init(key, state))
    state, start = jax.jit(both)(jax.random.key(7))
    update = jax.jit(after.update)
    return model, layer, method, after, state, start, update


def train(method, key, *, epochs=4, batch_size=30, **settings):
    return bc.fit(method, blobs(), key, epochs=epochs, batch_size=batch_size, progress=False, **settings)


def batch_of(inputs, targets, real=None):
    """Rows of which the first `real` are not padding, with the weights that `fit` gives them."""
    rows = len(inputs)
    real = real or rows
    weights = jnp.where(jnp.arange(rows) < real, rows / real, 0.0)
    return bc.Batch(jnp.asarray(inputs), jnp.asarray(targets), weights, jnp.arange(rows), jnp.float32(real))


def one(tree, i=0):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize("name", NETS)
def test_moments_are_the_mean_of_the_batches(name, key):
    """Batches of 12 rows, the last with 7 and 5 of padding: those are seen and do not weigh."""
    _, layer, _, _, _, start, update = net(name)
    rng, state = np.random.default_rng(1), start
    parts = [(3 * rng.normal(size=(12, 4)).astype(np.float32) + 5, real) for real in (12, 12, 7)]
    for inputs, real in parts:
        state, info = update(state, batch_of(inputs, np.zeros(12, np.int32), real), key)
        assert info["moments"] == 4 and np.isfinite(info["loss"])
    np.testing.assert_allclose(state.rows, 31)
    jax.tree.map(np.testing.assert_array_equal, state.networks.params, start.networks.params)
    for i in range(2):
        network = one(state.networks, i)
        own = [np.array(moments_of(network, inputs, layer)) * real / 31 for inputs, real in parts]
        agree(network, sum(own), layer)
    assert jnp.ptp(jax.tree.leaves(state.networks.stats)[0], axis=0).min() > 0, "each network has its own"


@pytest.mark.parametrize("name", NETS)
def test_a_full_batch_gives_the_moments_of_the_data(name, key):
    """Then a pass in evaluation mode is the pass in training mode, which it is not with the moments of training."""
    model, layer, _, _, _, start, update = net(name)
    inputs = jnp.asarray(blobs().inputs)
    state, info = update(start, batch_of(*blobs()[:2]), key)
    evaluated = jax.jit(lambda v: (model.apply(v, inputs, None), model.train(v, inputs, key)[0]))
    for i in range(2):
        agree(one(state.networks, i), moments_of(one(state.networks, i), inputs, layer), layer)
        np.testing.assert_allclose(*evaluated(one(state.networks, i)), rtol=1e-3, atol=1e-3)
        stale, wanted = evaluated(one(start.networks, i))
        assert np.abs(stale - wanted).max() > 0.1
    pooled = bc.Categorical(jnp.stack([evaluated(one(state.networks, i))[1] for i in range(2)]))
    np.testing.assert_allclose(info["loss"], -pooled.log_prob(blobs().targets).mean(), rtol=1e-4)


def test_refreshed_draws_predict_better(key):
    """The moments of the last iterate, still near those of the start, fit none of the networks drawn."""
    _, _, _, after, _, start, update = net("mlp")
    state, data = update(start, batch_of(*blobs()[:2]), key)[0], blobs()
    loss = lambda s: -np.asarray(after.predict(s, jnp.asarray(data.inputs), None).log_prob(data.targets)).mean()
    assert loss(state) < 0.95 * loss(start)


def test_networks_are_drawn_once(key):
    """By init's key alone; then the same members for any key and none, whatever the rows beside them."""
    _, _, method, after, trained_state, start, update = net("mlp")
    kernel = lambda tree: tree.params["dense"][0]["kernel"]
    for i, draw_key in enumerate(jax.random.split(jax.random.fold_in(key, _REFRESH), 2)):
        np.testing.assert_allclose(kernel(start.networks)[i], kernel(method.draw(trained_state, draw_key)), rtol=1e-5)
    other = jax.jit(after.init)(jax.random.key(1), trained_state)
    assert (kernel(other.networks) != kernel(start.networks)).any()
    state, _ = update(start, batch_of(*blobs()[:2]), key)
    inputs = blobs().inputs
    predict = jax.jit(after.predict)
    whole = predict(state, inputs, key).logits
    assert whole.shape == (2, 30, 3)
    for other_key in (None, jax.random.key(9)):
        np.testing.assert_array_equal(predict(state, inputs, other_key).logits, whole)
    np.testing.assert_allclose(predict(state, inputs[:3], key).logits, whole[:, :3], rtol=1e-4, atol=1e-5)
    draws = jax.vmap(lambda k: kernel(after.draw(state, k)))(jax.random.split(key, 30))
    assert set(np.asarray(draws[:, 0, 0]).tolist()) == set(np.asarray(kernel(state.networks)[:, 0, 0]).tolist())


def test_members_start_from_an_ensemble(key):
    """Through `fit`, over two epochs of all rows, whose average is that of one."""
    _, layer, method, after, *_ = net("mlp")
    states = [trained(method, jax.random.fold_in(key, m)) for m in range(2)]
    start = EnsembleState(jax.tree.map(lambda *x: jnp.stack(x), *states), jnp.ones(2, bool))
    both = bc.ensemble(after, 2)
    fitted = train(both, key, epochs=2, start=start)
    np.testing.assert_array_equal(fitted.history["moments"], 4)
    np.testing.assert_array_equal(fitted.state.members.rows, 60)
    assert jax.eval_shape(both.predict, fitted.state, blobs().inputs, key).logits.shape == (4, 30, 3)
    networks = fitted.state.members.networks
    for m, i in np.ndindex(2, 2):
        network = one(one(networks, m), i)
        agree(network, moments_of(network, blobs().inputs, layer), layer)
    kernel = lambda tree: np.asarray(tree.params["dense"][0]["kernel"])
    distance = lambda means: np.linalg.norm((kernel(networks) - means[:, None]).reshape(2, 2, -1), axis=-1)
    means = kernel(start.members.variables)
    assert (distance(means) < distance(means[::-1])).all(), "each member refreshes draws of its own posterior"


def test_an_average_is_one_network_that_others_start_from(key):
    model, layer, *_ = net("mlp")
    method = swa(model, bc.Categorical, SGD, burn_in=2, every=1)
    start = trained(method, key)
    after = refresh(method, model, bc.Categorical, num_draws=1)
    state, _ = jax.jit(after.update)(after.init(key, start), batch_of(*blobs()[:2]), key)
    network = state.variables
    jax.tree.map(np.testing.assert_array_equal, network.params, start.variables.params)
    agree(network, moments_of(network, blobs().inputs, layer), layer)
    follower = bc.map_estimate(model, bc.Categorical, SGD).init(key, state)
    jax.tree.map(np.testing.assert_array_equal, follower.variables, network)
    assert after.predict(state, jnp.asarray(blobs().inputs), key).num_members == 1


class Kept(nnx.Module):
    """Beside batch norm: spectral norm, dropout with a rate in `stats`, a counter, and a leaf that is never touched."""

    def __init__(self, rngs):
        self.dense = nnx.SpectralNorm(nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
        self.single = nnx.SpectralNorm(nnx.Linear(5, 1, rngs=rngs), rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(5, rngs=rngs), bc.models.dropout_layer(jnp.array(0.3), rngs)
        self.later = nnx.BatchNorm(1, rngs=rngs)
        self.calls, self.steps = nnx.BatchStat(jnp.array(0.0)), nnx.BatchStat(jnp.array(0))
        self.idle, self.on = nnx.BatchStat(jnp.array([0.2, jnp.inf])), nnx.BatchStat(jnp.array(True))

    def __call__(self, x):
        training = not self.norm.use_running_average
        if training:
            self.calls[...] = self.calls[...] + 1
            self.steps[...] = self.steps[...] + 1
        x = self.dropout(nnx.relu(self.norm(self.dense(x, update_stats=training))))
        return jnp.repeat(self.later(self.single(x, update_stats=training)), 3, axis=-1)


def test_leaves_that_are_no_moments_are_kept(key):
    """And the pass is the one that they ask for: dropout drops at its rate, spectral norm divides."""
    model = bc.from_nnx(Kept)
    variables, (inputs, targets, _) = jax.jit(model.init)(key), blobs()
    after = refresh(bc.map_estimate(model, bc.Categorical, SGD), model, bc.Categorical, num_draws=1)
    start, update, batch = after.init(key, variables), jax.jit(after.update), batch_of(inputs, targets)
    expected, trained, _ = jax.jit(model.train)(variables, inputs, jax.random.split(key, 1)[0])
    state, info = update(start, batch, key)
    assert info["moments"] == 4
    np.testing.assert_allclose(info["loss"], -bc.Categorical(expected[None]).log_prob(targets).mean(), rtol=1e-5)
    stats = update(state, batch, key)[0].variables.stats
    for name in ("dense", "single", "dropout", "calls", "steps", "idle", "on"):
        jax.tree.map(np.testing.assert_array_equal, stats[name], variables.stats[name])
    for name in ("norm", "later"):  # 0.99 old + 0.01 batch, from 0 and 1
        np.testing.assert_allclose(stats[name]["mean"], trained[name]["mean"] / 0.01, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats[name]["var"], (trained[name]["var"] - 0.99) / 0.01, rtol=1e-3, atol=1e-4)


class Layer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4)(x))), None


class Scanned(nn.Module):
    """Batch norm in a rematerialised scan over layers: leaves with a leading axis, behind a loop and a call."""

    @nn.compact
    def __call__(self, x, train: bool):
        axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
        x, _ = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs=split, length=3)(train)(x, None)
        return nn.Dense(3)(x)


def test_moments_inside_a_loop_over_layers_are_found(key):
    model = linen(Scanned())
    variables, inputs = jax.jit(model.init)(key), jnp.asarray(blobs().inputs)
    _, stats, number = jax.jit(lambda v: batch_moments(v, inputs, key, model))(variables)
    assert number == 2
    _, trained, _ = jax.jit(lambda v: model.train(v, inputs, key))(variables)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(trained), strict=True):
        assert a.shape == b.shape == (3, 4)
    refreshed = model.apply(variables._replace(stats=stats), inputs, None)
    np.testing.assert_allclose(refreshed, model.train(variables, inputs, key)[0], rtol=1e-3, atol=1e-3)


def by_hand(momentum, after=lambda x: x):
    """A network whose only leaf of `stats` is the running mean of its inputs."""
    moved = lambda old, x: after(momentum * old + (1 - momentum) * x.mean(0))
    return bc.Model(
        lambda key: bc.Variables(jax.random.normal(key, (4, 3)), jnp.full(4, jnp.inf)),
        lambda v, x, key: (x - v.stats) @ v.params,
        lambda v, x, key: ((x - x.mean(0)) @ v.params, moved(v.stats, x), 0.0),
    )


@pytest.mark.parametrize(
    ("momentum", "then"),
    [(m, lambda x: x) for m in (0.0, 0.5, 0.99, 0.9999)] + [(0.9, jax.lax.stop_gradient)],
)
def test_the_momentum_is_found_whatever_the_moments(momentum, then, key):
    """Large and small ones beside each other, and an old value that is not finite."""
    model = by_hand(momentum, then)
    inputs = blobs().inputs * np.array([1e4, 1.0, 1e-4, 0.0], np.float32)
    after = refresh(bc.map_estimate(model, bc.Categorical, SGD), model, bc.Categorical, num_draws=1)
    state, info = jax.jit(after.update)(after.init(key, model.init(key)), batch_of(inputs, blobs().targets), key)
    assert info["moments"] == 1
    # 1 - m is known to a rounding of m
    np.testing.assert_allclose(state.variables.stats, inputs.mean(0), rtol=1e-6 + 2e-7 / (1 - momentum), atol=1e-9)


def test_rows_that_are_not_finite_come_through(key):
    model = by_hand(0.9)
    inputs = blobs().inputs.copy()
    inputs[3, 1] = np.nan
    _, stats, _ = batch_moments(model.init(key), jnp.asarray(inputs), key, model)
    np.testing.assert_array_equal(np.isnan(stats), [False, True, False, False])
    _, _, _, _, _, start, update = net("mlp")
    state, info = update(start, batch_of(np.full((30, 4), np.nan, np.float32), blobs().targets), key)
    stats = state.networks.stats["norm"]
    assert np.isnan(stats[0]["mean"]).all() and np.isnan(stats[1]["var"]).all() and np.isnan(info["loss"])


def test_a_network_without_batch_norm_comes_through_unchanged(key):
    model = pure_model()
    method, after = refreshing(model)
    start = after.init(key, trained(method, key))
    state, info = jax.jit(after.update)(start, batch_of(*blobs()[:2]), key)
    jax.tree.map(np.testing.assert_array_equal, state.networks, start.networks)
    assert info["moments"] == 0


def test_the_network_runs_once(key):
    """As many products in the program as one pass has, before any compiler looks at it."""
    model, _ = NETS["mlp"]()
    inputs = jnp.asarray(blobs().inputs)
    text = lambda f: jax.jit(f).lower(model.init(key)).as_text().count("stablehlo.dot_general")
    assert text(lambda v: batch_moments(v, inputs, key, model)) == text(lambda v: model.train(v, inputs, key)) == 3


def test_draws_share_no_stream_with_the_weights_of_the_same_key(key):
    """`split(key, n)[i]` is the very key of which an mlp draws a layer: noise and kernel would be one."""
    model = bc.models.mlp(20, (30, 30), 30)
    method, after = refreshing(model, num_draws=6)
    state = method.init(key, None)
    unit = jax.tree.map(jnp.ones_like, state.squares)
    state = state._replace(squares=unit, average=state.average._replace(count=jnp.int32(2)))
    networks = after.init(key, state).networks.params
    longest = 600
    for mean, drawn in zip(jax.tree.leaves(state.average.mean), jax.tree.leaves(networks), strict=True):
        if mean.ndim == 2:
            for noise in np.asarray(drawn - mean).reshape(6, -1)[:, :longest]:
                for weights in [x for x in jax.tree.leaves(state.variables.params) if x.ndim == 2]:
                    assert abs(np.corrcoef(noise, np.ravel(weights)[:longest])[0, 1]) < 5 / np.sqrt(longest)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_in_half_precision_are_refused(dtype, key):
    base = by_hand(0.99)
    narrow = lambda k: (v := base.init(k))._replace(stats=v.stats.astype(dtype))
    model = base._replace(
        init=narrow, train=lambda v, x, k: (lambda o, s, p: (o, s.astype(dtype), p))(*base.train(v, x, k))
    )
    after = refresh(bc.map_estimate(model, bc.Categorical, SGD), model, bc.Categorical, num_draws=1)
    with pytest.raises(
        ValueError, match=rf"`stats` must hold running moments in float32, got {dtype}: .* or cast those"
    ):
        after.update(after.init(key, model.init(key)), batch_of(*blobs()[:2]), key)


def test_errors(key):
    model = pure_model()
    method, after = refreshing(model)
    base = bc.map_estimate(model, bc.Categorical, SGD)
    with pytest.raises(ValueError, match=r"`start` must be a state of the method to refresh, got None\. Pass `fit"):
        train(after, key, epochs=1)
    with pytest.raises(ValueError, match=r"`start` must be a state .*, got the state of an ensemble"):
        after.init(key, bc.ensemble(method, 2).init(key, None))
    with pytest.raises(TypeError, match="`start` must be Variables or a state that has `variables`, got dict"):
        refresh(base, model, bc.Categorical, num_draws=1).init(key, {})
    with pytest.raises(TypeError, match=r"`start` must be Variables or a state .*, got RefreshState"):
        base.init(key, after.init(key, method.init(key, None)))
    with pytest.raises(AttributeError, match=r"`variables` needs one network, got 2\. Take one of `networks`\."):
        _ = after.init(key, method.init(key, None)).variables
    with pytest.raises(ValueError, match="`method` must be one without members, got an ensemble or experiments"):
        refresh(bc.ensemble(method, 2), model, bc.Categorical, num_draws=1)
    with pytest.raises(ValueError, match="`num_draws` must be 1 for a method without `draw`, got 3"):
        refresh(base, model, bc.Categorical, num_draws=3)
    with pytest.raises(ValueError, match="`num_draws` must be a whole number of at least 1, got 0"):
        refresh(method, model, bc.Categorical, num_draws=0)
