"""Data that stay on the host: the rows of a block of steps are gathered while the device works on the block before."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bayescal.liveness import tree_bytes
from bayescal.memory import device_budget
from bayescal.sharding import fetch, place
from bayescal.train.member import Rows, Steps
from bayescal.train.rows import Stacked

SHARE = 0.5  # data that would take more of a device's budget stream
BLOCK_BYTES = 2**28  # of a block on the device, where steps are not given


def block_steps(train: Stacked, stream: int | None, runners: int, batch_size: int, steps: int) -> int | None:
    """Steps a block, or None where all data go to the device: asked for, or because they do not fit.

    Raises:
        ValueError: for a number below 1.
    """
    if stream is not None:
        if isinstance(stream, bool) or not isinstance(stream, int) or stream < 1:
            raise ValueError(
                f"`stream` must be a whole number of steps of at least 1, or None, got {stream!r}. None streams what "
                "does not fit."
            )
        return min(stream, steps)
    held = sum(x.nbytes for x in jax.tree.leaves(train.data) if hasattr(x, "nbytes"))
    if held <= SHARE * device_budget():
        return None
    a_step = runners * batch_size * tree_bytes(jax.tree.map(lambda x: x[:1], train.data))
    return max(1, min(steps, BLOCK_BYTES // max(a_step, 1)))


class Blocks:
    """A source of blocks for grain: entry i is the rows of the i-th block of steps of every member.

    Args:
        train: the data, numpy arrays or memory maps.
        which: (runner,) each one's data set.
        index: (runner, steps, batch) rows of an epoch.
        size: steps a block.
    """

    def __init__(self, train: Stacked, which: np.ndarray, index: np.ndarray, size: int):
        self.data = train.data
        self.place = index + (which * train.rows)[:, None, None]
        self.ends = np.array_split(np.arange(index.shape[1]), -(-index.shape[1] // size))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        place = self.place[:, self.ends[index]]
        return tuple(
            jax.tree.map(lambda x: np.asarray(x[place]), part) for part in (self.data.inputs, self.data.targets)
        )


def stream_epoch(train: Stacked, which: np.ndarray, steps: Steps, size: int, mesh: Mesh | None) -> Iterator[Steps]:
    """The steps of an epoch in blocks that bring their rows; read ahead by grain's threads.

    Raises:
        ImportError: without grain.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "`stream` needs grain, which reads ahead, and it is not installed. Install it: pip install bayescal[stream]."
        ) from error
    host = jax.tree.map(np.asarray, fetch(steps))
    which = np.resize(which, len(host.index))  # what fills up the devices never trains: any data set will do
    source = Blocks(train, which, host.index, size)
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    for number, (inputs, targets) in zip(
        source.ends, grain.MapDataset.source(source).to_iter_dataset(reading), strict=True
    ):
        block = jax.tree.map(lambda x, number=number: x[:, number], host)
        rows = place((inputs, targets), mesh, "member")
        yield Steps(*place(tuple(block)[:3], mesh, "member"), *rows)


def resident(train: Stacked, streams: bool) -> Rows:
    """What of the data goes to the device: all, or the weights alone."""
    return Rows(None, None, train.data.weights) if streams else train.data
