"""How rows go through a trained network: in blocks, over devices, few programs; and what Monte-Carlo dropout shares."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY

import bayescal as bc
from bayescal.memory import CACHE, prediction_block
from bayescal.train import predict_features
from bayescal.train.blocks import Share, Sizes, choose_sizes, join, lay_out, results_of, shares

pytestmark = pytest.mark.core
MODULE = sys.modules["bayescal.train.predict"]  # the package has a function of that name
COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILATIONS.append(name) if "backend_compile" in name else None
)
SGD = optax.sgd(0.1)
CACHE_OF_PROGRAMS = {  # as in conftest
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def net(dropout=0.0):
    return bc.models.mlp(4, (16, 8), 3, dropout=dropout)


def lone(dropout=0.0):
    return bc.map_estimate(net(dropout), bc.Categorical, SGD)


def dropped(draws=3):
    return bc.mc_dropout(net(0.5), bc.Categorical, SGD, num_draws=draws)


METHODS = {
    "lone": lone,
    "two members": lambda: bc.ensemble(lone(), 2),
    "three members": lambda: bc.ensemble(lone(), 3),
    "dropout": dropped,
    "members with dropout": lambda: bc.ensemble(dropped(), 2),
    "experiments": lambda: bc.experiments(bc.ensemble(lone(), 2), 3),
    "regression": lambda: bc.ensemble(bc.map_estimate(bc.models.mlp(4, (16,), 4), bc.heteroscedastic, SGD), 2),
}


def rows(number, width=4):
    return np.random.default_rng(0).normal(size=(number, width)).astype(np.float32)


def state_of(method, key):
    return jax.jit(method.init)(key, None)


@pytest.fixture
def calls(monkeypatch):
    """Sizes, blocks and result of every call of a program."""
    found, call = [], MODULE._call

    def watched(function, results, sizes, state, inputs, key, count):
        result = call(function, results, sizes, state, inputs, key, count)
        found.append((sizes, int(count), result))
        return result

    monkeypatch.setattr(MODULE, "_call", watched)
    return found


def agree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


def devices_of(result):
    return len(jax.tree.leaves(result)[0].devices())


@pytest.mark.parametrize("name", METHODS)
def test_blocks_and_devices_change_nothing(name, key, calls):
    """Rows that fill no block, on one device in blocks and on two, against the method's own predictive of all at once."""
    method, inputs = METHODS[name](), rows(601)
    state = state_of(method, key)
    expected = jax.jit(method.predict)(state, inputs, key)
    agree(bc.predict(method, state, inputs, key, mesh=bc.make_mesh(1)), expected)
    agree(bc.predict(method, state, inputs, key), expected)
    one, two = calls
    assert one[:2] == (Sizes(1024, 64), 10), "ten blocks of 64 hold 601 rows"
    assert [devices_of(one[2]), devices_of(two[2])] == [1, 2]
    if name in ("two members", "members with dropout", "regression"):
        assert two[:2] == one[:2], "members are spread, not rows"
    else:
        assert two[:2] == (Sizes(512, 64), 5), "each device has 301 rows"


def test_against_loops_in_float64(key):
    method, inputs = bc.ensemble(lone(), 2), rows(530)
    state = state_of(method, key)
    logits = bc.predict(method, state, inputs, None).logits
    for member in range(2):
        params = jax.tree.map(lambda x, m=member: np.asarray(x[m], np.float64), state.members.variables.params)
        for row in (0, 1, 63, 64, 255, 256, 511, 512, 529):
            x = inputs[row].astype(np.float64)
            for layer in params["dense"].values():
                x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
            expected = x @ params["head"]["kernel"] + params["head"]["bias"]
            np.testing.assert_allclose(logits[member, row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 9, 100, 300, 512, 1000])
