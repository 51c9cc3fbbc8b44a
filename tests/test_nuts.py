"""NUTS against the exact posterior, its warm-up against blackjax's, and the density that it moves along."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows, deviations, positions
from exact import NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.log_density import Posterior
from bayescal.methods.mclmc import mclmc
from bayescal.methods.nuts import nuts, stan_warmup
from bayescal.train.resume import Resumable

pytestmark = pytest.mark.core
WARMUP, CHAINS = 300, 4


def regression(**settings):
    settings = {"num_data": ROWS, "prior_precision": PRIOR, "warmup": WARMUP, "num_samples": 1000, **settings}
    return nuts(linear_model(), bc.homoscedastic(NOISE), **settings)


def classifier(model=None, **settings):
    settings = {"num_data": 30, "prior_precision": 1.0, "warmup": 5, "num_samples": 4, **settings}
    return nuts(model or pure_model(), bc.Categorical, **settings)


SHORT = {
    "nuts": classifier,
    "mclmc": lambda: mclmc(pure_model(), bc.Categorical, num_data=30, prior_precision=1.0, warmup=6, num_samples=4),
}


@pytest.fixture(scope="module")
def chains():
    method = bc.ensemble(regression(), CHAINS)
    return bc.fit(method, linear_data(), jax.random.key(7), epochs=WARMUP + 1000, batch_size=ROWS, progress=False)


def test_posterior_of_linear_regression(chains):
    told = deviations(positions(chains), exact_posterior(linear_data()))
    assert max(told.values()) <= 1, told


@pytest.mark.parametrize("wrong", [{"prior": 1.5 * PRIOR}, {"noise": 1.2 * NOISE}])
def test_another_posterior_is_told_apart(chains, wrong):
    told = deviations(positions(chains), exact_posterior(linear_data(), **wrong))
    assert max(told.values()) > 1, told


def test_acceptance_divergences_and_step_sizes(chains):
    """Dual averaging brings the mean acceptance of the steps that it tries to the target; that of the averaged step size
    lies above, for blackjax's own warm-up as for ours (0.89 to 0.94 of 0.8)."""
    acceptance, step_size = chains.history["acceptance"], chains.history["step_size"]
    tried = acceptance[75 : WARMUP - 50]
    np.testing.assert_allclose(tried.mean(), 0.8, atol=3 * tried.std() / np.sqrt(tried.size / 4))
    after = acceptance[WARMUP:].mean(0)
    assert ((after > 0.78) & (after < 0.96)).all(), after
    assert (step_size[WARMUP:] == step_size[WARMUP]).all() and (step_size[1:WARMUP] != step_size[: WARMUP - 1]).all()
    assert not chains.history["divergent"][WARMUP:].any()
    steps = chains.history["num_steps"]
    assert steps.min() >= 1 and steps.max() < 2**8


def test_loss_is_that_of_the_new_position(chains):
    data, last = linear_data(), positions(chains)[:, -1].astype(float)
    nll = 0.5 * np.log(2 * np.pi * NOISE) + (data.inputs @ last.T - data.targets) ** 2 / (2 * NOISE)
    np.testing.assert_allclose(chains.history["loss"][-1], nll.mean(0), rtol=1e-4)


@pytest.mark.parametrize("warmup", [200, 19])  # with two windows for the metric, and with none
def test_warmup_is_blackjax_window_adaptation(warmup):
    from blackjax.adaptation.staged_adaptation import build_schedule
    from blackjax.adaptation.window_adaptation import base

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        start, advance, final = base(is_mass_matrix_diagonal=True, target_acceptance_rate=0.8)
    rng = np.random.default_rng(3)
    places = (rng.normal(size=(warmup, 3)) * [0.1, 1, 5]).astype(np.float32)
    acceptance = rng.uniform(size=warmup).astype(np.float32)
    ours = stan_warmup(warmup, 0.8)
    adaptation = ours.init(3)
    theirs = start(jnp.zeros(3), 0.25 / 3**0.25)
    update, theirs_update = jax.jit(ours.update), jax.jit(advance)
    for step, stage in enumerate(build_schedule(warmup)):
        np.testing.assert_allclose(ours.step_size(adaptation, jnp.int32(step)), theirs.step_size, rtol=1e-4)
        adaptation = update(adaptation, jnp.int32(step), jnp.asarray(places[step]), acceptance[step])
        theirs = theirs_update(theirs, tuple(map(jnp.asarray, stage)), jnp.asarray(places[step]), acceptance[step])
    step_size, metric = final(theirs)
    np.testing.assert_allclose(ours.step_size(adaptation, jnp.int32(warmup)), step_size, rtol=1e-4)
    np.testing.assert_allclose(adaptation.metric.inverse_mass_matrix, metric, rtol=1e-4)
    frozen = update(adaptation, jnp.int32(warmup), jnp.full(3, 1e6), jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, frozen, adaptation)


