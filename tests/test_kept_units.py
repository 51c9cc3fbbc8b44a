"""Products of the units that a dropout mask keeps: the same networks, for less work."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayescal as bc
from bayescal.models.dropout import scaled_mask
from bayescal.models.kept_units import ROWS, dense_after_dropout, pays, room

pytestmark = pytest.mark.core
WIDTHS = (96, 80, 64)


def net(rate, hidden=WIDTHS, **settings):
    return bc.models.mlp(5, hidden, 4, dropout=rate, **settings)


def method(model, draws=12):
    return bc.mc_dropout(model, bc.Categorical, optax.sgd(0.1), num_draws=draws)


def both(model, draws=12):
    """The method, and that of row by row."""
    assert model.one_network is not None
    return method(model, draws), method(model._replace(one_network=None), draws)


def rows(number=ROWS, width=5):
    return np.random.default_rng(0).normal(size=(number, width)).astype(np.float32)


def state_of(way, key):
    """Of random parameters, where no scale, bias or moment is 0 or 1; without a program that draws them."""
    draw, shapes = np.random.default_rng(1), jax.eval_shape(way.init, key, None)

    def fill(path, leaf):
        if leaf.dtype != np.float32:
            return np.ones(leaf.shape, leaf.dtype)
        kernel = "kernel" in jax.tree_util.keystr(path)
        return np.float32(draw.normal(0, 0.1, leaf.shape) if kernel else draw.uniform(0.1, 0.4, leaf.shape))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def close(actual, wanted):
    """Rounding of float32 sums of about 100 numbers, and of differences of such: 1e-5 of the largest."""
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def kept(key, rate, draws, units):
    """How many units of the first layer each draw keeps."""
    mask = lambda k: scaled_mask(jax.random.fold_in(jax.random.fold_in(k, 1), 0), rate, (1, units), float)
    return np.array([np.count_nonzero(m) for m in jax.vmap(mask)(jax.random.split(key, draws))])


def oracle(columns, masks, layers):
    """Row by row, unit by unit, in float64."""
    outputs = []
    for row in np.asarray(columns).T.tolist():
        for number, (mask, (kernel, bias)) in enumerate(zip(masks, layers, strict=True)):
            dropped = [x * m for x, m in zip(row, mask.tolist(), strict=True)]
            units = zip(np.asarray(kernel).T.tolist(), bias.tolist(), strict=True)
            row = [sum(x * w for x, w in zip(dropped, column, strict=True)) + b for column, b in units]
            row = row if number == len(layers) - 1 else [max(x, 0.0) for x in row]
        outputs.append(row)
    return np.array(outputs)


def test_room_by_hand():
    """200 fair coins: 100 + 2 * 7.07 = 114.1, and 120 in eights; of 200 units kept at 0.9, 188.5 are too many to gain."""
    assert (room(200, 0.5), room(200, 0.1), room(200, 0.9), room(63, 0.1)) == (120, 32, None, None)
    assert pays((200, 200, 10), 0.1) and pays((200, 100), 0.5) and pays((10, 200, 10), 0.5)
    assert not any((pays((10,), 0.5), pays((200, 10), 0.5), pays((10, 200, 10), 0.1), pays((63, 63, 63), 0.5)))


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_masks_around_their_room(rate):
    """Of as many units as there is room for, and of one more, none is forgotten: against loops in float64."""
    draw = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    mask = lambda units, number: jnp.asarray(draw.permutation(units) < number) / (1 - rate)
    layers, columns = [(normal(a, b), normal(b)) for a, b in ((96, 80), (80, 3))], abs(normal(96, 7))
    run = jax.jit(partial(dense_after_dropout, rate=rate))
    for more in (0, 1, 20):
        first = room(96, min(rate, 1 - rate)) + more
        second = min((room(80, 1 - rate) or 70) + more, 80)
        masks = [mask(96, 96 - first if rate < 0.5 else first), mask(80, second)]
        close(run(columns, masks, layers), oracle(columns, masks, layers))


@pytest.mark.parametrize(("rate", "units"), [(0.05, 80), (0.1, 100), (0.2, 80), (0.5, 92), (0.8, 80)])
def test_draws_are_those_of_each_row_alone(rate, units, key):
    """Of 300 masks of these widths some leave, or keep, more units than there is room for: one or two in a hundred."""
    fast, slow = both(net(rate, (units, 64)), 300)
    counts = kept(key, rate, 300, units)
    beyond = (units - counts if rate < 0.5 else counts) > room(units, min(rate, 1 - rate))
    assert 0 < beyond.sum() < 30
    state, x = state_of(fast, key), rows()
    drawn = jax.jit(fast.predict)(state, x, key).logits
    close(drawn, jax.jit(slow.predict)(state, x, key).logits)
    assert np.ptp(drawn, axis=0).min() > 0


def test_draws_are_those_of_flax_layers(key):
    """`dense=nnx.Linear` draws the masks of the same key, with batch norm of fixed moments between."""
    from flax import nnx

    fast = method(net(0.3, batch_norm=True))
    flax = method(net(0.3, batch_norm=True, dense=nnx.Linear))
    state, x = state_of(fast, key), rows()
    close(jax.jit(fast.predict)(state, x, key).logits, jax.jit(flax.predict)(state, x, key).logits)


@pytest.mark.parametrize(("hidden", "rate"), [((96, 20, 70), 0.5), ((30, 96), 0.5), ((64,) * 5, 0.1)])
def test_any_layers(hidden, rate, key):
    """Some of them too narrow to choose from."""
    fast, slow = both(net(rate, hidden))
    state, x = state_of(fast, key), rows()
    close(jax.jit(fast.predict)(state, x, key).logits, jax.jit(slow.predict)(state, x, key).logits)


def put(tree, path, index, value):
    """The tree with one number of a leaf replaced."""

    def at(p, leaf):
        leaf = np.array(leaf)
        if jax.tree_util.keystr(p) == path:
            leaf[index] = value
        return leaf

    changed = jax.tree_util.tree_map_with_path(at, tree)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(tree), strict=True))
    return changed


PLACES = {  # units and weights of each layer, none of the first that are dropped, which fill up the room
    "['dense'][0]['bias']": 90,
    "['dense'][1]['bias']": 75,
    "['dense'][1]['kernel']": (90, 75),
    "['dense'][2]['kernel']": (75, 60),
    "['head']['kernel']": (60, 1),
}


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_is_not_a_number_stays_so(rate, key):
    """In inputs, units and weights, kept or dropped: NaN where row by row gives NaN, infinite where that is."""
    fast, slow = both(net(rate))
    fast, slow, state = jax.jit(fast.predict), jax.jit(slow.predict), state_of(fast, key)

    def compare(state, x):
        ours, theirs = fast(state, x, key).logits, slow(state, x, key).logits
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        return ours

    for value in (np.nan, np.inf, -np.inf):
        x = rows()
        x[3, 2] = value
        assert np.isnan(compare(state, x)[:, 3]).any(1).all() and np.isfinite(compare(state, rows())).all()
        for path, index in PLACES.items():
            params = put(state.variables.params, path, index, value)
            compare(state._replace(variables=state.variables._replace(params=params)), rows())
    # a unit of the second layer overflows in every row, of finite numbers: not a number where it is dropped
    params = put(state.variables.params, "['dense'][1]['kernel']", (slice(None), 75), 3e38)
    assert np.isnan(compare(state._replace(variables=state.variables._replace(params=params)), rows())).any()


def test_a_dropped_unit_that_is_not_a_number_by_hand():
    """Times 0 it is NaN, in all outputs of its row and in no other's; one hidden layer and many outputs."""
    columns, mask = jnp.ones((64, 3)).at[39, 1].set(jnp.nan), jnp.where(jnp.arange(64) < 40, 0.0, 2.0)
    outputs = dense_after_dropout(columns, [mask], [(jnp.ones((64, 70)), jnp.zeros(70))], rate=0.5)
    assert outputs.shape == (3, 70) and np.isnan(outputs[1]).all()
    np.testing.assert_array_equal(outputs[::2], 24 * 2)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_gradients(rate, key):
    """With respect to inputs and parameters."""
    fast, slow = both(net(rate, (64, 64)), 3)
    state, x = state_of(fast, key), rows()

    def gradients(way):
        def loss(params, x):
            given = state._replace(variables=state.variables._replace(params=params))
            return jnp.sin(way.predict(given, x, key).logits).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(state.variables.params, x)

    jax.tree.map(close, gradients(fast), gradients(slow))


