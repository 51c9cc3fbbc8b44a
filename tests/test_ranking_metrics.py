import json
import math
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_ranking as loops
import pytest

import bayescal as bc
from bayescal.evaluate import row_influences, standard_error
from bayescal.metrics.events import one_class
from bayescal.metrics.ranked import percentile_interval
from bayescal.metrics.ranking import average_precision, delong_interval, fpr_at_tpr, roc_curve
from bayescal.metrics.selective import (
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    prediction_rejection_ratio,
    risk_at_coverage,
    risk_coverage_curve,
    uncertainty_events,
)
from bayescal.metrics.whole import _FACTS, whole

pytestmark = pytest.mark.core

REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"
N = 120
REGULAR = {  # name -> (ours, settings, loop)
    "auroc": (bc.auroc, {}, oracles.auroc),
    "average precision": (average_precision, {}, loops.average_precision),
    "aurc": (aurc, {}, loops.aurc),
    "excess aurc": (excess_aurc, {}, loops.excess_aurc),
    "augrc": (augrc, {}, loops.augrc),
    "prr": (prediction_rejection_ratio, {}, partial(loops.prediction_rejection_ratio, max_rejection=1)),
    "prr half": (
        prediction_rejection_ratio,
        {"max_rejection": 0.45},
        partial(loops.prediction_rejection_ratio, max_rejection=0.45),
    ),
}
METRICS = REGULAR | {
    "fpr": (fpr_at_tpr, {"tpr": 0.9}, partial(loops.fpr_at_tpr, tpr=0.9)),
    "risk": (risk_at_coverage, {"coverage": 0.71}, partial(loops.risk_at_coverage, coverage=0.71)),
    "coverage": (coverage_at_risk, {"risk": 0.35}, partial(loops.coverage_at_risk, risk=0.35)),
}


def ours(scores, positive, weights=None, names=METRICS):
    return [METRICS[name][0](scores, positive, weights=weights, **METRICS[name][1]) for name in names]


def expected(scores, positive):
    return [loop(scores, positive) for _, _, loop in METRICS.values()]


on_device = jax.jit(lambda *columns: jnp.stack(ours(*columns)))  # compiled for (N,) columns, without and with weights


def rows(rng, n=N, kind="confidence"):
    """Scores with many ties and yes-or-no outcomes that go with them, mostly yes."""
    level = np.round(rng.uniform(size=n), 1).astype(np.float32)
    yes = rng.uniform(size=n) < 0.3 + 0.6 * level
    shift = {"confidence": 0, "any sign": 0.45, "negative": 1}[kind]
    return level - np.float32(shift), yes.astype(np.float32)


@pytest.mark.parametrize("kind", ["confidence", "any sign", "negative"])
def test_against_loops(rng, kind):
    for _ in range(3):
        scores, yes = rows(rng, kind=kind)
        truth = expected(scores, yes)
        np.testing.assert_allclose(ours(scores, yes), truth, rtol=1e-9)
        np.testing.assert_allclose(ours(scores, yes, np.full(N, 0.01)), truth, rtol=1e-9)  # the weights' scale is free
        np.testing.assert_allclose(on_device(scores, yes), truth, rtol=1e-5)
        np.testing.assert_allclose(on_device(scores, yes, np.full(N, 0.01, np.float32)), truth, rtol=1e-5)


def test_weights_are_repetition_and_rows_of_weight_0_are_absent(rng):
    for _ in range(3):
        scores, yes = rows(rng, kind="any sign")
        weights = rng.integers(0, 4, N).astype(np.float32)
        often = np.repeat(np.arange(N), weights.astype(int))
        truth = expected(scores[often], yes[often])
        hidden = np.where(weights > 0, scores, np.nan), np.where(weights > 0, yes, np.nan).astype(np.float32)
        np.testing.assert_allclose(ours(*hidden, weights), truth, rtol=1e-9)
        np.testing.assert_allclose(on_device(*hidden, weights), truth, rtol=1e-5)
        np.testing.assert_allclose(on_device(*hidden, 0.01 * weights), truth, rtol=1e-5)


