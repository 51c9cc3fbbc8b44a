"""Configs: a frozen dataclass, a yaml file of what differs from it, and `key=value` on the command line."""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def load_config(schema: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """The dataclass `schema` with the values of a yaml file, then of `key=value` words.

    Args:
        schema: frozen dataclass whose fields are int, float, str, bool, tuples of these, or optional.
        path: yaml file with a mapping; None = defaults.
        overrides: words such as `num_members=8` or `hidden=64,64`.

    Raises:
        ValueError: for a key that nobody reads (with the nearest one), a value of the wrong type, a word without "=",
            or a file that holds no mapping.
        FileNotFoundError: for a missing file.
    """
    import yaml

    values: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`path` must be a yaml file, got {path}, which does not exist. Check the spelling."
            )
        read = yaml.safe_load(Path(path).read_text())
        if read is not None and not isinstance(read, dict):
            raise ValueError(f"`{path}` must hold a mapping, got {type(read).__name__}. Write lines like `epochs: 40`.")
        values.update(read or {})
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"`{word}` must have the form key=value, got no '='. Write for example `epochs=40`.")
        values[key] = yaml.safe_load(text)
    hints = typing.get_type_hints(schema)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0)
            raise ValueError(
                f"`{key}` must be a key of {schema.__name__}, got one that nobody reads. Did you mean `{near[0]}`? "
                f"All keys: {', '.join(hints)}."
            )
    return schema(**{key: _convert(key, value, hints[key]) for key, value in values.items()})


def command_line(schema: type[C], words: Sequence[str]) -> tuple[C, Path]:
    """The config and the run's folder from `experiment.py [config.yaml] [key=value ...]`, as in `sys.argv`.

    The folder is the setting `out`, else runs/<experiment>/<name of the yaml>.

    Args:
        schema: as in `load_config`, with a field `out`.
        words: of the command line, the script first.

    Raises:
        ValueError, FileNotFoundError: as `load_config`.
    """
    script, *rest = words
    path = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    config = load_config(schema, path, rest)
    default = Path("runs") / Path(script).stem / (path.stem if path else "default")
    return config, Path(getattr(config, "out", None) or default)


def _convert(key: str, value, hint):
    import yaml

    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _convert(key, value, next(t for t in inner if t is not type(None)))
    if origin is tuple:
        items = [yaml.safe_load(x) for x in value.split(",")] if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        return tuple(_convert(key, item, inner[0]) for item in items)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # yaml reads 1e-3 as a word
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)) or value != value:
        raise ValueError(
            f"`{key}` must be {hint.__name__}, got {value!r} ({type(value).__name__}). "
            f"Write for example `{key}={ {int: 10, float: 0.1, bool: 'true', str: 'word'}.get(hint, '...') }`."
        )
    return value


def versions() -> dict[str, str]:
    """Versions of what decides a result, and the device it ran on."""
    import platform

    import jax

    names = ("bayescal", "jax", "jaxlib", "flax", "optax", "numpyro", "numpy", "scipy", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {**found, "device": f"{len(jax.devices())} x {device.platform} ({device.device_kind})"}


def as_dict(config) -> dict[str, Any]:
    """The resolved config as plain yaml and json values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
