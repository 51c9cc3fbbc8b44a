"""Labelled rows made for calibration under shift: perturbed validation rows, and mixed target rows with pseudo-labels."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Classes, check_classes
from bayescal.predictive import check_predictive, check_rows, concatenate, take
from bayescal.types import Array, Key

HALVINGS, DOUBLINGS = 20, 16


class PerturbedRows(NamedTuple):
    """Predictions of rows under more and more noise, the clean ones first: what any calibrator is fitted on.

    pred: predictive of (levels + 1) * rows, level-major.
    targets: their labels.
    noise: standard deviation of the noise of each level, in the inputs' unit; 0 first.
    accuracy: of the pool at each level; falls about evenly.
    """

    pred: Classes
    targets: Int[Array, "rows"]
    noise: Float[np.ndarray, "levels"]
    accuracy: Float[np.ndarray, "levels"]


class PseudoTargetRows(NamedTuple):
    """Predictions of mixed target rows, and the label of the larger part as the network has it.

    pred: predictive of the mixed rows.
    targets: pseudo-labels.
    """

    pred: Classes
    targets: Int[Array, "rows"]


def perturbed_rows(key: Key, predict: Callable[[Array], Classes], inputs, targets, *, levels: int) -> PerturbedRows:
    """Validation rows with noise N(0, s_l^2), s_l so that accuracy is acc + (chance - acc) l / levels, l = 0 ... levels.

    Needs no rows of the target: labelled rows and the network. `fit_temperature(rows.pred, rows.targets)` is then
    perturbation-based temperature scaling, for shifts of unknown kind and size. Chance is the accuracy under overwhelming
    noise, 65536 standard deviations of the inputs (1 / classes where classes are as frequent); within two standard errors of it
    counts as it. Noise levels are bisected on a log scale. With levels = 0 only the clean rows are left.

    Args:
        key: of the noise.
        predict: `inputs -> predictive`, over classes; it is called about 20 times a level.
        inputs: array (rows, ...) of floats.
        targets: integer labels (rows,).
        levels: how many noise levels, besides none; 10 is usual.

    Raises:
        ValueError: for a negative number of levels, inputs that are no floats, a network that is no better than it is under
            overwhelming noise, unusable predictions or targets.
        TypeError: for a predictive that is not over classes.
    Source: Tomani et al. 2021; how the levels are spaced is recalled.
    """
    if not isinstance(levels, Integral) or levels < 0:
        raise ValueError(f"`levels` must be a whole number, not negative, got {levels!r}. 10 is usual.")
    inputs, targets = _floats(inputs), np.asarray(targets)
    clean = predict(inputs)
    check_classes(clean)
    check_rows(clean, targets, None)
    accuracy = lambda pred: float((np.asarray(pred.log_probs().argmax(-1)) == targets).mean())
    best, most = accuracy(clean), float(inputs.std()) * 2.0**DOUBLINGS

    def noisy(level, size):
        draws = jax.random.normal(jax.random.fold_in(key, level), inputs.shape, inputs.dtype)
        return predict(inputs + jnp.asarray(size, inputs.dtype) * draws)

    chance = accuracy(noisy(0, most)) if levels else best
    near_chance = chance + 2 * math.sqrt(chance * (1 - chance) / len(targets))
    if levels and best <= near_chance:
        raise ValueError(
            f"`predict` must lose accuracy under noise, got {best:.3g} without and {chance:.3g} with noise of {most:.3g}. "
            "Perturb the inputs that the network sees, before any normalisation that undoes it; check the targets."
        )
    preds, noise, reached = [clean], [0.0], [best]
    for level in range(1, levels + 1):
        wanted = max(best + (chance - best) * level / levels, near_chance)
        low = max(noise[-1], most * 2.0**-HALVINGS / 2**DOUBLINGS)
        high = most
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if accuracy(noisy(level, middle)) <= wanted else (middle, high)
        preds.append(noisy(level, high))
        noise.append(high)
        reached.append(accuracy(preds[-1]))
    return PerturbedRows(concatenate(preds), np.tile(targets, levels + 1), np.array(noise), np.array(reached))


def pseudo_target_rows(
    key: Key, predict: Callable[[Array], Classes], inputs, *, share: float = 0.65
) -> PseudoTargetRows:
    """x' = share x_i + (1 - share) x_j with the top class of x_i for label, for pairs whose top classes differ.

    Needs unlabelled rows of the target and the network, and no source. `fit_temperature(rows.pred, rows.targets)` is then
    PseudoCal: mixing makes rows right and wrong in about the shares of the target rows, which is an observation and not a
    theorem.

    Args:
        key: of the pairs.
        predict: `inputs -> predictive`, over classes; it is called twice.
        inputs: array (rows, ...) of floats, of the target.
        share: of the row that gives the label, in (0.5, 1).

    Raises:
        ValueError: for a share outside (0.5, 1), inputs that are no floats, rows that all have one top class, unusable
            predictions.
        TypeError: for a predictive that is not over classes.
    Source: Hu et al. 2023 (PseudoCal); its code, with share 0.65 and pairs of different classes, was looked at.
    """
    if not 0.5 < share < 1:
        raise ValueError(f"`share` must lie in (0.5, 1), got {share!r}. 0.65 is usual.")
    inputs = _floats(inputs)
    first = predict(inputs)
    check_classes(first)
    check_predictive(first)
    labels = np.asarray(first.log_probs().argmax(-1))
    partner = np.asarray(jax.random.permutation(key, len(labels)))
    differ = np.flatnonzero(labels != labels[partner])
    if not differ.size:
        raise ValueError(
            f"`inputs` must be rows of more than one top class, got {len(labels)} of one. Pass more rows of the target."
        )
    mixed = share * inputs + (1 - share) * inputs[partner]
    pred = take(predict(mixed), differ)
    check_predictive(pred)
    return PseudoTargetRows(pred, labels[differ].astype(np.int32))


def _floats(inputs) -> jax.Array:
    inputs = jnp.asarray(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"`inputs` must be floats, got {inputs.dtype}. Convert them with `astype(np.float32)`.")
    return inputs
