"""Calibrators on recorded predictions: fitted on some rows, scored on the others before and after."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bayescal import calibrate
from bayescal.calibrate.calibrator import Calibrator, compose
from bayescal.calibrate.regression import fit_variance_scaling
from bayescal.compare import compare
from bayescal.conformal import fit_venn_abers
from bayescal.data.predictions import Recorded
from bayescal.evaluate import evaluate
from bayescal.predictive import Gaussian, Predictive, Probabilities, take
from bayescal.report import short
from bayescal.types import Metric, WholeMetric


def _keyed(fit: Callable[..., Calibrator]) -> Callable[..., Calibrator]:
    """`fit` with one key for the start of its small network, so that a name stands for one map."""
    return lambda pred, targets, **given: fit(jax.random.key(0), pred, targets, **given)


CLASSES: dict[str, Callable[..., Calibrator]] = {
    "temperature": calibrate.fit_temperature,
    "ensemble_temperature": calibrate.fit_ensemble_temperature,
    "extra_logit": calibrate.fit_extra_logit,
    "platt": calibrate.fit_platt,
    "vector": calibrate.fit_vector,
    "matrix": calibrate.fit_matrix,
    "dirichlet": calibrate.fit_dirichlet,
    "diagonal_dirichlet": calibrate.fit_diagonal_dirichlet,
    "beta": calibrate.fit_beta,
    "isotonic": calibrate.fit_isotonic,
    "shared_isotonic": calibrate.fit_shared_isotonic,
    "spline": calibrate.fit_spline,
    "histogram": calibrate.fit_histogram,
    "scaling_binning": calibrate.fit_scaling_binning,
    "bayesian_binning": calibrate.fit_bayesian_binning,
    "binwise_temperature": calibrate.fit_binwise_temperature,
    "venn_abers": fit_venn_abers,
    "parametrised_temperature": _keyed(calibrate.fit_parametrised_temperature),
    "rank_preserving": _keyed(calibrate.fit_rank_preserving),
    "order_preserving": _keyed(calibrate.fit_order_preserving),
}
REGRESSION: dict[str, Callable[..., Calibrator]] = {"variance_scaling": fit_variance_scaling}
MOST_NUMBERS = 100  # of one fitted array that are written out: a map of ten classes
HALVES = ("first-half", "second-half")


def assess_calibration(
    recorded: Recorded,
    metrics: Mapping[str, Metric | WholeMetric],
    names: Sequence[str],
    *,
    fit: str = "first-half",
    clip: float | None = None,
    num_replicates: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric on the rows that are not fitted on, before and after each calibrator, and the paired change.

    Args:
        recorded: the predictions.
        metrics: name -> metric.
        names: of calibrators, each of `CLASSES` (or `REGRESSION`), or several joined by "+": fitted one on the other.
        fit: rows for the fit: "first-half", "second-half", or a share in (0, 1) as a word: that first share. With groups
            it is whole groups, in the order of their first rows.
        clip: smallest probability for the fit, of probabilities; see `bc.calibrate.clip_probabilities`.
        num_replicates: of the paired bootstrap; 0 = intervals of the change from the difference of the rows' influences.
        seed: of the bootstrap.

    Returns:
        `{"calibration": {name: {"parameters", "before", "after", "difference"}}, "conventions", "notes"}`. A difference is
        after - before, `{"value", "low", "high", "noise", "better"}`: noise = the 95 % interval contains 0, None where no
        interval is sound (norms of gaps such as ECE, a single row); better = which sign is.

    Raises:
        ValueError: for an unknown name, rows that cannot be divided, a calibrator that cannot be fitted on these rows.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        fits(name, isinstance(recorded.pred, Gaussian))  # unknown names are told before anything is fitted
    for_fit = fit_rows(fit, len(recorded.targets), recorded.groups)
    fitted_on, scored = _rows(recorded, for_fit), _rows(recorded, ~for_fit)
    if recorded.groups is not None and len(np.unique(recorded.groups[~for_fit])) < 2:
        raise ValueError(
            f"`fit` must leave rows of two groups or more to score, got {fit!r}, which leaves one of "
            f"{len(np.unique(recorded.groups))}: how groups vary cannot be told from it. Take another share, or more groups."
        )
    given: dict[str, Any] = {"weights": scored.weights, "groups": scored.groups}
    before = evaluate(scored.pred, scored.targets, metrics, **given)
    sampling = {"key": jax.random.key(seed), "num_replicates": num_replicates} if num_replicates else {}
    found, notes = {}, []
    for name in names:
        calibrator = _fit(name, clipped(fitted_on.pred, clip), fitted_on)
        after_pred = calibrator(clipped(scored.pred, clip))
        after = evaluate(after_pred, scored.targets, metrics, **given)
        change = {}
        for key, metric in metrics.items():
            value, low, high = after[key].value - before[key].value, None, None
            if metric.regular and (before[key].n or 0) > 1:  # one row does not say how rows vary
                paired = compare(metric, after_pred, scored.pred, scored.targets, **given, **sampling).difference
                low, high = paired.low, paired.high
            noise = None if low is None or high is None else low <= 0 <= high
            change[key] = {"value": value, "low": low, "high": high, "noise": noise, "better": metric.better}
        found[name] = {
            "parameters": parameters(calibrator),
            "before": before,
            "after": after,
            "difference": change,
        }
        notes.append(f"{name}{_numbers(found[name]['parameters'])}: {_in_words(change)}.")
    which = "the first half" if fit == HALVES[0] else "the second half" if fit == HALVES[1] else f"the first {fit}"
    whole = " as whole groups, in the order of their first rows" if recorded.groups is not None else ""
    conventions = {
        "calibration": f"fitted on {which} of the rows{whole} ({int(for_fit.sum())}), scored on the other "
        f"{int((~for_fit).sum())}, before and after",
        "change": "after - before on the same rows, 95 % interval by "
        + (
            f"paired bootstrap, {num_replicates} replicates, seed {seed}"
            if num_replicates
            else "difference of influences"
        )
        + "; noise = it contains 0. The fitted map is taken as it is: how it varies with the fitted rows is not counted. "
        "Each interval is for itself, not adjusted for how many changes are looked at",
    }
    if clip is not None and isinstance(recorded.pred, Probabilities):
        conventions["clip for calibration"] = (
            f"probabilities below {clip} count as that, in the fit and in what it maps"
        )
    return {"calibration": found, "conventions": conventions, "notes": notes}


def fit_rows(fit: str, rows: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Which rows are for the fit, bool (rows,); no group is divided.

    Args:
        fit: "first-half", "second-half", or a share in (0, 1) as a word.
        rows: how many there are.
        groups: label of each row; a group belongs to the first part where that part stays within its share.

    Raises:
        ValueError: for another word, or where one of the parts is empty.
    """
    share = 0.5 if fit in HALVES else _share(fit)
    cut = int(round(rows * share, 6))  # 0.29 of 100 rows is 29, whatever the last bit says
    first = np.arange(rows) < cut
    if groups is not None:
        _, start, place, size = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(start)
        inside = np.empty(len(start), bool)
        inside[order] = np.cumsum(size[order]) <= cut
        first = inside[place]
    if first.all() or not first.any():
        what = f"{rows} rows" if groups is None else f"{rows} rows in {len(start)} groups"
        raise ValueError(
            f"`fit` must leave rows to fit on and rows to score, got {fit!r} of {what}. Take another share, or more rows."
        )
    return ~first if fit == HALVES[1] else first


