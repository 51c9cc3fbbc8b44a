import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from methods import blobs, pure_model

import bayescal as bc
from bayescal import memory
from bayescal.memory import (
    Memory,
    device_budget,
    member_chunk,
    peak_bytes,
    prediction_chunk,
    training_memory,
    tree_bytes,
)

pytestmark = pytest.mark.core

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
UNIT = 8 * 8 * 4  # its bytes
COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILATIONS.append(name) if "backend_compile" in name else None
)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def squares(function, count=2):
    """Peak of a function of 8 x 8 matrices, in matrices."""
    return peak_bytes(function, *[SQUARE] * count) / UNIT


def test_bytes_of_a_tree_as_a_device_holds_it():
    keys = jax.random.split(jax.random.key(0), 3)
    assert tree_bytes({"a": floats(2, 3), "b": np.zeros(5, np.int8), "c": (), "d": None}) == 24 + 5
    assert tree_bytes(np.zeros(2)) == 8, "float64 becomes float32"
    assert tree_bytes(keys) == tree_bytes(jax.eval_shape(lambda: keys)) == tree_bytes(jax.random.key_data(keys)) == 24


def test_values_are_held_to_their_last_use():
    assert squares(lambda a, b: a @ b) == 0, "results are not counted"
    assert squares(lambda a, b: a @ b @ a) == 1
    assert squares(lambda a, b: a @ b @ a @ b @ a) == 2, "one read, one written"
    assert squares(lambda a, b: ((x := a @ b) @ a @ b @ a) @ x) == 3, "and one held for later"
    assert squares(lambda a, b: (a @ b @ a, jnp.exp(b @ b) @ a)[0]) == 1, "what no result needs is dropped"
    halves = lambda a, b: jax.lax.split(a @ b, (4, 4))[0] @ (a @ b @ a @ b @ a)
    assert squares(halves) == 2.5, "a half that nothing reads is let go"


def test_elementwise_equations_fuse():
    assert squares(lambda a, b: (jnp.exp(a) * 2 + jnp.sin(b)).sum()) == 0
    assert squares(lambda a, b: jnp.exp(a) @ b) == 1, "a matrix product reads an array"
    assert squares(lambda a, b: (x := jnp.exp(a)).sum(0) + x.sum(1)) > 1, "two consumers"
    assert squares(lambda a, b: ((x := jnp.broadcast_to(a[0], (8, 8))) * a + b * x).sum()) < 0.2, "broadcasts into all"
    assert squares(lambda a, b: jnp.exp(a @ b) @ a) == 1, "in place"
    assert squares(lambda a, b: (a @ b).reshape(4, 16).reshape(8, 8).T @ a) == 1, "reshapes and transposes are free"
    assert squares(lambda a, b: (a @ b)[::-1] @ a) == 2, "a reversal is not"


def test_calls_are_inlined():
    def plain(a, b):
        return jnp.maximum(a @ b, 0) @ b @ a

    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, t: (t @ kept[1].T, kept[0].T @ t))
    twice = jax.jit(lambda a, b: a @ b)
    assert squares(plain) == squares(jax.jit(plain)) == squares(jax.checkpoint(plain)) == 2
    assert squares(lambda a, b: product(jax.nn.relu(product(a, b)), b) @ a) == 2
    assert squares(lambda a, b: twice(twice(a, b), b) @ a) == 2, "two uses of one inner program are two values"
    assert squares(lambda a, b: jax.jit(lambda x: (x, b))(a)[0] @ b) == 0, "an argument passed through"


def test_loops_count_their_body_once():
    def scan(step, keep):
        return lambda a, b: keep(jax.lax.scan(lambda x, _: step(x, b), a, None, length=5))

    last, stacked = (lambda out: out[0]), (lambda out: out[1])
    assert squares(scan(lambda x, b: (jnp.tanh(x @ b), None), last)) == 1, "one product, overwritten in place"
    assert squares(scan(lambda x, b: (x @ b, None), last)) == 1, "one product, copied"
    assert squares(scan(lambda x, b: (jnp.tanh(x @ b @ b), None), last)) == 2
    kept = scan(lambda x, b: ((y := x @ b), (y @ b @ b).sum()), last)
    assert squares(kept) == pytest.approx(3, abs=0.1), "the copied one is held to the body's end"
    used = scan(lambda x, b: (jnp.tanh(x @ b), x * 2), lambda out: out[1].sum(0) @ out[0])
    assert squares(used) == 5 + 1 + 1, "five stacked, the last state, and the body's product"
    assert squares(scan(lambda x, b: (jnp.tanh(x @ b), x * 2), stacked)) == 1 + 1, "the stacked are the result"

    one_by_one = lambda xs, b: jax.lax.map(lambda x: jnp.tanh(x @ b), xs)
    assert peak_bytes(one_by_one, floats(3, 8, 8), SQUARE) == 2 * UNIT, "a slice and its product"
    until = lambda a, b: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ b @ b, a)
    assert squares(until) == 2


