import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from methods import linen_model

import bayescal as bc

pytestmark = pytest.mark.core


def mlp(**settings):
    return bc.models.mlp(4, (16, 16), 3, **settings)


ADAPTED = {
    "nnx": lambda: mlp(dropout=0.5),
    "nnx with batch norm": lambda: mlp(dropout=0.5, batch_norm=True),
    "nnx convolutions": lambda: bc.models.convnet((2, 2, 1), (3,), 16, 3, dropout=0.5, batch_norm=True),
    "lenet, convolutions": lambda: bc.models.lenet((12, 12, 1), 3, dropout=0.5),
    "linen": linen_model,
}


def inputs_for(name):
    x = jax.random.normal(jax.random.key(3), (6, 4))
    if "lenet" in name:
        return jnp.tile(x.reshape(6, 2, 2, 1), (1, 6, 6, 1))
    return x.reshape(6, 2, 2, 1) if "convolutions" in name else x


@pytest.mark.parametrize("name", ADAPTED)
def test_a_key_makes_it_stochastic(name, key):
    model, x = ADAPTED[name](), inputs_for(name)
    variables = jax.jit(model.init)(key)
    draws = jax.jit(jax.vmap(lambda k: model.apply(variables, x, k)))(jax.random.split(key, 6))
    assert draws.std(0).min(initial=np.inf, where=np.abs(draws).max(0) > 0) > 1e-3, "flax's silent trap: no variance"
    fixed = jax.jit(lambda v: model.apply(v, x, None))
    np.testing.assert_array_equal(fixed(variables), fixed(variables))


@pytest.mark.parametrize("name", [n for n in ADAPTED if n not in ("nnx", "lenet, convolutions")])
def test_batch_norm_is_frozen_outside_training(name, key):
    model, x = ADAPTED[name](), inputs_for(name)
    variables = jax.jit(model.init)(key)
    apply = jax.jit(model.apply)
    for k in (None, key):
        # other batch mates, the same masks: with batch statistics the first rows would change
        mates = jnp.concatenate([x[:2], 5 + 3 * x[2:]])
        np.testing.assert_allclose(apply(variables, mates, k)[:2], apply(variables, x, k)[:2], rtol=1e-5, atol=1e-6)
    _, stats, penalty = jax.jit(model.train)(variables, x, key)
    assert jax.tree.structure(stats) == jax.tree.structure(variables.stats) and penalty == 0
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables.stats)
    assert all(jax.tree.leaves(changed)), "training must move the running moments"


@pytest.mark.parametrize(
    "build",
    [
        mlp,
        lambda: mlp(batch_norm=True),
        lambda: bc.from_linen(nn.Dense(3), jnp.ones((1, 4))),
        lambda: bc.from_linen(nn.Sequential([nn.Dense(3), nn.Dropout(0.0, deterministic=False)]), jnp.ones((1, 4))),
    ],
)
def test_a_key_without_a_stream_is_an_error(build, key):
    model = build()
    variables = model.init(key)
    with pytest.raises(ValueError, match="`key` was given to a network without a random stream: expected dropout"):
        model.apply(variables, jnp.ones((2, 4)), key)


def test_mc_dropout_without_dropout_is_an_error(key):
    import optax

    method = bc.mc_dropout(mlp(), bc.Categorical, optax.adam(1e-2), num_draws=3)
    with pytest.raises(ValueError, match="without a random stream"):
        bc.predict(method, method.init(key, None), np.ones((2, 4), np.float32), key)


