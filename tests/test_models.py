import itertools
import subprocess
import sys
from functools import partial

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


class Perceptron(nnx.Module):
    """What `mlp` promises, in flax's own layers."""

    def __init__(self, hidden, dropout, batch_norm, rngs):
        widths = [4, *hidden]
        self.dense = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.norm = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in hidden] if batch_norm else [])
        self.dropout = nnx.List([nnx.Dropout(dropout, rngs=rngs) for _ in hidden] if dropout else [])
        self.head = nnx.Linear(widths[-1], 3, rngs=rngs)

    def __call__(self, x):
        for i, dense in enumerate(self.dense):
            x = dense(x)
            x = nnx.relu(self.norm[i](x) if self.norm else x)
            x = self.dropout[i](x) if self.dropout else x
        return self.head(x)


@pytest.mark.parametrize(
    ("hidden", "dropout", "batch_norm"),
    [((), 0.0, False), ((7, 5), 0.0, False), ((7, 5), 0.0, True), ((7, 5), 0.4, True)],
)
def test_mlp_is_the_network_that_flax_makes(hidden, dropout, batch_norm, key):
    """The same initial values to the bit; outputs, gradients, moments and masks but for rounding."""
    ours = bc.models.mlp(4, hidden, 3, dropout=dropout, batch_norm=batch_norm)
    flax = bc.from_nnx(lambda rngs: Perceptron(hidden, dropout, batch_norm, rngs))
    x = 3 + jax.random.normal(jax.random.key(3), (20, 4))
    variables = jax.jit(flax.init)(key)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(ours.init)(key), variables)
    noise = jax.random.normal(jax.random.key(5), (30,))
    # scales, biases and moments that are none of 0 and 1
    variables = jax.tree.map(lambda v: v + 0.3 * jnp.abs(noise[: v.shape[-1]]), variables)

    @partial(jax.jit, static_argnums=0)
    def passes(model):
        def loss(params, inputs):
            outputs, stats, penalty = model.train(variables._replace(params=params), inputs, key)
            return jnp.sin(outputs).sum(), (outputs, stats, penalty)

        draws = model.apply(variables, x, key) if dropout else ()
        return (
            model.apply(variables, x, None),
            draws,
            jax.value_and_grad(loss, (0, 1), has_aux=True)(variables.params, x),
        )

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, passes(ours), passes(flax))


def test_mlp_by_hand():
    """Two rows, one hidden unit, batch norm: 1 and 3 have mean 2 and variance 1, so -1 and 1, so 0 and 1 x scale + bias."""
    model = bc.models.mlp(1, (1,), 1, batch_norm=True)
    one = lambda value: jnp.full(1, value)
    params = {
        "dense": {0: {"kernel": jnp.full((1, 1), 2.0), "bias": one(-1.0)}},
        "norm": {0: {"scale": one(5.0), "bias": one(0.5)}},
        "head": {"kernel": jnp.full((1, 1), -1.0), "bias": one(10.0)},
    }
    variables = bc.Variables(params, {"norm": {0: {"mean": one(1.0), "var": one(4.0)}}})
    x = jnp.array([[1.0], [2.0]])  # times 2, less 1: 1 and 3
    outputs, stats, _ = model.train(variables, x, jax.random.key(0))
    np.testing.assert_allclose(outputs, [[10.0], [4.5]], rtol=1e-5)  # 10 - relu(0.5 -+ 5)
    moments = stats["norm"][0]
    np.testing.assert_allclose([moments["mean"], moments["var"]], [[1.01], [3.97]], rtol=1e-6)
    np.testing.assert_allclose(model.apply(variables, x, None), [[9.5], [4.5]], rtol=1e-5)  # (1 - 1) / 2, (3 - 1) / 2


def test_batch_norm_keeps_its_digits_far_from_zero(key):
    """Where mean of squares - square of mean has none left."""
    model = bc.models.mlp(4, (6,), 3, batch_norm=True)
    variables = jax.jit(model.init)(key)
    x = 1e4 + jax.random.normal(key, (40, 4))
    hidden = np.float64(x) @ np.float64(variables.params["dense"][0]["kernel"])
    _, stats, _ = jax.jit(model.train)(variables, x, key)
    np.testing.assert_allclose(stats["norm"][0]["var"], 0.99 + 0.01 * hidden.var(0), rtol=1e-4)


