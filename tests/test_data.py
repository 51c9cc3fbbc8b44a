import numpy as np
import pytest

from bayescal.data import digits

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