def test_chunks(chunk_size, key, calls):
    """No more rows at a time than asked for, and in the last chunk no more blocks than it needs."""
    method, inputs = dropped(), rows(20 if chunk_size < 10 else 700)
    state, mesh = state_of(method, key), bc.make_mesh(1)
    expected = jax.jit(method.predict)(state, inputs, key)
    agree(bc.predict(method, state, inputs, key, chunk_size=chunk_size, mesh=mesh), expected)
    number = -(-len(inputs) // chunk_size)
    assert len(calls) == number and all(sizes.block <= chunk_size for sizes, *_ in calls)
    last = len(inputs) - (number - 1) * chunk_size
    assert calls[-1][1] == -(-last // calls[-1][0].block)


@pytest.mark.parametrize("chunk_size", [None, 300, 64, 7])
@pytest.mark.parametrize("place", [np.asarray, jax.device_put])
def test_on_an_accelerator_nothing_goes_by_way_of_the_host(chunk_size, place, key, monkeypatch):
    method, inputs = bc.ensemble(lone(), 1), np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    state = jax.jit(method.init)(key, None)
    expected = bc.predict(method, state, inputs, key).logits
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(MODULE, "join", None)
    pred = bc.predict(method, state, place(inputs), key, chunk_size=chunk_size)
    assert isinstance(pred.logits, jax.Array) and pred.logits.shape == (1, 300, 3)
    np.testing.assert_allclose(pred.logits, expected, rtol=1e-5, atol=1e-6)


def test_few_programs(key):
    """A likelihood counts traces and jax counts compilations: one program for all numbers of rows up to a power of two."""
    traces = []

    def likelihood(outputs):
        traces.append(outputs.shape)
        return bc.Categorical(outputs)

    for method in (bc.map_estimate(net(), likelihood, SGD), bc.ensemble(bc.map_estimate(net(), likelihood, SGD), 2)):
        state = state_of(method, key)
        for first, others in (((1024,), (513, 600, 777, 1023)), ((160, 192, 224, 256), (150, 161, 199, 255))):
            for number in first:
                bc.predict(method, state, rows(number), None)
            traced, compiled = len(traces), len(COMPILATIONS)
            for number in others:
                assert bc.predict(method, state, rows(number), None).batch_shape == (number,)
            assert (len(traces), len(COMPILATIONS)) == (traced, compiled)
    bc.predict(method, state, rows(5000), None)
    assert len(COMPILATIONS) > compiled, "another power of two is another program"


def test_first_call_traces_few_times(key):
    traces = []

    def likelihood(outputs):
        traces.append(outputs.shape)
        return bc.Categorical(outputs)

    method = bc.map_estimate(net(), likelihood, SGD)
    bc.predict(method, state_of(method, key), rows(600), None, mesh=bc.make_mesh(1))
    assert sorted(shape[1] for shape in traces) == [64, 64, 128, 8192], "the look at three numbers of rows, and a block"


def test_sizes_by_hand():
    assert choose_sizes(601, 8192, 64, 4096) == Sizes(1024, 64)
    assert choose_sizes(1024, 8192, 64, 4096) == Sizes(1024, 64)
    assert choose_sizes(1025, 8192, 64, 4096) == Sizes(2048, 128)
    assert choose_sizes(5000, 8192, 64, 4096) == Sizes(8192, 512)
    assert choose_sizes(5000, 8192, 64, 128) == Sizes(8192, 128), "no more than the cache holds"
    assert choose_sizes(5000, 8192, 1024, 1024) == Sizes(8192, 1024), "no less than what pays for drawn weights"
    assert choose_sizes(5000, 8192, 2048, 4096) == Sizes(5120, 5120), "too few for such blocks"
    assert choose_sizes(5000, 5000, 64, 4096) == Sizes(5120, 512), "room for no more than may go through"
    assert choose_sizes(9, 8192, 64, 64) == Sizes(10, 10)
    assert choose_sizes(9, 9, 64, 64) == Sizes(9, 9), "where no more may go through"
    seen = set()
    for number in range(1, 8193):
        capacity, block = choose_sizes(number, 8192, 64, 256)
        computed = -(-number // block) * block
        assert capacity % block == 0 and number <= computed <= capacity and computed <= 1.25 * max(number, 4)
        seen.add((capacity, block))
    assert len(seen) <= 4 * 8 + 6


def test_rows_of_shares_by_hand():
    assert shares(10, 3, 2) == [Share(0, 6, 3), Share(6, 4, 2)]
    laid = lay_out(np.arange(10) * 10, Share(6, 4, 2), 2, 4)
    assert laid[[0, 1, 4, 5]].tolist() == [60, 70, 80, 90], "two rows of each device, then what fills its room"
    assert set(laid) <= {60, 70, 80, 90}


def test_joined_from_parts_divided_anyhow():
    """Rows of two devices and two calls, from arrays whose parts are members, rows or halves of a device's rows."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh, value = bc.make_mesh(2), np.arange(2 * 10 * 3).reshape(2, 10, 3)
    results = results_of(lambda state, inputs, key: inputs.transpose(1, 0, 2), (), value.swapaxes(0, 1), None)
    for devices, capacity, each in ((2, 4, 3), (1, 6, 6)):
        for spec in ((), ("member",), (None, "member")):
            calls = []
            for share in shares(10, each, devices):
                laid = lay_out(value.swapaxes(0, 1), share, devices, capacity).swapaxes(0, 1)
                calls.append((share, [jax.device_put(laid, NamedSharding(mesh, PartitionSpec(*spec)))]))
            np.testing.assert_array_equal(join(calls, results, 10, capacity), value)


def test_least_and_most_rows_of_a_block():
    inputs, width = np.zeros((5, 10), np.float32), 1000

    def two_layers(state, inputs, key):
        return jnp.tanh(inputs @ jnp.ones((10, width))) @ jnp.ones((width, 2)) + state

    least, most = prediction_block(two_layers, 0.0, inputs, None)
    assert least == 64 and most <= CACHE / (4 * width) < 4 * most

    def drawn(state, inputs, key):
        return jnp.tanh(inputs @ jax.random.normal(key, (10, width))) @ jax.random.normal(key, (width, width)) + state

    least, most = prediction_block(drawn, 0.0, inputs, jax.random.key(0))
    assert least == most >= width / 2, "each block would draw a thousand rows' worth of weights"
    assert prediction_block(lambda state, inputs, key: inputs.sum(1), (), inputs, None) == (64, 8192)
    wide = lambda state, inputs, key: jnp.sort(jnp.sort(inputs[:, :1] + jnp.zeros(2**22)), descending=True)[:, 0]
    assert prediction_block(wide, (), inputs, None) == (64, 64), "rows larger than the cache"


def test_temporaries_are_those_of_a_block(key):
    """Eight times the rows, the same temporaries: what a program takes beside rows and result does not grow."""
    method = bc.map_estimate(bc.models.lenet((28, 28, 1), 3), bc.Categorical, SGD)
    state = jax.eval_shape(method.init, key, None)
    images = lambda number: jax.ShapeDtypeStruct((number, 28, 28, 1), jnp.float32)
    results = results_of(method.predict, state, images(1), None)

    def temporaries(number):
        args = method.predict, results, Sizes(number, 64), state, images(number), None, np.int32(1)
        return MODULE._call.lower(*args).compile().memory_analysis().temp_size_in_bytes

    whole = jax.jit(method.predict).lower(state, images(1024), None).compile().memory_analysis().temp_size_in_bytes
    assert temporaries(1024) < 1.05 * temporaries(128) < whole / 5


def test_any_result_along_any_axis(key):
    """A method of one's own: weights for each row, a leaf without rows, rows on another axis."""

    def function(state, inputs, key):
        logits = jnp.stack([inputs, 2 * inputs]) * state
        pred = bc.Categorical(logits, jax.nn.softmax(logits[..., 0], axis=0))
        return pred, {"transposed": inputs.T, "scale": state, "none": None}

    inputs = rows(333)
    for mesh in (None, bc.make_mesh(1, 2)):
        found = MODULE.over_rows(function, jnp.float32(3), inputs, None, networks=1, chunk_size=130, mesh=mesh)
        agree(found, function(jnp.float32(3), jnp.asarray(inputs), None))
    assert results_of(function, 1.0, inputs, None).axes == (1, 1, None, 1)


def test_features_in_blocks_on_devices(key, calls):
    state = bc.EnsembleState(jax.vmap(net().init)(jax.random.split(key, 3)), jnp.array([True, False, True]))
    one = predict_features(net(), bc.Categorical, state, rows(601), None, mesh=bc.make_mesh(1))
    two = predict_features(net(), bc.Categorical, state, rows(601), None)
    agree(two, one)
    assert two[1].shape == (3, 601, 8) and devices_of(calls[1][2]) == 2
    np.testing.assert_array_equal(two[0].member_weights, [1, 0, 1])


def test_results_are_free_to_move_and_on_one_device(key):
    method = bc.ensemble(lone(), 2)
    pred = bc.predict(method, state_of(method, key), rows(600), None)
    assert len(pred.logits.devices()) == 1
    other = jax.device_put(jnp.ones(3), jax.devices()[1])
    assert (pred.logits + other).shape == (2, 600, 3)


def test_nan_comes_through(key):
    """A member with a NaN is NaN in every block, the others are not; and rows of the filling leave no trace."""
    method, inputs = bc.ensemble(lone(), 3), rows(601)
    state = state_of(method, key)
    spoilt = jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.members.variables)
    members = state.members._replace(variables=spoilt)
    logits = np.asarray(bc.predict(method, state._replace(members=members), inputs, None).logits)
    assert np.isnan(logits[1]).all() and np.isfinite(logits[[0, 2]]).all()
    inputs[600] = 1e30  # the last row, whose copies would fill up what is left
    huge = np.asarray(bc.predict(method, state, inputs, None).logits)
    np.testing.assert_array_equal(huge[[0, 2], :600], logits[[0, 2], :600])


def collectives(text):
    return re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("name", ["lone", "two members", "three members", "members with dropout"])
def test_no_device_talks_to_another(name, key, monkeypatch):
    method, inputs, texts = METHODS[name](), rows(601), []
    call = MODULE._call

    def watched(*args):
        texts.append(call.lower(*args).compile().as_text())
        return call(*args)

    monkeypatch.setattr(MODULE, "_call", watched)
    bc.predict(method, state_of(method, key), inputs, key)
    (text,) = texts
    assert "num_partitions=2" in text and not collectives(text)


def test_four_devices():
    """Members over two pairs of devices that share the rows; lone draws and members that do not divide: rows over all."""
    code = (
        "import sys, jax, numpy as np, optax, bayescal as bc\n"
        "bc.use_all_cores(4)\n"
        "module, shapes = sys.modules['bayescal.train.predict'], []\n"
        "call = module._call\n"
        "def watched(*args):\n"
        "    text = call.lower(*args).compile().as_text()\n"
        "    assert 'num_partitions=4' in text and not any(w in text for w in ('all-', 'collective-permute')), text\n"
        "    result = call(*args)\n"
        "    shapes.append(tuple(jax.tree.leaves(result)[0].sharding.mesh.shape.values()))\n"
        "    return result\n"
        "module._call = watched\n"
        "net = bc.models.mlp(4, (8,), 3, dropout=0.5)\n"
        "base = bc.mc_dropout(net, bc.Categorical, optax.sgd(0.1), num_draws=2)\n"
        "key, x = jax.random.key(0), np.random.default_rng(0).normal(size=(1031, 4)).astype(np.float32)\n"
        "for method, mesh in ((base, None), (bc.ensemble(base, 2), None), (bc.ensemble(base, 3), bc.make_mesh(4))):\n"
        "    state = jax.jit(method.init)(key, None)\n"
        "    found, expected = bc.predict(method, state, x, key, mesh=mesh), jax.jit(method.predict)(state, x, key)\n"
        "    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)\n"
        "print(shapes)"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | CACHE_OF_PROGRAMS
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[(1, 4), (2, 2), (1, 4)]"


@pytest.mark.parametrize("number", [100, 600])
def test_weak_types_stay_weak(number):
    """A number without a type of its own changes no type, for any number of rows."""
    state = {"w": jnp.ones((4, 3), jnp.bfloat16), "scale": 2.0}
    method = bc.Method(
        lambda *_: state, lambda *_: None, lambda s, x, k: bc.Categorical((x @ s["w"] * s["scale"])[None])
    )
    pred = bc.predict(method, state, rows(number).astype(jnp.bfloat16), None)
    assert pred.logits.dtype == jnp.bfloat16 and pred.logits.shape == (1, number, 3)
