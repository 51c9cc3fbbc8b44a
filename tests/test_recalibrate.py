"""The studies of post-hoc calibration: ranks as published, harm, refusals and cost on made-up sets, and their smokes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pooling_orders
import pytest
import recalibrate
import recalibrate_report
from conftest import REPOSITORY
from recalibrate import Config, Rows, before_and_after, cost, harm, judge, ranks
from recalibrate_data import PredictionSet, digits, stored

import bayescal as bc
from bayescal.config import load_config
from bayescal.types import Estimate

pytestmark = pytest.mark.core

DATA = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))

# AUC of C4.5 and three ways to tune it on 14 data sets (Demsar 2006, table 6, recalled); the last but one's .975 and .975
# are ranked 2 and 3 there, by digits that the table does not show
AUC = """
.763 .768 .771 .798   .599 .591 .590 .569   .954 .971 .968 .967   .628 .661 .654 .657   .882 .888 .886 .898
.936 .931 .916 .931   .661 .668 .609 .685   .583 .583 .563 .625   .775 .838 .866 .875   1 1 1 1
.940 .962 .965 .962   .619 .666 .614 .669   .972 .981 .9751 .975   .957 .978 .946 .970
"""
TUNED = ("C4.5", "+m", "+cf", "+m+cf")


def figures(**values) -> dict[str, Any]:
    return {"figures": {name: Estimate(float(value), None, None) for name, value in values.items()}}


ERRORS = 1 - np.array(AUC.split(), float).reshape(14, 4)


def demsar() -> dict[str, dict[str, Any]]:
    return {f"set {i}": {n: figures(nll=x) for n, x in zip(TUNED, row, strict=True)} for i, row in enumerate(ERRORS)}


def made_up(rows=120, classes=3, sharpness=2.5, seed=0, members=1):
    """Over-confident logits, half to fit on; further members see them through noise."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(rows, classes))).astype(np.float32)
    labels = (logits / sharpness + rng.gumbel(size=logits.shape)).argmax(1).astype(np.int32)
    logits = (logits + rng.normal(size=(members, *logits.shape)) * (np.arange(members) > 0)[:, None, None]).astype(
        np.float32
    )
    fit, judged = (Rows(bc.Categorical(logits[:, i]), labels[i]) for i in (slice(0, rows // 2), slice(rows // 2, None)))
    return PredictionSet(fit, judged, "halves", "noise")


@pytest.fixture(scope="module")
def sets():
    return {"sharp": made_up(), "calibrated": made_up(sharpness=1.0, seed=1)}


def test_ranks_are_those_published():
    """Mean ranks 3.143, 2.000, 2.893, 1.964 and a distance of 1.25 = 2.569 sqrt(4 x 5 / (6 x 14))."""
    found = demsar()
    got = ranks(found, "nll", {name: name for name in found})
    np.testing.assert_allclose([got["mean"][n] for n in TUNED], [3.143, 2.0, 2.893, 1.964], atol=5e-4)
    np.testing.assert_allclose(got["critical_difference"], 2.569 * np.sqrt(20 / 84), rtol=2e-4)
    assert got["critical_difference_if_dependent"] == got["critical_difference"] and got["data"] == 14
    # Friedman's chi square by hand, 9.28 in the paper; scipy's is corrected for ties
    placed = np.array([[sum(y < x for y in row) + (sum(y == x for y in row) + 1) / 2 for x in row] for row in ERRORS])
    ties = sum(c**3 - c for row in ERRORS for c in np.unique(row, return_counts=True)[1])
    chi = 12 / (14 * 4 * 5) * (placed.sum(0) ** 2).sum() - 3 * 14 * 5
    np.testing.assert_allclose(chi, 9.28, atol=5e-3)
    from scipy.stats import chi2

    np.testing.assert_allclose(got["friedman_p"], chi2.sf(chi / (1 - ties / (14 * 4 * 15)), 3), rtol=1e-6)


def test_sets_on_the_same_data_count_for_less():
    """14 copies are one set; 7 and 7 are two; 12, 1 and 1 are 14^2 / 146."""
    found = demsar()
    for sizes, number in (((14,), 1), ((7, 7), 2), ((12, 1, 1), 196 / 146)):
        data = dict(zip(found, np.repeat(list("abc")[: len(sizes)], sizes), strict=True))
        got = ranks(found, "nll", data)
        np.testing.assert_allclose(
            got["critical_difference_if_dependent"], 2.569 * np.sqrt(20 / (6 * number)), rtol=2e-4
        )
        np.testing.assert_allclose(got["critical_difference"], 2.569 * np.sqrt(20 / 84), rtol=2e-4)


def test_ranks_leave_out_what_was_refused_somewhere():
    found = demsar()
    found["set 3"]["+m"] = {"refused": "why"}
    got = ranks(found, "nll", dict.fromkeys(found, "a"))
    assert list(got["mean"]) == ["C4.5", "+cf", "+m+cf"]
    np.testing.assert_allclose(sum(got["mean"].values()), 6)
    for own in found.values():
        own |= {name: {"refused": "why"} for name in TUNED[1:]}
    alone = ranks(found, "nll", dict.fromkeys(found, "a"))
    assert alone["mean"] == {"C4.5": 1} and np.isnan([alone["critical_difference"], alone["friedman_p"]]).all()


def test_harm_by_hand():
    def after(nll, brier, ece):
        return {**figures(ece=ece), "difference": {"nll": Estimate(*nll), "brier": Estimate(*brier)}, "clipped": 2}

    falls, noise, rises = (-0.2, -0.3, -0.1), (-0.1, -0.3, 0.1), (0.2, 0.1, 0.3)
    own = {
        "none": figures(ece=0.05),
        "good": after(falls, falls, 0.04),
        "nll rises": after(rises, noise, 0.01),
        "both rise": after(rises, rises, 0.09),
        "ece rises": after(falls, noise, 0.06),
        "ece rises, nll falls within noise": after(noise, rises, 0.06),
        "noise": after((0.1, -0.1, 0.3), noise, 0.06),
        "no interval": after((0.1, None, None), noise, 0.05),
        "not fitted": {"refused": "why"},
    }
    told = "ece, although nll falls"
    found = {x["calibrator"]: x for x in harm({"a": own})}
    assert {name: x["rises"] for name, x in found.items()} == {
        "nll rises": ["nll"],
        "both rise": ["nll", "brier"],
        "ece rises": [told],
        "ece rises, nll falls within noise": ["brier", told],
    }
    one = found["both rise"]
    np.testing.assert_allclose(one["ece"], 0.04)
    assert (
        one["nll"] == Estimate(*rises) and one["brier"] == Estimate(*rises) and (one["set"], one["clipped"]) == ("a", 2)
    )


def test_before_and_after(sets, capsys):
    """Figures are those of the judged rows, and what cannot be fitted is there with its reason."""
    found = before_and_after(sets, Config(calibrators=("temperature", "platt")))
    assert list(found) == list(sets) and all(list(own) == ["none", "temperature", "platt"] for own in found.values())
    for name, own in found.items():
        assert "two classes, got 3" in own["platt"]["refused"]
        fit, judged = sets[name].fit, sets[name].judged
        scaler = bc.fit_temperature(fit.pred, fit.targets)
        logits, rows = np.asarray(judged.pred.logits[0], np.float64), np.arange(len(judged.targets))
        nll = {}
        for when, temperature in (("none", 1.0), ("temperature", float(scaler.temperature))):
            scaled = logits / temperature
            nll[when] = np.log(np.exp(scaled).sum(1)) - scaled[rows, judged.targets]
            np.testing.assert_allclose(own[when]["figures"]["nll"].value, nll[when].mean(), rtol=1e-5)
        moved, change = nll["temperature"] - nll["none"], own["temperature"]["difference"]["nll"]
        np.testing.assert_allclose(change.value, moved.mean(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(change.high - change.low, 2 * 1.96 * moved.std() / np.sqrt(len(rows)), rtol=0.02)
        assert own["temperature"]["clipped"] == 0
    assert "2 of 2: calibrated" in capsys.readouterr().out


def test_a_map_that_gives_nan_is_reported(sets, monkeypatch):
    """It does not end the study of the others."""
    nan = lambda pred: bc.Categorical(pred.logits * np.float32("nan"))
    monkeypatch.setattr(recalibrate, "fit_named", lambda name, *_: nan if name == "beta" else lambda pred: pred)
    found = before_and_after({"sharp": sets["sharp"]}, Config(calibrators=("beta", "vector")))["sharp"]
    assert "NaN" in found["beta"]["refused"] and found["vector"]["difference"]["nll"].value == 0


def test_rows_below_the_clip_are_counted(sets):
    judged = sets["sharp"].judged
    rows, wrong = np.arange(5), (judged.targets[:5] + 1) % 3
    logits = np.array(judged.pred.logits)
    logits[0, rows, wrong] = logits[0, rows, judged.targets[:5]] + np.array([20, 27, 28, 60, np.inf])
    logits[0, 4] = np.where(np.arange(3) == wrong[4], 0, -np.inf)
    found = judge(bc.Categorical(logits), judged, 15)
    assert found["clipped"] == 3  # e^-28, e^-60 and zero lie below 1e-12 = e^-27.6
    at_the_clip = np.where(np.arange(3) == wrong[4], 0, np.log(1e-12)).astype(np.float32)
    logits[0, 2:5] = np.where(np.arange(3) == wrong[2:5, None], 0, at_the_clip.min())
    assert judge(bc.Categorical(logits), judged, 15)["clipped"] == 0


def test_cost(sets, capsys):
    """By hand for one draw of all rows, without an interval; refused draws are counted with the reason."""
    config = Config(cost_of=("sharp",), cost_calibrators=("temperature", "platt"), sizes=(40, 60, 5000), draws=3)
    found = cost(sets, config)["sharp"]
    assert list(found["temperature"]) == [40, 60]
    whole, few = found["temperature"][60], found["temperature"][40]
    own = before_and_after({"sharp": sets["sharp"]}, Config(calibrators=("temperature",)))["sharp"]
    for metric, change in whole["difference"].items():
        moved = own["temperature"]["figures"][metric].value - own["none"]["figures"][metric].value
        np.testing.assert_allclose(change.value, moved, rtol=1e-5, atol=1e-7)
        assert (change.low, change.high, change.n) == (None, None, 1)
    assert few["fitted"] == 3 and few["difference"]["nll"].low < few["difference"]["nll"].value
    assert found["platt"][40]["fitted"] == 0 and found["platt"][40]["refused"] == 3
    assert "two classes" in found["platt"][40]["why"][0] and not found["platt"][40]["difference"]
    assert recalibrate_report._cost_cell(found["platt"][40]) == "3 of 3 not fitted"


def test_mistakes_are_told_before_anything_is_fitted(tmp_path, monkeypatch, sets, unchecked):
    monkeypatch.setattr(recalibrate, "digits", lambda seed: sets)
    monkeypatch.setattr(recalibrate, "before_and_after", lambda *_: pytest.fail("fitted"))
    for wrong, message in (
        ({"source": "disk"}, "`source` must be one of stored, digits, got disk"),
        ({"calibrators": ("temprature",)}, "Did you mean 'temperature'"),
        ({"cost_calibrators": ("temprature",)}, "Did you mean 'temperature'"),
        ({"cost_of": ("mlp",)}, "`cost_of` must name sets of this source, got 'mlp'. They are sharp, calibrated"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate.main(Config(**wrong), tmp_path)
    with pytest.raises(ValueError, match="`source` must be one of stored, digits, got disk"):
        pooling_orders.main(pooling_orders.Config(source="disk"), tmp_path)


def test_smokes(tmp_path, monkeypatch, capsys):
    """Both experiments with their smallest yaml: what they leave, and that every order is what its name says."""
    pool = made_up(members=4)
    sets = {"mlp 32": made_up(), "mean of 4 mlp 128-128": pool}
    for module in (recalibrate, pooling_orders):
        monkeypatch.setattr(module, "digits", lambda seed: sets)
    config = replace(load_config(Config, REPOSITORY / "configs/recalibrate/smoke.yaml"), sizes=(40,))
    recalibrate.main(config, tmp_path / "a")
    result = json.loads((tmp_path / "a/metrics.json").read_text())
    assert set(result["sets"]) == set(sets) and result["rows"]["mlp 32"]["data"] == "noise"
    assert {"none", "temperature", "isotonic"} == set(result["sets"]["mlp 32"])
    page = (tmp_path / "a/report.html").read_text()
    for words in (
        "Ranks",
        "copies of each other",
        "by chance if none were real",
        "What could not be fitted",
        "not counted",
    ):
        assert words in page, words
    assert page.count("<img") == 3 and (tmp_path / "a/config.yaml").is_file()
    assert "where it hurts" in capsys.readouterr().out

    pooling_orders.main(
        load_config(pooling_orders.Config, REPOSITORY / "configs/pooling_orders/smoke.yaml"), tmp_path / "b"
    )
    orders = json.loads((tmp_path / "b/metrics.json").read_text())["orders"]
    scaler = bc.fit_temperature(pool.fit.pred, pool.fit.targets)
    after = bc.evaluate(scaler(pool.judged.pred), pool.judged.targets, {"nll": bc.nll()})["nll"].value
    then = orders["pool, then calibrate"]
    np.testing.assert_allclose(then["figures"]["nll"]["value"], after, rtol=1e-5)
    np.testing.assert_allclose(then["temperature still wanted"], 1, atol=1e-3)
    assert then["nll - nll of pool, then calibrate"]["value"] == 0
    members = [bc.fit_temperature(bc.Categorical(x[None]), pool.fit.targets) for x in pool.fit.pred.logits]
    by_hand = [float(x.temperature) for x in members]
    np.testing.assert_allclose(orders["calibrate members, then pool"]["temperatures"], by_hand, rtol=1e-3)
    assert "not counted" in (tmp_path / "b/report.html").read_text()


def test_stored_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("BAYESCAL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"without .*densenet_BC_100_12\.npz, .* and others\. Set it, or run"):
        stored()


@pytest.fixture(scope="module")
def recorded():
    if not (DATA / "llm/mmlu_option_probs.parquet").is_file():
        pytest.skip("set BAYESCAL_DATA to the folder of the shared data")
    pytest.importorskip("pyarrow")
    return stored()


def test_stored_sets(recorded, monkeypatch):
    """33 sets on five collections; networks whose labels differ are not averaged."""
    counts = np.unique([s.data for s in recorded.values()], return_counts=True)
    assert dict(zip(*(x.tolist() for x in counts), strict=True)) == {
        "CIFAR-10 test images": 8,
        "CIFAR-100 test images": 1,
        "KITTI objects": 5,
        "MNIST test images": 5,
        "MMLU questions": 14,
    }
    read = bc.read_predictions
    swapped = lambda path: read(path)._replace(targets=np.zeros(10000)) if path.stem == "wrn_28_10" else read(path)
    monkeypatch.setattr(bc, "read_predictions", swapped)
    with pytest.raises(ValueError, match=r"same labels in the same order .* got others in wrn_28_10"):
        stored()


@pytest.mark.slow
def test_ece_of_the_pool_rises_while_its_nll_falls(recorded):
    """As float64 numpy says: 0.0120 to 0.0151, and 0.1162 to 0.1159."""
    pool = {"pool": recorded["mean of the 4 networks"]}
    own = before_and_after(pool, Config(calibrators=("temperature",)))["pool"]
    got = [own[when]["figures"][m].value for m in ("ece", "nll") for when in ("none", "temperature")]
    np.testing.assert_allclose(got, [0.0120, 0.0151, 0.1162, 0.1159], atol=1e-4)
    assert "ece, although nll falls" in harm({"pool": own})[0]["rises"]


@pytest.mark.slow
def test_digits():
    """The networks that the yamls without stored predictions name."""
    sets = digits(0, epochs=3)
    config = load_config(Config, REPOSITORY / "configs/recalibrate/digits.yaml")
    assert {*config.cost_of, pooling_orders.SETS["digits"]} <= set(sets)
    for name, one in sets.items():
        assert one.fit.pred.num_members == (4 if name.startswith("mean of 4") else 1)
        assert len(one.fit.targets) == len(one.judged.targets) == 360 and one.data == "digits"
    alone, pool = sets["mlp 32"].judged, sets["mean of 4 mlp 32"].judged
    np.testing.assert_array_equal(alone.pred.logits[0], pool.pred.logits[0])
    assert (np.asarray(pool.pred.pooled_mean()).argmax(1) == pool.targets).mean() > 0.5
