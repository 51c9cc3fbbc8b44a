"""Stochastic gradient MCMC against its own discretised chains, whose moves and stationary laws are known.

On a normal posterior of precision A every move is linear, and its stationary covariance S solves S = F S F' + Q. Moves are
held against float64 one by one, with the same noise; then many chains against S, which is not A^-1.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import FEATURES, NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model
from methods import blobs, pure_model
from scipy.linalg import solve_discrete_lyapunov

import bayescal as bc
from bayescal.methods.cyclical import cyclical_sgld
from bayescal.methods.langevin import psgld, sgld
from bayescal.methods.sghmc import sghmc
from bayescal.methods.sgmcmc import Kernel, sgmcmc

pytestmark = pytest.mark.core
DATA, MODEL, LIKELIHOOD = linear_data(), linear_model(), bc.homoscedastic(NOISE)
EXACT = exact_posterior(DATA)
LARGEST = np.linalg.eigvalsh(EXACT.precision)[-1]
STEP = 1 / LARGEST  # large: the chain's variances are up to twice the posterior's
TIME, FRICTION = 0.3 / np.sqrt(LARGEST), 0.9 * np.sqrt(LARGEST)  # of sghmc
DIAGONAL = np.linspace(0.3, 1.0, FEATURES)[:, None]
BATCH = bc.Batch(jnp.asarray(DATA.inputs), jnp.asarray(DATA.targets), jnp.ones(ROWS), jnp.arange(ROWS))
CHAINS = 1000
flat = lambda x: np.asarray(x, float).reshape(-1)


def linear(build, **settings):
    common = dict(num_data=ROWS, prior_precision=PRIOR, num_samples=1)
    return build(MODEL, LIKELIHOOD, **common | {"burn_in": 0} | settings)


SAMPLERS = {
    "sgld": lambda temperature=1.0: linear(sgld, step_size=STEP, temperature=temperature),
    "preconditioned": lambda temperature=1.0: linear(
        sgld, step_size=STEP, temperature=temperature, preconditioner=jnp.asarray(DIAGONAL, jnp.float32)
    ),
    "sghmc": lambda temperature=1.0: linear(sghmc, step_size=TIME, friction=FRICTION, temperature=temperature),
}


def gradient(position):
    """Of the log posterior density, float64, row by row."""
    total = -PRIOR * position
    for x, y in zip(np.asarray(DATA.inputs, float), np.asarray(DATA.targets, float)[:, 0], strict=True):
        total = total + x * (y - x @ position) / NOISE
    return total


def noise(key):
    """What blackjax draws in an update with this key."""
    return np.asarray(jax.random.normal(jax.random.split(key)[1], (FEATURES,)), float)


def step_of(name, state, key, temperature):
    """(position, momentum) after an update, in float64."""
    w, xi = flat(state.variables.params), noise(key)
    if name == "sghmc":
        p, added = flat(state.carried), np.sqrt(2 * FRICTION * temperature * TIME) * xi
        return w + TIME * p, (1 - FRICTION * TIME) * p + TIME * gradient(w) + added
    g = DIAGONAL[:, 0] if name == "preconditioned" else 1.0
    return w + STEP * g * gradient(w) + np.sqrt(2 * temperature * STEP * g) * xi, None


def law(name, temperature):
    """Stationary covariance of the position."""
    eye, zero = np.eye(FEATURES), np.zeros((FEATURES, FEATURES))
    if name == "sghmc":
        move = np.block([[eye, TIME * eye], [-TIME * EXACT.precision, (1 - FRICTION * TIME) * eye]])
        added = np.block([[zero, zero], [zero, 2 * FRICTION * temperature * TIME * eye]])
        return solve_discrete_lyapunov(move, added)[:FEATURES, :FEATURES]
    g = np.diagflat(DIAGONAL) if name == "preconditioned" else eye
    return solve_discrete_lyapunov(eye - STEP * g @ EXACT.precision, 2 * temperature * STEP * g)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_move_is_the_formula(name, temperature, key, strict):
    method = SAMPLERS[name](temperature)
    update, state = jax.jit(method.update), method.init(key, None)
    for k in jax.random.split(key, 4):
        position, momentum = step_of(name, state, k, temperature)
        state, info = update(state, BATCH, k)
        np.testing.assert_allclose(flat(state.variables.params), position, rtol=1e-5, atol=1e-5)
        if momentum is not None:
            np.testing.assert_allclose(flat(state.carried), momentum, rtol=1e-5, atol=1e-5 * np.sqrt(LARGEST))
    assert state.step == info["kept"] == 4


@pytest.mark.parametrize(
    ("name", "temperature"), [("sgld", 1.0), ("sgld", 0.25), ("preconditioned", 1.0), ("sghmc", 1.0)]
)
def test_chains_have_the_law_of_their_step(name, temperature, key):
    """The last positions of independent chains, which forget where they began but for 1e-4 of it in 300 updates.

    In coordinates in which the law's covariance is I, an entry of the sample covariance has sd 1/sqrt(n), sqrt(2/n) on the
    diagonal: 4.5 of them, for 210 entries. The mean square of all n * 20 numbers has relative sd sqrt(2 / (20 n)).
    """
    error = chains_of(SAMPLERS[name](temperature), key, 300) - EXACT.mean

    def whitened(covariance):
        return np.linalg.solve(np.linalg.cholesky(covariance), error.T)

    z = whitened(law(name, temperature))
    sd = np.sqrt((1 + np.eye(FEATURES)) / CHAINS)
    assert (abs(z @ z.T / CHAINS - np.eye(FEATURES)) < 4.5 * sd).all()
    assert (abs(z.mean(1)) < 4 / np.sqrt(CHAINS)).all()
    spread = np.sqrt(2 / (FEATURES * CHAINS))
    assert abs((z**2).mean() - 1) < 4 * spread
    assert (whitened(temperature * EXACT.covariance) ** 2).mean() > 1 + 4 * spread, "the exact posterior is told apart"


def test_small_steps_give_the_posterior(key):
    """Steps of a hundredth of the stable ones: variances at most 1 % too large, where 20 * 1000 numbers tell 4 %.

    The slowest direction forgets its start by e^-(updates * step * smallest curvature) = e^-8.
    """
    step = 0.02 / LARGEST
    updates = int(8 / (step * np.linalg.eigvalsh(EXACT.precision)[0]))
    error = chains_of(linear(sgld, step_size=step), key, updates) - EXACT.mean
    z = np.linalg.solve(np.linalg.cholesky(EXACT.covariance), error.T)
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / (FEATURES * CHAINS)) + 0.01
    assert (abs(z.mean(1)) < 4 / np.sqrt(CHAINS)).all()


def chains_of(method, key, updates):
    """Last positions (chain, features) of independent chains."""

    @jax.jit
    @jax.vmap
    def run(k):
        init_key, steps_key = jax.random.split(k)
        keys = jax.random.split(steps_key, updates)
        state = jax.lax.scan(lambda s, k: (method.update(s, BATCH, k)[0], None), method.init(init_key, None), keys)[0]
        return state.variables.params[:, 0]

    return np.asarray(run(jax.random.split(key, CHAINS)), float)


@pytest.mark.parametrize("batch_size", [200, 50, 64])  # 64 does not divide the rows
def test_gradients_of_batches_average_to_the_whole_gradient(batch_size, key):
    """Over the batches that `fit` makes, weighed by their rows; the kernel stands still and notes the gradient."""
    still = Kernel(
        lambda key, params, temperature: jnp.zeros_like(params),
        lambda key, params, carried, gradient, step_size, temperature: (params, gradient),
    )
    settings = dict(step_size=lambda step: 1.0, temperature=lambda step: 1.0, due=lambda step: step < 0)
    base = sgmcmc(MODEL, LIKELIHOOD, still, num_data=ROWS, num_samples=1, prior_precision=PRIOR, **settings)

    def update(state, batch, key):
        chain, info = base.update(state[0], batch, key)
        return (chain, state[1] + chain.carried * batch.rows / ROWS), info

    method = bc.Method(
        lambda key, start=None: (base.init(key, start), jnp.zeros((FEATURES, 1))),
        update,
        lambda state, inputs, key: base.predict(state[0], inputs, key),
    )
    chain, total = bc.fit(method, DATA, key, epochs=1, batch_size=batch_size, progress=False).state
    expected = gradient(flat(chain.variables.params))
    np.testing.assert_allclose(flat(total), expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


def test_the_same_chain_as_blackjax_makes_of_its_own_gradient(key):
    """Priors, scaling and step of `blackjax.sgld`, from densities written for it."""
    import blackjax
    from jax.scipy.stats import norm

    log_prior = lambda w: norm.logpdf(w, scale=1 / np.sqrt(PRIOR)).sum()
    log_likelihood = lambda w, row: norm.logpdf(row[1], row[0] @ w, np.sqrt(NOISE)).sum()
    theirs = blackjax.sgld(blackjax.sgmcmc.gradients.grad_estimator(log_prior, log_likelihood, ROWS))
    method = linear(sgld, step_size=1e-4)
    state = method.init(key, None)
    rows = jax.tree.map(lambda x: x[:30], BATCH)
    expected = theirs.step(jax.random.split(key)[1], state.variables.params, (rows.inputs, rows.targets), 1e-4)
    new, info = method.update(state, rows, key)
    np.testing.assert_allclose(new.variables.params, expected, rtol=1e-5, atol=1e-6)
    loss = -np.mean([log_likelihood(state.variables.params, (x, y)) for x, y in zip(rows.inputs, rows.targets)])
    np.testing.assert_allclose(info["loss"], loss, rtol=1e-5)


def test_psgld_by_hand(key, strict):
    decay, damping, step = 0.9, 0.3, 1e-3
    method = linear(psgld, step_size=step, decay=decay, damping=damping)
    update, state = jax.jit(method.update), method.init(key, None)
    w, moments = flat(state.variables.params), np.zeros(FEATURES)
    for k in jax.random.split(key, 3):
        g = gradient(w)
        moments = decay * moments + (1 - decay) * (g / ROWS) ** 2
        diagonal = 1 / (damping + np.sqrt(moments))
        w = w + step * diagonal * g + np.sqrt(2 * step * diagonal) * noise(k)
        state, _ = update(state, BATCH, k)
        np.testing.assert_allclose(flat(state.variables.params), w, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(flat(state.carried), moments, rtol=1e-4)


def test_constant_preconditioners_are_sgld(key):
    """`psgld` that forgets nothing has G = 1 / damping; a fixed diagonal of 1 / 4 is a quarter of the step."""
    plain = linear(sgld, step_size=STEP / 4)
    others = [
        linear(psgld, step_size=STEP, decay=1.0, damping=4.0),
        linear(sgld, step_size=STEP, preconditioner=jnp.full((FEATURES, 1), 0.25)),
    ]
    expected = run(plain, key, 5)[-1].variables.params
    for method in others:
        np.testing.assert_allclose(run(method, key, 5)[-1].variables.params, expected, rtol=1e-5, atol=1e-6)


def test_momentum_is_carried_and_starts_from_its_normal(key):
    start = lambda temperature: jax.vmap(lambda k: SAMPLERS["sghmc"](temperature).init(k, None).carried)
    keys = jax.random.split(key, 500)
    for temperature in (1.0, 0.25):  # 10,000 numbers: the sd of their variance is 1.4 %
        momentum = np.asarray(start(temperature)(keys))
        np.testing.assert_allclose(momentum.var(), temperature, rtol=4 * np.sqrt(2 / 10_000))
    state = SAMPLERS["sghmc"]().init(key, None)
    for k in (key, *jax.random.split(key, 4)):
        weights = flat(MODEL.init(k).params)
        assert abs(np.corrcoef(flat(state.carried), weights)[0, 1]) < 0.8, "momentum has a stream of its own"
    cold = jax.jit(linear(sghmc, step_size=TIME, friction=FRICTION, temperature=1e-12).update)
    state = SAMPLERS["sghmc"]().init(key, None)
    moved, _ = cold(state, BATCH, key)
    np.testing.assert_allclose(moved.variables.params, state.variables.params + TIME * state.carried, rtol=1e-6)


def run(method, key, updates):
    """States after each update, the first one first."""
    update, states = jax.jit(method.update), [method.init(key, None)]
    for k in jax.random.split(key, updates):
        states.append(update(states[-1], BATCH, k)[0])
    return states


def test_what_is_kept(key):
    """After 3 updates every second: those after updates 5, 7 and 9 of 10 (counted from 1); of two slots, the last two."""
    states = run(linear(sgld, step_size=1e-4, burn_in=3, every=2, num_samples=2), key, 10)
    assert [int(s.samples.count) for s in states] == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    position = [s.variables.params for s in states]
    np.testing.assert_array_equal(states[-1].samples.params, [position[9], position[7]])
    np.testing.assert_array_equal(states[4].samples.params[0], position[4])  # nothing kept yet: where the chain is


def test_prediction_and_draws_are_the_networks_kept(key):
    method = linear(sgld, step_size=1e-4, burn_in=2, num_samples=4)
    states = run(method, key, 5)
    pred = method.predict(states[-1], BATCH.inputs[:7], None)
    np.testing.assert_array_equal(pred.member_weights, [1, 1, 1, 0])
    for m in range(3):
        np.testing.assert_allclose(
            pred.mean[m], BATCH.inputs[:7] @ states[3 + m].variables.params, rtol=1e-5, atol=1e-6
        )
    drawn = jax.vmap(lambda k: method.draw(states[-1], k).params)(jax.random.split(key, 60))
    found = [int(np.flatnonzero((d == states[-1].samples.params).all((1, 2)))[0]) for d in drawn]
    assert set(found) == {0, 1, 2}
    early = method.predict(states[1], BATCH.inputs[:7], key)
    assert bc.decompose(early).epistemic.max() == 0
    np.testing.assert_allclose(early.pooled_mean(), BATCH.inputs[:7] @ states[1].variables.params, rtol=1e-5, atol=1e-6)


def test_cycles(key, strict):
    """Two cycles of 10: 6 updates without noise, then 4 with; kept after the 8th and the 10th of each."""
    settings = dict(
        step_size=1e-4, cycle_length=10, samples_per_cycle=2, num_samples=4, exploration=0.6, temperature=0.5
    )
    method = cyclical_sgld(MODEL, LIKELIHOOD, num_data=ROWS, prior_precision=PRIOR, **settings)
    states = run(method, key, 20)
    keys = jax.random.split(key, 20)
    for k in range(20):
        w, place = flat(states[k].variables.params), k % 10
        step = 1e-4 / 2 * (np.cos(np.pi * place / 10) + 1)
        w = w + step * gradient(w) + (place >= 6) * np.sqrt(2 * 0.5 * step) * noise(keys[k])
        np.testing.assert_allclose(flat(states[k + 1].variables.params), w, rtol=1e-5, atol=1e-5)
    kept = [k for k in range(1, 21) if states[k].samples.count > states[k - 1].samples.count]
    assert kept == [8, 10, 18, 20]
    np.testing.assert_array_equal(states[-1].samples.params, [states[k].variables.params for k in kept])


def test_an_ensemble_of_chains_with_a_step_each(key):
    """Members are the lone runs, each with its own step size; prediction holds every network of every chain."""
    build = lambda own: linear(sgld, step_size=own, num_samples=3, burn_in=5)
    steps = jnp.array([1e-4, 3e-4])
    both = bc.ensemble(build, settings=steps)
    fitted = bc.fit(both, DATA, key, epochs=4, batch_size=64, progress=False)
    lone = bc.fit(build(3e-4), DATA, jax.random.fold_in(key, 1), epochs=4, batch_size=64, progress=False)
    np.testing.assert_allclose(fitted.state.members.samples.params[1], lone.state.samples.params, rtol=1e-4, atol=1e-5)
    assert fitted.state.members.samples.count.tolist() == [11, 11]  # 16 updates, the first 5 dropped
    pred = bc.predict(both, fitted.state, DATA.inputs[:5], key)
    assert pred.mean.shape == (6, 5, 1)
    np.testing.assert_allclose(pred.mean[3:], DATA.inputs[:5] @ lone.state.samples.params, rtol=1e-3, atol=1e-4)


def test_start_penalty_and_schedule(key):
    """A chain starts at a trained network; a penalty in nats of the whole data and a schedule of steps enter once."""
    start = bc.Variables(jnp.full((FEATURES, 1), 0.5))
    base = MODEL.train
    model = MODEL._replace(train=lambda v, x, k: (*base(v, x, k)[:2], 7.0 * jnp.sum(v.params)))
    settings = dict(num_data=ROWS, prior_precision=PRIOR, num_samples=1, burn_in=0, temperature=1e-12)
    method = sgld(model, LIKELIHOOD, step_size=lambda step: 1e-4 / (1 + step), **settings)
    state = method.init(key, start)
    w = flat(start.params)
    for step in range(2):
        state, _ = method.update(state, BATCH, key)
        w = w + 1e-4 / (1 + step) * (gradient(w) - 7)
        np.testing.assert_allclose(flat(state.variables.params), w, rtol=1e-5, atol=1e-5)
    again = linear(sghmc, step_size=TIME, friction=FRICTION).init(key, state)
    np.testing.assert_array_equal(again.variables.params, state.variables.params)
    assert again.samples.count == again.step == 0


def test_steps_in_float32_do_not_widen_bfloat16(key):
    narrow = MODEL._replace(init=lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.init(key)))
    settings = dict(num_data=ROWS, prior_precision=PRIOR, num_samples=2, burn_in=0)
    for method in (
        sgld(narrow, LIKELIHOOD, step_size=lambda step: jnp.float32(1e-4), **settings),
        sghmc(narrow, LIKELIHOOD, step_size=lambda step: jnp.float32(1e-3), friction=jnp.float32(9.0), **settings),
    ):
        state = method.init(key, None)
        new, _ = jax.eval_shape(method.update, state, BATCH, key)
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_nan_stays(key):
    """A row that is not finite spoils the chain for good, of which `fit` then takes note; it never becomes a number."""
    method = linear(sgld, step_size=1e-4)
    state, info = method.update(method.init(key, None), BATCH._replace(inputs=BATCH.inputs.at[3, 2].set(jnp.nan)), key)
    assert np.isnan(info["loss"]) and np.isnan(state.variables.params).all() and np.isnan(state.samples.params).all()


WRONG = {
    "num_data": (sgld, {"num_data": 0}, "must be positive, got 0"),
    "step_size": (sgld, {"step_size": -1.0}, "must be positive, got -1.0"),
    "temperature": (sgld, {"temperature": 0.0}, "must be positive, got 0.0"),
    "prior_precision": (sgld, {"prior_precision": -1.0}, "must not be negative, got -1.0"),
    "num_samples": (sgld, {"num_samples": 0}, "must be a whole number of at least 1, got 0"),
    "burn_in": (sgld, {"burn_in": -1}, "must be a whole number of at least 0, got -1"),
    "every": (sgld, {"every": 0}, "must be a whole number of at least 1, got 0"),
    "preconditioner": (sgld, {"preconditioner": jnp.zeros((20, 1))}, "must be positive, got a least value of 0.0"),
    "friction": (sghmc, {"friction": -2.0}, "must be positive, got -2.0"),
    "decay": (psgld, {"decay": 1.5}, "must be at most 1, got 1.5"),
    "damping": (psgld, {"damping": 0.0}, "must be positive, got 0.0"),
    "cycle_length": (cyclical_sgld, {"cycle_length": 2.5}, "must be a whole number of at least 1, got 2.5"),
    "samples_per_cycle": (cyclical_sgld, {"samples_per_cycle": 3}, "must be at most the 2 updates of a cycle"),
    "exploration": (cyclical_sgld, {"exploration": 1.0}, r"must be in \[0, 1\), got 1.0"),
}
CYCLES = {"cycle_length": 10, "samples_per_cycle": 1}


@pytest.mark.parametrize("name", WRONG)
def test_bad_settings(name, unchecked):
    build, wrong, message = WRONG[name]
    own = {cyclical_sgld: CYCLES, sghmc: {"burn_in": 0, "friction": 1.0}}.get(build, {"burn_in": 0})
    settings = dict(num_data=ROWS, step_size=1e-4, prior_precision=1.0, num_samples=2) | own | wrong
    with pytest.raises(ValueError, match=rf"^`{name}` .*{message}.*\. [A-Z0-9]"):
        build(MODEL, LIKELIHOOD, **settings)


def test_settings_of_several_numbers_are_refused(unchecked):
    settings = dict(num_data=ROWS, step_size=1e-4, num_samples=2, burn_in=0)
    with pytest.raises(ValueError, match=r"`prior_precision` must be one number, got shape \(20,\)\. Give one"):
        sgld(MODEL, LIKELIHOOD, prior_precision=np.ones(20), **settings)


def test_a_preconditioner_unlike_the_params(key):
    method = linear(sgld, step_size=1e-4, preconditioner=jnp.ones(FEATURES))
    with pytest.raises(ValueError, match=r"^`preconditioner` must be .* like the params, \(20, 1\), got \(20,\)\. Map"):
        method.init(key, None)


def test_a_chain_that_was_cut_off_goes_on_to_the_same_bits(key, tmp_path):
    """Momentum and samples are saved: the last epoch's checkpoint is taken away, and the epoch made again."""
    method = linear(sghmc, step_size=TIME, friction=FRICTION, num_samples=3, burn_in=2)

    def fit():
        checkpoint = bc.Checkpoint(tmp_path, every=1)
        return bc.fit(method, DATA, key, epochs=3, batch_size=64, progress=False, checkpoint=checkpoint)

    whole = fit()
    shutil.rmtree(tmp_path / "steps" / "3")
    again = fit()
    assert again.seconds["epochs"] == 1 and again.state.samples.count == 10
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)


@pytest.mark.slow
def test_classes(key):
    """Chains of a classifier find the classes, and their networks differ."""
    settings = dict(num_data=30, step_size=3e-3, num_samples=20, burn_in=200, every=30, prior_precision=1.0)
    both, data = bc.ensemble(sgld(pure_model(), bc.Categorical, **settings), 2), blobs()
    fitted = bc.fit(both, data, key, epochs=400, batch_size=15, progress=False)
    pred = bc.predict(both, fitted.state, data.inputs, key)
    assert pred.logits.shape == (40, 30, 3)
    assert (np.asarray(bc.pool(pred).log_probs()).argmax(-1) == data.targets).mean() > 0.9
    assert bc.decompose(pred).epistemic.min() > 0
