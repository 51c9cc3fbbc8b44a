"""A temperature for each region: bins of the confidence, or groups that are given."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    concrete,
    like,
    pooled_log_probs,
    require_possible,
    rows_for_fit,
)
from bayescal.calibrate.histogram import check_bins_of_rows, equal_mass_edges, place
from bayescal.predictive import undefined_where
from bayescal.types import Array, pytree

LARGEST = 1e12  # temperature searched; the least is its inverse


@pytree
class BinwiseTemperature(Calibrator):
    """log p / T(confidence of p), normalised again: a row keeps its order of classes, rows may change theirs.

    Args:
        temperatures: of each bin; above 1 = less confident than before.
        edges: inner edges of the bins of confidence before, closed on the right.
        centres: mean confidence before of the rows in each bin.
        gradient: largest absolute derivative of a bin's mean nll by its inverse temperature, nats; 0 = converged.
        interpolate: log T linear between centres and constant outside them, else constant in each bin.
    """

    accuracy_preserving = True

    temperatures: Float[Array, "bins"]
    edges: Float[Array, "inner"]
    centres: Float[Array, "bins"]
    gradient: Float[Array, ""]
    interpolate: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Classes) -> Classes:
        """The pool, each row at the temperature of its confidence."""
        log_probs = pooled_log_probs(pred)
        confidence = _confidence(log_probs)
        if self.interpolate:
            temperature = jnp.exp(jnp.interp(confidence, self.centres, jnp.log(self.temperatures)))
        else:
            temperature = self.temperatures[place(self.edges, confidence)]
        return like(pred, jax.nn.log_softmax(log_probs / temperature[..., None]))


@pytree
class GroupwiseTemperature(Calibrator):
    """log p / T(group), normalised again: `calibrator(pred, features=groups)`.

    Args:
        temperatures: of each group; above 1 = less confident than before.
        gradient: largest absolute derivative of a group's mean nll by its inverse temperature, nats; 0 = converged.
    """

    accuracy_preserving = True
    needs = ("features",)

    temperatures: Float[Array, "groups"]
    gradient: Float[Array, ""]

    def __call__(self, pred: Classes, *, features: Int[Array, "*batch"]) -> Classes:
        """The pool, each row at the temperature of its group.

        Args:
            pred: predictive over classes.
            features: group of each row, in [0, groups); under jit others give NaN.

        Raises:
            ValueError: for groups of another shape, not whole numbers, or outside the groups of the fit.
        """
        _check_groups(features, pred.batch_shape, len(self.temperatures))
        groups = jnp.asarray(features)
        inside = (groups >= 0) & (groups < len(self.temperatures))
        temperature = undefined_where(~inside, self.temperatures[jnp.where(inside, groups, 0)])
        return like(pred, jax.nn.log_softmax(pooled_log_probs(pred) / temperature[..., None]))


def fit_binwise_temperature(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    num_bins: int = 5,
    interpolate: bool = True,
    weights: Float[Array, "rows"] | None = None,
) -> BinwiseTemperature:
    """argmin_T of mean nll(softmax(log p / T)) in each bin of equal mass of the confidence max p before scaling.

    For nets whose over-confidence depends on their confidence. One bin is plain temperature scaling. Constant in each bin T
    is the optimum there, but jumps at the edges and the order of rows by confidence with it; interpolated it is
    neither optimum nor jump.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        num_bins: of confidence; each needs right and wrong rows.
        interpolate: log T between the bins' mean confidences.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows, more bins than rows, and bins in which no finite temperature is best.
    Source: Ji et al. 2019 (bin-wise temperature scaling, recalled); Dawkins and Nejadgholi 2022 (region-dependent, abstract
        only).
    """
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    check_bins_of_rows(num_bins, len(targets))
    require_possible(log_probs, targets, weights)
    edges, regions, centres = _bins(log_probs, weights, num_bins)
    temperatures, gradient = temperature_of_regions(log_probs, targets, weights, regions, num_bins)
    _require_best("num_bins", "bin", "Use fewer bins.", temperatures)
    return BinwiseTemperature(temperatures, edges, centres, gradient, bool(interpolate))


def fit_groupwise_temperature(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    features: Int[Array, "rows"],
    num_groups: int,
    weights: Float[Array, "rows"] | None = None,
) -> GroupwiseTemperature:
    """argmin_T of mean nll(softmax(log p / T)) in each group of rows: hospitals, sensors, predicted classes.

    One group is plain temperature scaling.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        features: group of each row, in [0, num_groups); under jit others make group 0 NaN.
        num_groups: how many there are; each needs right and wrong rows.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows or groups, and groups in which no finite temperature is best.
    Source: Dawkins and Nejadgholi 2022 (region-dependent temperature, abstract only).
    """
    if not isinstance(num_groups, int) or num_groups < 1:
        raise ValueError(f"`num_groups` must be a whole number of at least 1, got {num_groups!r}. Count the groups.")
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    _check_groups(features, pred.batch_shape, num_groups)
    require_possible(log_probs, targets, weights)
    groups = jnp.asarray(features)
    outside = (groups < 0) | (groups >= num_groups)
    log_probs = undefined_where((outside & (weights > 0))[:, None], log_probs)
    groups = jnp.where(outside, 0, groups)
    temperatures, gradient = temperature_of_regions(log_probs, targets, weights, groups, num_groups)
    _require_best("num_groups", "group", "Join it with another group, or use more rows.", temperatures)
    return GroupwiseTemperature(temperatures, gradient)


def _confidence(log_probs):
    return jnp.exp(log_probs.max(-1))


def _check_groups(groups, shape, num_groups) -> None:
    given, kind = jnp.shape(groups), jnp.asarray(groups).dtype
    if given != shape or not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(
            f"`features` must be one whole number per row, the group, of shape {shape}, got {kind} of shape {given}. "
            "Number the groups 0, 1, 2, ..."
        )
    if concrete(groups) and np.size(groups):
        least, most = int(np.min(groups)), int(np.max(groups))
        if least < 0 or most >= num_groups:
            raise ValueError(
                f"`features` must lie in [0, {num_groups}), the groups, got values from {least} to {most}. Number the "
                "groups 0, 1, 2, ..."
            )


def _require_best(name, region, remedy, temperatures) -> None:
    if not concrete(temperatures):
        return
    lost = np.flatnonzero(np.isnan(np.asarray(temperatures)))
    if lost.size:
        raise ValueError(
            f"`{name}` must leave every {region} a finite best temperature, got none for {lost[:10].tolist()} of "
            f"{len(temperatures)}: it has no row, every label there is the most probable class, or labels are unrelated to "
            f"predictions. {remedy}"
        )


@jax.jit(static_argnames="num_bins")
def _bins(log_probs, weights, num_bins):
    """Inner edges, bin of each row, and mean confidence of each bin."""
    confidence = _confidence(log_probs)
    edges = equal_mass_edges(confidence, weights, num_bins)
    regions = place(edges, confidence)
    centres = _sums(weights * confidence, regions, num_bins) / _sums(weights, regions, num_bins)
    return edges, regions, centres


def _sums(values, regions, num_regions):
    """Sum of (rows,) in each region, in blocks of about a thousand: a running float32 sum of many rows loses digits."""
    blocks = max(1, min(len(values) // 1024, 2**16 // num_regions))
    place = jnp.arange(len(values)) % blocks * num_regions + regions
    sums = jnp.zeros(blocks * num_regions, values.dtype).at[place].add(values)
    return jnp.matmul(jnp.ones(blocks), sums.reshape(blocks, num_regions), precision="highest")


@jax.jit(static_argnames="num_regions")
def temperature_of_regions(log_probs, targets, weights, regions, num_regions):
    """Best temperature of each region, NaN where none is finite, and the largest absolute derivative left.

    All regions are bisected at once, so that more of them cost no more.
    """
    log_probs = jnp.where(log_probs == -jnp.inf, -1e30, log_probs)  # finite at every temperature, and possible at none
    shifted = log_probs - log_probs.max(-1, keepdims=True)
    chosen = jnp.take_along_axis(shifted, targets[:, None], -1)[:, 0]
    mass = _sums(weights, regions, num_regions)

    def slopes(log_temperature):  # d nll / d (1 / T) = mean(E_p[z] - z_y)
        probs = jax.nn.softmax(shifted * jnp.exp(-log_temperature)[regions, None])
        each = (probs * shifted).sum(-1) - chosen
        return _sums(weights * each, regions, num_regions) / mass

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_hot = slopes(middle) < 0
        return jnp.where(too_hot, low, middle), jnp.where(too_hot, middle, high)

    edge = jnp.full(num_regions, math.log(LARGEST), jnp.float32)
    bracketed = (slopes(-edge) > 0) & (slopes(edge) < 0)
    low, high = jax.lax.fori_loop(0, 32, halve, (-edge, edge))
    best = (low + high) / 2
    return jnp.exp(undefined_where(~bracketed, best)), abs(slopes(best)).max()
