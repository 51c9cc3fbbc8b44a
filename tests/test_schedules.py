import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bayescal as bc
from bayescal.schedules import cyclical_cosine, warmup_cosine, warmup_linear

pytestmark = pytest.mark.core

OPTAX = {
    warmup_cosine: lambda peak, warmup, total, end: optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, end),
    warmup_linear: lambda peak, warmup, total, end: optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, end, total - warmup)], [warmup]
    ),
}
NUMBERS = [(0.1, 5, 20, 0.01), (3e-3, 0, 7, 0.0), (1.0, 1, 1000, 1.0)]
EVERY = pytest.mark.parametrize("ours", [warmup_cosine, warmup_linear])


def table(ours, steps, peak, warmup, total, end):
    return jax.vmap(ours(peak, warmup_steps=warmup, total_steps=total, end=end))(steps)


@EVERY
def test_equal_to_optax_at_every_step(ours, strict):
    """Python numbers and traced ones alike; the first step, the peak, the last step and what follows among them."""
    traced = jax.jit(lambda steps, *numbers: table(ours, steps, *numbers))
    steps = jnp.arange(1010)
    for peak, warmup, total, end in NUMBERS:
        with jax.numpy_dtype_promotion("standard"):
            expected = jax.vmap(OPTAX[ours](peak, warmup, total, end))(steps)
        for got in (table(ours, steps, peak, warmup, total, end), traced(steps, peak, warmup, total, end)):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6 * peak)
            assert got.dtype == jnp.float32
            assert got[warmup] == np.float32(peak) and got[total] == got[-1] == np.float32(end)


def test_by_hand():
    cosine = warmup_cosine(4.0, warmup_steps=4, total_steps=10, end=2.0)
    np.testing.assert_allclose([cosine(s) for s in (0, 1, 4, 7, 10, 99)], [0, 1, 4, 3, 2, 2], rtol=1e-6)
    linear = warmup_linear(4.0, warmup_steps=4, total_steps=10, end=1.0)
    np.testing.assert_allclose([linear(s) for s in (0, 1, 4, 6, 10, 99)], [0, 1, 4, 3, 1, 1], rtol=1e-6)


def test_optax_branches_where_ours_does_not():
    """The reason to have this file: once it fails, optax traces too and the file can go."""
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.vmap(lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, 3, 10)(5))(jnp.ones(2))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.vmap(lambda steps: optax.linear_schedule(0.0, 1.0, steps)(5))(jnp.ones(2))


WRONG = {
    "peak": {"peak": -1.0},
    "warmup_steps": {"warmup_steps": -5},
    "total_steps": {"total_steps": 5},
    "end": {"end": -0.1},
}


@EVERY
@pytest.mark.parametrize("name", WRONG)
def test_bad_numbers(ours, name):
    """An error where the number is known, NaN where it is traced: never another schedule than was meant."""
    good = {"peak": 1.0, "warmup_steps": 5, "total_steps": 20, "end": 0.0}
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got {WRONG[name][name]}\. [A-Z0]"):
        ours(**good | WRONG[name])
    traced = jax.jit(lambda numbers: [ours(**numbers)(step) for step in (0, 10, 30)])
    assert np.isnan(traced(good | WRONG[name])).all() and not np.isnan(traced(good)).any()


def test_cycles_by_hand(strict):
    """Peak, half, and nearly nothing; then again; equal to optax's restarts; a member's own numbers."""
    schedule = cyclical_cosine(4.0, cycle_length=4)
    expected = [4, 2 + np.sqrt(2), 2, 2 - np.sqrt(2)] * 3
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(12)), expected, rtol=1e-5)
    restarts = [optax.cosine_decay_schedule(4.0, 4) for _ in range(3)]
    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.vmap(optax.join_schedules(restarts, [4, 8]))(jnp.arange(12))
    np.testing.assert_allclose(expected, theirs, rtol=1e-5)
    own = jax.jit(lambda peak, length: cyclical_cosine(peak, cycle_length=length)(5))
    np.testing.assert_allclose([own(4.0, 4), own(2.0, 10)], [2 + np.sqrt(2), 1], rtol=1e-5)
    assert schedule(3).dtype == jnp.float32


@pytest.mark.parametrize(("peak", "cycle_length"), [(-1.0, 4), (1.0, 0)])
def test_bad_cycles(peak, cycle_length):
    name, got = ("peak", "-1.0") if peak < 0 else ("cycle_length", "0")
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got {got}\. It"):
        cyclical_cosine(peak, cycle_length=cycle_length)
    assert np.isnan(jax.jit(lambda p, c: cyclical_cosine(p, cycle_length=c)(3))(peak, cycle_length))


def test_each_member_has_its_own_schedule(key):
    """Whole descent on |w|^2 / 2 of every member, with the same shape of schedule and its own numbers."""
    settings = {"peak": jnp.array([0.1, 0.5, 1.0]), "warmup": jnp.array([0, 2, 3])}

    def build(own):
        schedule = warmup_cosine(own["peak"], warmup_steps=own["warmup"], total_steps=6)
        model = bc.Model(lambda key: bc.Variables(jnp.ones(())), lambda v, x, key: v.params * x, lambda v, x, key: 0)
        objective = lambda variables, batch, key, step: (variables.params**2 / 2, ((), {"loss": variables.params}))
        return bc.map_estimate(model, bc.Categorical, optax.sgd(schedule), objective=objective)

    method = bc.ensemble(build, settings=settings)
    batch = bc.Batch(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.zeros(1, jnp.int32))

    @jax.jit
    def run(key):
        state = method.init(key, None)
        return jax.lax.fori_loop(0, 6, lambda _, s: method.update(s, batch, key)[0], state).members.variables.params

    for got, peak, warmup in zip(run(key), [0.1, 0.5, 1.0], [0, 2, 3], strict=True):
        rates = [float(optax.warmup_cosine_decay_schedule(0.0, peak, warmup, 6)(s)) for s in range(6)]
        np.testing.assert_allclose(got, np.prod(1 - np.array(rates)), rtol=1e-5)