def test_order_of_rows_and_monotone_maps_do_not_matter(rng):
    scores, yes = rows(rng)
    weights = rng.uniform(0.5, 2, N).astype(np.float32)
    order = rng.permutation(N)
    once = ours(scores, yes, weights)
    np.testing.assert_allclose(ours(scores[order], yes[order], weights[order]), once, rtol=1e-12)
    np.testing.assert_allclose(ours(np.exp(3.0 * scores), yes, weights), once, rtol=1e-12)
    np.testing.assert_allclose(on_device(scores, yes, weights), once, rtol=1e-5)
    np.testing.assert_array_equal(on_device(scores[order], yes[order]), on_device(scores, yes))


def test_duplicating_all_rows(rng):
    """Nothing changes but what counts rows one by one (AURC and its kin), by less than the rows' own share."""
    scores, yes = rows(rng)
    once, twice = (dict(zip(METRICS, ours(np.tile(scores, k), np.tile(yes, k)), strict=True)) for k in (1, 2))
    for name in ("auroc", "average precision", "augrc", "fpr"):
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-12, err_msg=name)
    for name in ("aurc", "excess aurc", "risk", "coverage"):
        np.testing.assert_allclose(twice[name], once[name], atol=1 / N, err_msg=name)


def test_ties_are_all_orders_at_once():
    confidence, correct = np.array([3.0, 2, 2, 2, 1, 1]), np.array([1, 0, 1, 1, 0, 1])
    np.testing.assert_allclose(aurc(confidence, correct), loops.aurc_over_all_orders(confidence, correct), rtol=1e-9)


def test_by_hand():
    scores, yes = np.array([4.0, 3, 2, 1]), np.array([True, False, True, True])
    by_hand = {
        bc.auroc: 1 / 3,  # of three pairs one is in order
        average_precision: (1 + 2 / 3 + 3 / 4) / 3,
        aurc: (0 + 1 / 2 + 1 / 3 + 1 / 4) / 4,
        excess_aurc: (0 + 1 / 2 + 1 / 3 + 1 / 4) / 4 - (1 / 4) / 4,
        augrc: (0 + 1 / 8 + 1 / 4 + 1 / 4) / 4,  # (1 - 1/3) 3/16 + 1/32
        prediction_rejection_ratio: (1 - 13 / 12) / (1 - 1 / 4),
        partial(fpr_at_tpr, tpr=0.5): 1,
        partial(fpr_at_tpr, tpr=0.3): 0,
        partial(risk_at_coverage, coverage=0.5): 1 / 2,
        partial(risk_at_coverage, coverage=0.51): 1 / 3,  # at least: three rows
        partial(coverage_at_risk, risk=0.3): 1,  # the risk of 2 and 3 rows is above
        partial(coverage_at_risk, risk=0.2): 1 / 4,
    }
    for function, value in by_hand.items():
        np.testing.assert_allclose(function(scores, yes), value, rtol=1e-9, err_msg=str(function))
    np.testing.assert_allclose(augrc(scores, yes), (1 - 1 / 3) * 3 / 16 + 1 / 32, rtol=1e-9)


def test_one_outcome_only():
    """AUROC has no value there, and says so; risks have one."""
    scores = np.linspace(0, 1, N).astype(np.float32)
    names = list(METRICS)
    all_right, all_wrong = (dict(zip(names, on_device(scores, np.full(N, y, np.float32)), strict=True)) for y in (1, 0))
    for on_host, values in ((1, all_right), (0, all_wrong)):
        np.testing.assert_allclose(ours(scores, np.full(N, on_host)), list(values.values()), rtol=1e-5, atol=1e-6)
    undefined = {"auroc", "fpr", "prr", "prr half"}
    assert {name for name in names if math.isnan(all_right[name])} == undefined
    assert {name for name in names if math.isnan(all_wrong[name])} == undefined | {"average precision"}
    np.testing.assert_allclose(
        [all_right[k] for k in ("aurc", "excess aurc", "augrc", "risk", "coverage")], [0, 0, 0, 0, 1]
    )
    np.testing.assert_allclose([all_wrong[k] for k in ("aurc", "excess aurc", "augrc")], [1, 0, 0.5], atol=1e-6)
    assert float(all_wrong["coverage"]) == 0
    assert all(math.isnan(x) for x in delong_interval(scores, np.ones(N)))
    assert all(math.isnan(x) for x in delong_interval(scores, np.arange(N) == 5))  # a single positive


