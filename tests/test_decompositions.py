"""Decompositions of scores, the reliability curve and its bands; stored values of these and of the adaptive errors."""

import json
import math
from functools import partial

import jax
import numpy as np
import oracles_adaptive as oracles
import pytest
from rows_adaptive import ROWS, all_nixon, everything, forecasts, swept
from rows_binfree import REFERENCE

from bayescal.metrics.adaptive import equal_mass_histogram
from bayescal.metrics.corp import consistency_band, corp, murphy, refinement, reliability_curve

pytestmark = pytest.mark.core


def small(rng, ties=True):
    probability, outcome = (x[:40].astype(float) for x in forecasts(rng, ties))
    return probability, outcome, rng.integers(0, 3, 40).astype(float)


@pytest.mark.parametrize("score", ["brier", "log"])
@pytest.mark.parametrize("ties", [False, True])
def test_corp_against_loops(rng, score, ties):
    probability, outcome, weights = small(rng, ties)
    probability = np.clip(probability, 0.05, 0.95)
    kept = weights > 0
    expected = oracles.corp(probability[kept], outcome[kept], weights[kept], score)
    parts = corp(probability, outcome, score=score, weights=weights)
    np.testing.assert_allclose(parts, expected, rtol=1e-10)
    whole_score = parts.miscalibration - parts.discrimination + parts.uncertainty
    np.testing.assert_allclose(whole_score, parts.score, rtol=1e-12)
    rows = rng.permutation(np.repeat(np.arange(40), weights.astype(int)))
    np.testing.assert_allclose(corp(probability[rows], outcome[rows], score=score), parts, rtol=1e-10)
    monotone = corp(probability**3, outcome, score=score, weights=weights)
    np.testing.assert_allclose(monotone[2:], parts[2:], rtol=1e-10)
    assert monotone.miscalibration > parts.miscalibration > 0


def test_corp_by_hand_and_with_scikit_learn(rng):
    from sklearn.isotonic import IsotonicRegression

    # 0.2 and 0.8 are swapped: the best monotone map is the base rate
    parts = corp(np.array([0.2, 0.2, 0.8, 0.8]), np.array([1, 1, 0, 0]))
    np.testing.assert_allclose(parts, (0.64, 0.39, 0, 0.25))
    perfect = corp(np.array([0.0, 1.0]), np.array([0, 1]), score="log")
    np.testing.assert_allclose(perfect, (0, 0, math.log(2), math.log(2)), atol=1e-15)
    wrong = corp(np.array([0.0, 1.0]), np.array([1, 1]), score="log")
    assert wrong.score == wrong.miscalibration == math.inf and wrong.discrimination == wrong.uncertainty == 0
    probability, outcome = forecasts(rng)
    fitted = IsotonicRegression(y_min=0, y_max=1).fit_transform(probability, outcome.astype(float))
    ours = corp(probability, outcome)
    np.testing.assert_allclose(ours.score - ours.miscalibration, np.mean((fitted - outcome) ** 2), rtol=1e-6)


@pytest.mark.parametrize("closed", ["left", "right"])
def test_murphy_against_loops(rng, closed):
    probability, outcome, weights = small(rng)
    probability = np.float32(probability)
    weights[0] = 0
    kept = weights > 0
    shown = probability if closed == "left" else 1 - probability  # a mirror turns one closure into the other
    bins = oracles.equal_width_bins(np.round(shown, 6)[kept], 5)
    expected = oracles.murphy(probability[kept].astype(float), outcome[kept], weights[kept], bins)
    parts = murphy(probability, outcome, num_bins=5, closed=closed, weights=weights)
    np.testing.assert_allclose(parts, expected, rtol=1e-9, atol=1e-15)
    score = parts.reliability - parts.resolution + parts.uncertainty + parts.within_variance - parts.within_covariance
    np.testing.assert_allclose(score, parts.score, rtol=1e-12)
    assert min(parts) > -0.5 and parts.within_variance > 0


def test_murphy_by_hand():
    # bins of ten: {0.2, 0.3} with outcomes 0 and 1, {0.9} with 1
    parts = murphy(np.array([0.2, 0.3, 0.9]), np.array([0, 1, 1]), num_bins=2)
    np.testing.assert_allclose(parts.reliability, (2 * 0.25**2 + 0.1**2) / 3)
    np.testing.assert_allclose(parts.resolution, (2 * (1 / 6) ** 2 + (1 / 3) ** 2) / 3)
    np.testing.assert_allclose(parts[3:], (2 / 9, 2 * 0.05**2 / 3, 2 * 2 * 0.05 * 0.5 / 3))


def test_refinement():
    before, after = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 1.0, 2.0, 3.0])
    parts = refinement(before, after, recalibration="temperature, in-sample")
    assert [x.value for x in parts] == [2.75, 1.0, 1.75]
    half = 1.959963984540054 * np.sqrt(0.5 / 4)  # differences 0, 1, 1, 2
    np.testing.assert_allclose([parts.calibration.low, parts.calibration.high], [1 - half, 1 + half])
    assert parts.refinement.convention.endswith("temperature, in-sample") and parts.score.n == 4
    weighted = refinement(before, after, recalibration="x", weights=np.array([1, 0, 0, 1]))
    assert [x.value for x in weighted] == [3, 1, 2] and weighted.score.n == 2


