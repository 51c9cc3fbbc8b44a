"""What `fit` is given, checked and laid out: data sets one after another, row weights with mean one."""

from numbers import Integral
from typing import NamedTuple

import jax
import numpy as np

from bayescal.data.checks import check_dataset
from bayescal.methods.resample import member_rows
from bayescal.train.member import Rows
from bayescal.types import Dataset


class Stacked(NamedTuple):
    """Data sets of all experiments on the host, one after another on the row axis; each is kept once.

    rows: of each data set, the longest; shorter ones are filled up with rows of weight 0.
    data: inputs, targets and relative weights, each (data sets * rows, ...).
    which: (experiment,) place of each experiment's data set; one entry where all share one.
    lengths: rows of each data set that are its own.
    """

    rows: int
    data: Rows
    which: np.ndarray
    lengths: list[int]


def stack(data: Dataset | list[Dataset], name: str, experiments: int | None) -> Stacked:
    """Checks the data and joins those of several experiments.

    Raises:
        ValueError: for unusable data, or a list of another length than the number of experiments.
        TypeError: for data that are no Dataset.
    """
    if not isinstance(data, list):
        rows = check_dataset(data, name)
        return Stacked(
            rows, Rows(data.inputs, data.targets, _relative_weights(data, rows)), np.zeros(1, np.int32), [rows]
        )
    if experiments is None or len(data) != experiments:
        raise ValueError(
            f"`{name}` must be a Dataset, or for a method of `experiments` a list with one for each, got a list of "
            f"{len(data)} for {experiments or 'no'} experiments. Pass one data set, or one each."
        )
    kept = {id(d): d for d in data}
    places = {key: i for i, key in enumerate(kept)}
    lengths = [check_dataset(d, f"{name}[{i}]") for i, d in enumerate(kept.values())]
    rows = max(lengths)
    fill = lambda x: np.asarray(x)[np.arange(rows) % len(x)]  # rows of its own, of weight 0
    parts = []
    for d, length in zip(kept.values(), lengths, strict=True):
        weights = np.ones(length) if d.weights is None else np.asarray(d.weights)
        weights = np.concatenate([weights, np.zeros(rows - length)])
        filled = Dataset(jax.tree.map(fill, d.inputs), jax.tree.map(fill, d.targets), weights)
        parts.append(Rows(filled.inputs, filled.targets, _relative_weights(filled, rows)))
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return Stacked(rows, joined, np.array([places[id(d)] for d in data], np.int32), lengths)


def separate(stacked: Stacked) -> Rows:
    """The same with a leading axis for the data set: (data sets, rows, ...)."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, stacked.rows, *np.shape(x)[1:]), stacked.data)


def own_weights(resample, keys, stacked: Stacked, which: np.ndarray):
    """Each runner's row weights, drawn by itself over its own rows and times those of the data, with mean one.

    Raises:
        ValueError: for weights of another shape, negative or not finite, or where a member drew only rows of weight 0.
    """
    weights = np.zeros((len(which), stacked.rows))
    lengths = np.asarray(stacked.lengths)[which]
    for length in np.unique(lengths):
        own = lengths == length
        drawn = np.asarray(member_rows(resample, keys[own], int(length)), np.float64)
        if drawn.shape != (own.sum(), length) or not np.isfinite(drawn).all() or (drawn < 0).any():
            raise ValueError(
                f"`resample` must give one finite weight of at least 0 for each of the {length} rows, got shape "
                f"{drawn.shape[1:]} with minimum {drawn.min()}. See `bc.bootstrap`."
            )
        weights[own, :length] = drawn
    weights = weights * np.asarray(stacked.data.weights).reshape(-1, stacked.rows)[which]
    mean = weights.mean(1, keepdims=True)
    if not (mean > 0).all():
        raise ValueError(
            f"`resample` must leave every member a row of positive weight, got none for member "
            f"{int((mean[:, 0] > 0).argmin())}. Take a larger share, or another key."
        )
    return (weights / mean).astype(np.float32)


def check_schedule(epochs, batch_size, rows: int) -> None:
    """Raises unless `epochs` and `batch_size` are whole numbers that fit the data."""
    if not isinstance(epochs, Integral) or int(epochs) < 1:
        raise ValueError(
            f"`epochs` must be a whole number of at least 1, got {epochs!r}. Pass how many passes to make."
        )
    if not isinstance(batch_size, Integral) or not 1 <= int(batch_size) <= rows:
        raise ValueError(
            f"`batch_size` must be a whole number from 1 to the {rows} rows of the data, got {batch_size!r}. "
            "Choose a smaller batch."
        )


def _relative_weights(data: Dataset, rows: int) -> np.ndarray:
    """Row weights with mean one, so that a loss stays per example whatever their scale."""
    if data.weights is None:
        return np.ones(rows, np.float32)
    weights = np.asarray(data.weights, np.float64)
    return (weights / weights.mean()).astype(np.float32)
