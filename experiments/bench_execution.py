"""How members should run: one after another, side by side, on one device or on all, interleaved in one process.

    python experiments/bench_execution.py configs/bench_execution/cpu.yaml [key=value ...]

Wall clock of a whole call of `fit`, everything compiled. Each form is held against the default, above 1 = the default is
faster.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import jax
import numpy as np
import optax
from bench import entry, interleaved, publish

import bayescal as bc
from bayescal.config import command_line

# name -> (network, input shape, members)
CASES = {
    "regression_m5": (lambda: bc.models.mlp(8, (50,), 2), (8,), 5),
    "regression_m64": (lambda: bc.models.mlp(8, (50,), 2), (8,), 64),
    "mlp_m4": (lambda: bc.models.mlp(784, (200, 200), 10), (784,), 4),
    "mlp_m16": (lambda: bc.models.mlp(784, (200, 200), 10), (784,), 16),
    "convnet_m4": (lambda: bc.models.convnet((28, 28, 1), (8, 16), 64, 10), (28, 28, 1), 4),
}
FORMS = ("map, 1 device", "vmap, 1 device", "map, all devices", "vmap, all devices")


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    cases: tuple[str, ...] = tuple(CASES)
    rounds: int = 5
    epochs: int = 3
    rows: int = 1024
    batch_size: int = 32
    out: str | None = None


def data_of(shape: tuple[int, ...], rows: int, regression: bool) -> bc.Dataset:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, *shape)).astype(np.float32)
    if regression:
        return bc.Dataset(inputs, inputs[:, :1])
    return bc.Dataset(inputs, rng.integers(0, 10, rows).astype(np.int32))


def forms(case: str, config: Config) -> dict[str, Callable]:
    """The same training in each form, the default first."""
    build, shape, members = CASES[case]
    regression = case.startswith("regression")
    likelihood = bc.heteroscedastic if regression else bc.Categorical
    method = bc.ensemble(bc.map_estimate(build(), likelihood, optax.adam(1e-3)), members)
    data, numbers = data_of(shape, config.rows, regression), count()
    schedule = {"epochs": config.epochs, "batch_size": config.batch_size, "progress": False}

    def train(**settings):
        return lambda: bc.fit(method, data, jax.random.key(next(numbers)), **schedule, **settings)

    found = {"default": train()}
    for form in FORMS:
        execution, devices = form.split(", ")
        found[form] = train(execution=execution, mesh=bc.make_mesh(1) if devices == "1 device" else None)
    return found


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every form of every case in turn, and writes what it found."""
    entries = []
    for case in config.cases:
        seconds = interleaved(forms(case, config), config.rounds, time.perf_counter)
        entries += [entry(case, form, seconds["default"], seconds[form]) for form in FORMS]
    about = (
        f"Wall clock of a whole `fit` of {config.epochs} epochs, medians of {config.rounds} rounds in turn, "
        f"{len(jax.devices())} devices. Ratios are form / default of the same round, median [range]: above 1 = the default "
        "is faster."
    )
    return publish(entries, folder, title="How members run", about=about, peers=(), absent={})


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
