"""Concrete dropout: its penalty is a KL, its masks have a known law, and its rates learn the right way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import blobs, pictures
from scipy.integrate import quad
from scipy.special import expit

import bayescal as bc

pytestmark = pytest.mark.core


def dense(inputs, outputs, *, rngs, **settings):
    return bc.models.concrete_dropout(nnx.Linear(inputs, outputs, rngs=rngs), rngs=rngs, **settings)


def conv(inputs, outputs, size, *, padding, rngs):
    return bc.models.concrete_dropout(nnx.Conv(inputs, outputs, size, padding=padding, rngs=rngs), rngs=rngs)


def linear_net(inputs=6, outputs=1, **settings):
    return bc.models.mlp(inputs, (), outputs, dense=lambda a, b, *, rngs: dense(a, b, rngs=rngs, **settings))


def kl_of_spikes(kernel, rate, precision, width):
    """KL of rate Normal(0, width^2) + (1 - rate) Normal(kernel / (1 - rate), width^2) to Normal(0, 1 / precision)."""
    far = kernel / (1 - rate)
    normal = lambda x, scale: np.exp(-(x**2) / (2 * scale**2)) / np.sqrt(2 * np.pi) / scale

    def integrand(x):
        q = rate * normal(x, width) + (1 - rate) * normal(x - far, width)
        return q * np.log(q / normal(x, precision**-0.5)) if q > 0 else 0.0

    return sum(quad(integrand, at - 12 * width, at + 12 * width, limit=200)[0] for at in (0.0, far))


def test_the_penalty_is_the_kl_but_for_a_constant():
    """One weight: the KL by quadrature; what is left is the KL of the spikes' width, the same for every rate and kernel."""
    width, precision, left = 0.01, 2.5, []
    for rate in (0.05, 0.3, 0.8):
        for kernel in (0.4, -1.5):
            layer = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
            layer.kernel[...] = jnp.full((1, 1), kernel)
            layer = bc.models.concrete_dropout(layer, rate=rate, prior_precision=precision, rngs=nnx.Rngs(0))
            left.append(kl_of_spikes(kernel, rate, precision, width) - layer.penalty())
    constant = -0.5 * np.log(precision * width**2) + 0.5 * precision * width**2 - 0.5
    np.testing.assert_allclose(left, constant, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "no bias", "convolution"])
