"""What `posteriors.py` shows: tables and a figure of each problem."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

import bayescal as bc
from bayescal import plots
from bayescal.report import figure_png, number

REGIONS = ("inside", "outside")  # of the data; outside is their gap, and beyond them


def show(name: str, found: dict[str, Any], seeds: int, folder: Path) -> None:
    """Prints a table for each region, writes it as markdown, and draws the total variations.

    Args:
        name: of the problem.
        found: its part of metrics.json: `reference` and `methods`.
        seeds: of every method, to say how many of them diverged.
        folder: for `name`.md and `name`.png.
    """
    console, methods, pages = Console(width=150), found["methods"], []
    folder.mkdir(parents=True, exist_ok=True)
    for region in REGIONS:
        header, *rows = table(methods, region, seeds)
        printed = RichTable(*header, title=f"{name}, {region}", title_justify="left")
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
        lines = [header, ["---"] * len(header), *rows]
        pages.append("\n".join([f"**{name}, {region}**\n", *("| " + " | ".join(line) + " |" for line in lines)]))
    console.print("reference: " + ", ".join(f"{k} {number(x)}" for k, x in found["reference"].items()))
    (folder / f"{name}.md").write_text("\n\n".join(pages) + "\n")
    drawing, axes = plots.panels(len(REGIONS), width=6)
    for one, region in zip(axes, REGIONS, strict=True):
        values = {method: own[region]["total variation"] for method, own in methods.items()}
        plots.forest(one, values, title=region, xlabel="total variation from the reference")
    (folder / f"{name}.png").write_bytes(figure_png(drawing))


def table(methods: dict[str, Any], region: str, seeds: int) -> list[list[str]]:
    """Header and rows, in words: those that come nearest first."""
    measures = list(next(iter(methods.values()))[region])
    rows = [["method", *measures, "R-hat"]]
    for method, own in sorted(methods.items(), key=lambda x: x[1][region]["total variation"].value):
        lost = f" ({seeds - own['diverged']} of {seeds} seeds)" if own["diverged"] else ""
        cells = [short(own[region][k]) for k in measures]
        rows.append([method + lost, *cells, f"{own['r_hat']:.3f}" if "r_hat" in own else ""])
    return rows


def short(estimate: bc.Estimate) -> str:
    """Value and interval to three decimals, or one where it is 10 and above."""
    digits = 1 if estimate.value >= 10 else 3
    if estimate.low is None or estimate.low == estimate.high:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
