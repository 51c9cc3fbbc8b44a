"""The report of `recalibrate.py`: ranks with critical differences, every set before and after, cost in rows, and harm."""

from pathlib import Path
from typing import Any

import numpy as np
from recalibrate_data import CLIP, NONE
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
    pictures = (
        [Picture("mean ranks and critical differences", figure_png(rank_figure(result)))]
        if len(ranked.rows) > 2
        else []
    )
    sections = [
        Section("Ranks", _words(result), [ranked, *pictures]),
        Section(
            "Every set, before and after",
            "After - before, paired, with 95 % intervals over the judged rows: how the fitted map varies with the rows of the "
            f"fit is not counted. The NLL counts probabilities below {CLIP:g} as that. In the picture, grey numbers are noise: "
            "the interval contains 0. ECE: before, after; no interval of its change is known to be sound.",
            [
                Picture("change of the NLL on every set", figure_png(change_figure(result))),
                *(_set_table(result, metric) for metric in ("nll", "brier")),
                _ece_table(result),
            ],
        ),
        Section(
            "Cost in rows",
            "Difference to no calibration on the same judged rows; bands: 95 % t intervals of the mean over those draws of "
            "the calibration rows that can be fitted. Where some cannot, the mean is that of the lucky ones. Draws of a large "
            "part of the rows overlap, which narrows their band; all rows are one draw without a band.",
            [Picture("NLL and ECE by calibration rows", figure_png(cost_figure(result))), _cost_table(result)],
        ),
        Section("Where it hurts", _chance(result), [harmed]),
        Section(
            "What could not be fitted",
            "With the first words of the reason; metrics.json has all.",
            [_refused_table(result)],
        ),
        Section("Prediction sets", "", [_rows_table(result)]),
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
    one = result["ranks"]["nll"]
    return (
        "Calibrators that could be fitted on every set. Two whose bars do not overlap differ by Nemenyi's test at 5 %, were "
        f"the sets independent; Friedman's p: {p}.\nThe {one['sets']} sets are on {one['data']} collections of images or "
        "questions, and sets on the same are not independent: the critical difference lies between "
        f"{one['critical_difference']:.2f} and, if they were copies of each other, "
        f"{one['critical_difference_if_dependent']:.2f}."
    )


def _chance(result: dict[str, Any]) -> str:
    number = sum(len(one.get("difference", ())) for own in result["sets"].values() for one in own.values())
    return (
        "NLL or Brier score higher than before beyond noise, or ECE higher although NLL is lower (a change of ECE has no "
        f"interval: a small one may be noise). Intervals are not adjusted for their number: of {number} changes of a score, "
        f"{0.025 * number:.0f} would rise beyond noise by chance if none were real. Clipped: judged rows whose label has a "
        f"probability below {CLIP:g} after calibration; each counts {-np.log(CLIP):.1f} nats, so that a few of them make up "
        "the NLL, and its normal interval is rough."
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
    by = result["ranks"]
    figure, axes = plots.panels(len(by), width=5.4, height=1.2 + 0.3 * len(by["nll"]["mean"]))
    for one, (metric, own) in zip(axes, by.items(), strict=True):
        plots.critical_difference(one, own["mean"], own["critical_difference"], title=metric)
    return figure


def change_figure(result: dict[str, Any]):
    """The paired change of the NLL, sets by calibrators: blue falls, red rises, grey numbers are noise."""
    from matplotlib.colors import SymLogNorm

    sets, names = result["sets"], _calibrators(result)
    figure, (axes,) = plots.panels(1, width=3 + 0.75 * len(names), height=1.8 + 0.27 * len(sets))
    values = np.full((len(sets), len(names)), np.nan)
    for i, own in enumerate(sets.values()):
        for j, name in enumerate(names):
            change = own[name]["difference"]["nll"] if "difference" in own[name] else None
            values[i, j] = np.nan if change is None else change.value
            noise = change is None or change.low is None or change.low <= 0 <= change.high
            axes.text(
                j,
                i,
                "–" if change is None else f"{change.value:+.3f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="#6c7783" if noise else "black",
            )
    axes.imshow(values, aspect="auto", cmap="RdBu_r", alpha=0.55, norm=SymLogNorm(0.01, vmin=-3, vmax=3))
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(sets)), list(sets))
    axes.set_title("NLL, after - before")
    return figure


