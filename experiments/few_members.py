"""How much of the mutual information few members show, and how often the corrected one's interval holds the truth.

    python experiments/few_members.py configs/few_members/dirichlet.yaml [key=value ...]

Members are draws of a Dirichlet distribution, whose mutual information is known in closed form.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

import bayescal as bc
from bayescal.binning import wilson_interval
from bayescal.config import as_dict, command_line, versions
from bayescal.decompose import corrected_mutual_information, mutual_information
from bayescal.report import number, save_json


@dataclass(frozen=True)
class Config:
    """Settings of the simulation."""

    concentrations: tuple[tuple[float, ...], ...] = ((4, 2, 1, 1), (0.5, 0.5, 0.5), (100, 50, 25), (30, 0.3, 0.3, 0.3))
    members: tuple[int, ...] = (3, 5, 10, 20)
    sets: int = 4000  # of members, for each
    seed: int = 0
    out: str | None = None


def cell(rng: np.random.Generator, concentration, members: int, sets: int) -> dict[str, bc.Estimate]:
    """Means over data sets as shares of the truth, and the share of intervals that hold it."""
    given = np.array(concentration, np.float32)
    truth = float(bc.decompose(bc.Dirichlet(given[None, None])).epistemic[0])
    pred = bc.Probabilities(rng.dirichlet(given, size=(members, sets)).astype(np.float32))
    plain, corrected = np.asarray(mutual_information(pred), float), corrected_mutual_information(pred)
    held = float(((np.asarray(corrected.low) <= truth) & (truth <= np.asarray(corrected.high))).mean())
    low, high = wilson_interval(held, sets)
    return {
        "plain": share(plain, truth),
        "corrected": share(np.asarray(corrected.value, float), truth),
        "coverage": bc.Estimate(held, float(low), float(high), sets, "nominal 95 %; Wilson interval"),
    }


def share(values: np.ndarray, truth: float) -> bc.Estimate:
    mean, half = values.mean() / truth, 1.96 * values.std() / truth / np.sqrt(len(values))
    return bc.Estimate(float(mean), float(mean - half), float(mean + half), len(values), "share of the truth")


def main(config: Config, folder: Path) -> dict[str, dict[str, bc.Estimate]]:
    """Simulates every case, prints the table, and writes metrics.json."""
    rng = np.random.default_rng(config.seed)
    cases = {
        f"Dirichlet{tuple(concentration)}, {members} members": cell(rng, concentration, members, config.sets)
        for concentration in config.concentrations
        for members in config.members
    }
    save_json(folder / "metrics.json", {"cases": cases, "config": as_dict(config), "versions": versions()})
    table = RichTable("members drawn from", "plain / truth", "corrected / truth", "coverage of 95 %")
    for name, own in cases.items():
        table.add_row(name, *(number(x) for x in own.values()))
    Console(width=150).print(table)
    return cases


if __name__ == "__main__":
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