def test_keys_side_by_side(key):
    """Under vmap, where both branches run, and without jit, from parameters in NumPy."""
    fast = method(net(0.5, (64, 64)), 3)
    state, keys = state_of(fast, key), jax.random.split(key, 2)
    predict = lambda k: fast.predict(state, rows(), k).logits
    close(jax.jit(jax.vmap(predict))(keys), jnp.stack([predict(k) for k in keys]))


def test_ensembles_blocks_and_devices(key):
    """Two members; rows over two devices and in chunks; the mean network to the bit."""
    fast, slow = both(net(0.2, (64, 64)), 5)
    fast, slow = bc.ensemble(fast, 2), bc.ensemble(slow, 2)
    state, x = state_of(fast, key), rows(700)
    wanted = bc.predict(slow, state, x, key).logits
    assert wanted.shape == (10, 700, 4)
    close(bc.predict(fast, state, x, key, mesh=bc.make_mesh(1, 2), chunk_size=400).logits, wanted)
    close(bc.predict(fast, state, x, key).logits, wanted)
    mean = [bc.predict(way, state, x, None).logits for way in (fast, slow)]
    np.testing.assert_array_equal(*mean)


def test_few_rows_and_a_replaced_apply_go_row_by_row(key):
    """To the bit: nothing is gained with few rows, and another `apply` is another network."""
    model = net(0.5)
    (fast, slow), x = both(model), rows(ROWS - 1)
    state = state_of(fast, key)
    predict = lambda way, x: jax.jit(way.predict)(state, x, key).logits
    np.testing.assert_array_equal(predict(fast, x), predict(slow, x))
    tripled = method(model._replace(apply=lambda v, x, k: 3 * model.apply(v, x, k)))
    close(predict(tripled, rows()), 3 * predict(slow, rows()))


