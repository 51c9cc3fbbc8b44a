"""What every calibrator over classes promises, checked over one list.

A calibrator's fit and use are compiled twice: as they are, and traced, for all data sets at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrators import BINARY, CALIBRATORS, FEATURES_FOR, SEVERAL
from oracles import softmax

import bayescal as bc
from bayescal.calibrate.calibrator import Calibrator

pytestmark = pytest.mark.core
ROWS, FEATURES = 240, 3
UNDEFINED = 7  # the row of new predictions that holds NaN


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


def data_sets(name):
    """Name -> (logits, targets, weights, features), of one shape: what `traced` fits at once."""
    pred, targets, features = problem(name)
    other, other_targets, other_features = problem(name, seed=2)
    rng, ones = np.random.default_rng(5), np.ones(ROWS, np.float32)
    counts = rng.permutation(np.arange(ROWS) % 3)
    repeated, order = np.repeat(np.arange(ROWS), counts), rng.permutation(ROWS)
    absent = lambda x, value: np.where((counts == 0).reshape(-1, *[1] * (x.ndim - 1)), value, x).astype(x.dtype)
    spoiled = np.stack([absent(member, np.nan) for member in np.asarray(pred.logits)])
    return {
        "plain": (pred.logits, targets, ones, features),
        "other": (other.logits, other_targets, ones, other_features),
        "shuffled": (pred.logits[:, order], targets[order], ones, features[order]),
        "repeated": (pred.logits[:, repeated], targets[repeated], ones, features[repeated]),
        "weighted": (spoiled, targets, counts.astype(np.float32), absent(features, 0)),
    }


@pytest.fixture(scope="module", params=list(CALIBRATORS))
def case(request):
    pred, targets, features = problem(request.param)
    return request.param, pred, targets, features, CALIBRATORS[request.param](pred, targets, None, features)


@pytest.fixture(scope="module")
def traced(case):
    """Name of the data set -> probabilities of new rows, one of them undefined: fit, vmap and use under one jit."""
    name, sets = case[0], data_sets(case[0])
    new, _, features = problem(name, seed=1)
    new = bc.Categorical(jnp.asarray(new.logits).at[:, UNDEFINED].set(jnp.nan))

    def probs(logits, targets, weights, rows):
        fitted = CALIBRATORS[name](bc.Categorical(logits), targets, weights, rows)
        return use(fitted, new, features).pooled_mean()

    together = [jnp.stack([jnp.asarray(x) for x in column]) for column in zip(*sets.values())]
    return dict(zip(sets, np.asarray(jax.jit(jax.vmap(probs))(*together))))


def test_gives_one_member_of_probabilities(case):
    name, *_, calibrator = case
    assert isinstance(calibrator, Calibrator) and isinstance(calibrator.accuracy_preserving, bool)
    pred, _, features = problem(name, seed=1)
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
    before, after = np.asarray(pred.log_probs()), np.asarray(use(calibrator, pred, features).log_probs())
    if calibrator.accuracy_preserving:
        top = np.take_along_axis(after, before.argmax(-1)[:, None], -1)[:, 0]
        assert (top >= after.max(-1) - 1e-6).all()  # ties count as kept


@pytest.mark.parametrize("data", ["plain", "other"])
def test_jit_and_vmap_change_nothing(case, traced, data):
    name, *_, calibrator = case
    if data != "plain":
        logits, targets, _, others = data_sets(name)[data]
        calibrator = CALIBRATORS[name](bc.Categorical(logits), targets, None, others)
    pred, _, features = problem(name, seed=1)
    plain = np.asarray(use(calibrator, pred, features).pooled_mean())
    rest = np.arange(ROWS) != UNDEFINED
    np.testing.assert_allclose(traced[data][rest], plain[rest], atol=1e-4)


def test_saved_and_loaded(case, tmp_path):
    _, pred, _, features, calibrator = case
    bc.save(tmp_path / "calibrator", calibrator)
    loaded = bc.load(tmp_path / "calibrator", calibrator)
    np.testing.assert_array_equal(
        use(loaded, pred, features).pooled_mean(), use(calibrator, pred, features).pooled_mean()
    )


def test_weights_are_repetitions_and_zero_is_absence(traced):
    np.testing.assert_allclose(traced["weighted"], traced["repeated"], atol=2e-4)
    assert abs(traced["repeated"] - traced["plain"])[UNDEFINED + 1 :].max() > 1e-3


def test_row_order_does_not_matter(traced):
    np.testing.assert_allclose(traced["shuffled"], traced["plain"], atol=2e-4)


def test_undefined_rows_come_through(traced):
    for probs in traced.values():
        assert np.isnan(probs[UNDEFINED]).all() and np.isfinite(np.delete(probs, UNDEFINED, 0)).all()


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


def test_constants_of_a_jit_are_checked_like_values():
    """What an outer jit closes over is concrete, while what is computed from it there is not."""
    pred, targets, _ = problem("temperature")
    fit = lambda pred: (bc.fit_temperature(pred, targets).temperature, split(pred).threshold)
    split = lambda pred: bc.conformal.fit_split(pred, targets, bc.conformal.lac(), alpha=0.1)
    for inside, plain in zip(jax.jit(lambda: fit(pred))(), fit(pred), strict=True):
        np.testing.assert_allclose(inside, plain, rtol=1e-5)
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        jax.jit(lambda: fit(bc.Categorical(np.full((1, ROWS, 3), np.nan, np.float32))))()
