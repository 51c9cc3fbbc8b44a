"""How long predicting takes: Monte-Carlo dropout and ensembles, against PyTorch, in turn in one process.

    python experiments/bench_prediction.py configs/bench_prediction/cpu.yaml [key=value ...]

From rows on the host to the logits of all networks, by `bc.predict` with its checks, and by PyTorch's modules in inference
mode with the same weights. Ours draws one mask a draw; PyTorch's dropout one a row, which takes most of its time, and one a
draw (of each batch) in the forms that say so. Wall clock, all cores. `pip install bayescal[bench]` is all peers.
"""

import importlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from bench import entry, installed, interleaved, publish

import bayescal as bc
from bayescal.config import command_line

PEERS = ("torch",)
DROPOUT = 0.5


def library(name: str) -> Any:
    return importlib.import_module(name)


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


def torch_network(torch, name: str, params: dict, draw_masks: bool = False) -> tuple:
    """The network with our weights, in two parts: what comes before the first dropout, and the rest."""
    nn = torch.nn

    class DrawDropout(nn.Dropout):
        """One mask for all rows of a call, where PyTorch's own draws one a row."""

        def forward(self, x):
            if not self.training:
                return x
            return x * (torch.empty(x.shape[-1]).bernoulli_(1 - self.p) / (1 - self.p))

    def dense(own, kernel=None):
        kernel = own["kernel"] if kernel is None else kernel
        layer = nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(own["bias"])
        return layer

    def convolution(own, padding):
        kernel = own["kernel"].transpose(3, 2, 0, 1)
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], padding=padding)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.copy()), torch.tensor(own["bias"])
        return layer

    layers = list(params["dense"].values())
    if name != "lenet":
        dropout = [(DrawDropout if draw_masks else nn.Dropout)(DROPOUT)] * (name == "mc_dropout")
        rest = [*dropout, dense(layers[1]), nn.ReLU(), *dropout, dense(params["head"])]
        return nn.Sequential(dense(layers[0]), nn.ReLU()), nn.Sequential(*rest)
    first, second = params["conv"].values()
    kernel = layers[0]["kernel"]  # of pixels with their channels last; PyTorch's come first
    kernel = kernel.reshape(5, 5, 16, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    pooled = [nn.MaxPool2d(2), nn.ReLU()]
    body = [convolution(first, 2), *pooled, convolution(second, 0), *pooled, nn.Flatten()]
    rest = [dense(layers[0], kernel), nn.ReLU(), dense(layers[1]), nn.ReLU(), dense(params["head"])]
    return nn.Sequential(*body), nn.Sequential(*rest)


class Form(NamedTuple):
    """A way to predict with PyTorch: rows at a time (0 = all), threads, workers that share the rows, and what is reused.

    draw_masks: one mask a draw for all rows, as ours; else one a row.
    """

    batch: int = 0
    threads: int = 1
    workers: int = 1
    prefix: bool = False
    channels_last: bool = False
    draw_masks: bool = False

    def name(self) -> str:
        words = ["a mask a draw"] * self.draw_masks + ["prefix reused"] * self.prefix
        words += ["channels last"] * self.channels_last
        words += [f"batches of {self.batch}"] * (self.batch > 0)
        count = f"{self.workers} workers" if self.workers > 1 else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return ", ".join(["torch", *words, count])


def forms_of(name: str, config: Config) -> list[Form]:
    """Every combination that may be PyTorch's best."""
    runs = [(threads, 1) for threads in config.threads] + [(1, workers) for workers in config.threads if workers > 1]
    ways = {
        "mc_dropout": [(False, False, False), (True, False, False), (True, False, True)],
        "lenet": [(False, False, False), (False, True, False)],
        "mlp": [(False, False, False)],
    }[name]
    return [
        Form(batch, threads, workers, *way)
        for way in ways
        for batch in (0, *config.batches)
        for threads, workers in runs
    ]


def torch_form(name: str, form: Form) -> Callable:
    """Case -> what predicts; with `mean` dropout is off."""

    def make(case: Case, config: Config) -> Callable:
        torch = library("torch")
        layout = {"memory_format": torch.channels_last} if form.channels_last else {}
        networks = [
            [part.to(**layout) for part in torch_network(torch, name, own, form.draw_masks)] for own in case.parameters
        ]
        rows = torch.tensor(case.inputs)
        rows = rows.permute(0, 3, 1, 2).contiguous(**layout) if rows.ndim == 4 else rows

        def of(rows, mean):
            drawn = config.draws if name == "mc_dropout" and not mean else 1
            outputs = []
            for before, after in networks:
                before.train(not mean)
                after.train(not mean)
                shared = before(rows) if form.prefix else None
                outputs += [after(before(rows) if shared is None else shared) for _ in range(drawn)]
            return torch.stack(outputs)

        @torch.inference_mode()
        def share(rows, mean=False):
            torch.set_num_threads(form.threads)
            return torch.cat([of(part, mean) for part in (rows.split(form.batch) if form.batch else [rows])], 1)

        def predict(mean=False):
            if form.workers == 1:
                return share(rows, mean)
            parts = rows.chunk(form.workers)
            return torch.cat(list(pool.map(lambda part: share(part, mean), parts)), 1)

        pool = ThreadPoolExecutor(form.workers)
        return predict

    return make


def against_torch(name: str, config: Config, absent: dict[str, str]) -> list[dict]:
    """Ours and every form of PyTorch, and how far the networks without dropout differ."""
    case = case_of(name, config)
    makers = {form.name(): torch_form(name, form) for form in forms_of(name, config)}
    peers = installed(makers, absent, case, config)
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