def test_networks_that_have_no_such_way():
    from flax import nnx

    for model in (
        net(0.0),
        net(0.5, (32, 32)),
        net(0.5, ()),
        net(jnp.float32(0.5)),
        net(0.5, dense=nnx.Linear),
    ):
        assert model.one_network is None
    jax.jit(lambda rate: [None, net(rate)][0])(0.5)  # of a traced rate nothing can be known


def reach(text, name, seen):
    """Text of a computation of a compiled program, with all that it calls."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    if name not in seen:
        seen[name] = bodies[name]
        for other in set(re.findall(r"%([^\s,(){}]+)", bodies[name])) & bodies.keys():
            reach(text, other, seen)
    return "".join(seen.values())


@pytest.mark.parametrize("ensembled", [False, True])
def test_what_all_masks_share_is_computed_once(ensembled, key):
    """The loop over draws reads no inputs, and holds one product of few units and one of all, for masks beyond the room.

    A rate of 0.1: of 96 units there is room for 9.6 + 2 * 2.9 = 15.5 dropped ones, 16 in eights.
    """
    model = bc.models.mlp(37, (96, 88), 3, dropout=0.1)
    way = method(model, 6)
    way = bc.ensemble(way, 2) if ensembled else way
    text = jax.jit(way.predict).lower(state_of(way, key), rows(72, 37), key).compile().as_text()
    inside = [reach(text, name, {}) for name in set(re.findall(r"body=%([^\s,)}]+)", text))]
    loop = min((t for t in inside if re.search(r"\[88,72\]", t)), key=len)
    assert re.search(r"\[72,37\]", text) and not re.search(r"\[(72,37|37,72)\]", loop)
    assert re.search(r"\[16,72\]", loop)
    assert len(re.findall(r"= f32\[88,72\]\S* dot\(", loop)) == 2 < len(re.findall(r"= f32\[88,72\]\S* dot\(", text))
