"""Every yaml loads, the smoke run leaves what it promises, and repeats to the digit."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

import bayescal as bc
from bayescal.config import load_config

YAMLS = sorted((REPOSITORY / "configs").glob("*/*.yaml"))


@pytest.mark.core
@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_loads(path):
    assert load_config(importlib.import_module(path.parent.name).Config, path)


def test_every_experiment_has_a_smoke():
    names = {p.stem for p in (REPOSITORY / "experiments").glob("*.py") if "\nclass Config" in p.read_text()}
    assert names == {p.parent.name for p in YAMLS if p.stem == "smoke"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    script = REPOSITORY / "experiments" / "compare_methods.py"
    command = [sys.executable, script, REPOSITORY / "configs" / "compare_methods" / "smoke.yaml", f"out={folder}"]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deep_ensemble" in done.stdout
    return folder


def leaves(tree, path=()):
    if isinstance(tree, dict) and "value" in tree:
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))


METHODS = {"single", "deep_ensemble", "mc_dropout", "variational", "variational_ensemble"}


def test_what_a_run_leaves(smoke):
    result = json.loads((smoke / "metrics.json").read_text())
    assert set(result) == {*("methods", "comparisons", "diverged", "resumed", "config", "versions", "conventions")}
    assert set(result["methods"]) == METHODS
    for figures in result["methods"].values():
        assert {"accuracy", "nll", "brier", "ece"} <= set(figures["test"])
        assert set(figures["shift"]) == {"noise", "rotation", "contrast"}
        assert all(set(by) == set("12345") for by in figures["shift"].values())
        assert {"auroc_total", "auroc_epistemic", "auroc_ood", "auroc_max_probability"} == set(figures["ood"])
        assert {"train", "start", "first_epoch", "first_call", "predict"} == set(figures["seconds"])
        assert {"test", "ood"} <= set(figures["decomposition"])
        for parts in figures["decomposition"].values():
            total = parts["aleatoric"]["value"] + parts["epistemic"]["value"]
            assert abs(total - parts["total"]["value"]) < 1e-5
    for path, leaf in leaves(result):
        assert set(leaf) <= {"value", "low", "high", "n", "convention"}, path
        assert np.isfinite(leaf["value"]), path
        assert leaf.get("low", -np.inf) <= leaf["value"] <= leaf.get("high", np.inf), path
    assert result["config"]["epochs"] == 3 and "jax" in result["versions"]

    # one test, so that one worker runs the experiment once
    for name in METHODS:
        stored = np.load(smoke / "predictions" / f"{name}.npz")
        assert stored["logits"].ndim == 3 and stored["logits"].shape[1:] == (120, 8)
        assert stored["labels"].shape == (120,)
    assert np.load(smoke / "predictions" / "deep_ensemble.npz")["logits"].shape[0] == 3
    page = (smoke / "report.html").read_text()
    assert page.count("data:image/png") == 6 and "variational_ensemble" in page
    assert len(list((smoke / "figures").glob("*.png"))) == 6
    assert "max_rows: 120" in (smoke / "config.yaml").read_text()


def stored(data):
    """The name of a data set whose files are there."""
    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
    files = [folder / part for part in ("fashion_mnist/train-images-idx3-ubyte.gz", "mnist/t10k-images-idx3-ubyte.gz")]
    if data == "fashion" and not all(path.exists() for path in files):
        pytest.skip(f"{folder} lacks images; set BAYESCAL_DATA to the folder of the shared data")
    return data


@pytest.mark.parametrize("data", ["digits", pytest.param("fashion", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_figures_and_says_so(data, tmp_path, monkeypatch):
    """The run dies after its training, which gave the bits that another run gave; the same command goes on from there to
    figures that are the same to the last digit, and the folder shows it."""
    module = importlib.import_module("compare_methods")
    words = [f"data={stored(data)}", "methods=deep_ensemble", "num_members=2", "max_rows=70", "epochs=2"]
    words += ["checkpoint_every=1"]
    config = load_config(module.Config, REPOSITORY / "configs" / "compare_methods" / "smoke.yaml", words)
    module.main(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        module.main(config, tmp_path / "killed")
    logits = [np.load(tmp_path / name / "predictions/deep_ensemble.npz")["logits"] for name in ("whole", "killed")]
    np.testing.assert_array_equal(*logits)
    changed = load_config(
        module.Config, REPOSITORY / "configs" / "compare_methods" / "smoke.yaml", [*words, "hidden=9"]
    )
    with pytest.raises(ValueError, match=r"`config.hidden` was \[16\], is \[9\]"):
        module.main(changed, tmp_path / "killed")
    module.main(config, tmp_path / "killed")
    whole, killed = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed"))
    assert whole.pop("resumed") == [] and not (tmp_path / "killed" / "checkpoints").exists()
    told = killed.pop("resumed")
    assert [line.split(" at ")[0] for line in told] == ["seed 0, deep_ensemble: went on after epoch 2"]
    assert all(line in (tmp_path / "killed" / "report.html").read_text() for line in told)
    for result in (whole, killed):
        for figures in result["methods"].values():
            del figures["seconds"]
    assert whole == killed
    page = (tmp_path / "killed" / "report.html").read_text()
    unseen = ["unseen digits", "images of 8 and 9", "classes 0 to 7"]
    mnist = ["MNIST digits", "images of MNIST are out of distribution", "all ten classes"]
    own, other = (unseen, mnist) if data == "digits" else (mnist, unseen)
    assert all(word in page for word in own) and not any(word in page for word in other)


@pytest.mark.parametrize("data", ["digits", "fashion"])
def test_data_of_the_comparison(data):
    """Shapes are what networks are built for; every class is learnt; another seed draws other rows; shifts keep the label."""
    module = importlib.import_module("compare_methods_data")
    about, sets = module.DATA[stored(data)], module.load_sets(data, 0)
    for inputs, targets in (sets.train[:2], *sets.asked.values()):
        assert len(inputs) == len(targets) and inputs[0].size == about.features and inputs.dtype == np.float32
    for name, (_, targets) in sets.asked.items():
        assert name == "ood" or set(targets) == set(range(about.classes)), name
    for kind in module.SHIFTS:
        _, targets = sets.asked[kind, 1]
        np.testing.assert_array_equal(targets, sets.asked["test"][1][: about.shifted])
        change = [np.abs(sets.asked[kind, s][0] - sets.asked["test"][0][: about.shifted]).mean() for s in (1, 3, 5)]
        assert 0 < change[0] < change[1] < change[2], kind
    other = module.load_sets(data, 1, max_rows=50)
    assert not np.array_equal(other.train.inputs, sets.train.inputs[:50])
    assert {len(inputs) for inputs, _ in other.asked.values()} == {50}


def test_rows_of_fashion():
    """Numbers of rows, as many of each class; none is both learnt and used to validate."""
    module = importlib.import_module("compare_methods_data")
    sets = module.load_sets(stored("fashion"), 0)
    assert {name: len(targets) for name, (_, targets) in sets.asked.items()} == {
        **{"validation": 5_000, "test": 10_000, "ood": 5_000},
        **{(kind, severity): 2_000 for kind in module.SHIFTS for severity in module.SEVERITIES},
    }
    assert (np.bincount(sets.train.targets) == 1_000).all() and (np.bincount(sets.validation.targets) == 500).all()
    seen = {image.tobytes() for image in sets.train.inputs}
    twice = sum(image.tobytes() in seen for image in sets.validation.inputs)
    assert len(seen) > 9_990 and twice < 5  # the files themselves hold a few images twice


def test_strangers_of_fashion_are_drawn_by_seed_from_all_of_mnist():
    """No image twice; about half are of the file's first half: 2,500 with a standard error of sqrt(5000 / 8) = 25."""
    module = importlib.import_module("compare_methods_data")
    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).absolute()
    images = [module.fashion(seed).unseen.inputs for seed in (0, 1, 1) if stored("fashion")]
    np.testing.assert_array_equal(images[1], images[2])
    first = {image.tobytes() for image in module.read(folder / "mnist/t10k").inputs[:5_000]}
    drawn = [{image.tobytes() for image in seed} for seed in images]
    assert [len(seed) for seed in drawn] == [5_000] * 3 and drawn[0] != drawn[1]
    for seed in drawn:
        assert abs(len(seed & first) - 2_500) < 125


