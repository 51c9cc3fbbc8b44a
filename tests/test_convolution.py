"""The convolution of CPU loops: `jax.lax.conv_general_dilated` to float64's last digits, in every derivative."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import bayescal as bc
from bayescal.liveness import peak_bytes
from bayescal.models.convolution import convolution

pytestmark = pytest.mark.core
LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def arrays(rng, image, kernel):
    """Images (batch, *sides, channels) and kernel (*size, channels, out) in float64."""
    return (jnp.asarray(rng.normal(size=shape)) for shape in (image, kernel))


def agree(x, k, *settings, dimension_numbers=None):
    """Values, both gradients, a tangent, and a gradient of a gradient along it."""
    rng = np.random.default_rng(0)
    plain, ours = (
        partial(f, window_strides=settings[0], padding=settings[1], lhs_dilation=settings[2], rhs_dilation=settings[3])
        for f in (jax.lax.conv_general_dilated, convolution)
    )
    plain, ours = (partial(f, dimension_numbers=dimension_numbers or LAYOUTS[x.ndim - 2]) for f in (plain, ours))
    y = plain(x, k)
    g = jnp.asarray(rng.normal(size=y.shape))
    dx, dk = (jnp.asarray(rng.normal(size=a.shape)) for a in (x, k))

    def looks(f):
        scalar = lambda x, k: (jnp.sin(f(x, k)) * g).sum()
        gradient = jax.grad(scalar, argnums=(0, 1))
        return f(x, k), gradient(x, k), jax.jvp(f, (x, k), (dx, dk))[1], jax.jvp(gradient, (x, k), (dx, dk))[1]

    for a, b in zip(*(jax.tree.leaves(jax.jit(partial(looks, f))()) for f in (plain, ours)), strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-11)


def test_by_hand(strict):
    x, k = jnp.array([1.0, 2, 3]).reshape(1, 1, 3, 1), jnp.array([1.0, 10]).reshape(1, 2, 1, 1)
    row = lambda *settings: convolution(x, k, *settings, dimension_numbers=LAYOUTS[2]).ravel().tolist()
    assert row((1, 1), "VALID") == [21, 32] and row((1, 1), "SAME") == [21, 32, 3]
    assert row((1, 2), [(0, 0), (1, 0)]) == [10, 32] and row((1, 1), "VALID", None, (1, 2)) == [31]


@pytest.mark.parametrize(
    ("image", "kernel", "settings"),
    [
        ((2, 6, 5, 2), (3, 4, 2, 3), ((1, 1), ((1, -1), (0, 5)), (1, 1), (1, 1))),
        ((2, 6, 7, 9), (3, 3, 9, 2), ((1, 1), ((2, 2), (2, 1)), (1, 1), (1, 1))),
        ((1, 5, 6, 2), (2, 3, 2, 3), ((2, 3), ((1, -1), (3, 4)), (3, 2), (2, 1))),
    ],
)
def test_every_pixel_times_every_weight(image, kernel, settings, rng, strict):
    """Float64 sums in loops: a pixel's place in the padded image, less the weight's, is the stride times the output's."""
    x, k = arrays(rng, image, kernel)
    got = convolution(x, k, *settings, dimension_numbers=LAYOUTS[2])
    expected = np.zeros(got.shape)
    for b, y, z, c in np.ndindex(x.shape):
        for i, j, d in np.ndindex(*kernel[:2], kernel[3]):
            places = [
                divmod(pixel * spread + low - weight * dilation, stride)
                for pixel, weight, stride, (low, _), spread, dilation in zip((y, z), (i, j), *settings, strict=True)
            ]
            if all(rest == 0 and 0 <= n < size for (n, rest), size in zip(places, got.shape[1:3], strict=True)):
                expected[b, places[0][0], places[1][0], d] += float(x[b, y, z, c]) * float(k[i, j, c, d])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


