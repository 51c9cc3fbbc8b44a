"""What the first call of a process waits for: nothing is imported that it does not need, nothing compiled twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import bayescal as bc
from bayescal import programs

pytestmark = pytest.mark.core

TRAIN = """
import json, sys
from collections import Counter
import jax, numpy as np, optax
import bayescal as bc

events = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
folder = bc.keep_programs()
x = np.linspace(-1, 1, 48, dtype=np.float32).reshape(12, 4)
model = bc.Model(
    lambda key: bc.Variables(jax.random.normal(key, (4, 3))),
    lambda variables, inputs, key: inputs @ variables.params,
    lambda variables, inputs, key: (inputs @ variables.params, (), 0.0),
)
method = bc.ensemble(bc.map_estimate(model, bc.Categorical, optax.sgd(1e-1)), num_members=2)
fitted = bc.fit(method, bc.Dataset(x, np.arange(12) % 3), jax.random.key(0), epochs=1, batch_size=6, progress=False)
pred = bc.predict(method, fitted.state, x, jax.random.key(1))
print(json.dumps([str(folder), events, np.asarray(pred.logits).tobytes().hex(), "flax" in sys.modules]))
"""


def process(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or k == "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=clean | environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def unset(monkeypatch):
    """As in a process that has set nothing, whatever the tests themselves have set."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", *programs._EVERY_PROGRAM)
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (True, None, 1.0, 0), strict=True):
        monkeypatch.delenv(name.upper(), raising=False)
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def in_use():
    return jax.config.jax_compilation_cache_dir


def kept(folder):
    return sorted(p.name for p in folder.iterdir())


def test_importing_brings_nothing_that_jax_does_not():
    """Of what is installed jaxtyping alone: optimisers, networks, yaml, scipy and progress bars come when they are used."""
    code = """
import json, sys
import jax
before = set(sys.modules)
import bayescal
new = set(sys.modules) - before
packages = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names)
print(json.dumps([sorted(packages), [name for name in new if name.startswith(("jax.experimental", "jax.extend"))]]))
"""
    packages, parts_of_jax = process(code)
    assert set(packages) <= {"bayescal", "jaxtyping", "jax", "numpy", "typing_extensions"} and parts_of_jax == []


def test_the_second_process_compiles_nothing_and_gives_the_same_bits(tmp_path):
    (folder, first, bits, flax), second = (process(TRAIN, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert Path(folder) == tmp_path / "bayescal" / "programs" and Path(folder).stat().st_mode & 0o077 == 0
    assert first["cache_misses"] > 2 and first.get("cache_hits", 0) == 0
    assert second[1].get("cache_misses", 0) == 0 and second[1]["cache_hits"] == first["cache_misses"]
    assert second[2] == bits and not flax


def test_a_folder_of_ones_own(unset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = bc.keep_programs("mine/programs")
    assert folder == tmp_path / "mine" / "programs" and in_use() == str(folder) and folder.is_dir()
    assert {k: getattr(jax.config, k) for k in programs._EVERY_PROGRAM} == programs._EVERY_PROGRAM


@pytest.mark.parametrize(("given", "inside"), [("{tmp}/cache", "cache"), ("cache", "home/.cache"), ("", "home/.cache")])
def test_the_default_folder_is_the_users(unset, tmp_path, monkeypatch, given, inside):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", given.format(tmp=tmp_path))
    assert bc.keep_programs() == tmp_path / inside / "bayescal" / "programs"


def test_what_was_set_before_is_left_alone(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    bc.keep_programs(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 7)
    assert bc.keep_programs(tmp_path / "another") == tmp_path / "named"
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == 7 and kept(tmp_path) == ["trimmed"]


def test_it_can_be_switched_off(unset, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert bc.keep_programs(tmp_path / "none") is None
    assert in_use() is None and kept(tmp_path) == []


def test_a_folder_that_cannot_be_written_to(unset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    told = r"`folder` must be one that can be written to, got .*Not a directory.* or set JAX_ENABLE_COMPILATION_CACHE=0"
    with pytest.raises(ValueError, match=told):
        bc.keep_programs(tmp_path / "file" / "programs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=f"{told}. Without one every process compiles anew."):
        assert bc.keep_programs() is None
    assert in_use() is None and jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_a_folder_that_others_filled_and_closed(unset, tmp_path, monkeypatch):
    bc.keep_programs(tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Path, "touch", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match="Permission denied"):
        bc.keep_programs(tmp_path)


def test_what_was_read_longest_ago_goes_first_once_a_day(unset, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MOST_BYTES", 250)
    for age, name in enumerate(["new-cache", "read-cache", "old-cache", "older-cache", "notes.txt"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    os.utime(tmp_path / "read-cache", (10**9 + 5, 10**9 - 100))  # an old program that was read again
    trimmed = ["new-cache", "notes.txt", "read-cache", "trimmed"]
    bc.keep_programs(tmp_path)
    assert kept(tmp_path) == trimmed
    (tmp_path / "another-cache").write_bytes(bytes(100))
    for hours, expected in ((23, ["another-cache", *trimmed]), (25, ["another-cache", *trimmed[1:]])):
        jax.config.update("jax_compilation_cache_dir", None)
        done = (tmp_path / "trimmed").stat().st_mtime
        monkeypatch.setattr(programs.time, "time", lambda done=done, hours=hours: done + 3600 * hours)
        bc.keep_programs(tmp_path)
        assert kept(tmp_path) == expected
