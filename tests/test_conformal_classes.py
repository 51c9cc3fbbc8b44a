"""Scores of classes, groups, shifts and the metrics of sets: by hand, and against peers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import oracles_conformal as oracle
import pytest
from oracles import softmax
from test_metrics import REFERENCE

import bayescal as bc
from bayescal import conformal as cf
from bayescal.conformal import class_scores

pytestmark = pytest.mark.core
KEY = jax.random.key(5)
PROBS = [0.5, 0.2, 0.2, 0.1]  # the two of 0.2 tie: the lower index ranks first
PLAIN = {
    "lac": (cf.lac(), [0.5, 0.8, 0.8, 0.9], oracle.lac),
    "margin": (cf.margin(), [-0.3, 0.3, 0.3, 0.4], oracle.margin),
    "top k": (cf.top_k(), [1, 2, 3, 4], oracle.top_k),
    "aps": (cf.aps(randomised=False), [0.5, 0.7, 0.9, 1.0], oracle.aps),
    "raps": (cf.raps(penalty=0.1, start=2, randomised=False), [0.5, 0.7, 1.0, 1.2], oracle.raps(0.1, 2)),
    "saps": (cf.saps(penalty=0.1, randomised=False), [0.5, 0.6, 0.7, 0.8], oracle.saps(0.1)),
    "never empty": (cf.never_empty(cf.lac()), [-np.inf, 0.8, 0.8, 0.9], oracle.never_empty(oracle.lac)),
}
RANDOMISED = {
    "aps": (cf.aps(), oracle.aps),
    "raps": (cf.raps(penalty=0.1, start=2), oracle.raps(0.1, 2)),
    "saps": (cf.saps(penalty=0.1), oracle.saps(0.1)),
}


def problem(rows=200, classes=4, members=2, seed=0):
    rng = np.random.default_rng(seed)
    centre = 2 * rng.normal(size=(rows, classes))
    logits = (centre + rng.normal(size=(members, rows, classes))).astype(np.float32)
    targets = (centre + rng.gumbel(size=centre.shape)).argmax(1).astype(np.int32)
    return bc.Categorical(logits), targets


def stored():
    """Logits, probabilities in float64 and labels of the recorded oracles' inputs."""
    path = REFERENCE / "metrics_oracle_inputs.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    inputs = np.load(path)
    return (
        inputs["logits"].astype(np.float32),
        np.array([softmax(z) for z in inputs["logits"]]),
        inputs["Y"].astype(int),
    )


def halves(logits):
    return bc.Categorical(logits[None, :100]), bc.Categorical(logits[None, 100:])


