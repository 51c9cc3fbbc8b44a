"""Temperature scaling: the optimum itself, its peers, other objectives, and where there is none."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import softmax
from scipy.optimize import brentq, minimize_scalar
from test_metrics import REFERENCE

import bayescal as bc
from bayescal.calibrate import Temperature, clip_probabilities, fit_temperature
from bayescal.metrics import (
    accuracy_versus_uncertainty,
    accuracy_versus_uncertainty_loss,
    equal_mass_calibration_error,
    soft_accuracy_versus_uncertainty_loss,
    soft_binned_calibration_error,
)
from bayescal.metrics.whole import whole
from bayescal.types import Metric

pytestmark = pytest.mark.core


def sample(temperature, rows=2000, classes=5, seed=0, scale=2.0):
    """Logits and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(rows, classes))).astype(np.float32)
    targets = (logits.astype(np.float64) / temperature + rng.gumbel(size=logits.shape)).argmax(1)
    return logits, targets.astype(np.int32)


def probabilities(logits, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    e = np.exp(scaled - scaled.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def moment(logits, targets, temperature, weights=None):
    """mean(E_p[z] - z_y) in float64: zero at the optimum."""
    z = np.asarray(logits, np.float64)
    expected = (probabilities(z, temperature) * z).sum(1)
    return np.average(expected - z[np.arange(len(z)), targets], weights=weights)


def optimum(logits, targets, weights=None):
    """Root of the moment in float64."""
    return math.exp(brentq(lambda t: moment(logits, targets, math.exp(t), weights), -14, 14, xtol=1e-13))


def least(loss):
    """argmin over T of a function in float64: a grid, then a bounded search about the best of it."""
    grid = np.linspace(math.log(1e-3), math.log(1e3), 139)
    best = grid[int(np.argmin([loss(math.exp(t)) for t in grid]))]
    found = minimize_scalar(
        lambda t: loss(math.exp(t)), bounds=(best - 0.1, best + 0.1), method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(found.x)


@pytest.mark.parametrize("true", [0.02, 0.4, 1.7, 30.0])
def test_recovers_a_known_temperature(true):
    """Within four standard errors of log T: 1 / (T sqrt(n mean Var_p[z / T] / T^2)) = 1 / sqrt(n mean Var_p[z / T])."""
    logits, targets = sample(true, rows=40_000, scale=2 * true)
    probs, scaled = probabilities(logits, true), logits / np.float64(true)
    variance = ((probs * scaled**2).sum(1) - (probs * scaled).sum(1) ** 2).mean()
    scaler = fit_temperature(bc.Categorical(logits[None]), targets)
    assert abs(math.log(float(scaler.temperature) / true)) < 4 / math.sqrt(40_000 * variance)


@pytest.mark.parametrize("scale", [1e-2, 1, 300])
@pytest.mark.parametrize("rows", [2000, 40_000])  # one block, and several of which the last reaches back
def test_the_moment_condition_holds(scale, rows):
    """Whatever the logits' unit, in float64, to 1e-6 of it; and T is the float64 root."""
    logits, targets = sample(1.7, rows=rows)
    weights = np.random.default_rng(1).integers(0, 4, rows).astype(np.float32)
    logits = logits * np.float32(scale)
    scaler = fit_temperature(bc.Categorical(logits[None]), targets, weights=weights)
    temperature = float(scaler.temperature)
    assert abs(moment(logits, targets, temperature, weights)) < 1e-6 * max(scale, 1e-2)
    assert abs(float(scaler.gradient)) < 1e-6 * max(scale, 1)
    np.testing.assert_allclose(temperature, optimum(logits, targets, weights), rtol=3e-6 if scale >= 1 else 1e-4)
    assert 3 <= int(scaler.iterations) <= 12


def test_two_classes_by_hand():
    """|z| = m and accuracy a: T = m / logit(a); here m = 2, a = 3/4. One logit says the same."""
    targets = np.array([1, 1, 1, 0])
    by_hand = 2 / math.log(3)
    for pred in (
        bc.Bernoulli(np.full((1, 4), 2, np.float32)),
        bc.Categorical(np.tile(np.array([0, 2], np.float32), (1, 4, 1))),
        bc.Probabilities(np.tile(softmax([0, 2]).astype(np.float32), (1, 4, 1))),
    ):
        scaler = fit_temperature(pred, targets)
        np.testing.assert_allclose(scaler.temperature, by_hand, rtol=1e-6)
        mean = np.asarray(scaler(pred).pooled_mean())
        np.testing.assert_allclose(mean if mean.ndim == 1 else mean[:, 1], 0.75, rtol=1e-6)


def test_scaling_by_hand():
    scaler = Temperature(jnp.float32(2), jnp.float32(0), jnp.int32(1))
    pred = scaler(bc.Categorical(jnp.array([[[math.log(9), 0.0]]])))
    np.testing.assert_allclose(pred.pooled_mean(), [[0.75, 0.25]], rtol=1e-6)
    assert pred.normalised and pred.num_members == 1
    one = scaler(bc.Bernoulli(jnp.array([[math.log(9)], [math.log(9)]])))
    assert isinstance(one, bc.Bernoulli)
    np.testing.assert_allclose(one.pooled_mean(), [0.75], rtol=1e-6)


def test_pool_first():
    members = bc.Categorical(jnp.array([[[4.0, 0.0]], [[0.0, 4.0]]]))
    scaler = Temperature(jnp.float32(3), jnp.float32(0), jnp.int32(1))
    np.testing.assert_allclose(scaler(members).pooled_mean(), [[0.5, 0.5]])
    rng = np.random.default_rng(3)
    logits, targets = 3 * rng.normal(size=(4, 2000, 5)).astype(np.float32), rng.integers(5, size=2000)
    logits[..., 0] += 3 * (targets == 0)
    pooled = np.log(np.mean([probabilities(z, 1) for z in logits], 0))
    fitted = fit_temperature(bc.Categorical(logits), targets)
    np.testing.assert_allclose(fitted.temperature, optimum(pooled, targets), rtol=1e-5)


def test_far_from_one():
    """Probabilities of AdaBoost's kind, all close to 1/2: T is below exp(-4), where others' searches end."""
    logits, targets = sample(0.008, rows=5000, classes=2, scale=0.02)
    pred = bc.Categorical(logits[None])
    scaler = fit_temperature(pred, targets)
    assert float(scaler.temperature) < math.exp(-4)
    np.testing.assert_allclose(scaler.temperature, optimum(pred.log_probs(), targets), rtol=1e-5)


def test_impossible_classes_stay_so():
    logits, targets = sample(1.7)
    logits = np.where(np.eye(5, dtype=bool)[(targets + 1) % 5], -np.inf, logits).astype(np.float32)
    scaler = fit_temperature(bc.Categorical(logits[None]), targets)
    np.testing.assert_allclose(scaler.temperature, optimum(np.maximum(logits, np.float32(-1e6)), targets), rtol=1e-5)
    after = np.asarray(scaler(bc.Categorical(logits[None])).pooled_mean())
    assert (after[logits == -np.inf] == 0).all() and np.isfinite(after).all()


def test_stored_oracle():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    group = next(v for k, v in groups.items() if k.startswith("calibrators("))
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    pred, targets = bc.Categorical(inputs["logits"].astype(np.float32)[None, :100]), inputs["Y"][:100].astype(np.int32)
    expected = group["ref_temperature"]["value"]["T"]
    np.testing.assert_allclose(fit_temperature(pred, targets).temperature, expected, rtol=1e-5)


def test_scikit_learn():
    from sklearn.calibration import _TemperatureScaling

    logits, targets = sample(1.7)
    theirs = 1 / _TemperatureScaling().fit(logits.astype(np.float64), targets).beta_
    ours = fit_temperature(bc.Categorical(logits[None]), targets)
    np.testing.assert_allclose(ours.temperature, theirs, rtol=1e-6)


def test_netcal():
    scaling = pytest.importorskip("netcal.scaling")
    logits, targets = sample(1.7)
    pred = bc.Categorical(logits[None])
    theirs = scaling.TemperatureScaling(detection=False)
    probs = np.asarray(pred.pooled_mean(), np.float64)  # of float32 it gives back what it got
    theirs.fit(probs, targets)
    ours = fit_temperature(pred, targets)(pred)
    np.testing.assert_allclose(ours.pooled_mean(), theirs.transform(probs), atol=1e-4)


# Objectives: each in float64 with loops or numpy, at one temperature.


def brier_loss(logits, targets):
    return lambda t: ((probabilities(logits, t) - np.eye(logits.shape[1])[targets]) ** 2).sum(1).mean()


def nll_loss(logits, targets):
    return lambda t: -np.log(np.maximum(probabilities(logits, t)[np.arange(len(targets)), targets], 1e-300)).mean()


def soft_ece_loss(logits, targets, num_bins=15, width=0.01):
    centres = (np.arange(num_bins) + 0.5) / num_bins

    def loss(t):
        probs = probabilities(logits, t)
        confidence, correct = probs.max(1), probs.argmax(1) == targets
        member = np.exp(-((confidence[:, None] - centres) ** 2) / width)
        member /= member.sum(1, keepdims=True)
        gap = member.T @ (confidence - correct) / member.sum(0)
        return math.sqrt((member.sum(0) / len(targets) * gap**2).sum())

    return loss


def disagreement(logits, targets, threshold):
    """1 - AvU: the share of rows that are right and uncertain, or wrong and certain."""

    def loss(t):
        probs = probabilities(logits, t)
        entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(1)
        return np.mean((probs.argmax(1) == targets) != (entropy <= threshold))

    return loss


SMOOTH = {
    "brier": (bc.brier(), brier_loss),
    "soft ECE": (soft_binned_calibration_error(), soft_ece_loss),
    "nll": (bc.nll(), nll_loss),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("true", [0.4, 1.7])
def test_smooth_objectives_find_the_float64_optimum(name, true):
    """To 1e-3 of T, where the curve of soft ECE is sharp (a root of squares near 0); to 1e-4 else."""
    metric, make = SMOOTH[name]
    logits, targets = sample(true, rows=3000)
    scaler = fit_temperature(bc.Categorical(logits[None]), targets, objective=metric)
    loss = make(logits, targets)
    best, sharp = least(loss), name == "soft ECE"
    np.testing.assert_allclose(scaler.temperature, best, rtol=1e-3 if sharp else 1e-4)
    assert loss(float(scaler.temperature)) - loss(best) < 1e-6
    assert abs(float(scaler.gradient)) < (1e-2 if sharp else 1e-3) and int(scaler.iterations) == 87


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_versus_uncertainty_is_as_good_as_anywhere_on_the_grid(seed):
    """It jumps wherever a row passes the threshold: the search promises the grid's best, and what lies near it."""
    logits, targets = sample(1.7, seed=seed)
    metric, loss = accuracy_versus_uncertainty(threshold=0.6), disagreement(logits, targets, 0.6)
    pred = bc.Categorical(logits[None])
    scaler = fit_temperature(pred, targets, objective=metric)
    at_best = loss(float(scaler.temperature))
    assert at_best <= min(loss(t) for t in np.exp(np.linspace(math.log(1e-3), math.log(1e3), 41))) + 1e-9
    assert at_best < loss(1e-3) and at_best < loss(1e3)
    np.testing.assert_allclose(1 - bc.evaluate(scaler(pred), targets, {"it": metric})["it"].value, at_best, atol=1e-6)


def test_losses_of_accuracy_versus_uncertainty():
    """AvUC's goes to 0 with T, where wrong rows weigh 1 - confidence = 0; the soft one has an optimum."""
    logits, targets = sample(1.7)
    pred = bc.Categorical(logits[None])
    with pytest.raises(ValueError, match="`objective` must be best at a temperature between 1e-3 and 1e3"):
        fit_temperature(pred, targets, objective=accuracy_versus_uncertainty_loss(threshold=0.6))
    soft = soft_accuracy_versus_uncertainty_loss()
    scaler = fit_temperature(pred, targets, objective=soft)
    value = lambda p: bc.evaluate(p, targets, {"it": soft})["it"].value
    others = [value(Temperature(jnp.float32(t), jnp.float32(0), jnp.int32(0))(pred)) for t in (0.1, 0.3, 1, 3, 10)]
    assert value(scaler(pred)) < min(others)


def test_any_metric_and_its_own_direction():
    """Metrics of whole columns, and scores of which higher is better."""
    logits, targets = sample(1.7)
    pred = bc.Categorical(logits[None])
    fitted = fit_temperature(pred, targets, objective=whole(equal_mass_calibration_error))
    error = lambda p: bc.evaluate(p, targets, {"it": whole(equal_mass_calibration_error)})["it"].value
    assert error(fitted(pred)) < 0.5 * error(pred)
    spherical = fit_temperature(pred, targets, objective=bc.metrics.spherical_score())
    score = lambda t: (p := probabilities(logits, t))[np.arange(2000), targets] / np.linalg.norm(p, axis=1)
    np.testing.assert_allclose(spherical.temperature, least(lambda t: -score(t).mean()), rtol=3e-4)
    assert abs(float(spherical.gradient)) < 1e-3


def test_objectives_in_blocks_and_weights():
    logits, targets = sample(1.7, rows=9000)
    weights = np.random.default_rng(1).integers(0, 3, 9000).astype(np.float32)
    scaler = fit_temperature(bc.Categorical(logits[None]), targets, objective=bc.brier(), weights=weights)
    rows = np.repeat(np.arange(9000), weights.astype(int))
    np.testing.assert_allclose(scaler.temperature, least(brier_loss(logits[rows], targets[rows])), rtol=3e-4)


def test_ties_go_to_the_temperature_nearest_to_one():
    """A metric that is 0 wherever the confidence is between 0.64 and 0.76, as it is at T = 1: sigmoid(1) = 0.73."""
    flat_between = Metric(
        lambda pred, targets, weights: (pred.top_label()[0] * weights).sum() / weights.sum(),
        lambda mean: jnp.maximum(abs(mean - 0.7) - 0.06, 0),
    )
    logits, targets = np.tile(np.array([0, 1], np.float32), (1, 5, 1)), np.array([1, 0, 1, 1, 0])
    scaler = fit_temperature(bc.Categorical(logits), targets, objective=flat_between)
    np.testing.assert_allclose(scaler.temperature, 1, rtol=1e-6)
    assert float(scaler.gradient) == 0


FLAT = Metric(lambda pred, targets, weights: weights.sum(), lambda total: total * 0 + 1)


@pytest.mark.parametrize(
    ("targets", "message"),
    [([0, 0, 0], "it is 0 "), ([1, 1, 1], "it is infinity"), ([0, 1, 1], "it is infinity")],
)
def test_no_finite_temperature(targets, message):
    pred, targets = bc.Categorical(jnp.tile(jnp.array([2.0, 0.0]), (1, 3, 1))), np.array(targets)
    with pytest.raises(ValueError, match=message):
        fit_temperature(pred, targets)
    with pytest.raises(ValueError, match="`objective` must be best at a temperature between 1e-3 and 1e3, got one"):
        fit_temperature(pred, targets, objective=bc.brier())
    for objective in (None, bc.brier()):
        traced = jax.jit(lambda p, y, o=objective: fit_temperature(p, y, objective=o))(pred, targets)
        assert np.isnan(traced.temperature) and np.isnan(traced(pred).pooled_mean()).all()


def test_bad_input(unchecked):
    pred = bc.Categorical(jnp.array([[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]))
    targets = np.array([0, 0, 1])
    with pytest.raises(ValueError, match="`weights` must be one finite non-negative number per row"):
        fit_temperature(pred, targets, weights=-np.ones(3))
    with pytest.raises(ValueError, match="`pred` must have one batch axis, got batch shape"):
        fit_temperature(bc.Categorical(jnp.zeros((1, 2, 3, 4))), np.zeros((2, 3), int))
    impossible = bc.Categorical(jnp.array([[[0.0, -jnp.inf], [0.0, 1.0]]]))
    with pytest.raises(ValueError, match=r"`targets` must have positive probability, got 1 of 2.*clip_probabilities"):
        fit_temperature(impossible, np.array([1, 0]))
    traced = jax.jit(fit_temperature)(impossible, jnp.array([1, 0]))
    assert np.isnan(traced.temperature)
    assert np.isfinite(fit_temperature(clip_probabilities(pred, 1e-12), np.array([0, 1, 1])).temperature)
    with pytest.raises(TypeError, match=r"`objective` must be a metric, or None for the nll, got str\. Pass for ex"):
        fit_temperature(pred, targets, objective="brier")
    with pytest.raises(ValueError, match=r"of which lower or higher is better, got one of which 'neither' is\. Say"):
        fit_temperature(pred, targets, objective=FLAT._replace(better="neither"))
    with pytest.raises(ValueError, match="`objective` must depend on the temperature, got one with the same value"):
        fit_temperature(pred, targets, objective=FLAT)
    with pytest.raises(TypeError, match="`pred` must be a predictive over classes"):
        Temperature(jnp.float32(2), jnp.float32(0), jnp.int32(1))(bc.Gaussian(np.zeros((1, 3, 1)), np.ones((1, 3, 1))))


def test_undefined_rows_make_a_traced_fit_undefined():
    logits, targets = sample(1.7)
    spoiled = bc.Categorical(jnp.asarray(logits[None]).at[0, 4, 2].set(jnp.nan))
    for objective in (None, bc.brier()):
        fitted = jax.jit(lambda p, o=objective: fit_temperature(p, targets, objective=o))(spoiled)
        assert np.isnan(fitted.temperature) and np.isnan(fitted.gradient)


def test_rows_of_weight_zero_may_hold_anything_in_a_traced_fit():
    logits, targets = sample(1.7)
    weights = (np.arange(2000) % 3 > 0).astype(np.float32)
    spoiled = np.where(weights[:, None] > 0, logits, np.nan)
    order = np.argsort(weights == 0, kind="stable")  # those that count first, then repeated at weight 0: one shape
    kept, padding = np.resize(order[: int(weights.sum())], 2000), (np.arange(2000) < weights.sum()).astype(np.float32)
    for objective in (None, bc.brier()):
        fit = jax.jit(
            lambda z, w, o=objective: fit_temperature(bc.Categorical(z[None]), targets, objective=o, weights=w)
        )
        alone = fit_temperature(bc.Categorical(logits[kept][None]), targets[kept], objective=objective, weights=padding)
        np.testing.assert_allclose(
            fit(spoiled, weights).temperature, alone.temperature, rtol=1e-4 if objective else 1e-6
        )
