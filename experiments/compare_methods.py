"""Compares uncertainty methods end to end: trained, asked about test images, shifted ones and ones unlike any learnt.

    python experiments/compare_methods.py configs/compare_methods/digits.yaml [key=value ...]

`data=digits` (scikit-learn's): classes 0 to 7 are in distribution (stratified train, validation, test), images of 8 and 9
out of it. `data=fashion`: 10,000 training images of Fashion-MNIST, all classes, with MNIST out of distribution, read from
the folder that BAYESCAL_DATA names. Test images under noise, rotation and contrast at five severities are shifted. Every
method predicts, is taken apart and scored on all of them; `seeds=5` repeats everything over five splits and seeds.

Killed at any moment, the same command goes on where it was, to the same figures; `fresh=true` begins again.
"""

import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from compare_methods_data import SEVERITIES, SHIFTS, Sets, Source, load_sets, source
from compare_methods_recipes import RECIPES, network
from compare_methods_report import print_table, write

import bayescal as bc
from bayescal.checkpoint import events
from bayescal.config import as_dict, command_line, versions
from bayescal.report import save_json, save_predictions

NOT_OF_THE_TRAINING = ("methods", "seed", "seeds", "checkpoint_every", "fresh", "out", "progress")
METRICS = {
    "accuracy": bc.accuracy(),
    "nll": bc.nll(),
    "brier": bc.brier(),
    "ece": bc.calibration_error(num_bins=15),
}


@dataclass(frozen=True)
class Config:
    """Settings of the comparison; the defaults are those of digits, fixed as configs/compare_methods/digits.yaml says."""

    data: str = "digits"  # or fashion
    methods: tuple[str, ...] = ("single", "deep_ensemble", "mc_dropout", "variational", "variational_ensemble")
    seed: int = 0  # of the first split and the first training
    seeds: int = 1  # repetitions: splits and keys seed, seed + 1, ...
    hidden: tuple[int, ...] = (256, 256)
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.3
    num_members: int = 10  # deep_ensemble
    dropout: float = 0.2  # mc_dropout
    drop_connect: float = 0.02  # share of weights
    concrete_precision: float = 0.03  # concrete_dropout: of the prior of every weight
    rate_learning_rate: float = 1e-2  # concrete_dropout: of the logits of its rates
    num_draws: int = 20  # of all that draw networks
    variational_members: int = 5  # variational_ensemble
    variational_epochs: int = 150  # and of ivon
    variational_learning_rate: float = 1e-2
    prior_scale: float = 1.0  # variational, local_reparametrisation, flipout
    rank: int = 8  # variational_low_rank
    components: int = 4  # rank_one
    component_scale: float = 0.02  # by which they differ at the start
    rank_one_prior_scale: float = 0.1  # of their vectors, around 1
    temperature: float = 1.0  # of the variational posterior; 1 = Bayes
    prior_precision: float = (
        1.0  # of chains, ivon and svgd; where Laplace's begins, which follows the marginal likelihood
    )
    anchor_precision: float = 30.0  # anchored_ensemble
    prior_function_scale: float = 10.0  # randomised_prior_ensemble
    ivon_learning_rate: float = 0.1
    ivon_beta2: float = 0.999
    ivon_hessian: float = 1.0
    swag_epochs: int = 20
    swag_learning_rate: float = 0.1
    chains: int = 2  # of every sampler
    chain_epochs: int = 100  # sgld, psgld, sghmc, cyclical_sgld
    sgld_step: float = 3e-2  # times 1 / num_data, as the others
    psgld_step: float = 1e-4
    sghmc_step: float = 3e-3  # of step_size^2
    sghmc_friction: float = 0.1  # times 1 / step_size: the share of momentum lost in a step
    cyclical_step: float = 3e-2
    cycles: int = 4
    mclmc_updates: int = 60  # half of them warm-up
    mclmc_steps: int = 20  # an update
    nuts_warmup: int = 60  # and as many transitions after
    nuts_doublings: int = 5
    max_rows: int | None = None  # of each set; for quick looks
    checkpoint_every: int = 20  # epochs
    fresh: bool = False  # throw away what a killed run has left, and begin again
    out: str | None = None  # folder of the run; default runs/compare_methods/<name of the yaml>
    progress: bool = True