def test_unusable_rows_are_nan(rng):
    scores, yes = rows(rng)
    for broken in ((np.where(np.arange(N) == 3, np.nan, scores), yes), (scores, np.where(np.arange(N) == 3, 2, yes))):
        broken = [x.astype(np.float32) for x in broken]
        assert np.isnan(on_device(*broken)).all() and np.isnan(ours(*broken)).all()
    for weights in (np.zeros(N, np.float32),):
        assert np.isnan(on_device(scores, yes, weights)).all() and np.isnan(ours(scores, yes, weights)).all()
    assert np.isnan(ours(np.zeros(0), np.zeros(0))).all()


def test_single_row():
    assert float(aurc(np.ones(1), np.zeros(1))) == 1 and math.isnan(bc.auroc(np.ones(1), np.ones(1)))


def test_infinite_close_and_signed_zero_scores():
    scores, yes = np.array([-np.inf, -0.0, 0.0, np.inf], np.float32), np.array([0, 0, 1, 1])
    assert float(bc.auroc(scores, yes)) == float(bc.auroc(jnp.asarray(scores), yes)) == 0.875
    assert float(bc.auroc(np.array([0, 1, 200, 255], np.uint8), yes)) == 1  # no sign to change
    assert float(bc.auroc(np.array([2**24, 2**24 + 1]), np.array([0, 1]))) == 1
    close = np.array([1.0, 1.0 + 1e-9])  # float32 would tie them
    assert float(aurc(close, np.array([0, 1]))) == 0.25


DIFFERENTIATED = ["auroc", "average precision", "aurc", "augrc", "prr half"]


@jax.jit
@jax.vmap
def values_and_slopes(scores, yes, weights):
    values, back = jax.vjp(lambda w: jnp.stack(ours(scores, yes, w, DIFFERENTIATED)), weights)
    return values, jax.vmap(back)(jnp.eye(len(DIFFERENTIATED)))[0]


