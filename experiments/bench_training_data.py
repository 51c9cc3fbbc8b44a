"""What the training benchmark trains on: its cases and their rows. No jax, so that a peer's process imports none."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Rows = tuple[np.ndarray, np.ndarray]  # inputs float32 (rows, *shape); targets float32 (rows, 1), or int32 (rows,)
SHAPES = {"regression": (8,), "mlp": (784,), "lenet": (28, 28, 1), "baseline": (28, 28, 1), "block": (16, 16, 3)}
LEARNING_RATE = 1e-3  # of Adam, on both sides
CLASSES, WRONG, NOISE = 10, 0.2, 0.3  # share of labels that are random, so that no loss comes near zero; of the inputs


class Case(NamedTuple):
    """One training: members of one network, each on its own shuffled batches.

    network: a key of `SHAPES`.
    experiments: splits, each with its own members; None = one data set.
    width: of the two hidden layers of "mlp".
    """

    network: str
    members: int
    batch_size: int
    rows: int
    epochs: int
    experiments: int | None = None
    width: int = 200

    @property
    def convolutional(self) -> bool:
        return len(SHAPES[self.network]) > 1

    @property
    def jobs(self) -> list[int]:
        """The data set of every network that is trained."""
        return [e for e in range(self.experiments or 1) for _ in range(self.members)]

    @property
    def steps(self) -> int:
        """Updates of one network."""
        return self.epochs * -(-self.rows // self.batch_size)

    def smaller(self, rows: int | None, epochs: int | None) -> "Case":
        """The same with no more than so many rows and epochs."""
        rows, epochs = min(rows or self.rows, self.rows), min(epochs or self.epochs, self.epochs)
        return self._replace(rows=rows, epochs=epochs, batch_size=min(self.batch_size, rows))


CASES = {
    "regression": Case("regression", 5, 32, 927, 40),
    "regression_20x5": Case("regression", 5, 32, 927, 40, experiments=20),
    "mlp_m1": Case("mlp", 1, 128, 2560, 12),
    "mlp_m4": Case("mlp", 4, 128, 2560, 6),
    "mlp_m16": Case("mlp", 16, 128, 2560, 2),
    "mlp_m64": Case("mlp", 64, 128, 2560, 1),
    "lenet_m4": Case("lenet", 4, 128, 1024, 2),
    "lenet_m16": Case("lenet", 16, 128, 1024, 1),
    "lenet_baseline": Case("baseline", 4, 256, 1024, 2),
    "lenet_baseline_m1": Case("baseline", 1, 256, 1024, 4),
    "block": Case("block", 4, 128, 1024, 2),
}


def rows_of(case: Case) -> list[Rows]:
    """The training rows of each data set; the same every time."""
    if case.network != "regression":
        return [images(SHAPES[case.network], case.rows)]
    return [(x[: case.rows], y[: case.rows]) for x, y in splits()[: case.experiments or 1]]


def images(shape: tuple[int, ...], rows: int) -> Rows:
    """Ten coarse patterns under noise; a fifth of the labels is drawn at random."""
    rng = np.random.default_rng(0)
    height, width, depth = shape if len(shape) == 3 else (28, 28, 1)
    coarse = rng.standard_normal((CLASSES, height // 4, width // 4, depth), np.float32)
    patterns = coarse.repeat(4, 1).repeat(4, 2)
    labels = rng.integers(0, CLASSES, rows)
    inputs = patterns[labels] + NOISE * rng.standard_normal((rows, height, width, depth), np.float32)
    labels = np.where(rng.random(rows) < WRONG, rng.integers(0, CLASSES, rows), labels)
    return inputs.reshape(rows, *shape), labels.astype(np.int32)


def concrete_file() -> Path:
    return Path(os.environ.get("BAYESCAL_DATA", "../shared/data")) / "uci_regression" / "concrete.npz"


def splits() -> list[Rows]:
    """Training rows of 20 splits, standardised: UCI concrete as split by Gal, else a synthetic set of its size."""
    rng = np.random.default_rng(0)
    if concrete_file().is_file():
        stored: Any = np.load(concrete_file())
        inputs, targets = (stored["data"][:, stored[name]] for name in ("index_features", "index_target"))
        chosen = stored["index_train"]
    else:
        inputs = rng.uniform(-1, 1, (1030, 8))
        targets = np.sin(3 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] + 0.2 * rng.standard_normal(1030)
        chosen = [rng.permutation(1030)[:927] for _ in range(20)]
    return [(_standard(inputs[rows]), _standard(targets[rows].reshape(-1, 1))) for rows in chosen]


def _standard(x: np.ndarray) -> np.ndarray:
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)