def harm_table(result: dict[str, Any]) -> Table:
    """A line a case."""
    rows = [
        [x["set"], x["calibrator"], ", ".join(x["rises"]), x["nll"], x["brier"], short(x["ece"]), x["clipped"]]
        for x in result["harm"]
    ]
    changes = [f"{metric}, after - before" for metric in ("NLL", "Brier", "ECE")]
    return Table(["set", "calibrator", "rises", *changes, "clipped"], rows)


def _calibrators(result: dict[str, Any]) -> list[str]:
    return [name for name in next(iter(result["sets"].values())) if name != NONE]


def _refused_table(result: dict[str, Any]) -> Table:
    """A line a calibrator and reason."""
    whose: dict[tuple[str, str], list[str]] = {}
    for label, own in result["sets"].items():
        for name, one in own.items():
            if "refused" in one:
                whose.setdefault((name, one["refused"].split(", got ")[0]), []).append(label)
    every = len(result["sets"])
    rows = [
        [name, "every set" if len(labels) == every else f"{len(labels)} of {every}: {', '.join(labels)}", why]
        for (name, why), labels in whose.items()
    ]
    return Table(["calibrator", "sets", "reason"], rows)


def _rows_table(result: dict[str, Any]) -> Table:
    columns = ("data", "classes", "fit", "judged", "division")
    return Table(["set", *columns], [[label, *(own[c] for c in columns)] for label, own in result["rows"].items()])


def _cost_table(result: dict[str, Any]) -> Table:
    """The NLL's change by calibration rows, and how many draws could not be fitted."""
    sizes = list(dict.fromkeys(int(n) for own in result["cost"].values() for by in own.values() for n in by))
    rows = [
        [label, calibrator, *(_cost_cell(by.get(n)) for n in sizes)]
        for label, own in result["cost"].items()
        for calibrator, by in own.items()
    ]
    return Table(["NLL, after - before", "calibrator", *map(str, sizes)], rows)


def _cost_cell(one: dict[str, Any] | None) -> Any:
    if one is None:
        return "fewer rows"
    if not one["refused"]:
        return one["difference"]["nll"]
    of = f"{one['refused']} of {one['refused'] + one['fitted']} not fitted"
    return f"{number(one['difference']['nll'])}, {of}" if one["fitted"] else of


def _set_table(result: dict[str, Any], metric: str) -> Table:
    names, rows = _calibrators(result), []
    for label, own in result["sets"].items():
        cells = [own[n]["difference"][metric] if "difference" in own[n] else "not fitted" for n in names]
        rows.append([label, own[NONE]["figures"][metric], *cells])
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
        sizes = sorted({int(n) for by_size in own.values() for n in by_size})
        for panel, metric in zip(pair, ("nll", "ece"), strict=True):
            for (calibrator, by_size), colour in zip(own.items(), plots.COLOURS, strict=False):
                known = {int(n): x["difference"][metric] for n, x in by_size.items() if x["difference"]}
                values = [x.value for x in known.values()]
                panel.plot(list(known), values, color=colour, marker="o", ms=3, label=calibrator)
                banded = {n: x for n, x in known.items() if x.low is not None}
                ends = ([getattr(x, end) for x in banded.values()] for end in ("low", "high"))
                panel.fill_between(list(banded), *ends, color=colour, alpha=0.15, lw=0)
            panel.axhline(0, color="#8a939b", lw=1, ls="--")
            panel.set(
                xscale="log",
                title=name,
                xlabel="calibration rows",
                ylabel=f"{metric}, after - before",
            )
            panel.set_xticks(sizes, [str(n) for n in sizes], minor=False)
            panel.set_xticks([], minor=True)
            if metric == "nll":
                panel.set_yscale("symlog", linthresh=0.01)
    axes[0][1].legend(frameon=False)
    plt.close(figure)  # drawn by whoever holds it
    return figure