def clipped(pred: Predictive, clip: float | None) -> Predictive:
    """Probabilities with none below the clip, as logits, of the pool; anything else as it is."""
    if clip is None or not isinstance(pred, Probabilities):
        return pred
    return calibrate.clip_probabilities(pred, clip)


def parameters(calibrator: Calibrator) -> dict[str, Any]:
    """What was fitted, by name: numbers, lists, settings; a long array as its shape in words."""
    return {field.name: _plain(getattr(calibrator, field.name)) for field in dataclasses.fields(calibrator)}  # pyright: ignore[reportArgumentType]


def _plain(value) -> Any:
    if isinstance(value, Calibrator):
        return {"calibrator": type(value).__name__, **parameters(value)}
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if isinstance(value, jax.Array | np.ndarray):
        return value.tolist() if value.size <= MOST_NUMBERS else f"array of shape {value.shape}"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def fit_named(name: str, pred: Predictive, targets, *, weights=None) -> Calibrator:
    """The calibrator that a name stands for, fitted with its defaults; of NAME+NAME each on what the one before gives.

    Args:
        name: of `CLASSES`, or of `REGRESSION` for a Gaussian, or several joined by "+".
        pred: predictive of the rows of the fit.
        targets: one per row.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: for an unknown name, and what the fit itself raises.
    """
    steps, fitted = fits(name, isinstance(pred, Gaussian)), []
    for step in steps:
        fitted.append(step(pred, targets, weights=weights))
        pred = fitted[-1](pred)
    return fitted[0] if len(fitted) == 1 else compose(*fitted)