def test_unknown_data_and_absent_files(tmp_path, monkeypatch):
    module = importlib.import_module("compare_methods")
    with pytest.raises(ValueError, match=r"`data` must be one of digits, fashion, got 'fashon'. Check the spelling"):
        module.main(module.Config(data="fashon"), tmp_path)
    monkeypatch.setenv("BAYESCAL_DATA", str(tmp_path))
    remedy = r"Check the name\. Set BAYESCAL_DATA to the folder of the image files, or run `data=digits`\."
    with pytest.raises(FileNotFoundError, match=rf"train-images-idx3-ubyte.gz, which is not there\. {remedy}"):
        module.main(module.Config(data="fashion"), tmp_path)


def test_unknown_method(tmp_path):
    module = importlib.import_module("compare_methods")
    with pytest.raises(ValueError, match=r"`methods` must be some of single, deep_ensemble.*got dep_ensemble"):
        module.main(module.Config(methods=("dep_ensemble",)), tmp_path)


def test_a_method_needs_what_it_starts_from(tmp_path):
    module = importlib.import_module("compare_methods")
    with pytest.raises(
        ValueError, match=r"`methods` must hold 'single' before 'laplace', which starts from it.*Add it"
    ):
        module.main(module.Config(methods=("laplace", "single")), tmp_path)