def test_log_density_by_hand(rng):
    """Half of the rows, one of which is padding, stand for all 60 of them."""
    temperature, model, (inputs, targets, _) = 0.5, linear_model(2), linear_data(10, 2)
    weights = np.array([1.25, 1.25, 0, 2.5, 0.5, 1, 1, 1, 1, 0.5], np.float32)
    batch = bc.Batch(inputs, targets, jnp.asarray(weights), jnp.arange(10))
    posterior = Posterior(model, bc.homoscedastic(NOISE), 60, PRIOR, temperature)
    here, there = rng.normal(size=(2, 2, 1)).astype(np.float32)

    def by_hand(params):
        total = 0.0
        for x, y, w in zip(inputs.astype(float), targets.astype(float), weights, strict=True):
            log_prob = -0.5 * np.log(2 * np.pi * NOISE) - (y - x @ params).item() ** 2 / (2 * NOISE)
            total += 60 / 10 * w * log_prob
        return (total - PRIOR / 2 * (params.astype(float) ** 2).sum()) / temperature

    np.testing.assert_allclose(posterior.log_density(bc.Variables(here), batch), by_hand(here), rtol=1e-5)
    relative = posterior.relative_to(bc.Variables(here), batch)
    np.testing.assert_allclose(relative(there), by_hand(there) - by_hand(here), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(relative)(there), jax.grad(lambda p: posterior.log_density(bc.Variables(p), batch))(there), rtol=1e-5
    )


def test_energies_of_a_million_rows_in_float32():
    """The difference of two energies is right to a hundredth of a nat, where each has an error of its own of more."""
    data = linear_data(1_000_000, 2)
    batch = all_rows(data)
    posterior = Posterior(linear_model(2), bc.homoscedastic(NOISE), 1_000_000, PRIOR)
    exact = exact_posterior(data)
    here = exact.mean[:, None].astype(np.float32)
    there = here + np.float32(1e-3)  # two standard deviations

    def energy(params):
        residual = data.targets.astype(float) - data.inputs.astype(float) @ params.astype(float)
        return -(residual**2).sum() / (2 * NOISE) - PRIOR / 2 * (params.astype(float) ** 2).sum()

    got = jax.jit(lambda p: posterior.relative_to(bc.Variables(jnp.asarray(here)), batch)(p))(there)
    np.testing.assert_allclose(got, energy(there) - energy(here), atol=0.01)
    assert abs(np.spacing(np.float32(energy(here)))) > 0.03


def test_positions_kept_are_the_members(key):
    """Warm-up of 5, then every second of 6: the samples of updates 7, 9 and 11, and one slot still empty."""
    method = classifier(every=2)
    state, batch, seen = method.init(key, None), all_rows(blobs()), []
    step = jax.jit(method.update)
    for i in range(11):
        state, info = step(state, batch, jax.random.fold_in(key, i))
        seen.append(state.variables.params["w"])
        assert info["kept"] == sum(i >= kept for kept in (6, 8, 10))
    assert state.samples.count == 3 and state.samples.capacity == 4
    np.testing.assert_array_equal(state.samples.params["w"][:3], [seen[6], seen[8], seen[10]])
    pred = bc.predict(method, state, blobs().inputs, key)
    assert pred.num_members == 4 and pred.member_weights.ravel().tolist() == [1, 1, 1, 0]
    drawn = method.draw(state, key).params["w"]
    assert any(np.array_equal(drawn, seen[i]) for i in (6, 8, 10))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["nuts", "mclmc"])