class Outcome(NamedTuple):
    """One method on one seed."""

    fit: bc.Fit
    preds: dict[Any, Any]  # Categorical, with members
    pooled: dict[Any, Any]  # Categorical of one member: their mixture
    parts: dict[Any, bc.Uncertainty]
    figures: dict[str, Any]  # the method's part of metrics.json, of this seed


def run_method(
    config: Config, name: str, method: bc.Method, sets: Sets, seed: int, checkpoints: Path, start: Outcome | None
) -> Outcome:
    """Trains one method and measures it on every set."""
    recipe = RECIPES[name]
    settings = {k: v for k, v in as_dict(config).items() if k not in NOT_OF_THE_TRAINING}
    fitted = bc.fit(
        method,
        sets.train,
        jax.random.key(seed),
        epochs=recipe.epochs(config),
        batch_size=len(sets.train.targets) if recipe.whole else config.batch_size,
        start=None if start is None else start.fit.state,
        checkpoint=bc.Checkpoint(training_folder(checkpoints, seed, name), config.checkpoint_every, config=settings),
        progress=config.progress,
    )
    began = time.perf_counter()
    if recipe.tune is not None:
        fitted = fitted._replace(
            state=jax.block_until_ready(recipe.tune(method, fitted.state, sets.validation, jax.random.key(seed + 2000)))
        )
    tuning = time.perf_counter() - began
    first, later = fitted.seconds["first_epoch"], fitted.seconds["later_epochs"]
    own = 0.0 if start is None else start.figures["seconds"]["train"].value
    seconds = {"train": own + first + later + tuning, "start": own, "first_epoch": first}

    inputs = np.concatenate([x for x, _ in sets.asked.values()])
    for phase in ("first_call", "predict") if seed == config.seed else ("predict",):  # later seeds compile nothing
        began = time.perf_counter()
        pred = jax.block_until_ready(bc.predict(method, fitted.state, inputs, jax.random.key(seed + 1000)))
        seconds[phase] = time.perf_counter() - began
    parts, pooled = bc.decompose(pred), jax.jit(bc.pool)(pred)

    ends = np.cumsum([len(x) for x, _ in sets.asked.values()])
    rows = {set_: slice(end - len(x), end) for (set_, (x, _)), end in zip(sets.asked.items(), ends, strict=True)}
    pred, pooled, parts = jax.tree.map(np.asarray, (pred, pooled, parts))
    preds, pooled = ({set_: bc.take(p, at) for set_, at in rows.items()} for p in (pred, pooled))
    parts = {set_: bc.Uncertainty(*(x[at] for x in parts)) for set_, at in rows.items()}
    figures = measure(pooled, parts, sets)
    figures["seconds"] = {phase: bc.Estimate(value) for phase, value in seconds.items()}
    figures["chains"] = chains(config, fitted, sets)
    return Outcome(fitted, preds, pooled, parts, figures)


