"""The training benchmark: its smoke with and without PyTorch, that both sides train the same networks, its arithmetic."""

import importlib
import json
from contextlib import ExitStack

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from bayescal.config import load_config

pytestmark = pytest.mark.core
study, ours = importlib.import_module("bench_training"), importlib.import_module("bench_training_ours")
peers, rows = importlib.import_module("bench_training_torch"), importlib.import_module("bench_training_data")
growth = importlib.import_module("bench_training_growth")


@pytest.fixture(autouse=True)
def synthetic(monkeypatch, tmp_path):
    monkeypatch.setenv("BAYESCAL_DATA", str(tmp_path))


@pytest.fixture
def one_core(monkeypatch):
    """PyTorch's threads spin, and crawl where others want the cores; its processes take seconds to start."""
    monkeypatch.setattr(study, "makers", lambda case, cores: peers.makers(case, 1))


def small(name: str):
    return rows.CASES[name].smaller(24, 1)


def test_smoke_does_without_torch(tmp_path, monkeypatch, capsys, one_core):
    installed = importlib.import_module

    def without_torch(name):
        if name.startswith("torch"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return installed(name)

    monkeypatch.setattr(peers, "library", without_torch)
    config = load_config(study.Config, REPOSITORY / "configs/bench_training/smoke.yaml", ["cases=regression"])
    study.main(config, tmp_path)
    entries = json.loads((tmp_path / "bench.json").read_text())
    (line,) = entries
    assert (line["case"], line["peer"], line["phase"]) == ("regression", "sklearn bagging", "steady")
    assert (line["rounds"], line["difference"]) == (1, None)
    absent = json.loads((tmp_path / "absent.json").read_text())
    assert absent["torch loop, 1 thread"] == "No module named 'torch'" and len(absent) == 2
    assert "The regression is synthetic." in capsys.readouterr().out


def test_smoke_of_the_floor(tmp_path, one_core):
    config = load_config(study.Config, REPOSITORY / "configs/bench_training/smoke.yaml", ["cases=mlp_m4"])
    entries = study.main(config, tmp_path)
    floor = next(e for e in entries if e["phase"] == "floor")
    assert floor["peer"] == growth.FLOOR and floor["ratio"]["median"] > 0
    best = [e for e in entries if e["peer"] == "torch best"]
    torch = [e for e in entries if e["peer"].startswith("torch") and e not in best]
    if torch:
        assert len(best) == 1 and best[0]["peer_seconds"] == min(e["peer_seconds"] for e in torch)
        assert best[0]["form"] in {e["peer"] for e in torch}
    else:
        assert "torch" in json.loads((tmp_path / "absent.json").read_text())["torch loop, 1 thread"]


def test_torch_best_is_by_medians_and_paired():
    seconds = {"torch a": np.array([4.0, 1.0, 5.0]), "torch b, bfloat16": np.array([3.0, 3.5, 3.0])}
    own = np.array([1.0, 2.0, 1.0])
    entries = [study.entry("c", form, own, s) for form, s in seconds.items()] + [study.entry("c", "sklearn", own, own)]
    best, exact = study.torch_best(entries, seconds)
    assert (best["peer"], best["form"], best["ratio"]["median"]) == ("torch best", "torch b, bfloat16", 3.0)
    assert (exact["peer"], exact["form"], exact["ratio"]["low"]) == ("torch best, float32", "torch a", 0.5)
    assert study.torch_best(entries[2:], seconds) == []


def test_forms_fit_the_case():
    names = {case: list(peers.makers(rows.CASES[case], 2)) for case in rows.CASES}
    loops = {f"torch{form}, {threads}" for form in (" loop", ".func vmap") for threads in ("1 thread", "2 threads")}
    assert set(names["mlp_m1"]) == loops and set(names["mlp_m4"]) == loops | {
        "torch 2 processes",
        "torch.func vmap, 2 processes",
    }
    assert {"sklearn bagging", "sklearn bagging, 2 processes"} == set(names["regression"]) - set(
        names["regression_20x5"]
    )
    assert set(names["lenet_m4"]) - set(names["mlp_m4"]) == {
        "torch channels_last, 2 threads",
        "torch channels_last 2 processes",
    }
    assert {n for n in names["block"] if "bfloat16" in n} == {
        f"{n}, bfloat16" for n in names["lenet_m4"] if "vmap" not in n and n != "torch loop, 1 thread"
    }
    assert not any("processes" in n for n in names["lenet_baseline_m1"])
    assert set(peers.makers(rows.CASES["mlp_m4"], 1)) == {"torch loop, 1 thread", "torch.func vmap, 1 thread"}


@pytest.mark.parametrize("name", ["regression", "mlp_m1", "lenet_m4", "lenet_baseline", "block"])
def test_both_sides_have_the_same_network(name):
    """As many parameters in each shape, up to the order of axes."""
    torch, case = pytest.importorskip("torch"), rows.CASES[name]
    sizes = lambda arrays: sorted(tuple(sorted(a.shape)) for a in arrays)
    variables = jax.eval_shape(ours.model(case).init, jax.random.key(0))
    theirs = peers.network(torch, case, False)
    assert sizes(jax.tree.leaves(variables.params)) == sizes(theirs.parameters())


def test_normal_loss_is_that_of_ours(rng):
    torch, case = pytest.importorskip("torch"), rows.CASES["regression"]
    outputs, targets = rng.normal(size=(9, 2)).astype(np.float32), rng.normal(size=(9, 1)).astype(np.float32)
    found = peers.loss_of(torch, case)(torch.from_numpy(outputs), torch.from_numpy(targets))
    expected = -np.mean(ours.likelihood(case)(outputs[None]).log_prob(targets))
    np.testing.assert_allclose(float(found), expected, rtol=1e-6)


@pytest.fixture
def seeded(monkeypatch):
    """PyTorch's networks in pairs that are the same every time; one batch an epoch leaves nothing else to chance."""
    torch, given, made = pytest.importorskip("torch"), peers.network, []

    def network(*args):
        torch.manual_seed(len(made) % 2)
        made.append(given(*args))
        return made[-1]

    monkeypatch.setattr(peers, "network", network)
    return torch


@pytest.mark.parametrize("name", ["regression", "mlp_m4", "lenet_m4", "block"])
def test_side_by_side_trains_as_one_after_another_does(name, seeded):
    """Two steps of Adam; the coarse precision is another computation, of nearly the same loss."""
    case = small(name)._replace(members=2, epochs=2)
    losses = []
    for channels_last in (False, True) if case.convolutional else (False,):
        data = peers.tensors(seeded, case, rows.rows_of(case), channels_last)
        losses.append(peers.one_after_another(case, case.jobs, *data, channels_last, False, 1))
    data = peers.tensors(seeded, case, rows.rows_of(case), False)
    losses.append(peers.side_by_side(case, case.jobs, *data, 1))
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-4)
    coarse = peers.one_after_another(case, case.jobs, *data, False, True, 1)
    assert 0 < abs(coarse / losses[0] - 1) < 0.02