CASES = {
    "image": ((3, 12, 13, 1), (5, 5, 1, 8), (1, 1), "SAME", None, None),
    "few channels": ((3, 9, 10, 6), (5, 5, 6, 16), (1, 1), "VALID", None, None),
    "few out": ((3, 8, 7, 16), (5, 5, 16, 6), (1, 1), [(4, 4), (4, 4)], None, None),
    "many channels": ((4, 6, 6, 24), (3, 3, 24, 40), (1, 1), "SAME", None, None),
    "a batch in pieces": ((64, 16, 16, 20), (3, 3, 20, 20), (1, 1), "SAME", None, None),
    "one column": ((2, 9, 9, 3), (5, 1, 3, 4), (1, 1), "SAME", None, None),
    "even kernel": ((2, 9, 9, 2), (4, 2, 2, 3), (1, 1), "SAME", None, None),
    "pointwise": ((2, 5, 5, 4), (1, 1, 4, 6), (1, 1), "VALID", None, None),
    "strides": ((2, 11, 10, 3), (3, 3, 3, 5), (2, 3), "SAME", None, None),
    "strides that leave pixels over": ((2, 10, 12, 3), (3, 3, 3, 5), (4, 2), "VALID", None, None),
    "dilated kernel": ((2, 12, 11, 3), (3, 3, 3, 5), (1, 1), "SAME", None, (2, 3)),
    "dilated images": ((2, 5, 6, 3), (3, 3, 3, 5), (1, 1), [(1, 2), (0, 1)], (2, 3), None),
    "everything": ((2, 9, 8, 3), (3, 2, 3, 5), (2, 1), [(1, 2), (0, 3)], (1, 2), (2, 1)),
    "wide padding": ((2, 5, 5, 3), (3, 3, 3, 4), (1, 1), [(5, 1), (0, 4)], None, None),
    "negative padding": ((2, 9, 9, 3), (3, 3, 3, 4), (1, 1), [(-1, 2), (1, -2)], None, None),
    "kernel larger than the image": ((2, 3, 4, 2), (5, 7, 2, 3), (1, 1), "SAME", None, None),
    "no output": ((2, 3, 9, 2), (5, 3, 2, 3), (1, 1), "VALID", None, None),
    "no images": ((0, 5, 5, 2), (3, 3, 2, 3), (1, 1), "SAME", None, None),
    "large kernel": ((2, 12, 12, 2), (9, 3, 2, 3), (1, 1), "SAME", None, None),
    "no pixels left": ((2, 3, 3, 2), (5, 5, 2, 3), (1, 1), "VALID", None, None),
    "a line": ((3, 15, 2), (4, 2, 5), (2,), "SAME", None, (2,)),
    "a volume": ((2, 5, 6, 4, 2), (3, 2, 3, 2, 3), (1, 2, 1), "SAME", None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_in_float64(name, rng, strict):
    image, kernel, *settings = CASES[name]
    with jax.enable_x64(True):
        agree(*arrays(rng, image, kernel), *settings)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_settings(data):
    number = lambda low, high: data.draw(st.integers(low, high))
    size = (number(1, 4), number(1, 4))
    strides, dilation, spread = ((number(1, 3), number(1, 3)) for _ in range(3))
    padding = [(number(0, 3), number(0, 3)) for _ in range(2)]
    channels, out = number(1, 5), number(1, 4)
    sides = [max(number(4, 9), (w - 1) * r + 1) for w, r in zip(size, spread)]
    rng = np.random.default_rng(number(0, 9))
    with jax.enable_x64(True):
        agree(*arrays(rng, (2, *sides, channels), (*size, channels, out)), strides, padding, dilation, spread)


def test_other_layouts(rng):
    with jax.enable_x64(True):
        x, k = arrays(rng, (2, 3, 7, 8), (4, 3, 3, 3))
        agree(x, k, (1, 1), "SAME", None, None, dimension_numbers=("NCHW", "OIHW", "NCHW"))
        agree(x, k, (2, 1), "VALID", None, None, dimension_numbers=("NCHW", "OIHW", "NHWC"))


@pytest.mark.parametrize("name", ["image", "few channels", "few out", "strides", "many channels"])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 3)])
def test_vmap_is_a_loop(name, axes, rng):
    image, kernel, strides, padding, *_ = CASES[name]
    one = lambda x, k: convolution(x, k, strides, padding, dimension_numbers=LAYOUTS[2])
    scalar = lambda x, k: jax.value_and_grad(lambda x, k: (one(x, k) ** 2).sum(), argnums=(0, 1))(x, k)
    with jax.enable_x64(True):
        x, k = (
            jnp.asarray(rng.normal(size=shape if axis is None else (*shape[:axis], 3, *shape[axis:])))
            for shape, axis in zip((image, kernel), axes)
        )
        pick = lambda a, axis, i: a if axis is None else jnp.take(a, i, axis)
        batched = jax.jit(jax.vmap(scalar, axes))(x, k)
        for i in range(3):
            alone = scalar(pick(x, axes[0], i), pick(k, axes[1], i))
            for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(alone)):
                np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_of_cotangents(which, rng):
    """As a Jacobian has them."""
    image, kernel, strides, padding, *_ = CASES["many channels"]
    with jax.enable_x64(True):
        x, k = arrays(rng, image, kernel)
        g = jnp.asarray(rng.normal(size=(2, *image[:3], kernel[3])))

        def pull(f):
            one = lambda x, k: f(x, k, strides, padding, dimension_numbers=LAYOUTS[2])
            return jax.jit(jax.vmap(lambda g: jax.vjp(one, x, k)[1](g)[which]))(g)

        np.testing.assert_allclose(pull(convolution), pull(jax.lax.conv_general_dilated), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["image", "few out", "many channels", "a batch in pieces"])