def test_mlp_flattens(key):
    model, x = mlp(batch_norm=True), inputs_for("")
    variables, apply = jax.jit(model.init)(key), jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, x.reshape(6, 2, 1, 2), None), apply(variables, x, None))
    pixels = np.arange(24, dtype=np.uint8).reshape(6, 4)
    expected = apply(variables, pixels.astype(np.float32), None)
    np.testing.assert_allclose(apply(variables, pixels, None), expected, rtol=1e-5, atol=1e-5)
    outputs, stats, _ = jax.jit(model.train)(variables, x.reshape(6, 2, 1, 2), key)
    assert outputs.shape == (6, 3) and stats["norm"][1]["var"].shape == (16,)


def test_mlp_drops_the_share_it_says(key):
    """Each unit by itself, in every row and layer anew, and what stays grows so that the mean stays."""
    model, rate = bc.models.mlp(4, (300, 300), 3, dropout=0.3), 0.3
    variables = jax.jit(model.init)(key)
    first = variables.params["dense"][0]
    # a second layer that copies the first: its features are the first layer's, dropped twice
    variables.params["dense"][1] = {"kernel": jnp.eye(300), "bias": jnp.zeros(300)}
    x = jax.random.normal(jax.random.key(3), (50, 4))
    whole = np.maximum(np.asarray(x @ first["kernel"]), 0)
    active = whole > 1e-3
    both = [np.asarray(jax.jit(model.features)(variables, x, k)) for k in jax.random.split(key)]
    for features in both:
        ratio = (features / np.where(active, whole, 1))[active]
        kept = ratio > 0
        np.testing.assert_allclose(ratio[kept], 1 / (1 - rate) ** 2, rtol=1e-4)
        sd = np.sqrt(0.49 * 0.51 / kept.size)
        assert abs(kept.mean() - 0.49) < 4 * sd, "two independent masks: 0.7 x 0.7"
    a, b = ((f > 0)[active] for f in both)
    assert abs((a & b).mean() - 0.49**2) < 4 * np.sqrt(0.24 * 0.76 / a.size), "another key is another mask"
    rows = [(f > 0)[:1] != (f > 0)[1:] for f in both]
    assert all(r.any(1).all() for r in rows)


def test_mlp_rates_of_members(key):
    """Out of range is NaN, 0 changes nothing, and what counts is the rate that the state holds."""
    x = inputs_for("")

    def passes(rate):
        model = mlp(dropout=rate)
        variables = model.init(key)
        swapped = variables._replace(stats=jax.tree.map(lambda r: 0 * r, variables.stats))
        outputs = [model.train(variables, x, key)[0], model.apply(variables, x, key), model.apply(swapped, x, key)]
        return *outputs, model.apply(variables, x, None)

    rates = jnp.array([-0.1, 0.0, 0.9, 1.0, 1.1, jnp.nan])
    trained, drawn, swapped, plain = jax.jit(jax.vmap(passes))(rates)
    for outputs in (trained, drawn):
        np.testing.assert_array_equal(jnp.isnan(outputs).all((1, 2)), [True, False, False, True, True, True])
        np.testing.assert_array_equal(jnp.isnan(outputs).any((1, 2)), [True, False, False, True, True, True])
        np.testing.assert_allclose(outputs[1], plain[1], rtol=1e-5)
        assert (outputs[2] != plain[2]).any()
    np.testing.assert_allclose(swapped[2], plain[2], rtol=1e-5)


def test_mlp_never_drops_what_is_not_a_number(key):
    model = bc.models.mlp(4, (1,), 3, dropout=0.9)
    variables, x = model.init(key), jnp.ones((8, 4)).at[:, 2].set(jnp.nan)
    assert jnp.isnan(model.train(variables, x, key)[0]).all() and jnp.isnan(model.apply(variables, x, key)).all()


