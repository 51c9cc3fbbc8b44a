"""Whole processes of the training benchmark: from the start of Python to its end, with a warm and with an empty cache."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench import entry, installed, interleaved
from bench_training_data import Case
from bench_training_torch import library

CHILD = Path(__file__).parent / "bench_training_child.py"


def child(form: str, case: Case, cores: int, cache: str = "") -> dict[str, float]:
    """Runs one training in a fresh process, ours with compiled programs kept in the folder `cache`; what it tells."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(CHILD), form, json.dumps(case._asdict()), str(cores)]
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # sources are compiled once
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{form}` must train in a process of its own, got {done.stderr[-2000:]}. Run it by hand.")
    return json.loads(done.stdout.splitlines()[-1])


def in_fresh_processes(name: str, case: Case, cores: int, rounds: int, absent: dict[str, str]) -> list[dict]:
    """Ours with a cache that an earlier run filled, ours with an empty one, and the peers, in turn."""
    told: dict[str, list[dict[str, float]]] = {}

    def timed(form: str, run: Callable[[], dict[str, float]]) -> Callable:
        return lambda: told.setdefault(form, []).append(run())

    def peer(form: str, package: str) -> Callable:
        library(package)
        return timed(form, partial(child, form, case, cores))

    def cold():
        with TemporaryDirectory() as empty:
            return child("ours", case, cores, empty)

    threads = f"{cores} thread" + "s" * (cores > 1)
    packages = {
        "torch loop, 1 thread": "torch",
        "torch.func vmap, 1 thread": "torch",
        f"torch.func vmap, {threads}": "torch",
        "sklearn bagging": "sklearn.neural_network",
    }
    with TemporaryDirectory() as filled:
        forms = {
            "warm": timed("warm", partial(child, "ours", case, cores, filled)),
            "cold": timed("cold", cold),
            **installed({form: partial(peer, form, package) for form, package in packages.items()}, absent),
        }
        seconds = interleaved(forms, rounds, time.perf_counter)
    entries = []
    for own, label in (("warm", name), ("cold", f"{name}, cold")):
        own_parts = {key: median(t[key] for t in told[own][1:]) for key in ("import_seconds", "first_call_seconds")}
        for form in (f for f in forms if f not in ("warm", "cold")):
            entries.append(entry(label, form, seconds[own], seconds[form], phase="process") | own_parts)
    entries.append(entry(f"{name}, cold", "ours, warm", seconds["cold"], seconds["warm"], phase="process"))
    return entries
