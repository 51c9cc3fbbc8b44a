"""Does aleatoric uncertainty follow human disagreement, and epistemic not? Before and after temperature.

    python experiments/human_uncertainty.py configs/human_uncertainty/cifar10h.yaml [key=value ...]

`source=cifar10h`: recorded logits of four networks on the CIFAR-10 test images, against the votes of about fifty people
on each (CIFAR-10H), read from the folder that BAYESCAL_DATA names. `source=simulated`: an ensemble on scikit-learn's
digits, against votes drawn from another network's softened probabilities. Nobody was asked: it shows that the study runs.

Temperatures are fitted by NLL on the labels of the first half of the rows, and compared on the second half.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import yaml
from rich.console import Console
from rich.table import Table as RichTable
from scipy.special import entr

import bayescal as bc
from bayescal import plots
from bayescal.binning import Z95
from bayescal.config import as_dict, command_line, versions
from bayescal.metrics import spearman, spearman_difference
from bayescal.report import Picture, Section, Table, figure_png, number, save_json, write_report

PARTS = ("total", "aleatoric", "epistemic")
COLUMNS = ("aleatoric - epistemic", "cross-entropy", "nll")
FLOOR = 1e-12  # of probabilities in the cross-entropy: single networks give what some people say less than that


@dataclass(frozen=True)
class Config:
    """Which recordings; all but the first two are of the simulated ones."""

    source: str = "simulated"  # or cifar10h
    out: str | None = None  # folder of the run; default runs/human_uncertainty/<name of the yaml>
    seed: int = 0
    num_members: int = 4
    hidden: tuple[int, ...] = (64,)
    epochs: int = 40
    votes: int = 50  # annotators of each image
    softening: float = 3.0  # temperature of the network that stands for them


class Recordings(NamedTuple):
    """Networks and people on the same images."""

    logits: dict[str, np.ndarray]  # of each network, (rows, classes)
    labels: np.ndarray
    votes: np.ndarray  # (rows, classes), counts
    others: dict[str, Any]  # single predictives to compare with
    words: str


def cifar10h(config: Config) -> Recordings:
    """Four recorded networks, the votes of CIFAR-10H, and the predictive of Hamiltonian Monte Carlo."""
    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
    files = sorted((folder / "logits_cifar10").glob("*.npz"))
    votes, hmc = folder / "cifar10h/cifar10h-counts.npz", folder / "hmc_cifar10/hmc_resnet20_frn_probs.npz"
    missing = [str(x) for x in (votes, hmc) if not x.is_file()] + ([] if files else [f"{folder}/logits_cifar10/*.npz"])
    if missing:
        raise FileNotFoundError(
            f"`BAYESCAL_DATA` must name the folder of the recorded predictions, got {folder}, without {', '.join(missing)}. "
            "Set it, `BAYESCAL_DATA=/path/to/data python experiments/human_uncertainty.py ...`, or run `source=simulated`."
        )
    read: list[Any] = [bc.read_predictions(x) for x in (*files, hmc)]
    gold = read.pop()
    if any((x.targets != gold.targets).any() for x in read):
        raise ValueError("`labels` must be the same in all files, got others. Record the networks on the same rows.")
    logits = {x.stem: np.asarray(r.pred.logits[0]) for x, r in zip(files, read, strict=True)}
    words = "Recorded networks on the CIFAR-10 test images, against the votes of people (CIFAR-10H)"
    others = {"HMC, ResNet-20-FRN": gold.pred}
    return Recordings(logits, gold.targets.astype(np.int32), np.load(votes)["counts"], others, words)


def simulated(config: Config) -> Recordings:
    """An ensemble that learns from few digits, and votes drawn from a network that learnt from others."""
    split = bc.data.digits(config.seed, known=range(10), unseen=())
    net = bc.map_estimate(bc.models.mlp(64, config.hidden, 10), bc.Categorical, optax.adam(3e-3))
    settings = {"epochs": config.epochs, "batch_size": 32, "progress": False}

    def asked(method, rows, key) -> Any:
        return bc.predict(method, bc.fit(method, rows, key, **settings).state, split.test.inputs, key)

    keys = jax.random.split(jax.random.key(config.seed), 2)
    pred = asked(bc.ensemble(net, config.num_members), split.validation, keys[0])
    people = asked(net, split.train, keys[1])
    probs = np.asarray(jax.nn.softmax(people.logits[0] / config.softening), np.float64)
    votes = np.random.default_rng(config.seed).multinomial(config.votes, probs / probs.sum(-1, keepdims=True))
    logits = {f"member {i}": np.asarray(x) for i, x in enumerate(pred.logits)}
    words = "Networks on scikit-learn's digits, against SIMULATED votes, drawn from a network: no person was asked"
    return Recordings(logits, split.test.targets, votes, {}, words)


SOURCES = {f.__name__: f for f in (simulated, cifar10h)}


def human_entropy(votes: np.ndarray) -> np.ndarray:
    """Entropy of each row's votes, nats (rows,)."""
    share = np.sort(votes / votes.sum(-1, keepdims=True))  # so that equal votes for other classes tie exactly
    return entr(share).sum(-1)