def test_mlp_derivatives_of_every_order_and_mode(key):
    """The product's own rule against jax's, plain and over members; of integers and of further axes too."""
    x, tangent = jax.random.normal(key, (5, 4)), jax.random.normal(jax.random.key(1), (5, 4))
    model = bc.models.mlp(4, (3,), 2)
    variables = jax.vmap(model.init)(jax.random.split(key, 2))

    def plain(params, x):
        hidden = jax.nn.relu(x @ params["dense"][0]["kernel"] + params["dense"][0]["bias"])
        return hidden @ params["head"]["kernel"] + params["head"]["bias"]

    def ours(params, x):
        return model.apply(bc.Variables(params), x, None)

    def derivatives(call, params):
        loss = lambda params, x: jnp.sin(call(params, x)).sum()
        pair, moved = (params, x), (jax.tree.map(jnp.cos, params), tangent)
        along = lambda *pair: jax.jvp(loss, pair, moved)[1]
        return (
            jax.jvp(call, pair, moved),
            jax.linearize(call, *pair)[1](*moved),
            jax.hessian(loss, (0, 1))(*pair),
            jax.jacrev(jax.grad(loss))(*pair),
            jax.grad(lambda *pair: jax.jvp(along, pair, moved)[1], (0, 1))(*pair),
            jax.grad(loss)(params, jnp.arange(8).reshape(2, 4)),
        )

    member = jax.tree.map(lambda p: p[0], variables.params)
    run = lambda call: (jax.jacrev(call, (0, 1))(member, x), jax.vmap(partial(derivatives, call))(variables.params))
    got, expected = jax.jit(lambda: (run(ours), run(plain)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
    features = jax.random.normal(key, (2, 5, 3))
    deep = jax.jacrev(lambda head: model.head(bc.Variables({"head": head}), features))(member["head"])
    expected = jax.jacfwd(lambda head: features @ head["kernel"] + head["bias"])(member["head"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), deep, expected)


def test_a_step_of_mlp_makes_five_products_for_two_layers(key):
    """Two forward, two for the kernels, one for what is hidden; none for the inputs, which nobody differentiates."""
    model = bc.models.mlp(4, (16,), 3)
    params = model.init(key).params
    for rows, transposed in ((256, 2), (257, 1)):  # ahead of the product where batch x features is small
        x = jnp.ones((rows, 4))
        gradient = jax.grad(lambda params, x=x: model.train(bc.Variables(params), x, key)[0].sum())
        text = str(jax.make_jaxpr(gradient)(params))
        assert text.count("dot_general[") == 5 and text.count("optimization_barrier") == transposed


def test_mlp_needs_no_flax():
    """From the network to a prediction, in a process of its own: flax takes longer to import than this to train."""
    code = """
import sys
import jax, numpy as np, optax
import bayescal as bc

x = np.ones((12, 4), np.float32)
model = bc.models.mlp(4, (5,), 3, dropout=0.1, batch_norm=True)
method = bc.ensemble(bc.mc_dropout(model, bc.Categorical, optax.sgd(1e-1), num_draws=2), num_members=2)
fitted = bc.fit(method, bc.Dataset(x, np.arange(12) % 3), jax.random.key(0), epochs=1, batch_size=6, progress=False)
pred = bc.predict(method, fitted.state, x, jax.random.key(1))
print(pred.logits.shape, "flax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == "(4, 12, 3) False"


def test_a_key_for_dropout_after_nothing_is_an_error(key):
    """Dropout follows hidden layers; without one no number is drawn."""
    model = bc.models.mlp(4, (), 3, dropout=0.5)
    for call in (model.apply, model.features):
        with pytest.raises(ValueError, match="`key` was given to a network without a random stream"):
            call(model.init(key), jnp.ones((2, 4)), key)


def test_mlp_keeps_types(key):
    """float32 in float64 mode, as flax's; and moments in the type of the statistics that it is given."""
    with jax.enable_x64(True):
        variables = bc.models.mlp(4, (5,), 3, batch_norm=True).init(jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    model = bc.models.mlp(4, (5,), 3, batch_norm=True)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(key))
    _, stats, _ = model.train(low, jnp.ones((6, 4), jnp.bfloat16), key)
    assert {x.dtype for x in jax.tree.leaves(stats)} == {jnp.dtype("bfloat16")}
