"""Recorded predictions of any framework, from npz, csv and parquet files."""

import csv
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bayescal.predictive import Categorical, Gaussian, Predictive, Probabilities

TARGETS = ("labels", "targets")
COLUMNS = ("weights", "groups", "features")
KNOWN = ("logits", "probs", "mean", "variance", "member_weights", *TARGETS, *COLUMNS)
IN_MEMORY = 2**28  # bytes: larger arrays of a compressed file are unpacked into a temporary file and mapped


class Recorded(NamedTuple):
    """Predictions read from a file; arrays may be memory maps.

    pred: predictive, member axis first. Means and targets of regression are less the targets' median where float32 could
        not tell them apart otherwise: no figure depends on it.
    targets: integer labels (rows,), or floats (rows, dim).
    weights, groups, features: (rows,), (rows,), (rows, features), or None.
    unused: names in the file that mean nothing here.
    """

    pred: Predictive
    targets: np.ndarray
    weights: np.ndarray | None = None
    groups: np.ndarray | None = None
    features: np.ndarray | None = None
    unused: tuple[str, ...] = ()


def read_predictions(path: str | Path) -> Recorded:
    """Predictions and targets from a file. What the numbers are is said by their names, never guessed from values.

    Arrays: `logits` or `probs` (rows, classes) or (member, rows, classes) with `labels` (rows,); or `mean` and
    `variance` (rows,), (member, rows), (rows, dim) or (member, rows, dim) with `targets` (rows,) or (rows, dim).
    Optional: `weights` (rows,), `groups` (rows,), `features` (rows, ...), `member_weights` (member,).

    Args:
        path: `.npz` with these arrays; `.csv` or `.parquet` with columns `probs_0`, `probs_1`, ... (or `logits_0`, or
            `probs_MEMBER_CLASS`), `label`, `mean`, `variance`, `target`, `weight`, `group`, `feature_0`, ...

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for another kind of file, pickled objects, missing cells, missing or contradicting arrays, shapes
            that do not belong together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a file of predictions, got {path}, which is not there. Check the name."
        )
    readers = {".npz": read_npz, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(
            f"`path` must end in {', '.join(readers)}, got {path.name}. "
            "Save arrays with `np.savez(path, probs=..., labels=...)`."
        )
    return from_arrays(readers[path.suffix](path), str(path.name))


def from_arrays(arrays: Mapping[str, np.ndarray], source: str = "arrays") -> Recorded:
    """`Recorded` from named arrays, as `read_predictions` describes them.

    Args:
        arrays: name -> array.
        source: where they come from, for messages.

    Raises:
        ValueError: for missing or contradicting arrays, and shapes that do not belong together.
    """
    kinds = [name for name in ("logits", "probs", "mean") if name in arrays]
    if len(kinds) != 1:
        raise ValueError(
            f"{source} must hold one of `logits`, `probs` and `mean`, got {kinds or sorted(arrays)}. "
            "Name the array after what its numbers are."
        )
    found = [name for name in TARGETS if name in arrays]
    if len(found) != 1:
        raise ValueError(f"{source} must hold `labels` or `targets`, got {found or sorted(arrays)}. Add one of them.")
    targets = np.asarray(arrays[found[0]])
    weights = arrays.get("member_weights")
    if kinds == ["mean"]:
        pred, targets = _gaussian(arrays, targets, weights, source)
    else:
        family = Categorical if kinds == ["logits"] else Probabilities
        pred, targets = family(_with_members(kinds[0], arrays[kinds[0]], targets), weights), _labels(targets)
    rows = len(targets)
    _check_columns(arrays)
    extra = {name: arrays.get(name) for name in COLUMNS}
    for name, column in extra.items():
        if column is not None and (column.shape[:1] != (rows,) or (name != "features" and column.ndim != 1)):
            raise ValueError(
                f"`{name}` must have one entry for each of the {rows} rows, got shape {column.shape}. Pass one per row."
            )
    return Recorded(pred, targets, **extra, unused=tuple(sorted(set(arrays) - set(KNOWN))))


def _check_columns(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises for weights, features and labels of groups that are no numbers, or not finite."""
    for name in ("weights", "features", "groups", "member_weights"):
        column = arrays.get(name)
        words = column is not None and column.dtype.kind in "US"
        if column is None or (words and name == "groups"):
            continue
        if words or not np.isfinite(column.astype(np.float64)).all():
            got = f"words ({column.dtype})" if words else "NaN or infinity"
            raise ValueError(f"`{name}` must hold finite numbers in every row, got {got}. Repair or drop those rows.")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an npz file as memory maps where they are large; pickled objects are refused.

    Raises:
        ValueError: for arrays of Python objects, or a file that is no npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _read_array(path, archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(
            f"`path` must be a sound npz file, got {path.name}, which is none: {error}. Save it again."
        ) from error


def _read_array(path, archive, info) -> np.ndarray:
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        start = file.tell()
        if dtype.hasobject:
            raise ValueError(
                f"`{info.filename.removesuffix('.npy')}` must be an array of numbers, got Python objects, which would have "
                "to be unpickled. Save it with a numeric dtype, ragged data padded."
            )
        if dtype.kind not in "biufUS" or (dtype.itemsize > 8 and dtype.kind in "iuf"):
            raise ValueError(
                f"`{info.filename.removesuffix('.npy')}` must hold whole or floating numbers of at most 8 bytes, or words, got "
                f"{dtype}. Convert it with `astype(np.float64)`."
            )
        size = int(np.prod(shape)) * dtype.itemsize
        if start + size != info.file_size:
            raise zipfile.BadZipFile(f"{info.filename} holds {info.file_size - start} bytes for {size}")
        layout = {"dtype": dtype, "shape": shape, "order": "F" if fortran else "C"}
        if not size:
            return np.zeros(shape, dtype)
        if info.compress_type == zipfile.ZIP_STORED and dtype.isnative:
            while file.read(2**24):  # to the end, where its checksum is compared: the map below goes around that
                pass
            with open(path, "rb") as raw:  # the local header's name and extra field may differ from the directory's
                raw.seek(info.header_offset + 26)
                names = int.from_bytes(raw.read(2), "little") + int.from_bytes(raw.read(2), "little")
            return np.memmap(path, mode="r", offset=info.header_offset + 30 + names + start, **layout)
        if size <= IN_MEMORY or not dtype.isnative:
            flat = np.frombuffer(file.read(), dtype).astype(dtype.newbyteorder("="))
            return flat.reshape(shape, order=layout["order"])
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  the map keeps it open; it goes when the map goes
        while chunk := file.read(2**24):
            unpacked.write(chunk)
        unpacked.flush()
        return np.memmap(unpacked, mode="r", **layout)


def _header(file):
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(
            f"`path` must hold a line of names and at least one row, got {len(rows)} lines. Check the file."
        )
    wrong = [i for i, row in enumerate(rows) if len(row) != len(rows[0])]
    if wrong:
        raise ValueError(
            f"`path` must have {len(rows[0])} cells in every line, got {len(rows[wrong[0]])} in line {wrong[0] + 1}. Repair it."
        )
    names = [name.strip() for name in rows[0]]
    for name in names:
        _refuse_twice(name, names.count(name) > 1)
    return _from_table(dict(zip(names, map(list, zip(*rows[1:], strict=True)), strict=True)))


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow, which is not installed. Run `pip install bayescal[tables]`, or save as npz."
        ) from error
    table = parquet.read_table(path)
    return _from_table({name: table[name].to_pylist() for name in table.column_names})


