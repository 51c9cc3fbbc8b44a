"""Draws folded in one after another, blocks of rows, and several devices: the same parts, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import bayescal as bc
from bayescal.decompose import accumulate, decompose_draws, entropy_parts, finish, merge, rows
from bayescal.decompose.draws import BLOCK_NUMBERS, TOGETHER, _decompose_draws

pytestmark = pytest.mark.core

FAMILIES = {
    "random": lambda rng, s, n, c: 2 * rng.normal(size=(s, n, c)),
    "confident": lambda rng, s, n, c: 30 * rng.normal(size=(s, n, c)),
    "near agreement": lambda rng, s, n, c: 3 * rng.normal(size=(1, n, c)) + 1e-3 * rng.normal(size=(s, n, c)),
    "one hot": lambda rng, s, n, c: np.where(np.arange(c) == rng.integers(0, c, size=(s, n, 1)), 60.0, 0.0),
}
joined = jax.jit(merge)
folded = jax.jit(accumulate)


def in_order(parts):
    return functools.reduce(joined, parts)


def as_tree(parts):
    while len(parts) > 1:
        parts = [joined(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def information_in_long_double(logits):
    shifted = logits.astype(np.longdouble) - logits.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    mean = probs.mean(0)
    ratio = probs / np.where(mean > 0, mean, 1)
    products = np.where(ratio > 0, ratio * np.log(np.where(ratio > 0, ratio, 1)), 0)
    return (mean * (products - ratio + 1)).sum(-1).mean(0).astype(float)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("draws", "number", "classes"), [(2, 400, 2), (7, 200, 10), (20, 40, 300), (3, 4, 100_000)])
def test_information_is_exact_however_it_is_folded(rng, family, draws, number, classes):
    logits = FAMILIES[family](rng, draws, number, classes).astype(np.float32)
    truth = information_in_long_double(logits)
    single = [folded(bc.Categorical(logits[s : s + 1])) for s in range(draws)]
    shuffled = [single[s] for s in rng.permutation(draws)]
    found = {
        "block": bc.decompose(bc.Categorical(logits)),
        "one at a time": finish(in_order(single)),
        "in another order": finish(as_tree(shuffled)),
    }
    for how, parts in found.items():
        ours = np.asarray(parts.epistemic, np.float64)
        assert (ours >= 0).all(), how
        shown = truth > 1e-8
        if shown.any():
            error = abs(ours - truth)[shown] / truth[shown]
            assert np.median(error) <= 1e-6 and np.quantile(error, 0.99) <= 1e-5, (how, np.quantile(error, [0.5, 0.99]))
        np.testing.assert_allclose(parts.aleatoric, found["block"].aleatoric, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(parts.ood, found["block"].ood, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(parts.total, parts.aleatoric + parts.epistemic)


def test_the_oracle_is_the_loop(rng):
    logits = 2 * rng.normal(size=(3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(information_in_long_double(logits), oracles.mutual_information(logits), rtol=1e-12)


def test_impossible_classes_and_weights(rng):
    logits = np.where(rng.uniform(size=(6, 30, 5)) < 0.3, -np.inf, rng.normal(size=(6, 30, 5))).astype(np.float32)
    logits[..., 0] = 0
    weights = np.array([1, 0, 3, 0.5, 2, 0], np.float32)
    logits[1] = np.nan  # of weight 0
    whole = bc.decompose(bc.Categorical(logits, weights))
    for cuts in ([1, 2, 3, 4, 5], [2, 5], [3]):
        pairs = zip(np.split(logits, cuts), np.split(weights, cuts), strict=True)
        parts = finish(functools.reduce(merge, [accumulate(bc.Categorical(z, w)) for z, w in pairs]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), parts, whole)
    own = rng.uniform(size=(6, 30)).astype(np.float32) * (weights > 0)[:, None]
    whole = bc.decompose(bc.Categorical(logits, own))
    parts = [accumulate(bc.Categorical(logits[i], own[i])) for i in (slice(0, 2), slice(2, 6))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), finish(merge(*parts)), whole)


def test_nan_stays_nan(rng):
    logits = rng.normal(size=(3, 4, 5)).astype(np.float32)
    logits[2, 1, 0] = np.nan
    parts = finish(in_order([folded(bc.Categorical(logits[s : s + 1])) for s in range(3)]))
    for part in parts:
        assert np.isnan(part[1]) and np.isfinite(np.delete(np.asarray(part), 1)).all()
    nothing = np.full((2, 1, 3), -np.inf, np.float32)
    assert np.isnan(bc.decompose(bc.Categorical(nothing)).total).all()


@pytest.mark.slow
def test_other_families(rng):
    logits = rng.normal(size=(4, 6)).astype(np.float32)
    probs = rng.dirichlet(np.ones(3), size=(4, 6)).astype(np.float32)
    mean = (1000 + rng.normal(size=(4, 6, 2))).astype(np.float32)
    variance = np.exp(rng.normal(size=(2, 4, 6, 2))).astype(np.float32)
    weights = np.array([1, 2, 0, 1], np.float32)
    for family, *arrays in ((bc.Bernoulli, logits), (bc.Probabilities, probs), (bc.Gaussian, mean, *variance)):
        whole = bc.decompose(family(*arrays, member_weights=weights))
        parts = [
            accumulate(family(*(x[s] for x in arrays), member_weights=weights[s])) for s in (slice(0, 1), slice(1, 4))
        ]
        found = finish(merge(*parts))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, whole)


@pytest.mark.parametrize("centre", [0.0, 1e3, 1e5])
def test_normals_far_from_zero(rng, centre):
    """Means of spread 0.05 about a large number, one at a time."""
    mean = (centre + 0.05 * rng.normal(size=(100, 20, 1))).astype(np.float32)
    single = [folded(bc.Gaussian(m[None], np.ones_like(m[None]))) for m in mean]
    np.testing.assert_allclose(finish(in_order(single)).epistemic, mean.astype(float).var(0), rtol=1e-5)


def test_many_draws_do_not_drift(key):
    def draw(key, inputs):
        return bc.Categorical((inputs @ jax.random.normal(key, (4, 6)))[None])

    keys, inputs = jax.random.split(key, 2_000), np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    logits = np.asarray(jax.lax.map(lambda k: draw(k, inputs).logits[0], keys))
    error = abs(
        np.asarray(decompose_draws(draw, keys, inputs).epistemic, float) / information_in_long_double(logits) - 1
    )
    assert np.median(error) <= 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_promoted(rng, dtype):
    logits = jnp.asarray(2 * rng.normal(size=(5, 200, 10)), dtype)
    truth = information_in_long_double(np.asarray(logits, np.float32))
    for parts in (
        bc.decompose(bc.Categorical(logits)),
        finish(in_order([folded(bc.Categorical(z[None])) for z in logits])),
    ):
        assert parts.epistemic.dtype == jnp.float32
        error = abs(np.asarray(parts.epistemic, float) / truth - 1)
        assert np.median(error) <= 1e-6 and np.quantile(error, 0.99) <= 1e-5


def test_in_float64(rng):
    logits, inputs = rng.normal(size=(3, 20, 4)) * 3, rng.normal(size=(6, 6))
    with jax.enable_x64(True):
        parts = bc.decompose(bc.Categorical(logits))
        truth = information_in_long_double(logits)
        np.testing.assert_allclose(parts.epistemic, truth, rtol=1e-12)
        np.testing.assert_allclose(parts.total, bc.Categorical(logits).entropy(), rtol=1e-12)
        keys = jax.random.split(jax.random.key(0), 4)
        narrow = decompose_draws(linear, keys, inputs.astype(np.float32), np.float32(1))  # of float32 all the same
        assert narrow.total.shape == (6,)


def test_merging_under_strict_promotion(rng, strict):
    logits = rng.normal(size=(4, 6, 5)).astype(np.float32)
    parts = [accumulate(bc.Categorical(z)) for z in (logits[:1], logits[1:])]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        finish(merge(*parts)),
        bc.decompose(bc.Categorical(logits)),
    )


def test_the_pool_is_kept(rng):
    logits = 5 * rng.normal(size=(6, 10, 4)).astype(np.float32)
    draws = in_order([folded(bc.Categorical(logits[s : s + 1])) for s in range(6)])
    np.testing.assert_allclose(draws.pool.log_probs(), bc.Categorical(logits).log_probs(), atol=2e-6)
    np.testing.assert_array_equal(draws.weight, np.full(10, 6.0))


def linear(key, inputs, scale):
    weights = jax.random.normal(key, (inputs.shape[-1], 50))
    return bc.Categorical((scale * inputs @ weights)[None])


def test_draws_are_predicted_and_forgotten(rng, key):
    inputs, keys = rng.normal(size=(37, 6)).astype(np.float32), jax.random.split(key, 35)
    logits = jnp.concatenate([linear(k, inputs, 2.0).logits for k in keys])
    whole = bc.decompose(bc.Categorical(logits))
    for size in (None, 1, 10, 100):
        parts = decompose_draws(linear, keys, inputs, 2.0, rows=size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


def test_weights_of_draws_count_as_they_are(rng):
    """Draws of weight 0 and 7, for all rows or row by row, in groups that are full and not."""

    def classes(own, inputs):
        logits, weight = own
        return bc.Categorical(inputs @ logits[None], weight[None])

    def normals(own, inputs):
        means, weight = own
        mean = (inputs @ means)[None]
        return bc.Gaussian(mean, jnp.ones_like(mean), None, weight[None])

    networks, inputs = rng.normal(size=(19, 4, 3)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    every = np.einsum("nf,sfk->snk", inputs, networks)
    weights = np.ones(19, np.float32)
    weights[[0, 3, 18]] = 0, 7, 0
    for number in (16, 19):
        given, own = weights[:number], networks[:number]
        whole = bc.decompose(bc.Categorical(every[:number], given))
        parts = decompose_draws(classes, (own, given), inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), parts, whole)
        whole = bc.decompose(bc.Gaussian(every[:number], np.ones_like(every[:number]), None, given))
        parts = decompose_draws(normals, (own, given), inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), parts, whole)


def test_a_hundred_draws_of_a_thousand_classes_take_less_than_a_hundredth_of_their_memory():
    draws, number, classes = 100, 2000, 1000

    def draw(key, inputs):
        return bc.Categorical((inputs @ jax.random.normal(key, (16, classes)))[None])

    keys, inputs = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), draws)), jnp.zeros((number, 16))
    size = BLOCK_NUMBERS // (TOGETHER * classes)
    compiled = _decompose_draws.lower(draw, size, draws, keys, inputs, ()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * draws * number * classes * 4


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_and_devices_change_nothing(rng, monkeypatch, weighted):
    logits = rng.normal(size=(3, 5, 203, 4)).astype(np.float32)  # 5 experiments
    weights = rng.uniform(size=(3, 1, 203)).astype(np.float32) if weighted else None
    pred = bc.Categorical(logits, weights)
    whole = jax.jit(lambda p: (*entropy_parts(p), p.free_energy()))(pred)
    assert len(jax.devices()) == 2
    for numbers, fewest in ((2**7, 10**9), (2**7, 8), (2**12, 1)):  # blocks on one device, on two, two large ones
        monkeypatch.setattr(rows, "CACHE_NUMBERS", numbers)
        monkeypatch.setattr(rows, "FEWEST_BLOCKS", fewest)
        parts = bc.decompose(pred)
        for ours, expected in zip(parts[1:], whole, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-7)
            assert ours.shape == (5, 203) and len(ours.devices()) == 1


def test_results_are_where_the_predictive_is(rng, monkeypatch):
    monkeypatch.setattr(rows, "CACHE_NUMBERS", 2**6)
    logits = rng.normal(size=(3, 200, 4)).astype(np.float32)
    whole = bc.decompose(bc.Categorical(logits))
    assert not whole.total.committed
    first, second = jax.devices()
    for device in (first, second):
        found = bc.decompose(bc.Categorical(jax.device_put(logits, device)))
        assert found.total.committed and found.total.devices() == {device}
        np.testing.assert_array_equal(found.epistemic, whole.epistemic)
    mesh = bc.make_mesh(2)
    spread = jax.device_put(logits, jax.NamedSharding(mesh, jax.P(None, "member")))
    found = bc.decompose(bc.Categorical(spread))
    np.testing.assert_allclose(found.epistemic, whole.epistemic, rtol=1e-5)
    assert found.epistemic.sharding.spec == jax.P("member")
    constant = bc.Categorical(jnp.asarray(logits))
    inside = jax.jit(lambda scale: scale * bc.decompose(constant).epistemic)(2.0)
    np.testing.assert_allclose(inside, 2 * whole.epistemic, rtol=1e-6)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(bc.decompose(constant).epistemic, whole.epistemic, rtol=1e-6)


def test_blocks_under_jit_and_grad(rng, monkeypatch):
    monkeypatch.setattr(rows, "CACHE_NUMBERS", 2**6)
    logits = jnp.asarray(rng.normal(size=(3, 50, 4)).astype(np.float32))
    total = lambda z: bc.decompose(bc.Categorical(z)).epistemic.sum()
    straight = lambda z: entropy_parts(bc.Categorical(z))[1].sum()
    np.testing.assert_allclose(jax.jit(total)(logits), straight(logits), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(logits), jax.grad(straight)(logits), rtol=1e-4, atol=1e-7)


def test_memory_beside_a_large_predictive_is_small():
    from bayescal.decompose.rows import _here
    from bayescal.decompose.uncertainty import _parts, free_energy

    pred = jax.eval_shape(lambda: bc.Categorical(jnp.zeros((10, 100_000, 10))))
    compiled = _here.lower(_parts, (entropy_parts, free_energy), rows.CACHE_NUMBERS, pred).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 10 * 100_000 * 10 * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda a: merge(a, accumulate(bc.Gaussian(jnp.zeros((1, 3, 1)), jnp.ones((1, 3, 1))))),
            TypeError,
            "of one kind",
        ),
        (
            lambda a: accumulate(bc.Dirichlet(jnp.ones((1, 3, 2)))),
            TypeError,
            "`accumulate` does not exist for Dirichlet",
        ),
        (
            lambda a: accumulate(bc.pool(bc.Categorical(jnp.ones((1, 3, 2))))),
            ValueError,
            "`pred` must have raw members",
        ),
        (lambda a: decompose_draws(linear, (), jnp.ones((3, 2)), 1.0), ValueError, "`draws` must be arrays with one"),
        (
            lambda a: decompose_draws(
                linear, jax.random.split(jax.random.key(0), 2), (jnp.ones((3, 2)), jnp.ones(4)), 1.0
            ),
            ValueError,
            r"`inputs` must be arrays with one leading axis .* got lengths \[3, 4\]",
        ),
        (
            lambda a: decompose_draws(linear, jax.random.split(jax.random.key(0), 2), jnp.ones((3, 2)), 1.0, rows=0),
            ValueError,
            "`rows` must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call(accumulate(bc.Categorical(jnp.ones((1, 3, 2)))))
