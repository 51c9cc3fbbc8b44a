"""Orders of calibrating and pooling, stacking, and calibrators with a posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp

import bayescal as bc
from bayescal import calibrate
from bayescal.calibrate.calibrator import Calibrator
from bayescal.decompose import mutual_information

pytestmark = pytest.mark.core
KEY = jax.random.key(3)


def problem(seed=0, rows=1500, members=4, spread=1.5, sharpness=1.7):
    """Members that are over-confident and differ, labels from what they have in common. One shape compiles once."""
    rng = np.random.default_rng(seed)
    common = 1.5 * rng.normal(size=(rows, 3))
    targets = (common + rng.gumbel(size=common.shape)).argmax(1).astype(np.int32)
    logits = sharpness * (common + spread * rng.normal(size=(members, rows, 3)))
    return bc.Categorical(logits.astype(np.float32)), targets


def nll(logits, targets, member_weights, temperature):
    """Mean nll of the weighted pool of members at one temperature, in float64."""
    chosen = [log_softmax(z / temperature, axis=1)[range(len(targets)), targets] for z in logits]
    return -logsumexp(chosen, axis=0, b=np.reshape(member_weights, (-1, 1))).mean()


@pytest.fixture(scope="module")
def rows():
    return problem()


@pytest.fixture(scope="module", params=[calibrate.fit_members_then_pool, calibrate.fit_joint_temperature])
def order(request, rows):
    return request.param, request.param(*rows)


def test_equal_the_oracle(rows):
    pred, targets = rows
    logits = np.asarray(pred.logits, np.float64)
    best = lambda some, shares: (
        minimize_scalar(
            lambda t: nll(some, targets, shares, np.exp(t)), bounds=(-2, 4), method="bounded", options={"xatol": 1e-7}
        ).x
    )
    joint = calibrate.fit_joint_temperature(pred, targets)
    np.testing.assert_allclose(np.log(joint.temperature), best(logits, np.full(4, 1 / 4)), atol=2e-4)
    apart = calibrate.fit_members_then_pool(pred, targets)
    np.testing.assert_allclose(np.log(apart.temperatures), [best(logits[m : m + 1], [1]) for m in range(4)], atol=2e-4)
    assert 0 <= float(joint.gradient) < 1e-6 and 0 <= float(apart.gradient) < 1e-6
    shares = np.array([0.6, 0.3, 0.1, 0.0])
    weighted = calibrate.fit_joint_temperature(bc.Categorical(pred.logits, shares.astype(np.float32)), targets)
    np.testing.assert_allclose(np.log(weighted.temperature), best(logits, shares), atol=2e-4)


def test_orders_agree_where_members_do():
    pred, targets = problem(members=1)
    same = bc.Categorical(np.repeat(pred.logits, 4, 0))
    expected = float(bc.fit_temperature(pred, targets).temperature)
    for one in (pred, same):
        np.testing.assert_allclose(calibrate.fit_joint_temperature(one, targets).temperature, expected, rtol=1e-4)
        np.testing.assert_allclose(calibrate.fit_members_then_pool(one, targets).temperatures, expected, rtol=1e-4)
        np.testing.assert_allclose(bc.fit_temperature(one, targets).temperature, expected, rtol=1e-4)


def test_pool_of_calibrated_members_is_under_confident(rows):
    """T_m near 4 each, and then the pool wants a T well below 1; pooled first, or jointly, it does not."""
    pred, targets = rows
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
    assert pooled["members"].num_members == pooled["joint"].num_members == 4
    nlls = {n: float(-p.log_prob(targets).mean()) for n, p in pooled.items()}
    assert nlls["joint"] < nlls["members"] and nlls["pool"] < nlls["members"]


def test_dead_members_and_families(rows):
    pred, targets = rows
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
def test_traces_and_weighs(fit, rows):
    pred, targets = rows
    weights = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], 500)).astype(np.float32)
    spoiled = bc.Categorical(jnp.where((weights == 0)[None, :, None], jnp.nan, pred.logits))  # they may hold anything
    plain, traced = fit(spoiled, targets, weights=weights), jax.jit(fit)(spoiled, targets, weights=weights)
    again = np.repeat(np.arange(len(targets)), weights.astype(int))
    repeated = fit(bc.take(pred, again), targets[again])
    for other in (traced, repeated):
        for a, b in zip(jax.tree.leaves(plain)[:1], jax.tree.leaves(other)[:1], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    choose = lambda *given, **weigh: calibrate.fit_member_selection(*given, num_members=3, **weigh)
    chosen, same = choose(spoiled, targets, weights=weights), choose(bc.take(pred, again), targets[again])
    np.testing.assert_array_equal(chosen.order, same.order)
    np.testing.assert_allclose(chosen.nll, same.nll, rtol=1e-5)


def test_taken_apart_and_chained(order, rows):
    """What keeps members decomposes, and weights of members chain with what calibrates the pool."""
    pred, targets = rows
    inside = order[1](pred)
    parts = bc.decompose(inside)
    np.testing.assert_allclose(parts.epistemic, mutual_information(inside), rtol=1e-5)
    np.testing.assert_allclose(parts.total, inside.entropy(), atol=1e-5)
    assert (parts.epistemic > 0).all() and np.isfinite(parts.ood).all()
    for fitted in (
        calibrate.fit_stacking(pred, targets),
        calibrate.fit_member_selection(pred, targets, num_members=2),
    ):
        assert isinstance(fitted, Calibrator) and not fitted.accuracy_preserving and not fitted.needs
        scaler = bc.fit_temperature(fitted(pred), targets)
        chain = bc.compose(fitted, scaler)
        np.testing.assert_allclose(chain(pred).log_probs(), scaler(fitted(pred)).log_probs())


def test_order_errors(order, rows, unchecked):
    (fit, fitted), (pred, targets) = order, rows
    with pytest.raises(ValueError, match=r"`pred` must have its members, got 1, pooled already.*fit_temperature"):
        fit(bc.pool(pred), targets)
    with pytest.raises(ValueError, match="`pred` must have the 4 members, got 1, pooled already"):
        fitted(bc.pool(pred))
    with pytest.raises(ValueError, match="`pred` must have the 4 members, got 3"):
        fitted(bc.Categorical(pred.logits[:3]))
    normals = bc.Gaussian(np.zeros((4, 3, 1), np.float32), np.ones((4, 3, 1), np.float32))
    for use in (lambda: fit(normals, targets), lambda: fitted(normals)):
        with pytest.raises(TypeError, match="`pred` must be a predictive over classes"):
            use()
    # Bad rows: none, one class, NaN.
    with pytest.raises(ValueError, match="`targets` must have at least one row"):
        fit(bc.Categorical(pred.logits[:, :0]), targets[:0])
    with pytest.raises(ValueError, match="`targets` must leave a finite best temperature"):
        fit(pred, np.zeros_like(targets))
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        fit(bc.Categorical(jnp.asarray(pred.logits[:, :60]).at[:, 3].set(jnp.nan)), targets[:60])


def test_separable_members(rows, unchecked):
    pred, _ = rows
    top = np.asarray(pred.logits[1]).argmax(-1).astype(np.int32)
    with pytest.raises(ValueError, match=r"`targets` must leave a finite best temperature, got none for members \[1\]"):
        calibrate.fit_members_then_pool(pred, top)
    with pytest.raises(ValueError, match="got none for the pool"):
        calibrate.fit_joint_temperature(bc.Categorical(np.repeat(pred.logits[1:2], 4, 0)), top)


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_members_of_any_scale(rows, scale):
    """T goes with the logits, beyond any bound of a search."""
    pred, targets = rows
    apart = calibrate.fit_members_then_pool(pred, targets).temperatures
    scaled = calibrate.fit_members_then_pool(bc.Categorical(pred.logits * np.float32(scale)), targets).temperatures
    np.testing.assert_allclose(
        scaled / scale, apart, rtol=0.02 if scale < 1 else 1e-4
    )  # log p has no digits left for 1e-5


def test_stacking_is_the_optimum():
    """Against SLSQP in float64, with a useless member; a number by hand; EM's gap bounds what is missing."""
    pred, targets = problem(members=3)
    noise = np.random.default_rng(2).normal(size=(1, 1500, 3)).astype(np.float32) * 5
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


