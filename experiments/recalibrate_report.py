"""The report of `recalibrate.py`: ranks with critical differences, every set before and after, cost in rows, and harm."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from bayescal import plots
from bayescal.report import Picture, Section, Table, figure_png, number, short, write_report


def write(folder: Path, result: dict[str, Any]) -> None:
    """Prints the tables of ranks and of harm, and writes report.html."""
    ranked, harmed = rank_table(result), harm_table(result)
    for table, title in (
        (ranked, f"mean ranks over {len(result['sets'])} prediction sets, 1 = best"),
        (harmed, "where it hurts"),
    ):
        printed = RichTable(*table.columns, title=title, title_justify="left")
        for row in table.rows:
            printed.add_row(*(number(cell) for cell in row))
        Console(width=150).print(printed)
    sections = [
        Section(
            "Ranks",
            _words(result),
            [ranked, Picture("mean ranks and critical differences", figure_png(rank_figure(result)))],
        ),
        Section(
            "Every set, before and after",
            "After - before, paired, with 95 % intervals over rows. ECE: before, after.",
            [*(_set_table(result, metric) for metric in ("nll", "brier")), _ece_table(result)],
        ),
        Section(
            "Cost in rows",
            "Difference to no calibration on the same judged rows; bands: 95 % t intervals over draws of the "
            "calibration rows.",
            [Picture("NLL and ECE by calibration rows", figure_png(cost_figure(result)))],
        ),
        Section(
            "Where it hurts",
            "NLL or Brier score higher than before beyond noise, or ECE higher although NLL is lower beyond noise.",
            [harmed],
        ),
        Section(
            "What was run",
            "",
            [Table(["setting", "value"], [[k, str(v)] for k, v in (result["config"] | result["versions"]).items()])],
        ),
    ]
    write_report(
        folder / "report.html",
        "Post-hoc calibration",
        f"{len(result['sets'])} prediction sets, source {result['config']['source']}.",
        sections,
    )
    print(folder / "report.html")


def _words(result: dict[str, Any]) -> str:
    p = ", ".join(f"{metric} {short(one['friedman_p'])}" for metric, one in result["ranks"].items())
    return (
        "Calibrators that could be fitted on every set. Two whose bars do not overlap differ by Nemenyi's test at 5 %; "
        f"Friedman's p: {p}. Sets on the same images or questions are not independent, so that true distances are larger."
    )


def rank_table(result: dict[str, Any]) -> Table:
    """A line a calibrator, best by NLL first, with the sets on which the paired NLL falls or rises beyond noise."""
    by, sets = result["ranks"], result["sets"]
    rows = []
    for name in sorted(by["nll"]["mean"], key=by["nll"]["mean"].get):
        paired = [own[name]["difference"]["nll"] for own in sets.values() if "difference" in own[name]]
        falls = sum(d.high is not None and d.high < 0 for d in paired)
        rises = sum(d.low is not None and d.low > 0 for d in paired)
        changed = f"{falls} fall, {rises} rise, {len(paired) - falls - rises} noise" if paired else ""
        rows.append([name, *(f"{by[metric]['mean'][name]:.2f}" for metric in by), changed])
    distances = ["critical difference", *(f"{one['critical_difference']:.2f}" for one in by.values()), ""]
    return Table(["calibrator", *by, "NLL on the sets"], [*rows, distances])


def rank_figure(result: dict[str, Any]):
    """Mean ranks by each metric."""
    figure, axes = plots.panels(len(result["ranks"]))
    for one, (metric, own) in zip(axes, result["ranks"].items(), strict=True):
        plots.critical_difference(one, own["mean"], own["critical_difference"], title=metric)
    return figure


def harm_table(result: dict[str, Any]) -> Table:
    """A line a case."""
    rows = [[x["set"], x["calibrator"], ", ".join(x["rises"]), x["nll"], short(x["ece"])] for x in result["harm"]]
    return Table(["set", "calibrator", "rises", "NLL, after - before", "ECE, after - before"], rows)


def _set_table(result: dict[str, Any], metric: str) -> Table:
    names = list(next(iter(result["sets"].values())))[1:]
    rows = []
    for label, own in result["sets"].items():
        cells = [own[n]["difference"][metric] if "difference" in own[n] else "not fitted" for n in names]
        rows.append([label, own["none"]["figures"][metric], *cells])
    return Table([metric, "before", *names], rows)


def _ece_table(result: dict[str, Any]) -> Table:
    names = list(next(iter(result["sets"].values())))
    cell = lambda one: one["figures"]["ece"] if "figures" in one else "not fitted"
    return Table(["ece", *names], [[label, *(cell(own[n]) for n in names)] for label, own in result["sets"].items()])


def cost_figure(result: dict[str, Any]):
    """NLL and ECE less those of no calibration, by calibration rows: a row of panels a set."""
    import matplotlib.pyplot as plt

    cost = result["cost"]
    figure, axes = plt.subplots(len(cost), 2, figsize=(11, 3.6 * len(cost)), squeeze=False, layout="constrained")
    for (name, own), pair in zip(cost.items(), axes, strict=True):
        for panel, metric in zip(pair, ("nll", "ece"), strict=True):
            for (calibrator, by_size), colour in zip(own.items(), plots.COLOURS, strict=False):
                known = {int(n): x["difference"][metric] for n, x in by_size.items() if x["difference"]}
                low, high = (np.array([getattr(x, end) for x in known.values()]) for end in ("low", "high"))
                panel.plot(
                    list(known), [x.value for x in known.values()], color=colour, marker="o", ms=3, label=calibrator
                )
                panel.fill_between(list(known), low, high, color=colour, alpha=0.15, lw=0)
            panel.axhline(0, color="#8a939b", lw=1, ls="--")
            panel.set(
                xscale="log",
                yscale="symlog" if metric == "nll" else "linear",
                title=name,
                xlabel="calibration rows",
                ylabel=f"{metric}, after - before",
            )
            if metric == "nll":
                panel.set_yscale("symlog", linthresh=0.01)
    axes[0][0].legend(frameon=False)
    return figure