@pytest.mark.parametrize("name", PLAIN)
def test_scores_by_hand_and_by_loops(name):
    score, by_hand, loops = PLAIN[name]
    np.testing.assert_allclose(score.candidates(bc.Probabilities(jnp.array([[PROBS]])), None)[0], by_hand, rtol=1e-6)
    pred, targets = problem()
    expected = np.array([loops(p, 1) for p in np.asarray(pred.pooled_mean(), np.float64)])
    np.testing.assert_allclose(score.candidates(pred, None), expected, rtol=2e-5, atol=1e-6)
    measured = score.measure(pred, targets, None)
    np.testing.assert_allclose(measured, expected[np.arange(200), targets], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", RANDOMISED)
def test_randomised_scores(name):
    """One u a row; the same key is the same score, and another is another."""
    score, loops = RANDOMISED[name]
    pred, _ = problem()
    u = 1 - np.asarray(jax.random.uniform(KEY, (200,)))
    expected = [loops(p, v) for p, v in zip(np.asarray(pred.pooled_mean(), np.float64), u)]
    got = score.candidates(pred, KEY)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    assert (got != score.candidates(pred, jax.random.key(6))).any(-1).all()


def test_ensemble_scores_by_loops():
    pred, _ = problem()
    members = np.array([[softmax(z) for z in own] for own in np.asarray(pred.logits, np.float64)])
    u = 1 - np.asarray(jax.random.uniform(KEY, (200,)))
    mean = np.mean([[oracle.aps(p, v) for p, v in zip(own, u)] for own in members], 0)
    np.testing.assert_allclose(cf.averaged(cf.aps()).candidates(pred, KEY), mean, rtol=2e-5)
    pooled = members.mean(0)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    information = entropy(pooled) - entropy(members).mean(0)
    got = cf.epistemic(cf.lac(), floor=0.1).candidates(pred, None)
    np.testing.assert_allclose(got, (1 - pooled) / (0.1 + information)[:, None], rtol=2e-4)
    same = cf.averaged(cf.lac()).candidates(pred, None)
    np.testing.assert_allclose(same, cf.lac().candidates(pred, None), rtol=1e-5, atol=1e-7)
    dead = bc.Categorical(spoiled(pred.logits, 1), jnp.array([1.0, 0]))
    alone = bc.Categorical(pred.logits[:1])
    np.testing.assert_allclose(
        cf.averaged(cf.aps()).candidates(dead, KEY), cf.aps().candidates(alone, KEY), rtol=1e-5, atol=1e-6
    )


def spoiled(logits, member):
    """The logits with those of one member NaN."""
    logits = np.array(logits)
    logits[member] = np.nan
    return logits


def test_families_agree():
    pred, _ = problem(classes=2)
    two = bc.Bernoulli(pred.logits[..., 1] - pred.logits[..., 0])
    for score in (cf.lac(), cf.margin(), cf.aps(randomised=False)):
        expected = score.candidates(pred, None)
        np.testing.assert_allclose(score.candidates(two, None), expected, atol=1e-5)
        probs = bc.Probabilities(jax.nn.softmax(pred.logits))
        np.testing.assert_allclose(score.candidates(probs, None), expected, atol=1e-5)


@pytest.mark.parametrize("name", [*PLAIN, *RANDOMISED])
def test_undefined_rows(name):
    """Every score of the row is NaN, its set is everything when traced and an error when not; no other row changes."""
    score, key = (PLAIN[name][0], None) if name in PLAIN else (RANDOMISED[name][0], KEY)
    pred, targets = problem()
    fit = cf.fit_split(pred, targets, score, alpha=0.2, key=key)
    probs = np.array(pred.pooled_mean())
    probs[7, 2] = np.nan  # one class suffices
    spoiled = bc.Probabilities(probs[None])
    assert np.isnan(score.candidates(spoiled, key)).all(-1).nonzero()[0].tolist() == [7]
    sets = jax.jit(lambda fit, pred: fit(pred, key=key))(fit, spoiled)
    assert sets[7].all() and not np.delete(sets, 7, 0).all()
    with pytest.raises(
        ValueError, match=r"`pred` must have a score for every class, got NaN in 1 of 200 rows under .*first at 7"
    ):
        fit(spoiled, key=key)


def test_calibration_rows_in_any_order():
    pred, targets = problem()
    order = np.random.default_rng(1).permutation(200)
    for score, *_ in PLAIN.values():
        a = cf.fit_split(pred, targets, score, alpha=0.1).threshold
        np.testing.assert_array_equal(cf.fit_split(bc.take(pred, order), targets[order], score, alpha=0.1).threshold, a)


def test_ties_with_the_threshold_are_in():
    """Sets of the calibration rows themselves hold exactly the k rows that they must, to the bit, with jit and without."""
    pred, targets = problem()
    for score in (cf.lac(), cf.margin(), cf.aps(randomised=False)):
        fit = cf.fit_split(pred, targets, score, alpha=0.1)
        assert cf.covered(fit(pred), targets).sum() >= cf.rank(200, 0.1)
        assert cf.covered(jax.jit(lambda fit, pred: fit(pred))(fit, pred), targets).sum() >= cf.rank(200, 0.1)


def test_p_values_give_the_same_sets():
    pred, targets = problem()
    old, new = bc.take(pred, slice(0, 99)), bc.take(pred, slice(99, None))
    calibration = cf.lac().measure(old, targets[:99], None)
    p = cf.p_values(new, cf.lac(), calibration)
    for alpha in (0.005, 0.05, 0.1, 0.3):
        np.testing.assert_array_equal(p > alpha, cf.fit_split(old, targets[:99], cf.lac(), alpha=alpha)(new))
    by_hand = (1 + (np.asarray(calibration) >= float(cf.lac().candidates(new, None)[0, 0])).sum()) / 100
    np.testing.assert_allclose(p[0, 0], by_hand)


def test_special_cases_are_split():
    """One group, equal weights and equal shares are the plain method."""
    pred, targets = problem()
    plain = cf.fit_split(pred, targets, cf.lac(), alpha=0.1)
    zeros, ones = np.zeros(200, int), np.ones(200)
    groups = cf.fit_mondrian(pred, targets, cf.lac(), alpha=0.1, groups=zeros, num_groups=1)
    weighted = cf.fit_weighted(pred, targets, cf.lac(), alpha=0.1, weights=ones)
    np.testing.assert_array_equal(groups(pred, groups=zeros), plain(pred))
    np.testing.assert_array_equal(weighted(pred, weights=ones), plain(pred))
    shifted = cf.fit_label_shift(pred, targets, cf.lac(), alpha=0.1, prior_ratio=3 * np.ones(4))
    np.testing.assert_array_equal(shifted.threshold, np.full(4, plain.threshold))
    assert weighted.effective_rows == 200 and groups.rows.tolist() == [200]


def test_class_conditional_and_label_shift_by_loops():
    pred, targets = problem()
    scores = np.asarray(cf.lac().measure(pred, targets, None))
    few = np.where(targets == 3, 0, targets)
    fit = cf.fit_class_conditional(pred, few, cf.lac(), alpha=0.1)
    own = np.asarray(cf.lac().measure(pred, few, None))
    np.testing.assert_array_equal(fit.threshold, np.float32([oracle.threshold(own[few == k], 0.1) for k in range(4)]))
    assert np.isinf(fit.threshold[3]) and np.asarray(fit(pred))[:, 3].all()
    ratio = np.float32([0.2, 1, 3, 0])
    shifted = cf.fit_label_shift(pred, targets, cf.lac(), alpha=0.1, prior_ratio=ratio)
    expected = [oracle.threshold(scores, 0.1, ratio[targets], w) for w in ratio]
    np.testing.assert_array_equal(shifted.threshold, np.float32(expected))


def absolute_residual():
    def region(pred, threshold, key):
        return cf.Interval(pred.pooled_mean() - threshold, pred.pooled_mean() + threshold)

    return cf.Conformity(lambda pred, targets, key: abs(targets - pred.pooled_mean()), region, False, "residual")


def test_groups_and_weights_of_regression():
    rng = np.random.default_rng(3)
    mean, targets = rng.normal(size=(60, 2)).astype(np.float32), rng.normal(size=(60, 2)).astype(np.float32)
    pred, groups = bc.Gaussian(mean[None], np.ones((1, 60, 2), np.float32)), np.arange(60) % 2
    fit = cf.fit_mondrian(pred, targets, absolute_residual(), alpha=0.2, groups=groups, num_groups=2)
    residuals, inside = abs(targets - mean), fit(pred, groups=groups)
    expected = [[oracle.threshold(residuals[groups == g, d], 0.2) for d in range(2)] for g in range(2)]
    np.testing.assert_array_equal(fit.threshold, np.float32(expected))
    np.testing.assert_allclose(inside.high - inside.low, 2 * np.float32(expected)[groups], rtol=1e-5)
    weights = rng.gamma(1, size=60).astype(np.float32)
    weighted = cf.fit_weighted(pred, targets, absolute_residual(), alpha=0.2, weights=weights)
    interval = weighted(pred, weights=weights)
    half = [[oracle.threshold(residuals[:, d], 0.2, weights, w) for d in range(2)] for w in weights]
    np.testing.assert_allclose(interval.high, mean + np.float32(half), rtol=1e-5, atol=1e-6)


def test_groups_that_the_fit_did_not_have_get_everything_when_traced():
    pred, targets = problem()
    fit = cf.fit_mondrian(pred, targets, cf.lac(), alpha=0.1, groups=np.arange(200) % 2, num_groups=2)
    groups = np.arange(200) % 2 + 2 * (np.arange(200) == 5) - 3 * (np.arange(200) == 8)
    sets = jax.jit(lambda groups: fit(pred, groups=groups))(groups)
    assert sets[5].all() and sets[8].all() and not sets.all()
    many = cf.fit_mondrian(pred, targets, cf.lac(), alpha=0.4, groups=np.arange(200) % 66, num_groups=200)
    few = np.where(np.arange(200) == 5, -1, np.arange(200) % 66).astype(np.int8)  # which cannot count to 200
    sets = np.asarray(jax.jit(lambda pred, groups: many(pred, groups=groups))(pred, few))
    assert sets[5].all() and not sets.all()
    np.testing.assert_array_equal(np.delete(sets, 5, 0), np.delete(many(pred, groups=np.arange(200) % 66), 5, 0))


@pytest.mark.parametrize(
    "fit",
    [
        lambda pred, y: cf.fit_split(pred, y, cf.aps(), alpha=0.1, key=KEY),
        lambda pred, y: cf.fit_class_conditional(pred, y, cf.lac(), alpha=0.1),
        lambda pred, y: cf.fit_weighted(pred, y, cf.lac(), alpha=0.1, weights=jnp.ones(200)),
        lambda pred, y: cf.fit_mondrian(pred, y, cf.lac(), alpha=0.1, groups=jnp.arange(200) % 2, num_groups=2),
    ],
)
def test_fits_are_traced_and_saved(fit, tmp_path):
    pred, targets = problem()
    plain, traced = fit(pred, targets), jax.jit(fit)(pred, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), plain, traced)
    bc.save(tmp_path / "sets", plain)
    jax.tree.map(np.testing.assert_array_equal, bc.load(tmp_path / "sets", plain), plain)


