"""How long taking a predictive apart takes: total, aleatoric and epistemic entropy, against PyTorch, in turn in one process.

    python experiments/bench_decomposition.py configs/bench_decomposition/cpu.yaml [key=value ...]

Ours is the accurate form, whose mutual information is right to 1e-6 and never negative; the peers' is a difference of
entropies, which is neither. Wall clock, all cores. `pip install bayescal[bench]` and `torch-uncertainty` are all peers.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench import entry, interleaved, publish

import bayescal as bc
from bayescal.config import command_line
from bayescal.decompose import decompose_draws
from bayescal.decompose.draws import BLOCK_NUMBERS, TOGETHER, _decompose_draws

PEERS = ("torch", "torch-uncertainty")


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    shapes: tuple[tuple[int, int, int], ...] = ((10, 200_000, 10), (10, 2_000, 1_000))  # members, rows, classes
    torch_blocks: tuple[int, ...] = (
        500,
        5_000,
    )  # rows x classes / 1000 of a block by hand, tried in turn: the best counts
    compiled: bool = True  # torch.compile, whose first call takes most of a minute
    draws: int = 100  # of the streamed case
    stream: tuple[int, int] = (2_000, 1_000)  # its rows and classes
    rounds: int = 9
    out: str | None = None


def no_score(pred):
    """In place of an out-of-distribution score, which the peers do not compute either."""
    return jnp.zeros(pred.batch_shape)


def ours(logits: np.ndarray) -> Callable:
    pred = bc.Categorical(jnp.asarray(logits))
    return lambda: bc.decompose(pred, ood=no_score)


def torch_parts(torch):
    """What one writes: entropy of the mean, mean of entropies, and their difference."""

    def parts(logits):
        log_probs = torch.log_softmax(logits, -1)
        probs = log_probs.exp()
        mean = probs.mean(0)
        total, own = -(mean * mean.log()).sum(-1), -(probs * log_probs).sum(-1).mean(0)
        return total, own, total - own

    return parts


def torch_naive(logits: np.ndarray) -> Callable:
    torch: Any = importlib.import_module("torch")
    parts, values = torch_parts(torch), torch.from_numpy(logits)
    return lambda: parts(values)


def torch_blocked(size: int) -> Callable:
    def make(logits: np.ndarray) -> Callable:
        torch: Any = importlib.import_module("torch")
        parts, values = torch_parts(torch), torch.from_numpy(logits)
        rows = max(1, size * 1000 // logits.shape[2])

        def by_hand():
            found = [parts(values[:, i : i + rows]) for i in range(0, values.shape[1], rows)]
            return [torch.cat(x) for x in zip(*found, strict=True)]

        return by_hand

    return make


def torch_compiled(logits: np.ndarray) -> Callable:
    torch: Any = importlib.import_module("torch")
    parts, values = torch.compile(torch_parts(torch)), torch.from_numpy(logits)
    return lambda: parts(values)


def torch_uncertainty(logits: np.ndarray) -> Callable:
    """Its two metrics, which average over rows: entropy of the mean, and mutual information."""
    torch: Any = importlib.import_module("torch")
    metrics: Any = importlib.import_module("torch_uncertainty.metrics.classification")
    probs = torch.softmax(torch.from_numpy(logits), -1)
    by_row = probs.transpose(0, 1)  # its layout: rows, members, classes

    def both():
        entropy, information = metrics.Entropy(), metrics.MutualInformation()
        entropy.update(probs.mean(0))
        information.update(by_row)
        return entropy.compute(), information.compute()

    return both


def against_peers(config: Config, shape: tuple[int, int, int], absent: dict[str, str]) -> list[dict]:
    """Ours and every peer on normal logits of standard deviation 2, and beside them a copy and an exponential."""
    logits = 2 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    makers = {"torch": torch_naive, "torch-uncertainty (of probabilities)": torch_uncertainty}
    makers |= {f"torch, blocks of {size} k": torch_blocked(size) for size in config.torch_blocks}
    if config.compiled:
        makers["torch.compile"] = torch_compiled
    forms = {"ours": ours(logits), **machine(logits)}
    own = list(forms)
    for peer, make in makers.items():
        try:
            forms[peer] = make(logits)
        except ImportError as error:
            absent[peer] = str(error)
    seconds = interleaved(forms, config.rounds, time.perf_counter)
    case = "decompose, [{}, {}, {}]".format(*shape)
    phase = lambda peer: "floor" if peer in own else "steady"
    found = [entry(case, peer, seconds["ours"], seconds[peer], phase=phase(peer)) for peer in forms if peer != "ours"]
    return [line | {"ns_per_logit": 1e9 * line["ours_seconds"] / logits.size} for line in found]


def machine(logits: np.ndarray) -> dict[str, Callable]:
    """What this machine needs at the least: to copy the logits, and to take the exponential of each."""
    values, target = jnp.asarray(logits), np.empty_like(logits)
    exponential = jax.jit(lambda x: jnp.exp(x).sum((0, 2)))
    return {"exponential alone": lambda: exponential(values), "numpy copy": lambda: np.copyto(target, logits)}


def draw(network, inputs):
    """One draw of a posterior over linear networks."""
    return bc.Categorical((inputs @ network)[None])


def streamed(config: Config) -> list[dict]:
    """Draws predicted and folded in a few at a time, against the same draws all there at once."""
    number, classes = config.stream
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((number, 64), np.float32))
    networks = jnp.asarray(rng.standard_normal((config.draws, 64, classes), np.float32) / 4)
    predict = jax.jit(lambda: jax.lax.map(lambda network: draw(network, inputs).logits[0], networks))
    forms = {
        "ours": lambda: decompose_draws(draw, networks, inputs),
        "all draws at once": lambda: bc.decompose(bc.Categorical(predict()), ood=no_score),
    }
    seconds = interleaved(forms, max(1, config.rounds // 3), time.perf_counter)
    size = min(number, max(1, BLOCK_NUMBERS // (TOGETHER * classes)))
    memory = _decompose_draws.lower(draw, size, config.draws, networks, inputs, ()).compile().memory_analysis()
    assert memory is not None
    line = entry(f"streamed, [{config.draws}, {number}, {classes}]", "all draws at once", *seconds.values())
    return [line | {"memory_share": memory.temp_size_in_bytes / (4 * config.draws * number * classes)}]


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every case, and writes what it found."""
    absent: dict[str, str] = {}
    entries = [line for shape in config.shapes for line in against_peers(config, shape, absent)] + streamed(config)
    share = next(line["memory_share"] for line in entries if "memory_share" in line)
    speed = {line["case"]: line["ns_per_logit"] for line in entries if "ns_per_logit" in line}
    about = (
        f"Wall clock, medians of {config.rounds} rounds in turn, {len(jax.devices())} devices. Ratios are peer / ours of the "
        "same round, median [range]: above 1 = ours is faster; of the exponential alone and the copy, what share of ours they "
        f"take. Nanoseconds per logit: {', '.join(f'{case}: {x:.2f}' for case, x in speed.items())}. Beside inputs and "
        f"result the streamed form (a third of the rounds) takes {share:.4f} of the memory of all draws."
    )
    print(about)
    return publish(entries, folder, title="Decomposition against PyTorch", about=about, peers=PEERS, absent=absent)


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
