"""The study of out-of-distribution scores: its smoke run, and the arithmetic of its table."""

import json

import numpy as np
import ood_detection as study
import ood_detection_report as report
import pytest
from conftest import REPOSITORY

import bayescal as bc
from bayescal.config import load_config

SMOKE = REPOSITORY / "configs" / "ood_detection" / "smoke.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ood")
    config = load_config(study.Config, SMOKE)
    return config, folder, study.main(config, folder)


def test_smoke_writes_every_score(run):
    config, folder, _ = run
    stored = json.loads((folder / "metrics.json").read_text())
    fits = study.feature_fits(config, np.zeros(2, int))
    assert set(stored["scores"]) == {*study.OUTPUT_SCORES, *fits, "mahalanobis + free_energy"}
    for score, own in stored["scores"].items():
        assert set(own["ensemble"]) == {study.CHOSEN_ON, "held out", "shuffled", "inverted"}
        assert all(0 <= x["value"] <= 1 and x["n"] == 2 for x in own["ensemble"].values())
        assert ("members" in own) == (score in fits or (score in study.OUTPUT_SCORES and score not in study.OF_MANY))
    assert stored["held_out"] == [[0, 1], [2, 3]] and set(stored["accuracy"]) == {"ensemble", "members"}
    assert set(stored["first_repetition"]) >= {"held out", "far, mean of sets", "far, pooled", "near, pooled"}
    assert stored["flagged"]["inside"]["value"] < 0.3
    page = (folder / "report.html").read_text()
    assert "(chosen)" in page and page.count("<img") == 2 and "FPR95 out" in page


def test_chosen_by_validation_alone(run):
    _, _, result = run
    best = max(result["scores"], key=lambda score: result["scores"][score]["ensemble"][study.CHOSEN_ON].value)
    assert result["chosen"] == best
    own = {"a": {"ensemble": {study.CHOSEN_ON: bc.Estimate(0.9), "held out": bc.Estimate(0.1)}}}
    own["b"] = {"ensemble": {study.CHOSEN_ON: bc.Estimate(0.8), "held out": bc.Estimate(1.0)}}
    assert study.choose(own) == "a"


def test_measure_against_hand():
    """Inside and outside of validation and test do not mix; a member's mean is that of AUROCs, not of scores."""
    sets = {"validation": [0.0, 1.0], study.CHOSEN_ON: [2.0, 3.0], "test": [0.0, 2.0], "far": [1.0, 3.0]}
    ensemble = {"it": {name: np.array(x) for name, x in sets.items()}}
    members = {"it": {name: np.array([x, [0.0, 0.0]]) for name, x in sets.items()}}
    own = study.measure(study.Found(ensemble, members, {}, (8, 9)))["it"]
    assert own["ensemble"] == {study.CHOSEN_ON: 1.0, "far": 0.75}
    assert own["members"] == {study.CHOSEN_ON: 0.75, "far": 0.625}  # the second member knows nothing
    assert own["difference"] == {study.CHOSEN_ON: 0.25, "far": 0.125}


def test_table_says_where_the_ensemble_is_not_better():
    up, unsure = bc.Estimate(0.1, 0.05, 0.15, 5), bc.Estimate(0.1, -0.1, 0.3, 5)
    value = {study.CHOSEN_ON: bc.Estimate(0.9, 0.8, 1.0, 5), "far": bc.Estimate(0.9, 0.8, 1.0, 5)}
    scores = {
        "a": {"ensemble": value, "difference": {"far": up}},
        "b": {"ensemble": value, "difference": {"far": unsure}},
    }
    result = {"scores": scores | {"c": {"ensemble": value}}, "chosen": "a"}
    assert report.not_better(result, ["far"]) == ["b on far"]
    lines = report.rows(result, ["far"])
    assert lines[0][0] == "a (chosen)" and lines[0][2] == "0.9000 ± 0.0360"  # half width 0.1 / t(4) = 2.7764


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="`scores` must be numbers, got NaN in 1 rows"):
        study.auroc(np.array([0.0, np.nan]), np.array([1.0]))


def test_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"`data` must be one of digits, fashion, .* got mnist and 5"):
        study.main(study.Config(data="mnist"), tmp_path)


def test_says_where_the_images_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESCAL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz, which is not there"):
        study.main(study.Config(data="fashion"), tmp_path)
