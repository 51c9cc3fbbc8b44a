"""Proper scores of classes, and metrics of ensembles: member by member, disagreement, joint likelihood."""

import json
import math
import os
from functools import cache
from pathlib import Path

import jax
import numpy as np
import oracles_scores as oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import calibration_error as bin_error

import bayescal as bc
from bayescal.evaluate import measure, read_columns
from bayescal.metrics.classwise import top_label_conditional_calibration_error
from bayescal.metrics.joint import dyadic_nll, joint_log_prob, joint_nll
from bayescal.metrics.likelihood import (
    accuracy,
    brier,
    gibbs_nll,
    nll,
    ranked_probability_score,
    spherical_score,
    zero_probability_rows,
)
from bayescal.metrics.members import disagreement, diversity, member_metric
from bayescal.metrics.ranking import auroc
from bayescal.metrics.whole import whole

pytestmark = pytest.mark.core

REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"
MEMBERS, ROWS, CLASSES = 3, 200, 4  # of every array here, so that few programs are compiled

SCORES = {
    "nll": nll(),
    "clipped": nll(clip=0.05),
    "gibbs": gibbs_nll(),
    "brier": brier(),
    "half": brier(scale="half"),
    "spherical": spherical_score(),
    "rps": ranked_probability_score(),
    "rps of one": ranked_probability_score(normalised=True),
    "accuracy": accuracy(),
}
OF_MEMBERS = {
    "pairs": disagreement(),
    "pool": disagreement(against="pool"),
    "diversity": diversity(),
    **{f"{s} nll": member_metric(nll(), summary=s) for s in ("mean", "spread", "excess", "each")},
    "mean ece": member_metric(bc.calibration_error(num_bins=5)),
}
ALL = SCORES | OF_MEMBERS
JOINT = {
    "joint": joint_nll(tau=5),
    "dyadic": dyadic_nll(tau=4),
    "random": joint_nll(tau=5, per="block", key=jax.random.key(1)),
}
OF_RANKS = {"excess": member_metric(whole(auroc), summary="excess")}
FIGURES = {
    "nll": nll(),
    "rows": zero_probability_rows(),
    "clipped": nll(clip=1e-12),
    "gibbs": gibbs_nll(),
    "excess": member_metric(nll(), summary="excess"),
    "joint": joint_nll(tau=5),
}


@cache
def _compiled(metric):
    return jax.jit(metric.compute)


def values(pred, targets, metrics, weights=None, batch_size=2**16):
    """Values without the intervals of `evaluate`, whose programs cost more to compile."""
    streaming = {name: m for name, m in metrics.items() if isinstance(m, bc.types.Metric)}
    result = {}
    if streaming:
        sums = measure(pred, targets, streaming, weights=weights, batch_size=batch_size)
        result |= {name: m.compute(sums[name]) for name, m in streaming.items()}
    wholes = {name: m for name, m in metrics.items() if name not in streaming}
    if wholes:
        same = {"weights": weights, "batch_size": batch_size}
        read = {m.read: read_columns(pred, targets, m.read, **same) for m in wholes.values()}
        given = np.ones(len(targets), np.float32) if weights is None else np.asarray(weights, np.float32)
        result |= {name: float(_compiled(m)(*read[m.read], given)) for name, m in wholes.items()}
    return result


def predictions(rng, member_weights=None):
    logits = 2 * rng.normal(size=(MEMBERS, ROWS, CLASSES)).astype(np.float32)
    return bc.Categorical(logits, member_weights), rng.integers(0, CLASSES, ROWS)


MEMBER_WEIGHTS = {
    "equal": None,
    "weighted": np.repeat(np.float32([[2], [0], [1]]), ROWS, 1),
    "by row": (np.random.default_rng(3).integers(0, 3, (MEMBERS, ROWS)) + np.eye(MEMBERS)[1][:, None]).astype(
        np.float32
    ),
}


