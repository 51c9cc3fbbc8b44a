"""The embedded data set: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, with held-out classes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bayescal.types import Dataset


class OpenSplit(NamedTuple):
    """Train, validation and test rows of the known classes, and the images of classes that training never sees.

    `unseen.targets` are the digits themselves, which no network's outputs stand for.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    unseen: Dataset


def digits(seed: int, *, known: Sequence[int] = range(8), unseen: Sequence[int] = (8, 9)) -> OpenSplit:
    """Stratified 60 / 20 / 20 split of the known classes, and all images of the unseen ones.

    Images are float32 (rows, 8, 8, 1) in [0, 1]; targets of the known classes are 0, 1, ... in rising order of the digit.

    Args:
        seed: of the split.
        known: digits to learn.
        unseen: digits kept apart; disjoint from `known`.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for digits that are in both lists, or no digits.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "`digits` needs scikit-learn, which is not installed. Run `pip install bayescal[experiments]`."
        ) from error
    known, unseen = list(known), list(unseen)
    if set(known) & set(unseen) or not set(known + unseen) <= set(range(10)) or len(known) < 2:
        raise ValueError(
            f"`known` and `unseen` must be disjoint digits from 0 to 9, at least two known, got {known} and {unseen}. "
            "Leave a class out of one of them."
        )
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    inside = np.isin(labels, known)
    targets = np.searchsorted(np.sort(known), labels[inside])
    rest, test = train_test_split(np.arange(inside.sum()), test_size=0.2, stratify=targets, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.25, stratify=targets[rest], random_state=seed)
    part = lambda rows: Dataset(images[inside][rows], targets[rows].astype(np.int32))
    outside = np.isin(labels, unseen)
    return OpenSplit(
        part(train), part(validation), part(test), Dataset(images[outside], labels[outside].astype(np.int32))
    )