def test_every_row_of_the_comparison_has_a_yaml():
    recipes = importlib.import_module("compare_methods_recipes").RECIPES
    folder = REPOSITORY / "configs" / "compare_methods"
    config = importlib.import_module("compare_methods").Config
    everything = load_config(config, folder / "posteriors.yaml").methods
    assert set(everything) == set(recipes)
    own = {p.stem for p in folder.glob("*.yaml")}
    assert set(recipes) - set(load_config(config, folder / "digits.yaml").methods) <= own
    for name in set(recipes) & own:
        assert name in load_config(config, folder / f"{name}.yaml").methods


RECIPES = importlib.import_module("compare_methods_recipes").RECIPES


def built(name):
    """The recipe's method at the size of the smoke, and a batch."""
    config = importlib.import_module("compare_methods").Config
    data, rows = bc.data.digits(0).train, jnp.arange(32)
    path = REPOSITORY / "configs" / "compare_methods" / "smoke.yaml"
    method = RECIPES[name].build(load_config(config, path, ["num_draws=4"]), 32)
    return method, bc.Batch(jnp.asarray(data.inputs[:32]), jnp.asarray(data.targets[:32]), jnp.ones(32), rows)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_and_predicts(name, key):
    """One update and one prediction, traced alone, which refuses what lacks `num_data` or draws no numbers."""
    (method, batch), start = built(name), RECIPES[name].start
    before = None if start is None else jax.eval_shape(built(start)[0].init, key, None)
    state = jax.eval_shape(method.init, key, before)
    after, info = jax.eval_shape(method.update, state, batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state) and info
    pred = jax.eval_shape(method.predict, after, batch.inputs, key)
    assert pred.logits.shape[1:] == (32, 8)
    assert (pred.logits.shape[0] > 1) == (name not in ("single", "marginal_likelihood"))


@pytest.mark.parametrize(
    ("name", "word", "own"), [("concrete_dropout", "rate_logit", 1e-2), ("rank_one", "mean", 1e-3)]
)
def test_parameters_with_a_learning_rate_of_their_own(name, word, own, key):
    """Adam's first step is its learning rate. Dropout rates have a larger one; means around 1 have no decay, of 3e-4 else."""
    method, batch = built(name)
    state = jax.jit(method.init)(key, None)
    after, _ = jax.jit(method.update)(state, batch, key)
    steps = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.variables.params, after.variables.params)
    for path, step in jax.tree_util.tree_leaves_with_path(steps):
        path = jax.tree_util.keystr(path)
        if word in path:
            np.testing.assert_allclose(step, own, rtol=1e-2, err_msg=path)
        else:
            assert 0 < step < 1.5e-3, path


@pytest.mark.slow
def test_a_posterior_begins_where_a_network_ended_and_its_seconds_count(tmp_path):
    module = importlib.import_module("compare_methods")
    words = ["methods=single,laplace,swag,sgld", "num_draws=4", "chain_epochs=12", "swag_epochs=3"]
    config = load_config(module.Config, REPOSITORY / "configs" / "compare_methods" / "smoke.yaml", words)
    methods = module.main(config, tmp_path)["methods"]
    assert methods["laplace"]["seconds"]["start"] == methods["single"]["seconds"]["train"]
    assert methods["laplace"]["seconds"]["train"].value > methods["single"]["seconds"]["train"].value
    assert {"r_hat", "ess"} <= set(methods["sgld"]["chains"]) and methods["laplace"]["chains"] == {}
    page = (tmp_path / "report.html").read_text()
    assert "largest R-hat" in page and "x single" in page


def test_over_seeds_joins_equal_trees():
    module = importlib.import_module("compare_methods")
    joined = module.over_seeds([{"a": {"b": bc.Estimate(1.0)}, "c": bc.Estimate(0.0)}, {"a": {"b": bc.Estimate(3.0)}}])
    assert joined["a"]["b"].value == 2 and joined["a"]["b"].n == 2
    assert joined["c"].value == 0 and joined["c"].n is None


def test_seconds_of_several_seeds_are_medians_of_those_that_have_them():
    module = importlib.import_module("compare_methods")
    seeds = [{"first_call": 9.0, "predict": 1.0}, {"predict": 2.0}, {"predict": 6.0}]
    own = module.over_seeds([{"seconds": {k: bc.Estimate(v) for k, v in s.items()}} for s in seeds])["seconds"]
    assert own == {"first_call": bc.Estimate(9.0, n=1), "predict": bc.Estimate(2.0, n=3)}
