"""How near every method's posterior comes to that of a long run of the no-U-turn sampler, on two small problems.

    python experiments/posteriors.py configs/posteriors/small.yaml [key=value ...]

`regression`: two inputs, 50 hidden units, one output, known noise, and a gap in the inputs. `classification`: three
overlapping classes of two inputs. All methods have the same data, network, normal prior, and temperature 1. Predictions are
held against the sampler's where the data are ("inside"), and in the gap and beyond the data ("outside").

Settings follow from training losses, the largest curvature, acceptance and R-hat; no distance to the sampler was looked at
to choose them.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from jax.flatten_util import ravel_pytree
from posteriors_report import REGIONS, show

import bayescal as bc
from bayescal.config import as_dict, command_line, versions
from bayescal.report import save_json

AGAIN = "nuts_again"  # independent runs as long as the reference: how large the distance of nothing is
SAMPLERS = (AGAIN, "sgld", "sghmc", "cyclical_sgld", "mclmc")
PLACES = np.linspace(-1, 1, 201, dtype=np.float32)  # where densities are held against each other
Measure = Callable[[Any], Callable[[slice], dict[str, float]]]  # predictive -> rows -> its distances to the reference


@dataclass(frozen=True)
class Config:
    """Settings of the comparison; updates are those of one network or chain."""

    problems: tuple[str, ...] = ("regression", "classification")
    methods: tuple[str, ...] = ()  # none named = all; that which one starts from is run too
    seed: int = 0
    seeds: int = 5  # repetitions of every method, on the same data
    rows: int = 100  # of training data
    asked: int = 100  # inputs inside, and as many outside
    batch_size: int = 25  # of stochastic-gradient chains, SWAG and IVON; all rows for the others
    chains: int = 4
    warmup: int = 500  # transitions of the no-U-turn sampler, and updates of MCLMC
    transitions: int = 2000  # after it
    samples: int = 500  # networks kept of each chain, of all samplers
    training: int = 5000  # updates by all rows: of networks, particles and the variational posterior
    steps: int = 60_000  # updates by minibatches; the first half is not kept
    cycles: int = 10  # of cyclical SGLD, all of which are kept
    num_members: int = 10
    particles: int = 20
    num_draws: int = 200
    out: str | None = None  # folder of the run; default runs/posteriors/<name of the yaml>


class Problem(NamedTuple):
    """Data, network and prior; inputs to ask about, those outside after those inside."""

    data: bc.Dataset
    model: bc.Model
    likelihood: Callable
    prior_precision: float
    asked: np.ndarray
    diagnosed: bc.Model  # what chains must agree on: outputs, or log probabilities
    linearised: Callable  # predictive of Laplace
    distances: Callable[[Any], Measure]


class Recipe(NamedTuple):
    """A method, how long it runs, and the name of that whose states it starts from."""

    method: bc.Method
    epochs: int
    batch_size: int
    start: str | None = None


def regression(config: Config) -> Problem:
    """sin 2a + cos(2b) / 2 with noise of standard deviation 0.2, and no data where |a| < 0.6.

    Under the prior the function has a standard deviation of about 1.3 sqrt(1 + |x|^2).
    """
    rng = np.random.default_rng(config.seed)
    noise, half = 0.2, config.asked // 2

    def inside(rows: int) -> np.ndarray:
        return rng.uniform((0.6, -2), (2, 2), size=(rows, 2)) * np.stack([rng.choice([-1, 1], rows), np.ones(rows)], -1)

    x = inside(config.rows)
    y = np.sin(2 * x[:, :1]) + 0.5 * np.cos(2 * x[:, 1:]) + noise * rng.normal(size=(config.rows, 1))
    gap = rng.uniform((-0.4, -2), (0.4, 2), size=(half, 2))
    asked = np.concatenate([inside(config.asked), gap, ring(rng, config.asked - half, 3, 5)]).astype(np.float32)
    model = bc.models.mlp(2, (50,), 1)
    data = bc.Dataset(x.astype(np.float32), y.astype(np.float32))
    return Problem(data, model, bc.homoscedastic(noise**2), 4.0, asked, model, bc.normal, regression_distances)


def classification(config: Config) -> Problem:
    """Three normal clouds of standard deviation 1, whose centres are 2.6 apart, and ten hidden units."""
    rng = np.random.default_rng(config.seed)
    angles = 2 * np.pi * np.arange(3) / 3
    centres = 1.5 * np.stack([np.cos(angles), np.sin(angles)], -1)
    clouds = lambda targets: (centres[targets] + rng.normal(size=(len(targets), 2))).astype(np.float32)
    targets = (np.arange(config.rows) % 3).astype(np.int32)
    data = bc.Dataset(clouds(targets), targets)
    beyond = ring(rng, config.asked, 5, 8).astype(np.float32)
    asked = np.concatenate([clouds(np.arange(config.asked) % 3), beyond])
    model = bc.models.mlp(2, (10,), 3)
    diagnosed = model._replace(apply=lambda v, x, key: jax.nn.log_softmax(model.apply(v, x, key)))
    linearised = bc.monte_carlo(config.num_draws)
    return Problem(data, model, bc.Categorical, 1.0, asked, diagnosed, linearised, class_distances)


def ring(rng: np.random.Generator, rows: int, inner: float, outer: float) -> np.ndarray:
    angle, radius = rng.uniform(0, 2 * np.pi, rows), rng.uniform(inner, outer, rows)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)


PROBLEMS = {f.__name__: f for f in (regression, classification)}


def regression_distances(gold: bc.Gaussian) -> Measure:
    """Of the predictive's mean, of the standard deviation of the function, and of the predictive's density."""
    mean, sd = gold.pooled_mean(), np.sqrt(bc.decompose(gold).epistemic)
    half = 6 * jnp.sqrt(gold.pooled_variance())
    density = jax.jit(lambda pred: density_around(pred, mean, half))
    known = density(gold)

    def measure(pred: bc.Gaussian) -> Callable[[slice], dict[str, float]]:
        error = np.asarray(pred.pooled_mean() - mean, np.float64)
        ratio = np.asarray(np.sqrt(bc.decompose(pred).epistemic) / sd)
        shared = np.minimum(density(pred), known).astype(np.float64).sum(0) * np.asarray(half)[:, 0]
        apart = 1 - shared * (PLACES[1] - PLACES[0])
        return lambda rows: {
            "total variation": float(apart[rows].mean()),
            "RMSE of mean": float(np.sqrt((error[rows] ** 2).mean())),
            "epistemic sd / NUTS's": float(np.median(ratio[rows])),
        }

    return measure


def density_around(pred: bc.Gaussian, mean: jax.Array, half: jax.Array) -> jax.Array:
    """(places, rows) density at mean + half * `PLACES`. Of min(p, q) = p + q - |p - q| all lies where q is not zero."""
    return jax.lax.map(lambda place: jnp.exp(pred.log_prob(mean + place * half)), PLACES)


def class_distances(gold: bc.Categorical) -> Measure:
    """Of the pooled probabilities, of their largest, and of the mutual information."""
    seen = lambda pred: (
        np.exp(np.asarray(pred.log_probs(), np.float64)),
        np.asarray(bc.decompose(pred).epistemic, np.float64),
    )
    known, known_information = seen(gold)

    def measure(pred: bc.Categorical) -> Callable[[slice], dict[str, float]]:
        probs, information = seen(pred)
        return lambda rows: {
            "total variation": float(0.5 * np.abs(probs - known)[rows].sum(-1).mean()),
            "agreement": float((probs.argmax(-1) == known.argmax(-1))[rows].mean()),
            "error of MI": float(np.abs(information - known_information)[rows].mean()),
            "MI / NUTS's": float(information[rows].mean() / known_information[rows].mean()),
        }

    return measure


def largest_curvature(problem: Problem, params) -> float:
    """Largest eigenvalue of the Hessian of -log posterior density, over all networks: what bounds steps."""

    def energy(flat, unravel):
        outputs = problem.model.apply(bc.Variables(unravel(flat)), problem.data.inputs, None)
        fit = problem.likelihood(outputs[None]).log_prob(problem.data.targets).sum()
        return 0.5 * problem.prior_precision * (flat**2).sum() - fit

    def of(params):
        flat, unravel = ravel_pytree(params)
        return jnp.linalg.eigvalsh(jax.hessian(lambda x: energy(x, unravel))(flat))[-1]

    return float(jax.lax.map(of, params).max())


def reference_recipes(config: Config, problem: Problem) -> tuple[Recipe, Recipe]:
    """Networks to start from, and the sampler."""
    rows = len(problem.data.targets)
    each = {"num_data": rows, "prior_precision": problem.prior_precision}
    network = (problem.model, problem.likelihood)
    every = config.transitions // config.samples
    single = bc.map_estimate(*network, decaying(1e-2, config.training), **each)
    chain = bc.nuts(
        *network, **each, warmup=config.warmup, num_samples=config.samples, every=every, max_num_doublings=8
    )
    return (
        Recipe(bc.ensemble(single, config.num_members), config.training, rows),
        Recipe(bc.ensemble(chain, config.chains), config.warmup + config.transitions, rows, "deep_ensemble"),
    )


def recipes(config: Config, problem: Problem, curvature: float) -> dict[str, Recipe]:
    """Every method; those that start from another come after it. Steps are shares of 1 / largest curvature."""
    rows, samples = len(problem.data.targets), config.samples
    each = {"num_data": rows, "prior_precision": problem.prior_precision}
    network, draws = (problem.model, problem.likelihood), dict[str, Any](num_draws=config.num_draws)
    members, chains = (lambda m: bc.ensemble(m, config.num_members)), (lambda m: bc.ensemble(m, config.chains))
    steps, half = config.steps, config.steps // 2
    whole = lambda method, start=None, updates=config.training: Recipe(method, updates, rows, start)
    parts = lambda method, start=None: Recipe(method, steps // -(-rows // config.batch_size), config.batch_size, start)

    deep, sampler = reference_recipes(config, problem)
    single = bc.map_estimate(*network, decaying(1e-2, config.training), **each)
    anchored = bc.anchored(*network, decaying(1e-2, config.training), **each)
    curved = partial(bc.laplace, *network, **each, predictive=problem.linearised)
    kronecker = {"structure": bc.kronecker()}
    last = {"structure": bc.full(), "subset": bc.last_layer(problem.model)}
    swag = bc.swag(*network, optax.sgd(0.5 * rows / curvature), **each, **draws, burn_in=half, every=half // samples)
    kept = {"num_samples": samples, "burn_in": half, "every": half // samples}
    time_step = 0.5 * (0.2 / curvature) ** 0.5  # of SGHMC: its friction, a tenth a step, is twice the least stable
    cycle = steps // config.cycles
    cyclical = {"cycle_length": cycle, "samples_per_cycle": samples // config.cycles, "num_samples": samples}
    canonical = {"warmup": config.warmup, "num_samples": samples, "every": config.transitions // samples}
    return {
        "single": whole(single),
        "deep_ensemble": deep,
        AGAIN: sampler,
        "anchored_ensemble": whole(members(anchored)),
        "laplace_full": whole(curved(structure=bc.full()), "single", 1),
        "laplace_kronecker": whole(curved(**kronecker), "single", 1),
        "laplace_diagonal": whole(curved(structure=bc.diagonal()), "single", 1),
        "laplace_last_layer": whole(curved(**last), "single", 1),
        "laplace_kronecker_sampled": whole(
            curved(**kronecker | {"predictive": bc.sampled(config.num_draws)}), "single", 1
        ),
        "mixture_of_laplaces": whole(members(curved(structure=bc.full())), "deep_ensemble", 1),
        "swag": parts(swag, "single"),
        "multi_swag": parts(members(swag), "deep_ensemble"),
        "sgld": parts(chains(bc.sgld(*network, **each, **kept, step_size=0.2 / curvature)), "deep_ensemble"),
        "sghmc": parts(
            chains(bc.sghmc(*network, **each, **kept, step_size=time_step, friction=0.1 / time_step)), "deep_ensemble"
        ),
        "cyclical_sgld": parts(chains(bc.cyclical_sgld(*network, **each, **cyclical, step_size=0.4 / curvature))),
        "mclmc": whole(
            chains(bc.mclmc(*network, **each, **canonical)), "deep_ensemble", config.warmup + config.transitions
        ),
        "svgd": whole(bc.svgd(*network, decaying(1e-2, config.training), **each, num_particles=config.particles)),
        "ivon": parts(
            bc.ivon(*network, **each, **draws, learning_rate=5e-3, beta2=0.999, initial_hessian=0.1 * curvature / rows)
        ),
        "variational": whole(
            bc.variational(
                *network,
                decaying(1e-2, config.training),
                num_data=rows,
                prior=bc.priors.normal(problem.prior_precision**-0.5),
                **draws,
            )
        ),
    }


def decaying(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def train(method: bc.Method, recipe: Recipe, problem: Problem, key, start) -> bc.Fit:
    settings = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "progress": False}
    return bc.fit(method, problem.data, key, start=start, **settings)


def run_reference(config: Config, problem: Problem, key) -> tuple[dict[str, Any], Any]:
    """How the sampler fared, and what it predicts."""
    networks, sampler = reference_recipes(config, problem)
    keys = jax.random.split(key, 3)
    found = train(networks.method, networks, problem, keys[0], None).state
    first = jax.tree.map(lambda x: x[: config.chains], found)
    chains = train(sampler.method, sampler, problem, keys[1], first)
    after = {k: np.asarray(v)[config.warmup :] for k, v in chains.history.items()}
    told = diagnostics(problem, chains.state) | {
        "acceptance": float(after["acceptance"].mean()),
        "divergent transitions": int(after["divergent"].sum()),
        "gradients a transition": float(after["num_steps"].mean()),
        "loss": float(after["loss"].mean()),
        "parameters": sum(x[0].size for x in jax.tree.leaves(found.members.variables.params)),
        "largest curvature": largest_curvature(problem, found.members.variables.params),
    }
    return told, bc.predict(sampler.method, chains.state, problem.asked, keys[2])


def diagnostics(problem: Problem, state) -> dict[str, Any]:
    """Of one ensemble of chains: R-hat and effective sample size of what its networks say of every fifth input."""
    return bc.chain_diagnostics(problem.diagnosed, state, problem.asked[::5]).worst()


def repeat(recipe: Recipe, problem: Problem, seeds: int, key, before) -> tuple[bc.Fit, list]:
    """All seeds of a method as one program, and each one's predictive."""
    method, members = bc.experiments(recipe.method, seeds), recipe.method.members
    if before is not None and members is not None:  # chains start from the first networks
        before = jax.tree.map(lambda x: x[:, : members.number], before)
    train_key, predict_key = jax.random.split(key)
    fitted = train(method, recipe, problem, train_key, before)
    pred = bc.predict(method, fitted.state, problem.asked, predict_key)
    return fitted, [bc.take(pred, seed) for seed in range(seeds)]


