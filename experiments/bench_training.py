"""How long training takes, ours against PyTorch's loops, processes and vmap, and against scikit-learn, in turn.

    python experiments/bench_training.py configs/bench_training/cpu.yaml [key=value ...]

Both sides train the same networks on the same rows from scratch: initialisation, shuffling and all updates, on all cores,
wall clock, everything compiled and PyTorch's processes started before. After that: the matrix products alone, ours at other
sizes, and whole fresh processes. Not measured: `torch.compile`, and bfloat16 for the MLPs and LeNet. `pip install
bayescal[bench]` brings the peers.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from bench import entry, installed, interleaved, publish
from bench_training_data import CASES, Case, concrete_file
from bench_training_growth import FLOOR, floor, growth
from bench_training_ours import last_loss, training
from bench_training_process import in_fresh_processes
from bench_training_torch import makers

import bayescal as bc
from bayescal.config import command_line

PEERS = ("torch", "scikit-learn")
WITH_FLOOR = ("mlp_m4", "mlp_m16")


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    cases: tuple[str, ...] = tuple(CASES)
    rounds: int = 5
    rows: int | None = None  # at most, of every case
    epochs: int | None = None  # at most
    growth: bool = True  # also ours at other sizes
    process: bool = True  # also whole fresh processes, of `regression`
    out: str | None = None


def steady(name: str, case: Case, config: Config, cores: int, absent: dict[str, str]) -> list[dict]:
    """Ours and every form of the peers in turn; the difference is that of the mean losses of the last epochs."""
    losses: dict[str, list[float]] = {}

    def kept(form: str, train: Callable, read: Callable = lambda loss: loss) -> Callable:
        def run():
            trained = jax.block_until_ready(train())
            losses.setdefault(form, []).append(read(trained))

        return run

    with ExitStack() as closing:
        theirs = installed(makers(case, cores), absent, case, closing)
        forms = {"ours": kept("ours", training(case), last_loss)}
        forms |= {form: kept(form, train) for form, train in theirs.items()}
        if name in WITH_FLOOR:
            forms[FLOOR] = floor(case)
        seconds = interleaved(forms, config.rounds, time.perf_counter)
    entries = []
    for form in theirs:
        ours, other = np.mean(losses["ours"]), np.mean(losses[form])
        difference = None if np.isnan(other) else float(abs(other - ours) / abs(ours))
        entries.append(entry(name, form, seconds["ours"], seconds[form], difference=difference))
    if FLOOR in forms:
        entries.append(entry(name, FLOOR, seconds["ours"], seconds[FLOOR], phase="floor"))
    entries += torch_best(entries, seconds)
    return entries


def torch_best(entries: list[dict], seconds: dict[str, np.ndarray]) -> list[dict]:
    """The entry of PyTorch's fastest form again, as "torch best"; where some are of lower precision, without them too."""
    torch = [line for line in entries if line["peer"].startswith("torch")]
    exact = [line for line in torch if "bfloat16" not in line["peer"]]
    groups = {"torch best": torch, "torch best, float32": exact if exact != torch else []}
    best = {label: min(group, key=lambda e: np.median(seconds[e["peer"]])) for label, group in groups.items() if group}
    return [line | {"peer": label, "form": line["peer"]} for label, line in best.items()]


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every case, and writes what it found."""
    wrong = [case for case in config.cases if case not in CASES]
    if wrong:
        raise ValueError(f"`cases` must be some of {', '.join(CASES)}, got {wrong[0]}. Check the spelling.")
    chosen = {name: case.smaller(config.rows, config.epochs) for name, case in CASES.items()}
    cores, absent, entries = len(jax.devices("cpu")), {}, []
    for name in config.cases:
        found = steady(name, chosen[name], config, cores, absent)
        print(
            name, *(f"{e['peer']} {e['ratio']['median']:.2f} x" for e in found), sep=" | ", flush=True
        )  # it takes long
        entries += found
    if config.growth:
        entries += growth(chosen["mlp_m16"]._replace(members=4), config.rounds, cores)
    if config.process:
        entries += in_fresh_processes("regression", chosen["regression"], cores, config.rounds, absent)
    about = text(config, entries)
    print(about)
    return publish(entries, folder, title="Training against PyTorch", about=about, peers=PEERS, absent=absent)


def text(config: Config, entries: list[dict]) -> str:
    best = [f"{e['case']}: {e['form'].removeprefix('torch ')}" for e in entries if e["peer"] == "torch best"]
    floors = [f"{e['case']} {1 / e['ratio']['median']:.2f}" for e in entries if e["phase"] == "floor"]
    parts = {e["case"]: e for e in entries if "first_call_seconds" in e}
    fresh = [f"{n} {e['import_seconds']:.2f} + {e['first_call_seconds']:.2f} s" for n, e in parts.items()]
    memory = [
        f"{e['case']} {e['ours_megabytes']:.0f} MB against {e['peer_megabytes']:.0f}"
        for e in entries
        if e["peer"].startswith("half")
    ]
    said = [
        f"Wall clock, medians of {config.rounds} rounds in turn, {len(jax.devices())} devices; whole trainings from scratch.",
        "Ratios are peer / ours of the same round, median [range]: above 1 = ours is faster; the difference is the relative "
        "one of the mean losses of the last epochs, each side from its own initialisation.",
        f"The regression is {'UCI concrete' if concrete_file().is_file() else 'synthetic'}.",
        f"The best torch form is, of {'; '.join(best)}." if best else "",
        f"Ours takes so many times its matrix products alone: {', '.join(floors)}." if floors else "",
        "Growth: of half the size the ratio is 0.5 where time grows in proportion; highest memory on top of the imports, full "
        f"against half: {', '.join(memory)}. A single member runs on one device."
        if memory
        else "",
        f"Of a whole process of ours import and first call take: {', '.join(fresh)}." if fresh else "",
    ]
    return " ".join(s for s in said if s)


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
