"""Maps learnt for each row, and maps of more than one number that keep the order of classes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import softmax
from test_metrics import REFERENCE

import bayescal as bc
from bayescal import calibrate
from bayescal.calibrate import ensemble_temperature, extra_logit, network
from bayescal.calibrate.order_preserving import _stretched
from bayescal.calibrate.parametrised_temperature import _tempered
from bayescal.calibrate.rank_preserving import _ranked

pytestmark = pytest.mark.core
KEY = jax.random.key(3)
NETWORKS = {
    "parametrised": calibrate.fit_parametrised_temperature,
    "rank": calibrate.fit_rank_preserving,
    "order": calibrate.fit_order_preserving,
}


def sampled(temperature, rows=2000, classes=4, seed=0):
    """Logits, and targets drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(rows, classes))).astype(np.float32)
    scaled = logits / np.reshape(temperature, (-1, 1))
    return bc.Categorical(logits[None]), (scaled + rng.gumbel(size=logits.shape)).argmax(1).astype(np.int32)


@pytest.fixture(scope="module")
def learnt():
    """Predictive, targets, and what each network's fit gives: one shape, compiled once."""
    pred, targets = sampled(1.7, rows=500)
    return pred, targets, {name: fit(KEY, pred, targets, steps=300) for name, fit in NETWORKS.items()}


def nll(pred, targets):
    return float(-np.asarray(pred.log_prob(targets), np.float64).mean())


def components(pred, temperature):
    """Slow: probabilities (rows, 3, classes) of what ensemble temperature scaling mixes."""
    rows = [[softmax(z / temperature), softmax(z), np.full(len(z), 1 / len(z))] for z in np.float64(pred.logits[0])]
    return np.array(rows)


def test_mixture_is_the_optimum_that_em_finds():
    """A tenth of the labels are noise, so that all three weights count; EM climbs to the same optimum, slowly."""
    pred, targets = sampled(1.7, rows=20_000)
    noise = np.random.default_rng(1).uniform(size=20_000) < 0.15
    targets = np.where(noise, np.arange(20_000) % 4, targets).astype(np.int32)
    weights = (np.arange(20_000) < 600).astype(np.float32)
    fitted = calibrate.fit_ensemble_temperature(pred, targets, weights=weights)
    plain = bc.fit_temperature(pred, targets, weights=weights)
    pred, targets = bc.take(pred, slice(600)), targets[:600]
    shares = components(pred, float(fitted.temperature))[np.arange(600), :, targets]
    mixture = np.full(3, 1 / 3)
    for _ in range(20_000):
        mixture = (shares * mixture / (shares @ mixture)[:, None]).mean(0)
    best = -np.log(shares @ mixture).mean()
    assert abs(nll(fitted(pred), targets) - best) < 2e-6
    np.testing.assert_allclose(fitted.mixture, mixture, atol=0.01)
    gradient = -(shares / (shares @ np.float64(fitted.mixture))[:, None]).mean(0)
    assert gradient.min() > -1 - 1e-4 and abs(float(fitted.gap)) < 1e-5
    assert best <= nll(plain(pred), targets)


def test_temperature_alone_is_right_where_it_is_true():
    pred, targets = sampled(1.7, rows=20_000)
    fitted = calibrate.fit_ensemble_temperature(pred, targets)
    np.testing.assert_allclose(fitted.temperature, 1.7, rtol=0.03)
    plain = bc.fit_temperature(pred, targets)
    difference = np.asarray(fitted(pred).pooled_mean() - plain(pred).pooled_mean())
    assert abs(difference).mean() < 0.01  # 3 nuisance numbers from 20,000 rows: of the order of 1 / sqrt(rows)
    alone = calibrate.EnsembleTemperature(plain.temperature, jnp.array([1.0, 0, 0]), jnp.float32(0))
    np.testing.assert_allclose(alone(pred).pooled_mean(), plain(pred).pooled_mean(), atol=1e-6)


def test_mixture_by_hand():
    """p = (0.9, 0.1) at T = 2 is (3/4, 1/4): 0.5 * 3/4 + 0.25 * 0.9 + 0.25 / 2."""
    fitted = calibrate.EnsembleTemperature(jnp.float32(2), jnp.array([0.5, 0.25, 0.25]), jnp.float32(0))
    pred = bc.Categorical(jnp.array([[[math.log(9), 0.0]]]))
    np.testing.assert_allclose(fitted(pred).pooled_mean(), [[0.725, 0.275]], rtol=1e-6)


