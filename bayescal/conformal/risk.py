"""Risk control: the least conservative setting whose expected loss is bounded, on average or with high probability."""

import math
from collections.abc import Callable
from fractions import Fraction
from numbers import Real as Number
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, Int, Real

from bayescal.predictive import float32_or_wider, undefined_where
from bayescal.types import Array


class RiskControl(NamedTuple):
    """The setting chosen by `control_risk`, all ().

    parameter: E[loss of a new row at it] <= alpha. NaN where, traced, there is none, or losses increase.
    index: its place among the parameters; means nothing where the parameter is NaN.
    risk: mean loss of the calibration rows at it.
    """

    parameter: Float[Array, ""]
    index: Int[Array, ""]
    risk: Float[Array, ""]


class Certified(NamedTuple):
    """What `learn_then_test` found.

    p_values: of each setting's hypothesis "its risk exceeds alpha", in [0, 1], (settings,).
    certified: with probability at least 1 - delta, all settings that are True have risk at most alpha; choose any of
        them by any rule. All False = none is certified: abstain, or use more rows.
    """

    p_values: Float[Array, "settings"]
    certified: Bool[Array, "settings"]


def control_risk(
    losses: Real[Array, "rows settings"], parameters: Real[Array, "settings"], *, alpha: float, bound: float
) -> RiskControl:
    """Conformal risk control: the first setting for which (sum_i loss_i + bound) / (n + 1) <= alpha.

    E[loss of a new row] <= alpha over calibration rows and new row together, if exchangeable; for the miscoverage loss it
    is split conformal prediction.

    Args:
        losses: of each calibration row at each setting, at most `bound`; never increasing along the settings.
        parameters: the settings, from the least to the most conservative.
        alpha: risk wanted, in (0, bound).
        bound: largest possible loss, positive; 1 for shares and misses.

    Raises:
        ValueError: for an alpha outside (0, bound), losses that are NaN, above `bound` or increasing, and where no setting
            will do.
    Source: Angelopoulos et al. 2024, equation 4 and theorem 1 (recalled).
    """
    _check_between("alpha", alpha, bound)
    _check_losses(losses, largest=bound)
    losses = float32_or_wider(losses)  # halves do not add up, and whole numbers have no NaN
    rows, settings = losses.shape
    if jnp.shape(parameters) != (settings,):
        raise ValueError(
            f"`parameters` must have shape ({settings},), one per column of `losses`, got {jnp.shape(parameters)}. "
            "Pass the settings in the order of the columns."
        )
    total = losses.sum(0)
    good = total <= _at_most(Fraction(repr(float(alpha))) * (rows + 1) - Fraction(repr(float(bound))))
    if not isinstance(losses, Tracer):
        _check_monotone(np.asarray(losses))
        if not good.any():
            least = (float(total.min()) + bound) / (rows + 1)
            raise ValueError(
                f"`alpha` must be at least {least:.3g}, the least of (sum of losses + bound) / (rows + 1), got {alpha!r}. "
                + ("Use more rows." if bound / (rows + 1) > alpha else "Add more conservative settings.")
            )
    rising = (losses[:, 1:] > losses[:, :-1]).any() | jnp.isnan(losses).any()
    index = good.argmax()
    lost = rising | ~good.any()
    return RiskControl(
        undefined_where(lost, jnp.asarray(parameters, losses.dtype)[index]),
        index,
        undefined_where(lost, total[index] / rows),
    )


def fixed_sequence(p_values: Float[Array, "settings"], delta: float) -> Bool[jax.Array, "settings"]:
    """True from the last setting backwards, as long as p <= delta: the error of the whole family is at most delta.

    Powerful where settings go from the least to the most conservative, since then p-values fall along them; valid
    for any order fixed beforehand.

    Source: Angelopoulos et al. 2021 (learn then test), section 2.2 (recalled).
    """
    passed = jnp.asarray(p_values) <= delta
    return jnp.flip(jnp.cumsum(jnp.flip(~passed)) == 0)


def bonferroni(p_values: Float[Array, "settings"], delta: float) -> Bool[jax.Array, "settings"]:
    """True where p <= delta / settings: the error of the whole family is at most delta, whatever the order."""
    return jnp.asarray(p_values) <= delta / jnp.shape(p_values)[0]


def learn_then_test(
    losses: Real[Array, "rows settings"],
    *,
    alpha: float,
    delta: float,
    test: Callable[[jax.Array, float], jax.Array] = bonferroni,
) -> Certified:
    """Settings with risk <= alpha, all of them with probability >= 1 - delta; losses need not be monotone.

    Args:
        losses: of each calibration row at each setting, in [0, 1].
        alpha: risk wanted, in (0, 1).
        delta: probability that any certified setting has a greater risk, in (0, 1).
        test: `(p_values, delta) -> bool (settings,)` that keeps the error of the family: `bonferroni` or `fixed_sequence`.

    Raises:
        ValueError: for losses that are NaN or outside [0, 1], alpha or delta outside (0, 1).
    Source: Angelopoulos et al. 2021, theorem 1 (recalled).
    """
    _check_between("delta", delta, 1)
    p_values = hoeffding_bentkus(losses, alpha=alpha)
    return Certified(p_values, test(p_values, delta))


