"""Calibrate members then pool, pool then calibrate, or both at once: the same networks in every order.

    python experiments/pooling_orders.py configs/pooling_orders/digits.yaml [key=value ...]

`source=stored`: four recorded networks on the CIFAR-10 test images, from the folder that BAYESCAL_DATA names, fitted on
the first half of the rows and judged on the second. `source=digits`: networks on scikit-learn's digits, fitted on
validation rows and judged on test rows.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from recalibrate_data import PredictionSet, digits, stored
from rich.console import Console
from rich.table import Table as RichTable

import bayescal as bc
from bayescal.config import as_dict, command_line, versions
from bayescal.metrics import confidence_gap
from bayescal.report import Section, Table, number, save_json, write_report

SETS = {"stored": "mean of the 4 networks", "digits": "mean of 4 mlp 128-128"}
AGAINST = "pool, then calibrate"
DIFFERENCE = f"nll - nll of {AGAINST}"
METRICS = {
    "nll": bc.nll(),
    "brier": bc.brier(),
    "ece": bc.calibration_error(num_bins=15),
    "confidence - accuracy": confidence_gap(),
}


@dataclass(frozen=True)
class Config:
    """Whose members."""

    source: str = "digits"  # or stored
    seed: int = 0
    out: str | None = None  # folder of the run; default runs/pooling_orders/<name of the yaml>


def orders(one: PredictionSet) -> dict[str, dict[str, Any]]:
    """order -> temperatures, the pool's figures on the judged rows, and the temperature that it would still want."""
    fit, judged = one.fit, one.judged
    first = bc.calibrate.fit_members_then_pool(fit.pred, fit.targets)
    joint = bc.calibrate.fit_joint_temperature(fit.pred, fit.targets)
    pool = bc.fit_temperature(fit.pred, fit.targets)
    stacked: Any = bc.calibrate.fit_stacking(fit.pred, fit.targets)
    then = bc.fit_temperature(first(fit.pred), fit.targets)
    after_stacking = bc.fit_temperature(stacked(fit.pred), fit.targets)
    steps = {
        "pool, no temperature": ((), []),
        "calibrate members, then pool": ((first,), first.temperatures.tolist()),
        AGAINST: ((pool,), [pool.temperature]),
        "joint: one temperature inside": ((joint,), [joint.temperature]),
        "calibrate members, pool, calibrate": ((first, then), [*first.temperatures.tolist(), then.temperature]),
        "weigh members (stacking), pool, calibrate": ((stacked, after_stacking), [after_stacking.temperature]),
    }
    found = {}
    for name, (maps, temperatures) in steps.items():
        on_fit: Any = fit.pred
        on_judged: Any = judged.pred
        for step in maps:
            on_fit, on_judged = step(on_fit), step(on_judged)
        paired = bc.compare(METRICS["nll"], on_judged, pool(judged.pred), judged.targets).difference
        found[name] = {
            "temperatures": [float(t) for t in temperatures],
            "figures": bc.evaluate(on_judged, judged.targets, METRICS),
            DIFFERENCE: paired,
            "temperature still wanted": float(bc.fit_temperature(on_fit, fit.targets).temperature),
        }
    return found


def main(config: Config, folder: Path) -> dict[str, Any]:
    """Measures every order, prints the table, writes the run's folder, and returns what is in metrics.json."""
    if config.source not in SETS:
        raise ValueError(f"`source` must be one of {', '.join(SETS)}, got {config.source}. Check the spelling.")
    sets = stored() if config.source == "stored" else digits(config.seed)
    one = sets[SETS[config.source]]
    found = orders(one)
    result = {
        "set": SETS[config.source],
        "orders": found,
        "config": as_dict(replace(config, out=None)),
        "versions": versions(),
    }
    save_json(folder / "metrics.json", result)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    rows = [
        [
            name,
            ", ".join(f"{t:.3f}" for t in own["temperatures"]),
            *own["figures"].values(),
            "" if name == AGAINST else own[DIFFERENCE],
            f"{own['temperature still wanted']:.3f}",
        ]
        for name, own in found.items()
    ]
    table = Table(["order", "temperatures", *METRICS, DIFFERENCE, "temperature still wanted"], rows)
    printed = RichTable(
        *table.columns, title=f"{result['set']}: {len(one.judged.targets)} judged rows", title_justify="left"
    )
    for row in table.rows:
        printed.add_row(*(number(cell) for cell in row))
    Console(width=190).print(printed)
    text = (
        "95 % intervals over judged rows, with the fitted maps as they are: how these vary with the rows of the fit is not "
        "counted. Confidence - accuracy below zero: under-confident, the pool is over-dispersed. The "
        "temperature still wanted is that of the pool that comes out, on the rows of the fit; 1 = none."
    )
    write_report(
        folder / "report.html",
        "In which order to calibrate an ensemble",
        result["set"],
        [Section("Orders", text, [table])],
    )
    return result


if __name__ == "__main__":
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
