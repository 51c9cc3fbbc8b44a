"""Monte-Carlo dropout: a draw is one network, and what draws share is computed once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayescal as bc

pytestmark = pytest.mark.core
SGD = optax.sgd(0.1)


def net(dropout=0.0):
    return bc.models.mlp(4, (16, 8), 3, dropout=dropout)


def dropped(draws=3):
    return bc.mc_dropout(net(0.5), bc.Categorical, SGD, num_draws=draws)


def rows(number, width=4):
    return np.random.default_rng(0).normal(size=(number, width)).astype(np.float32)


def state_of(method, key):
    return jax.jit(method.init)(key, None)


def test_draws_are_networks_with_a_mask_each(key):
    """Each draw of each row against the network applied to that row alone with the draw's key; other keys, other masks."""
    method, inputs = dropped(4), rows(300)
    state = state_of(method, key)
    logits = bc.predict(method, state, inputs, key).logits
    apply = jax.jit(net(0.5).apply)
    for s, draw_key in enumerate(jax.random.split(key, 4)):
        for row in (0, 64, 299):
            np.testing.assert_allclose(
                logits[s, row], apply(state.variables, inputs[row : row + 1], draw_key)[0], rtol=1e-5, atol=1e-6
            )
    same = bc.predict(method, state, np.ones((300, 4), np.float32), key).logits
    assert np.ptp(same, axis=1).max() == 0, "one mask for all rows, in every block and on every device"
    assert (same[0] != same[1]).any()
    assert (bc.predict(method, state, inputs, jax.random.key(8)).logits != logits).any()


def loops_over(text, shape):
    """Text of the smallest loop of a compiled program, with all that it calls, in which an array of that shape is."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def closure(name, seen):
        if name not in seen:
            seen.add(name)
            for other in re.findall(r"(?:calls|body|condition|to_apply)=%([^\s,)}]+)", bodies[name]):
                closure(other, seen)
        return "".join(bodies[n] for n in seen)

    inside = [closure(name, set()) for name in set(re.findall(r"body=%([^\s,)}]+)", text))]
    return min((t for t in inside if re.search(shape, t)), key=len)


@pytest.mark.parametrize("ensembled", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_what_comes_before_the_first_dropout_is_computed_once(first, ensembled, key):
    """The loop over draws does not even read the inputs, unless they are what is dropped."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(37, 19, rngs=rngs), nnx.Linear(19, 23, rngs=rngs)
            self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(23, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.one(self.dropout(x) if first else x))
            return self.head(self.dropout(nnx.relu(self.two(self.dropout(x)))))

    method = bc.mc_dropout(bc.from_nnx(Net), bc.Categorical, SGD, num_draws=5)
    method = bc.ensemble(method, 2) if ensembled else method
    args = state_of(method, key), rows(48, 37), key
    text = jax.jit(method.predict).lower(*args).compile().as_text()
    draws = loops_over(text, r"\[48,(1,)?23\]")
    assert re.search(r"\[48,(1,)?37\]", text) and bool(re.search(r"\[48,(1,)?37\]", draws)) == first


def test_side_by_side_the_first_layer_has_no_draws(key):
    """On accelerators draws run under vmap: operations grow with them from the first dropout on alone."""
    model = bc.models.mlp(40, (50, 6), 3, dropout=0.5)
    variables, inputs = model.init(key), jnp.ones((64, 40))

    def operations(draws):
        one = lambda k: jax.vmap(lambda row: model.apply(variables, row[None], k)[0])(inputs)
        return jax.jit(jax.vmap(one)).lower(jax.random.split(key, draws)).cost_analysis()["flops"]

    first_layer = 2 * 64 * 40 * 50
    assert first_layer < operations(4) and operations(8) - operations(4) < 4 * first_layer / 2
