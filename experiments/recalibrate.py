"""Which post-hoc calibrator, with how many rows, and where does it hurt? Calibrators x prediction sets.

    python experiments/recalibrate.py configs/recalibrate/digits.yaml [key=value ...]

`source=stored`: all recorded prediction sets of the folder that BAYESCAL_DATA names: networks, classical classifiers,
language models' answers to multiple-choice questions. `source=digits`: small ensembles on scikit-learn's digits.

Every calibrator is fitted on some rows of a set and judged on others by NLL, Brier score and ECE. Differences to no
calibration are paired, row by row, and take the fitted map as it is. No setting was chosen by any of these figures:
calibrators run with their defaults. What cannot be fitted on a set is reported with its reason.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from recalibrate_data import CLIP, NONE, PredictionSet, Rows, digits, stored
from recalibrate_report import write

import bayescal as bc
from bayescal.config import as_dict, command_line, versions
from bayescal.evaluate import measure
from bayescal.recorded_calibration import fit_named, fits
from bayescal.report import save_json


@dataclass(frozen=True)
class Config:
    """What is fitted on what."""

    source: str = "digits"  # or stored
    out: str | None = None  # folder of the run; default runs/recalibrate/<name of the yaml>
    calibrators: tuple[str, ...] = ("temperature", "ensemble_temperature", "vector", "isotonic", "histogram")
    sizes: tuple[int, ...] = (50, 100, 200)  # calibration rows of the study of cost
    cost_of: tuple[str, ...] = ("mlp 32", "mean of 4 mlp 32")  # sets that are looked at for it
    cost_calibrators: tuple[str, ...] = ("temperature", "vector", "isotonic")
    draws: int = 20  # of the calibration rows, for each size
    num_bins: int = 15
    seed: int = 0


@cache
def metrics(num_bins: int) -> dict[str, bc.Metric]:
    """What calibrators are judged by."""
    return {"nll": bc.nll(clip=CLIP), "brier": bc.brier(), "ece": bc.calibration_error(num_bins=num_bins)}


def judge(calibrated, rows: Rows, num_bins: int) -> dict[str, Any]:
    """Figures of a calibrated predictive, and nll and Brier score less those of the rows' own, paired.

    clipped: rows whose label has a probability below the clip, so that the nll counts them with less than theirs.
    """
    used = metrics(num_bins)
    own = bc.evaluate(calibrated, rows.targets, used)
    paired = {n: bc.compare(used[n], calibrated, rows.pred, rows.targets).difference for n in ("nll", "brier")}
    below = np.asarray(calibrated.log_prob(rows.targets)) < np.log(CLIP) - 1e-3  # recorded ones lie at the clip itself
    return {"figures": own, "difference": paired, "clipped": int(below.sum())}


def before_and_after(sets: Mapping[str, PredictionSet], config: Config) -> dict[str, dict[str, Any]]:
    """set -> calibrator -> figures, or why it could not be fitted."""
    found: dict[str, dict[str, Any]] = {}
    for place, (name, one) in enumerate(sets.items()):
        own: dict[str, Any] = {
            NONE: {"figures": bc.evaluate(one.judged.pred, one.judged.targets, metrics(config.num_bins))}
        }
        for calibrator in config.calibrators:
            try:
                fitted = fit_named(calibrator, one.fit.pred, one.fit.targets)
                own[calibrator] = judge(fitted(one.judged.pred), one.judged, config.num_bins)
            except ValueError as error:  # it cannot be fitted, or gives NaN: the others go on
                own[calibrator] = {"refused": str(error)}
        found[name] = own
        print(f"{place + 1} of {len(sets)}: {name}", flush=True)
        jax.clear_caches()  # of thousands of programs a process runs out of memory maps
    return found


def ranks(found: Mapping[str, Mapping[str, Any]], metric: str, data: Mapping[str, str]) -> dict[str, Any]:
    """Mean rank of each calibrator that could be fitted on every set, 1 = best, with Nemenyi's critical difference.

    The test takes sets as independent. Sets on the same images or questions are not: were they copies of each other, the
    variance of a mean rank would be that of N^2 / sum n_d^2 sets (n_d of them on data d), which gives the largest distance.

    Args:
        found: as `before_and_after` gives it.
        metric: that is ranked by, lower = better.
        data: set -> what it predicts; sets on the same data are dependent.

    Source: Demsar 2006: distance = q sqrt(k (k + 1) / (6 N)), q of the studentised range over sqrt 2, 5 %.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    everywhere = [
        name for name in next(iter(found.values())) if all("figures" in own.get(name, {}) for own in found.values())
    ]
    values = np.array([[own[name]["figures"][metric].value for name in everywhere] for own in found.values()])
    number, of_sets = len(everywhere), len(values)
    mean = rankdata(values, axis=1).mean(0)
    test = float(friedmanchisquare(*values.T).pvalue) if number > 2 and of_sets > 1 else float("nan")
    quantile = studentized_range.ppf(0.95, number, np.inf) / np.sqrt(2) if number > 1 else float("nan")
    same = Counter(data[name] for name in found)
    least = of_sets**2 / sum(n**2 for n in same.values())
    distance, dependent = (float(quantile * np.sqrt(number * (number + 1) / (6 * n))) for n in (of_sets, least))
    return {
        "mean": dict(zip(everywhere, mean.tolist(), strict=True)),
        "critical_difference": distance,
        "critical_difference_if_dependent": dependent,
        "friedman_p": test,
        "sets": of_sets,
        "data": len(same),
    }