def mean_of_rows(values: np.ndarray, convention: str) -> bc.Estimate:
    values = np.asarray(values, np.float64)
    mean, half = float(values.mean()), Z95 * float(values.std(ddof=1)) / np.sqrt(len(values))
    return bc.Estimate(mean, mean - half, mean + half, len(values), convention)


def agreement(pred, labels, votes) -> dict[str, Any]:
    """How a predictive stands to people and labels, its uncertainty as one number: the entropy of its pool."""
    log_probs = np.maximum(np.asarray(pred.log_probs(), np.float64), np.log(FLOOR))
    share = votes / votes.sum(-1, keepdims=True)
    words = f"nats; -sum_k people's share_k log p_k; probabilities below {FLOOR:g} count as that"
    return {
        "cross-entropy": mean_of_rows(-(share * log_probs).sum(-1), words),
        "nll": bc.evaluate(pred, labels, {"nll": bc.nll()})["nll"],
        "spearman": {"total": spearman(np.asarray(pred.entropy()), human_entropy(votes))},
    }


def parts_agreement(pred: bc.Categorical, labels, votes) -> dict[str, Any]:
    """`agreement`, and that of the parts of the uncertainty."""
    found, human = bc.decompose(pred), human_entropy(votes)
    parts = {part: np.asarray(getattr(found, part)) for part in PARTS}
    return agreement(pred, labels, votes) | {
        "spearman": {part: spearman(x, human) for part, x in parts.items()},
        "aleatoric - epistemic": spearman_difference(parts["aleatoric"], parts["epistemic"], human),
        "nats": {part: mean_of_rows(x, "nats, mean over images") for part, x in parts.items()},
    }


def main(config: Config, folder: Path) -> dict[str, Any]:
    """Measures, writes the run's folder, prints the table, and returns what is in metrics.json."""
    if config.source not in SOURCES:
        raise ValueError(f"`source` must be one of {', '.join(SOURCES)}, got {config.source}. Check the spelling.")
    data = SOURCES[config.source](config)
    labels, votes, logits = data.labels, data.votes, np.stack(list(data.logits.values()))
    half = len(labels) // 2
    pred, rest, asked = bc.Categorical(logits), bc.Categorical(logits[:, half:]), (labels[half:], votes[half:])
    alone = {name: bc.Categorical(x[None]) for name, x in data.logits.items()}
    fit = lambda logits: bc.fit_temperature(bc.Categorical(logits[:, :half]), labels[:half])
    scalers = {name: fit(x.logits) for name, x in alone.items()} | {"pool": fit(logits)}
    temperatures = {name: float(x.temperature) for name, x in scalers.items()}
    own = bc.Categorical(logits[:, half:] / np.array([temperatures[name] for name in alone])[:, None, None])
    pools = {
        f"all {len(labels)} images, no temperature": parts_agreement(pred, labels, votes),
        f"last {len(asked[0])} images, no temperature": parts_agreement(rest, *asked),
        f"last {len(asked[0])} images, a temperature for each network": parts_agreement(own, *asked),
        f"last {len(asked[0])} images, one temperature for the pool": agreement(scalers["pool"](rest), *asked),
    }
    result = {
        "source": data.words,
        "human_entropy": mean_of_rows(human_entropy(votes), "nats, mean over images"),
        "pools": pools,
        "alone": {name: agreement(x, labels, votes) for name, x in (alone | data.others).items()},
        "temperatures": temperatures,
        "config": as_dict(replace(config, out=None)),
        "versions": versions(),
    }
    save_json(folder / "metrics.json", result)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    write(folder, result, figure(pools, pred, votes))
    return result


