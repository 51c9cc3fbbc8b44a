"""Calibrators on recorded predictions: which rows, which figures, which changes are noise, and what is refused."""

import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest

import bayescal as bc
from bayescal.__main__ import main
from bayescal.data.predictions import Recorded, from_arrays, read_predictions
from bayescal.recorded import classification_metrics
from bayescal.recorded_calibration import CLASSES, assess_calibration, clipped, fit_rows, parameters, reading

pytestmark = pytest.mark.core

DATA = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
FEW = {name: metric for name, metric in classification_metrics().items() if name in ("accuracy", "nll", "ece")}


def arrays(seed=3, rows=600, classes=3, sharpness=2.5):
    """Over-confident logits: labels are drawn at the logits over `sharpness`."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(rows, classes))
    labels = (logits / sharpness + rng.gumbel(size=logits.shape)).argmax(1)
    return {"logits": logits.astype(np.float32), "labels": labels}


def softmax(logits):
    exp = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_rows_by_hand():
    np.testing.assert_array_equal(fit_rows("first-half", 5), [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(fit_rows("second-half", 5), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(fit_rows("0.2", 5), [1, 0, 0, 0, 0])
    assert fit_rows("0.29", 100).sum() == 29


def test_groups_stay_whole(rng):
    groups = np.array(["b", "b", "a", "a", "a", "c", "b", "c"])
    np.testing.assert_array_equal(fit_rows("first-half", 8, groups), [1, 1, 0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(fit_rows("second-half", 8, groups), [0, 0, 1, 1, 1, 1, 0, 1])
    labels = rng.integers(0, 20, 300)
    for fit in ("first-half", "second-half", "0.3"):
        chosen = fit_rows(fit, 300, labels)
        assert not set(labels[chosen]) & set(labels[~chosen])
        assert abs(chosen.mean() - (0.3 if fit == "0.3" else 0.5)) < 0.12


def test_is_fit_use_and_evaluate_by_hand():
    """What the function returns is what the public parts give, put together here row by row."""
    data = arrays()
    found = assess_calibration(from_arrays(data), FEW, ["temperature"], fit="0.5")["calibration"]["temperature"]
    fitted, scored = slice(0, 300), slice(300, 600)
    scaler = bc.fit_temperature(bc.Categorical(data["logits"][None, fitted]), data["labels"][fitted])
    np.testing.assert_allclose(found["parameters"]["temperature"], scaler.temperature, rtol=1e-6)
    logits, labels = data["logits"][scored], data["labels"][scored]
    nll = {}
    for when, temperature in (("before", 1.0), ("after", float(scaler.temperature))):
        nll[when] = -np.log(softmax(logits / temperature)[np.arange(300), labels])
        np.testing.assert_allclose(found[when]["nll"].value, nll[when].mean(), rtol=1e-5)
    moved = nll["after"] - nll["before"]
    change = found["difference"]["nll"]
    np.testing.assert_allclose(change["value"], moved.mean(), rtol=1e-4)
    half = 1.959964 * moved.std() / np.sqrt(300)
    np.testing.assert_allclose([change["low"], change["high"]], [moved.mean() - half, moved.mean() + half], rtol=5e-3)
    assert change["noise"] is False and found["difference"]["accuracy"]["value"] == 0
    ece = found["difference"]["ece"]
    assert ece["low"] is None and ece["noise"] is None
    np.testing.assert_allclose(ece["value"], found["after"]["ece"].value - found["before"]["ece"].value)


def test_a_calibrated_network_gives_noise():
    found = assess_calibration(from_arrays(arrays(sharpness=1.0)), FEW, ["temperature"])
    change = found["calibration"]["temperature"]["difference"]["nll"]
    assert change["low"] <= 0 <= change["high"] and change["noise"] is True
    assert "noise (the interval of the change contains 0): nll" in found["notes"][0]
    assert found["notes"][0].startswith("temperature (temperature ")


def test_resampled_and_analytic_intervals_agree():
    recorded = from_arrays(arrays())
    one, other = (
        assess_calibration(recorded, {"nll": FEW["nll"]}, ["temperature"], num_replicates=n)["calibration"]
        for n in (0, 400)
    )
    a, b = (x["temperature"]["difference"]["nll"] for x in (one, other))
    width = a["high"] - a["low"]
    assert abs(a["low"] - b["low"]) < 0.2 * width and abs(a["high"] - b["high"]) < 0.2 * width


def test_names_compose():
    data = arrays()
    found = assess_calibration(from_arrays(data), FEW, ["temperature+isotonic"])["calibration"]["temperature+isotonic"]
    pred, labels = bc.Categorical(data["logits"][None, :300]), data["labels"][:300]
    scaler = bc.fit_temperature(pred, labels)
    chain = bc.calibrate.compose(scaler, bc.calibrate.fit_isotonic(scaler(pred), labels))
    after = bc.evaluate(chain(bc.Categorical(data["logits"][None, 300:])), data["labels"][300:], FEW)
    np.testing.assert_allclose(found["after"]["accuracy"].value, after["accuracy"].value)
    np.testing.assert_allclose(found["after"]["ece"].value, after["ece"].value, rtol=1e-5)
    assert [step["calibrator"] for step in found["parameters"]["steps"]] == ["Temperature", "Isotonic"]


QUICK = ("temperature", "histogram", "venn_abers", "order_preserving")  # one of each kind, with and without a key


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CLASSES])
def test_every_name_fits_two_classes(name):
    """All of them, on 1,200 rows that are over-confident by 4: the Brier score falls, beyond noise."""
    recorded = from_arrays(arrays(rows=1200, classes=2, sharpness=4.0))
    metrics = {"brier": bc.brier()}
    found = assess_calibration(recorded, metrics, [name], clip=1e-6)["calibration"][name]
    change = found["difference"]["brier"]
    assert change["value"] < 0 and change["noise"] is False and found["parameters"]
    json.dumps(found["parameters"])


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_is_a_fit_without_settings(name):
    """`fit_named` gives predictions, targets and weights, and nothing else is asked for."""
    inspect.signature(CLASSES[name]).bind(None, None, weights=None)


def test_a_name_told_twice_is_fitted_once():
    found = assess_calibration(from_arrays(arrays()), FEW, ["temperature", "temperature"])
    assert list(found["calibration"]) == ["temperature"] and len(found["notes"]) == 1


def test_what_is_undefined_or_unknown_is_not_called_better():
    """All scored rows right: AUROC is undefined before and after, and a single row has no interval."""
    data = arrays()
    data["labels"][300:] = data["logits"][300:].argmax(1)
    metrics = FEW | {"auroc": classification_metrics()["auroc_correctness"]}
    change = assess_calibration(from_arrays(data), metrics, ["temperature"])["calibration"]["temperature"]["difference"]
    words = {name: reading(x) for name, x in change.items()}
    assert words == {"accuracy": "unchanged", "nll": "worse", "ece": "no interval", "auroc": "undefined"}
    one = {name: x[:301] for name, x in data.items()}
    found = assess_calibration(from_arrays(one), {"nll": FEW["nll"]}, ["temperature"], fit="0.997")["calibration"]
    assert reading(found["temperature"]["difference"]["nll"]) == "no interval"


def test_probabilities_are_clipped_for_the_fit():
    data = arrays()
    probs = softmax(data["logits"]).astype(np.float32)
    worst = probs.argmin(1)
    probs[np.arange(20), worst[:20]] = 0
    probs[:20] /= probs[:20].sum(1, keepdims=True)
    labels = data["labels"].copy()
    labels[:3] = worst[:3]
    recorded = from_arrays({"probs": probs, "labels": labels})
    with pytest.raises(ValueError, match="got 'temperature', which cannot: `targets` must have positive probability"):
        assess_calibration(recorded, FEW, ["temperature"])
    found = assess_calibration(recorded, FEW, ["temperature"], clip=1e-6)
    by_hand = bc.fit_temperature(bc.Categorical(np.log(np.maximum(probs, 1e-6))[None, :300]), labels[:300])
    got = found["calibration"]["temperature"]["parameters"]["temperature"]
    np.testing.assert_allclose(got, by_hand.temperature, rtol=1e-4)
    assert "probabilities below 1e-06" in found["conventions"]["clip for calibration"]
    logits = bc.Categorical(data["logits"][None])
    assert clipped(logits, 1e-6) is logits


def test_weights_and_groups_are_used(rng):
    data = arrays()
    weights = rng.integers(0, 3, 600).astype(np.float32)
    groups = np.repeat(np.arange(60), 10)
    recorded = from_arrays({**data, "weights": weights, "groups": groups})
    found = assess_calibration(recorded, FEW, ["temperature"])
    rows = np.repeat(np.arange(300), weights[:300].astype(int))
    again = bc.fit_temperature(bc.Categorical(data["logits"][None, rows]), data["labels"][rows])
    one = found["calibration"]["temperature"]
    np.testing.assert_allclose(one["parameters"]["temperature"], again.temperature, rtol=1e-4)
    assert one["before"]["nll"].n == (weights[300:] > 0).sum()
    assert "whole groups" in found["conventions"]["calibration"]
    alone = assess_calibration(recorded._replace(groups=None), FEW, ["temperature"])["calibration"]["temperature"]
    assert alone["difference"]["nll"]["low"] != one["difference"]["nll"]["low"]


def test_regression(rng):
    """Variances four times too small: the factor is 4, and the nll falls."""
    mean = rng.normal(size=800)
    data = {"mean": mean, "variance": np.ones(800), "targets": mean + 2 * rng.normal(size=800)}
    recorded = from_arrays(data)
    found = assess_calibration(recorded, {"nll": bc.nll()}, ["variance_scaling"])["calibration"]["variance_scaling"]
    np.testing.assert_allclose(found["parameters"]["factor"], [4], rtol=4 * np.sqrt(2 / 400))
    assert reading(found["difference"]["nll"]) == "better"
    with pytest.raises(ValueError, match="names of calibrators of densities, got 'temperature'"):
        assess_calibration(recorded, {"nll": bc.nll()}, ["temperature"])


def test_command_line(tmp_path, capsys, monkeypatch):
    """With few of the metrics, which `test_recorded` has all of."""
    few = FEW | {"mce": classification_metrics()["mce"]}
    monkeypatch.setattr("bayescal.recorded.classification_metrics", lambda **_: few)
    np.savez(tmp_path / "a.npz", **arrays())
    told = ["evaluate", str(tmp_path / "a.npz"), "--calibrate", "temperature, isotonic", "--fit", "second-half"]
    assert main([*told, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in (
        "temperature: fitted on the second half of the rows (300)",
        "isotonic: fitted",
        "before",
        "after",
        "better",
    ):
        assert words in printed, words
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(saved["calibration"]) == ["temperature", "isotonic"]
    one = saved["calibration"]["temperature"]
    assert set(one) == {"parameters", "before", "after", "difference"}
    assert set(one["difference"]["nll"]) >= {"value", "low", "high", "noise"}
    assert one["before"]["ece"]["value"] > one["after"]["ece"]["value"] and one["after"]["mce"]["low"] is None
    assert "300" in saved["conventions"]["calibration"] and "fitted map" in saved["conventions"]["change"]
    assert "not adjusted for how many changes" in saved["conventions"]["change"]
    page = (tmp_path / "out/report.html").read_text()
    assert "After calibration: temperature" in page and "reads as" in page
    monkeypatch.setattr(
        "bayescal.recorded.assess", lambda *_, **__: pytest.fail("computed before the name was looked at")
    )
    assert main(["evaluate", str(tmp_path / "a.npz"), "--calibrate", "temprature"]) == 2
    assert "Did you mean 'temperature'? All names: temperature, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "a.npz"), "--fit", "0.2"])
    assert "`--fit` says which rows `--calibrate` fits on" in capsys.readouterr().err


def test_refuses(unchecked):
    recorded = from_arrays(arrays())
    with pytest.raises(ValueError, match=r"got 'platt', which cannot: .*two classes"):
        assess_calibration(recorded, FEW, ["platt"])
    with pytest.raises(ValueError, match="`calibrate` must be names of calibrators of classes, got ''"):
        assess_calibration(recorded, FEW, ["temperature+"])
    for fit in ("half", "0", "1", "nan", "-0.2", "1.5"):
        with pytest.raises(ValueError, match=r"`fit` must be 'first-half', 'second-half' or a share in \(0, 1\)"):
            assess_calibration(recorded, FEW, ["temperature"], fit=fit)
    with pytest.raises(
        ValueError, match=r"`fit` must leave rows to fit on and rows to score, got '0\.001' of 600 rows"
    ):
        assess_calibration(recorded, FEW, ["temperature"], fit="0.001")
    with pytest.raises(ValueError, match="of 600 rows in 1 groups"):
        fit_rows("first-half", 600, np.zeros(600))
    halves = recorded._replace(groups=np.repeat([0, 1], 300))
    with pytest.raises(
        ValueError, match=r"must leave rows of two groups or more to score, got 'first-half', which .* of 2"
    ):
        assess_calibration(halves, FEW, ["temperature"])
    missing = Recorded(recorded.pred, np.where(np.arange(600) < 300, recorded.targets % 2, recorded.targets))
    with pytest.raises(ValueError, match="got 'vector', which cannot: "):
        assess_calibration(missing, FEW, ["vector"])


def test_long_arrays_are_told_by_shape():
    data = arrays(rows=3000)
    told = parameters(bc.calibrate.fit_isotonic(bc.Categorical(data["logits"][None]), data["labels"]))
    assert any("array of shape" in str(value) for value in told.values())


# T on the first half; ECE and NLL of the second before and after: float64 numpy and scipy, without bayescal
GOLDEN = {
    "logits_cifar10/resnet_basic_110": (2.5709, 0.0431, 0.0056, 0.3234, 0.1888),
    "probs_classical/mnist/1layer_NN": (2.4044, 0.0162, 0.0061, 0.1193, 0.0746),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_stored_predictions(name):
    path = DATA / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    metrics = {metric: classification_metrics(clip=1e-12)[metric] for metric in ("ece", "nll")}
    found = assess_calibration(read_predictions(path), metrics, ["temperature"], clip=1e-12)["calibration"][
        "temperature"
    ]
    got = [found["parameters"]["temperature"]]
    got += [found[when][metric].value for metric in ("ece", "nll") for when in ("before", "after")]
    np.testing.assert_allclose(got[0], GOLDEN[name][0], atol=1e-3)
    np.testing.assert_allclose(got[1:], GOLDEN[name][1:], atol=1e-4)
