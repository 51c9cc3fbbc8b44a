"""Free energy of shaped activations: clipped at a threshold, pruned, or scaled by their own sums.

Far from the data a rectified network is linear and its logits grow without end: all these scores take rows far out for
familiar, and find those between the classes. A distance finds the others; `fit_combination` joins both.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.predictive import undefined_where
from bayescal.scores.features import as_rows, defined, training_rows
from bayescal.scores.heads import Head, as_pytree, energy, logits_of
from bayescal.types import Array, pytree


@pytree
class ClippedEnergy:
    """-logsumexp(head(min(f, threshold))): `fitted(features) -> (rows,)`.

    Args:
        head: gives the logits.
        threshold: largest activation that is let through.
    """

    head: Head
    threshold: Float[Array, ""]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Nats, of any sign; higher = more unlike the training data. NaN where features or logits are not finite."""
        return _clipped_energy(self, as_rows(features))


@pytree
class ShapedEnergy:
    """-logsumexp(head(shape(f, kept))): `score(features) -> (rows,)`.

    Args:
        head: gives the logits.
        shape: `(features, number of largest activations that are kept) -> features`.
        quantile: share of a row's activations that are not among those kept.
    """

    head: Head
    shape: Callable[[jax.Array, int], jax.Array] = dataclasses.field(metadata={"static": True})
    quantile: float = dataclasses.field(metadata={"static": True})

    def __call__(self, features: Float[Array, "rows features"]) -> Float[jax.Array, "rows"]:
        """Nats, of any sign; higher = more unlike the training data.

        NaN where features or logits are not finite, and where the shape has no meaning (see the function that built it).

        Raises:
            ValueError: where no activation is kept.
        """
        rows = as_rows(features)
        width = rows.shape[1]
        if not width - round(width * self.quantile):
            raise ValueError(
                f"`quantile` must keep at least one of the {width} features of a row, got {self.quantile}, which keeps "
                "none. Pass a smaller one."
            )
        return _shaped_energy(self, rows)


def fit_react(features: Float[Array, "rows features"], head: Head, *, quantile: float = 0.9) -> ClippedEnergy:
    """-logsumexp(head(min(f, c))), c the quantile of all activations of the training rows together.

    Nats, of any sign; higher = more unlike the training data. Moves by -a where a is added to all logits.

    Args:
        features: penultimate activations of the training rows.
        head: `features (rows, features) -> logits (rows, classes)`, best `jax.tree_util.Partial(lambda w, b, f: f @ w + b,
            weights, bias)` with the lambda made once: another plain function is another program.
        quantile: of the activations, in (0, 1]; 1 clips nothing that was seen.

    Raises:
        TypeError: for a head that is no function.
        ValueError: for a quantile outside (0, 1], or at the least activation (for units that are mostly 0): all rows would
            be alike; features that are not finite, other shapes.
    Source: Sun et al. 2021 (recalled); the pooled quantile as in pytorch-ood, which was looked at.
    """
    rows = np.asarray(training_rows(features), np.float32)
    if not 0 < quantile <= 1:
        raise ValueError(f"`quantile` must lie in (0, 1], got {quantile!r}. 0.9 is that of the paper, not 90.")
    threshold = np.quantile(
        rows, np.asarray(quantile, np.float64)
    )  # of a Python number, places would be rounded to float32
    if threshold <= rows.min():
        raise ValueError(
            f"`quantile` must be above that of the least activation, got {quantile}, at which all are clipped to "
            f"{threshold:.3g} and all rows alike. Pass a larger one."
        )
    return ClippedEnergy(as_pytree(head), jnp.float32(threshold))


def ash_p(head: Head, *, quantile: float) -> ShapedEnergy:
    """-logsumexp(head(f where it is among the largest of its row, else 0)), ASH-P.

    Nats, of any sign; higher = more unlike the training data. Nothing is fitted. At quantile 0 it is the free energy.

    Args:
        head: `features (rows, features) -> logits (rows, classes)`, best `jax.tree_util.Partial(lambda w, b, f: f @ w + b,
            weights, bias)` with the lambda made once: another plain function is another program.
        quantile: share of a row's activations set to 0, in [0, 1), rounded to a whole number of them; of ties the first
            are kept.

    Raises:
        TypeError: for a head that is no function.
        ValueError: for a quantile outside [0, 1) and, when called, where it keeps no activation.
    Source: Djurisic et al. 2023 (recalled); rounding as in OpenOOD and pytorch-ood (looked at).
    """
    return _shaped(head, _pruned, quantile)


def ash_b(head: Head, *, quantile: float) -> ShapedEnergy:
    """-logsumexp(head(sum(f) / kept where f is among the largest of its row, else 0)), ASH-B.

    Nats, of any sign; higher = more unlike the training data. NaN for rows with a negative activation.
    Arguments, errors and source as for `ash_p`.
    """
    return _shaped(head, _binary, quantile)


def ash_s(head: Head, *, quantile: float) -> ShapedEnergy:
    """-logsumexp(head(f exp(sum of all / sum of the largest) where f is among the largest of its row, else 0)), ASH-S.

    Nats, of any sign; higher = more unlike the training data. NaN for rows with a negative activation, or of zeros.
    Arguments, errors and source as for `ash_p`.
    """
    return _shaped(head, _sharpened, quantile)


def scale(head: Head, *, quantile: float) -> ShapedEnergy:
    """-logsumexp(head(f exp(sum of all / sum of the largest))), SCALE: as ASH-S, and nothing is pruned.

    Nats, of any sign; higher = more unlike the training data. NaN for rows with a negative activation, or of zeros.
    Arguments and errors as for `ash_p`.

    Source: Xu et al. 2024 (recalled); the factor as in OpenOOD and pytorch-ood (looked at).
    """
    return _shaped(head, _scaled, quantile)


def _shaped(head, shape, quantile):
    if not 0 <= quantile < 1:
        raise ValueError(f"`quantile` must lie in [0, 1), got {quantile!r}. Write 0.9 for the 90th percentile.")
    return ShapedEnergy(as_pytree(head), shape, float(quantile))


def _largest(features, kept):
    """(values, mask) of the `kept` largest activations of each row: exactly so many, of ties the first."""
    values, index = jax.lax.top_k(features, kept)
    return values, jnp.zeros(features.shape, bool).at[jnp.arange(len(features))[:, None], index].set(True)


def _pruned(features, kept):
    return jnp.where(_largest(features, kept)[1], features, 0)


def _binary(features, kept):
    total = _positive(features).sum(-1, keepdims=True)
    return jnp.where(_largest(features, kept)[1], total / kept, 0)


def _sharpened(features, kept):
    return jnp.where(_largest(features, kept)[1], _scaled(features, kept), 0)


def _scaled(features, kept):
    largest = _largest(features, kept)[0].sum(-1, keepdims=True)
    return features * jnp.exp(_positive(features).sum(-1, keepdims=True) / largest)


def _positive(features):
    """The features, and NaN in rows with a negative one, whose sums are no measure of activation."""
    lost = ~(features >= 0).all(-1, keepdims=True)
    return undefined_where(lost, jnp.where(lost, 0, features))


@jax.jit
def _clipped_energy(fitted, features):
    return defined(features, energy(logits_of(fitted.head, jnp.minimum(features, fitted.threshold))))


@jax.jit
def _shaped_energy(score, features):
    width = features.shape[1]
    shaped = score.shape(features, width - round(width * score.quantile))
    return jnp.where(jnp.isfinite(shaped).all(-1), defined(features, energy(logits_of(score.head, shaped))), jnp.nan)