def test_stacking_of_densities_and_errors(rows, unchecked):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(1500, 1)).astype(np.float32)
    pred = bc.Gaussian(
        np.zeros((2, 1500, 1), np.float32), np.stack([np.ones((1500, 1)), np.full((1500, 1), 25.0)]).astype("f")
    )
    assert calibrate.fit_stacking(pred, y).member_weights[0] > 0.97
    pred, targets = rows
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
    more = calibrate.fit_bayesian_temperature(pred, targets, prior_scale=0.7, weights=np.full(60, 1e4, np.float32))
    np.testing.assert_allclose(np.exp(more.mean()), bc.fit_temperature(pred, targets).temperature, rtol=1e-3)
    parts = bc.decompose(fitted(pred))  # all its own uncertainty is epistemic
    np.testing.assert_allclose(parts.epistemic, mutual_information(fitted(pred)), rtol=1e-5)
    np.testing.assert_allclose(parts.total, -(averaged * np.log(averaged)).sum(1), atol=1e-4)
    assert 0 < bc.decompose(more(pred)).epistemic.mean() < parts.epistemic.mean() / 1000


@pytest.mark.slow
def test_bayesian_temperature_of_many_rows():
    pred, targets = problem(rows=20_000, members=1)
    fitted = [calibrate.fit_bayesian_temperature(bc.take(pred, np.arange(n)), targets[:n]) for n in (200, 20_000)]
    np.testing.assert_allclose(fitted[0].std() / fitted[1].std(), 10, rtol=0.3)
    np.testing.assert_allclose(np.exp(fitted[1].mean()), bc.fit_temperature(pred, targets).temperature, rtol=1e-3)
    epistemic = [float(mutual_information(f(pred)).mean()) for f in fitted]
    assert 0 < epistemic[1] < epistemic[0] / 30


