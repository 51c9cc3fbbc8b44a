"""Nothing is lost: killed trainings, damaged checkpoints, other devices, other settings, saved states."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY
from killed import EPOCHS, leaves, train
from methods import blobs, pure_model

import bayescal as bc

CHILD = [sys.executable, str(REPOSITORY / "tests" / "killed.py")]


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def child(folder, devices, out, kill_after=None, saved=False):
    """Runs a training process, killed so many seconds after it begins, or after its first checkpoint is whole where
    `saved`; whether it got to its end."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_parallel_codegen_split_count=1"
    command = [*CHILD, str(folder), str(devices), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": flags})
    assert process.stdout.readline() == "begins\n"
    while saved and process.poll() is None and not any(p.name.isdigit() for p in (Path(folder) / "steps").glob("*")):
        time.sleep(0.005)
    try:
        assert process.wait(kill_after) == 0
        return True
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def events(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def kill_once(folder, devices, out, lives, draw):
    """Kills a training at a random moment of its life, lets another go on, and gives the epoch it went on from."""
    while child(folder, devices, out, draw.uniform(0.2, 1.0) * lives):
        shutil.rmtree(folder)  # it was too fast: another
    assert child(folder, devices, out)
    last = events(folder)[-1]
    return last["epoch"] if last["event"] == "resumed" else 0


def test_a_killed_training_resumes_to_the_same_bits(finished, tmp_path):
    folder, out, draw = tmp_path / "run", tmp_path / "out.npz", random.Random(0)
    while child(folder, 2, out, draw.uniform(0, 0.4), saved=True):
        shutil.rmtree(folder)  # it was too fast: another
    assert child(folder, 2, out)
    assert events(folder)[-1]["event"] == "resumed" and 1 <= events(folder)[-1]["epoch"] < EPOCHS
    same(np.load(out), finished[2])


@pytest.mark.parametrize(
    "moment", ["before the checkpoint is visible", pytest.param("while digests are written", marks=pytest.mark.slow)]
)
def test_a_kill_in_the_midst_of_a_save(tmp_path, finished, moment):
    """The process dies by itself, in the call that orbax makes when the files of epoch 5 are written."""
    code = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "from killed import *; from bayescal.checkpoint import Store; import bayescal.checkpoint as module\n"
        "write, digests = Store._write_digests, module.digests\n"
        "def dies(self):\n"
        f"    early = self.saving[0] == 5 and {moment.startswith('while')}\n"
        "    module.digests = (lambda folder: os._exit(9)) if early else digests\n"
        "    write(self)\n"
        "    if self.saving[0] == 5: os._exit(9)\n"
        "Store._write_digests = dies\n"
        f"train({str(tmp_path / 'run')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 9
    _, fitted = train(tmp_path / "run")
    same(leaves(fitted), finished[2])
    assert events(tmp_path / "run")[-1]["epoch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_fifty_kills(tmp_path, devices):
    """Twenty-five on one device, twenty-five on a mesh of two; every one ends with the bits of one never killed."""
    assert child("none", devices, tmp_path / "whole.npz")  # compiles
    began = time.perf_counter()
    assert child(tmp_path / "timed", devices, tmp_path / "timed.npz")
    lives, whole = time.perf_counter() - began, np.load(tmp_path / "whole.npz")
    same(np.load(tmp_path / "timed.npz"), whole)
    draw, resumed = random.Random(devices), []
    for kill in range(25):
        resumed.append(kill_once(tmp_path / f"{kill}", devices, tmp_path / "out.npz", lives, draw))
        same(np.load(tmp_path / "out.npz"), whole)
    print(f"{devices} devices: {len(resumed)} of 25 to the bit, resumed after epochs {sorted(resumed)}")
    assert len(set(resumed)) > 3, "the moments must differ"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training with all its checkpoints kept, its result, and the result of one without checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    _, fitted = train(folder)
    return folder, leaves(fitted), leaves(train(None)[1])


def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_saving_changes_nothing_and_a_finished_training_is_only_read(finished, tmp_path):
    folder = copied(finished, tmp_path)
    same(finished[1], finished[2])
    _, again = train(folder)
    same(leaves(again), finished[2])
    assert again.seconds["epochs"] == 0
    assert [e["event"] for e in events(folder)] == ["began", "resumed"] and events(folder)[-1]["epoch"] == EPOCHS
    assert sorted(p.name for p in (folder / "steps").iterdir()) == ["11", "12"]
    assert sorted(p.stem for p in (folder / "digests").iterdir()) in (["11", "12"], ["10", "11", "12"])


def test_a_training_that_ended_early_is_over_when_gone_on_with(tmp_path, key):
    settings = dict(validation=blobs(), patience=2, learning_rate=-0.1, epochs=20)  # it only gets worse
    fitted = quick(tmp_path, key, **settings)
    again = quick(tmp_path, key, **settings)
    assert again.seconds["epochs"] == 0
    same(leaves(again), leaves(fitted))
    assert again.history["loss"].shape == (3, 1)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no digests"])
def test_a_damaged_checkpoint_falls_back_and_says_so(finished, tmp_path, damage):
    folder = copied(finished, tmp_path)
    files = sorted((folder / "steps" / "12").rglob("d/*"), key=lambda p: -p.stat().st_size)
    content = bytearray(files[0].read_bytes())
    if damage == "truncate":
        files[0].write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        files[0].write_bytes(content)
    elif damage == "delete":
        files[0].unlink()
    else:
        (folder / "digests" / "12.json").write_text('{"fil')
    with pytest.warns(UserWarning, match=r"Checkpoint 12 in .* is damaged .*the one before is looked for"):
        _, fitted = train(folder)
    same(leaves(fitted), finished[2])
    assert [e["event"] for e in events(folder)] == ["began", "damaged checkpoint put aside", "resumed"]
    assert events(folder)[-1]["epoch"] == 11 and len(list((folder / "damaged").iterdir())) == 1


def test_all_checkpoints_damaged_begins_again(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for step in (folder / "steps").iterdir():
        next(p for p in step.rglob("d/*") if p.is_file()).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"is damaged|No sound checkpoint is left in .*training begins again"):
        _, fitted = train(folder)
    same(leaves(fitted), finished[2])
    assert [e["event"] for e in events(folder)][-1] == "began again"


def test_another_number_of_devices(finished, tmp_path):
    """Saved on two devices, where three members were filled up to four; gone on with on one."""
    folder = copied(finished, tmp_path)
    shutil.rmtree(folder / "steps" / "12")
    _, fitted = train(folder, bc.make_mesh(1))
    assert fitted.seconds["epochs"] == 1
    got = leaves(fitted)
    for name in got:
        if got[name].dtype.kind == "f":
            np.testing.assert_allclose(got[name], finished[2][name], rtol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], finished[2][name], err_msg=name)
    assert events(folder)[-1]["saved_on"] == "2 member x 1 data" and events(folder)[-1]["on"] == "1 member x 1 data"


def quick(folder, key, learning_rate=0.1, config=None, data=None, network=None, **settings):
    network = network or pure_model()
    method = bc.map_estimate(network, bc.Categorical, optax.sgd(learning_rate))
    settings = {"epochs": 2, "batch_size": 10, **settings}
    checkpoint = bc.Checkpoint(folder, config=config or {})
    return bc.fit(method, data or blobs(), key, checkpoint=checkpoint, progress=False, **settings)


def test_a_changed_training_is_refused_by_the_names_that_differ(tmp_path, key):
    quick(tmp_path, key, config={"width": 8})
    changes = {
        r"`batch_size` was 10, is 15; `epochs` was 2, is 3; `program`": {"epochs": 3, "batch_size": 15},
        r"where `program` was \w+, is \w+\. Put": {"learning_rate": 0.2},
        r"where `config.width` was 8, is 9\. Put": {"config": {"width": 9}},
        r"where `config.width` was 8, is absent\. Put": {"config": None},
        r"where `data` was \w+, is \w+\. Put": {"data": blobs()._replace(targets=np.roll(blobs().targets, 1))},
        r"`state` was \w+, is \w+\. Put": {"network": bc.models.mlp(4, (3,), 3)},
        r"`validation` was None, is \w+": {"validation": blobs()},
        r"`execution` was None, is vmap": {"execution": "vmap"},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            quick(tmp_path, key, **{"config": {"width": 8}, **change})
    with pytest.raises(ValueError, match=r"where `key` was .*\[0, 7\]\], is .*\[0, 8\]\]\. Put"):
        quick(tmp_path, jax.random.key(8), config={"width": 8})
    quick(tmp_path, key, config={"width": 8})


def test_what_decides_and_is_not_in_the_update_is_compared_too(tmp_path, key):
    """A score of the same name, the draws of a prediction that is scored, rows drawn by an unnamed function."""
    net = bc.models.mlp(4, (8,), 3, dropout=0.5)

    def run(folder, method, **settings):
        kept = {"epochs": 1, "batch_size": 10, "validation": blobs(), "progress": False, **settings}
        return bc.fit(method, blobs(), key, checkpoint=tmp_path / folder, **kept)

    dropout = lambda draws: bc.mc_dropout(net, bc.Categorical, optax.sgd(0.1), num_draws=draws)
    run("draws", dropout(2))
    with pytest.raises(ValueError, match=r"where `program` was"):
        run("draws", dropout(5))
    lone = bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(0.1))
    run("score", lone, score=bc.nll())
    negative = bc.nll()._replace(compute=lambda sums: -bc.nll().compute(sums))
    with pytest.raises(ValueError, match=r"where `program` was"):
        run("score", lone, score=negative)
    run("rows", bc.ensemble(lone, 2, resample=lambda key, rows: bc.bootstrap(key, rows)))
    with pytest.raises(ValueError, match=r"where `resample` was"):
        run("rows", bc.ensemble(lone, 2, resample=lambda key, rows: jnp.ones(rows)))


def test_another_device_count_still_compares_the_program(tmp_path, key):
    def run(rate, devices):
        method = bc.ensemble(bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(rate)), 2)
        mesh = bc.make_mesh(devices)
        return bc.fit(method, blobs(), key, epochs=1, batch_size=10, checkpoint=tmp_path, mesh=mesh, progress=False)

    run(0.1, 2)
    with pytest.raises(ValueError, match=r"where `program` was"):
        run(0.2, 1)
    assert run(0.1, 1).seconds["epochs"] == 0


def test_other_versions_are_said(tmp_path, key):
    quick(tmp_path, key)
    run = json.loads((tmp_path / "run.json").read_text())
    run["facts"]["versions"]["jax"], run["identity"]["program"] = "0.9.0", "another"
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.warns(UserWarning, match=r"cannot be compared, since jax was 0\.9\.0"):
        quick(tmp_path, key)
    assert events(tmp_path)[-1]["not_compared"] == "jax was 0.9.0"
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "resu')  # a kill while it was written
    from bayescal.checkpoint import events as told

    assert len(told(tmp_path)) == 2


def test_forms_that_were_chosen_are_kept(tmp_path, key, monkeypatch):
    """Less free memory when a run is gone on with must not change how it streams."""
    quick(tmp_path, key, epochs=2)
    monkeypatch.setattr("bayescal.train.stream.device_budget", lambda: 100)
    assert quick(tmp_path, key, epochs=2).seconds["epochs"] == 0
    assert json.loads((tmp_path / "run.json").read_text())["facts"]["forms"] == {"block": None, "execution": "map"}


def test_data_on_another_device_and_in_bfloat16(tmp_path, key):
    data = blobs()._replace(inputs=jnp.asarray(blobs().inputs, jnp.bfloat16))
    quick(tmp_path / "half", key, data=data)
    there = jax.device_put(blobs().inputs, jax.devices()[1])
    quick(tmp_path / "there", key, data=blobs()._replace(inputs=there))
    shutil.rmtree(tmp_path / "there" / "steps" / "2")
    assert quick(tmp_path / "there", key, data=blobs()._replace(inputs=there)).seconds["epochs"] == 1


def test_unusable_checkpoint_settings(tmp_path, key):
    with pytest.raises(ValueError, match="`checkpoint` must have every >= 1 and keep >= 2, got 1 and 1"):
        bc.fit(
            bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(0.1)),
            blobs(),
            key,
            epochs=1,
            batch_size=10,
            checkpoint=bc.Checkpoint(tmp_path, keep=1),
        )
    (tmp_path / "run.json").write_text('{"ident')
    with pytest.raises(ValueError, match=r"run.json` must say what training is in this folder"):
        quick(tmp_path, key)
    (tmp_path / "run.json").unlink()
    (tmp_path / "steps").mkdir()
    with pytest.raises(ValueError, match=r"must say what training is in this folder, got none beside steps"):
        quick(tmp_path, key)


