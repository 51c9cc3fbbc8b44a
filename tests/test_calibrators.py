"""What every calibrator over classes promises, checked over one list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrators import BINARY, CALIBRATORS, FEATURES_FOR, HOST, KEYED_ROWS, SEVERAL, UNWEIGHTED
from oracles import softmax

import bayescal as bc
from bayescal.calibrate.calibrator import Calibrator

pytestmark = pytest.mark.core
ROWS, FEATURES = 240, 3


def problem(name, seed=0, rows=ROWS, members=2):
    """Members whose pool is over-confident, with labels drawn from the flattened pool, and features that do not help."""
    rng = np.random.default_rng(seed)
    classes = 2 if name in BINARY else 3
    centre = 2.5 * rng.normal(size=(rows, classes))
    logits = (centre + 0.5 * rng.normal(size=(members, rows, classes))).astype(np.float32)
    targets = (np.array([softmax(z) for z in centre / 2.5]).cumsum(1) < rng.uniform(size=(rows, 1))).sum(1)
    features = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    features = FEATURES_FOR.get(name, lambda features: features)(features)
    return bc.Categorical(logits), np.minimum(targets, classes - 1).astype(np.int32), features


def use(calibrator, pred, features):
    return calibrator(pred, features=features) if "features" in calibrator.needs else calibrator(pred)


@pytest.fixture(scope="module", params=list(CALIBRATORS))
def case(request):
    pred, targets, features = problem(request.param)
    return request.param, pred, targets, features, CALIBRATORS[request.param](pred, targets, None, features)


def test_gives_one_member_of_probabilities(case):
    name, pred, _, features, calibrator = case
    assert isinstance(calibrator, Calibrator) and isinstance(calibrator.accuracy_preserving, bool)
    calibrated = use(calibrator, pred, features)
    probs = np.asarray(calibrated.pooled_mean())
    assert (calibrated.num_members == 1 or name in SEVERAL) and probs.shape == (ROWS, pred.num_classes)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    assert np.isfinite(probs).all() and (probs >= 0).all()
    # Not 1e-5: pooling rounds, and an isotonic map may rise steeply between two knots.
    np.testing.assert_allclose(probs, use(calibrator, bc.pool(pred), features).pooled_mean(), atol=1e-4)


def test_preserves_accuracy_where_it_says_so(case):
    name, _, _, _, calibrator = case
    pred, _, features = problem(name, seed=1)
    before, after = pred.log_probs(), use(calibrator, pred, features).log_probs()
    if calibrator.accuracy_preserving:
        top = np.take_along_axis(np.asarray(after), np.asarray(before).argmax(-1)[:, None], -1)[:, 0]
        assert (top >= after.max(-1) - 1e-6).all()  # ties count as kept


def test_jit_changes_nothing(case):
    name, pred, targets, features, calibrator = case
    plain = use(calibrator, pred, features).pooled_mean()
    np.testing.assert_allclose(jax.jit(use)(calibrator, pred, features).pooled_mean(), plain, atol=1e-5)
    if name not in HOST:
        traced = jax.jit(CALIBRATORS[name])(pred, targets, None, features)
        np.testing.assert_allclose(use(traced, pred, features).pooled_mean(), plain, atol=1e-4)


def test_vmap_over_data_sets_is_a_loop(case):
    name = case[0]
    if name in HOST:
        pytest.skip("its fit runs on the host")
    problems = [problem(name, seed) for seed in (2, 3)]
    logits, targets, features = (
        jnp.stack([jnp.asarray(x) for x in parts])
        for parts in zip(*[(pred.logits, targets, features) for pred, targets, features in problems])
    )

    def probs(logits, targets, features):
        pred = bc.Categorical(logits)
        return use(CALIBRATORS[name](pred, targets, None, features), pred, features).pooled_mean()

    for i, together in enumerate(jax.vmap(probs)(logits, targets, features)):
        np.testing.assert_allclose(together, probs(logits[i], targets[i], features[i]), atol=1e-4)


def test_saved_and_loaded(case, tmp_path):
    _, pred, _, features, calibrator = case
    bc.save(tmp_path / "calibrator", calibrator)
    loaded = bc.load(tmp_path / "calibrator", calibrator)
    np.testing.assert_array_equal(
        use(loaded, pred, features).pooled_mean(), use(calibrator, pred, features).pooled_mean()
    )


def test_weights_are_repetitions_and_zero_is_absence(case):
    name, pred, targets, features, _ = case
    if name in UNWEIGHTED:
        pytest.skip("it takes no row weights")
    weights = np.random.default_rng(5).integers(0, 3, ROWS).astype(np.float32)
    rows = np.repeat(np.arange(ROWS), weights.astype(int))
    repeated = CALIBRATORS[name](bc.take(pred, rows), targets[rows], None, features[rows])
    spoiled = bc.Categorical(jnp.where((weights == 0)[None, :, None], jnp.nan, pred.logits))
    weighted = CALIBRATORS[name](
        spoiled, targets, weights, np.where((weights == 0).reshape(-1, *[1] * (features.ndim - 1)), 0, features)
    )
    np.testing.assert_allclose(
        use(weighted, pred, features).pooled_mean(), use(repeated, pred, features).pooled_mean(), atol=2e-4
    )


def test_row_order_does_not_matter(case):
    name, pred, targets, features, calibrator = case
    if name in KEYED_ROWS:
        pytest.skip("its fit divides the rows")
    order = np.random.default_rng(6).permutation(ROWS)
    again = CALIBRATORS[name](bc.take(pred, order), targets[order], None, features[order])
    np.testing.assert_allclose(
        use(again, pred, features).pooled_mean(), use(calibrator, pred, features).pooled_mean(), atol=2e-4
    )


def test_undefined_rows_come_through(case):
    _, pred, _, features, calibrator = case
    spoiled = bc.Categorical(jnp.asarray(pred.logits).at[:, 7].set(jnp.nan))
    probs = np.asarray(jax.jit(use)(calibrator, spoiled, features).pooled_mean())
    assert np.isnan(probs[7]).all() and np.isfinite(np.delete(probs, 7, 0)).all()


def test_refuses_unusable_data(case, unchecked):
    name, pred, targets, features, _ = case
    fit = CALIBRATORS[name]
    with pytest.raises(ValueError, match="`targets` must have at least one row, got none"):
        fit(bc.Categorical(pred.logits[:, :0]), targets[:0], None, features[:0])
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        fit(bc.Categorical(jnp.asarray(pred.logits).at[:, 3].set(jnp.nan)), targets, None, features)
    with pytest.raises(ValueError, match="`targets` must lie in"):
        fit(pred, targets + 5, None, features)
    with pytest.raises((TypeError, ValueError), match=r"`pred` must be a predictive over classes|`pred` must"):
        fit(bc.Gaussian(np.zeros((1, ROWS, 1), np.float32), np.ones((1, ROWS, 1), np.float32)), targets, None, features)