def test_bayesian_vector():
    """Recovers a known map within four posterior deviations, which are those of the Fisher information."""
    rng = np.random.default_rng(0)
    true = 1.5 * rng.normal(size=(2000, 3))
    true -= true.mean(1, keepdims=True)
    targets = (true + rng.gumbel(size=true.shape)).argmax(1).astype(np.int32)
    given = (true - [0.3, 0.0, -0.3]) / np.array([0.5, 0.5, 0.5])
    pred = bc.Categorical(given.astype(np.float32)[None])
    fitted = calibrate.fit_bayesian_vector(KEY, pred, targets, num_draws=400)
    assert float(fitted.gradient) < 1e-6
    scales, offsets = np.asarray(fitted.scales), np.asarray(fitted.offsets)
    assert (abs(fitted.mode[0] - 0.5) < 4 * scales.std(0)).all() and (scales.std(0) < 0.06).all()
    apart, expected = offsets - offsets.mean(1, keepdims=True), np.array([0.3, 0, -0.3])  # a common shift does nothing
    assert (abs(apart.mean(0) - expected) < 4 * apart.std(0)).all()
    few = calibrate.fit_bayesian_vector(KEY, pred, targets, num_draws=400, weights=np.full(2000, 0.01, np.float32))
    epistemic = [bc.decompose(f(pred)).epistemic.mean() for f in (few, fitted)]
    assert epistemic[0] > 10 * epistemic[1] > 0
    with pytest.raises(ValueError, match="`pred` must have the 3 classes of the fit, got 2"):
        fitted(bc.Categorical(np.zeros((1, 5, 2), np.float32)))


def test_bayesian_errors(unchecked):
    pred, targets = problem(rows=60, members=1)
    with pytest.raises(ValueError, match="`prior_scale` must be positive and finite, got 0"):
        calibrate.fit_bayesian_vector(KEY, pred, targets, prior_scale=0)
    for scale in (0, 20):
        with pytest.raises(ValueError, match=rf"`prior_scale` must lie in \(0, 10\], of log T, got {scale}"):
            calibrate.fit_bayesian_temperature(pred, targets, prior_scale=scale)
    for number in (3, 5.5):
        with pytest.raises(ValueError, match=f"`num_nodes` must be a whole number of at least 5, got {number}"):
            calibrate.fit_bayesian_temperature(pred, targets, num_nodes=number)
    for number in (0, 0.5):
        with pytest.raises(ValueError, match=f"`num_draws` must be a whole number of at least 1, got {number}"):
            calibrate.fit_bayesian_vector(KEY, pred, targets, num_draws=number)
    steep = bc.Categorical(np.asarray(pred.logits) * np.float32(1e4))
    with pytest.raises(ValueError, match="`pred` must let the fit converge, got a derivative"):
        calibrate.fit_bayesian_vector(KEY, steep, targets)
    impossible = bc.Categorical(jnp.asarray(pred.logits).at[:, 0, targets[0]].set(-jnp.inf))
    with pytest.raises(ValueError, match="`pred` must give every class a positive probability"):
        calibrate.fit_bayesian_vector(KEY, impossible, targets)
    with pytest.raises(ValueError, match="`targets` must have positive probability"):
        calibrate.fit_bayesian_temperature(impossible, targets)
    separable = np.asarray(pred.log_probs()).argmax(-1).astype(np.int32)
    assert np.isfinite(calibrate.fit_bayesian_temperature(pred, separable).mean())  # the prior holds it