def fits(name: str, regression: bool) -> list[Callable[..., Calibrator]]:
    """The fits that a name stands for, in order.

    Raises:
        ValueError: for an unknown name.
    """
    known = REGRESSION if regression else CLASSES
    for part in name.split("+"):
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"`calibrate` must be names of calibrators of {'densities' if regression else 'classes'}, got {part!r}. Did "
                f"you mean {near!r}? All names: {', '.join(known)}; NAME+NAME fits one on the other."
            )
    return [known[part] for part in name.split("+")]


def _fit(name, pred, rows: Recorded) -> Calibrator:
    targets = rows.targets if isinstance(pred, Gaussian) else rows.targets.astype(np.int32)  # files have bytes
    try:
        return fit_named(name, pred, targets, weights=rows.weights)
    except ValueError as error:
        raise ValueError(
            f"`calibrate` must name what can be fitted on these rows, got {name!r}, which cannot: {error} Or leave it out, "
            "or choose other rows with `fit`."
        ) from error


def _rows(recorded: Recorded, which: np.ndarray) -> Recorded:
    at = np.flatnonzero(which)
    columns = {name: getattr(recorded, name) for name in ("weights", "groups", "features")}
    kept: dict[str, Any] = {name: x if x is None else x[at] for name, x in columns.items()}
    return Recorded(take(recorded.pred, at), recorded.targets[at], **kept)


def _share(fit: str) -> float:
    try:
        share = float(fit)
    except ValueError:
        share = float("nan")
    if not 0 < share < 1:
        raise ValueError(
            f"`fit` must be {HALVES[0]!r}, {HALVES[1]!r} or a share in (0, 1), got {fit!r}. 0.2 = the first fifth of the rows."
        )
    return share


def reading(change: Mapping[str, Any]) -> str:
    """A change in a word or two: better, worse, higher, lower, noise, unchanged, infinite, undefined, no interval."""
    value, noise, better = change["value"], change["noise"], change["better"]
    if value == 0 and not change["low"]:
        return "unchanged"
    if noise is None:
        return "undefined" if np.isnan(value) else "infinite" if np.isinf(value) else "no interval"
    if noise:
        return "noise"
    up = value > 0
    return ("higher" if up else "lower") if better == "neither" else "better" if up == (better == "higher") else "worse"


def _numbers(fitted) -> str:
    told = [f"{key} {short(x)}" for key, x in fitted.items() if isinstance(x, float) and key != "gradient"]
    return f" ({', '.join(told)})" if told else ""


def _in_words(changes) -> str:
    by_word: dict[str, list[str]] = {}
    for name, change in changes.items():
        by_word.setdefault(reading(change), []).append(name)
    long = {
        "noise": "noise (the interval of the change contains 0)",
        "no interval": "no interval of the change is known to be sound",
        "infinite": "infinite (a label was given probability zero: see `--clip`)",
    }
    return "; ".join(f"{long.get(word, word)}: {', '.join(which)}" for word, which in by_word.items())