def test_mixture_equals_the_authors_code():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    expected = next(v for k, v in groups.items() if k.startswith("calibrators("))["mix-n-match_ETS(source)"]["value"]
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    logits, targets = inputs["logits"].astype(np.float32)[None], inputs["Y"].astype(np.int32)
    fitted = calibrate.fit_ensemble_temperature(bc.Categorical(logits[:, :100]), targets[:100], objective="brier")
    np.testing.assert_allclose(fitted.temperature, expected["T_mse"], rtol=1e-4)
    np.testing.assert_allclose(fitted.mixture, expected["w"], atol=1e-4)
    np.testing.assert_allclose(nll(fitted(bc.Categorical(logits[:, 100:])), targets[100:]), expected["nll"], rtol=1e-5)


def test_features_tell_two_temperatures():
    """Standard error of log T on 2000 rows is near 0.04; the network adds a penalty's pull."""
    group = np.arange(4000) % 2
    pred, targets = sampled(np.where(group, 3.0, 1.0), rows=4000)
    features = np.stack([1000 + 0.05 * group, np.zeros(4000)], -1).astype(np.float32)  # far from 0; one is dead
    fitted = calibrate.fit_adaptive_temperature(KEY, pred, targets, features=features)
    temperature = np.asarray(fitted.temperature(features))
    np.testing.assert_allclose(temperature[:2], [1, 3], rtol=0.12)
    scaled = fitted(pred, features=features)
    np.testing.assert_allclose(scaled.pooled_mean()[1], softmax(pred.logits[0, 1] / temperature[1]), atol=1e-5)
    assert nll(scaled, targets) < nll(bc.fit_temperature(pred, targets)(pred), targets) - 0.02


@pytest.mark.slow
def test_features_serve_rank_preserving_maps_as_well():
    group = np.arange(4000) % 2
    pred, targets = sampled(np.where(group, 3.0, 1.0), rows=4000)
    features = np.stack([1000 + 0.05 * group, np.zeros(4000)], -1).astype(np.float32)
    scaled = calibrate.fit_adaptive_temperature(KEY, pred, targets, features=features)(pred, features=features)
    ranked = calibrate.fit_rank_preserving(KEY, pred, targets, features=features)
    assert abs(nll(ranked(pred, features=features), targets) - nll(scaled, targets)) < 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_never_worse_than_temperature_on_its_rows(name, learnt):
    pred, targets, fits = learnt
    fitted = fits[name]
    assert nll(fitted(pred), targets) <= nll(bc.fit_temperature(pred, targets)(pred), targets) + 1e-6
    np.testing.assert_allclose(fitted.loss, nll(fitted(pred), targets), rtol=1e-5)
    again, other = (NETWORKS[name](key, pred, targets, steps=300) for key in (KEY, jax.random.key(4)))
    np.testing.assert_array_equal(again(pred).logits, fitted(pred).logits)
    assert (np.asarray(other(pred).logits) != np.asarray(fitted(pred).logits)).any()
    weighted = NETWORKS[name](KEY, pred, targets, steps=300, weights=np.full(500, 3.0))
    np.testing.assert_allclose(weighted(pred).pooled_mean(), fitted(pred).pooled_mean(), atol=2e-4)


def test_without_inputs_it_is_temperature_scaling(learnt):
    pred, targets, _ = learnt
    fitted = calibrate.fit_parametrised_temperature(KEY, pred, targets, top_k=0, steps=300)
    np.testing.assert_allclose(
        fitted.temperature(pred), float(bc.fit_temperature(pred, targets).temperature), rtol=1e-3
    )


def test_another_objective(learnt):
    pred, targets, _ = learnt
    fitted = calibrate.fit_parametrised_temperature(KEY, pred, targets, objective=bc.brier(), steps=300)
    brier = lambda probs: ((np.asarray(probs, np.float64) - np.eye(4)[targets]) ** 2).sum(1).mean()
    after = brier(fitted(pred).pooled_mean())
    np.testing.assert_allclose(fitted.loss, after, rtol=1e-5)
    assert after <= brier(bc.fit_temperature(pred, targets)(pred).pooled_mean())


