"""The benchmark of methods: its smoke with and without PyTorch, and that all sides compute the same."""

import importlib
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY

import bayescal as bc
from bayescal.config import load_config

study, dropout = importlib.import_module("bench_methods"), importlib.import_module("bench_methods_dropout")
variational = importlib.import_module("bench_methods_variational")
FIELDS = {"case", "peer", "phase", "ratio", "ours_seconds", "peer_seconds", "rounds", "device", "difference"}


def smoke(*overrides):
    return load_config(study.Config, REPOSITORY / "configs/bench_methods/smoke.yaml", list(overrides))


def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    assert all(callable(getattr(bc.models, name)) for name in variational.ESTIMATORS)
    monkeypatch.setattr(variational, "ESTIMATORS", variational.ESTIMATORS[:1])  # each takes seconds to compile
    entries = study.main(smoke("cases=mc_dropout,variational_small"), tmp_path)
    assert entries == json.loads((tmp_path / "bench.json").read_text())
    assert json.loads((tmp_path / "absent.json").read_text()) == {}
    for e in entries:
        assert set(e) == FIELDS and e["phase"] == "steady" and e["rounds"] == 2 and e["ours_seconds"] > 0
        assert e["ratio"]["low"] <= e["ratio"]["median"] <= e["ratio"]["high"]
    medians = [e["ratio"]["median"] for e in entries]
    assert medians == sorted(medians), "lost cases first"
    drawn = [e for e in entries if e["case"] == "mc_dropout, S = 2, N = 24, rate 0.2"]
    masks = ["row, 16 bits", "draw", "draw, in the weights", "draw, kept units"]
    kinds = {"torch", *(f"torch, a mask a {mask}" for mask in masks)}
    assert {e["peer"].split(", prefix")[0] for e in drawn} == kinds and len(drawn) == 5
    assert all(e["difference"] < 1e-5 for e in drawn), "without dropout both give the same logits"
    steps = [e for e in entries if e["case"].startswith("variational_small, 64-256-256-8, batch 24, ")]
    assert len(steps) == 6 and len(drawn) + len(steps) == len(entries)
    assert {e["peer"] for e in steps} == {"by hand, jax", "by hand, torch"}


def test_dropout_of_every_side_draws_the_networks_it_says(monkeypatch):
    """As many draws of all rows, and of as large a spread over draws: a rate of 0.2 has half that of 1/2.

    A standard deviation over 200 draws has a standard error of 1 / sqrt(400) = 5 %; the mean of 320 was seen to stray by 1 %.
    """
    pytest.importorskip("torch")
    calls = {}

    def interleaved(functions, rounds, clock):
        calls.update(functions)
        return {name: np.ones(1) for name in functions}

    monkeypatch.setattr(dropout, "interleaved", interleaved)
    config = smoke("draws=200", "rows=32")
    entries = dropout.rate_of(0.2, config, {})
    logits = {name: np.asarray(calls[name]()) for name in ("ours", *(e["peer"] for e in entries))}
    assert len(logits) == 6
    for name, drawn in logits.items():
        assert drawn.shape == (200, 32, 10), name
        np.testing.assert_allclose(drawn.std(0).mean(), logits["ours"].std(0).mean(), rtol=0.05, err_msg=name)


