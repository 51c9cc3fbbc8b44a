"""Features and heads: of every adapter, and streamed beside the predictive."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import LinenNet, blobs, pure_model

import bayescal as bc
from bayescal.train import predict_features

pytestmark = pytest.mark.core


def linen(head="Dense_1"):
    return bc.from_linen(LinenNet(), jnp.ones((1, 4)), train={"train": True}, evaluate={"train": False}, head=head)


class Parts(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(6), nn.BatchNorm(use_running_average=True), nn.Dense(3)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Deep(nn.Module):
    """A head with parts and statistics of its own."""

    def setup(self):
        self.first, self.drop, self.last = nn.Dense(5), nn.Dropout(0.5, deterministic=True), Parts()

    def __call__(self, x):
        return self.last(self.drop(self.first(x)))


NETWORKS = {  # name -> (build, shape of an input, number of features)
    "mlp": (lambda: bc.models.mlp(4, (16, 8), 3, dropout=0.5, batch_norm=True), (4,), 8),
    "nothing hidden": (lambda: bc.models.mlp(4, (), 3), (4,), 4),
    "convnet": (lambda: bc.models.convnet((4, 4, 1), (3,), 7, 3, dropout=0.5, batch_norm=True), (4, 4, 1), 7),
    "lenet": (lambda: bc.models.lenet((12, 16, 2), 3, dropout=0.5), (12, 16, 2), 84),
    "linen": (linen, (4,), 16),
    "linen, head with parts": (lambda: bc.from_linen(Deep(), jnp.ones((1, 4)), head="last"), (4,), 5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_apply_is_head_of_features_to_the_bit(name, key):
    build, shape, width = NETWORKS[name]
    model, x = build(), jax.random.normal(key, (6, *shape))
    variables = jax.jit(jax.vmap(model.init))(jax.random.split(key, 2))
    lone = jax.tree.map(lambda v: v[1], variables)

    def one(own, k):
        features = model.features(own, x, k)
        return features, model.head(own, features), model.apply(own, x, k)

    keys = [None] if name == "nothing hidden" else [None, key]
    run = jax.jit(lambda own, members: ([one(own, k) for k in keys], jax.vmap(lambda v: one(v, keys[-1]))(members)))
    each, members = run(lone, variables)
    for features, outputs, expected in each:
        assert features.shape == (6, width) and outputs.shape == (6, 3)
        np.testing.assert_array_equal(outputs, expected)
    # another program may round in another order
    np.testing.assert_allclose(each[-1][1], jax.jit(model.apply)(lone, x, keys[-1]), rtol=1e-5, atol=1e-5)
    assert members[0].shape == (2, 6, width) and (members[1][0] != members[1][1]).any()
    np.testing.assert_allclose(members[1][1], each[-1][1], rtol=1e-4, atol=1e-5)
    if len(keys) == 1:
        with pytest.raises(ValueError, match="`key` was given to a network without a random stream"):
            model.features(lone, x, key)
    else:
        assert (each[0][0] != each[1][0]).any(), "with a key, dropout before the head is on"


def test_features_and_outputs_by_hand(key):
    """A float64 loop over the layers, and the head's own parameters where `head_path` says."""
    model, x = bc.models.mlp(4, (16, 8), 3), np.asarray(jax.random.normal(key, (6, 4)))
    variables = model.init(key)
    kernels = [jax.tree.map(np.float64, variables.params["dense"][i]) for i in range(2)]
    rows = []
    for row in x.astype(np.float64):
        for layer in kernels:
            row = np.maximum(row @ layer["kernel"] + layer["bias"], 0)
        rows.append(row)
    features = model.features(variables, x, None)
    np.testing.assert_allclose(features, rows, rtol=1e-5, atol=1e-5)
    for model in (bc.models.mlp(4, (16, 8), 3), linen()):
        variables = model.init(key)
        own = variables.params
        for name in model.head_path:
            own = own[name]
        features = np.float64(model.features(variables, x, None))
        expected = features @ np.float64(own["kernel"]) + np.float64(own["bias"])
        np.testing.assert_allclose(model.apply(variables, x, None), expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_comes_through(key):
    model = bc.models.mlp(4, (8,), 3)
    features = model.features(model.init(key), jnp.ones((2, 4)).at[0, 1].set(jnp.nan), None)
    np.testing.assert_array_equal(jnp.isnan(features).all(1), [True, False])


def test_the_head_alone_may_change(key):
    """What last-layer methods rest on: other parameters under `head_path` give other outputs of the same features."""
    model, x = linen(), jnp.ones((2, 4))
    variables = model.init(key)
    (name,) = model.head_path
    twice = variables._replace(params={**variables.params, name: jax.tree.map(lambda p: 2 * p, variables.params[name])})
    features = model.features(twice, x, None)
    np.testing.assert_array_equal(features, model.features(variables, x, None))
    np.testing.assert_array_equal(model.head(twice, features), 2 * model.head(variables, features))


@pytest.mark.parametrize("model", [pure_model(), linen(None), bc.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))])
def test_without_a_head_there_are_no_features(model, key):
    assert model.features is None and model.head is None and model.head_path == ()
    message = "`model` must give features, got one without. Name its last layer where it is built: `bc.from_nnx"
    with pytest.raises(ValueError, match=message):
        predict_features(model, bc.Categorical, model.init(key), np.ones((2, 4), np.float32), None)


