"""Taps: what dense layers and convolutions see, and the gradients of what they put out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bayescal as bc
from bayescal.models.taps import layer_name, patches

pytestmark = pytest.mark.core
ROWS = 5


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(3, (3, 3), strides=(2, 1), kernel_dilation=(1, 2))(x))
        x = nn.Conv(4, (2, 3), padding="VALID", use_bias=False)(x)
        x = nn.Conv(2, (3, 3), padding="CIRCULAR")(x)
        return nn.Dense(3)(Nested()(x.reshape(x.shape[0], -1), train))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(2, 3, (3, 3), rngs=rngs), nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)])
        self.pixelwise = nnx.Linear(4, 5, rngs=rngs)  # a dense layer with many positions
        self.head = nnx.Linear(5 * 9, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(jnp.tanh(self.pixelwise(x)).reshape(x.shape[0], -1))


def models():
    images = jax.random.normal(jax.random.key(1), (ROWS, 6, 6, 2))
    linen = bc.from_linen(LinenConv(), images[:1], train={"train": True}, evaluate={"train": False})
    return {
        "linen": (linen, images),
        "nnx": (bc.from_nnx(lambda rngs: NnxConv(rngs), head="head"), images),
        "mlp": (bc.models.mlp(72, (7, 6), 3, batch_norm=True), images),
        "convnet": (bc.models.convnet((6, 6, 2), (3,), 5, 3, dropout=0.5), images),
    }


def at(params, name):
    for key in name.split("/"):
        params = next(value for k, value in params.items() if str(k) == key)
    return params


@pytest.mark.parametrize("name", list(models()))
def test_every_layer_is_seen_times_kernel_plus_bias(name, key):
    """Outputs are those of `apply`; and (d loss / d output)^T seen is d loss / d kernel, as autodiff has it."""
    model, inputs = models()[name]
    variables = jax.jit(model.init)(key)
    outputs, seen = model.taps(variables, inputs, None)
    np.testing.assert_allclose(outputs, model.apply(variables, inputs, None), rtol=1e-5, atol=1e-6)
    kernels = {n: at(variables.params, n)["kernel"] for n in seen}
    zeros = {n: jnp.zeros((*x.shape[:2], kernels[n].shape[-1])) for n, x in seen.items()}
    loss = lambda outputs: (jnp.sin(outputs) * jnp.arange(1.0, ROWS + 1)[:, None]).sum()
    gradient = jax.grad(lambda z: loss(model.taps(variables, inputs, z)[0]))(zeros)
    expected = jax.grad(lambda params: loss(model.apply(variables._replace(params=params), inputs, None)))(
        variables.params
    )
    assert len(seen) == len([path for path, _ in jax.tree.leaves_with_path(variables.params) if "kernel" in str(path)])
    for n, kernel in kernels.items():
        own = jnp.einsum("bpr,bpc->rc", seen[n], gradient[n]).reshape(kernel.shape)
        np.testing.assert_allclose(own, at(expected, n)["kernel"], rtol=1e-4, atol=1e-5, err_msg=n)
        if "bias" in at(expected, n):
            np.testing.assert_allclose(gradient[n].sum((0, 1)), at(expected, n)["bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "strides", "padding", "dilation"),
    [
        ((7,), (3,), (2,), "SAME", (1,)),
        ((5, 6), (2, 3), (1, 2), "VALID", (2, 1)),
        ((4, 5), (3, 3), (1, 1), ((2, 0), (1, 3)), (1, 1)),
    ],
)
def test_patches_times_kernel_is_the_convolution(shape, size, strides, padding, dilation, rng):
    images = jnp.asarray(rng.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*size, 3, 4)), jnp.float32)
    space = "HW"[: len(shape)]
    expected = jax.lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )
    seen = patches(images, size, strides, padding, dilation)
    np.testing.assert_allclose(seen @ kernel.reshape(-1, 4), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_used_twice_is_an_error(key):
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.layer(nnx.relu(self.layer(x)))

    model = bc.from_nnx(lambda rngs: Twice(rngs))
    with pytest.raises(ValueError, match=r"called once.*second call of 'layer'.*`diagonal`"):
        model.taps(model.init(key), jnp.ones((2, 4)), None)


def test_grouped_convolutions_are_refused(key):
    model = bc.from_linen(nn.Conv(4, (3,), feature_group_count=2), jnp.ones((1, 5, 4)))
    with pytest.raises(ValueError, match=r"one matrix product for each of the 2 rows, got '' with 2 feature groups"):
        model.taps(model.init(key), jnp.ones((2, 5, 4)), None)


def test_names_of_layers():
    assert layer_name(("conv", 0, "inner")) == "conv/0/inner"
