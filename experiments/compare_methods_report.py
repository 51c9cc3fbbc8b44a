"""The page and the printed table of `compare_methods.py`."""

from pathlib import Path

import matplotlib
import numpy as np
from compare_methods_data import SEVERITIES, SHIFTS, source

import bayescal as bc
from bayescal import plots
from bayescal.binning import reliability
from bayescal.evaluate import measure
from bayescal.metrics import accuracy_rejection
from bayescal.report import Picture, Section, Table, figure_png, short, write_report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = {
    "accuracy": ("test", "accuracy"),
    "NLL (nats)": ("test", "nll"),
    "Brier": ("test", "brier"),
    "ECE, 15 bins": ("test", "ece"),
    "AUROC total": ("ood", "auroc_total"),
    "AUROC epistemic": ("ood", "auroc_epistemic"),
    "AUROC free energy": ("ood", "auroc_ood"),
    "AUROC max probability": ("ood", "auroc_max_probability"),
    "training (s)": ("seconds", "train"),
}


CHAINS = (
    "Of the centred logits of 32 validation images, the worst of all: rank-normalised split R-hat (above 1.01 chains do "
    "not agree yet) and bulk effective sample size of all chains together."
)
LABELS = {"accuracy": "accuracy", "nll": "NLL (nats, log scale)", "ece": "ECE"}


def main_table(result) -> Table:
    one = result["methods"].get("single")
    rows = []
    for name, figures in result["methods"].items():
        times = [figures["seconds"]["train"].value / one["seconds"]["train"].value] if one else []
        rows.append([name, *(figures[a][b] for a, b in COLUMNS.values()), *map(bc.Estimate, times)])
    return Table(["method", *COLUMNS, *(["x single"] if one else [])], rows)


def chains_table(result) -> Table:
    """Samplers alone: R-hat and effective samples of logits, acceptance, divergences."""
    names = ("r_hat", "ess", "acceptance", "divergences")
    own = {name: figures["chains"] for name, figures in result["methods"].items() if figures["chains"]}
    rows = [[name, *(figures.get(k, "") for k in names)] for name, figures in own.items()]
    return Table(["sampler", "largest R-hat", "least ESS", "acceptance", "divergences"], rows)


def print_table(result) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    about = source(result["config"]["data"])
    table = RichTable(title=f"test images and {about.label} digits", title_justify="left")
    table.add_column("method", no_wrap=True)
    main = main_table(result)
    for column in main.columns[1:]:
        table.add_column(column, justify="right")
    for name, *cells in main.rows:
        table.add_row(name, *(short(cell.value) for cell in cells))
    Console(width=130).print(table)