def study(config: Config, problem: Problem, key) -> dict[str, Any]:
    """The reference, and over the seeds every method's distances to it."""
    check_names("methods", config.methods, recipes(config, problem, 1.0))
    reference, gold = run_reference(config, problem, jax.random.fold_in(key, 0))
    measure, states = problem.distances(gold), {}
    methods: dict[str, dict[str, Any]] = {}
    regions = dict(zip(REGIONS, (slice(config.asked), slice(config.asked, None)), strict=True))
    every = recipes(config, problem, reference["largest curvature"])
    asked = config.methods or every
    needed = {*asked, *(every[name].start for name in asked)}
    for place, (name, recipe) in enumerate(every.items(), start=1):
        if name not in needed:
            continue
        began = time.perf_counter()
        before = None if recipe.start is None else states[recipe.start]
        fitted, preds = repeat(recipe, problem, config.seeds, jax.random.fold_in(key, place), before)
        states[name] = fitted.state
        alive = np.array([members.any() for members in fitted.members.alive])
        measured = [measure(pred) for pred, lives in zip(preds, alive, strict=True) if lives]
        found = {region: [of(rows) for of in measured] for region, rows in regions.items()}
        methods[name] = {
            region: {k: bc.mean_over_runs([run[k] for run in runs]) for k in runs[0]} for region, runs in found.items()
        }
        loss = np.asarray(fitted.history["loss"])
        methods[name]["loss"] = float(
            loss[-max(len(loss) // 10, 1) :][:, alive].mean()
        )  # nats an example, of the last tenth
        methods[name]["diverged"] = int((~alive).sum())  # seeds, which the means leave out
        if name in SAMPLERS:
            each = [diagnostics(problem, jax.tree.map(lambda x, e=e: x[e], fitted.state)) for e in range(config.seeds)]
            methods[name]["r_hat"] = max(x["r_hat"].value for x in each)
            methods[name]["ess"] = min(x["ess"].value for x in each)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return {"reference": reference, "methods": methods}


def check_names(setting: str, given, known) -> None:
    unknown = ", ".join(x for x in given if x not in known)
    if unknown:
        raise ValueError(f"`{setting}` must be some of {', '.join(known)}, got {unknown}. Check the spelling.")


def main(config: Config, folder: Path) -> dict[str, Any]:
    """Runs both problems, prints their tables, and returns what is in metrics.json."""
    check_names("problems", config.problems, PROBLEMS)
    key, problems = jax.random.key(config.seed), {}
    result = {"problems": problems, "config": as_dict(replace(config, out=None)), "versions": versions()}
    for name in config.problems:
        problems[name] = study(config, PROBLEMS[name](config), key)
        save_json(folder / "metrics.json", result)
        show(name, problems[name], config.seeds, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    return result


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
