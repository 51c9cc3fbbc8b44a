"""What layers may tell the adapters (penalty, noise of each row, streams of the network), and draws of variational ones."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import blobs

import bayescal as bc
from bayescal.models import flipout, local_reparametrisation, shared_noise, variational_conv, variational_dense
from bayescal.models.adapters import NETWORK

pytestmark = pytest.mark.core
ESTIMATORS = (local_reparametrisation, flipout, shared_noise)
ADAM = optax.adam(1e-2)


def net(estimator=local_reparametrisation, **settings):
    dense = partial(variational_dense, estimator=estimator, initial_scale=0.3)
    return bc.models.mlp(4, (8,), 3, dense=dense, **settings)


def pictures(estimator=flipout, **settings):
    dense, conv = (
        partial(layer, estimator=estimator, initial_scale=0.3) for layer in (variational_dense, variational_conv)
    )
    return bc.models.convnet((4, 4, 1), (2,), 8, 3, dense=dense, conv=conv, **settings)


def bayes(model, **settings):
    return bc.bayes_by_backprop(model, bc.Categorical, ADAM, **{"num_data": 30, "num_draws": 3, **settings})


NETWORKS = {"dense": (net, (4,)), "convolutions": (pictures, (4, 4, 1))}


def rows(number, shape=(4,), seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype(np.float32)


# Adapters ------------------------------------------------------------------------------------------------------------------


class Weighing(nnx.Module):
    """A layer that costs the square of its weight."""

    def __init__(self, weight):
        self.weight = nnx.Param(jnp.float32(weight))

    def __call__(self, x):
        return x * self.weight[...]

    def penalty(self):
        return self.weight[...] ** 2


def test_penalties_of_layers_are_added_wherever_they_are(key):
    """In lists, dicts and modules; one that stands in two places counts once; a network without any has the number 0."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            shared = Weighing(4.0)
            self.own, self.tied, self.plain = Weighing(1.0), shared, nnx.Linear(4, 3, rngs=rngs)
            self.many = nnx.List([Weighing(2.0), nnx.Dict(inner=Weighing(3.0)), shared])

        def __call__(self, x):
            return self.plain(self.tied(self.many[1]["inner"](x)))

    model = bc.from_nnx(Net)
    assert model.train(model.init(key), rows(5), key)[2] == 1 + 4 + 9 + 16
    gradient = jax.grad(lambda v: model.train(bc.Variables(v), rows(5), key)[2])(model.init(key).params)
    costs = [g for g in jax.tree.leaves(gradient) if not g.shape]
    assert sorted(costs) == [2, 4, 6, 8]
    plain = bc.models.convnet((4, 4, 1), (2,), 8, 3)
    assert plain.train(plain.init(key), rows(5, (4, 4, 1)), key)[2] == 0.0


def test_streams_of_the_network_and_rows_of_their_own(key):
    """Streams with the network's tag give all layers one key, others each its own; `noise_rows` are known in training alone."""

    class Drawing(nnx.Module):
        def __init__(self, tag, rngs):
            self.stream = nnx.RngStream(rngs(), tag=tag) if tag else rngs.noise.fork()
            self.deterministic, self.noise_rows = False, None

        def __call__(self, x):
            number = 0.0 if self.deterministic else jax.random.normal(self.stream())
            return jnp.full((len(x), 2), jnp.stack([number, jnp.float32(self.noise_rows or 0)]))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Drawing(tag, rngs) for tag in (NETWORK, None, NETWORK, None)])

        def __call__(self, x):
            return jnp.stack([layer(x) for layer in self.layers], 1)

    model = bc.from_nnx(Net)
    variables = model.init(key)
    for outputs, known in ((model.train(variables, rows(2), key)[0], 2), (model.apply(variables, rows(2), key), 0)):
        drawn = np.asarray(outputs)[0, :, 0]
        assert drawn[0] == drawn[2] and len({*drawn.tolist()}) == 3
        assert (outputs[..., 1] == known).all()
    assert not np.any(model.apply(variables, rows(2), None)[..., 0])
    other = model.apply(variables, rows(2), jax.random.key(1))[0, :, 0]
    assert (other != drawn).all()


