"""Several CPU devices, one key, shapes checked at run time."""

import os

# Optimisation stays at its default: level 0 compiles faster, and then gives NaN for convolutions.
_FLAGS = "--xla_force_host_platform_device_count=2 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin where workers share the cores

from pathlib import Path

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache")
)  # processes inherit it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
from jaxtyping import install_import_hook

with install_import_hook("bayescal", "typecheck.checker"):
    import bayescal
    import bayescal.testing  # noqa: F401

import warnings
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent


TESTS, MOST_MAPS = count(), 30_000


@pytest.fixture(autouse=True)
def room_for_programs():
    """A compiled program takes about 17 of the memory maps that a process may have, 65,530 on Linux; XLA crashes without."""
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(7)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@contextmanager
def strictly():
    """Strict rank and type promotion, and warnings as errors: for our own pure functions."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        warnings.simplefilter("error")
        yield


@pytest.fixture
def unchecked():
    """Without the run-time shape checks, which only tests have: what a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def strict():
    with strictly():
        yield
