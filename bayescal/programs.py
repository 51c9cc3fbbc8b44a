"""Compiled programs kept on disk, so that the next process of a script starts without compiling."""

import os
import time
import warnings
from pathlib import Path

import jax

MOST_BYTES = 2**31  # of programs in a folder
_BETWEEN_TRIMS = 86_400  # seconds: looking at every file of a large folder takes a while
_EVERY_PROGRAM = {  # a first call makes dozens of programs that take milliseconds each
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def keep_programs(folder: str | Path | None = None) -> Path | None:
    """Keeps every compiled program in a folder for the next process; returns the folder. For the first lines of a script.

    Results are the same with and without; a first call no longer waits for the compiler. A program is found
    again by its text, the versions of jax and the compiler, the compiler's flags, and the devices with what their
    processors can do, so that machines may share a folder. Once a day what was read longest ago is dropped beyond 2 GiB;
    the folder may be deleted at any time. Whoever can write to it can run code as you: share it with nobody you do not trust.

    The environment decides: nothing is done where JAX_ENABLE_COMPILATION_CACHE is 0, or where a folder was named already
    (JAX_COMPILATION_CACHE_DIR, `jax_compilation_cache_dir`), whose own settings hold.

    Args:
        folder: made where absent, readable by its owner alone; None = bayescal/programs in the user's cache folder
            (XDG_CACHE_HOME or ~/.cache).

    Returns:
        The folder in use; None where programs are not kept.

    Raises:
        ValueError: for a `folder` that cannot be written to. Of the default one a warning tells, and nothing is kept.
    """
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore
        return None
    if named := jax.config.jax_compilation_cache_dir:  # pyright: ignore
        return Path(named)
    try:
        chosen = _default_folder() if folder is None else Path(folder).expanduser().absolute()
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        _trim(chosen)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        told = (
            f"`folder` must be one that can be written to, got {folder or 'the default'} ({error}). Name another, in the "
            "script or as JAX_COMPILATION_CACHE_DIR, or set JAX_ENABLE_COMPILATION_CACHE=0."
        )
        if folder is not None:
            raise ValueError(told) from error
        warnings.warn(f"{told} Without one every process compiles anew.", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    for name, value in _EVERY_PROGRAM.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return chosen


def _default_folder() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored where it is relative
    return (given if given.is_absolute() else Path.home() / ".cache") / "bayescal" / "programs"


def _trim(folder: Path) -> None:
    """Drops what was read longest ago beyond `MOST_BYTES`, once a day.

    jax's own limit (`jax_compilation_cache_max_size`) needs a package that jax does not bring, and takes a lock and writes
    a file at every read.

    Raises:
        OSError: for a folder that cannot be written to.
    """
    trimmed, now = folder / "trimmed", time.time()
    if os.access(folder, os.W_OK) and trimmed.exists() and now - trimmed.stat().st_mtime < _BETWEEN_TRIMS:
        return
    trimmed.touch()
    room = MOST_BYTES
    for _, size, path in sorted(_programs(folder), reverse=True):
        room -= size
        if room < 0:
            Path(path).unlink(missing_ok=True)


def _programs(folder: Path) -> list[tuple[float, int, str]]:
    """When it was last read or written, bytes and path of every program; another process may drop some meanwhile."""
    found = []
    for entry in os.scandir(folder):
        try:
            facts = entry.stat()
        except FileNotFoundError:
            continue
        if entry.name.endswith("-cache"):
            found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, entry.path))
    return found