@pytest.mark.parametrize("kind", MEMBER_WEIGHTS)
def test_against_loops(rng, kind):
    pred, targets = predictions(rng, MEMBER_WEIGHTS[kind])
    probs, share = oracles.softmax(pred.logits), oracles.shares(pred.member_weights, MEMBERS, ROWS)
    some = ((share > 0).sum(0) > 1).astype(np.float32)  # rows with a pair; all, unless weights differ by row
    pairs, pool = oracles.disagreement(probs[:, some > 0], None if pred.member_weights is None else share[:, some > 0])
    logits = np.where(share.any(1)[:, None, None], pred.logits, np.nan)  # a member of weight 0 counts for nothing
    ours = values(bc.Categorical(logits, pred.member_weights), targets, ALL, weights=some)
    scores = oracles.classification(probs[:, some > 0], targets[some > 0], share[:, some > 0])
    assert (scores["clipped"] < scores["nll"]).any()
    for name, each in scores.items():
        np.testing.assert_allclose(ours[name], each.mean(), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(ours["pairs"], pairs.mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["pool"], pool.mean(), rtol=1e-5)
    diverse = oracles.diversity(probs[:, some > 0], share[:, some > 0]).mean()
    np.testing.assert_allclose(ours["diversity"], diverse, rtol=1e-5)
    loss = -np.log(np.take_along_axis(probs, targets[None, :, None], -1)[..., 0])
    rows = share * some
    alone = (rows * loss).sum(1) / np.where(rows.sum(1) > 0, rows.sum(1), np.nan)
    np.testing.assert_allclose(ours["each nll"], alone, rtol=1e-5)
    mass = rows.sum(1) / rows.sum()
    mean = np.nansum(mass * alone)
    np.testing.assert_allclose(ours["mean nll"], mean, rtol=1e-5)
    spread = math.sqrt(np.nansum(mass * (alone - mean) ** 2) / (1 - (mass**2).sum()))
    np.testing.assert_allclose(ours["spread nll"], spread, rtol=1e-4)
    np.testing.assert_allclose(ours["mean nll"], scores["gibbs"].mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["excess nll"], (scores["gibbs"] - scores["nll"]).mean(), rtol=1e-5)
    if kind == "equal":
        np.testing.assert_allclose(ours["spread nll"], alone.std(ddof=1), rtol=1e-4)
        each = [bin_error(p, targets, 5) for p in probs]
        np.testing.assert_allclose(ours["mean ece"], np.mean(each), rtol=1e-5)


def test_joint_against_loops(rng):
    pred, targets = predictions(rng, np.float32([2, 0, 1]))
    probs, weights = oracles.softmax(pred.logits), pred.member_weights
    ours = values(pred, targets, JOINT)
    fives = oracles.joint_nll(probs, targets, np.arange(ROWS).reshape(-1, 5), weights)
    np.testing.assert_allclose(ours["joint"], fives.mean() / 5, rtol=1e-5)
    pairs = oracles.dyadic_nll(probs, targets, np.arange(ROWS).reshape(-1, 2), 4, weights)
    np.testing.assert_allclose(ours["dyadic"], pairs.mean() / 4, rtol=1e-5)
    order = np.asarray(jax.random.permutation(jax.random.key(1), ROWS))
    shuffled = oracles.joint_nll(probs, targets, order.reshape(-1, 5), weights).mean()
    np.testing.assert_allclose(ours["random"], shuffled, rtol=1e-5)
    assert abs(shuffled - fives.mean()) > 1e-3
    blocks = bc.Categorical(pred.logits.reshape(MEMBERS, 40, 5, CLASSES), weights)
    np.testing.assert_allclose(-jax.jit(joint_log_prob)(blocks, targets.reshape(40, 5)), fives, rtol=1e-5)

    kept = (np.arange(ROWS) % 4 != 1).astype(np.float32) * 3  # 150 rows, of one weight
    present = oracles.joint_nll(probs, targets, np.flatnonzero(kept).reshape(-1, 5), weights).mean() / 5
    np.testing.assert_allclose(values(pred, targets, JOINT, kept)["joint"], present, rtol=1e-5)
    assert math.isnan(values(pred, targets, JOINT, np.arange(ROWS) < 4)["joint"])  # no block
    uneven = rng.integers(1, 4, ROWS)
    share = uneven.reshape(-1, 5).prod(1)
    np.testing.assert_allclose(
        values(pred, targets, JOINT, uneven)["joint"], share @ fives / share.sum() / 5, rtol=1e-5
    )

    alone = values(bc.Categorical(pred.logits, np.float32([0, 0, 1])), targets, JOINT)
    single = -np.log(probs[2, np.arange(ROWS), targets]).mean()  # its rows are independent
    np.testing.assert_allclose([alone["joint"], alone["dyadic"], alone["random"] / 5], single, rtol=1e-5)


def test_joint_sees_what_pooled_rows_do_not():
    """Members each sure of one of two worlds, all labels of one: a row costs log 3/2, and a block together no more."""
    logits = np.full((MEMBERS, ROWS, CLASSES), -50, np.float32)  # the product of 5 probabilities is 1e-109
    logits[0, :, 0] = logits[2, :, 1] = 0
    ours = values(bc.Categorical(logits, np.float32([2, 0, 1])), np.zeros(ROWS, np.int32), JOINT)
    np.testing.assert_allclose([5 * ours["joint"], ours["random"]], math.log(1.5), rtol=1e-5)
    np.testing.assert_allclose(4 * ours["dyadic"], math.log(1.5), rtol=1e-5)
    ours = values(bc.Categorical(logits, np.float32([2, 0, 1])), np.full(ROWS, 2, np.int32), JOINT)
    np.testing.assert_allclose(ours["joint"], 50, rtol=1e-6)  # and does not underflow


def test_whole_metrics_of_members(rng):
    from sklearn.metrics import roc_auc_score

    pred, targets = predictions(rng, np.float32([2, 0, 1]))
    probs = oracles.softmax(pred.logits)
    ranks = lambda p: roc_auc_score(p.argmax(1) == targets, p.max(1))
    expected = (2 * ranks(probs[0]) + ranks(probs[2])) / 3 - ranks((2 * probs[0] + probs[2]) / 3)
    np.testing.assert_allclose(values(pred, targets, OF_RANKS)["excess"], expected, atol=1e-6)


def test_by_hand():
    """Two members that are each surer of another class, on half of the rows; on the others they agree."""
    probs = np.zeros((MEMBERS, ROWS, CLASSES), np.float32)
    probs[0, :, 0], probs[0, :, 1] = 0.75, 0.25
    probs[1, :, 0], probs[1, :, 1] = 0.25, 0.75
    probs[:, ROWS // 2 :] = [0.5, 0.25, 0.125, 0.125]
    targets = np.zeros(ROWS, np.int32)
    two = np.repeat(np.float32([[1], [1], [0]]), ROWS, 1)
    with np.errstate(divide="ignore"):
        ours = values(bc.Categorical(np.log(probs), two), targets, ALL)
    half = lambda first, second: (first + second) / 2
    np.testing.assert_allclose(ours["nll"], math.log(2), rtol=1e-6)
    np.testing.assert_allclose(ours["gibbs"], half(-math.log(0.75 * 0.25) / 2, math.log(2)), rtol=1e-6)
    np.testing.assert_allclose(ours["brier"], half(0.5, 0.25 + 0.0625 + 2 / 64), rtol=1e-6)
    np.testing.assert_allclose(ours["half"], half(0.25, 0.125 + 0.03125 + 1 / 64), rtol=1e-6)
    np.testing.assert_allclose(ours["spherical"], half(math.sqrt(0.5), 0.5 / math.sqrt(0.34375)), rtol=1e-6)
    np.testing.assert_allclose(ours["rps"], half(0.25, 0.25 + 0.0625 + 1 / 64), rtol=1e-6)
    np.testing.assert_allclose(ours["rps of one"] * 3, ours["rps"], rtol=1e-6)
    assert ours["pairs"] == 0.5 and ours["pool"] == 0.25  # the pool of the first rows ties to class 0
    assert ours["accuracy"] == 1
    np.testing.assert_allclose(ours["diversity"], half(0.5 * math.log(3), 0), rtol=1e-5)
    alone = [half(-math.log(p), math.log(2)) for p in (0.75, 0.25)]
    np.testing.assert_allclose(ours["each nll"], [*alone, math.nan], rtol=1e-6)


def test_against_scikit_learn(rng):
    from sklearn.metrics import brier_score_loss, log_loss

    pred, targets = predictions(rng)
    probs, weights = oracles.softmax(pred.logits).mean(0), rng.uniform(size=ROWS).astype(np.float32)
    ours = values(pred, targets, ALL, weights)
    np.testing.assert_allclose(ours["nll"], log_loss(targets, probs, sample_weight=weights), rtol=1e-5)
    for name, by_half in (("brier", False), ("half", True)):
        theirs = brier_score_loss(targets, probs, sample_weight=weights, scale_by_half=by_half)
        np.testing.assert_allclose(ours[name], theirs, rtol=1e-5)
    binary = rng.uniform(size=ROWS).astype(np.float32)
    logit = bc.Bernoulli(np.log(binary / (1 - binary))[None])
    half = values(logit, targets % 2, {"half": brier(scale="half"), "rps": ranked_probability_score()})
    np.testing.assert_allclose(half["half"], brier_score_loss(targets % 2, binary), rtol=1e-5)
    np.testing.assert_allclose(half["rps"], half["half"], rtol=1e-5)  # of two classes they are one


def test_stored_oracles():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    stored = {k: v["value"] for k, v in json.loads(path.read_text())["oracles"]["proper_scores_classification"].items()}
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    pred, targets = bc.Categorical(inputs["logits"].astype(np.float32)[None]), inputs["Y"].astype(np.int32)
    ours = values(pred, targets, ALL)
    for key in ("sklearn_log_loss", "ref_log_loss"):
        np.testing.assert_allclose(ours["nll"], stored[key], rtol=2e-6)
    for key in ("sklearn_brier_multiclass(scale_by_half=False)", "ref_brier_sum_over_classes", "probmetrics_brier"):
        np.testing.assert_allclose(ours["brier"], stored[key], rtol=2e-6)
    for key in ("scoringrules_rps_[mean]", "ref_rps_unnormalised"):
        np.testing.assert_allclose(ours["rps"], stored[key], rtol=2e-6)
    np.testing.assert_allclose(-ours["spherical"], stored["ref_spherical(neg)"], rtol=2e-6)
    binary = values(
        bc.Bernoulli(inputs["zb"].astype(np.float32)[None]),
        inputs["yb"].astype(np.int32),
        {"half": brier(scale="half"), "rps": ranked_probability_score()},
    )
    np.testing.assert_allclose(binary["half"], stored["sklearn_brier_binary"], rtol=2e-6)
    of_class = [float(auroc(inputs["P"][:, k], targets == k)) for k in range(CLASSES)]
    np.testing.assert_allclose(np.mean(of_class), stored["sklearn_auroc_ovr_macro"], rtol=2e-6)


def test_zero_probabilities(rng):
    """Infinite stays infinite, says how many rows did it, and is finite with a clip that is named."""
    pred, targets = predictions(rng)
    logits = pred.logits.copy()
    logits[:, [3, 50, 120], targets[[3, 50, 120]]] = -np.inf
    logits[0, 7, targets[7]] = -np.inf  # of one member only: the pool is finite, the Gibbs mean is not
    pred = bc.Categorical(logits)
    ours = bc.evaluate(pred, targets, FIGURES)
    assert ours["nll"].value == ours["gibbs"].value == math.inf and ours["nll"].low is ours["nll"].high is None
    assert ours["rows"].value == 3 and ours["rows"].low is None
    assert "clipped at 1e-12" in ours["clipped"].convention and "no clipping" in ours["nll"].convention
    with np.errstate(divide="ignore"):
        p = np.maximum(oracles.softmax(logits).mean(0)[np.arange(ROWS), targets], 1e-12)
    np.testing.assert_allclose(ours["clipped"].value, -np.log(p).mean(), rtol=1e-5)
    weights = np.full(ROWS, 0.25, np.float32)
    weights[3] = 0
    assert values(pred, targets, FIGURES, weights)["rows"] == 2


def test_intervals_of_excess_and_joint(rng):
    """That of the excess is of paired differences, row by row; that of the joint likelihood over blocks."""
    pred, targets = predictions(rng)
    ours, probs = bc.evaluate(pred, targets, FIGURES), oracles.softmax(pred.logits)
    scores = oracles.classification(probs, targets)
    gain = scores["gibbs"] - scores["nll"]
    blocks = oracles.joint_nll(probs, targets, np.arange(ROWS).reshape(-1, 5)) / 5
    for name, values in (("excess", gain), ("joint", blocks)):
        np.testing.assert_allclose(ours[name].value, values.mean(), rtol=1e-5)
        half = 1.959964 * values.std() / math.sqrt(len(values))
        np.testing.assert_allclose((ours[name].high - ours[name].low) / 2, half, rtol=1e-3)
    assert ours["joint"].convention == "blocks of 5; consecutive rows; nats per row, no clipping"


def test_one_member(rng):
    pred, targets = predictions(rng)
    ours = values(bc.Categorical(pred.logits[:1]), targets, ALL)
    assert ours["excess nll"] == 0 and ours["pool"] == 0
    assert all(math.isnan(ours[k]) for k in ("pairs", "diversity", "spread nll"))  # there is no pair


def test_members_that_agree(rng):
    """All alike: nothing differs, exactly; and almost alike: a naive difference of entropies would be noise."""
    pred, targets = predictions(rng)
    same = values(bc.Categorical(np.stack([pred.logits[0]] * MEMBERS)), targets, ALL)
    assert same["pairs"] == same["pool"] == same["diversity"] == same["spread nll"] == 0
    close = pred.logits[0] + 1e-3 * rng.normal(size=pred.logits.shape).astype(np.float32)
    ours = values(bc.Categorical(close), targets, ALL)["diversity"]
    expected = oracles.diversity(oracles.softmax(close)).mean()
    assert expected < 1e-6  # below float32's resolution of an entropy
    np.testing.assert_allclose(ours, expected, rtol=2e-3)


def test_impossible_classes_of_members(rng):
    pred, targets = predictions(rng)
    logits = pred.logits.copy()
    logits[:, :, 3] = -np.inf  # ruled out by all: counts nothing
    finite = values(bc.Categorical(logits), targets % 3, ALL)["diversity"]
    np.testing.assert_allclose(finite, oracles.diversity(oracles.softmax(logits[..., :3])).mean(), rtol=1e-5)
    logits[0, 0, 2] = -np.inf  # by one
    assert values(bc.Categorical(logits), targets % 3, ALL)["diversity"] == math.inf


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**31))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    pred, targets = predictions(rng)
    weights = rng.multinomial(ROWS, np.ones(ROWS) / ROWS)
    weighted = values(pred, targets, ALL, weights)
    repeated = np.repeat(np.arange(ROWS), weights)
    order = rng.permutation(ROWS)
    members = np.roll(np.arange(MEMBERS), 1)
    versions = {
        "repetition": values(bc.take(pred, repeated), targets[repeated], ALL),
        "order": values(bc.take(pred, order), targets[order], ALL, weights[order]),
        "members": values(bc.Categorical(pred.logits[members]), targets, ALL, weights),
        "scale": values(pred, targets, ALL, weights * 0.25),
        "merging": values(bc.take(pred, order), targets[order], ALL, weights[order], batch_size=50),
    }
    for version, theirs in versions.items():
        for name in ALL:
            value = np.sort(theirs[name]) if name == "each nll" else theirs[name]
            expected = np.sort(weighted[name]) if name == "each nll" else weighted[name]
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6, err_msg=f"{version} {name}")