def write(folder: Path, config, result, sets, outcomes) -> None:
    """Figures as png, and report.html with the same figures inside."""
    about = sets.about
    drawn = dict(list(outcomes.items())[: len(plots.COLOURS)])
    figures = {
        "reliability": figure_reliability(sets, drawn),
        "shift": figure_shift({name: result["methods"][name] for name in drawn}),
        "uncertainty": figure_uncertainty(sets, drawn),
        "rejection": figure_rejection(sets, drawn),
    }
    if "deep_ensemble" in outcomes:
        figures["aleatoric"] = figure_images(sets, outcomes["deep_ensemble"], "aleatoric")
        figures["epistemic"] = figure_images(sets, outcomes["deep_ensemble"], "epistemic")
    pictures = {name: Picture(name, figure_png(figure)) for name, figure in figures.items()}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / "figures" / f"{name}.png").write_bytes(picture.png)
    seeds = f"{config.seeds} splits and seeds" if config.seeds > 1 else "one split and seed"
    sizes = ", ".join(
        f"{len(x)} {name}"
        for name, x in {"training": sets.train.targets, "validation": sets.validation.targets}.items()
    )
    lead = (
        f"{len(outcomes)} methods on {about.learnt} ({sizes} and {len(sets.asked['test'][1])} test images), "
        f"{len(sets.asked['ood'][1])} {about.strangers}. {seeds[0].upper() + seeds[1:]}, starting at {config.seed}."
        + (f" Figures show the first {len(drawn)} methods, tables all." if len(drawn) < len(outcomes) else "")
    )
    first = "" if config.seeds == 1 else f" Drawn from the first of the {config.seeds} seeds."
    sections = [
        Section(
            "Methods and metrics",
            "".join(f"{line}.\n" for line in result["diverged"]) + "Small figures: 95 % intervals. "
            f"AUROC separates {about.label} digits (positive) from test images.",
            [main_table(result)],
        ),
        *([Section("Paired differences", "", [comparison_table(result)])] if result["comparisons"] else []),
        *([Section("Chains", CHAINS, [chains_table(result)])] if chains_table(result).rows else []),
        Section(
            "Calibration",
            "Accuracy against confidence of the top label, with 95 % Wilson bands; points grow with their share of "
            f"images. Above the diagonal = under-confident.{first}",
            [pictures["reliability"]],
        ),
        Section(
            "Under shift",
            f"{len(sets.asked[SHIFTS[0], 5][1])} test images under {', '.join(SHIFTS[:-1])} and {SHIFTS[-1]}, five severities; "
            "severity 0 is all test images.",
            [pictures["shift"]],
        ),
        Section(
            "What the uncertainty is made of",
            "Quartiles over images, outliers left out. Epistemic uncertainty should rise on what training never "
            f"showed.{first}",
            [decomposition_table(result), pictures["uncertainty"]],
        ),
    ]
    if "deep_ensemble" in outcomes:
        sections.append(
            Section(
                "What the deep ensemble is unsure about",
                f"Test and {about.label} images with the largest aleatoric, then epistemic, uncertainty (nats). Below each: "
                f"the class probabilities of every member, one row each.{first}",
                [pictures["aleatoric"], pictures["epistemic"]],
            )
        )
    settings = Table(["setting", "value"], [[k, str(v)] for k, v in result["config"].items()])
    versions = Table(["package", "version"], [[k, v] for k, v in result["versions"].items()])
    sections += [
        Section(
            "Rejecting the unsure",
            "Accuracy of what is kept when the images of largest total uncertainty are rejected. Right: test and "
            f"{about.label} images together, where every answer on {about.outside} is wrong.{first}",
            [pictures["rejection"]],
        ),
        Section("Conventions", "\n".join(f"{k}: {v}" for k, v in result["conventions"].items())),
        Section("What was run", "\n".join(result["resumed"]), [settings, versions]),
    ]
    write_report(folder / "report.html", about.title, lead, sections)
    plt.close("all")


def comparison_table(result) -> Table:
    rows = []
    for name, value in result["comparisons"].items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for kind, estimate in items:
            rows.append(
                [f"{name} {kind}".replace("_", " ").strip(), estimate, estimate.convention.split("; mean over")[0]]
            )
    return Table(["difference", "value", "reading"], rows)


def decomposition_table(result) -> Table:
    sets = list(next(iter(result["methods"].values()))["decomposition"])
    rows = [
        [name, part, *(figures["decomposition"][s][part] for s in sets)]
        for name, figures in result["methods"].items()
        for part in ("total", "aleatoric", "epistemic")
    ]
    outside = source(result["config"]["data"]).label
    return Table(["method", "part (nats)", *(outside if s == "ood" else s.replace("_", " ") for s in sets)], rows)


def figure_reliability(sets, outcomes):
    figure, axes = plt.subplots(2, len(outcomes), figsize=(2.3 * len(outcomes), 5), squeeze=False, layout="constrained")
    metric = {"h": bc.confidence_histogram(num_bins=15)}
    for i, (name, outcome) in enumerate(outcomes.items()):
        groups = {"test": ["test"], "shift, severity 5": [(kind, 5) for kind in SHIFTS]}
        for row, (label, members) in enumerate(groups.items()):
            sums = [measure(outcome.pooled[s], sets.asked[s][1], metric)["h"] for s in members]
            total = type(sums[0])(*(sum(x) for x in zip(*sums, strict=True)))
            plots.reliability_diagram(axes[row, i], reliability(total), colour=plots.COLOURS[i])
            axes[row, i].set_title(f"{name}\n{label}" if row == 0 else label, fontsize=9)
            axes[row, i].label_outer()
    return figure


