"""Rank-one layers in training: closed forms of their noise and KL, components shared out among rows, and what they refuse."""

import inspect
import shutil
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from methods import pictures
from rank_one_nets import components, layer, marked, parts_of, passes, without_noise

import bayescal as bc
from bayescal.models.rank_one import rank_one_conv, rank_one_dense

pytestmark = pytest.mark.core


def test_one_component_by_hand():
    """(1, 2) * (2, 0.5) = (2, 1); times [[1, 2], [3, 4]] = (5, 8); * (10, 1) + (1, -1) = (51, 7)."""
    model = layer(2, 2, num_components=1)
    params = without_noise(model.init(jax.random.key(0)).params)
    own = {"input_mean": [[2.0, 0.5]], "output_mean": [[10.0, 1.0]], "bias": [[1.0, -1.0]]}
    params = {
        "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "components": {**params["components"], **jax.tree.map(jnp.array, own, is_leaf=lambda x: isinstance(x, list))},
    }
    inputs = jnp.array([[1.0, 2.0]])
    three = lambda v, k: (model.apply(v, inputs, None), model.apply(v, inputs, k), model.train(v, inputs, k)[0])
    for outputs in jax.jit(three)(bc.Variables(params), jax.random.key(1)):
        np.testing.assert_array_equal(outputs, [[51, 7]])


