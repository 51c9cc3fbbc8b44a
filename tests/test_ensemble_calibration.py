"""Orders of calibrating and pooling, stacking, and calibrators with a posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import softmax
from scipy.optimize import minimize, minimize_scalar

import bayescal as bc
from bayescal import calibrate
from bayescal.decompose import mutual_information

pytestmark = pytest.mark.core
KEY = jax.random.key(3)


def problem(seed=0, rows=1500, members=4, spread=1.5, sharpness=1.7):
    """Members that are over-confident and differ, labels from what they have in common."""
    rng = np.random.default_rng(seed)
    common = 1.5 * rng.normal(size=(rows, 3))
    targets = (common + rng.gumbel(size=common.shape)).argmax(1).astype(np.int32)
    logits = sharpness * (common + spread * rng.normal(size=(members, rows, 3)))
    return bc.Categorical(logits.astype(np.float32)), targets


def nll(logits, targets, member_weights, temperature):
    """Mean nll of the weighted pool of members at one temperature, in a loop."""
    total = 0.0
    for i, y in enumerate(targets):
        total -= np.log(sum(w * softmax(z[i] / temperature)[y] for w, z in zip(member_weights, logits, strict=True)))
    return total / len(targets)


def test_equal_the_oracle():
    pred, targets = problem(rows=150, members=3)
    logits = np.asarray(pred.logits, np.float64)
    best = lambda some, shares: (
        minimize_scalar(
            lambda t: nll(some, targets, shares, np.exp(t)), bounds=(-2, 4), method="bounded", options={"xatol": 1e-7}
        ).x
    )
    joint = calibrate.fit_joint_temperature(pred, targets)
    np.testing.assert_allclose(np.log(joint.temperature), best(logits, np.full(3, 1 / 3)), atol=2e-4)
    apart = calibrate.fit_members_then_pool(pred, targets)
    np.testing.assert_allclose(np.log(apart.temperatures), [best(logits[m : m + 1], [1]) for m in range(3)], atol=2e-4)
    assert abs(float(joint.gradient)) < 1e-6 and (abs(apart.gradients) < 1e-6).all()
    shares = np.array([0.7, 0.3, 0.0])
    weighted = calibrate.fit_joint_temperature(bc.Categorical(pred.logits, shares.astype(np.float32)), targets)
    np.testing.assert_allclose(np.log(weighted.temperature), best(logits, shares), atol=2e-4)


def test_orders_agree_where_members_do():
    pred, targets = problem(members=1)
    same = bc.Categorical(np.repeat(pred.logits, 3, 0))
    expected = float(bc.fit_temperature(pred, targets).temperature)
    for one in (pred, same):
        np.testing.assert_allclose(calibrate.fit_joint_temperature(one, targets).temperature, expected, rtol=1e-4)
        np.testing.assert_allclose(calibrate.fit_members_then_pool(one, targets).temperatures, expected, rtol=1e-4)
        np.testing.assert_allclose(bc.fit_temperature(one, targets).temperature, expected, rtol=1e-4)


def test_pool_of_calibrated_members_is_under_confident():
    """T_m near 4 each, and then the pool wants a T well below 1; pooled first, or jointly, it does not."""
    pred, targets = problem(rows=4000, members=5)
    pooled = {
        "members": calibrate.fit_members_then_pool(pred, targets)(pred),
        "joint": calibrate.fit_joint_temperature(pred, targets)(pred),
        "pool": bc.fit_temperature(pred, targets)(pred),
    }
    gap = {n: float((p.top_label()[0] - (p.top_label()[1] == targets)).mean()) for n, p in pooled.items()}
    again = {n: float(bc.fit_temperature(p, targets).temperature) for n, p in pooled.items()}
    assert gap["members"] < -0.1 and again["members"] < 0.7
    assert 3 * abs(gap["pool"]) < -gap["members"] and abs(again["pool"] - 1) < 1e-3
    assert 3 * abs(gap["joint"]) < -gap["members"]
    assert pooled["members"].num_members == pooled["joint"].num_members == 5  # decompose still sees them
    nlls = {n: float(-p.log_prob(targets).mean()) for n, p in pooled.items()}
    assert nlls["joint"] < nlls["members"] and nlls["pool"] < nlls["members"]


def test_dead_members_and_families():
    pred, targets = problem()
    alive = np.array([1, 1, 0, 1], np.float32)
    dead = bc.Categorical(jnp.asarray(pred.logits).at[2].set(jnp.nan), alive)
    three = bc.Categorical(pred.logits[[0, 1, 3]])
    apart, joint = calibrate.fit_members_then_pool(dead, targets), calibrate.fit_joint_temperature(dead, targets)
    np.testing.assert_allclose(apart.temperatures[2], 1)
    expected = calibrate.fit_joint_temperature(three, targets)
    np.testing.assert_allclose(joint.temperature, expected.temperature, rtol=1e-4)
    np.testing.assert_allclose(joint(dead).pooled_mean(), expected(three).pooled_mean(), atol=1e-5)
    assert np.isfinite(apart(dead).pooled_mean()).all()
    two = bc.Bernoulli(pred.logits[..., 1] - pred.logits[..., 0])
    labels = (targets == 1).astype(np.int32)
    for fit in (calibrate.fit_joint_temperature, calibrate.fit_members_then_pool):
        bernoulli, categorical = fit(two, labels)(two), fit(two.as_categorical(), labels)(two.as_categorical())
        assert isinstance(bernoulli, bc.Bernoulli)
        np.testing.assert_allclose(bernoulli.pooled_mean(), categorical.pooled_mean()[:, 1], atol=1e-5)


@pytest.mark.parametrize(
    "fit", [calibrate.fit_joint_temperature, calibrate.fit_members_then_pool, calibrate.fit_stacking]
)
def test_traces_and_weighs(fit):
    pred, targets = problem(rows=300)
    weights = np.random.default_rng(1).integers(0, 3, len(targets)).astype(np.float32)
    plain, traced = fit(pred, targets, weights=weights), jax.jit(fit)(pred, targets, weights=weights)
    rows = np.repeat(np.arange(len(targets)), weights.astype(int))
    repeated = fit(bc.take(pred, rows), targets[rows])
    for other in (traced, repeated):
        for a, b in zip(jax.tree.leaves(plain)[:1], jax.tree.leaves(other)[:1], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_order_errors(unchecked):
    pred, targets = problem(rows=60)
    for fit in (calibrate.fit_members_then_pool, calibrate.fit_joint_temperature):
        with pytest.raises(ValueError, match=r"`pred` must have its members, got 1, pooled already.*fit_temperature"):
            fit(bc.pool(pred), targets)
        with pytest.raises(ValueError, match="`pred` must have the 4 members, got 1, pooled already"):
            fit(pred, targets)(bc.pool(pred))
        with pytest.raises(ValueError, match="`pred` must have the 4 members, got 3"):
            fit(pred, targets)(bc.Categorical(pred.logits[:3]))
        with pytest.raises(TypeError, match="`pred` must be a predictive over classes"):
            fit(bc.Gaussian(np.zeros((1, 3, 1), np.float32), np.ones((1, 3, 1), np.float32)), targets)
        with pytest.raises(TypeError, match="`pred` must be a predictive over classes"):
            fit(pred, targets)(bc.Gaussian(np.zeros((4, 3, 1), np.float32), np.ones((4, 3, 1), np.float32)))
    top = np.asarray(pred.logits[1]).argmax(-1).astype(np.int32)
    with pytest.raises(ValueError, match=r"`targets` must leave a finite best temperature, got none for members \[1\]"):
        calibrate.fit_members_then_pool(pred, top)
    with pytest.raises(ValueError, match="got none for the pool"):
        calibrate.fit_joint_temperature(bc.Categorical(pred.logits[1:2]), top)


def test_stacking_is_the_optimum():
    """Against SLSQP in float64, with a useless member; a number by hand; EM's gap bounds what is missing."""
    pred, targets = problem(rows=400, members=3)
    noise = np.random.default_rng(2).normal(size=(1, 400, 3)).astype(np.float32) * 5
    pred = bc.Categorical(np.concatenate([pred.logits, noise]))
    probs = np.exp(np.asarray(pred.member_log_prob(targets), np.float64))
    objective = lambda w: -np.log(w @ probs).mean()
    best = minimize(
        objective, np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}
    )
    stacking = calibrate.fit_stacking(pred, targets)
    assert float(stacking.nll) <= best.fun + 2e-5 and 0 <= float(stacking.gap) + 1e-6 <= 2e-5
    np.testing.assert_allclose(stacking.member_weights, best.x, atol=5e-3)
    assert stacking.member_weights.argmin() == 3
    np.testing.assert_allclose(-stacking(pred).log_prob(targets).mean(), stacking.nll, rtol=1e-5)
    # Targets have (.8, .2) under one member and (.2, .6) under the other: (.2 + .6 w)(.6 - .4 w) is largest at w = 7 / 12.
    hand = bc.Probabilities(np.array([[[0.8, 0.2], [0.2, 0.8]], [[0.2, 0.8], [0.6, 0.4]]], np.float32))
    np.testing.assert_allclose(
        calibrate.fit_stacking(hand, np.array([0, 0])).member_weights, [7 / 12, 5 / 12], atol=5e-3
    )


