"""How long predicting takes: Monte-Carlo dropout and ensembles, against PyTorch, in turn in one process.

    python experiments/bench_prediction.py configs/bench_prediction/cpu.yaml [key=value ...]

From rows on the host to the logits of all networks, by `bc.predict` with its checks, and by PyTorch's modules in inference
mode with the same weights. Ours draws one mask a draw; PyTorch's dropout one a row, which takes most of its time, and one a
draw (of each batch) in the forms that say so. Wall clock, all cores. `pip install bayescal[bench]` is all peers.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from bench import entry, installed, interleaved, publish
from bench_prediction_torch import Form, lenet, perceptron, runs, torch_form

import bayescal as bc
from bayescal.config import command_line

PEERS = ("torch",)
DROPOUT = 0.5


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    cases: tuple[str, ...] = ("mc_dropout", "mlp", "lenet")
    rows: int = 10_000
    draws: int = 10  # of Monte-Carlo dropout
    members: int = 5  # of the ensembles
    batches: tuple[int, ...] = (500,)  # rows that go through a PyTorch network at a time, besides all at once
    threads: tuple[int, ...] = (1, 2)  # of PyTorch; with more than one also as many workers of one thread each
    rounds: int = 7
    out: str | None = None


class Case(NamedTuple):
    """A network that predicts: rows of a shape, and a method with its state."""

    inputs: np.ndarray
    method: bc.Method
    state: Any
    parameters: list[dict]  # of each network


def case_of(name: str, config: Config) -> Case:
    """Networks as they are initialised, and normal rows."""
    shape = (28, 28, 1) if name == "lenet" else (784,)
    model = {
        "mc_dropout": lambda: bc.models.mlp(784, (200, 200), 10, dropout=DROPOUT),
        "mlp": lambda: bc.models.mlp(784, (200, 200), 10),
        "lenet": lambda: bc.models.lenet((28, 28, 1), 10),
    }[name]()
    settings: Any = (model, bc.Categorical, optax.sgd(0.1))
    inputs = np.random.default_rng(0).standard_normal((config.rows, *shape)).astype(np.float32)
    key = jax.random.key(0)
    if name == "mc_dropout":
        method = bc.mc_dropout(*settings, num_draws=config.draws)
        state = jax.jit(method.init)(key, None)
        return Case(inputs, method, state, [jax.tree.map(np.asarray, state.variables.params)])
    method = bc.ensemble(bc.map_estimate(*settings), config.members)
    state = jax.jit(method.init)(key, None)
    stacked = jax.tree.map(np.asarray, state.members.variables.params)
    return Case(inputs, method, state, [jax.tree.map(lambda x, m=m: x[m], stacked) for m in range(config.members)])


def ours(case: Case) -> Callable:
    key = jax.random.key(1)
    return lambda: logits_of(case, key)


def logits_of(case: Case, key) -> jax.Array:
    pred: Any = bc.predict(case.method, case.state, case.inputs, key)
    return pred.logits


def forms_of(name: str, config: Config) -> list[Form]:
    """Every combination that may be PyTorch's best."""
    ways: list[dict[str, Any]] = {
        "mc_dropout": [{}, {"prefix": True}, {"prefix": True, "masks": "draw"}],
        "lenet": [{}, {"channels_last": True}],
        "mlp": [{}],
    }[name]
    return [
        Form(batch, threads, workers, **way)
        for way in ways
        for batch in (0, *config.batches)
        for threads, workers in runs(config.threads)
    ]


def against_torch(name: str, config: Config, absent: dict[str, str]) -> list[dict]:
    """Ours and every form of PyTorch, and how far the networks without dropout differ."""
    case = case_of(name, config)
    rate = {"rate": DROPOUT} if name == "mc_dropout" else {}
    network = lenet if name == "lenet" else partial(perceptron, **rate)
    makers = {form.name(): partial(torch_form, form, network) for form in forms_of(name, config)}
    peers = installed(makers, absent, case.parameters, case.inputs, config.draws if rate else 1)
    seconds = interleaved({"ours": ours(case), **peers}, config.rounds, time.perf_counter)
    mean = np.asarray(logits_of(case, None))
    label = (
        f"{name}, {'S' if name == 'mc_dropout' else 'M'} = {config.draws if name == 'mc_dropout' else config.members}"
    )

    def difference(peer):
        return float(np.abs(mean - peer(mean=True).numpy()).max() / np.abs(mean).max())

    return [
        entry(f"{label}, N = {config.rows}", peer, seconds["ours"], seconds[peer], difference=difference(peers[peer]))
        for peer in peers
    ]


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every case, and writes what it found."""
    absent: dict[str, str] = {}
    entries = [line for name in config.cases for line in against_torch(name, config, absent)]
    about = (
        f"Wall clock, medians of {config.rounds} rounds in turn, {len(jax.devices())} devices. Ratios are peer / ours of the "
        "same round, median [range]: above 1 = ours is faster. `workers` are Python threads that share the rows, of one "
        "PyTorch thread each. Of dropout ours draws one mask a draw, PyTorch one a row but in forms that say so. "
        "The difference is of logits without dropout, relative to the largest."
    )
    print(about)
    return publish(entries, folder, title="Prediction against PyTorch", about=about, peers=PEERS, absent=absent)


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
