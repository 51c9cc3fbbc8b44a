"""The benchmark's smoke, with and without peers: what it writes, and that its arithmetic is what it says."""

import importlib
import json

import numpy as np
import pytest
from conftest import REPOSITORY

from bayescal.config import load_config

bench, bench_metrics = importlib.import_module("bench"), importlib.import_module("bench_metrics")
FIELDS = {"case", "peer", "phase", "ratio", "ours_seconds", "peer_seconds", "rounds", "device", "difference"}


def test_smoke_does_without_peers(tmp_path, monkeypatch, capsys):
    installed = importlib.import_module

    def only_sklearn(name):
        if not name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return installed(name)

    monkeypatch.setattr(bench_metrics, "library", only_sklearn)
    config = load_config(bench_metrics.Config, REPOSITORY / "configs/bench_metrics/smoke.yaml")
    bench_metrics.main(config, tmp_path)
    entries = json.loads((tmp_path / "bench.json").read_text())
    assert {(e["case"], e["peer"]) for e in entries} == {
        ("AUROC one-vs-rest, N = 400", "sklearn"),
        ("bootstrap, 40 replicates, N = 400", "budget of 10 s"),
    }
    for e in entries:
        assert set(e) == FIELDS and e["phase"] == "steady" and e["rounds"] == 2
        assert e["ratio"]["low"] <= e["ratio"]["median"] <= e["ratio"]["high"]
    assert entries[0]["difference"] < 1e-6  # the two libraries computed the same
    absent = json.loads((tmp_path / "absent.json").read_text())
    assert absent["netcal"] == "No module named 'netcal.metrics'" and "torchmetrics" in absent
    assert "scikit-learn" in json.loads((tmp_path / "versions.json").read_text())
    printed = capsys.readouterr().out
    assert "AUROC one-vs-rest, N = 400" in printed and "No module named 'netcal.metrics'" in printed
    assert "netcal" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", [*bench_metrics.CASES])
def test_every_form_of_ours_runs(name):
    x = bench_metrics.inputs(400, 3, 3)
    value = np.asarray(bench_metrics.CASES[name][0](x)())
    assert np.isfinite(value).all() and value.size


def test_entries_are_paired_and_lost_cases_come_first(tmp_path):
    won = bench.entry("a", "peer", [1.0, 2.0, 4.0], [3.0, 4.0, 20.0])
    assert won["ratio"] == {"median": 3.0, "low": 2.0, "high": 5.0}  # of each round; medians alone would give 2
    assert (won["ours_seconds"], won["peer_seconds"], won["rounds"]) == (2.0, 4.0, 3)
    lost = bench.entry("b", "peer", [2.0], [1.0], difference=1e-7)
    process = bench.entry("c", "peer", [2.0], [0.1], phase="process")
    entries = bench.publish([won, process, lost], tmp_path, title="t", about="x", peers=["numpy", "no-such"], absent={})
    assert [e["case"] for e in entries] == ["b", "a", "c"]
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert "numpy" in versions and "no-such" not in versions


def test_interleaved_takes_turns():
    calls, clock = [], iter(np.arange(100.0) ** 2)
    forms = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench.interleaved(forms, 2, clock=lambda: next(clock))
    assert "".join(calls) == "abc" + "abc" + "bca"  # first calls do not count; the start moves on
    np.testing.assert_array_equal([*seconds["a"], *seconds["b"]], [1, 21, 5, 13])


def test_unknown_case(tmp_path):
    with pytest.raises(ValueError, match=r"`cases` must be some of ECE, .*got ECE-15. Check the spelling"):
        bench_metrics.main(bench_metrics.Config(cases=("ECE-15",)), tmp_path)


def test_decomposition_smoke(tmp_path):
    study = importlib.import_module("bench_decomposition")
    config = load_config(study.Config, REPOSITORY / "configs/bench_decomposition/smoke.yaml")
    entries = study.main(config, tmp_path)
    cases = {(e["case"], e["peer"]): e for e in entries}
    floor = cases["decompose, [3, 50, 4]", "exponential alone"]
    assert floor["phase"] == "floor" and floor["ns_per_logit"] > 0
    assert ("streamed, [3, 20, 5]", "all draws at once") in cases
    if ("decompose, [3, 50, 4]", "torch") not in cases:
        assert "torch" in json.loads((tmp_path / "absent.json").read_text())