def test_the_penalty_against_loops(name):
    rngs = nnx.Rngs(3)
    layer = {
        "dense": lambda: nnx.Linear(5, 2, bias_init=nnx.initializers.normal(1.0), rngs=rngs),
        "no bias": lambda: nnx.Linear(5, 2, use_bias=False, rngs=rngs),
        "convolution": lambda: nnx.Conv(3, 4, (2, 3), bias_init=nnx.initializers.normal(1.0), rngs=rngs),
    }[name]()
    wanted, p, precision = 0.0, 0.35, 0.7
    for weight in np.asarray(layer.kernel[...], float).ravel():
        wanted += precision / 2 * weight**2 / (1 - p)
    for weight in [] if name == "no bias" else np.asarray(layer.bias[...], float):
        wanted += precision / 2 * weight**2
    for _ in range(layer.in_features):  # channels of a convolution, whatever the size of its window
        wanted += p * np.log(p) + (1 - p) * np.log(1 - p)
    layer = bc.models.concrete_dropout(layer, rate=p, prior_precision=precision, rngs=rngs)
    np.testing.assert_allclose(layer.rate, p, rtol=1e-6)
    np.testing.assert_allclose(layer.penalty(), wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_penalty_of_half_precision(dtype):
    """90,000 squares of 1, beyond float16, and 300 of a bias; bfloat16 would lose digits of the sum."""
    ones = nnx.initializers.ones
    layer = nnx.Linear(300, 300, param_dtype=dtype, kernel_init=ones, bias_init=ones, rngs=nnx.Rngs(0))
    penalty = bc.models.concrete_dropout(layer, rate=0.5, prior_precision=0.7, rngs=nnx.Rngs(0)).penalty()
    assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(penalty, 0.35 * (90_000 / 0.5 + 300) - 300 * np.log(2), rtol=1e-6)


def test_the_penalty_by_hand():
    """Kernel (1, 1, 1, 1), rate 1/2, precision 1: 4 / (2 * 0.5) - 4 log 2; direction: a larger kernel, a larger penalty."""
    penalty = lambda size: bc.models.concrete_dropout(
        nnx.Linear(4, 1, kernel_init=nnx.initializers.constant(size), rngs=nnx.Rngs(0)), rate=0.5, rngs=nnx.Rngs(0)
    ).penalty()
    np.testing.assert_allclose(penalty(1.0), 4 - 4 * np.log(2), rtol=1e-6)
    assert penalty(0.0) < penalty(1.0) < penalty(2.0)


def moment(rate, temperature, power):
    """E (1 - z)^power by quadrature over the logistic noise."""
    logit = np.log(rate / (1 - rate))

    def integrand(n):
        return expit(n) * expit(-n) * expit(-(logit + n) / temperature) ** power

    return quad(integrand, -40, 40, points=[-logit], limit=500)[0]


@pytest.mark.parametrize(("rate", "temperature"), [(0.3, 1e-3), (0.3, 0.1), (0.7, 2 / 3)])
def test_variance_of_a_linear_network(rate, temperature, key):
    """sum w^2 x^2 times the mask's variance; p / (1 - p) as the temperature goes to 0, 1 - temperature of it before.

    Each of the three sums rests on 20,000 draws: standard error of a variance at most sqrt(2 / 20,000) = 1 %.
    """
    model = linear_net(rate=rate, temperature=temperature)
    method = bc.mc_dropout(model, bc.homoscedastic(1.0), optax.sgd(0.1), num_data=10, num_draws=20_000)
    state = method.init(key, None)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    pred = bc.predict(method, state, x, key)
    kernel = np.asarray(state.variables.params["head"]["layer"]["kernel"])
    mean, square = moment(rate, temperature, 1), moment(rate, temperature, 2)
    wanted = (square - mean**2) / (1 - rate) ** 2
    np.testing.assert_allclose(bc.decompose(pred).epistemic, wanted * (x**2 @ kernel**2), rtol=0.05)
    if temperature < 0.2:
        np.testing.assert_allclose(wanted, rate / (1 - rate) * (1 - temperature), rtol=0.02)
    error = 5 * np.sqrt(wanted * (x**2 @ kernel**2) / 20_000)
    assert (np.abs(pred.mean.mean(0) - mean / (1 - rate) * (x @ kernel)) < error).all()


def test_the_mean_that_the_docstring_names():
    for rate, mean in ((0.1, 0.95), (0.5, 1.0), (0.9, 1.45)):
        assert abs(moment(rate, 2 / 3, 1) / (1 - rate) - mean) < 0.005


class Same(nnx.Module):
    """A layer that gives back its inputs."""

    def __init__(self, features):
        self.kernel, self.in_features = nnx.Param(jnp.ones(features)), features

    def __call__(self, inputs):
        return inputs


@pytest.mark.parametrize("places", [(), (5,), (4, 6)])
def test_masks_of_rows_and_of_channels(places, key):
    """In training a row's own, the same at all its places; at prediction one for all rows; without a key none."""
    x = jnp.ones((7, *places, 8))
    model = bc.from_nnx(lambda rngs: bc.models.concrete_dropout(Same(8), rate=0.4, rngs=rngs))
    variables = model.init(key)
    training, prediction, plain = jax.jit(
        lambda v: (model.train(v, x, key)[0], model.apply(v, x, key), model.apply(v, x, None))
    )(variables)
    training, prediction = (np.asarray(masks).reshape(7, -1, 8) for masks in (training, prediction))
    assert (training == training[:, :1]).all() and len(np.unique(training[:, 0], axis=0)) == 7
    assert training.min() >= 0 and training.max() <= 1 / (1 - 0.4) * (1 + 1e-6)
    assert (prediction == prediction[:1, :1]).all() and np.ptp(prediction[0, 0]) > 0.5
    np.testing.assert_array_equal(plain, x)


@pytest.mark.parametrize("logit", [-80.0, -17.0, 0.0, 17.0, 80.0])
def test_rates_near_zero_and_one_have_finite_masks_and_gradients(logit, strict):
    """Rates of e^-80 and 1 - e^-80, which is 1 in float32: what a rate's logit may become in training."""
    x = jnp.ones((64, 50), jnp.float32)
    module = dense(50, 2, rngs=nnx.Rngs(0))
    module.noise_rows = 64
    graph, state = nnx.split(module)

    def total(logit, x):
        module = nnx.merge(graph, state, copy=True)
        module.rate_logit = nnx.Param(logit)
        return module(x).sum() + module.penalty()

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jnp.float32(logit), x)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    if logit < 0:  # nothing is dropped: the layer itself, and no entropy
        np.testing.assert_allclose(gradients[1], np.broadcast_to(module.layer.kernel[...].sum(1), x.shape), rtol=1e-4)