def chains(config: Config, fitted: bc.Fit, sets: Sets) -> dict[str, bc.Estimate]:
    """How well the chains of a sampler agree, on what predictions depend on; nothing for other methods."""
    if not hasattr(getattr(fitted.state, "members", None), "samples"):
        return {}
    model = network(config)
    centred = lambda logits: logits - logits.mean(-1, keepdims=True)  # log-probabilities near 0 round to a constant
    values = model._replace(apply=lambda v, x, key: centred(model.apply(v, x, key)))
    figures = bc.chain_diagnostics(values, fitted.state, sets.asked["validation"][0][:32]).worst()
    half = {k: v[len(v) // 2 :] for k, v in fitted.history.items()}  # after the warm-up
    if "acceptance" in half:
        figures["acceptance"] = bc.Estimate(float(half["acceptance"].mean()), convention="mean Metropolis acceptance")
        figures["divergences"] = bc.Estimate(float(half["divergent"].sum()), convention="of all chains, after warm-up")
    return figures


def training_folder(checkpoints: Path, seed: int, name: str) -> Path:
    return checkpoints / f"seed{seed}" / name


def resumptions(checkpoints: Path, seed: int, name: str) -> list[str]:
    """A sentence for every time that this training was gone on with, or had a damaged checkpoint put aside."""
    told = {
        "resumed": "went on after epoch {epoch} at {time}, on {on} devices",
        "damaged checkpoint put aside": "checkpoint {epoch} was damaged and put aside at {time}",
    }
    happened = events(training_folder(checkpoints, seed, name))
    return [f"seed {seed}, {name}: {told[e['event']].format(**e)}" for e in happened if e["event"] in told]


def measure(pooled, parts, sets: Sets) -> dict[str, Any]:
    """The method's part of metrics.json for one seed, without the seconds."""
    score = lambda name: bc.evaluate(pooled[name], sets.asked[name][1], METRICS)
    shift = {kind: {str(s): score((kind, s)) for s in SEVERITIES} for kind in SHIFTS}
    decomposition = {}
    for name in ("test", "ood", *((kind, 5) for kind in SHIFTS)):
        label = name if isinstance(name, str) else f"{name[0]}_{name[1]}"
        decomposition[label] = {p: mean_of_rows(getattr(parts[name], p)) for p in ("total", "aleatoric", "epistemic")}
    scores = ood_scores(pooled, parts)
    return {
        "test": score("test"),
        "shift": shift,
        "ood": {f"auroc_{name}": auroc_outside(pair, sets.about.outside) for name, pair in scores.items()},
        "decomposition": decomposition,
    }


def ood_scores(pooled, parts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score -> its values on test and out of distribution; higher = more unlike the training data."""
    scores = {p: tuple(getattr(parts[name], p) for name in ("test", "ood")) for p in ("total", "epistemic", "ood")}
    maximum = tuple(-pooled[name].logits[0].max(-1) for name in ("test", "ood"))
    return {**scores, "max_probability": maximum}


def auroc_outside(pair: tuple[np.ndarray, np.ndarray], name: str) -> bc.Estimate:
    inside, outside = pair
    positive = np.arange(len(inside) + len(outside)) >= len(inside)
    return bc.auroc_estimate(np.concatenate(pair), positive, name)


def mean_of_rows(values: np.ndarray) -> bc.Estimate:
    mean, half = values.mean(dtype=float), 1.96 * values.std(dtype=float) / np.sqrt(len(values))
    return bc.Estimate(float(mean), float(mean - half), float(mean + half), len(values), "nats, mean over examples")


def compare(outcomes: dict[str, Outcome], sets: Sets) -> dict[str, Any]:
    """Paired differences between methods on one seed: values only, since their interval comes from the seeds."""
    if not {"single", "deep_ensemble"} <= set(outcomes):
        return {}
    one, many = outcomes["single"], outcomes["deep_ensemble"]
    difference = many.figures["ood"]["auroc_epistemic"].value - one.figures["ood"]["auroc_max_probability"].value
    result: dict[str, Any] = {
        "auroc_deep_ensemble_epistemic_minus_single_max_probability": bc.Estimate(
            difference, convention=f"positive class: {sets.about.outside}; above 0 = the ensemble is better"
        )
    }
    scaler = temperature(one.pooled["validation"], sets.asked["validation"][1])
    if scaler is None:
        return result
    against = {}
    for kind in SHIFTS:
        targets = sets.asked[kind, 5][1]
        log_prob = lambda pred, y=targets: np.asarray(pred.log_prob(y))
        paired = log_prob(scaler(one.pooled[kind, 5])) - log_prob(many.pooled[kind, 5])
        against[kind] = mean_of_rows(paired)._replace(convention="nats per example; below 0 = the ensemble is better")
    result["nll_severity_5_deep_ensemble_minus_temperature_scaled_single"] = against
    result["temperature_of_single"] = bc.Estimate(float(scaler.temperature), convention="fitted on validation")
    return result


def temperature(pred: bc.Categorical, targets) -> bc.Temperature | None:
    """The temperature fitted on validation; None where every validation row is right, so that none is best."""
    if (pred.logits[0].argmax(-1) == targets).all():
        return None
    return bc.fit_temperature(pred, targets)


def over_seeds(results: list[Any]) -> Any:
    """Joins trees of Estimates: one seed as it is, several as their mean with a t interval; seconds as medians.

    A figure that some seeds do not have is the mean of the others; its n says so.
    """
    if isinstance(results[0], dict):
        keys = dict.fromkeys(k for r in results for k in r)
        return {k: (median if k == "seconds" else over_seeds)([r[k] for r in results if k in r]) for k in keys}
    if len(results) == 1:
        return results[0]
    return bc.mean_over_runs([r.value for r in results], results[0].convention)


def median(results: list[dict[str, bc.Estimate]]) -> dict[str, bc.Estimate]:
    """Medians over seeds, of which the first alone compiles: a mean would mix the two, and it alone has all phases."""
    values = {phase: [r[phase].value for r in results if phase in r] for phase in results[0]}
    return {phase: bc.Estimate(float(np.median(x)), n=len(x)) for phase, x in values.items()}


def main(config: Config, folder: Path) -> dict[str, Any]:
    """Runs the comparison, writes the run's folder, prints the table, and returns what is in metrics.json."""
    about = source(config.data)
    unknown = sorted(set(config.methods) - set(RECIPES))
    if unknown or not config.methods or config.seeds < 1:
        raise ValueError(
            f"`methods` must be some of {', '.join(RECIPES)}, and `seeds` at least 1, got {', '.join(unknown) or 'none'} "
            f"and {config.seeds}. Check the spelling."
        )
    for place, name in enumerate(config.methods):
        needed = RECIPES[name].start
        if needed is not None and needed not in config.methods[:place]:
            raise ValueError(
                f"`methods` must hold {needed!r} before {name!r}, which starts from it, got {config.methods}. Add it."
            )
    began = time.perf_counter()
    checkpoints = folder / "checkpoints"  # of trainings that are not over; gone when the run is
    for old in (folder / "checkpoints.over", *([checkpoints] if config.fresh else [])):
        shutil.rmtree(old, ignore_errors=True)
    per_seed, comparisons, first, stopped, resumed = [], [], [], [], []
    methods: dict[str, bc.Method] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        sets = load_sets(config.data, seed, config.max_rows)
        outcomes = {}
        for name in config.methods:
            method = methods.setdefault(name, RECIPES[name].build(config, len(sets.train.targets)))
            start = outcomes.get(RECIPES[name].start)
            outcomes[name] = run_method(config, name, method, sets, seed, checkpoints, start)
            where = folder / "predictions" if not first else folder / "predictions" / f"seed{seed}"
            save_predictions(where / f"{name}.npz", outcomes[name].preds["test"], sets.asked["test"][1])
            print(f"seed {seed}  {name:22s} {outcomes[name].figures['seconds']['train'].value:6.1f} s", flush=True)
            stopped += [f"seed {seed}, {name}: {told}" for told in outcomes[name].fit.members.sentences()]
            resumed += resumptions(checkpoints, seed, name)
        per_seed.append({name: outcome.figures for name, outcome in outcomes.items()})
        comparisons.append(compare(outcomes, sets))
        first = first or [sets, outcomes]
    result = {
        "methods": over_seeds(per_seed),
        "comparisons": over_seeds(comparisons),
        "diverged": stopped,
        "resumed": resumed,
        "config": as_dict(replace(config, out=None)),
        "versions": versions(),
        "conventions": conventions(about),
    }
    save_json(folder / "metrics.json", result)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    write(folder, config, result, first[0], first[1])
    over = checkpoints.rename(folder / "checkpoints.over")  # at once: a kill in the midst must not leave half of it
    shutil.rmtree(over)
    print_table(result)
    print(f"{folder / 'report.html'} ({time.perf_counter() - began:.0f} s)")
    return result


def conventions(about: Source) -> dict[str, str]:
    """What the figures mean."""
    return {
        **{name: metric.convention for name, metric in METRICS.items()},
        "auroc": f"positive class: {about.outside}, against the test images; ties count one half",
        "decomposition": "nats; total = aleatoric + epistemic; epistemic = mutual information of label and member",
        "intervals": "95 %. One seed: over examples (Wilson for accuracy, normal for means, logit DeLong for AUROC; none "
        f"for ECE, whose bootstrap does not cover). Several seeds: Student's t over seeds, {about.repeats}.",
        "seconds": "wall clock of the last process; train includes first_epoch, and that compilation on the first seed, and "
        "start, the training of the network or ensemble that a method begins from; "
        "first_call = first prediction of all sets on the first seed, compilation included; predict = without. Several "
        "seeds: medians.",
    }


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    try:
        main(*command_line(Config, sys.argv))
    except FileNotFoundError as error:
        sys.exit(str(error))
