from itertools import pairwise

import numpy as np
import pytest

from bayescal.data import CORRUPTIONS, corrupt, digits

pytestmark = pytest.mark.core


def test_digits_split():
    split = digits(0)
    assert [len(part.targets) for part in split] == [865, 289, 289, 354]
    assert split.train.inputs.shape == (865, 8, 8, 1) and split.train.inputs.dtype == np.float32
    assert split.train.inputs.min() >= 0 and split.train.inputs.max() == 1
    assert set(split.unseen.targets) == {8, 9} and set(split.test.targets) == set(range(8))
    rows = [tuple(x.ravel()) for part in split[:3] for x in part.inputs]
    assert len(set(rows)) == len(rows), "no image in two parts"
    shares = np.stack([np.bincount(part.targets) / len(part.targets) for part in split[:3]])
    assert np.ptp(shares, axis=0).max() < 0.01, "stratified"
    np.testing.assert_array_equal(digits(0).test.inputs, split.test.inputs)
    assert (digits(1).test.inputs[:50] != split.test.inputs[:50]).any()


def test_digits_with_other_classes():
    split = digits(0, known=(7, 3), unseen=(1,))
    assert set(split.train.targets) == {0, 1} and set(split.unseen.targets) == {1}
    with pytest.raises(ValueError, match="`known` and `unseen` must be disjoint digits"):
        digits(0, known=(1, 2), unseen=(2,))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity(name):
    images = digits(0).test.inputs[..., 0]
    distance = []
    for severity in range(1, 6):
        shifted = corrupt(name, images, severity, seed=0)
        assert shifted.shape == images.shape and shifted.dtype == np.float32
        assert shifted.min() >= -1e-6 and shifted.max() <= 1 + 1e-6
        np.testing.assert_array_equal(shifted, corrupt(name, images, severity, seed=0))
        distance.append(np.abs(shifted - images).mean())
    assert all(a < b for a, b in pairwise(distance))


def test_corruptions_by_hand():
    image = np.array([[[0.0, 1.0], [0.0, 1.0]]])
    np.testing.assert_allclose(corrupt("contrast", image, 5, 0), [[[0.425, 0.575], [0.425, 0.575]]], rtol=1e-6)
    column = np.zeros((1, 9, 9))
    column[0, 4, 4:] = 1  # an arm to the right
    turned = corrupt("rotation", np.repeat(column, 1, 0), 5, 0)[0]
    assert turned[:4].sum() > 5 * turned[5:].sum(), "counter-clockwise: the arm points up"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fog", 1), "`name` must be one of"), (("noise", 6), "`severity` must be 1, 2, 3, 4 or 5, got 6")],
)
def test_bad_corruptions(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(arguments[0], np.zeros((1, 8, 8)), arguments[1], 0)