@pytest.mark.parametrize("width", ["bfloat16", "float32 under x64"])
def test_chains_of_other_types(sampler, width):
    """They move in float32 or wider, and store positions in the params' own types; ten updates find some that know a little."""
    with jax.enable_x64(width != "bfloat16"):
        key, batch, base = jax.random.key(3), all_rows(blobs()), bc.models.mlp(4, (3,), 3)
        narrow = jnp.bfloat16 if width == "bfloat16" else jnp.float32
        cast = lambda variables: jax.tree.map(lambda x: x.astype(narrow), variables)
        build = {"nuts": nuts, "mclmc": mclmc}[sampler]
        settings = dict(num_data=30, prior_precision=1.0, warmup=6, num_samples=4)
        method = build(base._replace(init=lambda k: cast(base.init(k))), bc.Categorical, **settings)
        state, update, losses = method.init(key, None), jax.jit(method.update), []
        types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
        for i in range(10):
            new, info = update(state, batch, jax.random.fold_in(key, i))
            assert types(new) == types(state)
            state, losses = new, [*losses, float(info["loss"])]
        assert {x.dtype for x in jax.tree.leaves((state.variables, state.samples.params))} == {jnp.dtype(narrow)}
        assert np.isfinite(losses).all() and max(losses[-4:]) < 0.8 and state.samples.count == 4  # log 3 knows nothing


def test_chains_start_from_a_deep_ensemble(key):
    trained = bc.ensemble(bc.map_estimate(pure_model(), bc.Categorical, optax.adam(0.1)), 2).init(key, None)
    state = bc.ensemble(classifier(), 2).init(jax.random.key(1), trained)
    np.testing.assert_array_equal(state.members.variables.params["w"], trained.members.variables.params["w"])
    np.testing.assert_array_equal(state.members.samples.params["w"][:, 0], trained.members.variables.params["w"])


def test_nan_inputs_come_through(key):
    method, batch = classifier(), all_rows(blobs())
    state = method.init(key, None)
    new, info = jax.jit(method.update)(state, batch._replace(inputs=batch.inputs.at[0, 0].set(jnp.nan)), key)
    assert np.isnan(info["loss"]) and info["divergent"] == 1
    np.testing.assert_array_equal(new.variables.params["w"], state.variables.params["w"])


def test_a_batch_must_hold_all_rows(key):
    with pytest.raises(ValueError, match="`batch_size` must be all `num_data` rows, 30, got a batch of 10"):
        bc.fit(classifier(), blobs(), key, epochs=1, batch_size=10, progress=False)
    half = classifier(num_data=15)  # of data that hold 30 rows: each batch has the right size, and half of them
    with pytest.raises(ValueError, match=r"`loss` must stay finite .* \(loss not finite\)\. .* whether `num_data` is"):
        bc.fit(half, blobs(), key, epochs=1, batch_size=15, progress=False)


def test_a_model_with_a_penalty_is_refused(key):
    base = pure_model()
    model = base._replace(train=lambda v, x, k: (base.train(v, x, k)[0], (), jnp.sum(v.params["b"])))
    method = classifier(model)
    with pytest.raises(ValueError, match="`model` must have no penalty, got one that adds nats"):
        method.update(method.init(key, None), all_rows(blobs()), key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 0}, "`warmup` must be a whole number of at least 1, got 0"),
        ({"num_samples": 0}, "`num_samples` must be a whole number of at least 1, got 0"),
        ({"every": 0}, "`every` must be a whole number of at least 1, got 0"),
        ({"target_acceptance": 1.0}, "`target_acceptance` must be between 0 and 1, got 1.0"),
        ({"max_num_doublings": 0}, "`max_num_doublings` must be a whole number of at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"prior_precision": {"w": 1.0, "b": 2.0}}, "`prior_precision` must be one number, got dict"),
        ({"prior_precision": 0.0}, "`prior_precision` must be positive, got 0.0"),
        ({"num_data": 0}, "`num_data` must be positive, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        nuts(pure_model(), bc.Categorical, prior_precision=1.0, warmup=5, num_samples=4)


@pytest.mark.parametrize("sampler", ["nuts", "mclmc"])
def test_a_chain_that_was_stopped_goes_on_to_the_same_bits(sampler, tmp_path, key, monkeypatch):
    """Stopped in its warm-up, after epoch 4 of 12."""
    method = bc.ensemble(SHORT[sampler](), 2)
    run = lambda **where: bc.fit(method, blobs(), key, epochs=12, batch_size=30, progress=False, **where).state
    whole, save = run(), Resumable.save

    def stop(self, carry, history):
        save(self, carry, history)
        if len(history) >= 4:
            raise KeyboardInterrupt

    where = bc.Checkpoint(tmp_path, every=2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Resumable, "save", stop)
        run(checkpoint=where)
    jax.tree.map(np.testing.assert_array_equal, run(checkpoint=where), whole)
    assert '"event": "resumed"' in (tmp_path / "log.jsonl").read_text()
