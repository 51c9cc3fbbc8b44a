"""`models.mlp`: the network that flax's layers make, without flax."""

import itertools
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bayescal as bc

pytestmark = pytest.mark.core


def mlp(**settings):
    return bc.models.mlp(4, (16, 16), 3, **settings)


def rows():
    return jax.random.normal(jax.random.key(3), (6, 4))


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


@pytest.mark.parametrize("batch_norm", [False, True])
def test_layers_of_flax_in_mlp_are_its_own(batch_norm, key):
    """`dense=nnx.Linear`: initial values, masks and structure to the bit; outputs and moments but for rounding."""
    settings = {"dropout": 0.4, "batch_norm": batch_norm}
    plain, layered = (bc.models.mlp(4, (7, 5), 3, **settings, **more) for more in ({}, {"dense": nnx.Linear}))
    variables, x = jax.jit(plain.init)(key), rows()
    jax.tree.map(np.testing.assert_array_equal, jax.jit(layered.init)(key), variables)

    def passes(model):
        hidden = model.features(variables, x, key)
        return model.train(variables, x, key), model.apply(variables, x, key), model.apply(variables, x, None), hidden

    ours, flax = (jax.jit(partial(passes, model))() for model in (plain, layered))
    np.testing.assert_array_equal(ours[-1] == 0, flax[-1] == 0)
    assert 0 < (ours[-1] == 0).mean() < 1 and layered.head_path == plain.head_path
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), ours, flax)


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
    model, x = mlp(batch_norm=True), rows()
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
    x = rows()

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