def test_the_gradient_of_the_rate_against_differences():
    """Of masks and penalty together, in float64; noise and all else are fixed."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
        layer = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        graph, state = nnx.split(bc.models.concrete_dropout(layer, temperature=0.5, rngs=nnx.Rngs(1)))

        @jax.jit
        def total(logit):
            module = nnx.merge(graph, state, copy=True)
            module.rate_logit = nnx.Param(logit)
            return (module(x) ** 2).sum() + module.penalty()

        logit, step = jnp.float64(-0.9), 1e-5
        slope = (total(logit + step) - total(logit - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(total)(logit), slope, rtol=1e-6)


def test_what_is_not_a_number_comes_through_and_types_stay():
    module = dense(4, 2, rngs=nnx.Rngs(0), rate=0.9, temperature=1e-3)
    assert jnp.isnan(module(jnp.full((3, 4), jnp.nan))).all(), "dropped units too"
    half = bc.models.concrete_dropout(nnx.Linear(4, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert half(jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert module(jnp.ones((3, 4), jnp.int32)).dtype == jnp.float32


def test_the_rate_falls_with_data_and_rises_with_noise(key):
    """From 0.1: down where 1000 rows tell the weights, up where 5 rows do not; to 1/2 where inputs tell nothing at all.

    For fixed weights of 1/2 and inputs and noise of variance 1, dropping at rate p costs N p / (8 (1 - p)) nats an input and
    gains H(p): p = e^-125 for 1000 rows, 0.3 for 5. Without a signal the kernel is 0, and H is greatest at 1/2. Here 200
    rows stand for N, each of which weighs N / 200.
    """
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(200, 6)).astype(np.float32), rng.normal(size=(200, 1)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def learnt(stands_for, weight):
        loss = lambda outputs, targets: stands_for / 200 * 0.5 * ((outputs - targets) ** 2).sum(-1)
        method = bc.map_estimate(linear_net(), bc.homoscedastic(1.0), optax.adam(0.05), num_data=200, loss=loss)
        targets = jnp.where(weight > 0, weight * x.sum(1, keepdims=True) + noise, 0)
        batch = bc.Batch(x, targets, jnp.ones(200), jnp.arange(200))
        step = lambda state, k: (method.update(state, batch, k)[0], None)
        state, _ = jax.lax.scan(step, method.init(key, None), jax.random.split(key, 800))
        return jax.nn.sigmoid(state.variables.params["head"]["rate_logit"])

    many, few, without = np.asarray(learnt(jnp.array([1000.0, 5.0, 200.0]), jnp.array([0.5, 0.5, 0.0])))
    assert many < 0.01 and few > 0.2, (many, few)
    np.testing.assert_allclose(without, 0.5, atol=0.03)


@pytest.mark.parametrize("batch", [5, 10, 30])
def test_the_penalty_weighs_the_same_in_every_batch(batch, key):
    """A loss of 0 and gradient descent of rate 1: parameters move by the penalty's gradient / num_data, however many rows."""
    model = linear_net(4, 3)
    method = bc.map_estimate(
        model, bc.Categorical, optax.sgd(1.0), num_data=30, loss=lambda outputs, targets: 0 * outputs.sum(-1)
    )
    state, data = method.init(key, None), blobs()
    rows = bc.Batch(data.inputs[:batch], data.targets[:batch], jnp.ones(batch), jnp.arange(batch))
    new, _ = jax.jit(method.update)(state, rows, key)
    old, new = (state.variables.params["head"] for state in (state, new))
    p = float(jax.nn.sigmoid(old["rate_logit"]))
    np.testing.assert_allclose(new["layer"]["kernel"], (1 - 1 / (1 - p) / 30) * old["layer"]["kernel"], rtol=1e-5)
    # d/dp (|w|^2 / (2 (1 - p)) - 4 H(p)), times dp / dlogit = p (1 - p)
    slope = (old["layer"]["kernel"] ** 2).sum() / (2 * (1 - p) ** 2) + 4 * np.log(p / (1 - p))
    np.testing.assert_allclose(old["rate_logit"] - new["rate_logit"], slope * p * (1 - p) / 30, rtol=1e-4)


def test_a_penalty_needs_the_number_of_rows(key):
    method = bc.mc_dropout(linear_net(4, 3), bc.Categorical, optax.sgd(0.1), num_draws=2)
    with pytest.raises(ValueError, match="`num_data` is required for a model with a penalty"):
        bc.fit(method, blobs(), key, epochs=1, batch_size=10, progress=False)