def test_the_largest_branch_counts():
    branches = [lambda a, b: a, lambda a, b: a @ b @ a @ b @ a, lambda a, b: a @ b]
    index = jax.ShapeDtypeStruct((), jnp.int32)
    found = peak_bytes(lambda i, a, b: jax.lax.switch(i, branches, a, b), index, SQUARE, SQUARE)
    assert 2 * UNIT <= found < 2.1 * UNIT


def test_a_shard_counts_alone():
    mesh = Mesh(np.array(jax.devices()[:2]), ("member",))
    spec = PartitionSpec("member")
    both = lambda a, b: jnp.einsum("mij,mjk,mkl->mil", a, b, a)
    apart = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec)
    args = floats(2, 8, 8), floats(2, 8, 8)
    assert 2 * peak_bytes(apart, *args) == peak_bytes(both, *args) >= 2 * UNIT


def test_random_keys(key):
    def draws(key):
        return jax.vmap(lambda k: jax.random.normal(k, (8, 8)))(jax.random.split(key, 4)) @ jnp.ones((8, 8))

    abstract = jax.eval_shape(lambda: key)
    assert peak_bytes(draws, key) == peak_bytes(draws, abstract) >= 4 * UNIT
    assert peak_bytes(lambda k: jax.random.split(k, 6)[:3], key) == 6 * tree_bytes(key), "keys are held too"


