"""Report of the study of out-of-distribution scores: the table, ROC curves and histograms."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

import bayescal as bc
from bayescal import plots
from bayescal.report import Picture, Section, Table, figure_png, number, write_report

CURVES = ("free_energy", "max_probability", "mutual_information", "mahalanobis")  # beside the chosen one


def spread(estimate: bc.Estimate) -> str:
    """Mean +- standard error over repetitions; the mean alone of a single one."""
    if estimate.low is None or estimate.high is None or not estimate.n:
        return f"{estimate.value:.4f}"
    from scipy.stats import t

    error = (estimate.high - estimate.low) / 2 / t.ppf(0.975, estimate.n - 1)
    return f"{estimate.value:.4f} ± {error:.4f}"


def rows(result: dict[str, Any], sets: list[str]) -> list[list[Any]]:
    """A line a score, best first on what the score is chosen by; difference = ensemble - its members' mean."""
    chosen_on = [name for name in result["scores"][result["chosen"]]["ensemble"] if name not in sets]
    order = lambda score: -result["scores"][score]["ensemble"][chosen_on[0]].value
    lines = []
    for score in sorted(result["scores"], key=order):
        own = result["scores"][score]
        line: list[Any] = [f"{score} (chosen)" if score == result["chosen"] else score]
        line += [spread(own["ensemble"][name]) for name in (*chosen_on, *sets)]
        line += [own["difference"][name] if "difference" in own else "" for name in sets]
        lines.append(line)
    return lines


def not_better(result: dict[str, Any], sets: list[str]) -> list[str]:
    """Where the interval of ensemble - members' mean is not above zero."""
    found = []
    for score, own in result["scores"].items():
        for name in sets if "difference" in own else ():
            low = own["difference"][name].low
            if low is None or low <= 0:
                found.append(f"{score} on {name}")
    return found


def columns(result: dict[str, Any], sets: list[str]) -> list[str]:
    chosen_on = [name for name in result["scores"][result["chosen"]]["ensemble"] if name not in sets]
    return ["score", *chosen_on, *sets, *(f"{name}: ensemble - members" for name in sets)]


def print_table(result: dict[str, Any], groups: dict[str, list[str]]) -> None:
    sets = [name for names in groups.values() for name in names]
    title = (
        f"AUROC of {result['config']['num_members']} networks together, mean ± s.e. over {result['config']['seeds']}"
    )
    printed = RichTable(*columns(result, sets), title=title)
    for line in rows(result, sets):
        printed.add_row(*(number(cell) for cell in line))
    Console(width=190).print(printed)
    worse = not_better(result, sets)
    print(f"not above the members' mean, by a 95 % t interval: {', '.join(worse) or 'nowhere'}")


def write(folder: Path, result: dict[str, Any], groups: dict[str, list[str]], found) -> None:
    """Writes report.html."""
    sets = [name for names in groups.values() for name in names]
    count, chosen = result["config"]["seeds"], result["chosen"]
    table = Table(columns(result, sets), rows(result, sets))
    first = [
        [name, *(own[m] for m in ("auroc", "aupr_out", "aupr_in", "fpr95_out", "fpr95_in"))]
        for name, own in result["first_repetition"].items()
    ]
    detail = Table(["set", "AUROC", "AUPR out", "AUPR in", "FPR95 out", "FPR95 in"], first)
    flagged = Table(["set", "share flagged"], [[name, x] for name, x in result["flagged"].items()])
    worse = not_better(result, sets)
    settings = Table(["setting", "value"], [[k, str(v)] for k, v in (result["config"] | result["versions"]).items()])
    right = ", ".join(f"{name} {number(x)}" for name, x in result["accuracy"].items())
    lead = (
        f"Accuracy on test: {right}. Chosen on held-out classes of the validation part: {chosen}. AUROC, "
        "the positive class being outside; mean ± "
        f"standard error over {count} repetitions, which hold out {result['held_out']}. Near: {', '.join(groups['near'])}; "
        f"far: {', '.join(groups['far'])}. Held out on test are other images of the classes that the score was chosen on."
    )
    differences = (
        "Last columns: the ensemble's AUROC less the mean of its members', paired by repetition, with 95 % t intervals. Not "
        f"above zero: {', '.join(worse) or 'none'}."
    )
    curves, histograms = (figure_png(draw(found, chosen, sets)) for draw in (roc_curves, score_histograms))
    sections = [
        Section("Every score", differences, [table]),
        Section(
            f"{chosen}, first repetition",
            "Intervals over rows. The threshold keeps 95 % of validation rows; no outside row had a part in it.",
            [detail, flagged, Picture("ROC curves", curves), Picture("histograms", histograms)],
        ),
        Section("What was run", "", [settings]),
    ]
    write_report(folder / "report.html", "Images unlike the training data", lead, sections)
    print(folder / "report.html")


def roc_curves(found, chosen: str, sets: list[str]):
    """The chosen score's and some others', on every set outside."""
    drawing, axes = plots.panels(len(sets), width=4.2, height=3.8)
    for axis, name in zip(axes, sets, strict=True):
        lines = {}
        for score in dict.fromkeys((chosen, *CURVES)):
            values = found.ensemble[score]
            joined = np.concatenate([values["test"], values[name]])
            lines[score] = roc(joined, np.arange(len(joined)) >= len(values["test"]))
        plots.curves(axis, lines, title=name, xlabel="test flagged", ylabel="outside flagged")
        axis.legend(fontsize=7)
    return drawing


def score_histograms(found, chosen: str, sets: list[str]):
    """The chosen score on test and on every set outside."""
    drawing, axes = plots.panels(len(sets), width=4.2, height=3.2)
    values = found.ensemble[chosen]
    for axis, name in zip(axes, sets, strict=True):
        plots.score_histograms(axis, {"test": values["test"], name: values[name]}, xlabel=chosen)
    return drawing


def roc(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False against true positive rates, at no more points than a picture shows."""
    curve = bc.metrics.roc_curve(scores, positive)
    false, true = (np.asarray(x) for x in curve[:2])
    shown = np.unique(np.linspace(0, len(false) - 1, 400).astype(int))
    return false[shown], true[shown]