def write(folder: Path, result, drawing) -> None:
    """Prints the table of pools, and writes report.html."""
    cells = lambda x: [x["spearman"].get(part, "") for part in PARTS] + [x.get(k, "") for k in COLUMNS]
    table = Table(["pool of all networks", *PARTS, *COLUMNS], [[k, *cells(x)] for k, x in result["pools"].items()])
    printed = RichTable(*table.columns, title=result["source"], title_justify="left")
    for name, *row in table.rows:
        printed.add_row(name, *(number(x and x._replace(low=None)) for x in row))
    Console(width=150).print(printed)
    fitted = {name: f"{value:.4f}" for name, value in result["temperatures"].items()}
    alone = [[k, fitted.get(k, ""), x["spearman"]["total"], *cells(x)[4:]] for k, x in result["alone"].items()]
    single = Table(["predictive", "temperature, of the first half", "total", *COLUMNS[1:]], alone)
    settings = Table(["setting", "value"], [[k, str(v)] for k, v in (result["config"] | result["versions"]).items()])
    picture = Picture("correlations, and entropy of votes by tenths", figure_png(drawing))
    note = (
        "Total, aleatoric, epistemic: Spearman's correlation with the entropy of people's votes; cross-entropy: of "
        "people's shares under the pool (nats). Small figures: 95 % intervals over images. A pool that is calibrated as "
        f"one predictive has no parts; its temperature is {fitted['pool']}."
    )
    sections = [
        Section("Does uncertainty follow people?", note, [table, picture]),
        Section("One predictive at a time", "On all images, without temperature.", [single]),
        Section("What was run", "", [settings]),
    ]
    lead = f"{result['source']}; entropy of the votes {number(result['human_entropy'])} nats."
    write_report(folder / "report.html", "Model uncertainty and human disagreement", lead, sections)
    print(folder / "report.html")


def figure(pools, pred, votes):
    """Correlations of the parts before and after temperature; entropy of votes along the rank of each part."""
    drawing, (left, right) = plots.panels(2, width=6.5, height=3.8)
    shown = {name: x["spearman"] for name, x in pools.items() if "epistemic" in x["spearman"]}
    estimates = {f"{name}: {part}": x[part] for name, x in shown.items() for part in PARTS}
    plots.forest(left, estimates, xlabel="Spearman with the entropy of votes")
    left.tick_params(axis="y", labelsize=7)
    found, human, lines = bc.decompose(pred), human_entropy(votes), {}
    for part in PARTS:
        tenths = np.array_split(human[np.argsort(np.asarray(getattr(found, part)), kind="stable")], 10)
        lines[part] = (np.arange(1, 11), np.array([x.mean() for x in tenths]))
    plots.curves(right, lines, xlabel="tenth of images, rising uncertainty", ylabel="entropy of votes (nats)")
    right.legend(fontsize=8)
    return drawing


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    try:
        main(*command_line(Config, sys.argv))
    except FileNotFoundError as error:
        sys.exit(str(error))