def uniform_rows(seed):
    """200 data sets of 400 rows: confidence uniform, and the chance of being right."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=(200, 400)).astype(np.float32)
    return scores, (rng.uniform(size=(200, 400)) < scores).astype(np.float32)


def test_gradient_in_the_weights(rng):
    """What intervals by influence rest on: against differences of the float64 version."""
    scores, yes = uniform_rows(0)
    scores = scores.round(1)
    weights = rng.uniform(1, 3, (200, 400))
    weights[:, 0] = 1  # the unit, which stays
    slopes = np.asarray(values_and_slopes(scores, yes, weights.astype(np.float32))[1])
    for row in (1, 7, 63):
        step = 1e-4 * (np.arange(400) == row)
        ends = [np.array(ours(scores[5], yes[5], weights[5] + sign * step, DIFFERENTIATED)) for sign in (1, -1)]
        smooth = slice(-1)  # the last rejects whole rows: its steps are for the coverage of its interval
        np.testing.assert_allclose(slopes[5, smooth, row], ((ends[0] - ends[1]) / 2e-4)[smooth], rtol=1e-3, atol=2e-6)
    assert (np.abs(slopes[5]).max(1) > 1e-4).all()


def test_vmap_over_weights_is_a_loop_and_sorts_once(rng):
    scores, yes = rows(rng)
    weights = rng.uniform(0.5, 2, (3, N)).astype(np.float32)
    names = ["auroc", "aurc", "coverage"]
    many = jax.jit(jax.vmap(lambda s, y, w: jnp.stack(ours(s, y, w, names)), (None, None, 0)))
    alone = [ours(scores, yes, w, names) for w in weights.astype(float)]
    np.testing.assert_allclose(many(scores, yes, weights), alone, rtol=1e-5)
    text = str(jax.make_jaxpr(jax.vmap(lambda w: aurc(jnp.asarray(scores), yes, weights=w)))(weights))
    assert text.count(" sort[") == 1 and f"f32[3,{N}] = sort" not in text


def test_against_scikit_learn(rng):
    from sklearn import metrics as sk

    scores, yes = rows(rng, kind="any sign")
    weights = rng.uniform(0.5, 2, N)
    for w in (None, weights):
        args = {"sample_weight": w}
        np.testing.assert_allclose(bc.auroc(scores, yes, weights=w), sk.roc_auc_score(yes, scores, **args), rtol=1e-12)
        np.testing.assert_allclose(
            average_precision(scores, yes, weights=w), sk.average_precision_score(yes, scores, **args), rtol=1e-12
        )
        curve = roc_curve(scores, yes, weights=w)
        theirs = sk.roc_curve(yes, scores, drop_intermediate=False, **args)
        for mine, other in zip(curve, theirs, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-12)
        np.testing.assert_allclose(
            fpr_at_tpr(scores, yes, weights=w), curve.fpr[(curve.tpr >= 0.95 - 1e-12).argmax()], rtol=1e-12
        )


def test_stored_oracles():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    stored = json.loads(path.read_text())["oracles"]
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    confidence, correct = inputs["P"].max(1), inputs["P"].argmax(1) == inputs["Y"]
    scores, outside = inputs["s"], inputs["o"]
    selective, ood = (
        {k: v["value"] for k, v in stored[g].items()} for g in ("selective_prediction", "ood_detection(ties)")
    )
    pairs = [
        (aurc(confidence, correct), selective["ref_AURC_discrete_mean (Geifman 2019 def.)"]),
        (excess_aurc(confidence, correct), selective["ref_EAURC_exact_finite_sample"]),
        (augrc(confidence, correct), selective["ref_AUGRC_identity (1-AUROC_f)*r(1-r)+r^2/2"]),
        (bc.auroc(confidence, correct), selective["sklearn_AUROC_failure(correct vs conf)"]),
        (risk_at_coverage(confidence, correct, coverage=0.8), selective["torch-uncertainty_RiskAt80Cov"]),
        (coverage_at_risk(confidence, correct, risk=0.05), 0.025),  # the peer's NaN is a defect
        (bc.auroc(scores, outside), ood["sklearn_auroc"]),
        (average_precision(scores, outside), ood["sklearn_average_precision_OOD_positive"]),
        (average_precision(-scores, 1 - outside), ood["sklearn_average_precision_ID_positive"]),
        (fpr_at_tpr(scores, outside), ood["fpr95_OOD_positive(OpenOOD)"]),
        (fpr_at_tpr(-scores, 1 - outside), ood["fpr95_ID_positive(ODIN)"]),
    ]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-12)
    # the other conventions of AURC, from our curve
    curve = risk_coverage_curve(confidence, correct)
    trapezoid = np.trapezoid(curve.risk, curve.coverage)
    np.testing.assert_allclose(trapezoid / (1 - 1 / 200), selective["torch-uncertainty_AURC"], rtol=1e-8)
    np.testing.assert_allclose(trapezoid + curve.risk[0] / 200, selective["fd-shifts"]["aurc"], rtol=1e-9)


def test_augrc_is_auroc_and_error_rate(rng):
    scores, yes = rows(rng)
    wrong = 1 - yes.mean(dtype=np.float64)
    value = (1 - float(bc.auroc(scores, yes))) * wrong * (1 - wrong) + wrong**2 / 2
    np.testing.assert_allclose(augrc(scores, yes), value, rtol=1e-12)


def test_curves(rng):
    scores, yes = rows(rng)
    weights = rng.integers(0, 3, N)
    curve = risk_coverage_curve(scores, yes, weights=weights)
    np.testing.assert_allclose(curve.coverage * curve.risk, curve.generalised_risk, rtol=1e-12)
    for coverage, risk, threshold in zip(curve.coverage, curve.risk, curve.threshold, strict=True):
        accepted = weights * (scores >= threshold)
        np.testing.assert_allclose(coverage, accepted.sum() / weights.sum(), rtol=1e-12)
        np.testing.assert_allclose(risk, (accepted * (1 - yes)).sum() / accepted.sum(), rtol=1e-12)
    area = np.trapezoid(np.r_[0, curve.generalised_risk], np.r_[0, curve.coverage])
    np.testing.assert_allclose(area, augrc(scores, yes, weights=weights), rtol=1e-12)


def test_normal_intervals_cover():
    """With confidence uniform, and the chance of being right, each has a closed form: risk at coverage t is t / 2."""
    kept = 0.55  # with at most 0.45 rejected
    some, best = (1 - kept**2) / 4 / (1 - kept), 1 + 0.5 * math.log(kept) / (1 - kept)
    truth = np.array([5 / 6, 5 / 6, 1 / 4, 1 / 6, (0.5 - some) / (0.5 - best)])
    values, slopes = values_and_slopes(*uniform_rows(3), np.ones((200, 400), np.float32))
    errors = np.sqrt((np.asarray(slopes, np.float64) ** 2).sum(2))
    covered = dict(zip(DIFFERENTIATED, (np.abs(values - truth) <= 1.96 * errors).mean(0), strict=True))
    assert all(0.9 <= x <= 0.99 for x in covered.values()), covered


def test_own_intervals_are_those_of_the_influence(rng):
    logits = rng.normal(size=(2, N, 3)).round(1).astype(np.float32)
    pred, targets, weights = bc.Categorical(logits), rng.integers(0, 3, N), rng.uniform(0.5, 2, N).astype(np.float32)
    for w in (None, weights):
        for function in (average_precision, aurc):
            metric = whole(function)
            estimate = bc.evaluate(pred, targets, {"it": metric}, weights=w)["it"]
            error = standard_error(row_influences(metric, pred, targets, weights=w), w)
            np.testing.assert_allclose(
                [estimate.low, estimate.high], estimate.value + 1.959964 * error * np.array([-1, 1]), rtol=1e-4
            )
        metric = whole(bc.auroc, one_class(1))  # DeLong: the influence on the logit scale, but for n / (n - 1)
        estimate = bc.evaluate(pred, targets, {"it": metric}, weights=w)["it"]
        error = standard_error(row_influences(metric, pred, targets, weights=w), w)
        spread = np.diff([math.log(x / (1 - x)) for x in (estimate.low, estimate.high)])[0] / 2 / 1.959964
        np.testing.assert_allclose(spread * estimate.value * (1 - estimate.value), error, rtol=0.03)


def test_evaluate_takes_them_for_any_score(rng):
    pred = bc.Categorical(rng.normal(size=(2, N, 3)).astype(np.float32))
    targets = rng.integers(0, 3, N)
    entropy = uncertainty_events(lambda pred: pred.entropy(), "entropy")
    metrics = {
        "confidence": whole(bc.auroc),
        "entropy": whole(aurc, entropy),
        "risk": whole(risk_at_coverage, coverage=0.5),
    }
    found = bc.evaluate(pred, targets, metrics)
    confidence, label = (np.asarray(x) for x in pred.top_label())
    np.testing.assert_allclose(found["confidence"].value, oracles.auroc(confidence, label == targets), rtol=1e-5)
    np.testing.assert_allclose(
        found["entropy"].value, loops.aurc(-np.asarray(pred.entropy()), label == targets), rtol=1e-5
    )
    np.testing.assert_allclose(
        found["risk"].value, loops.risk_at_coverage(confidence, label == targets, 0.5), rtol=1e-5
    )
    assert found["entropy"].convention.startswith("top label, ranked by low entropy; mean selective risk")
    assert "positive class: the event" in found["confidence"].convention and found["risk"].low < found["risk"].high
    assert "coverage = 0.5" in found["risk"].convention
    assert metrics["confidence"].better == "higher" and metrics["entropy"].better == "lower"


def test_percentile_interval(rng):
    """About as wide as the delta method says: for a threshold within independent errors, root of risk (1 - risk) / k."""
    scores, yes = rng.uniform(size=400), rng.uniform(size=400) < 0.7
    draw = partial(percentile_interval, risk_at_coverage, scores, yes, coverage=0.5, num_draws=200)
    low, high = draw(seed=1)
    risk = float(risk_at_coverage(scores, yes, coverage=0.5))
    assert low < risk < high and draw(seed=1) == (low, high) != draw(seed=2)
    np.testing.assert_allclose((high - low) / 2 / 1.96, math.sqrt(risk * (1 - risk) / 200), rtol=0.25)
    assert np.isnan(percentile_interval(bc.auroc, np.ones(2), np.ones(2), seed=0)).all(), "one class only"


def test_every_metric_states_its_convention():
    for function, _, _ in METRICS.values():
        facts = _FACTS[function]
        assert facts.convention and facts.interval
    for name in ("tpr = 0.95", "positive class"):
        assert name in whole(bc.fpr_at_tpr).convention
    with pytest.raises(TypeError, match="`settings` of fpr_at_tpr must be among tpr, got tp"):
        whole(bc.fpr_at_tpr, tp=0.9)
