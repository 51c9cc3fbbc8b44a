"""What `compare_methods.py` trains on and asks about: splits by seed, test images under shift, and images unlike any learnt."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import bayescal as bc
from bayescal.data import OpenSplit

SHIFTS = ("noise", "rotation", "contrast")  # of `bc.data.DIGITS`, whose strengths suit grey pictures on black
SEVERITIES = (1, 2, 3, 4, 5)


class Source(NamedTuple):
    """A data set of the comparison, and how the report speaks of it.

    split: `seed -> OpenSplit`; its `unseen` are the images out of distribution.
    features: numbers of an image.
    classes: what a network tells apart.
    shifted: how many of the test images are shown under shift; None = all.
    title: of the report.
    learnt: what networks learn.
    strangers: what is out of distribution, after its number.
    outside: the same in a few words: the positive class of an AUROC.
    label: the same in one word, to stand before "images" and "digits".
    repeats: what seeds share, and what their intervals are therefore for.
    """

    split: Callable[[int], OpenSplit]
    features: int
    classes: int
    shifted: int | None
    title: str
    learnt: str
    strangers: str
    outside: str
    label: str
    repeats: str


class Sets(NamedTuple):
    """What every method learns from, and is asked about, in one array so that prediction compiles once.

    asked: name -> (inputs, targets); names are "validation", "test", (shift, severity) and "ood".
    """

    about: Source
    train: bc.Dataset
    validation: bc.Dataset
    asked: dict[Any, tuple[np.ndarray, np.ndarray]]


def fashion(seed: int) -> OpenSplit:
    """10,000 training and 5,000 validation rows, equally many of each class, of Fashion-MNIST's 60,000; its 10,000 test
    images; 5,000 of MNIST's 10,000, of which the first half are known as the cleaner one."""
    from sklearn.model_selection import train_test_split

    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).absolute()
    rows, test, mnist = (read(folder / name) for name in ("fashion_mnist/train", "fashion_mnist/t10k", "mnist/t10k"))
    settings: dict[str, Any] = {"stratify": rows.targets, "random_state": seed}
    parts = train_test_split(np.arange(len(rows.targets)), train_size=10_000, test_size=5_000, **settings)
    train, validation = (bc.Dataset(rows.inputs[own], rows.targets[own]) for own in parts)
    strangers = np.random.default_rng(seed).permutation(len(mnist.targets))[:5_000]
    return OpenSplit(train, validation, test, bc.Dataset(mnist.inputs[strangers], mnist.targets[strangers]))


@cache  # seeds draw from the same file
def read(start: Path) -> bc.Dataset:
    try:
        return bc.data.load_images(f"{start}-images-idx3-ubyte.gz", f"{start}-labels-idx1-ubyte.gz")
    except FileNotFoundError as error:
        remedy = "Set BAYESCAL_DATA to the folder of the image files, or run `data=digits`."
        raise FileNotFoundError(f"{error} {remedy}") from error


DATA = {
    "digits": Source(
        bc.data.digits,
        features=64,
        classes=8,
        shifted=None,
        title="Uncertainty methods on digits with two unseen classes",
        learnt="scikit-learn's digits: classes 0 to 7 are learnt",
        strangers="images of 8 and 9 are never seen in training",
        outside="unseen digits 8 and 9",
        label="unseen",
        repeats="each with its own split; splits share images, so that the intervals are for the mean over splits of this "
        "data set",
    ),
    "fashion": Source(
        fashion,
        features=784,
        classes=10,
        shifted=2_000,
        title="Uncertainty methods on Fashion-MNIST, with MNIST out of distribution",
        learnt="Fashion-MNIST: all ten classes are learnt",
        strangers="images of MNIST are out of distribution",
        outside="MNIST digits",
        label="MNIST",
        repeats="each with its own training and validation rows and half of MNIST's test images; the other images asked "
        "about are the same, so that the intervals are for the mean over draws of the training rows",
    ),
}


def source(name: str) -> Source:
    if name not in DATA:
        raise ValueError(f"`data` must be one of {', '.join(DATA)}, got {name!r}. Check the spelling.")
    return DATA[name]


def load_sets(name: str, seed: int, max_rows: int | None = None) -> Sets:
    about = source(name)
    train, validation, test, unseen = (first(part, max_rows) for part in about.split(seed))
    asked: dict[Any, tuple] = {"validation": validation[:2], "test": test[:2]}
    shown = first(test, about.shifted)
    for kind in SHIFTS:
        for severity in SEVERITIES:
            shifted = bc.data.corrupt(kind, shown.inputs, severity, jax.random.key(seed), severities=bc.data.DIGITS)
            asked[kind, severity] = (np.asarray(shifted), shown.targets)
    return Sets(about, train, validation, {**asked, "ood": unseen[:2]})


def first(data: bc.Dataset, number: int | None) -> bc.Dataset:
    return bc.Dataset(data.inputs[:number], data.targets[:number])