def test_stacking_of_densities_and_errors(unchecked):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(500, 1)).astype(np.float32)
    pred = bc.Gaussian(
        np.zeros((2, 500, 1), np.float32), np.stack([np.ones((500, 1)), np.full((500, 1), 25.0)]).astype("f")
    )
    assert calibrate.fit_stacking(pred, y).member_weights[0] > 0.97
    pred, targets = problem(rows=50)
    with pytest.raises(ValueError, match="`pred` must have members to weigh, got 1"):
        calibrate.fit_stacking(bc.pool(pred), targets)
    with pytest.raises(ValueError, match="`member_weights` must be equal or 0"):
        calibrate.fit_stacking(bc.Categorical(pred.logits, np.array([1, 2, 1, 1], np.float32)), targets)
    impossible = bc.Categorical(jnp.asarray(pred.logits).at[:, 0, targets[0]].set(-jnp.inf))
    with pytest.raises(ValueError, match="`targets` must have positive probability"):
        calibrate.fit_stacking(impossible, targets)
    dead = bc.Categorical(jnp.asarray(pred.logits).at[2].set(jnp.nan), np.array([1, 1, 0, 1], np.float32))
    stacking = calibrate.fit_stacking(dead, targets)
    assert stacking.member_weights[2] == 0 and np.isfinite(stacking(dead).pooled_mean()).all()
    with pytest.raises(ValueError, match="`pred` must have the 4 members"):
        stacking(bc.pool(pred))