def test_a_stream_of_any_name_is_seeded(key):
    """A module built with one unnamed stream has no stream called dropout, and still must vary."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(rngs()))

        def __call__(self, x):
            return self.dropout(x)

    model = bc.from_nnx(Net)
    variables = model.init(key)
    draws = jnp.stack([model.apply(variables, jnp.ones((1, 50)), k) for k in jax.random.split(key, 3)])
    assert (draws.std(0) > 0).any()


def test_attention_dropout_is_switched_on_too(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.9, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(x)

    model = bc.from_nnx(Net)
    variables, x = jax.jit(model.init)(key), jax.random.normal(key, (2, 5, 8))
    draws = jax.jit(jax.vmap(lambda k: model.apply(variables, x, k)))(jax.random.split(key, 3))
    assert draws.std(0).max() > 1e-2


def test_linen_dropout_called_with_the_flag(key):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5)(x, deterministic=not train)

    model = bc.from_linen(Net(), jnp.ones((1, 50)), train={"train": True}, evaluate={"train": False})
    variables = model.init(key)
    assert (model.apply(variables, jnp.ones((1, 50)), key) == 0).any()
    np.testing.assert_array_equal(model.apply(variables, jnp.ones((1, 50)), None), jnp.ones((1, 50)))


@pytest.mark.parametrize("name", ["nnx with batch norm", "nnx convolutions", "linen"])
def test_members_differ_in_every_random_leaf_and_in_their_masks(name, key):
    """Random leaves: kernels. (Biases, scales and moments start at constants.)"""
    import optax

    model, x = ADAPTED[name](), inputs_for(name)
    method = bc.ensemble(bc.mc_dropout(model, bc.Categorical, optax.adam(1e-2), num_draws=2), 3)
    state = jax.jit(method.init)(key, None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.members.variables.params):
        if "kernel" in jax.tree_util.keystr(path):
            assert (leaf[0] != leaf[1]).mean() > 0.99 and (leaf[1] != leaf[2]).mean() > 0.99
    # the same weights in every member: what still differs is the masks
    same = state._replace(members=jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), state.members))
    pred = bc.predict(method, same, np.asarray(x), key)
    assert pred.num_members == 6
    assert len(np.unique(np.asarray(pred.logits).reshape(6, -1).round(5), axis=0)) == 6


def test_pooling_needs_even_images():
    with pytest.raises(ValueError, match=r"`shape` must have height and width divisible by 2 \*\* len\(channels\) = 4"):
        bc.models.convnet((6, 6, 1), (2, 2), 8, 3)


RATED = {
    "mlp": (lambda rate: bc.models.mlp(4, (8,), 3, dropout=rate, batch_norm=True), jax.vmap),
    "convolutions": (
        lambda rate: bc.models.convnet((2, 2, 1), (3,), 8, 3, dropout=rate),
        lambda function: lambda rates: jax.lax.map(function, rates),
    ),
}


@pytest.mark.parametrize("name", RATED)
def test_a_traced_rate_gives_what_the_number_gives(name, key):
    """The same parameters, masks, outputs and moments; the rate itself is carried in `stats`."""
    (build, over_members), x = RATED[name], inputs_for(name)

    def passes(rate):
        model = build(rate)
        variables = model.init(key)
        return *variables, model.apply(variables, x, key), *model.train(variables, x, key)[:2]

    expected, got = jax.jit(lambda rates: (passes(0.5), over_members(passes)(rates)))(jnp.array([0.1, 0.5]))
    for stats in (got[1], got[-1]):
        for layer in stats.pop("dropout").values():
            np.testing.assert_array_equal(layer["rate"], np.float32([0.1, 0.5]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=2e-5), got, expected)
    assert (got[2][0] != got[2][1]).any()


def test_the_layer_behaves_as_nnx_dropout():
    x = jnp.arange(1.0, 41).reshape(4, 2, 5)
    plain = bc.models.dropout_layer(0.6, nnx.Rngs(1), broadcast_dims=(-2,))
    ours = bc.models.dropout_layer(jnp.float32(0.6), nnx.Rngs(1), broadcast_dims=(-2,))
    assert type(plain) is nnx.Dropout and isinstance(ours, nnx.Dropout)
    streams = [None, None, nnx.Rngs(2), nnx.Rngs(2).default, jax.random.key(2)]  # its own one moves on at each draw
    for of_ours, of_plain in zip(streams, jax.tree.map(jnp.copy, streams), strict=True):
        expected = plain(x, rngs=of_plain)
        np.testing.assert_allclose(ours(x, rngs=of_ours), expected, rtol=1e-6)
        assert 0 < (expected == 0).sum() < x.size
    np.testing.assert_array_equal(ours(x, deterministic=True), x)
    ours.eval()
    np.testing.assert_array_equal(ours(x), x)
    assert (ours(x, deterministic=False, rngs=nnx.Rngs(2)) != x).all()
    ours.train()
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(bc.models.dropout_layer(jnp.float32(0), nnx.Rngs(1))(x), x)


def test_bad_rates(unchecked):
    for rate in (1, -0.1, jnp.float32(1), np.float32(-0.1)):
        with pytest.raises(ValueError, match=r"`dropout` must be a rate in \[0, 1\), got .*\. It is the share"):
            mlp(dropout=rate)
    with pytest.raises(ValueError, match=r"`dropout` must be one rate, got shape \(2,\)\. In `ensemble` each member"):
        mlp(dropout=jnp.array([0.1, 0.2]))
    drop = lambda rate: bc.models.dropout_layer(rate, nnx.Rngs(0))(jnp.ones(9))
    bad = jax.jit(jax.vmap(drop))(jnp.array([-0.1, 0.0, 0.9, 1.0, 1.1]))  # traced: NaN rather than another network
    np.testing.assert_array_equal(jnp.isnan(bad).all(1), [True, False, False, True, True])
    np.testing.assert_array_equal(jnp.isnan(bad).any(1), [True, False, False, True, True])


def test_a_traced_rate_does_not_outlive_its_trace(key):
    """jax keeps every module class: one that closed over the rate would hold the whole trace."""
    with jax.checking_leaks():
        for build, over_members in RATED.values():
            jax.eval_shape(over_members(lambda rate, build=build: build(rate).init(key)), jnp.array([0.1, 0.5]))


class Own(nnx.Module):
    """A user's network with a rate of its own."""

    def __init__(self, rate, rngs):
        self.dropout = bc.models.dropout_layer(rate, rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(x))


