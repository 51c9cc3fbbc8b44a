"""Members and rows over eight host devices and over two real processes, in programs that do not talk where they need not."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

SCRIPT = [sys.executable, str(REPOSITORY / "tests" / "sharded.py")]


def start(*words):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen([*SCRIPT, *map(str, words)], env={**env, **cache}, stderr=subprocess.PIPE, text=True)


def finished(*processes):
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]


def run(tmp_path, devices, member, data, members, epochs):
    out = tmp_path / f"{devices}-{member}-{data}-{members}-{epochs}.npz"
    finished(start(out, devices, member, data, members, epochs))
    return np.load(out), json.loads((tmp_path / f"{out.name}.json").read_text())


def two_processes(tmp_path, member, data, members, epochs, *checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / f"two-{member}-{data}-{members}-{epochs}.npz"
    finished(*(start(out, 2, member, data, members, epochs, 2, rank, port, *checkpoint) for rank in range(2)))
    return np.load(out), json.loads((tmp_path / f"{out.name}.json").read_text())


def close(a, b, tolerance):
    for name in set(a.files) - {"nll"}:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def talk(programs):
    (program,) = programs["programs"]
    assert program["all_gather"] == 0 and program["all_to_all"] == 0
    return program


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1, 1, 1, 4, 1)


def test_a_step_talks_inside_a_member_row_alone_and_halves_the_work(tmp_path, one_device):
    """Two members' rows of two devices each; an epoch is one step."""
    sharded, programs = run(tmp_path, 4, 2, 2, 4, 1)
    program, alone = talk(programs), talk(one_device[1])
    assert program["all_reduce"] > 0 and alone["all_reduce"] == 0
    assert program["groups"] == ["[2,2]<=[4]"], "the groups must be {0,1} and {2,3}: the rows of the mesh"
    assert program["flops"] <= 0.6 * alone["flops"]
    close(sharded, one_device[0], 1e-5)


def test_two_processes_are_one(tmp_path, one_device):
    together, programs = two_processes(tmp_path, 2, 2, 4, 1)
    close(together, one_device[0], 1e-5)
    assert programs["n"] == 64
    np.testing.assert_allclose(together["nll"], one_device[0]["nll"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("members", [8, 5])
@pytest.mark.parametrize(("member", "data"), [(8, 1), (4, 2), (2, 4)])
def test_eight_devices(tmp_path, member, data, members):
    """Members that do and do not divide the devices: 1e-6 after a step, 1e-4 after fifty."""
    for epochs, tolerance in ((1, 1e-6), (50, 1e-4)):
        whole, alone = run(tmp_path, 1, 1, 1, members, epochs)
        sharded, programs = run(tmp_path, 8, member, data, members, epochs)
        program = talk(programs)
        if data == 1:
            assert program["all_reduce"] == 0
        else:
            assert program["groups"] == [f"[{member},{data}]<=[8]"]
        if data == 2:
            assert program["flops"] <= 0.6 * talk(alone)["flops"]
        close_parameters(sharded, whole, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("member", "data", "members"), [(4, 1, 4), (4, 1, 3), (2, 2, 4), (2, 2, 3)])
def test_two_processes_longer(tmp_path, member, data, members):
    for epochs, tolerance in ((1, 1e-6), (50, 1e-4)):
        whole, _ = run(tmp_path, 1, 1, 1, members, epochs)
        together, _ = two_processes(tmp_path, member, data, members, epochs)
        close_parameters(together, whole, tolerance)


@pytest.mark.slow
def test_two_processes_save_and_go_on(tmp_path):
    folder = tmp_path / "run"
    first, _ = two_processes(tmp_path, 4, 1, 3, 3, folder)
    (folder / "steps" / "3").rename(tmp_path / "gone")
    again, _ = two_processes(tmp_path, 4, 1, 3, 3, folder)
    for name in first.files:
        np.testing.assert_array_equal(first[name], again[name])
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["began", "resumed"] and events[1]["epoch"] == 2


def close_parameters(a, b, tolerance):
    for name in set(a.files) - {"nll", "logits", "history"}:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)
