"""What benchmarks share: forms in turn in one process, paired ratios, one table and one json, lost cases first."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from bayescal.config import versions
from bayescal.report import Section, Table, save_json, write_report

PHASES = ("steady", "floor", "growth", "process")  # in this order in what is published
SETTLE = 0.05  # seconds: threads of the form before (OpenMP's) spin on, and the clock counts them


def interleaved(
    forms: Mapping[str, Callable], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, np.ndarray]:
    """Seconds of each form in each round, name -> (rounds,): one call that does not count, then all in turn.

    The turn starts with another form each round, so that none always finds the caches as the same one left them.

    Args:
        forms: name -> function without arguments; jax arrays that it returns are waited for.
        rounds: how many.
        clock: `time.process_time` = CPU seconds of all threads; `time.perf_counter` = wall clock.
    """
    names = list(forms)
    for name in names:
        jax.block_until_ready(forms[name]())
    seconds = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE)
            start = clock()
            jax.block_until_ready(forms[name]())
            seconds[name].append(clock() - start)
    return {name: np.array(s) for name, s in seconds.items()}


def installed(makers: Mapping[str, Callable], absent: dict[str, str], *args) -> dict[str, Callable]:
    """`make(*args)` of every peer; those whose library is missing go into `absent`, with the reason."""
    forms = {}
    for name, make in makers.items():
        try:
            forms[name] = make(*args)
        except ImportError as error:
            absent[name] = str(error)
    return forms


def entry(case: str, peer: str, ours, theirs, *, phase: str = "steady", difference: float | None = None) -> dict:
    """One line of `bench.json`: paired ratios peer / ours, above 1 = ours is faster; median and range over rounds.

    Args:
        case: what is computed, and on how many rows.
        peer: who else computed it, or a budget.
        ours, theirs: seconds of each round; of a budget one number.
        phase: "steady" = after compilation, "floor" = the least this machine needs, "growth" = ours at another size,
            "process" = the first call of a fresh process.
        difference: of the two results, the largest relative one; None = there is nothing to compare.
    """
    ours = np.asarray(ours)
    ratio = np.asarray(theirs) / ours
    return {
        "case": case,
        "peer": peer,
        "phase": phase,
        "ratio": {"median": np.median(ratio), "low": ratio.min(), "high": ratio.max()},
        "ours_seconds": np.median(ours),
        "peer_seconds": np.median(theirs),
        "rounds": len(ratio),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "difference": difference,
    }


def publish(
    entries: Sequence[dict], folder: Path, *, title: str, about: str, peers: Sequence[str], absent: Mapping[str, str]
) -> list[dict]:
    """Writes `bench.json`, `absent.json`, `versions.json` and `report.html`, prints the table, and returns the entries:
    phase after phase, lost cases first.

    Args:
        entries: as `entry` makes them.
        folder: where to.
        title: of the report.
        about: what the seconds are, and of which inputs.
        peers: packages whose versions are kept.
        absent: peer -> why it did not run.
    """
    entries = sorted(entries, key=lambda e: (PHASES.index(e["phase"]), e["ratio"]["median"]))
    save_json(folder / "bench.json", entries)
    save_json(folder / "absent.json", absent)
    save_json(folder / "versions.json", {**versions(), **_versions(peers)})
    rows = [
        [
            *(e[key] for key in ("case", "peer", "phase")),
            "{median:.2f} [{low:.2f}, {high:.2f}]".format(**e["ratio"]),
            f"{e['ours_seconds']:.4f}",
            f"{e['peer_seconds']:.4f}",
            "" if e["difference"] is None else f"{e['difference']:.1e}",
        ]
        for e in entries
    ]
    tables = [Table(["case", "peer", "phase", "peer / ours", "ours, s", "peer, s", "difference"], rows)]
    if absent:
        tables.append(Table(["absent", "why"], list(absent.items())))
    for table in tables:
        lines = [table.columns, *table.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
        for line in lines:
            print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    write_report(folder / "report.html", title, about, [Section("Seconds", "", tables)])
    return entries


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