def test_members_with_their_own_dropout_rates(key):
    """Through fit and predict, map and vmap: the more dropout, the more a member's draws differ."""
    import optax
    from methods import blobs

    def build(own):
        model = bc.from_nnx(lambda rngs: Own(own["rate"], rngs))
        return bc.mc_dropout(model, bc.Categorical, optax.sgd(1e-2), num_draws=20)

    rates, data = jnp.array([0.0, 0.1, 0.8]), blobs()
    method = bc.ensemble(build, settings={"rate": rates})
    for execution in ("map", "vmap"):
        fitted = bc.fit(method, data, key, epochs=1, batch_size=10, execution=execution, progress=False)
        np.testing.assert_array_equal(fitted.state.members.variables.stats["dropout"]["rate"], rates)
        assert fitted.members.alive.all()
        draws = bc.predict(method, fitted.state, data.inputs, key).logits.reshape(3, 20, *data.targets.shape, 3)
        spread = (draws.max(1) - draws.min(1)).mean((1, 2))
        assert spread[0] == 0 and 0 < spread[1] < spread[2] / 2


def test_a_vmapped_convnet_has_the_gradients_of_each_member(key):
    """jax 0.10.2 on CPU compiles the gradient of a reshape-and-max pooling after batch norm to wrong numbers."""
    model = bc.models.convnet((4, 4, 1), (3,), 8, 3, batch_norm=True)
    inputs = jax.random.normal(key, (5, 4, 4, 1))
    variables = jax.vmap(model.init)(jax.random.split(key, 2))

    def gradient(variables):
        loss = lambda params: (model.train(variables._replace(params=params), inputs, key)[0] ** 2).sum()
        return jax.grad(loss)(variables.params)

    both, each = jax.jit(jax.vmap(gradient))(variables), jax.lax.map(gradient, variables)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_lenet_layer_by_layer(key):
    """The same numbers with flax's own convolutions and pooling; 61,706 parameters."""
    model = bc.models.lenet((28, 28, 1), 10)
    variables, x = jax.jit(model.init)(key), jax.random.normal(key, (3, 28, 28, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables.params)) == 61706
    params, images = variables.params, x
    for i, padding in enumerate(("SAME", "VALID")):
        own = params["conv"][i]
        images = nn.Conv(own["bias"].size, (5, 5), padding=padding).apply({"params": own}, images)
        images = nn.max_pool(nn.relu(images), (2, 2), (2, 2))
    assert images.shape == (3, 5, 5, 16)
    rows = images.reshape(3, -1)
    for i in range(2):
        rows = nn.relu(rows @ params["dense"][i]["kernel"] + params["dense"][i]["bias"])
    np.testing.assert_allclose(model.features(variables, x, None), rows, rtol=1e-4, atol=1e-5)
    expected = rows @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(model.apply(variables, x, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 28, 1), (28, 30, 1)])
def test_lenet_needs_images_to_halve_twice(shape):
    with pytest.raises(ValueError, match=r"`shape` must have height and width divisible by 4 and at least 12, got \("):
        bc.models.lenet(shape, 10)
    with pytest.raises(ValueError, match=r"`dropout` must be a rate in \[0, 1\)"):
        bc.models.lenet((12, 12, 1), 10, dropout=1)
