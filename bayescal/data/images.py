"""Images and labels from files: IDX (MNIST's format), gzipped or not, and npz with one array (KMNIST's)."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from bayescal.data.predictions import read_npz
from bayescal.types import Dataset

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}  # the magic number's third byte


def load_images(images: str | Path, labels: str | Path) -> Dataset:
    """inputs = pixels / 255 as float32 (rows, height, width, channels) in [0, 1], targets = labels as int32 (rows,).

    Args:
        images: file of bytes (rows, height, width), or with channels last: IDX, or an npz with the array `arr_0`.
        labels: file of whole numbers (rows,), in either format.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file of another kind or a damaged one; pixels that are no bytes; other shapes; negative labels;
            images and labels that differ in number.
    """
    pixels, targets = _read(images), _read(labels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or not pixels.size:
        raise ValueError(
            f"`images` must hold bytes of shape (rows, height, width) or (rows, height, width, channels), got "
            f"{pixels.dtype} {pixels.shape} in {Path(images).name}. Check that it is the file of the images."
        )
    whole = targets.ndim == 1 and targets.dtype.kind in "iu"
    if not whole or targets.min(initial=0) < 0 or targets.max(initial=0) >= 2**31:
        raise ValueError(
            f"`labels` must hold whole numbers from 0 to 2**31 - 1, of shape (rows,), got {targets.dtype} {targets.shape} in "
            f"{Path(labels).name}. Check that it is the file of the labels."
        )
    if len(pixels) != len(targets):
        raise ValueError(
            f"`labels` must have the {len(pixels)} rows of `images`, got {len(targets)}. Check that the files belong together."
        )
    pixels = pixels.reshape(*pixels.shape[:3], -1)
    return Dataset(np.divide(pixels, 255, dtype=np.float32), targets.astype(np.int32))


def read_idx(path: str | Path) -> np.ndarray:
    """The array of an IDX file, gzipped or not, in its own type and the machine's byte order.

    Args:
        path: the file; gzip is told by its first bytes, whatever the name.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for another kind of file, or one whose length is not what its header says.
    Source: LeCun's description of the MNIST files (recalled).
    """
    path = _existing(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"`path` must be a whole gzip file, got {path.name}, which is damaged: {error}. Fetch it again."
            ) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or not content[3]:
        raise ValueError(
            f"`path` must be an IDX file, which begins with two zero bytes, its type and its number of axes, got "
            f"{path.name}, which begins with {content[:4].hex(' ') or 'nothing'}. Check the file."
        )
    dtype, axes = np.dtype(TYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", content[4:start]) if len(content) >= start else ()
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"`path` must hold the {expected} bytes of its {axes} axes of sizes {shape} ({dtype}), got {len(content)} in "
            f"{path.name}. Fetch it again."
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _read(path: str | Path) -> np.ndarray:
    if Path(path).suffix != ".npz":
        return read_idx(path)
    arrays = read_npz(_existing(path))
    if "arr_0" not in arrays:
        raise ValueError(
            f"`path` must hold the array `arr_0`, got {Path(path).name} with {sorted(arrays)}. Save it with "
            "`np.savez(path, images)`."
        )
    return arrays["arr_0"]


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a file of images or labels, got {path}, which is not there. Check the name."
        )
    return path
