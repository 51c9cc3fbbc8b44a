"""How members and draws run: the one place that knows."""

from collections.abc import Callable
from typing import Literal

import jax

Execution = Literal["map", "vmap"]


def default_execution() -> Execution:
    """ "map" on CPU, where it is as fast as `vmap`, compiles faster and keeps convolutions fast; "vmap" elsewhere."""
    return "map" if jax.default_backend() == "cpu" else "vmap"


def run_members(function: Callable, *args, execution: Execution | None = None):
    """Calls `function` for each entry of the leading axis of `args` and stacks the results.

    Args:
        function: pure; takes one member's part of each argument.
        *args: pytrees of arrays with a leading member axis.
        execution: "map" runs members one after another in the same program: bitwise what each gives alone, and the
            least memory. "vmap" runs them side by side: results agree to rounding. None = `default_execution()`.

    Raises:
        ValueError: for another word.
    """
    execution = execution or default_execution()
    if execution == "vmap":
        return jax.vmap(function)(*args)
    if execution == "map":
        return jax.lax.map(lambda one: function(*one), args)
    raise ValueError(f"`execution` must be 'map', 'vmap' or None, got {execution!r}. None picks by backend.")