def harm(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where calibration hurts: NLL or Brier score rises beyond noise, or ECE rises although NLL falls.

    A rise of ECE has no interval that is sound, so that any counts.
    """
    cases = []
    for name, own in found.items():
        for calibrator, one in own.items():
            if "difference" not in one:
                continue
            rises = [n for n, d in one["difference"].items() if d.low is not None and d.low > 0]
            nll, ece = one["difference"]["nll"], one["figures"]["ece"].value - own[NONE]["figures"]["ece"].value
            if ece > 0 and nll.value < 0:
                rises.append("ece, although nll falls")
            if rises:
                case = {"set": name, "calibrator": calibrator, "rises": rises, "ece": ece, "clipped": one["clipped"]}
                cases.append(case | one["difference"])
    return cases


def cost(sets: Mapping[str, PredictionSet], config: Config) -> dict[str, Any]:
    """set -> calibrator -> calibration rows -> metric less that of no calibration, mean over draws of the rows.

    All rows of the fit are one draw, which has no interval; draws of many of them overlap, so that intervals narrow.
    """
    rng, found = np.random.default_rng(config.seed), {}
    for name in config.cost_of:
        one, found[name] = sets[name], {}
        base, rows = _values(one.judged.pred, one.judged.targets, config.num_bins), len(one.fit.targets)
        draws = {n: 1 if n == rows else config.draws for n in config.sizes if n <= rows}
        chosen = {n: [rng.permutation(rows)[:n] for _ in range(number)] for n, number in draws.items()}
        for calibrator in config.cost_calibrators:
            found[name][calibrator] = {n: _over_draws(calibrator, one, chosen[n], base, config) for n in chosen}
        print(f"cost in rows: {name}", flush=True)
        jax.clear_caches()
    return found


def _over_draws(calibrator: str, one: PredictionSet, draws, base, config: Config) -> dict[str, Any]:
    values: list[dict[str, float]] = []
    refused: list[str] = []
    for rows in draws:
        few = one.fit.take(rows)
        try:
            fitted = fit_named(calibrator, few.pred, few.targets)
            values.append(_values(fitted(one.judged.pred), one.judged.targets, config.num_bins))
        except ValueError as error:
            refused.append(str(error))
    words = (
        "less that without calibration; mean and t interval over those draws of the calibration rows that can be fitted"
    )
    own = {n: bc.mean_over_runs([v[n] - base[n] for v in values], words) for n in base} if values else {}
    return {"fitted": len(values), "refused": len(refused), "why": sorted(set(refused)), "difference": own}


def _values(pred, targets, num_bins: int) -> dict[str, float]:
    used = metrics(num_bins)
    sums = measure(pred, targets, used)
    return {name: float(metric.compute(sums[name])) for name, metric in used.items()}


def main(config: Config, folder: Path) -> dict[str, Any]:
    """Fits and judges all, writes the run's folder, prints the tables, and returns what is in metrics.json."""
    sources = {"stored": stored, "digits": lambda: digits(config.seed)}
    if config.source not in sources:
        raise ValueError(f"`source` must be one of {', '.join(sources)}, got {config.source}. Check the spelling.")
    for name in (*config.calibrators, *config.cost_calibrators):
        fits(name, regression=False)  # an unknown name is a mistake, not a calibrator that cannot be fitted
    sets = sources[config.source]()
    for name in config.cost_of:
        if name not in sets:
            raise ValueError(f"`cost_of` must name sets of this source, got {name!r}. They are {', '.join(sets)}.")
    found = before_and_after(sets, config)
    result = {
        "sets": found,
        "rows": {
            name: {
                "fit": len(s.fit.targets),
                "judged": len(s.judged.targets),
                "classes": s.fit.pred.num_classes,
                "data": s.data,
                "division": s.words,
            }
            for name, s in sets.items()
        },
        "ranks": {
            metric: ranks(found, metric, {name: s.data for name, s in sets.items()})
            for metric in metrics(config.num_bins)
        },
        "harm": harm(found),
        "cost": cost(sets, config),
        "config": as_dict(replace(config, out=None)),
        "versions": versions(),
    }
    save_json(folder / "metrics.json", result)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    write(folder, result)
    return result


if __name__ == "__main__":
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
