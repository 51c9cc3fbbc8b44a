"""The prediction benchmark's smoke, with and without PyTorch, and that both sides compute the same networks."""

import importlib
import json
from functools import partial

import numpy as np
import pytest
from conftest import REPOSITORY

from bayescal.config import load_config

study, peers = importlib.import_module("bench_prediction"), importlib.import_module("bench_prediction_torch")
FIELDS = {"case", "peer", "phase", "ratio", "ours_seconds", "peer_seconds", "rounds", "device", "difference"}


def smoke():
    return load_config(study.Config, REPOSITORY / "configs/bench_prediction/smoke.yaml")


def test_smoke(tmp_path):
    pytest.importorskip("torch")
    entries = study.main(smoke(), tmp_path)
    assert entries == json.loads((tmp_path / "bench.json").read_text())
    assert {e["case"] for e in entries} == {
        "mc_dropout, S = 2, N = 40",
        "mlp, M = 2, N = 40",
        "lenet, M = 2, N = 40",
    }
    for e in entries:
        assert set(e) == FIELDS and e["phase"] == "steady" and e["rounds"] == 2 and e["peer"].startswith("torch")
        assert e["difference"] < 1e-5, "without dropout both give the same logits"
        assert e["ratio"]["low"] <= e["ratio"]["median"] <= e["ratio"]["high"]
    medians = [e["ratio"]["median"] for e in entries]
    assert medians == sorted(medians), "lost cases first"
    assert json.loads((tmp_path / "absent.json").read_text()) == {}
    assert "torch" in json.loads((tmp_path / "versions.json").read_text())


def test_smoke_does_without_torch(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(peers, "library", missing)
    assert study.main(smoke(), tmp_path) == []
    absent = json.loads((tmp_path / "absent.json").read_text())
    assert absent["torch, 1 thread"] == "No module named 'torch'" and "torch, prefix reused, 1 thread" in absent
    assert "No module named 'torch'" in capsys.readouterr().out


def test_forms():
    names = [form.name() for form in study.forms_of("mc_dropout", study.Config())]
    per_draw = [name for name in names if "a mask a draw" in name]
    names = [name for name in names if name not in per_draw]
    assert per_draw == [name.replace("torch,", "torch, a mask a draw,") for name in names if "prefix" in name]
    assert names == [
        *["torch, 1 thread", "torch, 2 threads", "torch, 2 workers"],
        *["torch, batches of 500, 1 thread", "torch, batches of 500, 2 threads", "torch, batches of 500, 2 workers"],
        *["torch, prefix reused, 1 thread", "torch, prefix reused, 2 threads", "torch, prefix reused, 2 workers"],
        "torch, prefix reused, batches of 500, 1 thread",
        "torch, prefix reused, batches of 500, 2 threads",
        "torch, prefix reused, batches of 500, 2 workers",
    ]
    assert len(study.forms_of("mlp", study.Config())) == 6 and len(study.forms_of("lenet", study.Config())) == 12
    assert all(form.channels_last != form.prefix or not form.prefix for form in study.forms_of("lenet", study.Config()))


def test_torch_drops_by_row_and_draw(monkeypatch):
    """Every form has its own masks: draws and equal rows differ, and on average they are the network that ours is."""
    pytest.importorskip("torch")
    monkeypatch.setattr(study, "DROPOUT", 0.2)  # at 1/2 what is kept and what is dropped are the same
    Form = peers.Form
    config = study.Config(rows=64, draws=200, batches=(16,))
    case = study.case_of("mc_dropout", config)
    case.inputs[:] = case.inputs[0]
    ours = np.asarray(study.ours(case)())
    assert ours.shape == (200, 64, 10) and np.ptp(ours, axis=1).max() == 0
    forms = [Form(), Form(16, prefix=True, workers=2), Form(prefix=True, masks="row, 16 bits")]
    forms += [Form(prefix=True, masks=f"draw{how}") for how in ("", ", in the weights", ", kept units")]
    for form in forms:
        network, one_a_draw = partial(peers.perceptron, rate=study.DROPOUT), form.masks.startswith("draw")
        theirs = peers.torch_form(form, network, case.parameters, case.inputs, 200)().numpy()
        assert theirs.shape == (200, 64, 10)
        assert (np.ptp(theirs, axis=0) > 0).all()
        assert ((np.ptp(theirs, axis=1) > 1e-5) != one_a_draw).all()
        error = ours[:, 0].std(0) * np.sqrt((1 + one_a_draw) / 200)
        assert (np.abs(ours[:, 0].mean(0) - theirs.mean((0, 1))) < 5 * error).all()
        np.testing.assert_allclose(theirs.std((0, 1)), ours[:, 0].std(0), rtol=0.25)