def _from_table(columns: Mapping[str, list]) -> dict[str, np.ndarray]:
    """Columns by name to arrays: `probs_0`, `probs_1` to `probs` (rows, 2), `label` to `labels`."""
    arrays: dict[str, Any] = {}
    parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, cells in columns.items():
        missing = [i for i, x in enumerate(cells) if x is None or (isinstance(x, str) and not x.strip())]
        if missing:
            raise ValueError(
                f"column `{name}` must have a value in every row, got {len(missing)} missing, first in row "
                f"{missing[0]} (counted from 0). Fill or drop those rows."
            )
        stem, *place = name.split("_")
        plural = {"label": "labels", "target": "targets", "weight": "weights", "group": "groups", "feature": "features"}
        stem = plural.get(stem, stem)
        if stem not in KNOWN or not all(p.isdigit() for p in place):
            arrays[name] = np.asarray(cells)
        elif place:
            own, at = parts.setdefault(stem, {}), tuple(map(int, place))
            _refuse_twice(name, at in own)
            own[at] = _numbers(name, cells)
        else:
            _refuse_twice(name, stem in arrays)
            arrays[stem] = np.asarray(cells) if stem == "groups" else _numbers(name, cells)
    for stem, places in parts.items():
        _refuse_twice(stem, stem in arrays)
        shape = tuple(1 + max(p[axis] for p in places) for axis in range(len(next(iter(places)))))
        if len({len(p) for p in places}) != 1 or len(places) != np.prod(shape):
            raise ValueError(
                f"columns `{stem}_...` must count from 0 without gaps, got {sorted(places)}. Number them 0, 1, 2, ..."
            )
        stacked = np.stack([places[p] for p in np.ndindex(*shape)]).reshape(*shape, -1)
        arrays[stem] = np.moveaxis(stacked, -1, -2) if len(shape) == 2 else stacked.T
    return arrays


