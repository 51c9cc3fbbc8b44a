"""Soft-binned calibration error: memberships instead of bins, so that it has a gradient."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.binning import bin_edges, namespace
from bayescal.metrics.events import Events, top_label
from bayescal.metrics.likelihood import check_rows
from bayescal.types import Array, Metric


class SoftBins(NamedTuple):
    """Sums over rows of membership in each soft bin, of shape (bins,); merging is addition.

    weight: total membership.
    gap: membership-weighted sum of confidence - correct.
    confidence: membership-weighted sum of the confidence.
    """

    weight: Float[Array, "bins"]
    gap: Float[Array, "bins"]
    confidence: Float[Array, "bins"]


@cache
def soft_binned_calibration_error(
    *, events: Events | None = None, num_bins: int = 15, temperature: float = 0.01, norm: float = 2
) -> Metric:
    """Soft-binned ECE: (sum_b S_b / n |A_b - C_b|^norm)^(1 / norm), S_b = sum_i softmax_b(-(c_i - g_b)^2 / temperature).

    g_b is the centre (b - 1/2) / num_bins, A_b and C_b the membership-weighted accuracy and confidence. In [0, 1];
    lower is better. Temperature -> 0 gives the hard bins' error, -> infinity the size of `confidence_gap`. No interval.

    Args:
        events: which events; default the top label (confidence, correctness).
        num_bins: soft bins.
        temperature: width of the memberships, in squared probability.
        norm: 2 as in the authors' code. No maximum: every soft bin has some member.

    Raises:
        ValueError: for fewer than one bin, a temperature that is not positive, a norm below 1 or infinite.
    Source: Karandikar et al. 2021, equation 11.
    """
    if not 1 <= norm < float("inf"):
        raise ValueError(f"`norm` must be at least 1 and finite, got {norm!r}. The authors take 2.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}. The usual choice is 0.01.")
    edges, events = bin_edges(num_bins), events or top_label()
    centres = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)

    def measure(pred, targets, weights) -> SoftBins:
        check_rows(weights.shape[0])
        confidence, outcome = events.read(pred, targets)
        member = jax.nn.softmax(-((confidence[:, None] - centres) ** 2) / temperature, -1)
        columns = jnp.stack([jnp.ones_like(confidence), confidence - outcome, confidence], -1)
        columns = jnp.where(weights[:, None] == 0, 0, weights[:, None] * columns)
        member = jnp.where(weights[:, None] == 0, 0, member)
        return SoftBins(*jnp.einsum("rb,rc->cb", member, columns, precision="highest"))

    def compute(sums: SoftBins):
        xp, total = namespace(sums.weight), sums.weight.sum()
        gap = abs(sums.gap) / xp.where(sums.weight > 0, sums.weight, 1)
        share = xp.where(total > 0, sums.weight / xp.where(total > 0, total, 1), xp.nan)
        return (share * gap**norm).sum() ** (1 / norm)

    convention = f"{events.name}; {num_bins} soft bins, temperature {temperature:g}; L{norm:g} norm"
    return Metric(measure, compute, convention=convention, regular=False)