def test_rows_spread_over_devices(name, rng):
    """Inside `shard_map` the kernel, which is the same on each, has the sum of their gradients."""
    image, kernel, strides, padding, *_ = CASES[name]
    x, k = arrays(rng, (2 * image[0], *image[1:]), kernel)
    gradient = lambda k, x: jax.grad(
        lambda k: jnp.sin(convolution(x, k, strides, padding, dimension_numbers=LAYOUTS[2])).sum()
    )(k)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    in_specs = PartitionSpec(), PartitionSpec("data")
    spread = jax.shard_map(gradient, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec())
    np.testing.assert_allclose(jax.jit(spread)(k, x), jax.jit(gradient)(k, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("channels", "own"), [(3, 6), (2, 1), (6, 3), (20, 40)])
def test_channels_that_do_not_fit_are_refused_outside_jit_too(channels, own):
    with pytest.raises((ValueError, TypeError), match="feature"):
        convolution(
            jnp.ones((2, 8, 8, channels)), jnp.ones((3, 3, own, 4)), (1, 1), "SAME", dimension_numbers=LAYOUTS[2]
        )


def test_integers_stay_integers():
    x, k = jnp.full((1, 4, 4, 1), 2**24 + 1, jnp.int32), jnp.ones((2, 2, 1, 1), jnp.int32)
    settings = ((1, 1), "VALID")
    expected = jax.lax.conv_general_dilated(x, k, *settings, dimension_numbers=LAYOUTS[2])
    np.testing.assert_array_equal(convolution(x, k, *settings, dimension_numbers=LAYOUTS[2]), expected)


def test_transposition_and_remat(rng):
    with jax.enable_x64(True):
        x, k = arrays(rng, (2, 7, 7, 3), (3, 3, 3, 4))
        one = lambda x, k: convolution(x, k, (2, 2), "SAME", dimension_numbers=LAYOUTS[2])
        y = one(x, k)
        (back,) = jax.linear_transpose(lambda x: one(x, k), x)(y)
        np.testing.assert_allclose((back * x).sum(), (y * y).sum())
        loss = lambda k: (one(x, k) ** 3).sum()
        np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(k), jax.grad(loss)(k))


@pytest.mark.parametrize("name", ["image", "few out", "a batch in pieces"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types(dtype, name, rng):
    """The operands' own; sums are rounded to it once, as the tolerance of half a unit in the last place says."""
    image, kernel, strides, padding, *_ = CASES[name]
    x, k = (a.astype(dtype) for a in arrays(rng, image, kernel))

    def looks(f, x, k):
        one = lambda k: f(x, k, strides, padding, dimension_numbers=LAYOUTS[2])
        y, pull = jax.vjp(one, k)
        return y, *pull(jnp.ones_like(y))

    wide = looks(jax.lax.conv_general_dilated, *(a.astype(jnp.float32) for a in (x, k)))
    for got, expected in zip(looks(convolution, x, k), wide, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float32), expected, rtol=0.51 * jnp.finfo(dtype).eps + 1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["image", "few channels", "few out", "many channels"])
def test_not_a_number_comes_through(name, rng):
    """Wherever the pixel is seen, and in no other image."""
    image, kernel, strides, padding, *_ = CASES[name]
    x, k = arrays(rng, image, kernel)
    nan = lambda f: jnp.isnan(f(x.at[1, 2, 2, 0].set(jnp.nan), k, strides, padding, dimension_numbers=LAYOUTS[2]))
    got, seen = nan(convolution), nan(jax.lax.conv_general_dilated)
    assert seen.any() and got[seen].all() and not got[0].any()


def test_errors_are_those_of_jax(unchecked):
    x, k = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 4, 2))
    fitting = jnp.ones((3, 3, 3, 2))
    wrong = [
        (x, k, (1, 1), "SAME"),
        (x, fitting, (1,), "VALID"),
        (x, fitting, (1, 1), "SOME"),
        (x, fitting[0], (1, 1), "VALID"),
        (x, fitting, (1, 1), "SAME", (2, 2)),
        (x, fitting.astype(jnp.bfloat16), (1, 1), "SAME"),
    ]
    for args in wrong:
        errors = []
        for f in (jax.lax.conv_general_dilated, convolution):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                f(*args, dimension_numbers=LAYOUTS[2])
            errors.append(error.type)
        assert errors[0] is errors[1], args[2:]