@pytest.mark.parametrize("case", ["kfac_mlp", "mc_dropout"])
def test_does_without_the_peers(case, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    entries = study.main(smoke(f"cases={case}", "parts=sums"), tmp_path)
    assert all(e["peer"].startswith("ours") for e in entries)
    absent = json.loads((tmp_path / "absent.json").read_text())
    assert absent and all("torch" in reason for reason in absent.values())


@pytest.mark.parametrize(("cases", "got"), [(("nope", "mc_dropout"), "got nope"), ((), "got none")])
def test_unknown_cases(cases, got, tmp_path):
    with pytest.raises(ValueError, match=f"`cases` must be some of kfac_mlp, .*variational_small, {got}. Check the"):
        study.main(study.Config(cases=cases), tmp_path)


def test_heat_takes_the_fastest_of_each_kind():
    forms = dropout.forms_of(study.Config())
    assert [len(kind) for kind in forms] == [6] * 5
    assert [form.name() for form in forms[2]] == [
        "torch, a mask a draw, prefix reused, 1 thread",
        "torch, a mask a draw, prefix reused, 2 threads",
        "torch, a mask a draw, prefix reused, 2 workers",
        "torch, a mask a draw, prefix reused, batches of 500, 1 thread",
        "torch, a mask a draw, prefix reused, batches of 500, 2 threads",
        "torch, a mask a draw, prefix reused, batches of 500, 2 workers",
    ]
    peers = {form.name(): lambda: time.sleep(0.1) for form in forms[0]}
    assert dropout.heat(forms[0], {**peers, forms[0][3].name(): lambda: None}) == forms[0][3]
    assert dropout.heat(forms[0], {}) is None


def small_case():
    """All of the rows are one batch."""
    rng = np.random.default_rng(0)
    data = bc.Dataset(rng.standard_normal((12, 4)).astype(np.float32), np.arange(12, dtype=np.int32) % 3)
    return variational.Case(bc.models.mlp(4, (5, 6), 3), data, 12, 1)


def whole_batch(case):
    return bc.Batch(jnp.asarray(case.data.inputs), jnp.asarray(case.data.targets), jnp.ones(12), jnp.arange(12))


@pytest.mark.slow
def test_update_is_the_step_by_hand(monkeypatch):
    """With a spread of 1e-6 the noise drops out of the loss, and gradients are the same to its size."""
    monkeypatch.setattr(variational, "INITIAL_SCALE", 1e-6)
    case, optimizer, key = small_case(), optax.sgd(0.1), jax.random.key(0)
    batch = whole_batch(case)
    init, step = variational.by_hand(case, optimizer)
    theirs, info = step(init(key), batch, key)
    method = variational.variational(case, optimizer)
    state, own = method.update(method.init(key, None), batch, key)
    np.testing.assert_allclose(own["loss"], info["loss"], rtol=1e-5)
    location = method.predict(state, case.data.inputs, None).logits[0]
    expected = case.model.apply(bc.Variables(theirs.posterior[0]), case.data.inputs, None)
    np.testing.assert_allclose(location, expected, rtol=1e-4, atol=1e-5)
    raw = np.concatenate([np.ravel(x) for x in jax.tree.leaves(theirs.posterior[1])])
    (start,) = {float(x) for leaf in jax.tree.leaves(init(key).posterior[1]) for x in leaf.ravel()}
    assert np.abs(raw - start).min() > 5e-3, "the KL moves every scale"
    vectors = [x for x in jax.tree.leaves(state) if x.shape == raw.shape]
    assert any(np.allclose(np.sort(x), np.sort(raw), rtol=1e-5) for x in vectors), "and ours alike"


def test_torch_has_the_same_objective():
    torch = pytest.importorskip("torch")
    case = small_case()
    location = case.model.init(jax.random.key(1)).params
    location = jax.tree.map(lambda x: x + 0.1, location)  # so that the biases count
    raw_scale = jax.tree.map(lambda x: jnp.full_like(x, -14.0), location)
    total, loss = variational.objective((location, raw_scale), whole_batch(case), jax.random.key(2), case)
    layers = [*location["dense"].values(), location["head"]]
    theirs = [torch.tensor(np.array(part).T) for layer in layers for part in (layer["kernel"], layer["bias"])]
    data = torch.tensor(case.data.inputs), torch.tensor(case.data.targets.astype(np.int64))
    found = variational.torch_objective(torch, theirs, [torch.full_like(x, -14.0) for x in theirs], *data, 12)
    np.testing.assert_allclose([float(x) for x in found], [total, loss], rtol=1e-5)
    assert total > 10 * loss, "the KL counts"


@pytest.mark.parametrize("name", [*variational.NETWORKS])
def test_all_sides_make_as_many_steps(name):
    case = variational.case_of(name, study.Config(rows=300, epochs=2))
    size = variational.NETWORKS[name].batch_size
    assert case.batch_size == size and len(case.data.targets) == 300 // size * size == case.steps * size
    made = []

    def step(state, batch, key):
        assert batch.inputs.shape == (size, variational.NETWORKS[name].in_features)
        jax.debug.callback(lambda index: made.append(np.asarray(index)), batch.index)
        return state, {"loss": batch.targets.mean()}

    losses = jax.block_until_ready(variational.scanned(case, lambda key: (), step)())
    jax.effects_barrier()
    assert losses.shape == (2,) and len(made) == 2 * case.steps
    assert (np.bincount(np.concatenate(made)) == 2).all(), "every row once an epoch"