def _refuse_twice(name: str, there: bool) -> None:
    if there:
        raise ValueError(f"column `{name}` must be there once, got another that means the same. Keep one of them.")


def _numbers(name: str, cells: list) -> np.ndarray:
    try:
        return np.asarray([float(x) for x in cells])
    except (TypeError, ValueError) as error:
        raise ValueError(f"column `{name}` must hold numbers, got {error}. Check that cell.") from error


def _with_members(name: str, values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1:2] != targets.shape or values.shape[2] < 2 or targets.ndim != 1:
        raise ValueError(
            f"`{name}` must have shape (rows, classes) or (member, rows, classes) with two classes or more and one label a "
            f"row, got {values.shape} with labels of shape {targets.shape}. For two classes give both columns."
        )
    return values


def _labels(targets: np.ndarray) -> np.ndarray:
    if np.issubdtype(targets.dtype, np.integer):
        return targets
    try:
        whole = targets.astype(np.int64)
    except ValueError:
        whole = None
    if whole is None or not (whole == targets).all():
        raise ValueError(
            f"`labels` must be whole numbers 0, 1, 2, ..., got {targets.dtype} values such as {targets[:3]}. Relabel them."
        )
    return whole


def _gaussian(arrays, targets, weights, source):
    if "variance" not in arrays:
        raise ValueError(
            f"{source} must hold `variance` beside `mean`, got {sorted(arrays)}. Square the standard deviation."
        )
    parts = {}
    for name in ("mean", "variance"):
        values = arrays[name]
        values = values[None] if values.ndim == targets.ndim else values
        parts[name] = values[..., None] if targets.ndim == 1 else values
    targets = targets[:, None] if targets.ndim == 1 else targets
    for name, values in parts.items():
        if values.ndim != 3 or values.shape[1:] != targets.shape:
            raise ValueError(
                f"`{name}` must have the shape of `targets` {targets.shape}, with or without a member axis in front, got "
                f"{arrays[name].shape}. Pass one number per row (and dimension)."
            )
    if np.finfo(np.float32).eps * abs(targets).max(initial=0) > 1e-3 * np.sqrt(np.median(parts["variance"])):
        # No figure depends on where zero is, and in float32 nothing would be left of the differences.
        shift = np.median(targets, axis=0)
        parts["mean"], targets = parts["mean"] - shift, targets - shift
    return Gaussian(parts["mean"], parts["variance"], None, weights), targets.astype(np.float32)
