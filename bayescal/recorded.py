"""Anybody's predictions from a file to figures: `python -m bayescal evaluate FILE`, and the same as a function."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from bayescal.compare import bootstrap_intervals
from bayescal.data.predictions import Recorded, read_predictions
from bayescal.decompose import decompose
from bayescal.evaluate import evaluate, read_columns
from bayescal.metrics import (
    accuracy,
    augrc,
    aurc,
    auroc,
    brier,
    calibration_error,
    classwise_calibration_error,
    coverage,
    crps,
    expected_normalised_calibration_error,
    local_calibration_error,
    mean_metric,
    nll,
    quantile_calibration_error,
    root_mean_squared_error,
    sharpness,
    smooth_calibration_error,
    squared_calibration_error,
    top_label,
    whole,
    zero_probability_rows,
)
from bayescal.predictive import Gaussian
from bayescal.recorded_calibration import assess_calibration
from bayescal.report import save_json
from bayescal.types import Estimate, Metric, WholeMetric

MOST_GROUPS = 30  # slices that are listed one by one
MOST_NEIGHBOURS = 20_000  # rows for which every pair is looked at


def evaluate_file(
    path: str | Path,
    *,
    out: str | Path | None = None,
    clip: float | None = None,
    num_bins: int = 15,
    num_replicates: int = 0,
    seed: int = 0,
    calibrate: Sequence[str] = (),
    fit: str = "first-half",
) -> dict[str, Any]:
    """Every standard metric of recorded predictions, with 95 % intervals and conventions.

    Args:
        path: what `read_predictions` reads.
        out: folder for `metrics.json` and `report.html`; None = nothing is written.
        clip: smallest probability that the NLL counts with, and that calibrators of probabilities see; None = a target
            of probability zero makes it infinite.
        num_bins: bins of equal width of the calibration errors.
        num_replicates: of the bootstrap; 0 = intervals in closed form or by the rows' influence.
        seed: of the bootstrap.
        calibrate: names of calibrators such as "temperature" or "temperature+isotonic" (the second fitted on the first);
            see `recorded_calibration.CLASSES`.
        fit: rows that they are fitted on: "first-half", "second-half", or a share such as "0.2" (the first fifth). They
            are scored on the others.

    Returns:
        `{"source", "n", "num_members", "metrics": {name: Estimate}, "groups", "calibration", "conventions", "notes"}`;
        `groups` is `{label: {name: Estimate}}` where there are few, `calibration` is that of `assess_calibration`, and
        `notes` are sentences about what stands out.

    Raises:
        FileNotFoundError, ValueError: as `read_predictions` and `evaluate`.
        ImportError: where there is a folder to write to and no matplotlib, before anything is computed.
    """
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "`out` needs matplotlib for the pictures of report.html, got none installed. "
            "Run `pip install bayescal[experiments]`, or leave `out` away for the figures alone."
        )
    recorded = read_predictions(path)
    found: dict[str, Any] = {"conventions": {}, "notes": []}
    if calibrate:  # first: what cannot be fitted is told before the long part
        metrics = standard_metrics(recorded, clip=clip, num_bins=num_bins)
        how = {"fit": fit, "clip": clip, "num_replicates": num_replicates, "seed": seed}
        found = assess_calibration(recorded, metrics, calibrate, **how)
    result = assess(recorded, clip=clip, num_bins=num_bins, num_replicates=num_replicates, seed=seed)
    result = {"source": Path(path).name, **result}
    result["conventions"] |= found.pop("conventions")
    result["notes"] += found.pop("notes")
    result |= found
    if out is not None:
        from bayescal.recorded_page import write_page  # draws: matplotlib is an extra

        save_json(Path(out) / "metrics.json", _with_missing_ends(result))
        write_page(Path(out) / "report.html", recorded, result, num_bins)
    return result


def assess(
    recorded: Recorded, *, clip: float | None = None, num_bins: int = 15, num_replicates: int = 0, seed: int = 0
) -> dict[str, Any]:
    """As `evaluate_file`, for predictions at hand: see there."""
    pred, targets, groups = recorded.pred, recorded.targets, recorded.groups
    regression = isinstance(pred, Gaussian)
    metrics = standard_metrics(recorded, clip=clip, num_bins=num_bins)
    if pred.num_members > 1:
        kind = "variance" if regression else "entropy"
        metrics |= {name: uncertainty_part(name, of=kind) for name in ("total", "aleatoric", "epistemic")}
    rows: dict[str, Any] = {"weights": recorded.weights, "groups": groups}
    estimates = evaluate(pred, targets, metrics, **rows)
    if num_replicates:
        regular = {name: m for name, m in metrics.items() if m.regular}
        estimates |= bootstrap_intervals(
            pred, targets, regular, jax.random.key(seed), num_replicates=num_replicates, **rows
        )
    result = {
        "n": len(targets),
        "num_members": pred.num_members,
        "metrics": estimates,
        "conventions": _conventions(recorded, clip, num_bins, num_replicates, seed),
        "notes": _notes(recorded, estimates),
    }
    if groups is not None:
        result["groups"] = _slices(recorded, clip, num_bins)
    if recorded.features is not None and not regression:
        result["local_calibration"] = _local(recorded, num_bins)
    return result


def standard_metrics(
    recorded: Recorded, *, clip: float | None = None, num_bins: int = 15
) -> dict[str, Metric | WholeMetric]:
    """Those of classes or of regression, after the predictions.

    Raises:
        ValueError: for a clip of densities.
    """
    if not isinstance(recorded.pred, Gaussian):
        return classification_metrics(clip=clip, num_bins=num_bins)
    if clip is not None:
        raise ValueError(
            f"`clip` is a smallest probability, got {clip} for densities (mean and variance), whose size depends on the "
            "targets' unit. Leave it out."
        )
    return regression_metrics()


def classification_metrics(*, clip: float | None = None, num_bins: int = 15) -> dict[str, Metric | WholeMetric]:
    """The standard metrics of predictions of classes, by name.

    Args:
        clip: as in `nll`.
        num_bins: bins of equal width.
    """
    return {
        "accuracy": accuracy(),
        "nll": nll(clip=clip),
        "brier": brier(),
        "ece": calibration_error(num_bins=num_bins),
        "mce": calibration_error(num_bins=num_bins, norm=float("inf")),
        "ece_debiased": calibration_error(num_bins=num_bins, debiased=True),
        "squared_ece_debiased": squared_calibration_error(num_bins=num_bins),
        "smooth_ece": smooth_calibration_error(),
        "classwise_ece": classwise_calibration_error(num_bins=num_bins),
        "auroc_correctness": whole(auroc),
        "aurc": whole(aurc),
        "augrc": whole(augrc),
        "zero_probability_rows": zero_probability_rows(),
    }


def regression_metrics() -> dict[str, Metric | WholeMetric]:
    """The standard metrics of normal predictions, by name."""
    return {
        "rmse": root_mean_squared_error(),
        "nll": nll(),
        "crps": crps(),
        "coverage_90": coverage(level=0.9),
        "sharpness": sharpness(),
        "quantile_calibration_error": quantile_calibration_error(),
        "ence": expected_normalised_calibration_error(),
    }


@cache
def uncertainty_part(name: str, *, of: Literal["entropy", "variance"] = "entropy") -> Metric:
    """Mean over rows of the "total", "aleatoric" or "epistemic" part of each prediction's uncertainty.

    Args:
        name: of the part.
        of: "entropy" of classes, in nats; "variance" of normals in squared unit, summed over dim.
    """

    def score(pred, _):
        value = getattr(decompose(pred), name)
        return value.sum(-1) if of == "variance" else value

    unit = {"entropy": "nats", "variance": "sum over dim"}[of]
    return mean_metric(score, f"{name} part of the {of}, {unit}; mean over rows")._replace(better="neither")


def _conventions(recorded: Recorded, clip, num_bins, num_replicates, seed) -> dict[str, Any]:
    members, grouped = recorded.pred.num_members, recorded.groups is not None
    ways = "own closed form or test inversion where the metric has one, else normal from the rows' influence"
    if grouped:
        ways = "normal from influence summed over groups; none for norms of gaps (ECE and kin)"
    if num_replicates:
        ways = f"percentile bootstrap of {'groups' if grouped else 'rows'}, {num_replicates} replicates, seed {seed}; "
        ways += "none for norms of gaps (ECE and kin)" if grouped else "norms of gaps (ECE and kin) by test inversion"
    stated = {
        "interval": f"95 %; {ways}",
        "pooling": f"the {members} members' distributions are averaged first" if members > 1 else "one member",
        "groups": "rows of one of the groups are not independent" if grouped else "rows are independent",
        "weights": "all rows alike" if recorded.weights is None else "rows weigh as the file says",
    }
    if isinstance(recorded.pred, Gaussian):
        return stated
    return stated | {
        "events": "top label: the most probable class (ties to the lowest index) is the label",
        "bins": f"{num_bins} of equal width, closed on the right, zero in the first",
        "clip": "none: a label of probability zero makes the NLL infinite" if clip is None else clip,
    }


def _notes(recorded: Recorded, estimates: Mapping[str, Estimate]) -> list[str]:
    notes = []
    zero = estimates.get("zero_probability_rows")
    if zero is not None and zero.value:
        notes.append(
            f"{round(zero.value)} of {len(recorded.targets)} rows have a label of probability zero (or below 1e-38, "
            "which float32 does not hold), whose NLL is infinite unless it is clipped (`--clip 1e-12`)."
        )
    if recorded.unused:
        notes.append(f"Not used, since the names mean nothing here: {', '.join(recorded.unused)}.")
    if recorded.features is not None and isinstance(recorded.pred, Gaussian):
        notes.append("Features are not used: local calibration is that of classes.")
    missing = [name for name, e in estimates.items() if e.low is None and np.isfinite(e.value) and name[:4] != "zero"]
    if missing:
        why = "for rows in groups" if recorded.groups is not None else "for these data"
        notes.append(f"Without an interval, since none is known to be sound {why}: {', '.join(missing)}.")
    undefined = [name for name, e in estimates.items() if np.isnan(e.value)]
    if undefined:
        notes.append(
            f"Undefined for these data: {', '.join(undefined)} (AUROC and kin need right and wrong predictions)."
        )
    return notes


def _slices(recorded: Recorded, clip, num_bins) -> dict[str, dict[str, Estimate]]:
    """A few figures of every group by itself, where there are few groups."""
    labels, place = np.unique(np.asarray(recorded.groups), return_inverse=True)
    if len(labels) > MOST_GROUPS:
        return {}
    names = ("rmse", "nll", "crps", "coverage_90")
    metrics = regression_metrics()
    if not isinstance(recorded.pred, Gaussian):
        names, metrics = ("accuracy", "nll", "ece"), classification_metrics(clip=clip, num_bins=num_bins)
    own = np.ones(len(place)) if recorded.weights is None else np.asarray(recorded.weights)
    chosen = {name: metrics[name] for name in names}
    return {
        str(label): evaluate(recorded.pred, recorded.targets, chosen, weights=own * (place == i))
        for i, label in enumerate(labels)
        if (own * (place == i)).any()
    }


def _local(recorded: Recorded, num_bins) -> dict[str, Any] | str:
    """Local calibration error on standardised features, or why not."""
    features = np.asarray(recorded.features, np.float32).reshape(len(recorded.targets), -1)
    if len(features) > MOST_NEIGHBOURS:
        return f"left out: it looks at every pair of rows, and there are {len(features)}, more than {MOST_NEIGHBOURS}"
    confidence, correct = read_columns(recorded.pred, recorded.targets, top_label().read)
    weights = np.ones(len(features)) if recorded.weights is None else np.asarray(recorded.weights, np.float64)
    mean = np.average(features, axis=0, weights=weights)
    spread = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    scaled = ((features - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)
    found = local_calibration_error(confidence, correct, scaled, weights=weights.astype(np.float32), num_bins=num_bins)
    return {
        "mean": float(found.mean),
        "maximum": float(found.maximum),
        "convention": "top label; standardised features",
    }


def _with_missing_ends(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result for json, where an end of an interval that is not known is null rather than absent."""

    def whole(estimates):
        return {name: {"low": None, "high": None, **e.json()} for name, e in estimates.items()}

    shown = {**result, "metrics": whole(result["metrics"])}
    if "calibration" in result:
        shown["calibration"] = {
            name: {**one, "before": whole(one["before"]), "after": whole(one["after"])}
            for name, one in result["calibration"].items()
        }
    return shown