def test_only_canonical_convolutions_in_a_loop(rng):
    """Anything else runs naive code there (jax issue 12868)."""
    x, k = arrays(rng, (6, 4, 8, 8, 20), (3, 3, 20, 40))

    def train(f, k, x):
        loss = lambda k, x: (f(jnp.tanh(f(x, k, (1, 1), "SAME", dimension_numbers=LAYOUTS[2])), k.swapaxes(2, 3), (2, 2),
                              "SAME", dimension_numbers=LAYOUTS[2]) ** 2).sum()  # fmt: skip
        step = lambda k, x: (k - 1e-3 * jax.grad(loss)(k, x), None)
        return jax.lax.scan(step, k, x)[0]

    layouts = lambda f: set(
        re.findall(r"convolution\(.*dim_labels=(\S+?)[,\s]", jax.jit(partial(train, f)).lower(k, x).compile().as_text())
    )
    assert layouts(convolution) == {"b01f_01io->b01f"}
    assert layouts(jax.lax.conv_general_dilated) != {"b01f_01io->b01f"}


def test_off_cpu_and_for_what_is_rare_it_is_jax_own(rng, monkeypatch):
    x, k = arrays(rng, (2, 6, 6, 4), (3, 3, 4, 4))

    def names(x, k, **settings):
        same = lambda x, k: convolution(x, k, (1, 1), "SAME", dimension_numbers=LAYOUTS[2], **settings)
        return {e.primitive.name for e in jax.make_jaxpr(same)(x, k).eqns}

    plain = {"conv_general_dilated"}
    assert names(x, k) == {"convolution"}
    assert names(x, k[:, :, :2], feature_group_count=2) == plain
    assert names(x, k, preferred_element_type=jnp.float32) == plain
    assert names(x.astype(jnp.int32), k.astype(jnp.int32)) == plain
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        assert names(jax.device_put(x, PartitionSpec("data")), k) >= plain
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert names(x, k) == plain


class Nested(nnx.Module):
    def __init__(self, rngs, **settings):
        self.inner = nnx.List([nnx.Conv(2, 3, (3, 3), rngs=rngs, **settings)])
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, inputs):
        return self.head(self.inner[0](inputs).mean((1, 2)))


class Linen(linen.Module):
    own: object = None

    @linen.compact
    def __call__(self, inputs):
        return linen.Dense(2)(linen.Conv(3, (3, 3), conv_general_dilated=self.own)(inputs).mean((1, 2)))


def mine(*args, **settings):
    return 2 * jax.lax.conv_general_dilated(*args, **settings)


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_adapters_swap_the_default_and_leave_a_users_own(library, key, rng):
    inputs = rng.normal(size=(4, 6, 6, 2)).astype(np.float32)
    if library == "nnx":
        plain, own = (bc.from_nnx(lambda rngs, s=s: Nested(rngs, **s)) for s in ({}, {"conv_general_dilated": mine}))
        module = Nested(nnx.Rngs(key))
        variables, expected = bc.Variables(nnx.to_pure_dict(nnx.state(module, nnx.Param))), module(inputs)
    else:
        plain, own = bc.from_linen(Linen(), inputs), bc.from_linen(Linen(own=mine), inputs)
        variables = plain.init(key)
        expected = Linen().apply({"params": variables.params}, inputs)
    text = lambda model: str(jax.make_jaxpr(lambda v: model.train(v, inputs, key)[0])(variables))
    assert "conv_general_dilated" not in text(plain) and "conv_general_dilated" in text(own)
    np.testing.assert_allclose(plain.apply(variables, inputs, None), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.train(variables, inputs, key)[0], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(own.apply(variables, inputs, None), expected, rtol=1e-2)


def test_memory_is_estimated(rng):
    """About as of jax's own."""
    x, k = arrays(rng, (8, 16, 16, 3), (3, 3, 3, 32))
    two = lambda f: lambda x, k: jnp.tanh(f(x, k, (1, 1), "SAME", dimension_numbers=LAYOUTS[2])).sum()
    ours, own = (peak_bytes(jax.grad(two(f), argnums=1), x, k) for f in (convolution, jax.lax.conv_general_dilated))
    assert ours >= 8 * 16 * 16 * 32 * 4 and 0.9 * own <= ours <= 1.1 * own