def test_a_save_that_was_killed_between_two_renamings(tmp_path):
    bc.save(tmp_path / "a", {"x": jnp.ones(3)})
    (tmp_path / "a").rename(tmp_path / "a.old")
    assert (bc.load(tmp_path / "a", {"x": jnp.zeros(3)})["x"] == 1).all()
    (tmp_path / "a").rename(tmp_path / "a.old")
    bc.save(tmp_path / "a", {"x": 2 * jnp.ones(3)})
    assert (bc.load(tmp_path / "a", {"x": jnp.zeros(3)})["x"] == 2).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_saved_state_predicts_the_same_bits_in_a_new_process(finished, tmp_path, key):
    method, fitted = train(None)
    bc.save(tmp_path / "state", fitted.best)
    bc.save(tmp_path / "state", fitted.state)  # replaces
    pred = bc.predict(method, fitted.state, blobs().inputs, key)
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import jax, numpy as np, optax, bayescal as bc\nfrom methods import blobs\n"
        "build = lambda rate: bc.map_estimate(bc.models.mlp(4, (8,), 3), bc.Categorical, optax.adam(rate))\n"
        "method = bc.ensemble(build, settings=np.zeros(3, np.float32))\n"
        "bc.use_all_cores(2)\n"
        f"state = bc.load({str(tmp_path / 'state')!r}, method)\n"
        "pred = bc.predict(method, state, blobs().inputs, jax.random.key(7))\n"
        f"np.save({str(tmp_path / 'logits.npy')!r}, pred.logits)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), pred.logits)


def test_save_and_load_any_pytree(tmp_path, key):
    tree = {"pred": bc.Gaussian(jnp.ones((2, 3, 1)), jnp.full((2, 3, 1), 1.5)), "key": key}
    bc.save(tmp_path / "a" / "b", tree)
    back = bc.load(tmp_path / "a" / "b", jax.eval_shape(lambda: tree))
    assert (back["pred"].variance == 1.5).all() and back["pred"].member_weights is None
    assert (jax.random.key_data(back["key"]) == jax.random.key_data(key)).all()
    with pytest.raises(ValueError, match="`like` must have the structure, shapes and types of what was saved"):
        bc.load(tmp_path / "a" / "b", {"pred": jnp.zeros(2)})
    with pytest.raises(FileNotFoundError, match=r"`folder` must be one that `bc\.save` wrote"):
        bc.load(tmp_path / "nothing", tree)
    file = max((tmp_path / "a" / "b").rglob("d/*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must hold the files that were written, got 1 changed"):
        bc.load(tmp_path / "a" / "b", tree)
    with pytest.raises(FileNotFoundError, match=r"`folder` must be one that `bc\.save` wrote"):
        bc.save(tmp_path / "a", tree)  # a folder with other things in it is never deleted
