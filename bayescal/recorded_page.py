"""The page and the printed table of `python -m bayescal evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayescal import plots
from bayescal.binning import reliability
from bayescal.data.predictions import Recorded
from bayescal.evaluate import measure, read_columns
from bayescal.metrics import (
    confidence_histogram,
    pit_diagram,
    pit_histogram,
    risk_coverage_curve,
    smooth_curve,
    top_label,
)
from bayescal.metrics.corp import consistency_band
from bayescal.predictive import Gaussian
from bayescal.recorded_calibration import reading
from bayescal.report import Picture, Section, Table, figure_png, number, short, write_report
from bayescal.types import Estimate

FINE = 3840  # bins of the histogram that the smooth curve is read from
MOST_DIMENSIONS = 3  # of regression targets that are drawn
POINTS = 2000  # of a curve: more than a picture shows


def print_table(result: Mapping[str, Any]) -> None:
    """Figures, conventions and notes on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    members = f", {result['num_members']} members" if result["num_members"] > 1 else ""
    table = RichTable(title=f"{result['source']}: {result['n']} rows{members}", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for column in ("value", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("convention", overflow="fold")
    for name, e in result["metrics"].items():
        value, interval = (*number(e).split(" ", 1), "")[:2]
        table.add_row(name, value, interval, e.convention)
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
    wide = console if console.is_terminal else Console(width=110)
    for name, one in result.get("calibration", {}).items():
        table = RichTable(title=f"{name}: {result['conventions']['calibration']}", title_justify="left")
        table.add_column("metric", overflow="fold")
        for column in ("before", "after", "change", "95 % interval"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("reads as", no_wrap=True)
        for metric, before, after, change, word in changes(one):
            value, interval = (*number(change).split(" ", 1), "")[:2]
            table.add_row(metric, short(before.value), short(after.value), value, interval, word)
        wide.print(table)
    for line in result["notes"]:
        console.print(line, soft_wrap=True, highlight=False)


def changes(one: Mapping[str, Any]) -> list[tuple[str, Estimate, Estimate, Estimate, str]]:
    """Metric, its value before and after a calibrator, the change, and how that reads: the rows of a table.

    Args:
        one: a calibrator's entry of `assess_calibration`.
    """
    rows = []
    for metric, change in one["difference"].items():
        moved = Estimate(change["value"], change["low"], change["high"])
        rows.append((metric, one["before"][metric], one["after"][metric], moved, reading(change)))
    return rows


def write_page(path: Path, recorded: Recorded, result: Mapping[str, Any], num_bins: int) -> None:
    """One self-contained html file: figures with intervals, diagrams, groups and conventions.

    Args:
        path: where to write.
        recorded: the predictions.
        result: as `bayescal.recorded.evaluate_file` gives it.
        num_bins: bins of the reliability diagram.
    """
    regression = isinstance(recorded.pred, Gaussian)
    rows = [[name, e, e.convention] for name, e in result["metrics"].items()]
    sections = [Section("Figures", "\n".join(result["notes"]), [Table(["metric", "value", "convention"], rows)])]
    for name, one in result.get("calibration", {}).items():
        table = Table(["metric", "before", "after", "change", "reads as"], changes(one))
        sections.append(Section(f"After calibration: {name}", result["conventions"]["calibration"], [table]))
    draw = _regression_pictures if regression else _classification_pictures
    sections.extend(draw(recorded, num_bins))
    if result.get("groups"):
        names = list(next(iter(result["groups"].values())))
        table = Table(["group", *names], [[label, *own.values()] for label, own in result["groups"].items()])
        sections.append(Section("Groups", "Each group by itself; its interval takes its rows as independent.", [table]))
    local = result.get("local_calibration")
    if local is not None:
        words = (
            local
            if isinstance(local, str)
            else f"mean {local['mean']:.4f}, maximum {local['maximum']:.4f} ({local['convention']})."
        )
        sections.append(Section("Local calibration error", words))
    stated = [[name, str(words)] for name, words in result["conventions"].items()]
    sections.append(Section("Conventions", "", [Table(["what", "how"], stated)]))
    members = f", {result['num_members']} members" if result["num_members"] > 1 else ""
    lead = f"{result['n']} rows{members}. Values with 95 % intervals; each metric's convention is beside it."
    write_report(path, f"{result['source']}", lead, sections)


def _classification_pictures(recorded: Recorded, num_bins: int) -> list[Section]:
    pred, targets, weights = recorded.pred, recorded.targets, recorded.weights
    histograms = {"fine": confidence_histogram(num_bins=FINE), "bins": confidence_histogram(num_bins=num_bins)}
    sums = measure(pred, targets, histograms, weights=weights)
    confidence, correct = read_columns(pred, targets, top_label().read, weights=weights)
    curve, figures = smooth_curve(sums["fine"]), []

    figure, axes = plots.panels(2)
    bins = reliability(sums["bins"])
    plots.reliability_diagram(
        axes[0],
        bins,
        band=consistency_band(sums["bins"]),
        curve=(curve.confidence, curve.accuracy),
        gaps=True,
        title="reliability of the top label",
    )
    plots.prediction_histogram(plots.below(axes[0]), bins.weight)
    risk = risk_coverage_curve(confidence, correct, weights=weights)
    plots.risk_coverage(
        axes[1], {"risk": (risk.coverage, risk.risk)}, title="risk of what is answered", ylabel="error rate"
    )
    figures.append(Picture("reliability diagram and risk-coverage curve", figure_png(figure)))

    right = {"correct": confidence[correct == 1], "wrong": confidence[correct == 0]}
    if all(len(x) for x in right.values()):
        figure, axes = plots.panels(1)
        plots.score_histograms(axes[0], right, title="confidence of right and wrong predictions", xlabel="confidence")
        axes[0].legend()
        figures.append(Picture("confidence of right and wrong predictions", figure_png(figure)))
    text = (
        f"Points are the mean confidence and accuracy of {num_bins} bins of equal width with 95 % Wilson intervals, the grey "
        "band is where a calibrated forecaster's bins would lie in 95 of 100 data sets, and the line is the smoothed "
        f"reliability curve (kernel width {curve.sigma:.4f}). Risk is the error rate among the most confident predictions."
    )
    return [Section("Calibration and ranking", text, figures)]


def _regression_pictures(recorded: Recorded, num_bins: int) -> list[Section]:
    sums = measure(recorded.pred, recorded.targets, {"pit": pit_histogram(num_bins=num_bins)}, weights=recorded.weights)
    diagram = pit_diagram(sums["pit"])
    shown = min(len(diagram.density), MOST_DIMENSIONS)
    figure, axes = plots.panels(shown)
    for one, density, low, high, dim in zip(axes, *diagram, range(shown), strict=False):
        name = "probability integral transform" + (f", dimension {dim}" if len(diagram.density) > 1 else "")
        plots.pit_histogram(one, density, band=(low, high), title=name)
    text = (
        "Flat where forecasts are calibrated; the band holds 95 of 100 bins of a calibrated forecaster. Hollow in the "
        "middle: too narrow. A hump: too wide. A slope: biased."
    )
    return [Section("Calibration", text, [Picture("PIT histogram", figure_png(figure))])]