def test_convolution_is_that_of_explicit_kernels(rng):
    """One component, one key: the draws of r and s read off, then a loop over pixels."""
    build = lambda rngs: rank_one_conv(2, 3, (2, 2), strides=2, padding="VALID", num_components=2, rngs=rngs)
    model = bc.from_nnx(build)
    variables = bc.Variables(without_noise(model.init(jax.random.key(0)).params))
    images = rng.normal(size=(5, 4, 4, 2)).astype(np.float32)
    kernel, (r, _), (s, _), bias = parts_of(variables)

    def loop(k):
        full = np.mean([kernel * r[j][:, None] * s[j] for j in k], axis=0)
        out = np.zeros((5, 2, 2, 3))
        for n, i, j, o in np.ndindex(out.shape):
            out[n, i, j, o] = (images[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] * full[..., o]).sum()
        return out + bias[k].mean(0)

    np.testing.assert_allclose(model.apply(variables, images, None), loop([0, 1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(passes(model, variables, images, None, 2), [loop([0]), loop([1])], rtol=1e-4, atol=1e-5)
    rows = model.train(variables, images, jax.random.key(1))[0]
    assert (np.abs(rows - np.stack([loop([0]), loop([1])])).max((2, 3, 4)).min(0) < 1e-4).all()


def moments(variables, x):
    """Mean (out,) and second moments (out, out) of one row's outputs, over q = mean_k q_k, exact."""
    kernel, (r, dr), (s, ds), bias = parts_of(variables)
    first, second = 0, 0
    for k in range(len(r)):
        u = (x * r[k]) @ kernel
        uu = np.outer(u, u) + kernel.T @ np.diag((x * dr[k]) ** 2) @ kernel
        ss = np.outer(s[k], s[k]) + np.diag(ds[k] ** 2)
        mean = u * s[k]
        first = first + (mean + bias[k]) / len(r)
        shifted = uu * ss + np.outer(mean, bias[k]) + np.outer(bias[k], mean) + np.outer(bias[k], bias[k])
        second = second + shifted / len(r)
    return first, second


@pytest.mark.parametrize("way", ["draws", "rows"])
def test_noise_against_closed_form(way):
    """Products of independent normals: mean and all second moments within 4.5 standard errors, for draws and for rows."""
    model, number = layer(3, 2, num_components=3, initial_scale=0.4), 12_000
    variables = model.init(jax.random.key(0))
    variables.params["components"]["bias"] = jnp.arange(6.0).reshape(3, 2) / 4
    x = np.array([0.5, -1.0, 2.0], np.float32)
    if way == "draws":
        one = jax.jit(jax.vmap(lambda k: model.apply(variables, x[None], k)[0]))
        outputs = one(jax.random.split(jax.random.key(1), number))
    else:
        outputs = jax.jit(model.train)(variables, np.tile(x, (number, 1)), jax.random.key(1))[0]
    outputs = np.asarray(outputs, float)
    mean, second = moments(variables, x)
    squares = outputs[:, :, None] * outputs[:, None, :]
    for got, wanted in ((outputs, mean), (squares, second)):
        error = got.std(0) / np.sqrt(number)
        assert (np.abs(got.mean(0) - wanted) < 4.5 * error).all(), (got.mean(0), wanted, error)
    centred = outputs - outputs.mean(0)
    lag = (centred[1:] * centred[:-1]).mean(0) / centred.var(0)
    assert (np.abs(lag) < 4.5 / np.sqrt(number)).all(), "rows, and draws, have noise of their own"


def test_pixels_of_an_image_share_their_vectors(key):
    model = bc.from_nnx(lambda rngs: rank_one_conv(1, 1, (1, 1), num_components=2, initial_scale=0.5, rngs=rngs))
    outputs = model.train(model.init(key), np.ones((8, 3, 3, 1), np.float32), key)[0][..., 0].reshape(8, 9)
    assert np.ptp(outputs, axis=1).max() == 0 and len(np.unique(outputs[:, 0])) == 8


def test_penalty_is_the_mean_of_the_components(key):
    """KL[normal(m, s) || normal(1, p)] = log(p / s) + (s^2 + (m - 1)^2) / (2 p^2) - 1/2, by loops; and NumPyro's."""
    model = bc.models.mlp(4, (5,), 3, dense=partial(rank_one_dense, num_components=3, prior_scale=0.2))
    variables = model.init(key)
    penalty = model.train(variables, np.ones((2, 4), np.float32), key)[2]
    total, numpyro = 0.0, 0.0
    for own in (variables.params["dense"][0]["components"], variables.params["head"]["components"]):
        for side in ("input", "output"):
            means, scales = np.asarray(own[f"{side}_mean"], float), np.exp(np.asarray(own[f"{side}_log_scale"], float))
            for m, s in zip(means.ravel(), scales.ravel(), strict=True):
                total += (np.log(0.2 / s) + (s**2 + (m - 1) ** 2) / (2 * 0.2**2) - 0.5) / 3
            q = dist.Normal(own[f"{side}_mean"], jnp.exp(own[f"{side}_log_scale"]))
            numpyro += dist.kl_divergence(q, dist.Normal(1.0, 0.2)).sum() / 3
    np.testing.assert_allclose(penalty, total, rtol=1e-5)
    np.testing.assert_allclose(penalty, numpyro, rtol=1e-6)


def test_penalty_bounds_the_mixture(key):
    """Convexity: KL[mixture || prior] <= penalty <= KL[mixture || prior] + log K, by Monte-Carlo in two dimensions."""
    model = layer(1, 1, num_components=3, component_scale=0.1, initial_scale=0.05)
    variables = model.init(key)
    penalty = float(model.train(variables, np.ones((1, 1), np.float32), key)[2])
    _, r, s, _ = parts_of(variables)
    rng, mixture = np.random.default_rng(0), []
    means, scales = (np.concatenate([r[i], s[i]], 1) for i in (0, 1))  # (component, 2)
    log_normal = lambda x, m, s: (-0.5 * ((x - m) / s) ** 2 - np.log(s)).sum(-1)
    for k in range(3):
        x = means[k] + scales[k] * rng.normal(size=(20_000, 2))
        log_q = np.logaddexp.reduce([log_normal(x, means[j], scales[j]) for j in range(3)]) - np.log(3)
        mixture.append(log_q - log_normal(x, 1.0, 0.1))
    kl, error = np.mean(mixture), np.std(mixture) / np.sqrt(60_000)
    assert kl < penalty + 4 * error and penalty < kl + np.log(3) + 4 * error
    assert penalty - kl > 20 * error, "these components do differ"


def test_rows_are_shared_out_evenly_and_every_layer_agrees():
    """Each component has 2 or 3 of 7 rows; over 900 members under vmap each as many as the others, within 4.5 errors."""
    model, variables = marked()
    members = jax.tree.map(lambda x: jnp.broadcast_to(x, (900, *x.shape)), variables)
    train = jax.jit(jax.vmap(lambda v, k: model.train(v, jnp.zeros((7, 2, 2)), k)[0]))
    drawn = components(train(members, jax.random.split(jax.random.key(2), 900)))
    counts = np.stack([(drawn == k).sum(1) for k in range(3)])
    assert counts.min() == 2 and counts.max() == 3
    # a count is 3 with probability 1/3
    assert (np.abs(counts.mean(1) - 7 / 3) < 4.5 * np.sqrt(2 / 9 / 900)).all()
    first = np.bincount(drawn[:, 0], minlength=3) / 900
    assert (np.abs(first - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 900)).all(), "and any row may be in any"
    assert len(np.unique(drawn, axis=0)) > 300, "members share out rows of their own: of 630 ways"


def test_layers_share_the_shuffle_of_rows(key):
    """The compiled pass sorts once for all layers, whose order of rows is one."""

    def sorts(hidden):
        model = bc.models.mlp(4, hidden, 3, dense=partial(rank_one_dense, num_components=2))
        args = model.init(key), jnp.ones((8, 4)), key
        return jax.jit(lambda *a: model.train(*a)[0]).lower(*args).compile().as_text().count(" sort(")

    assert sorts((5,)) == sorts(()) >= 1


def test_gradient_is_unbiased(key):
    """Mean over keys of the training gradient of 0.5 (y - t)^2 against that of its closed-form expectation.

    Three rows and two components, so that one of them has the odd row. Within 4.5 standard errors for each of 21 numbers.
    """
    model = layer(3, 1, num_components=2, initial_scale=0.3)
    params, number = model.init(key).params, 40_000
    rng = np.random.default_rng(1)
    inputs, targets = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32), jnp.asarray(rng.normal(size=3), jnp.float32)

    def sampled(params, key):
        outputs, _, _ = model.train(bc.Variables(params), inputs, key)
        return 0.5 * ((outputs[:, 0] - targets) ** 2).mean()

    def expected(params):
        own, kernel, total = params["components"], params["kernel"][:, 0], 0.0
        for k in range(2):
            r, s = own["input_mean"][k], own["output_mean"][k, 0]
            dr, ds = (jnp.exp(own[f"{side}_log_scale"][k]) for side in ("input", "output"))
            for x, t in zip(inputs, targets, strict=True):
                u, spread = (x * r * kernel).sum(), ((x * dr * kernel) ** 2).sum()
                mean = u * s + own["bias"][k, 0]
                variance = (u**2 + spread) * (s**2 + ds[0] ** 2) - (u * s) ** 2
                total = total + 0.5 * (variance + (mean - t) ** 2) / 6
        return total

    gradients = jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(params, jax.random.split(jax.random.key(6), number))
    wanted, count = jax.grad(expected)(params), 0
    for got, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        got = np.asarray(got, float)
        error = got.std(0) / np.sqrt(number)
        assert (np.abs(got.mean(0) - exact) < 4.5 * error).all(), (got.mean(0), exact, error)
        assert (error < 0.05 * np.abs(exact).max() + 0.01).all(), "small enough to see a wrong factor"
        count += exact.size
    assert count == 21


@pytest.mark.slow
def test_a_convnet_trains_and_once_cut_off_goes_on_to_the_same_bits(key, tmp_path):
    of = lambda build: partial(build, num_components=2)
    model = bc.models.convnet((4, 4, 1), (3,), 6, 3, dense=of(rank_one_dense), conv=of(rank_one_conv))
    method = bc.bayes_by_backprop(model, bc.Categorical, optax.adam(2e-2), num_data=30, num_draws=4)
    settings = dict(epochs=30, batch_size=15, progress=False, checkpoint=bc.Checkpoint(tmp_path, every=10))
    fitted = bc.fit(method, pictures(), key, **settings)
    loss = fitted.history["loss"][:, 0]
    assert np.isfinite(loss).all() and loss[-3:].mean() < 0.7 * loss[:3].mean()
    shutil.rmtree(tmp_path / "steps" / "30")
    again = bc.fit(method, pictures(), key, **settings)
    assert again.seconds["epochs"] == 10
    jax.tree.map(np.testing.assert_array_equal, again.state, fitted.state)


def test_members_have_priors_of_their_own(key):
    """A traced prior scale: the KL of member m is that of a network built with its number."""

    def penalty(scale):
        model = layer(4, 3, num_components=2, prior_scale=scale)
        return model.train(model.init(key), jnp.ones((2, 4)), key)[2]

    lone = jax.jit(lambda: [penalty(0.1), penalty(0.5)])()
    np.testing.assert_allclose(jax.jit(jax.vmap(penalty))(jnp.array([0.1, 0.5])), lone, rtol=1e-5)
    assert lone[0] > 2 * lone[1]


def test_the_docstring_decays_kernels_alone(key):
    """Without gradients weight decay moves the kernel and nothing under "components"; with them, at half the rate."""
    lines = inspect.getdoc(rank_one_dense).split("\n")
    start = next(i for i, line in enumerate(lines) if "parts = lambda" in line)
    code = textwrap.dedent("\n".join(lines[start : start + 4]))
    names = {"jax": jax, "optax": optax}
    exec(code, names)
    params = layer(3, 2).init(key).params
    for gradient, moved in ((0.0, 0.0), (1.0, 5e-4)):
        change, _ = names["optimizer"].update(
            jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params), names["optimizer"].init(params), params
        )
        assert (change["kernel"] != 0).any()
        for x in jax.tree.leaves(change["components"]):
            np.testing.assert_allclose(x, -moved, rtol=1e-4)


def test_nan_and_whole_numbers(key):
    model = layer(3, 2, num_components=2)
    variables = model.init(key)
    inputs = jnp.ones((4, 3)).at[1, 0].set(jnp.nan)
    for outputs in (model.apply(variables, inputs, None), model.train(variables, inputs, key)[0]):
        assert (np.isnan(outputs).all(1) == [False, True, False, False]).all()
    whole = np.arange(12, dtype=np.uint8).reshape(4, 3)
    for k in (None, key):
        np.testing.assert_array_equal(
            model.apply(variables, whole, k), model.apply(variables, whole.astype(np.float32), k)
        )


def test_start_and_no_bias(key):
    own = layer(200, 300).init(key).params["components"]
    for side, size in (("input", 200), ("output", 300)):
        means = np.asarray(own[f"{side}_mean"])
        assert means.shape == (4, size)
        # 1 and 0.5, within 4.5 standard errors of a normal's mean and standard deviation
        assert abs(means.mean() - 1) < 4.5 * 0.5 / np.sqrt(means.size)
        assert abs(means.std() - 0.5) < 4.5 * 0.5 / np.sqrt(2 * means.size)
        np.testing.assert_allclose(np.exp(own[f"{side}_log_scale"]), 0.03, rtol=1e-5)
    bare = layer(3, 2, use_bias=False)
    variables = bare.init(key)
    assert "bias" not in variables.params["components"]
    for k in (None, key):
        np.testing.assert_array_equal(bare.apply(variables, np.zeros((1, 3), np.float32), k), 0)


def test_rows_that_layers_would_share_out_anew(key):
    """A layer on (batch * places, features), where a row's places would be in several components; a draw knows no rows."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = (rank_one_dense(1, 1, num_components=2, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return self.two(self.one(x).reshape(-1, 1)).reshape(x.shape)

    model, inputs = bc.from_nnx(Net), np.ones((4, 3, 1), np.float32)
    variables = model.init(key)
    assert model.apply(variables, inputs, key).shape == model.apply(variables, inputs, None).shape == (4, 3, 1)
    assert model.train(variables, inputs[:, :1], key)[0].shape == (4, 1, 1)
    message = r"`inputs` of every rank-one layer must have the 4 rows .*, got shape \(12, 1\), .*Keep the batch as the leading"
    with pytest.raises(ValueError, match=message):
        model.train(variables, inputs, key)


@pytest.mark.parametrize("build", [rank_one_dense, partial(rank_one_conv, kernel_size=(3, 3))])
def test_errors(build, unchecked):
    from flax import nnx

    make = lambda **settings: build(2, 3, rngs=nnx.Rngs(0), **settings)
    for number in (0, 1.5, True):
        with pytest.raises(
            ValueError, match=rf"`num_components` must be a whole number of at least 1, got {number}\. 4 is"
        ):
            make(num_components=number)
    with pytest.raises(
        ValueError, match=r"`component_scale` must be one positive number, got 0\. .* entries of r and s"
    ):
        make(component_scale=0)
    make(num_components=1, component_scale=0.0)
    with pytest.raises(ValueError, match=r"`prior_scale` must be one positive"):
        make(num_components=1, prior_scale=0.0)
