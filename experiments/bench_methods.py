"""How long posteriors take, to make and to predict from, against the peers, in turn in one process.

    python experiments/bench_methods.py configs/bench_methods/cpu.yaml [key=value ...]

Kronecker-factored Laplace against laplace-torch, predictions of Monte-Carlo dropout against PyTorch, training steps of
variational inference against plain functions in JAX and PyTorch: each has its file, `bench_methods_<noun>.py`, which says
what is timed. Wall clock, all cores; programs are compiled beforehand. Peers: `pip install bayescal[bench]`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import bench_methods_dropout as dropout
import bench_methods_laplace as laplace
import bench_methods_variational as variational
from bench import publish

import bayescal as bc
from bayescal.config import command_line

PEERS = ("torch", "laplace-torch", "curvlinops-for-pytorch", "asdfghjkl", "optax", "numpyro")
CASES = {
    "kfac_mlp": laplace.measured,
    "kfac_convnet": laplace.measured,
    "mc_dropout": dropout.measured,
    **dict.fromkeys(variational.NETWORKS, variational.measured),
}


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    cases: tuple[str, ...] = tuple(CASES)
    rows: int = 10_000
    hidden: tuple[int, ...] = (256, 256)  # Laplace: of the perceptron
    channels: tuple[int, ...] = (16, 32)  # of the convolutional network, with one dense layer of 64
    batches: tuple[int, ...] = (128, 1000)  # rows at a time, for both
    parts: tuple[str, ...] = ("sums", "posterior")
    draws: int = 100  # dropout: networks that predict
    rates: tuple[float, ...] = (0.1, 0.2, 0.5)
    torch_batches: tuple[int, ...] = (0, 500)  # rows that go through PyTorch's network at a time; 0 = all
    epochs: int = 3  # variational: passes over the rows in one training
    threads: int = 2  # of PyTorch
    rounds: int = 5
    out: str | None = None


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every case and writes bench.json and report.html."""
    unknown = sorted(set(config.cases) - set(CASES))
    if unknown or not config.cases:
        raise ValueError(
            f"`cases` must be some of {', '.join(CASES)}, got {', '.join(unknown) or 'none'}. Check the spelling."
        )
    absent: dict[str, str] = {}
    entries = [line for name in config.cases for line in CASES[name](name, config, absent)]
    about = (
        "Wall-clock seconds: of kfac from arrays on the host to sums, or to a decomposed posterior; of mc_dropout from rows on "
        "the host to the logits of all draws; of variational of one training step. Ratios are peer / ours of the same round, "
        "median [range]: above 1 = ours is faster."
    )
    return publish(entries, folder, title="Posteriors: how long they take", about=about, peers=PEERS, absent=absent)


if __name__ == "__main__":
    bc.use_all_cores()
    bc.keep_programs()
    main(*command_line(Config, sys.argv))
