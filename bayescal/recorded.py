"""Anybody's predictions from a file to figures: `python -m bayescal evaluate FILE`, and the same as a function."""

from pathlib import Path
from typing import Any

from bayescal.data.predictions import Recorded, read_predictions
from bayescal.decompose import decompose
from bayescal.evaluate import evaluate
from bayescal.metrics import (
    accuracy,
    brier,
    calibration_error,
    nll,
)
from bayescal.metrics.likelihood import mean_metric
from bayescal.report import save_json


def evaluate_file(path: str | Path, *, out: str | Path | None = None, clip: float | None = None) -> dict[str, Any]:
    """Every standard metric of recorded predictions, with intervals and conventions.

    Args:
        path: what `read_predictions` reads.
        out: folder for `metrics.json` and `report.html`; None = nothing is written.
        clip: smallest probability that the NLL counts with; None = a target of probability zero makes it infinite.

    Returns:
        `{"n", "num_members", "metrics": {name: Estimate}, "conventions"}`.

    Raises:
        FileNotFoundError, ValueError: as `read_predictions` and `evaluate`.
    """
    recorded = read_predictions(path)
    result = assess(recorded, clip=clip)
    if out is not None:
        save_json(Path(out) / "metrics.json", result)
    return result


def assess(recorded: Recorded, *, clip: float | None = None) -> dict[str, Any]:
    """As `evaluate_file`, of predictions at hand."""
    pred = recorded.pred
    metrics = classification_metrics(clip)
    if pred.num_members > 1:
        metrics |= decomposition_metrics()
    estimates = evaluate(pred, recorded.targets, metrics, weights=recorded.weights, groups=recorded.groups)
    return {
        "n": len(recorded.targets),
        "num_members": pred.num_members,
        "metrics": estimates,
    }


def classification_metrics(clip: float | None = None) -> dict[str, Any]:
    """The standard metrics of predictions of classes, by name."""
    return {
        "accuracy": accuracy(),
        "nll": nll(),
        "brier": brier(),
        "ece": calibration_error(),
        "mce": calibration_error(norm=float("inf")),
    }


def decomposition_metrics() -> dict[str, Any]:
    """Means over rows of the parts of the pool's entropy, nats."""
    part = lambda name: mean_metric(lambda pred, _: getattr(decompose(pred), name), "mean over rows, nats")
    return {name: part(name)._replace(better="neither") for name in ("total", "aleatoric", "epistemic")}