SETS = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], bool)


def test_metrics_by_hand():
    targets = np.array([0, 0, 1, 1])
    assert cf.covered(SETS, targets).tolist() == [True, False, False, True]
    estimate = cf.set_coverage(SETS, targets)
    assert estimate.value == 0.5 and estimate.n == 4
    assert (estimate.low, estimate.high) == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson of 2 in 4
    assert cf.mean_set_size(SETS) == 1.5 and cf.singleton_share(SETS) == 0.25
    np.testing.assert_allclose(cf.classwise_coverage(SETS, targets), [0.5, 0.5, np.nan])
    np.testing.assert_allclose(cf.size_stratified_coverage(SETS, targets), [0, 0, 1, 1])
    np.testing.assert_allclose(
        cf.group_coverage(SETS, targets, np.array([0, 0, 0, 2]), num_groups=3), [1 / 3, np.nan, 1]
    )
    assert not cf.covered(SETS, np.array([-1, 3, 5, 9])).any()


def test_stored_oracles():
    """Recorded by float64 loops, MAPIE 1.6.0 and crepes 0.9.1: fitted on 100 rows at 0.1, used on the other 100."""
    logits, _, targets = stored()
    old, new = halves(logits)
    groups = json.loads((REFERENCE / "metrics_oracles.json").read_text())["oracles"]
    group = next(v for k, v in groups.items() if k.startswith("conformal_classification"))
    aps = group["ref_APS_nonrandomised"]["value"]
    lac = group["ref_LAC_qhat(k-th order stat, k=ceil((n+1)(1-a)))"]["value"]
    for score, threshold, expected in (
        (cf.lac(), lac, group["mapie_lac_[cov,size]"]["value"]),
        (cf.lac(), lac, group["crepes_hinge_nonsmoothed_[cov,size]"]["value"]),
        (cf.top_k(), 3, group["mapie_top_k_[cov,size]"]["value"]),
        (cf.aps(randomised=False), aps["qhat"], [aps["cov"], aps["size"]]),
    ):
        fit = cf.fit_split(old, targets[:100], score, alpha=0.1)
        np.testing.assert_allclose(fit.threshold, threshold, rtol=1e-6)
        got = cf.set_coverage(fit(new), targets[100:]).value, cf.mean_set_size(fit(new))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def peer_data(rows=200):
    rng = np.random.default_rng(8)
    logits = (1.5 * rng.normal(size=(rows, 4))).astype(np.float32)
    return logits, np.array([softmax(z) for z in logits]), (logits + rng.gumbel(size=(rows, 4))).argmax(1)


