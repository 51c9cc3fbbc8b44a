"""Networks of rank-one layers whose components can be read off."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import bayescal as bc
from bayescal.methods.draws import predict_passes
from bayescal.methods.map_estimate import MAPState
from bayescal.models.rank_one import rank_one_dense


def layer(*sizes, **settings):
    return bc.from_nnx(lambda rngs: rank_one_dense(*sizes, rngs=rngs, **settings))


def without_noise(params):
    """exp(-80) = 2e-35: nothing beside 1, and still the scale of a normal."""
    still = lambda path, x: jnp.full_like(x, -80) if "log_scale" in jax.tree_util.keystr(path) else x
    return jax.tree.map_with_path(still, params)


def parts_of(variables):
    """(kernel, means and scales of r, of s, biases) of a one-layer network, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, float), variables.params)
    own = params["components"]
    sides = [(own[f"{side}_mean"], np.exp(own[f"{side}_log_scale"])) for side in ("input", "output")]
    return params["kernel"], *sides, own["bias"]


@partial(jax.jit, static_argnums=(0, 4))
def passes(model, variables, inputs, key, draws):
    state = MAPState(variables, (), jnp.zeros(()))
    return predict_passes(state, inputs, key, model=model, likelihood=bc.Categorical, num_draws=draws).logits


def marked():
    """Three layers, one of them called twice, whose outputs tell their component alone: k * (1, 10, 100 and 100)."""
    from flax import nnx

    class Marked(nnx.Module):
        def __init__(self, rngs):
            dense = partial(rank_one_dense, num_components=3, rngs=rngs)
            self.places, self.one, self.two = dense(2, 1), dense(4, 1), dense(4, 1)

        def __call__(self, x):
            flat = x.reshape(-1, 4)
            first = self.places(x)[:, 1]  # of several places
            return jnp.concatenate([first, self.one(flat), self.two(flat), self.two(flat)], axis=1)

    model = bc.from_nnx(Marked)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)).params)
    for name, mark in (("places", 1.0), ("one", 10.0), ("two", 100.0)):
        params[name]["components"]["bias"] = mark * jnp.arange(3.0)[:, None]
    return model, bc.Variables(params)


def components(outputs):
    """The component of every row, which all four calls must agree on."""
    outputs = np.asarray(outputs)
    np.testing.assert_array_equal(outputs, outputs[..., :1] * np.array([1, 10, 100, 100]))
    return outputs[..., 0].astype(int)
