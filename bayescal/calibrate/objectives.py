"""What fits minimise over rows: sums of blocks, and a metric as a function of the temperature."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.decompose.rows import numbers_at_once
from bayescal.predictive import Categorical, undefined_where
from bayescal.types import Metric, PyTree, WholeMetric

NUMBER = 41  # temperatures tried at once
GRID = np.linspace(-1, 1, NUMBER).astype(np.float32) * np.log(np.float32(1e3))  # log T
NEAR = np.arange(-2, 3).astype(np.float32)  # places by the best one that a cubic is drawn through


class Found(NamedTuple):
    """Where a search ended.

    temperature: NaN where there is none.
    gradient: derivative of the mean objective by 1 / T there.
    passes: how often the rows were read.
    """

    temperature: jax.Array
    gradient: jax.Array
    passes: jax.Array


def sum_over_blocks(function: Callable[..., PyTree], *columns: jax.Array, weights: jax.Array) -> PyTree:
    """Sum over blocks of rows of `function(*columns, weights)`, which gives a pytree of sums; for use inside jit.

    A block's intermediates stay in a CPU's cache, and float32 sums of sums keep their digits. On an accelerator one
    block is the whole, unless memory would not hold it.

    Args:
        function: linear in the weights; a row of weight 0 counts for nothing.
        columns: (rows, ...).
        weights: of each row (rows,).
    """
    rows = len(weights)
    each = max(1, sum(x.size for x in columns) // max(1, rows))
    size = 2 ** max(1, (numbers_at_once(jax.default_backend()) // each).bit_length() - 1)
    if rows <= size:
        return function(*columns, weights)

    def step(_, first):
        start = jnp.minimum(first, rows - size)  # the last block reaches back, to rows that then weigh nothing
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
        fresh = start + jnp.arange(size) >= first
        return None, function(*map(cut, columns), jnp.where(fresh, cut(weights), 0))

    return jax.tree.map(lambda x: x.sum(0), jax.lax.scan(step, None, jnp.arange(0, rows, size))[1])


def check_objective(objective) -> None:
    """Raises unless `objective` is a metric that says which direction is better."""
    if not isinstance(objective, Metric | WholeMetric):
        raise TypeError(
            f"`objective` must be a metric, or None for the nll, got {type(objective).__name__}. Pass for example "
            "`bc.brier()`."
        )
    if objective.better not in ("lower", "higher"):
        raise ValueError(
            f"`objective` must be a metric of which lower or higher is better, got one of which {objective.better!r} is. "
            "Say which in its `better`."
        )


@partial(jax.jit, static_argnums=0)
def least_over_temperatures(objective, log_probs, targets, weights) -> tuple[Found, jax.Array]:
    """Temperature at which a metric of softmax(log p / T) is best, and whether the metric changes at all.

    A metric need not be convex in T: all of `GRID` is tried, then as many between the best one's neighbours, then the
    lowest point of the cubic through the five about the best of those. Of equal values the one nearest to T = 1 wins.
    NaN where an end of the grid is as good as the best.
    """
    sign = 1.0 if objective.better == "lower" else -1.0

    def value(log_temperature):
        def measure(log_probs, targets, weights):
            return objective.measure(Categorical((log_probs * jnp.exp(-log_temperature))[None]), targets, weights)

        if isinstance(objective, Metric):
            return sign * objective.compute(sum_over_blocks(measure, log_probs, targets, weights=weights))
        scaled = Categorical((log_probs * jnp.exp(-log_temperature))[None])
        return sign * objective.compute(*objective.read(scaled, targets), weights)

    def level(points, _):
        values = jax.lax.map(value, points)
        tied = values == jnp.where(jnp.isnan(values), jnp.inf, values).min()
        best = jnp.argmin(jnp.where(tied, abs(points), jnp.inf))
        about = points[best] + (points[1] - points[0]) * np.linspace(-1, 1, NUMBER).astype(np.float32)
        return about, (points, values, best, tied[0] | tied[-1])

    _, (points, values, best, at_end) = jax.lax.scan(level, jnp.asarray(GRID), length=2)
    finest, heights, best, spacing = points[1], values[1], best[1], points[1, 1] - points[1, 0]
    middle = jnp.clip(best, 2, NUMBER - 3)
    shift = _lowest_place(jax.lax.dynamic_slice(heights, (middle - 2,), (len(NEAR),)))
    lowest = jnp.where(jnp.isnan(shift), finest[best], finest[middle] + spacing * shift)
    about = jax.lax.map(value, lowest + spacing * NEAR)
    # A smooth metric is as good there but for rounding; one with jumps need not be.
    chosen = jnp.where(about[2] <= heights[best] + 1e-6 * abs(heights[best]), lowest, finest[best])
    temperature = undefined_where(at_end[0] | ~jnp.isfinite(heights[best]), jnp.exp(chosen))
    gradient = -sign * temperature * _cubic(about)[0] / spacing  # d log T = -T d (1 / T)
    return Found(temperature, gradient, jnp.int32(2 * NUMBER + len(NEAR))), ~(values[0] == values[0, 0]).all()


def _cubic(heights):
    """Coefficients of x, x^2 and x^3 of the least-squares cubic through `heights` at the places `NEAR`."""
    design = np.linalg.pinv(np.stack([NEAR**k for k in range(4)], -1).astype(np.float64)).astype(np.float32)
    return (design * (heights - heights[2])).sum(-1)[1:]


def _lowest_place(heights):
    """Where that cubic is lowest, within `NEAR`; NaN = nowhere."""
    slope, bend, twist = _cubic(heights)
    place = -2 * slope / (2 * bend + jnp.sqrt(4 * bend**2 - 12 * twist * slope))  # NaN without a real root
    return jnp.where((bend > 0) & (abs(place) <= 2), place, jnp.nan)