def test_a_smaller_penalty_alone_is_no_better():
    """Few steps on features that do not help may raise the mean nll while they shrink the weights."""
    pred, targets = sampled(1.7, rows=500)
    plain = bc.fit_temperature(pred, targets)
    for seed in range(3):
        features = np.random.default_rng(seed).normal(size=(500, 2)).astype(np.float32)
        fitted = calibrate.fit_adaptive_temperature(
            jax.random.key(seed), pred, targets, features=features, penalty=100.0, steps=5
        )
        assert nll(fitted(pred, features=features), targets) <= nll(plain(pred), targets) + 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_order_is_kept_whatever_the_logits(name, learnt):
    """Also of maps far from their start: the network's weights are random."""
    fitted = learnt[2][name]
    wild = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), fitted.network.weights)
    fitted = type(fitted)(**{**vars(fitted), "network": network.Network(**{**vars(fitted.network), "weights": wild})})
    fitted = jax.jit(fitted.__call__)
    for scale in (1, 30, 1000):
        logits = (scale * np.random.default_rng(2).normal(size=(1, 2000, 4))).astype(np.float32)
        after = np.asarray(fitted(bc.Categorical(logits)).log_probs())
        order = logits[0].argsort(-1)
        assert np.isfinite(after).all() and (np.diff(np.take_along_axis(after, order, -1)) >= 0).all()
        assert ((after == after.max(-1, keepdims=True)).sum(-1) == 1).mean() > 0.99  # nothing saturates
        logits[0, :, 1] = -np.inf
        logits[0, :, 3] = -np.inf
        after = np.asarray(fitted(bc.Categorical(logits)).pooled_mean())
        assert (after[:, [1, 3]] == 0).all() and np.isfinite(after).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_impossible_classes_in_the_fit(name, learnt):
    pred, targets, _ = learnt
    logits = np.array(pred.logits)
    logits[0, np.arange(500), (targets + 1) % 4] = -np.inf
    fitted = NETWORKS[name](KEY, bc.Categorical(logits), targets, steps=300)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fitted))


@pytest.mark.parametrize("name", NETWORKS)
def test_other_classes_than_in_the_fit(name, learnt, unchecked):
    """The network has an input for each of the 4 classes; one that sees fewer takes any number above."""
    with pytest.raises(ValueError, match=r"`pred` must have the 4 classes, got 5\. Fit a calibrator for these classes"):
        learnt[2][name](bc.Categorical(np.zeros((1, 2, 5), np.float32)))
    fitted = dataclasses.replace(learnt[2][name], top_k=4)
    assert np.isfinite(fitted(bc.Categorical(np.zeros((1, 2, 5), np.float32))).logits).all()
    message = "more than 3 classes, got 3" if name == "order" else "at least 4 classes, got 3"
    with pytest.raises(ValueError, match=f"`pred` must have {message}"):
        fitted(bc.Categorical(np.zeros((1, 2, 3), np.float32)))


def test_maps_by_hand():
    """A network that gives 0.7 to all rows: T = softplus(0.7); gaps times m; one term beside z / T0."""
    pred = np.log(np.array([[0.5, 0.2, 0.3]], np.float32))
    constant = lambda *values: network.Network(
        jnp.zeros(1), jnp.ones(1), (jnp.zeros((1, len(values))),), (jnp.array(values),)
    )
    inputs, m = jnp.zeros((1, 1)), math.log1p(math.exp(0.7))
    np.testing.assert_allclose(
        jnp.exp(_tempered((constant(0.7), ()), pred, inputs))[0], softmax(pred[0] / m), rtol=1e-5
    )
    first, rest = math.log1p(math.exp(0.7)), math.log1p(math.exp(-0.2))
    gaps = first * math.log(0.5 / 0.3), rest * math.log(0.3 / 0.2)
    expected = softmax([0, -gaps[0] - gaps[1], -gaps[0]])
    np.testing.assert_allclose(jnp.exp(_stretched((constant(0.7, -0.2), ()), pred, inputs))[0], expected, rtol=1e-5)
    z = np.log([1, 0.4, 0.6])
    expected = softmax(z / first + rest * np.arcsinh((z - 0.7) / first))
    parts = constant(0.7, 0.7), (jnp.float32(0.7), jnp.array([-0.2]))
    np.testing.assert_allclose(jnp.exp(_ranked(parts, pred, inputs))[0], expected, rtol=1e-5)