IMAGES = (16, 16, 3)
NETWORKS = {
    "mlp": ((64,), lambda: bc.models.mlp(64, (128, 128), 10)),
    "convnet": (IMAGES, lambda: bc.models.convnet(IMAGES, (16, 32), 64, 10)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_close_to_what_the_compiler_says(network):
    """Within a factor of 3; the docstrings say how close it was."""
    shape, build = NETWORKS[network]
    method = bc.map_estimate(build(), bc.Categorical, optax.adam(1e-2))
    rows, steps = 64, 4
    data = bc.Dataset(np.zeros((rows * steps, *shape), np.float32), np.zeros(rows * steps, np.int32))
    estimate = training_memory(method, data, rows)
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(method.init, key, None)

    def epoch(state, index, key):
        def step(state, index):
            batch = bc.Batch(jnp.asarray(data.inputs)[index], jnp.asarray(data.targets)[index], jnp.ones(rows), index)
            return method.update(state, batch, key)

        return jax.lax.scan(step, state, index)

    index = jax.ShapeDtypeStruct((steps, rows), jnp.int32)
    said = jax.jit(epoch).lower(state, index, key).compile().memory_analysis()
    assert 1 / 3 < estimate.activations / said.temp_size_in_bytes < 3
    total = said.argument_size_in_bytes + said.output_size_in_bytes + said.temp_size_in_bytes + estimate.data
    assert 1 / 1.5 < estimate.total / total < 1.5

    args = state, floats(rows, *shape), key
    said = jax.jit(method.predict).lower(*args).compile().memory_analysis()
    assert 1 / 3 < peak_bytes(method.predict, *args) / said.temp_size_in_bytes < 3


def test_training_memory_by_hand(key):
    method = bc.map_estimate(pure_model(), bc.Categorical, optax.adam(1e-2))
    found = training_memory(method, blobs(), 10, members=5, concurrent=2)
    parameters = (4 * 3 + 3) * 4
    assert found.parameters == parameters
    assert found.state == 3 * parameters + 4 + 4, "two moments, and two counts of steps"
    assert found.data == 30 * (4 + 1 + 1) * 4, "weights of one are made"
    state = jax.eval_shape(method.init, key, None)
    batch = bc.Batch(floats(10, 4), jax.ShapeDtypeStruct((10,), jnp.int32), floats(10), np.arange(10))
    temporaries = peak_bytes(method.update, state, batch, key)
    assert found.activations == 10 * (4 + 1 + 1 + 1) * 4 + temporaries > 10 * 28 + parameters, "batch and gradients"
    assert found == training_memory(method, blobs()._replace(weights=np.ones(30)), 10, members=5, concurrent=2)
    assert found == training_memory(method, blobs(), 10, members=5, concurrent=2, start=state)
    nested = method._replace(init=lambda key, start=None: (method.init(key, start),))
    nested = nested._replace(update=lambda state, batch, key: ((method.update(state[0], batch, key)[0],), {}))
    assert training_memory(nested, blobs(), 10).parameters == 0, "a state without `variables`"
    with pytest.raises(
        ValueError, match=r"`method` must be one member's, got an ensemble of 4\. Pass the method inside"
    ):
        training_memory(bc.ensemble(method, 4), blobs(), 10)


def test_nothing_is_compiled_or_allocated(key):
    """Of data and parameters that no machine holds, only shapes are touched."""
    width, rows = 1_000_000, 1_000_000_000

    def init(key):
        return bc.Variables({"w": jax.random.normal(key, (width, width)), "b": jnp.zeros(width)})

    def apply(variables, inputs, key):
        return inputs @ variables.params["w"] + variables.params["b"]

    model = bc.Model(init, apply, lambda variables, inputs, key: (apply(variables, inputs, None), (), 0.0))
    method = bc.map_estimate(model, bc.Categorical, optax.sgd(0.1))
    data = bc.Dataset(np.broadcast_to(np.float32(0), (rows, width)), np.broadcast_to(np.int32(0), rows))
    compilations, arrays = len(COMPILATIONS), len(jax.live_arrays())
    found = training_memory(method, data, 128)
    assert found.parameters == 4 * (width**2 + width) and found.data == rows * (4 * width + 4 + 4)
    state = jax.eval_shape(method.init, key, None)
    assert prediction_chunk(method.predict, state, data.inputs, key, budget=10**9) in (64, 128)
    assert (len(COMPILATIONS), len(jax.live_arrays())) == (compilations, arrays)
    jax.jit(lambda x: x * 3.25)(1.0)
    assert len(COMPILATIONS) > compilations, "the listener hears compilations"


def test_memory_adds_up_and_reads_well():
    one = Memory(parameters=400_000, state=1_100_000, activations=3_200_000, data=600_000, members=5)
    assert one.total == 14_800_000
    assert one.sentence() == (
        "memory per device, estimated: 14.8 MB = 5 members x 2 copies x 1.1 MB (parameters 0.4 MB) + "
        "activations 1 x 3.2 MB + data 0.6 MB"
    )
    assert one._replace(concurrent=4, copies=3).total == 16_500_000 + 12_800_000 + 600_000
    assert "4,000.0 MB" in one._replace(activations=4 * 10**9).sentence()
    assert "data 0.0012 MB" in one._replace(data=1234).sentence()


def test_members_side_by_side():
    all_five = Memory(parameters=0, state=10, activations=100, data=50, members=5)
    assert [member_chunk(all_five, budget) for budget in (250, 349, 350, 649, 650, 10**9)] == [1, 1, 2, 4, 5, 5]
    assert member_chunk(all_five._replace(concurrent=5), 250) == 1
    with pytest.raises(
        ValueError,
        match=r"`memory` must fit into the budget of 2\.0 MB with one member at a time, got 2\.5 MB \(memory per .*\)\. Take",
    ):
        member_chunk(Memory(0, 100_000, 1_000_000, 500_000, 5), 2_000_000)


def test_rows_of_a_chunk(key):
    """Doubling the chunk would leave the budget, also where something else than the rows is largest at first."""
    weights = floats(64, 1000)

    def rows(state, inputs, key):
        return jax.nn.softmax(jnp.tanh(inputs @ state) @ state.T)

    def drawn(state, inputs, key):
        return rows(state + jax.random.normal(key, state.shape), inputs, None)

    def needed(predict, rows):
        inputs = floats(rows, 64)
        outputs = jax.eval_shape(predict, weights, inputs, key)
        return peak_bytes(predict, weights, inputs, key) + tree_bytes((inputs, outputs))

    inputs = np.zeros((7, 64), np.float32)
    for predict, budget in ((rows, 1_000_000), (rows, 10_000), (drawn, 3_000_000)):
        chunk = prediction_chunk(predict, weights, inputs, key, budget=budget)
        assert needed(predict, chunk) <= budget < needed(predict, 2 * chunk)
    total = lambda state, inputs, key: inputs.sum(1)
    of_row = 4 * (64 + 1)
    assert [prediction_chunk(total, (), inputs, None, budget=n * of_row) for n in (1, 15, 16, 31)] == [1, 8, 16, 16]
    assert prediction_chunk(rows, weights, inputs, None, budget=10**12) == 8192
    assert prediction_chunk(rows, weights, inputs, None, budget=10**12, most=100) == 64
    assert prediction_chunk(rows, weights, inputs, None, budget=needed(rows, 1)) == 1
    message = (
        r"`inputs` must fit into the budget of 0\.1 MB one row at a time, got 1\.\d MB for a row\. Predict with fewer"
    )
    with pytest.raises(ValueError, match=message):
        prediction_chunk(drawn, weights, inputs, key, budget=100_000)
    with pytest.raises(ValueError, match=r"`most` must be at least 1 row, got 0\. 8192 is the default"):
        prediction_chunk(rows, weights, inputs, None, budget=10**12, most=0)


class Accelerator:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 1000, "bytes_in_use": 10}


def test_budget_of_a_device(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < device_budget() < total / 2
    monkeypatch.setattr(memory, "_host_bytes", lambda: 10_000)
    assert device_budget() == device_budget(jax.devices()[1]) == 4000, "two devices share the host"
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator()])
    assert (device_budget(), device_budget(share=0.5)) == (800, 500)
    for share in (0, 1.1):
        with pytest.raises(ValueError, match=rf"`share` must lie in \(0, 1\], got {share}\. 0\.8 leaves room"):
            device_budget(share=share)


def test_budget_where_there_is_no_meminfo(monkeypatch):
    monkeypatch.setattr(
        memory, "Path", lambda _: memory.os.devnull and type("Absent", (), {"exists": lambda _: False})()
    )
    assert device_budget() > 0
