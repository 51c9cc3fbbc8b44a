"""Inductive Venn-Abers: isotonic regression with the new row in it, once with each label."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit as sigmoid
from test_metrics import REFERENCE

import bayescal as bc
from bayescal.conformal import VennAbers, fit_venn_abers
from bayescal.conformal.venn_abers import upper_values

pytestmark = pytest.mark.core


def joined(scores, labels, at, label):
    """scikit-learn's isotonic regression at `at` of the rows with (at, label) among them."""
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression().fit([*scores, at], [*labels, label]).predict([at])[0]


def bernoulli(rng, rows, tied=False):
    logits = (2 * rng.normal(size=rows)).astype(np.float32)
    logits = np.round(logits) if tied else logits
    return bc.Bernoulli(logits[None]), (rng.uniform(size=rows) < sigmoid(logits / 2)).astype(np.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_isotonic_regression_with_the_row_in_it(tied):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pred, targets = bernoulli(rng, 40, tied)
        new = bc.Bernoulli(np.r_[pred.logits[0, :10], np.float32([-20, 20]), 2 * rng.normal(size=15)][None].astype("f"))
        low, high = fit_venn_abers(pred, targets).interval(new)
        scores = pred.logits[0].astype(float)
        for k, labels in ((1, targets), (0, 1 - targets)):
            sign = 2 * k - 1
            expected = [[joined(sign * scores, labels, sign * float(z), y) for z in new.logits[0]] for y in (0, 1)]
            np.testing.assert_allclose(low[:, k], expected[0], atol=1e-6)
            np.testing.assert_allclose(high[:, k], expected[1], atol=1e-6)
        assert (low < high).all() and (np.diff(np.asarray(low)[np.argsort(new.logits[0]), 1]) >= 0).all()


def test_fast_values_are_the_definition():
    rng = np.random.default_rng(3)
    for trial in range(600):
        count = rng.integers(0, 4, rng.integers(1, 10)).astype(float) if trial % 2 else np.ones(rng.integers(1, 10))
        ones = np.array([rng.integers(0, int(c) + 1) for c in count], float)
        mean = lambda a, b, c=count, o=ones: (o[a : b + 1].sum() + 1) / (c[a : b + 1].sum() + 1)
        groups = range(len(count))
        slow = [max(min(mean(a, b) for b in groups if b >= i) for a in groups if a <= i) for i in groups]
        np.testing.assert_allclose(upper_values(count, ones), slow, rtol=1e-12)


SCORES = np.array([0.1, 0.2, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9])
LABELS = np.array([0, 0, 1, 0, 1, 0, 1, 1])


def of_probabilities(p):
    return bc.Bernoulli(np.log(p / (1 - p)).astype(np.float32)[None])


def test_golden_and_the_library():
    """venn-abers 1.5.4: VennAbers().fit(c_[1 - s, s], y), predict_proba(c_[1 - t, t]) -> (p, (p0, p1))."""
    at = np.array([0.05, 0.2, 0.45, 0.7, 0.95])
    fitted = fit_venn_abers(of_probabilities(SCORES), LABELS)
    low, high = fitted.interval(of_probabilities(at))
    np.testing.assert_allclose(low[:, 1], [0, 1 / 4, 1 / 4, 1 / 3, 2 / 3], atol=1e-6)
    np.testing.assert_allclose(high[:, 1], [2 / 5, 1 / 2, 2 / 3, 1, 1], atol=1e-6)
    merged = fitted(of_probabilities(at)).pooled_mean()
    np.testing.assert_allclose(merged, [0.28571429, 0.4, 0.47058824, 0.6, 0.75], rtol=1e-6)

    library = pytest.importorskip("venn_abers")
    rng = np.random.default_rng(4)
    p, q = (rng.uniform(0.01, 0.99, n).round(2) for n in (300, 80))
    targets = (rng.uniform(size=300) < p**2).astype(np.int32)
    peer = library.VennAbers()
    peer.fit(np.c_[1 - p, p], targets)
    merged, ends = peer.predict_proba(np.c_[1 - q, q])
    fitted = fit_venn_abers(of_probabilities(p), targets)
    got = fitted.interval(of_probabilities(q))
    np.testing.assert_allclose(np.stack(got)[..., 1].T, ends, atol=1e-6)
    np.testing.assert_allclose(fitted(of_probabilities(q)).pooled_mean(), merged[:, 1], atol=1e-6)


def test_recorded_oracle():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    expected = groups["calibrators(fit[:100], NLL on [100:])"]["venn_abers_ivap_first4_[p0,p1,p]"]["value"]
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    pred, targets = of_probabilities(inputs["pb"]), inputs["yb"].astype(np.int32)
    fitted, new = fit_venn_abers(bc.take(pred, slice(0, 100)), targets[:100]), bc.take(pred, slice(100, 104))
    low, high = fitted.interval(new)
    np.testing.assert_allclose([low[:, 1], high[:, 1], fitted(new).pooled_mean()], expected, rtol=1e-6)


def test_families_agree():
    rng = np.random.default_rng(5)
    pred, targets = bernoulli(rng, 40, tied=True)
    probs = np.asarray(pred.as_categorical().pooled_mean())
    one, two = fit_venn_abers(pred, targets), fit_venn_abers(pred.as_categorical(), targets)
    np.testing.assert_allclose(one(pred).pooled_mean(), two(pred.as_categorical()).pooled_mean()[:, 1], rtol=1e-5)
    three = fit_venn_abers(bc.Probabilities(probs[None]), targets)
    np.testing.assert_allclose(
        three(bc.Probabilities(probs[None])).pooled_mean()[:, 1], one(pred).pooled_mean(), rtol=1e-5
    )
    low, high = two.interval(pred.as_categorical())
    np.testing.assert_allclose(low[:, 0], 1 - high[:, 1], atol=1e-6)
    assert isinstance(one(pred), bc.Bernoulli) and one(pred).num_members == 1


def test_more_classes_are_one_against_the_rest():
    rng = np.random.default_rng(6)
    logits = (2 * rng.normal(size=(2, 40, 4))).astype(np.float32)
    pred, targets = bc.Categorical(logits), rng.integers(4, size=40).astype(np.int32)
    fitted = fit_venn_abers(pred, targets)
    low, high = fitted.interval(pred)
    p = np.asarray(pred.pooled_mean())
    for k in range(4):
        alone = of_probabilities(p[:, k].astype(float))
        np.testing.assert_allclose(
            np.stack(fit_venn_abers(alone, (targets == k).astype(np.int32)).interval(alone))[..., 1],
            np.stack([low[:, k], high[:, k]]),
            atol=1e-6,
        )
    merged = np.asarray(high / (1 - low + high))
    np.testing.assert_allclose(fitted(pred).pooled_mean(), merged / merged.sum(1, keepdims=True), rtol=1e-5)


def test_tells_saturated_probabilities_apart():
    """In float32 all of these are probability one; their order still counts."""
    pred = bc.Bernoulli(np.arange(20, 60, dtype=np.float32)[None])
    probs = np.asarray(fit_venn_abers(pred, (np.arange(40) >= 20).astype(np.int32))(pred).pooled_mean())
    np.testing.assert_allclose(
        probs[[0, 19, 20, 39]], [1 / 22, 1 / 3, 2 / 3, 21 / 22], rtol=1e-5
    )  # p0, p1 = 0, 1/21; ...


def test_recovers_a_known_map():
    """P(y = 1 | z) = sigmoid(z / 2): within 4 standard errors of the mean over ten slices of the fitted values."""
    rng = np.random.default_rng(7)
    pred, targets = bernoulli(rng, 4000)
    fitted = fit_venn_abers(pred, targets)
    low, high = fitted.interval(pred)
    p, truth = np.asarray(fitted(pred).pooled_mean()), sigmoid(pred.logits[0] / 2)
    assert (np.asarray(high - low)[:, 1]).mean() < 0.03
    for rows in np.array_split(np.argsort(pred.logits[0]), 10):
        error = np.sqrt((truth[rows] * (1 - truth[rows])).mean() / len(rows))
        assert abs(p[rows].mean() - truth[rows].mean()) < 4 * error


def test_one_of_the_two_is_calibrated_whatever_the_scores():
    """E[Y - p_Y] = 0 with p_Y the end of the row's own label (the theorem), where the scores themselves are off by 0.2."""
    rng, gaps = np.random.default_rng(12), []
    for _ in range(4000):
        score = rng.uniform(size=21).round(1)  # with ties
        label = (rng.uniform(size=21) < 0.6 * score).astype(float)
        places, at = np.unique(score[:20], return_inverse=True)
        count, ones = np.bincount(at).astype(float), np.bincount(at, weights=label[:20])
        high, low = upper_values(count, ones), 1 - upper_values(count[::-1], (count - ones)[::-1])[::-1]
        p0 = np.r_[0, low][np.searchsorted(places, score[20], side="right")]
        p1 = np.r_[high, 1][np.searchsorted(places, score[20], side="left")]
        gaps.append((label[20] - (p1 if label[20] else p0), label[20] - score[20], p1 - p0))
    mean, error = np.mean(gaps, 0), np.std(gaps, 0) / 4000**0.5
    assert abs(mean[0]) < 3.3 * error[0] and abs(mean[1]) > 10 * error[1] and mean[2] < 0.35


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(8)
    pred = bc.Categorical((2 * rng.normal(size=(2, 50, 3))).astype(np.float32))
    targets = rng.integers(3, size=50).astype(np.int32)
    return pred, targets, fit_venn_abers(pred, targets)


def test_weights_are_repetitions_and_zero_is_absence(fitted):
    pred, targets, _ = fitted
    weights = np.random.default_rng(9).integers(0, 3, 50)
    rows = np.repeat(np.arange(50), weights)
    spoiled = bc.Categorical(jnp.where((weights == 0)[None, :, None], jnp.nan, pred.logits))
    weighted = fit_venn_abers(spoiled, targets, weights=weights.astype(np.float32))
    repeated = fit_venn_abers(bc.take(pred, rows), targets[rows])
    np.testing.assert_allclose(np.stack(weighted.interval(pred)), np.stack(repeated.interval(pred)), atol=1e-6)


def test_jit_vmap_order_and_files(fitted, tmp_path):
    pred, targets, calibrator = fitted
    plain = calibrator(pred).pooled_mean()
    np.testing.assert_allclose(jax.jit(fit_venn_abers)(pred, targets)(pred).pooled_mean(), plain, atol=1e-6)
    order = np.random.default_rng(10).permutation(50)
    again = fit_venn_abers(bc.take(pred, order), targets[order])
    np.testing.assert_array_equal(again(pred).pooled_mean(), plain)
    probs = jax.vmap(lambda z, y: fit_venn_abers(bc.Categorical(z), y)(bc.Categorical(z)).pooled_mean())(
        jnp.stack([pred.logits, pred.logits[:, order]]), jnp.stack([targets, targets[order]])
    )
    np.testing.assert_allclose(probs[0], plain, atol=1e-6)
    np.testing.assert_allclose(probs[1], plain[order], atol=1e-6)
    bc.save(tmp_path / "calibrator", calibrator)
    np.testing.assert_array_equal(bc.load(tmp_path / "calibrator", calibrator)(pred).pooled_mean(), plain)
    assert not VennAbers.accuracy_preserving and VennAbers.needs == ()


def test_undefined_rows_come_through(fitted):
    pred, targets, calibrator = fitted
    spoiled = bc.Categorical(jnp.asarray(pred.logits).at[:, 7].set(jnp.nan))
    probs = np.asarray(jax.jit(lambda c, p: c(p).pooled_mean())(calibrator, spoiled))
    assert np.isnan(probs[7]).all() and np.isfinite(np.delete(probs, 7, 0)).all()
    traced = jax.jit(lambda p: fit_venn_abers(p, targets)(pred).pooled_mean())(spoiled)
    assert np.isnan(traced).all()


def test_bad_input(fitted, unchecked):
    pred, targets, calibrator = fitted
    with pytest.raises(TypeError, match=r"`pred` must be a predictive over classes .* got Gaussian\. For regression"):
        fit_venn_abers(bc.Gaussian(np.zeros((1, 3, 1), np.float32), np.ones((1, 3, 1), np.float32)), np.zeros(3))
    with pytest.raises(ValueError, match="`targets` must have at least one row, got none"):
        fit_venn_abers(bc.take(pred, slice(0, 0)), targets[:0])
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        fit_venn_abers(bc.Categorical(jnp.asarray(pred.logits).at[:, 3].set(jnp.nan)), targets)
    with pytest.raises(ValueError, match="`targets` must lie in"):
        fit_venn_abers(pred, targets + 5)
    with pytest.raises(ValueError, match=r"`pred` must have one batch axis, got batch shape \(5, 10\)\. Flatten"):
        fit_venn_abers(bc.Categorical(pred.logits.reshape(2, 5, 10, 3)), targets)
    with pytest.raises(ValueError, match=r"`targets` must .* \(50,\), got .*\(49,\)\. Pass one label per row"):
        jax.jit(fit_venn_abers)(pred, targets[:49])
    with pytest.raises(ValueError, match=r"`pred` must have the 3 classes of the fit, got 2\. Use the same network"):
        calibrator(bc.Categorical(pred.logits[..., :2]))


def test_one_class_is_no_error():
    """All labels 1: p0 says how little that proves, 0 below all scores and (n - 1) / n or so above; nothing is certain."""
    pred = bc.Bernoulli(np.arange(9, dtype=np.float32)[None])
    fitted = fit_venn_abers(pred, np.ones(9, np.int32))
    low, high = fitted.interval(pred)
    np.testing.assert_allclose(high[:, 1], 1)
    np.testing.assert_allclose(low[:, 1], 1 - 1 / np.arange(2, 11), rtol=1e-6)
    assert (np.asarray(fitted(pred).pooled_mean()) < 1).all()