def test_extra_logit_recovers_a_known_map():
    """Labels from the map itself with T = 1.5 and c = -1: within four standard errors, near 0.03 and 0.15."""
    pred, _ = sampled(1.0, rows=20_000)
    truth = calibrate.ExtraLogit(jnp.float32(1.5), jnp.float32(-1), jnp.float32(0))
    targets = np.asarray(truth(pred).sample(KEY))
    fitted = calibrate.fit_extra_logit(pred, targets)
    np.testing.assert_allclose(fitted.temperature, 1.5, rtol=0.1)
    np.testing.assert_allclose(fitted.extra, -1, atol=0.6)
    assert nll(fitted(pred), targets) <= nll(truth(pred), targets) and fitted.gradient < 1e-4
    assert nll(fitted(pred), targets) <= nll(bc.fit_temperature(pred, targets)(pred), targets)


def test_extra_logit_by_hand():
    """At T = 1 the mass is sigmoid(c) = 1/2: (0.8 + 1/2) / 2."""
    pred = bc.Categorical(jnp.log(jnp.array([[[0.8, 0.2]]])))
    half = calibrate.ExtraLogit(jnp.float32(1), jnp.float32(0), jnp.float32(0))
    np.testing.assert_allclose(half(pred).pooled_mean(), [[0.65, 0.35]], rtol=1e-6)
    np.testing.assert_allclose(half.extra_mass(pred), [0.5], rtol=1e-6)
    none = calibrate.ExtraLogit(jnp.float32(2), jnp.float32(-jnp.inf), jnp.float32(0))
    np.testing.assert_allclose(none(pred).pooled_mean(), [[2 / 3, 1 / 3]], rtol=1e-6)


def test_an_extra_class_is_a_score_of_energy(rng):
    logits = (3 * rng.normal(size=(2, 50, 4))).astype(np.float32)
    pred = calibrate.add_extra_class(bc.Categorical(logits, jnp.array([0.25, 0.75])), 0.5)
    expected = [
        sum(w * math.exp(0.5) / (math.exp(0.5) + np.exp(np.float64(z)).sum()) for w, z in zip((0.25, 0.75), row))
        for row in logits.transpose(1, 0, 2)
    ]
    np.testing.assert_allclose(pred.pooled_mean()[..., -1], expected, rtol=1e-5)
    assert pred.pooled_mean().shape == (50, 5)


