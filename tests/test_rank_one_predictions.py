"""Predictions of rank-one networks: their components are explicit networks, taken in turn, for any batch mates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import blobs
from rank_one_nets import components, layer, marked, passes, without_noise

import bayescal as bc
from bayescal.models.rank_one import num_components, rank_one_dense, take_component

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def pair():
    """Two layers of three components without noise, and their explicit networks in float64."""
    model = bc.models.mlp(4, (5,), 3, dense=partial(rank_one_dense, num_components=3))
    params = without_noise(model.init(jax.random.key(3)).params)
    bias = lambda path, x: jax.random.normal(jax.random.key(4), x.shape) if "bias" in str(path) else x
    params = jax.tree.map_with_path(bias, params)
    layers = [jax.tree.map(lambda x: np.asarray(x, float), p) for p in (params["dense"][0], params["head"])]
    weights = []
    for p in layers:
        own, kernel = p["components"], p["kernel"]
        full = np.zeros((3, *kernel.shape))
        for k in range(3):
            for i in range(kernel.shape[0]):
                for o in range(kernel.shape[1]):
                    full[k, i, o] = kernel[i, o] * own["input_mean"][k, i] * own["output_mean"][k, o]
        weights.append((full, own["bias"]))

    def network(inputs, of=lambda x: x):
        (first, b), (second, c) = [(of(w), of(bias)) for w, bias in weights]
        return np.maximum(inputs.astype(float) @ first + b, 0) @ second + c

    return model, bc.Variables(params), network


def test_components_are_explicit_networks(pair):
    model, variables, network = pair
    inputs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    each = np.stack([network(inputs, lambda w, k=k: w[k]) for k in range(3)])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(model.apply(variables, inputs, None), network(inputs, lambda w: w.mean(0)))
    close(passes(model, variables, inputs, jax.random.key(5), 6), np.tile(each, (2, 1, 1)))
    rows = model.train(variables, inputs, jax.random.key(5))[0]
    nearest = np.abs(rows - each).max(-1)
    assert (nearest.min(0) < 1e-4).all() and (np.bincount(nearest.argmin(0), minlength=3) == 2).all()


def test_all_rows_of_a_draw_are_in_one_component(key):
    model, variables = marked()
    apply = jax.jit(jax.vmap(lambda k: model.apply(variables, jnp.zeros((5, 2, 2)), k)))
    drawn = components(apply(jax.random.split(key, 900)))
    assert np.ptp(drawn, axis=1).max() == 0
    share = np.bincount(drawn[:, 0], minlength=3) / 900
    assert (np.abs(share - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 900)).all()


def test_predictions_take_components_in_turn(key):
    model, variables = marked()
    logits = components(passes(model, variables, jnp.zeros((5, 2, 2)), key, 6))
    np.testing.assert_array_equal(logits, np.tile(np.arange(3)[:, None], (2, 5)))
    logits = components(passes(model, variables, jnp.zeros((5, 2, 2)), None, 6))
    np.testing.assert_array_equal(logits, np.tile(np.arange(3)[:, None], (1, 5)))
    with pytest.raises(
        ValueError,
        match=r"`num_draws` must be a multiple of the network's 3 components, got 4, so that .* Use 6\.",
    ):
        passes(model, variables, jnp.zeros((5, 2, 2)), key, 4)


def test_take_component_inside_jit(pair):
    model, variables, network = pair
    inputs = np.ones((2, 4), np.float32)

    @jax.jit
    def one(k):
        taken = take_component(variables.params, k)
        assert num_components(taken) == 1 and num_components(variables.params) == 3
        return model.apply(bc.Variables(taken), inputs, None)

    for k in range(3):
        np.testing.assert_allclose(one(k), network(inputs, lambda w, k=k: w[k]), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(
            take_component(variables.params, k)["head"]["components"]["bias"][0],
            variables.params["head"]["components"]["bias"][k],
        )
    for index in (-1, 3):
        with pytest.raises(ValueError, match=rf"`index` must be a component in \[0, 3\), got {index}\. They are"):
            take_component(variables.params, index)


def test_what_a_user_calls_components_is_not_ours(key):
    params = {"components": {"0": {"kernel": jnp.ones((2, 3))}, "bias": jnp.ones((4, 1))}, "plain": jnp.ones(3)}
    assert num_components(params) == 1 and num_components(()) == 1
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, take_component(params, 0), params))


def test_layers_that_disagree(key):
    one, two = (layer(2, 2, num_components=k).init(key).params for k in (2, 3))
    with pytest.raises(
        ValueError, match=r"`num_components` must be the same in all layers, got \[2, 3\]\. Build every"
    ):
        num_components({"one": one, "two": two})


def test_predictions_do_not_depend_on_batch_mates(key):
    model = bc.models.mlp(4, (5,), 3, dense=partial(rank_one_dense, num_components=2, initial_scale=0.3))
    variables, inputs = model.init(key), np.asarray(blobs().inputs)
    whole = passes(model, variables, inputs, key, 4)
    np.testing.assert_allclose(passes(model, variables, inputs[3:5], key, 4), whole[:, 3:5], rtol=1e-5, atol=1e-6)
    alike = passes(model, variables, np.ones_like(inputs), key, 4)
    assert np.ptp(alike, axis=1).max() == 0 and len(np.unique(alike[:, 0, 0])) == 4
    assert (passes(model, variables, inputs, jax.random.key(8), 4) != whole).any()
