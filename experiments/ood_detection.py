"""Which score finds images unlike the training data? Every score, of single networks and of an ensemble of them.

    python experiments/ood_detection.py configs/ood_detection/fashion.yaml [key=value ...]

In distribution are all classes but two; those two are near, other kinds of images far. `data=fashion`: Fashion-MNIST
against MNIST and KMNIST, read from the folder that BAYESCAL_DATA names; each repetition holds out another two classes.
`data=digits` (scikit-learn's): against digits with their pixels shuffled and with their colours inverted.

One score is chosen, on held-out classes of the validation part alone. Then all are measured on test, whose "held out" are
other images of these classes; the far sets have no part in any choice.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import yaml
from jax.tree_util import Partial
from ood_detection_report import print_table, write

import bayescal as bc
from bayescal import scores
from bayescal.config import as_dict, command_line, versions
from bayescal.report import save_json
from bayescal.scores import output

CHOSEN_ON = "validation, held out"  # the set that the score is chosen on
OUTPUT_SCORES = {name: getattr(output, name) for name in output.__all__}
OF_MANY = ("mutual_information", "variation_ratio", "member_disagreement")  # 0 for a single network


@dataclass(frozen=True)
class Config:
    """Settings of the study; fixed on validation rows and their held-out classes."""

    data: str = "digits"  # or fashion
    seed: int = 0  # of the first repetition
    seeds: int = 5  # repetitions: splits, held-out classes and keys
    num_members: int = 5
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    bank_rows: int = 10_000  # training rows whose features the scores are fitted on
    k: int = 20  # neighbour
    dim: int = 16  # of the principal subspace of ViM and the residual
    ridge: float = 1e-3  # of covariances, relative to their mean eigenvalue
    react_quantile: float = 0.8
    ash_quantile: float = 0.3
    scale_quantile: float = 0.65
    max_rows: int | None = None  # of each set; for quick looks
    out: str | None = None  # folder of the run; default runs/ood_detection/<name of the yaml>
    progress: bool = True


class Sets(NamedTuple):
    """What a repetition is about; `asked` goes through the networks, in one array so that prediction compiles once."""

    train: bc.Dataset
    asked: dict[str, np.ndarray]  # "validation", CHOSEN_ON, "test" (in distribution), then the test sets outside
    targets: np.ndarray  # of "test"
    groups: dict[str, tuple[str, ...]]  # near and far: names of test sets outside
    model: bc.Model
    held_out: tuple[int, ...]  # classes


class Found(NamedTuple):
    """One repetition: score -> set -> values, of the ensemble (rows,) and of each member (member, rows)."""

    ensemble: dict[str, dict[str, np.ndarray]]
    members: dict[str, dict[str, np.ndarray]]
    accuracy: dict[str, float]  # of the ensemble and its members' mean, on test
    held_out: tuple[int, ...]


def digits(config: Config, seed: int) -> Sets:
    """Eight digits in distribution; the other two, halved, on validation and test."""
    held_out = pair(seed)
    split = bc.data.digits(seed, known=[d for d in range(10) if d not in held_out], unseen=held_out)
    rng, test, outside = np.random.default_rng(seed), split.test.inputs, split.unseen.inputs
    order = rng.permutation(len(outside))
    shuffled = rng.permuted(test.reshape(len(test), -1), axis=1).reshape(test.shape)
    asked = {
        "validation": split.validation.inputs,
        CHOSEN_ON: outside[order[::2]],
        "test": test,
        "held out": outside[order[1::2]],
        "shuffled": shuffled,
        "inverted": 1 - test,
    }
    model = bc.models.mlp(64, (64, 64), 8)
    groups = {"near": ("held out",), "far": ("shuffled", "inverted")}
    return Sets(split.train, asked, split.test.targets, groups, model, held_out)


def fashion(config: Config, seed: int) -> Sets:
    """Eight classes of Fashion-MNIST in distribution; the other two, MNIST and KMNIST outside."""
    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
    read = lambda name: bc.data.load_images(
        folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz"
    )
    train, test, mnist = (read(name) for name in ("fashion_mnist/train", "fashion_mnist/t10k", "mnist/t10k"))
    kmnist = bc.data.load_images(
        folder / "kmnist_test/kmnist-test-imgs.npz", folder / "kmnist_test/kmnist-test-labels.npz"
    )
    held_out = pair(seed)
    known = np.array([c for c in range(10) if c not in held_out])
    order = np.random.default_rng(seed).permutation(len(train.inputs))
    first, last = order[:-10_000], order[-10_000:]
    inside = lambda rows, data: rows[np.isin(data.targets[rows], known)]
    outside = lambda rows, data: rows[np.isin(data.targets[rows], held_out)]
    rows, every = inside(first, train), np.arange(len(test.inputs))
    named = lambda data, rows: np.searchsorted(known, data.targets[rows]).astype(np.int32)
    asked = {
        "validation": train.inputs[inside(last, train)],
        CHOSEN_ON: train.inputs[outside(last, train)],
        "test": test.inputs[inside(every, test)],
        "held out": test.inputs[outside(every, test)],
        "MNIST": mnist.inputs,
        "KMNIST": kmnist.inputs,
    }
    model, groups = bc.models.lenet((28, 28, 1), 8), {"near": ("held out",), "far": ("MNIST", "KMNIST")}
    own = bc.Dataset(train.inputs[rows], named(train, rows))
    return Sets(own, asked, named(test, inside(every, test)), groups, model, held_out)


DATA: dict[str, Callable[[Config, int], Sets]] = {f.__name__: f for f in (digits, fashion)}


def pair(seed: int) -> tuple[int, int]:
    """The classes held out: another pair each repetition, all ten in five."""
    return 2 * seed % 10, (2 * seed + 1) % 10


def feature_fits(config: Config, labels: np.ndarray) -> dict[str, Callable]:
    """Score of features -> `(features of the training rows, head) -> fitted`, for one network."""
    shared: dict[str, Any] = {"labels": labels, "ridge": config.ridge}
    density = lambda f, labels: scores.fit_gaussian_density(f, labels, ridge=config.ridge)
    everything = np.zeros_like(labels)  # one class: all rows under one normal distribution
    return {
        "mahalanobis": lambda f, head: scores.fit_mahalanobis(f, **shared),
        "relative_mahalanobis": lambda f, head: scores.fit_relative_mahalanobis(f, **shared),
        "gaussian_density": lambda f, head: density(f, labels),
        "density_ratio": lambda f, head: scores.density_ratio(density(f, labels), density(f, everything), weight=0.03),
        "neighbours": lambda f, head: scores.fit_neighbours(f, k=min(config.k, len(f))),
        "residual": lambda f, head: scores.fit_residual(f, dim=config.dim),
        "vim": lambda f, head: scores.fit_vim(f, head, dim=config.dim),
        "react": lambda f, head: scores.fit_react(f, head, quantile=config.react_quantile),
        "ash_p": lambda f, head: scores.ash_p(head, quantile=config.ash_quantile),
        "ash_b": lambda f, head: scores.ash_b(head, quantile=config.ash_quantile),
        "ash_s": lambda f, head: scores.ash_s(head, quantile=config.ash_quantile),
        "scale": lambda f, head: scores.scale(head, quantile=config.scale_quantile),
        "grad_norm": lambda f, head: scores.grad_norm(head),
    }


def repetition(config: Config, seed: int) -> tuple[Sets, Found]:
    """Trains an ensemble, and takes every score of it and of its members, on every set."""
    sets = DATA[config.data](config, seed)
    cut = lambda x: x[: config.max_rows]
    train = bc.Dataset(cut(sets.train.inputs), cut(sets.train.targets))
    asked = {name: cut(x) for name, x in sets.asked.items()}
    optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    method = bc.ensemble(bc.map_estimate(sets.model, bc.Categorical, optimizer), config.num_members)
    settings: dict[str, Any] = {"batch_size": config.batch_size, "progress": config.progress}
    state = bc.fit(method, train, jax.random.key(seed), epochs=config.epochs, **settings).state
    bank = np.random.default_rng(seed).permutation(len(train.inputs))[: config.bank_rows]
    look = lambda inputs: bc.predict_features(sets.model, bc.Categorical, state, inputs, None, chunk_size=256)
    labels, (_, known) = train.targets[bank], look(train.inputs[bank])
    pred, features = look(np.concatenate(list(asked.values())))
    assert isinstance(pred, bc.Categorical)

    alive = np.flatnonzero(state.alive)  # a member that diverged weighs nothing, alone or with others
    alone = [bc.Categorical(pred.logits[s : s + 1]) for s in alive]
    ensemble = {name: np.asarray(jax.jit(score)(pred)) for name, score in OUTPUT_SCORES.items()}
    members = {
        name: np.stack([jax.jit(score)(one) for one in alone])
        for name, score in OUTPUT_SCORES.items()
        if name not in OF_MANY
    }
    heads = Partial(sets.model.head, state.members.variables)
    for name, fit in feature_fits(config, labels).items():
        fitted = scores.fit_members(fit, known, heads, member_weights=state.alive)
        each = jax.lax.map(lambda own: own[0](own[1]), (fitted.fitted, features))
        members[name] = np.asarray(each)[alive]
        ensemble[name] = members[name].mean(0)  # what `fitted(features)` gives
    ends = np.cumsum([len(x) for x in asked.values()])
    parts = {name: slice(end - len(x), end) for (name, x), end in zip(asked.items(), ends, strict=True)}
    both = np.stack([ensemble["mahalanobis"], ensemble["free_energy"]])
    ensemble["mahalanobis + free_energy"] = np.asarray(scores.fit_combination(both[:, parts["validation"]])(both))
    right = lambda logits: logits[..., parts["test"], :].argmax(-1) == cut(sets.targets)
    accuracy = {"ensemble": float(right(pred.log_probs()).mean()), "members": float(right(pred.logits[alive]).mean())}
    return sets, Found(of_sets(ensemble, parts), of_sets(members, parts), accuracy, sets.held_out)


def of_sets(values: dict[str, np.ndarray], parts: dict[str, slice]) -> dict[str, dict[str, np.ndarray]]:
    return {score: {name: x[..., at] for name, at in parts.items()} for score, x in values.items()}


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """P(an outside row scores above an inside row), ties one half."""
    joined = np.concatenate([inside, outside])
    if np.isnan(joined).any():
        raise ValueError(
            f"`scores` must be numbers, got NaN in {int(np.isnan(joined).sum())} rows. Look at the members."
        )
    return bc.auroc_estimate(joined, np.arange(len(joined)) >= len(inside), "outside").value


def measure(found: Found) -> dict[str, dict[str, dict[str, float]]]:
    """Score -> "ensemble", "members" (their mean), "difference" -> set outside -> AUROC, of one repetition."""
    result = {}
    for score, values in found.ensemble.items():
        inside = {name: "validation" if name == CHOSEN_ON else "test" for name in values}
        asked = [name for name in values if name not in inside.values()]
        own = {"ensemble": {name: auroc(values[inside[name]], values[name]) for name in asked}}
        if score in found.members:
            each = found.members[score]
            pairs = {name: zip(each[inside[name]], each[name], strict=True) for name in asked}
            own["members"] = {name: float(np.mean([auroc(*x) for x in pairs[name]])) for name in asked}
            own["difference"] = {name: own["ensemble"][name] - own["members"][name] for name in asked}
        result[score] = own
    return result


def over_seeds(results: list[Any], convention: str) -> Any:
    """Trees of numbers, one a repetition, as a tree of means with t intervals."""
    if isinstance(results[0], dict):
        return {key: over_seeds([r[key] for r in results], convention) for key in results[0]}
    return bc.mean_over_runs(results, convention)


def choose(figures: dict[str, Any]) -> str:
    """The score of the ensemble that is best on held-out classes of the validation part."""
    return max(figures, key=lambda score: figures[score]["ensemble"][CHOSEN_ON].value)


def main(config: Config, folder: Path) -> dict[str, Any]:
    """Runs the study, writes the run's folder, prints the table, and returns what is in metrics.json."""
    if config.data not in DATA or config.seeds < 1:
        raise ValueError(
            f"`data` must be one of {', '.join(DATA)}, and `seeds` at least 1, got {config.data} and {config.seeds}. Check "
            "the spelling."
        )
    figures, details, groups = [], [], {}
    for seed in range(config.seed, config.seed + config.seeds):
        sets, found = repetition(config, seed)
        figures.append(measure(found))
        details.append(found)
        groups = {group: list(names) for group, names in sets.groups.items()}
        print(f"repetition {seed}: held out {found.held_out}", flush=True)
    words = "AUROC; positive class: outside; ties count one half"
    scored = over_seeds(figures, words)
    chosen = choose(scored)
    first = details[0].ensemble[chosen]
    outside = {name: first[name] for names in groups.values() for name in names}
    threshold = bc.detection_threshold(first["validation"])
    result = {
        "chosen": chosen,
        "chosen_on": "held-out classes of the validation part, the ensemble's mean AUROC over repetitions",
        "scores": scored,
        "accuracy": over_seeds([found.accuracy for found in details], "share of test rows"),
        "first_repetition": bc.evaluate_detection(first["test"], outside, groups=groups),
        "flagged": bc.detection_rates(threshold, first["test"], outside),
        "held_out": [found.held_out for found in details],
        "config": as_dict(replace(config, out=None)),
        "versions": versions(),
    }
    save_json(folder / "metrics.json", result)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    write(folder, result, groups, details[0])
    print_table(result, groups)
    return result


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    try:
        main(*command_line(Config, sys.argv))
    except FileNotFoundError as error:
        sys.exit(f"{error} Set BAYESCAL_DATA to the folder of the image files, or run `data=digits`.")