def test_experiments_train_on_their_own_rows(seeded):
    """Targets of one split moved far away: its loss alone is high."""
    case = rows.CASES["regression_20x5"].smaller(24, 1)._replace(experiments=2, members=1)
    parts = rows.rows_of(case)
    data = peers.tensors(seeded, case, [parts[0], (parts[1][0], parts[1][1] + 50)], False)
    one = [peers.one_after_another(case, [job], *data, False, False, 1) for job in case.jobs]
    assert case.jobs == [0, 1] and one[0] < 10 < 100 < one[1]
    np.testing.assert_allclose(peers.side_by_side(case, case.jobs, *data, 1), np.mean(one), rtol=1e-5)


def test_processes_share_out_all_networks():
    pytest.importorskip("torch")
    case = small("mlp_m4")._replace(members=3, width=8)
    with ExitStack() as closing:
        loss = peers.shared_loop(case, closing, processes=2)()
    assert 1 < loss < 8  # log 10 and what the initialisation adds


def test_rows_can_be_learnt_and_are_the_same_every_time():
    case = rows.CASES["block"].smaller(200, None)
    inputs, labels = rows.rows_of(case)[0]
    assert inputs.shape == (200, 16, 16, 3) and inputs.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_array_equal(inputs, rows.rows_of(case)[0][0])
    means = np.stack([inputs[labels == k].mean(0) for k in range(10)])
    nearest = ((inputs[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert 0.7 < (nearest == labels).mean() < 0.95  # but for the labels that are drawn
    splits = rows.rows_of(rows.CASES["regression_20x5"])
    assert len(splits) == 20 and splits[0][0].shape == (927, 8) and splits[0][1].shape == (927, 1)
    np.testing.assert_allclose(splits[3][0].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(splits[3][1].std(), 1, rtol=1e-5)


def test_floor_computes_the_products_of_a_network(rng):
    """Its last step against NumPy in float64: the gradients of |network|^2 / 2 without activations."""
    case = small("mlp_m4")._replace(members=2, width=6)
    found = growth.floor(case)()
    x = rows.rows_of(case)[0][0].astype(np.float64)
    keys = jax.random.split(jax.random.split(jax.random.key(0), 2)[1], 3)
    sizes = [(784, 6), (6, 6), (6, 10)]
    first, second, third = (
        np.asarray(jax.random.normal(k, s), np.float64) / np.sqrt(s[0]) for k, s in zip(keys, sizes, strict=True)
    )
    out = x @ first @ second @ third
    expected = [
        x.T @ out @ third.T @ second.T,
        (x @ first).T @ out @ third.T,
        (x @ first @ second).T @ out,
    ]
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value[1], wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_growth_pairs_each_size_with_its_half(monkeypatch):
    base, asked = small("mlp_m4")._replace(members=2), []
    monkeypatch.setattr(growth, "training", lambda case: lambda: None)
    seconds = {}
    cost = lambda case: case.members * case.rows * case.width

    def fake(forms, rounds, clock):
        return {name: np.full(rounds, seconds[name]) for name in forms}

    def child(form, case, cores, cache):
        asked.append((cache, case))
        return {"megabytes": float(cost(case))}

    sizes = [base._replace(members=m) for m in (1, 4, 8)]
    sizes += [base._replace(rows=base.rows * k) for k in (1, 2, 4)] + [
        base._replace(width=base.width * k) for k in (2, 4)
    ]
    seconds |= {str(case): float(cost(case)) for case in sizes}
    monkeypatch.setattr(growth, "interleaved", fake)
    monkeypatch.setattr(growth, "child", child)
    entries = {(e["case"], e["peer"]): e for e in growth.growth(base, 3, 2)}
    assert {peer for _, peer in entries} == {"ours x M", "half M", "half N", "half width"} and len(entries) == 9
    for (_, peer), e in entries.items():
        expected = 1.0 if peer == "ours x M" else 0.5
        assert e["phase"] == "growth" and e["ratio"]["median"] == expected
        assert e["peer_megabytes"] / e["ours_megabytes"] == expected
    assert len({cache for cache, _ in asked}) == 1 and len(asked) == 2 * 8  # the second run finds the first's programs


def test_fresh_processes(monkeypatch):
    """The arithmetic with processes that are not started; then one that is."""
    process = importlib.import_module("bench_training_process")
    caches = []

    def child(form, case, cores, cache=""):
        caches.append((form, cache))
        return {"import_seconds": 1.0, "first_call_seconds": 2.0 if form == "ours" else 3.0, "megabytes": 5.0}

    with monkeypatch.context() as patch:
        patch.setattr(process, "child", child)
        patch.setattr(process, "library", lambda name: None)
        entries = process.in_fresh_processes("regression", small("regression"), 2, 2, {})
    assert {e["case"] for e in entries} == {"regression", "regression, cold"}
    assert all((e["phase"], e["import_seconds"]) == ("process", 1.0) for e in entries if "sklearn" in e["peer"])
    own = [cache for form, cache in caches if form == "ours"]
    assert len(own) == 6 and len(set(own)) == 4  # three warm ones share a folder, each cold one has its own

    told = process.child("sklearn bagging", small("regression"), 2)
    assert set(told) == {"import_seconds", "first_call_seconds", "megabytes"} and told["import_seconds"] > 0.05
    with pytest.raises(RuntimeError, match=r"(?s)`torch no` must train in a process of its own, got .*Run it by hand"):
        process.child("torch no", small("regression"), 2)


def test_unknown_case(tmp_path):
    with pytest.raises(ValueError, match=r"`cases` must be some of regression, .*got mlp_m5. Check the spelling"):
        study.main(study.Config(cases=("mlp_m5",)), tmp_path)


def test_execution_smoke(tmp_path, monkeypatch):
    execution = importlib.import_module("bench_execution")
    monkeypatch.setattr(execution, "FORMS", ("vmap, 1 device",))  # each form is another program to compile
    config = load_config(execution.Config, REPOSITORY / "configs/bench_execution/smoke.yaml")
    entries = execution.main(config, tmp_path)
    assert {e["peer"] for e in entries} == set(execution.FORMS)
    assert all(
        e["phase"] == "steady" and e["ours_seconds"] > 0 for e in json.loads((tmp_path / "bench.json").read_text())
    )