def test_a_convolutional_network_runs_on_the_fast_convolution(key, monkeypatch):
    """`from_nnx` reaches the convolution within; every rate has a gradient, and a key makes another network."""
    import bayescal.models.convolution as module

    called, own = [], module.convolution
    monkeypatch.setattr(module, "convolution", lambda *args, **kwargs: (called.append(1), own(*args, **kwargs))[1])
    model, x = bc.models.convnet((4, 4, 1), (2,), 8, 3, dense=dense, conv=conv), pictures().inputs

    def total(params):
        outputs, _, penalty = model.train(bc.Variables(params), x, key)
        return (outputs**2).sum() + penalty

    params = model.init(key).params
    gradient = jax.jit(jax.grad(total))(params)
    slopes = [leaf for leaf in jax.tree.leaves(gradient) if leaf.ndim == 0]
    assert called and len(slopes) == 3 and all(np.isfinite(slopes)) and all(slopes)
    plain, one, two = (jax.jit(model.apply)(bc.Variables(params, {}), x, k) for k in (None, key, jax.random.key(8)))
    assert (one != two).any() and (plain != one).any()


def test_settings_may_be_members_own(key):
    """Precision and temperature as arrays, traced: what the numbers give."""

    def passes(own):
        model = linear_net(4, 3, **own)
        return model.train(model.init(key), blobs().inputs, key)

    grid = {"prior_precision": jnp.array([0.5, 20.0]), "temperature": jnp.array([0.1, 0.3])}
    outputs, _, penalty = jax.jit(jax.vmap(passes))(grid)
    for m, own in enumerate(({"prior_precision": 0.5}, {"prior_precision": 20.0, "temperature": 0.3})):
        wanted = passes(own)
        np.testing.assert_allclose(outputs[m], wanted[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(penalty[m], wanted[2], rtol=1e-5)
    assert outputs[0][0, 0] != outputs[1][0, 0] and penalty[0] < penalty[1]


def test_refuses(unchecked):
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(4, 2, rngs=rngs)
    wrap = lambda layer=layer, **settings: bc.models.concrete_dropout(layer, rngs=rngs, **settings)
    for other in (nnx.BatchNorm(4, rngs=rngs), nnx.Embed(4, 2, rngs=rngs), nnx.LinearGeneral(4, 4, rngs=rngs)):
        sentence = (
            f"`layer` must have a `kernel` and a number of `in_features`.*, got {type(other).__name__}. The penalty"
        )
        with pytest.raises(TypeError, match=sentence):
            wrap(other)
    for rate in (0, 1, -0.1, jnp.float32(1), float("nan"), 1 - 1e-9, 1e-50, 1e-40):
        with pytest.raises(
            ValueError, match=r"`rate` must lie between 0 and 1 in float32, got .*\. 0.1 is usual at the start"
        ):
            wrap(rate=rate)
    remedies = {"prior_precision": "It is an inverse variance; 1 is usual", "temperature": "0.1 is usual"}
    for name, remedy in remedies.items():
        for value in (0, float("inf"), 1e50):
            sentence = f"`{name}` must lie between 0 and inf in float32, got {value!r}. {remedy}"
            with pytest.raises(ValueError, match=re.escape(sentence)):
                wrap(**{name: value})
        with pytest.raises(ValueError, match=rf"`{name}` must be one number, got shape \(2,\). In `ensemble` each"):
            wrap(**{name: jnp.ones(2)})
        for value in (None, "a"):
            with pytest.raises(ValueError, match=rf"`{name}` must be one number, got {value!r}. In `ensemble` each"):
                wrap(**{name: value})
    with pytest.raises(
        TypeError, match=r"`rngs` must be `nnx\.Rngs` or one of its streams, got int. Pass on the `rngs`"
    ):
        bc.models.concrete_dropout(layer, rngs=0)
    assert bc.models.concrete_dropout(layer, rngs=rngs["dropout"])(jnp.ones((1, 4))).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rate", [0.0, 0.2, 1.0]),
        ("temperature", [-1.0, 0.2, 0.0]),
        ("temperature", [jnp.nan, 0.2, jnp.inf]),
        ("prior_precision", [0.0, 0.2, -1.0]),
    ],
)
def test_a_traced_setting_out_of_range_gives_nan(name, values, key):
    """And so a member that `fit` reports."""

    def total(value):
        model = linear_net(4, 3, **{name: value})
        outputs, _, penalty = model.train(model.init(key), blobs().inputs, key)
        return outputs.sum() + penalty

    np.testing.assert_array_equal(jnp.isnan(jax.vmap(total)(jnp.array(values))), [True, False, True])


def test_no_trace_outlives_itself(key):
    with jax.checking_leaks():
        init = lambda rate: linear_net(rate=rate, prior_precision=rate, temperature=rate).init(key)
        jax.eval_shape(jax.vmap(init), jnp.array([0.1, 0.5]))
