"""Dense layers after dropout, one mask a layer for many rows: products of the units that the masks keep.

For a CPU's loop over masks: a product of half the units takes half the time there, and the compiler takes what does not
depend on the masks out of the loop.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from bayescal.types import Array

ROWS = 64  # with fewer, choosing units takes longer than the products of all
NARROW = 64  # units; choosing among fewer, or for a product with fewer outputs, was no faster
WORTH = 0.8  # share of the units; gathering more of them saves too little
DEVIATIONS = 2  # of the number of units that a mask keeps; one in 44 masks keeps more than there is room for


class _Layer(NamedTuple):
    """(x * factor) kernel + term of (units, rows), of those `units` that count; None = all."""

    kernel: Array
    factor: Array
    term: Array
    units: jax.Array | None


def room(units: int, share: float) -> int | None:
    """mean + 2 standard deviations of how many of `units` are chosen, each with probability `share`, in eights.

    None where there are few, or where so many of them saves too little.
    """
    size = 8 * math.ceil((units * share + DEVIATIONS * math.sqrt(units * share * (1 - share))) / 8)
    return size if units >= NARROW and size <= WORTH * units else None


def pays(widths: Sequence[int], rate: float) -> bool:
    """Whether `dense_after_dropout` leaves units out, for hidden layers of these widths and, last, that many outputs."""
    *hidden, _ = widths
    first = bool(hidden) and _first_pays(widths[0], widths[1], rate)
    return first or any(room(width, 1 - rate) is not None for width in hidden[1:])


def dense_after_dropout(
    columns: Float[Array, "features rows"],
    masks: Sequence[Float[Array, "_"]],
    layers: Sequence[tuple[Float[Array, "_ _"], Float[Array, "_"]]],
    *,
    rate: float,
) -> Float[jax.Array, "rows outputs"]:
    """x <- relu((x * mask) kernel + bias) through all layers, without ReLU after the last; masks are those of all rows.

    Equal to that but for rounding. Units that a mask drops are not computed, nor multiplied; below a rate of 1/2 the first
    product is that of all units, the same for all masks, less that of the dropped ones. Where a mask keeps more units than
    there is room for, or numbers are so large that a unit might not be finite, all units are computed: what is not a
    number stays so, even where it is dropped.

    Args:
        columns: at least 0, as after a ReLU; rows last, so that a unit's numbers are copied as one. It must come out of a
            product as it is: a transpose would be left to each mask.
        masks: 0 or 1 / (1 - rate), one before each layer.
        layers: kernel and bias of each.
        rate: share of units that are dropped, in (0, 1).
    """
    plain = [_Layer(kernel, mask, bias[:, None], None) for mask, (kernel, bias) in zip(masks, layers, strict=True)]
    chosen = [layer._replace(units=_largest(layer.factor, 1 - rate)) for layer in plain]
    first, scale = plain[0], 1 / (1 - rate)
    if not _first_pays(len(first.kernel), len(first.term), rate):
        chosen[0] = first
    elif rate < 0.5:
        dropped = jnp.where(first.factor == 0, -scale, 0).astype(first.factor.dtype)
        full = scale * (first.kernel.T @ columns) + first.term  # not inside a branch, which nothing is taken out of
        chosen[0] = _Layer(first.kernel, dropped, full, _largest(-dropped, rate))
    fits = [jnp.count_nonzero(layer.factor) <= layer.units.size for layer in chosen if layer.units is not None]
    fast = jnp.stack([_finite(columns, layers, scale), *fits]).all()
    return jax.lax.cond(fast, lambda: _through(columns, chosen), lambda: _through(columns, plain)).T


def _first_pays(units, outputs, rate):
    return outputs >= NARROW and room(units, min(rate, 1 - rate)) is not None


def _largest(mask, share):
    """Places in `mask` of as many as there is room for, the largest first."""
    size = room(len(mask), share)
    return None if size is None else jax.lax.top_k(mask, size)[1]


def _through(x, layers):
    x = _take(x, layers[0].units)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        outputs = None if following is None else following.units
        x = x * _take(layer.factor, layer.units)[:, None]
        x = _take(_take(layer.kernel, layer.units).T, outputs) @ x + _take(layer.term, outputs)
        x = x if following is None else jax.nn.relu(x)
    return x


def _take(array, places):
    return array if places is None else jnp.asarray(array).at[places].get(mode="promise_in_bounds")


def _finite(columns, layers, scale) -> Bool[jax.Array, ""]:
    """Whether every unit, dropped or not, is finite whatever the masks: by a bound on each, made of sums.

    Sums keep NaN, which XLA's maximum of a matrix loses on CPU.
    """
    bound = columns.sum(1)
    for kernel, bias in layers:
        bound = scale * (bound @ abs(kernel)) + abs(bias)
    return (bound < jnp.finfo(bound.dtype).max / 2).all()