def test_what_a_user_calls_so_is_not_ours(key):
    """A number, a function and a layer named `penalty`, and other values of `noise_rows`: neither called nor overwritten."""

    class Own(nnx.Module):
        def __init__(self, penalty):
            self.penalty, self.noise_rows = penalty, 0.5

        def __call__(self, x):
            return x * self.noise_rows

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Own(0.1), Own(lambda x: x), Own(nnx.Linear(4, 4, rngs=rngs))])

        def __call__(self, x):
            return self.layers[0](self.layers[1](self.layers[2](x)))

    model = bc.from_nnx(Net)
    outputs, _, penalty = model.train(model.init(key), rows(5), key)
    np.testing.assert_array_equal(outputs, rows(5) / 8)
    assert penalty == 0.0


def test_stacked_layers_are_refused(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            make = lambda rngs: variational_dense(4, 4, rngs=rngs)
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=(0,)))(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    model = bc.from_nnx(Net)
    variables = model.init(key)
    for call in (lambda: model.apply(variables, rows(2), None), lambda: model.train(variables, rows(2), key)):
        with pytest.raises(
            ValueError,
            match=r"`build` must give .* one key each, got a stream of shape \(3,\), .*Build them one by one",
        ):
            call()


def test_linen_penalties(key):
    """What layers sow is summed, also of a layer called twice, and is neither a statistic nor seen by predictions."""

    class Costly(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (4, 4))
            self.sow("penalty", "kl", 2 * kernel.sum())
            return x @ kernel

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            twice = Costly()
            self.sow("penalty", "own", 0.5)
            return nn.Dense(3)(Costly()(twice(twice(x))))

    model = bc.from_linen(Net(), jnp.ones((1, 4)))
    variables = jax.jit(model.init)(key)
    assert not variables.stats
    outputs, stats, penalty = jax.jit(model.train)(variables, rows(5), key)
    assert penalty == 3 * 32 + 0.5 and jax.tree.structure(stats) == jax.tree.structure(variables.stats)
    np.testing.assert_allclose(outputs, model.apply(variables, rows(5), None), rtol=1e-5)
    with pytest.raises(ValueError, match="`num_data` is required for a model with a penalty"):
        method = bc.map_estimate(model, bc.Categorical, ADAM)
        bc.fit(method, blobs(), key, epochs=1, batch_size=10, progress=False)
    fitted = bc.fit(bayes(model), blobs(), key, epochs=1, batch_size=30, progress=False)
    assert fitted.history["kl"] == 96.5
    plain = bc.from_linen(nn.Dense(3), jnp.ones((1, 4)))
    assert plain.train(plain.init(key), rows(5), key)[2] == 0.0


# Layers in passes ----------------------------------------------------------------------------------------------------------


def test_without_a_key_it_is_the_network_of_the_means(key):
    """And those start as the plain network of the same key does, to the bit."""
    model, plain = net(), bc.models.mlp(4, (8,), 3)
    variables = jax.jit(model.init)(key)
    renamed = lambda layer: {"kernel": layer["mean"], "bias": layer["bias"]}
    params = {"dense": {0: renamed(variables.params["dense"][0])}, "head": renamed(variables.params["head"])}
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(plain.init)(key).params)
    np.testing.assert_allclose(jnp.exp(variables.params["head"]["log_scale"]), 0.3, rtol=1e-5)
    expected = plain.apply(bc.Variables(params), rows(5), None)
    np.testing.assert_allclose(model.apply(variables, rows(5), None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_draw_is_one_network(name, key):
    """For any chunks, order and batch mates; another key is another, in every output."""
    build, shape = NETWORKS[name]
    method, inputs = bayes(build()), rows(20, shape)
    state = jax.jit(method.init)(key, None)
    logits = bc.predict(method, state, inputs, key).logits
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for chunk_size in (1, 7):
        close(bc.predict(method, state, inputs, key, chunk_size=chunk_size).logits, logits)
    order = np.random.default_rng(0).permutation(20)
    close(bc.predict(method, state, inputs[order], key).logits, logits[:, order])
    close(bc.predict(method, state, inputs[3:4], key).logits, logits[:, 3:4])
    apply = jax.jit(build().apply)
    for draw, draw_key in zip(logits, jax.random.split(key, 3), strict=True):
        close(apply(state.variables, inputs, draw_key), draw)
    other = bc.predict(method, state, inputs, jax.random.key(8)).logits
    assert (np.abs(other - logits) > 1e-4).mean() > 0.99 and logits.std(0).min() > 1e-3
    assert bc.predict(method, state, inputs, None).num_members == 1


def test_a_layer_called_twice_draws_one_kernel(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = variational_dense(4, 4, rngs=rngs, initial_scale=0.5, estimator=shared_noise)

        def __call__(self, x):
            return jnp.stack([self.layer(x), self.layer(x)])

    model = bc.from_nnx(Net)
    variables = model.init(key)
    for once, again in (model.apply(variables, rows(3), key), model.train(variables, rows(3), key)[0]):
        np.testing.assert_array_equal(once, again)
    single = bc.from_nnx(lambda rngs: variational_dense(4, 4, rngs=rngs, initial_scale=0.5))
    penalty = single.train(variables._replace(params=variables.params["layer"]), rows(3), key)[2]
    np.testing.assert_allclose(model.train(variables, rows(3), key)[2], penalty, rtol=1e-6)


def test_members_have_noise_of_their_own(key):
    """From the same network, with all rows in every batch: what is left to differ is the noise, in training and draws."""
    data, method = blobs(), bc.ensemble(bayes(net()), 3)
    start = method.init(key, None)
    same = start._replace(members=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), start.members))
    draws = bc.predict(method, same, data.inputs, key).logits
    assert len(np.unique(draws.reshape(9, -1).round(4), axis=0)) == 9
    fitted = bc.fit(method, data, key, epochs=1, batch_size=30, start=same, execution="map", progress=False)
    raw = fitted.state.members.opt_state[0].mu["head"]["log_scale"]
    kl = 0.1 * (0.3**2 - 1) / 30  # Adam's average of one gradient, of which this is no noise
    noise = np.asarray(raw).reshape(3, -1) - kl
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(noise[a] - noise[b]).max() > 0.05 * np.abs(noise).max()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zeros_and_dead_units_have_finite_gradients(estimator, key):
    """Inputs that are zero, or whose squares are; and units that are all off, which give the next layer zeros."""
    model = pictures(estimator)
    variables = jax.jit(model.init)(key)

    @jax.jit
    def gradient(bias, x):
        params = jax.tree.map(lambda leaf: leaf, variables.params)
        params["conv"][0]["bias"] = params["conv"][0]["bias"] + bias
        loss = lambda params, x: (model.train(variables._replace(params=params), x, key)[0] ** 2).sum()
        return jax.grad(loss, (0, 1))(params, x)

    x = rows(3, (4, 4, 1))
    for bias, inputs in ((0.0, 0 * x), (-1e3, x), (0.0, 1e-30 * x)):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(bias, inputs)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_a_number_comes_through(estimator, key):
    """Of inputs into their own rows, of weights and of scales into all: never an ordinary output."""
    model = pictures(estimator)
    variables = jax.jit(model.init)(key)
    train, apply = jax.jit(lambda v, x: model.train(v, x, key)[0]), jax.jit(lambda v, x: model.apply(v, x, key))
    x = rows(5, (4, 4, 1))
    for bad in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[2, 1, 1] = bad
        for outputs in (train(variables, spoilt), apply(variables, spoilt)):
            outputs = np.asarray(outputs)
            assert np.isfinite(np.delete(outputs, 2, 0)).all() and not np.isfinite(outputs[2]).any()
    for part in ("mean", "log_scale"):
        head = variables.params["head"]
        spoilt = {**variables.params, "head": {**head, part: head[part].at[:, 1].set(jnp.nan)}}
        for outputs in (train(bc.Variables(spoilt), x), apply(bc.Variables(spoilt), x)):
            np.testing.assert_array_equal(np.isnan(outputs), np.tile([False, True, False], (5, 1)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_whole_numbers_of_eight_bits_are_the_numbers_they_stand_for(estimator, key):
    """Though they can hold neither their squares nor their negatives."""
    kernel, pixels = (3, 3), np.random.default_rng(0).integers(0, 256, (3, 4, 4, 4), np.uint8)
    for build in (variational_dense, partial(variational_conv, kernel_size=kernel)):
        model = bc.from_nnx(lambda rngs, b=build: b(4, 3, rngs=rngs, estimator=estimator, initial_scale=0.3))
        variables, both = model.init(key), (pixels, pixels.astype(np.float32))
        run = lambda v, xs, m=model: [(m.train(v, x, key), m.apply(v, x, key)) for x in xs]
        got, expected = jax.jit(run)(variables, both)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got, expected)
        assert np.std(expected[0][0] - model.apply(variables, pixels, None)) > 10


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_jit_changes_nothing(estimator, key):
    model = bc.from_nnx(lambda rngs: variational_dense(4, 3, rngs=rngs, estimator=estimator, initial_scale=0.3))
    variables = model.init(key)
    for call in (model.train, model.apply):
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, jax.jit(call)(variables, rows(5), key), call(variables, rows(5), key))


@pytest.mark.slow
def test_scales_on_the_member_axis(key):
    """A member's own prior is carried in its statistics, where the KL finds it."""

    def build(own):
        dense = partial(variational_dense, prior_scale=own["prior"], initial_scale=own["initial"])
        return bayes(bc.models.mlp(4, (8,), 3, dense=dense), temperature=own["temperature"])

    settings = {"prior": jnp.array([0.5, 2.0]), "initial": jnp.array([0.1, 0.2]), "temperature": jnp.array([1.0, 0.1])}
    method = bc.ensemble(build, settings=settings)
    with jax.checking_leaks():
        jax.eval_shape(method.init, key, None)
    state = method.init(key, None)
    fitted = bc.fit(method, blobs(), key, epochs=1, batch_size=30, start=state, progress=False)
    np.testing.assert_array_equal(fitted.state.members.variables.stats["head"]["prior_scale"], settings["prior"])
    np.testing.assert_allclose(fitted.history["temperature"][0], settings["temperature"], rtol=1e-6)
    for m in range(2):
        prior, s = settings["prior"][m], settings["initial"][m]
        means = [layer["mean"][m] for layer in (state.members.variables.params[n] for n in ("head",))]
        means.append(state.members.variables.params["dense"][0]["mean"][m])
        expected = sum(np.sum(np.log(prior / s) + (s**2 + x**2) / (2 * prior**2) - 0.5) for x in means)
        np.testing.assert_allclose(fitted.history["kl"][0, m], expected, rtol=1e-4)


def test_an_estimator_of_your_own(key):
    """Kernels of opposite noise for the halves of a batch."""

    def antithetic(key, inputs, mean, scale, product):
        half = len(inputs) // 2
        noise = scale * jax.random.normal(key, mean.shape)
        return jnp.concatenate([product(inputs[:half], mean + noise), product(inputs[half:], mean - noise)])

    model = bc.from_nnx(lambda rngs: variational_dense(4, 3, rngs=rngs, estimator=antithetic))
    variables, x = model.init(key), np.tile(rows(1), (2, 1))
    up, down = model.train(variables, x, key)[0]
    np.testing.assert_allclose(up + down, 2 * model.apply(variables, x, None)[0], rtol=1e-4)
    assert (up != down).all()


# Refusals ------------------------------------------------------------------------------------------------------------------


def test_features_of_a_random_head(key):
    model = net()
    variables = model.init(key)
    assert model.features is not None
    assert model.features(variables, rows(3), None).shape == (3, 8)
    with pytest.raises(ValueError, match="`head`"):
        model.features(variables, rows(3), key)


@pytest.mark.parametrize("layer", [variational_dense, partial(variational_conv, kernel_size=(3, 3))])
def test_bad_estimators(unchecked, layer):
    with pytest.raises(TypeError, match=r"`estimator` must be a function, got 'local'\. Pass `models\.local_repar"):
        layer(4, 3, rngs=nnx.Rngs(0), estimator="local")