def test_bayesian_temperature_is_the_posterior():
    """Moments against a fine grid in float64; mean near the optimum, spread as 1 / sqrt(rows), all epistemic."""
    pred, targets = problem(rows=60, members=1)
    fitted = calibrate.fit_bayesian_temperature(pred, targets, prior_scale=0.7)
    grid = np.linspace(-3, 4, 1401)
    log_probs = np.asarray(pred.log_probs(), np.float64)
    scaled = log_probs[None] / np.exp(grid)[:, None, None]
    scaled -= np.log(np.exp(scaled).sum(-1, keepdims=True))
    log_posterior = scaled[:, np.arange(60), targets].sum(1) - 0.5 * (grid / 0.7) ** 2
    masses = np.exp(log_posterior - log_posterior.max())
    masses /= masses.sum()
    mean = masses @ grid
    np.testing.assert_allclose(fitted.mean(), mean, atol=1e-4)
    np.testing.assert_allclose(fitted.std(), np.sqrt(masses @ (grid - mean) ** 2), rtol=1e-3)
    averaged = np.einsum("t,tnk->nk", masses, np.exp(scaled))
    np.testing.assert_allclose(fitted(pred).pooled_mean(), averaged, atol=1e-5)
    pred, targets = problem(rows=20_000, members=1)
    fitted = [calibrate.fit_bayesian_temperature(bc.take(pred, np.arange(n)), targets[:n]) for n in (200, 20_000)]
    np.testing.assert_allclose(fitted[0].std() / fitted[1].std(), 10, rtol=0.3)
    np.testing.assert_allclose(np.exp(fitted[1].mean()), bc.fit_temperature(pred, targets).temperature, rtol=1e-3)
    epistemic = [float(mutual_information(f(pred)).mean()) for f in fitted]
    assert 0 < epistemic[1] < epistemic[0] / 30


def test_bayesian_vector():
    """Recovers a known map within four posterior deviations, which are those of the Fisher information."""
    rng = np.random.default_rng(0)
    true = 1.5 * rng.normal(size=(8000, 3))
    true -= true.mean(1, keepdims=True)
    targets = (true + rng.gumbel(size=true.shape)).argmax(1).astype(np.int32)
    given = (true - [0.3, 0.0, -0.3]) / np.array([0.5, 0.5, 0.5])
    pred = bc.Categorical(given.astype(np.float32)[None])
    fitted = calibrate.fit_bayesian_vector(KEY, pred, targets, num_draws=400)
    assert float(fitted.gradient) < 1e-6
    scales, offsets = np.asarray(fitted.scales), np.asarray(fitted.offsets)
    assert (abs(fitted.mode[0] - 0.5) < 4 * scales.std(0)).all() and (scales.std(0) < 0.03).all()
    apart, expected = offsets - offsets.mean(1, keepdims=True), np.array([0.3, 0, -0.3])  # a common shift does nothing
    assert (abs(apart.mean(0) - expected) < 4 * apart.std(0)).all()
    few = calibrate.fit_bayesian_vector(KEY, bc.take(pred, np.arange(80)), targets[:80], num_draws=400)
    assert mutual_information(few(pred)).mean() > 10 * mutual_information(fitted(pred)).mean()


def test_bayesian_errors(unchecked):
    pred, targets = problem(rows=50)
    for fit in (
        calibrate.fit_bayesian_temperature,
        lambda *args, **given: calibrate.fit_bayesian_vector(KEY, *args, **given),
    ):
        with pytest.raises(ValueError, match="`prior_scale` must be positive and finite, got 0"):
            fit(pred, targets, prior_scale=0)
    with pytest.raises(ValueError, match="`num_nodes` must be at least 5, got 3"):
        calibrate.fit_bayesian_temperature(pred, targets, num_nodes=3)
    with pytest.raises(ValueError, match="`num_draws` must be positive"):
        calibrate.fit_bayesian_vector(KEY, pred, targets, num_draws=0)
    impossible = bc.Categorical(jnp.asarray(pred.logits).at[:, 0, targets[0]].set(-jnp.inf))
    with pytest.raises(ValueError, match="`pred` must give every class a positive probability"):
        calibrate.fit_bayesian_vector(KEY, impossible, targets)
    with pytest.raises(ValueError, match="`targets` must have positive probability"):
        calibrate.fit_bayesian_temperature(impossible, targets)
    separable = np.asarray(pred.log_probs()).argmax(-1).astype(np.int32)
    assert np.isfinite(calibrate.fit_bayesian_temperature(pred, separable).mean())  # the prior holds it