def figure_shift(methods):
    figure, axes = plt.subplots(3, len(SHIFTS), figsize=(11, 7.5), sharex=True, sharey="row", layout="constrained")
    for row, metric in enumerate(("accuracy", "nll", "ece")):
        for column, kind in enumerate(SHIFTS):
            lines = {}
            for name, figures in methods.items():
                shifted = figures["shift"][kind]
                values = [figures["test"][metric].value] + [shifted[s][metric].value for s in shifted]
                lines[name] = (np.arange(len(values)), np.array(values))
            plots.curves(
                axes[row, column], lines, title=kind if row == 0 else "", ylabel=LABELS[metric] if column == 0 else ""
            )
            axes[-1, column].set_xlabel("severity (0 = test)")
    axes[1, 0].set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    return figure


def figure_uncertainty(sets, outcomes):
    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(2.5 * len(outcomes), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for one, (name, outcome) in zip(axes[0], outcomes.items(), strict=True):
        shift = [outcome.parts[kind, 5] for kind in SHIFTS]
        parts = {
            "test": outcome.parts["test"],
            "shift 5": bc.Uncertainty(*(np.concatenate(x) for x in zip(*shift, strict=True))),
            sets.about.label: outcome.parts["ood"],
        }
        split = {k: {p: getattr(v, p) for p in ("total", "aleatoric", "epistemic")} for k, v in parts.items()}
        plots.uncertainty_parts(one, split, title=name)
        one.label_outer()
    axes[0, 0].legend(fontsize=8)
    return figure


def figure_rejection(sets, outcomes):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    correct = lambda pred, targets: pred.logits[0].argmax(-1) == targets
    shifted, mixed = {}, {}
    for name, outcome in outcomes.items():
        names = [(kind, s) for kind in SHIFTS for s in SEVERITIES]
        right = np.concatenate([correct(outcome.pooled[s], sets.asked[s][1]) for s in names])
        shifted[name] = accuracy_rejection(np.concatenate([outcome.parts[s].total for s in names]), right)
        right = np.r_[correct(outcome.pooled["test"], sets.asked["test"][1]), np.zeros(len(sets.asked["ood"][1]), bool)]
        scores = np.concatenate([outcome.parts[s].total for s in ("test", "ood")])
        mixed[name] = accuracy_rejection(scores, right)
    plots.curves(
        axes[0], shifted, title="all shifted test images", xlabel="share rejected", ylabel="accuracy of the rest"
    )
    plots.curves(axes[1], mixed, title=f"test and {sets.about.label} images", xlabel="share rejected")
    axes[0].legend(fontsize=8)
    return figure


def figure_images(sets, outcome, part: str, number_shown: int = 12):
    values = np.concatenate([getattr(outcome.parts[s], part) for s in ("test", "ood")])
    worst = np.argsort(-values, kind="stable")[:number_shown]
    pictures = np.concatenate([sets.asked[s][0] for s in ("test", "ood")])[worst]
    labels = np.concatenate([sets.asked[s][1] for s in ("test", "ood")])[worst]
    both = bc.concatenate([outcome.preds["test"], outcome.preds["ood"]])
    axes = plots.members(bc.take(both, worst), pictures)
    outside = worst >= len(sets.asked["test"][1])
    for one, label, stranger, value in zip(axes[0], labels, outside, values[worst], strict=True):
        one.set_title(f"{f'{sets.about.label} ' if stranger else ''}{label}\n{value:.2f}", fontsize=8)
    figure = axes[0, 0].figure
    figure.suptitle(f"largest {part} uncertainty", fontsize=10)
    return figure