class Wrong(nnx.Module):
    """Networks whose `head` is not the last thing that happens to an array of features."""

    def __init__(self, kind, rngs):
        self.kind = kind
        self.head = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        if kind == "random":
            self.head = nnx.Sequential(self.head, self.drop)

    def __call__(self, x):
        head, drop = self.head, self.drop
        return {
            "random": lambda: head(x),
            "twice": lambda: head(head(x)),
            "never": lambda: x,
            "with more": lambda: head(x, None),
            "each token": lambda: head(x[:, None]),
            "goes on": lambda: jax.nn.log_softmax(head(x)),
            "beside": lambda: (head(x), x)[1],
            "two outputs": lambda: (head(x), x),
            "wrapped": lambda: {"logits": head(x)},
            "dropout after": lambda: drop(head(x)),
        }[self.kind]()


class Random(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))


class Given(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(self.inner(x))


class LinenWrong(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "random":
            return Random(name="head")(x)
        if self.kind == "with more":
            return nn.MultiHeadDotProductAttention(2, name="head")(x, x)
        if self.kind == "parts elsewhere":
            return nn.Sequential([nn.Dense(4)], name="head")(x)
        if self.kind == "some parts elsewhere":
            return Given(nn.Dense(4), name="head")(x)
        head = nn.Dense(4, name="head")
        return {
            "twice": lambda: head(head(x)),
            "each token": lambda: head(x[:, None]),
            "goes on": lambda: nn.log_softmax(head(x)),
            "beside": lambda: (head(x), x)[1],
            "two outputs": lambda: (head(x), x),
            "wrapped": lambda: {"logits": head(x)},
            "dropout after": lambda: nn.Dropout(0.5, deterministic=True)(head(x)),
        }[self.kind]()


WRONG = {
    "twice": "`head` must be called once in a forward pass, got 2 calls of 'head'. Name the layer that comes last",
    "with more": r"`head` must be called with the features alone, one array \(batch, features\), got 'head' called with",
    "each token": r"`head` must be called with the features alone, .* \[\(2, 1, 4\)\]. Flatten or pool before it",
    "goes on": "`head` must give the network's outputs, got a network that goes on after 'head'. Name the layer that",
    "beside": "`head` must give the network's outputs",
    "two outputs": "`head` must give the network's outputs",
    "wrapped": "`head` must give the network's outputs",
}
RANDOM = r"`head` must draw no random numbers, got dropout \(or the like\) inside 'head'. Put it before the head"


@pytest.mark.parametrize("kind", [*WRONG, "never"])
def test_wrong_heads(kind, key):
    message = WRONG.get(kind, "`head` must be called once in a forward pass, got 0 calls of 'head'")
    x = jnp.ones((2, 4))
    model = bc.from_nnx(lambda rngs: Wrong(kind, rngs), head="head")
    with pytest.raises(ValueError, match=message):
        model.features(model.init(key), x, None)
    if kind != "never":
        with pytest.raises(ValueError, match=message):
            bc.from_linen(LinenWrong(kind), x, head="head")


def test_dropout_inside_and_after_the_head(key):
    """With a key alone it is seen: without one, dropout does nothing."""
    x = jnp.ones((2, 4))
    for kind, message in (("random", RANDOM), ("dropout after", WRONG["goes on"])):
        builders = (lambda rngs, kind=kind: Wrong(kind, rngs)), LinenWrong(kind)
        for model in (bc.from_nnx(builders[0], head="head"), bc.from_linen(builders[1], x, head="head")):
            variables = model.init(key)
            np.testing.assert_array_equal(
                model.head(variables, model.features(variables, x, None)), model.apply(variables, x, None)
            )
            with pytest.raises(ValueError, match=message):
                model.features(variables, x, key)


def test_a_head_that_is_not_there(key):
    model = bc.from_nnx(lambda rngs: Wrong("goes on", rngs), head="kind")
    message = (
        r"`head` must name a layer of the network with parameters of its own, its last, got 'kind' where there are \['h"
    )
    for use in (model.features, lambda variables, x, key: model.head(variables, x)):
        with pytest.raises(ValueError, match=message):
            use(model.init(key), jnp.ones((2, 4)), None)
    for head, layers in (("Dense_2", "BatchNorm_0', 'Dense_0"), ("Dropout_0", "BatchNorm_0")):
        with pytest.raises(ValueError, match=rf"`head` must name a layer .* got '{head}' where there are \['{layers}"):
            linen(head)
    with pytest.raises(
        ValueError, match=r"`head` must name a layer .* got 'head' where there are \['Dense_0'\]. Pass one"
    ):
        bc.from_linen(LinenWrong("parts elsewhere"), jnp.ones((2, 4)), head="head")
    with pytest.raises(
        ValueError, match="`head` must keep all its parameters under its own name, got 'head' with some"
    ):
        bc.from_linen(LinenWrong("some parts elsewhere"), jnp.ones((2, 4)), head="head")


DATA = blobs()


@pytest.mark.parametrize("number", [None, 3])
def test_the_predictive_is_that_of_predict(number, key):
    """Of a lone network and of an ensemble; with a key, that of Monte-Carlo dropout with one draw."""
    model = bc.models.mlp(4, (8,), 3, dropout=0.5)
    settings = (model, bc.Categorical, optax.sgd(1e-2))
    as_many = lambda method: method if number is None else bc.ensemble(method, number)
    means, drawn = as_many(bc.map_estimate(*settings)), as_many(bc.mc_dropout(*settings, num_draws=1))
    state = jax.jit(means.init)(key, None)
    for k, method in ((None, means), (key, drawn)):
        expected = bc.predict(method, state, DATA.inputs, k)
        both = predict_features(model, bc.Categorical, state, DATA.inputs, k)
        pred, features = both
        np.testing.assert_allclose(pred.logits, expected.logits, rtol=1e-6, atol=1e-6)
        assert jax.tree.structure(pred) == jax.tree.structure(expected)
        assert features.shape == (number or 1, len(DATA.targets), 8)
        chunked = predict_features(model, bc.Categorical, state, DATA.inputs, k, chunk_size=7, mesh=bc.make_mesh(1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), chunked, both)
        if k is None:
            one = jax.tree.map(lambda v: v[-1] if number else v, state.members.variables if number else state.variables)
            np.testing.assert_allclose(features[-1], model.features(one, DATA.inputs, None), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(pred.logits[-1], model.head(one, features[-1]), rtol=1e-5, atol=1e-6)
            of_variables = predict_features(model, bc.Categorical, one, DATA.inputs, None)
            np.testing.assert_allclose(of_variables[1][0], features[-1], rtol=1e-6, atol=1e-6)


def test_dead_members_weigh_nothing(key):
    model = bc.models.mlp(4, (8,), 3)
    method = bc.ensemble(bc.map_estimate(model, bc.Categorical, optax.adam(1e-2)), 3)
    state = method.init(key, None)
    spoilt = jax.tree.map(lambda x: x.at[1].set(jnp.nan) if x.dtype == jnp.float32 else x, state.members)
    state = bc.EnsembleState(spoilt, jnp.array([True, False, True]))
    pred, features = predict_features(model, bc.Categorical, state, DATA.inputs, None)
    np.testing.assert_array_equal(pred.member_weights, [1, 0, 1])
    np.testing.assert_array_equal(jnp.isnan(features).any((1, 2)), [False, True, False])
    assert np.isfinite(bc.decompose(pred).total).all()


def test_one_pass_compiled_once(key):
    """Both together cost what the outputs alone do, to the operation; and the same model compiles once."""
    model = bc.models.mlp(4, (8, 8), 3)
    variables, traces = model.init(key), []

    def both(variables, inputs):
        features = model.features(variables, inputs, None)
        return model.head(variables, features), features

    costs = [
        jax.jit(f).lower(variables, DATA.inputs).compile().cost_analysis()["flops"]
        for f in (both, lambda v, x: model.apply(v, x, None))
    ]
    assert costs[0] == costs[1] >= 2 * 30 * (4 * 8 + 8 * 8 + 8 * 3)

    def likelihood(outputs):
        traces.append(1)
        return bc.Categorical(outputs)

    predict_features(model, likelihood, variables, DATA.inputs, None, chunk_size=10)
    before = len(traces)
    predict_features(model, likelihood, variables, DATA.inputs, None, chunk_size=10)
    assert before > 0 and len(traces) == before


def test_a_likelihood_that_enlarges_the_member_axis(key):
    model = bc.models.mlp(4, (8,), 3)
    twice = lambda outputs: bc.Categorical(jnp.concatenate([outputs, -outputs]))
    state = bc.EnsembleState(jax.vmap(model.init)(jax.random.split(key, 2)), jnp.array([True, False]))
    pred, features = predict_features(model, twice, state, DATA.inputs, None)
    assert pred.logits.shape == (4, 30, 3) and features.shape == (2, 30, 8)
    np.testing.assert_array_equal(pred.member_weights, [1, 1, 0, 0])


def test_wrong_states_and_inputs(key, unchecked):
    model = bc.models.mlp(4, (8,), 3)
    variables = model.init(key)
    with pytest.raises(TypeError, match="`state` must be Variables, a state that has `variables`, or an EnsembleState"):
        predict_features(model, bc.Categorical, variables.params, DATA.inputs, None)
    method = bc.ensemble(bc.map_estimate(model, bc.Categorical, optax.adam(1e-2)), 2)
    state = jax.jit(method.init)(key, None)
    fitted = bc.Fit(state, state, {}, None, {})
    with pytest.raises(TypeError, match="`state` must be a state, got a Fit"):
        predict_features(model, bc.Categorical, fitted, DATA.inputs, None)
    grid = jax.tree.map(lambda x: x[None], state)
    message = r"`state` must be of one experiment, got members of shape \(1, 2\). Take experiment e: `jax.tree.map"
    with pytest.raises(ValueError, match=message):
        predict_features(model, bc.Categorical, grid, DATA.inputs, None)
    one, whole = (
        predict_features(model, bc.Categorical, state, DATA.inputs, None)[1]
        for state in (jax.tree.map(lambda x: x[0], grid), state)
    )
    np.testing.assert_array_equal(one, whole)
    with pytest.raises(ValueError, match="`inputs` must be finite, got NaN or infinity in 1 of 2 rows"):
        predict_features(model, bc.Categorical, variables, np.float32([[1, 2, 3, np.nan], [0, 0, 0, 0]]), None)
    with pytest.raises(ValueError, match="`key` was given to a network without a random stream"):
        predict_features(model, bc.Categorical, state, DATA.inputs, key)
    with pytest.raises(ValueError, match="`chunk_size` must be a whole number of at least 1, got 0"):
        predict_features(model, bc.Categorical, variables, DATA.inputs, None, chunk_size=0)


def test_one_chunk_at_a_time_on_several_devices(key, monkeypatch):
    """With many programs in flight, CPU devices that wait for each other used up all threads, and XLA aborted.

    They wait where the members do not divide the devices.
    """
    module = sys.modules["bayescal.train.predict"]  # the package has a function of that name
    method = bc.ensemble(bc.map_estimate(bc.models.mlp(4, (1500, 1500), 3), bc.Categorical, optax.sgd(1e-2)), 3)
    state, call, done, ready = jax.jit(method.init)(key, None), module._call, [], []

    def watched(*args):
        ready.extend(leaf.is_ready() for leaf in jax.tree.leaves(done))
        done.append(call(*args))
        return done[-1]

    monkeypatch.setattr(module, "_call", watched)
    bc.predict(method, state, np.ones((900, 4), np.float32), None, chunk_size=300)
    assert len(done) == 3 and len(done[0].logits.devices()) == 2 and all(ready)
