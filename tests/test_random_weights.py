"""What variational and rank-one layers share: the convolution of `nnx.Conv`, the KL's types, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bayescal as bc
from bayescal.models import flipout, rank_one_conv, rank_one_dense, variational_conv, variational_dense

pytestmark = pytest.mark.core
DENSE = {
    "variational": variational_dense,
    "flipout": partial(variational_dense, estimator=flipout),
    "rank one": rank_one_dense,
    "one component": partial(rank_one_dense, num_components=1),
}
CONV = {"variational": variational_conv, "rank one": rank_one_conv}
WINDOWS = {
    "numbers": ((2, 3), {"strides": 2, "padding": 1}),
    "one axis": (3, {"strides": None, "padding": "CAUSAL"}),
    "an axis each": ((2, 3), {"strides": (2, 1), "padding": (1, 0), "use_bias": False}),
    "before and after": ((3, 1, 3), {"padding": [(1, 1), (0, 0), (2, 0)]}),
    "names": ((2, 3), {"strides": (1, 2), "padding": "VALID"}),
    "around": ((4, 3), {"padding": "CIRCULAR"}),
    "mirrored": ((3, 3), {"padding": "REFLECT", "strides": (2, 2)}),
}


def network(build, *sizes, **settings):
    return bc.from_nnx(lambda rngs: build(*sizes, rngs=rngs, **settings))


def normals(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", [x if x == "names" else pytest.param(x, marks=pytest.mark.slow) for x in WINDOWS])
@pytest.mark.parametrize("kind", CONV)
def test_convolutions_are_those_of_flax(kind, name, key):
    """Of the mean kernel, and of the drawn one, which images of one pixel each read off; in several leading axes too."""
    size, settings = WINDOWS[name]
    window = (size,) if isinstance(size, int) else size
    ours, flax = network(CONV[kind], 2, 3, size, **settings), network(nnx.Conv, 2, 3, size, **settings)
    variables, plain = ours.init(key), flax.init(key)
    reader = network(CONV[kind], 2, 3, size, **{**settings, "padding": "VALID"})
    pixels = np.eye(2 * np.prod(window), dtype=np.float32).reshape(-1, *window, 2)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    kernels = [reader.apply(variables, pixels, k).reshape(*window, 2, 3) for k in (None, key)]
    if kind == "variational":
        close(kernels[0], plain.params["kernel"])
    assert np.std(kernels[1] - kernels[0]) > 1e-3
    for batch in ((2,), (2, 3)):
        x = normals((*batch, *(5 for _ in window), 2))
        for k, kernel in zip((None, key), kernels, strict=True):
            expected = flax.apply(plain._replace(params={**plain.params, "kernel": kernel}), x, None)
            close(ours.apply(variables, x, k), expected)
        assert ours.train(variables, x, key)[0].shape == expected.shape


@pytest.mark.parametrize("kind", DENSE)
def test_rows_are_an_axis(kind, key, unchecked):
    """None of them is a batch too; a lone example without the axis is refused, and so is an image without it."""
    model = network(DENSE[kind], 4, 3)
    variables = model.init(key)
    passes = lambda model, variables, x: (
        lambda: model.apply(variables, x, None),
        lambda: model.apply(variables, x, key),
        lambda: model.train(variables, x, key)[0],
    )
    for shape in ((0,), (0, 5)):
        for call in passes(model, variables, np.zeros((*shape, 4), np.float32)):
            assert call().shape == (*shape, 3)
    wrong = [(model, variables, np.zeros(4, np.float32))]
    if kind in CONV:
        images = network(CONV[kind], 4, 3, (2, 2))
        wrong.append((images, images.init(key), np.zeros((5, 5, 4), np.float32)))
    for model, variables, x in wrong:
        message = rf"`inputs` must have shape \(batch, \.\.\., features\) of at least {x.ndim + 1} axes"
        for call in passes(model, variables, x):
            with pytest.raises(
                ValueError, match=message + r", got .*\)\. For one example add the batch axis: `inputs\[None\]`\."
            ):
                call()


def penalty(model, variables):
    return model.train(variables, np.ones((2, 4), np.float32), jax.random.key(1))[2]


def spoilt(variables, name, value):
    """With one entry of every parameter of that name replaced."""
    change = lambda path, x: x.at[(0,) * x.ndim].set(value) if name in jax.tree_util.keystr(path) else x
    return variables._replace(params=jax.tree.map_with_path(change, variables.params))


@pytest.mark.parametrize("kind", DENSE)
def test_what_is_not_a_number_comes_through_the_kl(kind, key):
    """Eager as under jit, and never an exception; nor for a scale that rounds to zero."""
    model = network(DENSE[kind], 4, 3)
    variables = model.init(key)
    for name, value in (("mean", np.nan), ("log_scale", np.nan), ("mean", np.inf)):
        bad = spoilt(variables, name, value)
        assert not np.isfinite(penalty(model, bad)) and not np.isfinite(jax.jit(partial(penalty, model))(bad))
    assert penalty(model, spoilt(variables, "log_scale", -200.0)) > penalty(model, variables)
    prior = lambda scale: penalty(
        network(DENSE[kind], 4, 3, prior_scale=scale), variables._replace(stats={"prior_scale": scale})
    )
    for scale in (jnp.nan, -1.0):
        assert np.isnan(jax.jit(prior)(scale))


@pytest.mark.parametrize("kind", DENSE)
def test_kl_of_half_precision_is_that_of_its_numbers(kind, key):
    """Summed in float32: exact for the rounded parameters, and finite where a float16 would not be (above 65,504)."""
    model = network(DENSE[kind], 4, 300, prior_scale=0.1)
    variables = model.init(key)
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jax.tree.map(lambda x, t=dtype: x.astype(t), variables.params)
        half = jax.tree.map_with_path(
            lambda path, x: jnp.full_like(x, 4) if "mean" in jax.tree_util.keystr(path) else x, half
        )
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        got, expected = (penalty(model, bc.Variables(params)) for params in (half, wide))
        assert got.dtype == jnp.float32 and got > 65_504 and got == expected
        gradient = jax.grad(lambda params: penalty(model, bc.Variables(params)))(half)
        assert all(g.dtype == dtype for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", DENSE)
def test_bad_scales(kind, unchecked):
    names = ["prior_scale", "initial_scale", *(["component_scale"] if kind == "rank one" else [])]
    for build in (partial(DENSE[kind], 4, 3), *([partial(CONV[kind], 4, 3, (3, 3))] if kind in CONV else [])):
        for name in names:
            for value in (0, -1.0, np.nan, np.inf, np.ones(2), None, "0.1", (1.0,)):
                with pytest.raises(
                    ValueError, match=rf"`{name}` must be one positive number, got .*\. It is a standard"
                ):
                    build(rngs=nnx.Rngs(0), **{name: value})
            for value in (1, np.float32(0.5), np.float64(0.5), jnp.float32(0.5), np.array(0.5)):
                build(rngs=nnx.Rngs(0), **{name: value})


def test_the_docstring_decays_biases_alone(key):
    """Of a network with a plain layer also its kernel: without gradients nothing else moves."""
    import inspect
    import textwrap

    lines = inspect.getdoc(variational_dense).split("\n")
    start = next(i for i, line in enumerate(lines) if "mask = lambda" in line)
    names = {"jax": jax, "optax": optax}
    exec(textwrap.dedent("\n".join(lines[start : start + 4])), names)
    params = {
        "own": network(variational_dense, 4, 3).init(key).params,
        "plain": network(nnx.Linear, 4, 3).init(key).params,
    }
    params = jax.tree.map(lambda x: x + 1, params)
    still = jax.tree.map(jnp.zeros_like, params)
    change, _ = names["optimizer"].update(still, names["optimizer"].init(params), params)
    moved = jax.tree.map(lambda x: bool((x != 0).all()), change)
    assert moved == {"own": {"mean": False, "log_scale": False, "bias": True}, "plain": {"kernel": True, "bias": True}}