def test_mapie():
    """`SplitConformalClassifier`, equal sets: LAC and top k, and APS with MAPIE's own random numbers given to us."""
    pytest.importorskip("mapie")
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    logits, probs, targets = peer_data()

    class Given(ClassifierMixin, BaseEstimator):
        def fit(self, rows, targets):
            self.classes_, self.n_features_in_ = np.arange(4), 1
            return self

        def predict_proba(self, rows):
            return probs[np.asarray(rows)[:, 0].astype(int)]

        def predict(self, rows):
            return self.predict_proba(rows).argmax(1)

    def peer(score, **settings):
        rows = np.arange(200)[:, None]
        model = SplitConformalClassifier(
            Given().fit(None, None), confidence_level=0.9, conformity_score=score, prefit=True, random_state=0
        )
        model.conformalize(rows[:100], targets[:100])
        return model.predict_set(rows[100:], **settings)[1][:, :, 0]

    old, new = halves(logits)
    for name, score in (("lac", cf.lac()), ("top_k", cf.top_k())):
        np.testing.assert_array_equal(cf.fit_split(old, targets[:100], score, alpha=0.1)(new), peer(name))
    u = jnp.asarray(1 - np.random.RandomState(0).uniform(size=100), jnp.float32)[:, None]
    given = cf.class_conformity(
        lambda pred, key: class_scores._adaptive(pred.log_probs(), u), randomised=False, name="APS"
    )
    fit = cf.fit_split(old, targets[:100], given, alpha=0.1)
    theirs = peer("aps", conformity_score_params={"include_last_label": "randomized"})
    np.testing.assert_array_equal(fit(new), theirs)


def test_crepes():
    """`ConformalClassifier` without smoothing, float64: p-values and sets equal, to float32."""
    crepes = pytest.importorskip("crepes")
    logits, probs, targets = peer_data()
    old, new = halves(logits)
    model = crepes.ConformalClassifier().fit(1 - probs[np.arange(100), targets[:100]])
    p = cf.p_values(new, cf.lac(), cf.lac().measure(old, targets[:100], None))
    np.testing.assert_allclose(p, model.predict_p(1 - probs[100:], smoothing=False, all_classes=True), rtol=1e-6)
    sets = cf.fit_split(old, targets[:100], cf.lac(), alpha=0.1)(new)
    np.testing.assert_array_equal(sets, model.predict_set(1 - probs[100:], confidence=0.9, smoothing=False))
