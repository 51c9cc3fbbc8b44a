"""How members should run: one after another, side by side, on one device or on all, interleaved in one process.

    python experiments/bench_execution.py configs/bench_execution/cpu.yaml [key=value ...]

Writes `bench.json` and a table: seconds of the epochs after the first (the steady state), and each form's ratio to the
default's, above 1 = the default is faster. Every case that ran is in it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax

import bayescal as bc
from bayescal.config import command_line, versions
from bayescal.report import save_json

# name -> (network, input shape, members)
CASES = {
    "regression_m5": (lambda: bc.models.mlp(8, (50,), 2), (8,), 5),
    "regression_m64": (lambda: bc.models.mlp(8, (50,), 2), (8,), 64),
    "mlp_m4": (lambda: bc.models.mlp(784, (200, 200), 10), (784,), 4),
    "mlp_m16": (lambda: bc.models.mlp(784, (200, 200), 10), (784,), 16),
    "convnet_m4": (lambda: bc.models.convnet((28, 28, 1), (8, 16), 64, 10), (28, 28, 1), 4),
}
FORMS = ("default", "map, 1 device", "vmap, 1 device", "map, all devices", "vmap, all devices")


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    cases: tuple[str, ...] = tuple(CASES)
    rounds: int = 5
    epochs: int = 4  # the first is not counted
    rows: int = 1024
    batch_size: int = 32
    out: str | None = None


def data_of(shape: tuple[int, ...], rows: int, regression: bool) -> bc.Dataset:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, *shape)).astype(np.float32)
    if regression:
        return bc.Dataset(inputs, inputs[:, :1])
    return bc.Dataset(inputs, rng.integers(0, 10, rows).astype(np.int32))


def seconds(config: Config, case: str, form: str, round_number: int) -> float:
    """Of the epochs after the first."""
    build, shape, members = CASES[case]
    regression = case.startswith("regression")
    likelihood = bc.heteroscedastic if regression else bc.Categorical
    key = (case, config.rows)
    if key not in _MADE:  # the same method and data each time, so that each form compiles once
        method = bc.ensemble(bc.map_estimate(build(), likelihood, optax.adam(1e-3)), members)
        _MADE[key] = method, data_of(shape, config.rows, regression)
    method, data = _MADE[key]
    settings = {}
    if form != "default":
        execution, devices = form.split(", ")
        settings = {"execution": execution, "mesh": bc.make_mesh(1) if devices == "1 device" else None}
    fitted = bc.fit(
        method,
        data,
        jax.random.key(round_number),
        epochs=config.epochs,
        batch_size=config.batch_size,
        progress=False,
        **settings,
    )
    return fitted.seconds["later_epochs"]


_MADE: dict = {}


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every form of every case in turn, and writes what it found."""
    device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    entries = []
    for case in config.cases:
        for form in FORMS:
            seconds(config, case, form, 0)  # compiles
        times = {form: [] for form in FORMS}
        for number in range(config.rounds):
            for form in FORMS:
                times[form].append(seconds(config, case, form, number))
        ours = np.array(times["default"])
        for form in FORMS[1:]:
            ratio = np.array(times[form]) / ours
            entries.append(
                {
                    "case": case,
                    "peer": form,
                    "phase": "steady",
                    "ratio": {"median": np.median(ratio), "low": ratio.min(), "high": ratio.max()},
                    "ours_seconds": np.median(ours),
                    "peer_seconds": np.median(times[form]),
                    "rounds": config.rounds,
                    "device": device,
                }
            )
    entries.sort(key=lambda e: e["ratio"]["median"])  # lost ones first
    save_json(folder / "bench.json", entries)
    save_json(folder / "versions.json", versions())
    print(f"{'case':16s}{'form':20s}{'ratio to default':>24s}{'seconds':>10s}{'default':>10s}")
    for e in entries:
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**e["ratio"])
        print(f"{e['case']:16s}{e['peer']:20s}{ratio:>24s}{e['peer_seconds']:10.3f}{e['ours_seconds']:10.3f}")
    return entries


if __name__ == "__main__":
    bc.use_all_cores()
    main(*command_line(Config, sys.argv))