def test_relabelling_changes_no_score_but_the_ranked(rng):
    pred, targets = predictions(rng)
    new = np.array([2, 0, 3, 1])
    moved = bc.Categorical(pred.logits[..., np.argsort(new)])
    plain, renamed = values(pred, targets, ALL), values(moved, new[targets], ALL)
    for name in ALL:
        close = np.isclose(plain[name], renamed[name], rtol=1e-5).all()
        assert close == (not name.startswith("rps")), name


def test_gibbs_of_a_density_and_names(rng):
    mean = rng.normal(size=(2, ROWS, 1)).astype(np.float32)
    pred, y = bc.Gaussian(mean, np.ones_like(mean)), rng.normal(size=(ROWS, 1)).astype(np.float32)
    ours = values(pred, y, {"gibbs": gibbs_nll(), "joint": joint_nll(tau=5), "rows": zero_probability_rows()})
    density = -0.5 * ((y[None, :, 0] - mean[..., 0]) ** 2 + math.log(2 * math.pi)).astype(np.float64)
    np.testing.assert_allclose(ours["gibbs"], -density.mean(), rtol=1e-5)
    joint = -np.log(np.exp(density.reshape(2, -1, 5).sum(-1)).mean(0)).mean() / 5
    np.testing.assert_allclose(ours["joint"], joint, rtol=1e-5)
    assert ours["rows"] == 0
    assert nll() is nll() and joint_nll(key=jax.random.key(3)) is joint_nll(key=jax.random.key(3))
    assert joint_nll(key=jax.random.key(3)) is not joint_nll(key=jax.random.key(4))
    assert spherical_score().better == "higher" and "half the sum" in brier(scale="half").convention
    conditional = member_metric(top_label_conditional_calibration_error())
    assert conditional.convention.startswith("mean over members; within each") and not conditional.regular
