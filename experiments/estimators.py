"""How noisy is the gradient? Local reparametrisation, Flipout and shared noise in networks of variational layers.

    python experiments/estimators.py configs/estimators/cpu.yaml [key=value ...]

A batch of digits, a network as it is initialised, all posterior scales the same: the variance over keys of the gradient of mean
nll + KL / rows, summed over all parameters, relative to that of local reparametrisation; means over networks and batches.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bayescal as bc
from bayescal.config import as_dict, command_line, versions
from bayescal.methods.map_estimate import one_member
from bayescal.report import save_json

ESTIMATORS = ("local_reparametrisation", "flipout", "shared_noise")  # of `bc.models`


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    hidden: tuple[int, ...] = (256, 256)
    batch_sizes: tuple[int, ...] = (32, 128)
    scales: tuple[float, ...] = (0.01, 0.05)  # standard deviation of every weight
    keys: int = 200
    seeds: int = 5  # networks, splits and batches
    out: str | None = None


def variance(model: bc.Model, num_data: int, variables: bc.Variables, batch: bc.Dataset, keys) -> jax.Array:
    """Of the gradient, over keys, summed over parameters; each key's gradient is folded in and forgotten."""

    def objective(params, key):
        outputs, _, kl = model.train(variables._replace(params=params), batch.inputs, key)
        return -bc.Categorical(one_member(outputs)).log_prob(batch.targets).mean() + kl / num_data

    def fold(sums, key):
        gradient = jax.grad(objective)(variables.params, key)
        count, mean, squares = sums
        count = count + 1
        moved = jax.tree.map(lambda m, g: m + (g - m) / count, mean, gradient)
        parts = jax.tree.map(lambda g, m, new: jnp.sum((g - m) * (g - new)), gradient, mean, moved)
        return (count, moved, squares + sum(jax.tree.leaves(parts))), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, variables.params), jnp.zeros(()))
    count, _, squares = jax.lax.scan(fold, start, keys)[0]
    return squares / (count - 1)


def ratios(config: Config, rows: int, scale: float) -> dict[str, bc.Estimate]:
    """Of every estimator's variance to local reparametrisation's."""
    runs: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    num_data = len(bc.data.digits(0).train.targets)
    for name in ESTIMATORS:
        settings: dict[str, Any] = {"estimator": getattr(bc.models, name), "initial_scale": scale}
        model = bc.models.mlp(64, config.hidden, 8, dense=partial(bc.models.variational_dense, **settings))
        init, measured = jax.jit(model.init), jax.jit(partial(variance, model, num_data))
        for seed in range(config.seeds):
            train, key = bc.data.digits(seed).train, jax.random.key(seed)
            batch = bc.Dataset(train.inputs[:rows], train.targets[:rows])
            noise = jax.random.split(jax.random.fold_in(key, 1), config.keys)
            runs[name].append(float(measured(init(key), batch, noise)))
    relative = {name: np.divide(runs[name], runs[ESTIMATORS[0]]) for name in ESTIMATORS}
    return {
        name: bc.mean_over_runs(list(ratio), "relative to local reparametrisation") for name, ratio in relative.items()
    }


def main(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Measures every case, writes metrics.json, prints a line a case and returns them."""
    found = []
    for rows in config.batch_sizes:
        for scale in config.scales:
            found.append({"rows": rows, "scale": scale, "variance": ratios(config, rows, scale)})
            told = (f"{name} {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for name, e in found[-1]["variance"].items())
            print(f"{rows} rows, scale {scale}: {', '.join(told)}", flush=True)
    save_json(folder / "metrics.json", {"cases": found, "config": as_dict(config), "versions": versions()})
    return found


if __name__ == "__main__":
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
