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
    "linen": linen_model,
}


def inputs_for(name):
    x = jax.random.normal(jax.random.key(3), (6, 4))
    return x.reshape(6, 2, 2, 1) if "convolutions" in name else x


@pytest.mark.parametrize("name", ADAPTED)
def test_a_key_makes_it_stochastic(name, key):
    model, x = ADAPTED[name](), inputs_for(name)
    variables = jax.jit(model.init)(key)
    draws = jax.jit(jax.vmap(lambda k: model.apply(variables, x, k)))(jax.random.split(key, 6))
    assert draws.std(0).min(initial=np.inf, where=np.abs(draws).max(0) > 0) > 1e-3, "flax's silent trap: no variance"
    fixed = jax.jit(lambda v: model.apply(v, x, None))
    np.testing.assert_array_equal(fixed(variables), fixed(variables))


@pytest.mark.parametrize("name", [n for n in ADAPTED if n != "nnx"])
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