def hoeffding_bentkus(losses: Real[Array, "rows settings"], *, alpha: float) -> Float[jax.Array, "settings"]:
    """p = min(exp(-n h(min(r, alpha), alpha)), e P[Bin(n, alpha) <= ceil(n r)], 1) for "risk > alpha", r the mean loss.

    h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)). In [0, 1]; lower = the risk is more surely at most alpha. The
    binomial tail is in float64, on the host.

    Args:
        losses: in [0, 1].
        alpha: risk wanted, in (0, 1).

    Raises:
        ValueError: as `learn_then_test`.
    Source: Bates et al. 2021, proposition 8; Angelopoulos et al. 2021, proposition 1 (recalled).
    """
    _check_between("alpha", alpha, 1)
    _check_losses(losses, largest=1.0, least=0.0)
    losses = float32_or_wider(losses)
    rows = losses.shape[0]

    def tails(total):
        from scipy.special import bdtr, rel_entr  # slow to import

        total = np.asarray(total, np.float64)
        mean = np.minimum(total / rows, alpha)
        hoeffding = np.exp(-rows * (rel_entr(mean, alpha) + rel_entr(1 - mean, 1 - alpha)))
        counts = np.where(np.isnan(total), 0, np.minimum(np.ceil(total), rows))
        bentkus = math.e * bdtr(counts, rows, alpha)
        return np.where(np.isnan(total), np.nan, np.minimum(np.minimum(hoeffding, bentkus), 1)).astype(np.float32)

    total = losses.sum(0)
    return jax.pure_callback(tails, jax.ShapeDtypeStruct(total.shape, jnp.float32), total, vmap_method="expand_dims")


@jax.jit
def false_negative_rate(
    probs: Float[Array, "rows classes"], labels: Bool[Array, "rows classes"], thresholds: Float[Array, "settings"]
) -> Float[jax.Array, "rows settings"]:
    """Share of each row's true labels that the set {k : p_k >= 1 - threshold} misses: losses for `control_risk`.

    In [0, 1], never increasing in the threshold; 0 for a row without labels; NaN for one with a NaN probability. With
    one label a row it is miscoverage.

    Args:
        probs: of each label, which need not sum to one.
        labels: True where the label is right; any number a row.
        thresholds: settings in [0, 1]; 1 holds everything.
    """
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    strange, number = 1 - probs, jnp.maximum(labels.sum(-1), 1)
    missed = jax.lax.map(lambda t: ((strange > t) & labels).sum(-1), jnp.asarray(thresholds))
    share = (missed / number).T.astype(strange.dtype)
    return undefined_where(jnp.isnan(probs).any(-1)[:, None], share)


def _at_most(limit: Fraction) -> np.float32:
    """The largest float32 that is at most `limit`, so that a sum of whole numbers is compared exactly."""
    rounded = np.float32(float(limit))
    return rounded if Fraction(float(rounded)) <= limit else np.nextafter(rounded, np.float32(-np.inf))


def _check_between(name: str, value, largest) -> None:
    if not (isinstance(value, Number) and 0 < float(value) < largest):
        raise ValueError(
            f"`{name}` must be a number in (0, {largest:g}), got {value!r}. `alpha` is the risk allowed, in the unit of the "
            "losses, and `delta` the probability of error; 0.1 is usual."
        )


def _check_losses(losses, *, largest: float, least: float = -math.inf) -> None:
    if jnp.ndim(losses) != 2 or not all(jnp.shape(losses)):
        raise ValueError(
            f"`losses` must have shape (rows, settings), with at least one of each, got {jnp.shape(losses)}. For one setting "
            "add the axis: `losses[:, None]`."
        )
    if isinstance(losses, Tracer):
        return
    given = np.asarray(losses)
    if not (given >= least).all() or not (given <= largest).all() or not np.isfinite(given).all():
        raise ValueError(
            f"`losses` must be finite and in [{least:g}, {largest:g}], got values from {given.min()} to {given.max()}. Scale "
            "them, or state the largest that is possible."
        )


def _check_monotone(losses: np.ndarray) -> None:
    rising = (np.diff(losses, axis=1) > 0).any(1)
    if rising.any():
        raise ValueError(
            f"`losses` must never increase along the settings, got {int(rising.sum())} of {len(losses)} rows that do, first "
            f"at {int(rising.argmax())}. Sort the settings from the least to the most conservative, or use "
            "`learn_then_test`, which needs no order."
        )
