"""DropConnect: masks on weights, each kernel a network of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import pictures

import bayescal as bc

pytestmark = pytest.mark.core


def dense(inputs, outputs, *, rngs, rate=0.3):
    return bc.models.drop_connect(nnx.Linear(inputs, outputs, rngs=rngs), rate=rate, rngs=rngs)


def conv(inputs, outputs, size, *, padding, rngs):
    return bc.models.drop_connect(nnx.Conv(inputs, outputs, size, padding=padding, rngs=rngs), rate=0.3, rngs=rngs)


def test_moments_of_a_linear_network(key):
    """Mean w x + b, variance p / (1 - p) sum w^2 x^2, and outputs independent: each has weights, and so masks, of its own.

    20,000 draws: a variance has a standard error of at most sqrt(2 / 20,000) = 1 %, and so has a correlation.
    """
    model = bc.models.mlp(6, (), 2, dense=dense)
    method = bc.mc_dropout(model, bc.homoscedastic(1.0), optax.sgd(0.1), num_draws=20_000)
    state = method.init(key, None)
    state.variables.params["head"]["layer"]["bias"] = jnp.array([2.0, -1.0])
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    draws = np.asarray(bc.predict(method, state, x, key).mean, float)
    kernel = np.asarray(state.variables.params["head"]["layer"]["kernel"], float)
    variance = 0.3 / 0.7 * (x**2 @ kernel**2)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.05)
    assert (np.abs(draws.mean(0) - (x @ kernel + [2, -1])) < 5 * np.sqrt(variance / 20_000)).all(), "the bias is whole"
    for row in range(3):
        assert abs(np.corrcoef(draws[:, row].T)[0, 1]) < 0.05
    # of one output, rows are correlated: a draw is one network
    wanted = 0.3 / 0.7 * (x[0] * x[1] * kernel[:, 0] ** 2).sum()
    np.testing.assert_allclose(
        np.cov(draws[:, 0, 0], draws[:, 1, 0])[0, 1], wanted, atol=5 * np.sqrt(2 / 20_000) * variance[:2, 0].max()
    )


class Reads(nnx.Module):
    """A layer that puts out its kernel, whatever the inputs."""

    def __init__(self, shape):
        self.kernel = nnx.Param(jnp.ones(shape))

    def __call__(self, inputs):
        return jnp.broadcast_to(self.kernel[...], (inputs.shape[0], *self.kernel.shape))


def test_masks_are_of_the_kernels_shape_and_one_a_call(key):
    """Values 0 and 1 / (1 - p) in shares p and 1 - p, on single weights; the layer's own kernel is left as it was."""
    model = bc.from_nnx(lambda rngs: bc.models.drop_connect(Reads((40, 50)), rate=0.25, rngs=rngs))
    variables, x = model.init(key), jnp.zeros((3, 1))
    for outputs in (model.apply(variables, x, key), model.train(variables, x, key)[0]):
        masks = np.asarray(outputs)
        assert (masks == masks[:1]).all(), "one mask a call, in training too"
        np.testing.assert_allclose(np.unique(masks), [0, 1 / 0.75], rtol=1e-6)
        # 2,000 weights: 5 standard errors of the share; and whole rows or columns are not dropped together
        assert abs((masks[0] == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)
        for axis in (0, 1):
            assert np.ptp((masks[0] == 0).mean(axis)) > 0
    assert (model.apply(variables, x, None) == 1).all()

    module = dense(4, 3, rngs=nnx.Rngs(0))
    kernel, leaf = module.layer.kernel, np.asarray(module.layer.kernel[...])
    first, second = module(jnp.ones((2, 4))), module(jnp.ones((2, 4)))
    assert (first != second).any() and module.layer.kernel is kernel
    np.testing.assert_array_equal(module.layer.kernel[...], leaf)


def test_a_convolution_with_a_masked_kernel(key, monkeypatch):
    """Against flax's own convolution with the kernel that was drawn; on the fast function, which `from_nnx` puts within."""
    import bayescal.models.convolution as module

    called, own = [], module.convolution
    monkeypatch.setattr(module, "convolution", lambda *args, **kwargs: (called.append(1), own(*args, **kwargs))[1])
    layer = lambda rngs: nnx.Conv(1, 5, (3, 3), strides=2, bias_init=nnx.initializers.normal(1.0), rngs=rngs)
    model = bc.from_nnx(lambda rngs: bc.models.drop_connect(layer(rngs), rate=0.4, rngs=rngs))
    variables, x = model.init(key), jnp.asarray(pictures().inputs)
    outputs = model.apply(variables, x, key)
    assert called, "never flax's own function"
    # a single pixel in the middle of the window reads the kernel back
    reads = bc.from_nnx(lambda rngs: bc.models.drop_connect(Reads((3, 3, 1, 5)), rate=0.4, rngs=rngs))
    mask = reads.apply(bc.Variables({"layer": {"kernel": jnp.ones((3, 3, 1, 5))}}, {}), jnp.zeros((1, 1)), key)[0]
    assert 0 < (mask == 0).sum() < mask.size
    plain = layer(nnx.Rngs(0))
    plain.kernel[...] = variables.params["layer"]["kernel"] * mask
    plain.bias[...] = variables.params["layer"]["bias"]
    np.testing.assert_allclose(outputs, plain(x), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_masked_kernel(key):
    """d outputs / d kernel = x mask / (1 - p): what is dropped does not learn; biases do."""
    model, x = bc.models.mlp(4, (), 3, dense=dense), jnp.arange(1.0, 9).reshape(2, 4)
    variables = model.init(key)
    total = lambda params: model.train(variables._replace(params=params), x, key)[0].sum()
    gradient = jax.grad(total)(variables.params)["head"]["layer"]
    ratio = np.asarray(gradient["kernel"] / x.sum(0)[:, None])
    np.testing.assert_allclose(np.unique(ratio.round(5)), [0, round(1 / 0.7, 5)])
    np.testing.assert_allclose(gradient["bias"], 2.0)


def test_a_rate_of_zero_is_the_layer_itself(key):
    """And a network with nothing else to draw is refused a key."""
    model = bc.models.mlp(4, (), 3, dense=lambda a, b, *, rngs: dense(a, b, rngs=rngs, rate=0.0))
    variables, x = model.init(key), jnp.ones((2, 4))
    np.testing.assert_array_equal(model.train(variables, x, key)[0], model.apply(variables, x, None))
    with pytest.raises(ValueError, match="`key` was given to a network without a random stream"):
        model.apply(variables, x, key)


def test_a_traced_rate_gives_what_the_number_gives(key):
    """The same masks; out of range it is NaN rather than another network."""
    x = jnp.ones((2, 4))

    def passes(rate):
        model = bc.models.mlp(4, (5,), 3, dense=lambda a, b, *, rngs: dense(a, b, rngs=rngs, rate=rate))
        variables = model.init(key)
        return variables.stats, *(model.apply(variables, x, k) for k in (key, None)), model.train(variables, x, key)[0]

    stats, drawn, plain, trained = jax.jit(jax.vmap(passes))(jnp.array([0.0, 0.3, 1.0, -0.1]))
    for leaf in jax.tree.leaves(stats):
        np.testing.assert_array_equal(leaf, np.float32([0.0, 0.3, 1.0, -0.1]))
    number = passes(0.3)
    for got, wanted in ((drawn, number[1]), (trained, number[3])):
        np.testing.assert_allclose(got[1], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[0], plain[0], rtol=1e-5, atol=1e-6)
        assert (got[0] != got[1]).any() and jnp.isnan(got[2:]).all()
    with jax.checking_leaks():
        jax.eval_shape(jax.vmap(lambda rate: passes(rate)[1]), jnp.array([0.1, 0.5]))


def test_what_is_not_a_number_comes_through_and_types_stay(key):
    module = dense(4, 2, rngs=nnx.Rngs(0), rate=0.9)
    assert jnp.isnan(module(jnp.full((3, 4), jnp.nan))).all(), "dropped weights too"
    half = bc.models.drop_connect(nnx.Linear(4, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rate=0.5, rngs=nnx.Rngs(0))
    assert half(jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_convolutional_network_of_them(key):
    model, x = bc.models.convnet((4, 4, 1), (2,), 8, 3, dense=dense, conv=conv), pictures().inputs
    variables = model.init(key)
    draws = jax.jit(jax.vmap(lambda k: model.apply(variables, x, k)))(jax.random.split(key, 4))
    assert (draws.std(0) > 0).all()


def test_refuses(unchecked):
    rngs = nnx.Rngs(0)

    class Computed(nnx.Module):
        """Its kernel is not among its variables: a mask would not reach it."""

        def __init__(self):
            self.other = nnx.Param(jnp.ones((4, 2)))

        @property
        def kernel(self):
            return self.other

    for other in (nnx.BatchNorm(4, rngs=rngs), nnx.Embed(4, 2, rngs=rngs), nnx.relu, Computed(), 3):
        sentence = (
            f"`layer` must have an `nnx.Param` named `kernel`, .*, got {type(other).__name__}. Wrap the layers that"
        )
        with pytest.raises(TypeError, match=sentence):
            bc.models.drop_connect(other, rate=0.1, rngs=rngs)
    with pytest.raises(
        TypeError, match=r"`rngs` must be `nnx\.Rngs` or one of its streams, got int. Pass on the `rngs`"
    ):
        bc.models.drop_connect(nnx.Linear(4, 2, rngs=rngs), rate=0.1, rngs=0)
    bc.models.drop_connect(nnx.Linear(4, 2, rngs=rngs), rate=0.1, rngs=rngs["dropout"])(jnp.ones((1, 4)))
    for rate in (None, "a"):
        with pytest.raises(ValueError, match=rf"`rate` must be one rate, got {rate!r}\. In `ensemble` each member"):
            dense(4, 2, rngs=rngs, rate=rate)
    for rate in (1, -0.1, jnp.float32(1), float("nan")):
        with pytest.raises(ValueError, match=r"`rate` must be a rate in \[0, 1\), got .*\. It is the share"):
            dense(4, 2, rngs=rngs, rate=rate)
    with pytest.raises(ValueError, match=r"`rate` must be one rate, got shape \(2,\)\. In `ensemble` each member"):
        dense(4, 2, rngs=rngs, rate=jnp.array([0.1, 0.2]))
