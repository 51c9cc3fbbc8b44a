"""MCLMC against the exact posterior, and its tuning against blackjax's and against plain float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bands import all_rows, deviations, positions
from blackjax.mcmc.integrators import IntegratorState
from exact import NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.mclmc import LEAST, MEMORY, TRUST, equipartition, init_tuning, mclmc, tune_step_size

pytestmark = pytest.mark.core
WARMUP, CHAINS = 150, 4


def regression(**settings):
    settings = {"num_data": ROWS, "prior_precision": PRIOR, "warmup": WARMUP, "num_samples": 1000, **settings}
    return mclmc(linear_model(), bc.homoscedastic(NOISE), **settings)


def classifier(model=None, **settings):
    settings = {
        "num_data": 30,
        "prior_precision": 1.0,
        "warmup": 6,
        "num_samples": 4,
        "steps_per_update": 2,
        **settings,
    }
    return mclmc(model or pure_model(), bc.Categorical, **settings)


@pytest.fixture(scope="module")
def chains():
    method = bc.ensemble(regression(), CHAINS)
    return bc.fit(method, linear_data(), jax.random.key(7), epochs=WARMUP + 1000, batch_size=ROWS, progress=False)


def test_posterior_of_linear_regression(chains):
    """Variances are 0.8 % too small (20,000 samples of each chain), a tenth of the band of 1,000."""
    told = deviations(positions(chains), exact_posterior(linear_data()))
    assert max(told.values()) <= 1, told


@pytest.mark.parametrize("wrong", [{"prior": 1.5 * PRIOR}, {"noise": 1.2 * NOISE}])
def test_another_posterior_is_told_apart(chains, wrong):
    told = deviations(positions(chains), exact_posterior(linear_data(), **wrong))
    assert max(told.values()) > 1, told


def test_what_the_warmup_tunes(chains):
    tuning = chains.state.members.tuning
    energy, step_size = chains.history["energy_variance"][WARMUP:], chains.history["step_size"]
    assert ((energy.mean(0) > 2.5e-4) & (energy.mean(0) < 1e-3)).all()  # a sixth root of two is 12 % of a step size
    assert not chains.history["divergent"].any()
    assert (step_size[WARMUP:] == step_size[WARMUP]).all() and (step_size[1:WARMUP] != step_size[: WARMUP - 1]).all()
    np.testing.assert_allclose(tuning.length, np.sqrt(20), rtol=1e-6)
    # 500 steps, that are worth about 50 independent ones: a standard error of sqrt(2 / 50) = 20 %, and 4 of them.
    variance = np.diag(exact_posterior(linear_data()).covariance)
    ratio = np.asarray(tuning.metric.inverse_mass_matrix) / variance
    assert ratio.min() > 0.3 and ratio.max() < 1.8 and abs(ratio.mean() - 1) < 0.2


def test_equipartition_tells_a_chain_that_has_not_arrived(chains, key):
    """Of 20 parameters and 4 * 1000 samples worth at least 400, 1 with a standard error of sqrt(2 / 8000) = 1.6 %.

    Those that start far away and sample at once have tuned their steps, none of which is divergent: -0.2, 0 and 0.
    """
    told = chains.history["equipartition"][WARMUP:]
    np.testing.assert_allclose(told.mean(), 1, atol=4 * 0.016)
    far = jnp.broadcast_to(jnp.array([30.0, 100.0, 1000.0])[:, None, None], (3, 20, 1))
    start = bc.EnsembleState(bc.Variables(far), jnp.ones(3, bool))
    method, settings = bc.ensemble(regression(warmup=6), 3), dict(batch_size=ROWS, start=start, progress=False)
    lost = bc.fit(method, linear_data(), key, epochs=26, **settings)
    assert not lost.history["divergent"][6:].any() and (lost.state.members.samples.count == 20).all()
    told = lost.history["equipartition"][6:].mean(0)
    assert (np.abs(told - 1) > 0.5).all(), told


def test_equipartition_by_hand(rng):
    """-(x - centre) . grad log p / 3 of a network of two leaves, over draws of the density itself, whatever the centre."""
    deviations = np.array([0.1, 1.0, 5.0])
    draws = (rng.normal(size=(20_000, 3)) * deviations).astype(np.float32)
    parts = lambda x: {"a": x[:2], "b": x[2:]}
    point = lambda x: IntegratorState(parts(x), None, None, parts(-x / deviations**2))
    centre = {"a": jnp.array([0.2, -1.0]), "b": jnp.array([3.0])}
    told = jax.vmap(lambda x: equipartition(point(x), centre))(jnp.asarray(draws))
    by_hand = ((draws - [0.2, -1.0, 3.0]) * draws / deviations**2).mean(1)
    np.testing.assert_allclose(told, by_hand, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(told.mean(), 1, atol=4 * by_hand.std() / np.sqrt(20_000))


def test_the_mean_is_that_of_the_updates_so_far(key):
    method, batch = classifier(), all_rows(blobs())
    state, step, seen = method.init(key, None), jax.jit(method.update), []
    for i in range(9):
        state, _ = step(state, batch, jax.random.fold_in(key, i))
        seen.append(np.asarray(state.variables.params["w"], float))
        since = seen[6:] or seen
        np.testing.assert_allclose(state.mean["w"], np.mean(since, 0), rtol=1e-4, atol=1e-5)


def test_step_size_is_that_of_blackjax(chains):
    import blackjax

    (inputs, targets, _), key = linear_data(), jax.random.key(0)
    density = lambda w: -((targets - inputs @ w) ** 2).sum() / (2 * NOISE) - PRIOR / 2 * (w**2).sum()
    start = blackjax.mclmc.init(jnp.zeros((20, 1)), density, key)
    kernel = blackjax.mcmc.mclmc.build_kernel()
    _, found, _ = blackjax.mclmc_find_L_and_step_size(
        mclmc_kernel=kernel, num_steps=3000, state=start, rng_key=key, logdensity_fn=density, frac_tune3=0.0
    )
    np.testing.assert_allclose(chains.state.members.tuning.step_size, found.step_size, rtol=0.2)
    np.testing.assert_allclose(chains.state.members.tuning.length, found.L, rtol=1e-5)


def test_step_size_by_hand(rng):
    """Sums of energy / step_size^6 in float64, as the paper has them, against ours in float32."""
    energies, wanted, tuning = rng.normal(size=40) * np.exp(rng.normal(size=40) * 3), 0.01, init_tuning(20)
    step_size, ceiling, total, weights = float(tuning.step_size), np.inf, 0.0, 0.0
    step = jax.jit(tune_step_size)
    for i, energy in enumerate(energies):
        finite = i != 20
        if not finite:
            ceiling, energy = 0.8 * step_size, 0.0
        ratio = energy**2 / wanted + LEAST
        weight = np.exp(-0.5 * (np.log(ratio) / (6 * TRUST)) ** 2)
        total, weights = MEMORY * total + weight * ratio / step_size**6, MEMORY * weights + weight
        step_size = min((total / weights) ** (-1 / 6), ceiling)
        tuning = step(tuning, jnp.float32(energy), jnp.asarray(finite), wanted)
        np.testing.assert_allclose(tuning.step_size, step_size, rtol=1e-4)
    assert tuning.ceiling < 1e3


@pytest.mark.parametrize("energy", [0.0, 1e-20, 1e8, 1e30, np.inf])
def test_step_size_survives_any_energy(energy):
    tuning = init_tuning(20)
    for _ in range(3):
        tuning = tune_step_size(tuning, jnp.float32(energy), jnp.asarray(True), 0.01)
    assert all(np.isfinite(x) for x in (tuning.step_size, tuning.energy, tuning.weight)) and tuning.step_size > 0
    assert (tuning.step_size < init_tuning(20).step_size) == (energy > 1)


def test_positions_kept_are_the_members(key):
    """Warm-up of 6, then every second of 5: the samples of updates 8 and 10."""
    method, batch, seen = classifier(every=2), all_rows(blobs()), []
    state = method.init(key, None)
    step = jax.jit(method.update)
    for i in range(11):
        state, info = step(state, batch, jax.random.fold_in(key, i))
        seen.append(state.variables.params["w"])
        assert info["kept"] == sum(i >= kept for kept in (7, 9))
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(state.momentum)))
        np.testing.assert_allclose(norm, 1, rtol=1e-5)
    np.testing.assert_array_equal(state.samples.params["w"][:2], [seen[7], seen[9]])
    pred = bc.predict(method, state, blobs().inputs, key)
    assert pred.member_weights.ravel().tolist() == [1, 1, 0, 0]
    drawn = method.draw(state, key).params["w"]
    assert any(np.array_equal(drawn, seen[i]) for i in (7, 9))


def test_start_from_a_network(key):
    network = pure_model().init(key)
    state = classifier().init(jax.random.key(1), network)
    np.testing.assert_array_equal(state.variables.params["w"], network.params["w"])


def test_nan_inputs_come_through(key):
    method, batch = classifier(), all_rows(blobs())
    state = method.init(key, None)
    new, info = jax.jit(method.update)(state, batch._replace(inputs=batch.inputs.at[0, 0].set(jnp.nan)), key)
    assert np.isnan(info["loss"]) and info["divergent"] == 1
    np.testing.assert_array_equal(new.variables.params["w"], state.variables.params["w"])


def test_a_batch_must_hold_all_rows(key):
    with pytest.raises(ValueError, match="`batch_size` must be all `num_data` rows, 30, got a batch of 10"):
        bc.fit(classifier(), blobs(), key, epochs=1, batch_size=10, progress=False)


def test_a_model_with_a_penalty_is_refused(key):
    base = pure_model()
    method = classifier(base._replace(train=lambda v, x, k: (base.train(v, x, k)[0], (), jnp.sum(v.params["b"]))))
    with pytest.raises(ValueError, match="`model` must have no penalty, got one that adds nats"):
        method.update(method.init(key, None), all_rows(blobs()), key)


def test_one_parameter_is_refused(key):
    method = mclmc(linear_model(1), bc.homoscedastic(NOISE), num_data=9, prior_precision=1.0, warmup=6, num_samples=1)
    with pytest.raises(ValueError, match="`model` must have at least 2 parameters, got 1"):
        method.init(key, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 5}, "`warmup` must be a whole number of at least 6, got 5"),
        ({"every": 0}, "`every` must be a whole number of at least 1, got 0"),
        ({"steps_per_update": 0}, "`steps_per_update` must be a whole number of at least 1, got 0"),
        ({"desired_energy_variance": 0.0}, "`desired_energy_variance` must be positive, got 0.0"),
        ({"temperature": -1.0}, "`temperature` must be positive, got -1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        mclmc(pure_model(), bc.Categorical, prior_precision=1.0, warmup=6, num_samples=4)
