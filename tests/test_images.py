import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from bayescal.data.images import load_images, read_idx

pytestmark = pytest.mark.core

DATA = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array):
    """The bytes of an IDX file, written here by hand."""
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path, rng, dtype, packed):
    array = rng.integers(-100, 100, (3, 2, 4)).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(array), mtime=0) if packed else idx(array))
    got = read_idx(path)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype and got.dtype.isnative


def test_idx_by_hand(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 11, 2, 0, 0, 0, 2, 0, 0, 0, 1, 1, 0, 255, 254]))  # int16: 256, -2
    np.testing.assert_array_equal(read_idx(path), [[256], [-2]])


HEADER = struct.pack(">4B2I", 0, 0, 8, 2, 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "`path` must be an IDX file, .* got file, which begins with nothing. Check the file"),
        (b"\x89PNG\r\n", "`path` must be an IDX file, .* begins with 89 50 4e 47. Check the file"),
        (b"\0\0\x07\x01\0\0\0\0", "`path` must be an IDX file, .* begins with 00 00 07 01"),
        (b"\0\0\x08\x00\x01", "`path` must be an IDX file, .* begins with 00 00 08 00"),
        (HEADER[:9], r"`path` must hold the 13 bytes of its 2 axes of sizes \(\) .* got 9 in file. Fetch it again"),
        (HEADER + bytes(5), r"`path` must hold the 18 bytes of its 2 axes of sizes \(2, 3\) \(uint8\), got 17 in file"),
        (HEADER + bytes(7), r"`path` must hold the 18 bytes .* got 19 in file"),
        (struct.pack(">4B2I", 0, 0, 8, 2, 2**32 - 1, 2**32 - 1), "`path` must hold the 18446744065119617037 bytes"),
        (
            gzip.compress(HEADER + bytes(6), mtime=0)[:-9],
            "`path` must be a whole gzip file, got file, which is damaged",
        ),
        (
            gzip.compress(HEADER + bytes(6), mtime=0)[:-8] + bytes(8),
            "`path` must be a whole gzip file, .* Fetch it again",
        ),
    ],
)
def test_foreign_and_damaged_files(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@pytest.mark.parametrize("kind", ["idx", "gz", "npz", "npz in colour"])
def test_images_and_labels(tmp_path, rng, pixels, kind):
    labels = np.arange(5, dtype=np.uint8)
    if kind == "npz in colour":
        pixels = rng.integers(0, 256, (5, 4, 3, 3), dtype=np.uint8)
    paths = [tmp_path / f"{name}.{kind[:3]}" for name in ("images", "labels")]
    for path, array in zip(paths, (pixels, labels), strict=True):
        if path.suffix == ".npz":
            np.savez_compressed(path, array)
        else:
            path.write_bytes(gzip.compress(idx(array), mtime=0) if kind == "gz" else idx(array))
    data = load_images(*paths)
    expected = [[[[int(c) / 255 for c in np.atleast_1d(p)] for p in row] for row in image] for image in pixels]
    np.testing.assert_allclose(data.inputs, expected, rtol=1e-7)
    np.testing.assert_array_equal(data.targets, [0, 1, 2, 3, 4])
    assert data.inputs.dtype == np.float32 and data.targets.dtype == np.int32 and data.weights is None


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((5, 4, 3), "i4"),
            None,
            r"`images` must hold bytes .* got int32 \(5, 4, 3\) in images.idx. Check that",
        ),
        (np.zeros((5, 12), "u1"), None, r"`images` must hold bytes .* got uint8 \(5, 12\)"),
        (np.zeros((0, 4, 3), "u1"), np.zeros(0, "u1"), r"`images` must hold bytes .* got uint8 \(0, 4, 3\)"),
        (
            None,
            np.zeros((5, 1), "u1"),
            r"`labels` must hold whole numbers from 0 to .* got uint8 \(5, 1\) in labels.idx",
        ),
        (None, np.zeros(5, "f4"), r"`labels` must hold whole numbers .* got float32 \(5,\)"),
        (None, -np.ones(5, "i4"), "`labels` must hold whole numbers .* Check that it is the file of the labels"),
        (
            None,
            np.zeros(4, "u1"),
            "`labels` must have the 5 rows of `images`, got 4. Check that the files belong together",
        ),
    ],
)
def test_wrong_images_and_labels(tmp_path, pixels, images, labels, message):
    (tmp_path / "images.idx").write_bytes(idx(pixels if images is None else images))
    (tmp_path / "labels.idx").write_bytes(idx(np.arange(5, dtype=np.uint8) if labels is None else labels))
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "images.idx", tmp_path / "labels.idx")


def test_wrong_npz_and_missing_files(tmp_path, pixels):
    np.savez(tmp_path / "named.npz", images=pixels)
    with pytest.raises(
        ValueError, match=r"`path` must hold the array `arr_0`, got named.npz with \['images'\]. Save it"
    ):
        load_images(tmp_path / "named.npz", tmp_path / "named.npz")
    np.savez(tmp_path / "images.npz", pixels)
    np.savez(tmp_path / "labels.npz", np.full(5, 2**40))
    with pytest.raises(ValueError, match=r"`labels` must hold whole numbers from 0 to 2\*\*31 - 1"):
        load_images(tmp_path / "images.npz", tmp_path / "labels.npz")
    (tmp_path / "broken.npz").write_bytes((tmp_path / "images.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="`path` must be a sound npz file"):
        load_images(tmp_path / "broken.npz", tmp_path / "labels.npz")
    for read in (read_idx, lambda path: load_images(path, path)):
        with pytest.raises(
            FileNotFoundError, match=r"`path` must be a file of images or labels, got .* Check the name"
        ):
            read(tmp_path / "absent.npz")


def real(*names):
    paths = [DATA / name for name in names]
    for path in paths:
        if not path.exists():
            pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    return paths


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_idx_files(name):
    data = load_images(*real(f"{name}/t10k-images-idx3-ubyte.gz", f"{name}/t10k-labels-idx1-ubyte.gz"))
    assert data.inputs.shape == (10000, 28, 28, 1) and (data.inputs.min(), data.inputs.max()) == (0, 1)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if name == "mnist" else [1000] * 10
    np.testing.assert_array_equal(np.bincount(data.targets), counts)
    (labels,) = real(f"{name}/train-labels-idx1-ubyte.gz")
    first = [5, 0, 4, 1, 9] if name == "mnist" else [9, 0, 0, 3, 0]
    np.testing.assert_array_equal(read_idx(labels)[:5], first)


def test_real_npz_files():
    data = load_images(*real("kmnist_test/kmnist-test-imgs.npz", "kmnist_test/kmnist-test-labels.npz"))
    assert data.inputs.shape == (10000, 28, 28, 1) and (data.inputs.min(), data.inputs.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(data.targets), [1000] * 10)
