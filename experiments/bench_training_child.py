"""One training in a process of its own, as the training benchmark starts it; imports what a script of that library would.

    python experiments/bench_training_child.py FORM CASE CORES

FORM is "ours" or the name of a peer's form, CASE a case as json. Prints a line of json: seconds of the imports, of the first
call until its results are there, and the megabytes that came on top of the imports at the highest.
"""

import json
import sys
import time
from pathlib import Path


def megabytes(what: str) -> float:
    """A line of Linux's own account: VmRSS = memory now, VmHWM = its highest. NaN elsewhere."""
    account = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in account.read_text().splitlines()) if account.exists() else {}
    return int(lines[what].split()[0]) / 1024 if what in lines else float("nan")


def forget_highest() -> None:
    """The highest memory counts from here on: what making the rows took is not training's."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def main(form: str, case: str, cores: str) -> dict[str, float]:
    start = time.perf_counter()
    if form == "ours":
        import bayescal as bc

        bc.use_all_cores()
        bc.keep_programs()
        import jax
        from bench_training_data import Case
        from bench_training_ours import training

        imported, before = time.perf_counter(), megabytes("VmRSS")
        train = training(Case(**json.loads(case)))
        call = lambda: jax.block_until_ready(train())
    else:
        from contextlib import ExitStack

        from bench_training_data import Case
        from bench_training_torch import library, makers

        library("torch" if form.startswith("torch") else "sklearn.neural_network")
        imported, before = time.perf_counter(), megabytes("VmRSS")
        chosen = Case(**json.loads(case))
        call = makers(chosen, int(cores))[form](chosen, ExitStack())
    forget_highest()
    ready = time.perf_counter()
    call()
    return {
        "import_seconds": imported - start,
        "first_call_seconds": time.perf_counter() - ready,
        "megabytes": megabytes("VmHWM") - before,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