def test_reliability_curve(rng):
    probability, outcome, weights = small(rng)
    curve = reliability_curve(probability, outcome, weights=weights)
    kept = weights > 0
    groups = oracles.tied(probability[kept])
    mass = np.array([weights[kept][rows].sum() for rows in groups])
    rate = np.array([np.average(outcome[kept][rows], weights=weights[kept][rows]) for rows in groups])
    np.testing.assert_array_equal(curve.probability, np.unique(probability[kept]))
    np.testing.assert_allclose(curve.frequency, oracles.isotonic(rate, mass), rtol=1e-12)
    np.testing.assert_array_equal(curve.weight, mass)
    assert np.isnan(curve.low).all() and np.isnan(curve.high).all()


def test_consistency_band_of_the_curve(rng, key):
    inside = {}
    for name, power in (("calibrated", 1), ("not", 3)):
        shares = []
        for i in range(15):
            probability = rng.uniform(size=ROWS)
            outcome = rng.uniform(size=ROWS) < probability**power
            curve = reliability_curve(
                probability, outcome.astype(float), jax.random.fold_in(key, i), num_draws=100, num_points=50
            )
            assert len(curve.low) == 50 and (curve.low <= curve.high).all()
            shares.append(((curve.low <= curve.frequency) & (curve.frequency <= curve.high)).mean())
        inside[name] = np.mean(shares)
    assert 0.88 < inside["calibrated"] < 0.99 and inside["not"] < 0.6, inside
    again = [reliability_curve(probability, outcome.astype(float), key, num_draws=5).low for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_consistency_band_of_bins(rng):
    probability = rng.choice(np.array([0.03, 0.5, 0.8], np.float32), ROWS)
    sums = equal_mass_histogram(probability, np.zeros(ROWS, np.float32), num_bins=15)
    low, high = consistency_band(sums)
    full = np.asarray(sums.weight) > 0
    assert full.sum() == 3 and np.isnan(low[~full]).all() and np.isnan(high[~full]).all()
    for b in np.flatnonzero(full):
        n, p = int(sums.weight[b]), float(sums.confidence[b] / sums.weight[b])
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        below = sum(chances[: round(n * low[b])])
        above = sum(chances[round(n * high[b]) + 1 :])
        assert below <= 0.025 < below + chances[round(n * low[b])]
        assert above <= 0.025 < above + chances[round(n * high[b])]
    wide = consistency_band(sums, level=0.999)
    assert (wide[0][full] <= low[full]).all() and (wide[1][full] > high[full]).any()


def test_stored_oracles():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    stored = json.loads(path.read_text())["oracles"]

    def oracle(group, key):
        (name,) = [name for name in stored if name.startswith(group)]
        (value,) = [entry["value"] for k, entry in stored[name].items() if k.startswith(key)]
        return value

    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    probs, targets = inputs["P"].astype(np.float32), inputs["Y"].astype(np.int32)
    confidence, correct = probs.max(1), (probs.argmax(1) == targets).astype(np.float32)
    ours, squared = everything(confidence, correct, None), "l2_calibration_error_15_equal_mass"
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    close(ours["rank l1"], oracle("top_label_ece_15_equal_mass", "ref_array_split"))
    close(ours["rank l2"], oracle(squared, "uc_plugin_top"))
    close([ours["rank square"], ours["rank debiased l2"]], oracle(squared, "ref_debiased"))
    close(ours["rank debiased l1"], oracle(squared, "ref_l1_debiased_folded_normal_exact"))
    classes = all_nixon(probs, targets, np.ones(ROWS, np.float32))
    close(classes["marginal by rank"], oracle(squared, "uc_plugin_marginal"))
    close(classes["debiased marginal by rank"], oracle(squared, "uc_debiased_marginal"))
    close(classes["ace"], oracle("nixon_family", "ACE"))
    close(classes["tace"], oracle("nixon_family", "TACE"))
    for scheme in ("mass", "width"):
        close(swept(confidence, correct, None, scheme), oracle("ece_sweep", f"ref_equal_{scheme}"))
    for score in ("brier", "log"):
        parts = oracle("decompositions", f"model_diagnostics_CORP_{score}")
        close(list(corp(inputs["pb"], inputs["yb"], score=score)), [parts[k] for k in corp_names()], rtol=1e-12)
    parts = oracle("decompositions", "ref_murphy_15")
    names = ("brier", "reliability", "resolution", "uncertainty", "wbv", "wbc")
    close(list(murphy(inputs["pb"], inputs["yb"], closed="left")), [parts[k] for k in names], rtol=1e-12)
    log_probs, label = np.log(inputs["P"]), np.arange(4) == inputs["Y"][:, None]
    before, after = (log_normalised(log_probs / t)[label] for t in (1, 1.54017))  # the best temperature in sample
    mine, theirs = refinement(-before, -after, recalibration="temperature"), oracle("decompositions", "probmetrics")
    # theirs mixes the scaled forecast with a uniform one as well, which gains a little more
    close(mine.refinement.value, theirs["refinement_logloss_ts-mix_all"], rtol=2e-4)
    close(mine.calibration.value, theirs["calib-err_logloss_ts-mix_all"], rtol=4e-3)


def log_normalised(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def corp_names():
    return ("score", "miscalibration", "discrimination", "uncertainty")