def test_bad_settings(unchecked, monkeypatch, learnt):
    pred, targets, fits = learnt
    fit = calibrate.fit_parametrised_temperature
    features = np.ones((500, 2), np.float32)
    for settings, message in [
        ({"hidden": (5, 0)}, r"`hidden` must be whole numbers of at least 1, got \(5, 0\)"),
        ({"hidden": ()}, "`hidden` must hold at least one width, got none"),
        ({"top_k": -1}, "`top_k` must be a whole number, not negative, got -1"),
        ({"steps": 0}, "`steps` must be a whole number of at least 1, got 0"),
        ({"penalty": -1.0}, r"`penalty` must be a finite number, not negative, got -1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(KEY, pred, targets, **settings)
    with pytest.raises(TypeError, match="`objective` must be a metric"):
        fit(KEY, pred, targets, objective="nll")
    with pytest.raises(ValueError, match="`num_terms` must be a whole number of at least 1, got 0"):
        calibrate.fit_rank_preserving(KEY, pred, targets, num_terms=0)
    with pytest.raises(
        ValueError, match=r"`features` must have shape \(rows, features\) with 500 rows, got \(499, 2\)"
    ):
        calibrate.fit_adaptive_temperature(KEY, pred, targets, features=features[1:])
    with pytest.raises(ValueError, match="`features` must be finite, got NaN or infinity in 500 rows, first in row 0"):
        calibrate.fit_adaptive_temperature(KEY, pred, targets, features=np.inf * features)
    two_features = network.new_network(KEY, jnp.ones((500, 2)), jnp.ones(500), (5,), jnp.zeros(8))
    ranked = dataclasses.replace(fits["rank"], network=two_features, top_k=None)
    with pytest.raises(ValueError, match=r"`features` must have shape \(500, 2\), got \(500, 1\)"):
        ranked(pred, features=features[:, :1])
    with pytest.raises(ValueError, match="`features` must be the features that the fit had, got none"):
        ranked(pred)
    with pytest.raises(ValueError, match="`features` must be None, got some"):
        fits["rank"](pred, features=features)
    with pytest.raises(ValueError, match="`pred` must have more than 3 classes, got 3"):
        fits["order"](bc.Categorical(np.zeros((1, 2, 3), np.float32)))
    with pytest.raises(ValueError, match='`objective` must be "nll" or "brier", got'):
        calibrate.fit_ensemble_temperature(pred, targets, objective="ece")
    with pytest.raises(ValueError, match="`num_knots` must be a whole number of at least 3, got 2"):
        calibrate.fit_spline(pred, targets, num_knots=2)
    with pytest.raises(ValueError, match=r"`clip` must lie in \(0, 1/2\), got 0"):
        calibrate.fit_spline(pred, targets, clip=0)
    with pytest.raises(TypeError, match="`pred` must be a Categorical, got Bernoulli"):
        calibrate.add_extra_class(bc.Bernoulli(np.zeros((1, 3), np.float32)), 0.0)
    with pytest.raises(ValueError, match="`pred` must hold a network's raw logits, got normalised ones"):
        calibrate.add_extra_class(bc.pool(pred), 0.0)
    separable = np.asarray(pred.logits[0]).argmax(-1).astype(np.int32)
    for every in (*NETWORKS.values(), lambda key, *data: calibrate.fit_extra_logit(*data)):
        with pytest.raises(ValueError, match="`targets` must leave a finite best temperature"):
            every(KEY, pred, separable)
    noisy = np.where(np.arange(500) % 3 == 0, np.arange(500) % 4, targets).astype(np.int32)
    monkeypatch.setattr(ensemble_temperature, "STEPS", 0)
    with pytest.raises(RuntimeError, match=r"`mixture` must be within 0\.0001 of the least objective"):
        calibrate.fit_ensemble_temperature(pred, noisy)
    monkeypatch.setattr(extra_logit, "STEPS", 0)
    with pytest.raises(RuntimeError, match=r"`gradient` must end below 0\.001 nats, got .* after 0 steps"):
        calibrate.fit_extra_logit(pred, noisy)


@pytest.mark.parametrize(
    "fit",
    [
        lambda *rows: calibrate.fit_parametrised_temperature(KEY, *rows, steps=2),
        pytest.param(calibrate.fit_ensemble_temperature, marks=pytest.mark.slow),
        pytest.param(calibrate.fit_extra_logit, marks=pytest.mark.slow),
    ],
)
def test_separable_rows_are_nan_where_traced(fit):
    pred, _ = sampled(1.7, rows=60)
    separable = np.asarray(pred.logits[0]).argmax(-1).astype(np.int32)
    assert np.isnan(np.asarray(jax.jit(fit)(pred, separable)(pred).logits)).all()


@pytest.mark.parametrize("temperature", [1.002, 1.1, 3.0])
def test_ensemble_temperature_where_a_few_labels_are_noise(temperature):
    """The uniform's curvature is thousands of times the others', whose own are nearly the same: T is close to 1."""
    rng = np.random.default_rng(0)
    odds = rng.choice([-1, 1], 4000) * rng.gamma(4, 3, 4000)
    targets = (rng.uniform(size=4000) < 1 / (1 + np.exp(-odds))).astype(np.int32)
    targets = np.where(rng.uniform(size=4000) < 0.003, 1 - targets, targets)
    pred = bc.Categorical(np.stack([0 * odds, odds], -1).astype(np.float32)[None])
    log_probs, rows = pred.log_probs(), (jnp.asarray(targets), jnp.ones(4000))
    mixture, gap = ensemble_temperature._mix(
        log_probs, *rows, jnp.float32(temperature), "nll", ensemble_temperature.STEPS
    )
    assert gap < 1e-5 and 0 < mixture[2] < 0.05


def test_extra_logit_where_the_temperature_is_tiny():
    """Probabilities close to one half, as boosting gives them: the logits' level is far from 0 once divided by T."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-1, 1], 1000)
    odds = 0.02 * sign * rng.uniform(1, 2, 1000)
    targets = ((sign > 0) ^ (rng.uniform(size=1000) < 0.02)).astype(np.int32)
    pred = bc.Categorical(np.stack([0 * odds, odds], -1).astype(np.float32)[None])
    plain, extra = calibrate.fit_temperature(pred, targets), calibrate.fit_extra_logit(pred, targets)
    assert plain.temperature < 0.02
    assert -extra(pred).log_prob(targets).mean() <= -plain(pred).log_prob(targets).mean() + 1e-6
