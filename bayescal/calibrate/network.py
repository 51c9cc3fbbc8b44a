"""A small network from what is known of a row to the settings of its map, and how such maps are learnt."""

from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import concrete
from bayescal.calibrate.objectives import check_objective, sum_over_blocks
from bayescal.calibrate.temperature import fit_temperature
from bayescal.predictive import Categorical, float32_or_wider
from bayescal.predictive.categorical import gather
from bayescal.types import Array, Key, Metric, WholeMetric, pytree

IMPOSSIBLE = -1e20  # stands for log 0 where something is differentiated: -inf times a probability of 0 would be NaN


@pytree
class Network:
    """Tanh layers and a linear one on standardised inputs, `network(inputs) -> outputs`: bounded whatever comes in.

    Args:
        centre: mean of the inputs over the rows of the fit.
        scale: their standard deviation; 1 for an input that does not vary.
        weights: a matrix (inputs, outputs) for every layer.
        biases: a vector (outputs,) for every layer.
    """

    centre: Float[Array, "features"]
    scale: Float[Array, "features"]
    weights: tuple[Any, ...]
    biases: tuple[Any, ...]

    def __call__(self, inputs: Float[Array, "*batch features"]) -> Float[jax.Array, "*batch outputs"]:
        """The last layer's outputs; NaN for a row whose inputs hold one."""
        rows = (inputs - jax.lax.stop_gradient(self.centre)) / jax.lax.stop_gradient(self.scale)
        for weights, bias in zip(self.weights, self.biases, strict=True):
            rows = jnp.tanh(rows) if weights is not self.weights[0] else rows
            rows = jnp.matmul(rows, weights, precision="highest") + bias
        return jnp.asarray(rows)


def new_network(key: Key, inputs: jax.Array, row_weights: jax.Array, hidden: tuple[int, ...], start) -> Network:
    """Network that gives `start` for every row: its last matrix is zero, the others are normal, variance 1 / inputs."""
    for width in hidden:
        if not isinstance(width, Integral) or width < 1:
            raise ValueError(f"`hidden` must be whole numbers of at least 1, got {hidden!r}. (5, 5) is usual.")
    if not hidden:
        raise ValueError("`hidden` must hold at least one width, got none. (5, 5) is usual.")
    share = (row_weights / row_weights.sum())[:, None]
    centre = (share * inputs).sum(0)
    spread = jnp.sqrt((share * (inputs - centre) ** 2).sum(0))
    scale = jnp.where(spread > 1e-6 * abs(centre), spread, 1)
    widths = (inputs.shape[1], *hidden)
    keys = jax.random.split(key, len(hidden))
    inner = [jax.random.normal(k, (a, b)) / max(a, 1) ** 0.5 for k, a, b in zip(keys, widths[:-1], widths[1:])]
    start = jnp.asarray(start)
    biases = (*(jnp.zeros(width) for width in hidden), start)
    return Network(centre, scale, (*inner, jnp.zeros((hidden[-1], len(start)))), biases)


class Learnt(NamedTuple):
    """What `learn` ends with: `parts`, the mean `loss` of the rows, and the largest absolute derivative by any number."""

    parts: Any
    loss: jax.Array
    gradient: jax.Array


def learn(apply, parts, rows, inputs, *, objective: Metric | WholeMetric | None, penalty: float, steps: int) -> Learnt:
    """argmin of mean nll, or of a metric, + penalty * sum of squared weight matrices, by `steps` full-batch steps of Adam.

    Its rate falls from 0.03 to 0 as a cosine. The start is kept where the end is worse or not a number.

    Args:
        apply: `(parts, log_probs, inputs) -> log-probabilities`; a function of its module, since it is compiled for.
        parts: `(network, anything else that is learnt)`.
        rows: what `rows_for_fit` gives.
        inputs: of the network, (rows, features).
        objective: to optimise, in its own direction; None = nll.
        penalty: of the weights, not the biases; not negative.
        steps: how many; each goes over all rows.
    """
    if objective is not None:
        check_objective(objective)
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"`steps` must be a whole number of at least 1, got {steps!r}. 500 is usual.")
    if concrete(penalty) and not (np.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"`penalty` must be a finite number, not negative, got {penalty!r}. 1e-4 is usual.")
    return _learn(apply, parts, rows, inputs, penalty, objective, int(steps))


@partial(jax.jit, static_argnames=("apply", "objective", "steps"))
def _learn(apply, parts, rows, inputs, penalty, objective, steps):
    import optax  # a second of the import of bayescal

    log_probs, targets, weights = rows
    log_probs = jnp.where(jnp.isneginf(log_probs), IMPOSSIBLE, log_probs)
    sign = -1 if objective is not None and objective.better == "higher" else 1

    def value(parts):
        if isinstance(objective, WholeMetric):
            pred = Categorical(apply(parts, log_probs, inputs)[None], normalised=True)
            return objective.compute(*objective.read(pred, targets), weights)

        def measure(log_probs, inputs, targets, weights):
            mapped = apply(parts, log_probs, inputs)
            if objective is None:
                return (weights * gather(mapped, targets)).sum()
            return objective.measure(Categorical(mapped[None], normalised=True), targets, weights)

        sums = sum_over_blocks(measure, log_probs, inputs, targets, weights=weights)
        return -sums / weights.sum() if objective is None else objective.compute(sums)

    def total(parts):
        loss = value(parts)
        return sign * loss + penalty * sum((matrix**2).sum() for matrix in parts[0].weights), loss

    # At the start the best temperature's derivative is rounding error: a smaller eps would make a full step of its sign.
    descent = optax.adam(optax.cosine_decay_schedule(0.03, steps), eps=1e-4)

    def step(carry, _):
        parts, state = carry
        updates, state = descent.update(jax.grad(total, has_aux=True)(parts)[0], state)
        return (optax.apply_updates(parts, updates), state), None

    (end, _), _ = jax.lax.scan(step, (parts, descent.init(parts)), length=steps)
    (after, loss), (before, first) = total(end), total(parts)
    better = (after <= before) & (sign * loss <= sign * first)  # False for NaN; a smaller penalty alone is not better
    end = jax.tree.map(lambda new, old: jnp.where(better, new, old), end, parts)
    slopes, loss = jax.grad(total, has_aux=True)(end)
    return Learnt(end, loss, jnp.stack([abs(x).max() for x in jax.tree.leaves(slopes) if x.size]).max())


def best_temperature(rows) -> Array:
    """The temperature of `fit_temperature`, where learnt maps start."""
    log_probs, targets, weights = rows
    return fit_temperature(Categorical(log_probs[None], normalised=True), targets, weights=weights).temperature


def surprisals(log_probs: Float[Array, "*batch classes"], top_k: int) -> Float[jax.Array, "*batch features"]:
    """1 - 1 / (1 - log p) of the `top_k` most probable classes, the most probable first; in [0, 1], 1 for p = 0."""
    if not isinstance(top_k, Integral) or top_k < 0:
        raise ValueError(f"`top_k` must be a whole number, not negative, got {top_k!r}. 10 is usual.")
    highest = jax.lax.top_k(log_probs, min(int(top_k), log_probs.shape[-1]))[0]
    return 1 - 1 / (1 - highest)


def surprisals_for_use(log_probs, network: Network, top_k: int) -> jax.Array:
    """`surprisals`; raises for another number of them than in the fit."""
    inputs, width = surprisals(log_probs, top_k), network.centre.shape[0]
    if inputs.shape[-1] != width:
        expected = f"the {width}" if width < top_k else f"at least {width}"
        raise ValueError(
            f"`pred` must have {expected} classes, got {log_probs.shape[-1]}. Fit a calibrator for these classes."
        )
    return inputs


def features_for_fit(features, weights) -> jax.Array:
    """Features (rows, features) in float32 or wider, 0 in rows that weigh nothing; raises unless the others are finite."""
    features = float32_or_wider(features)
    if features.ndim != 2 or features.shape[0] != weights.shape[0] or not features.shape[1]:
        raise ValueError(
            f"`features` must have shape (rows, features) with {weights.shape[0]} rows, got {features.shape}. "
            "Pass one vector per row of `pred`."
        )
    features = jnp.where(weights[:, None] > 0, features, 0)
    if concrete(features) and not (fine := np.isfinite(features).all(1)).all():
        raise ValueError(
            f"`features` must be finite, got NaN or infinity in {int((~fine).sum())} rows, first in row "
            f"{int(fine.argmin())}. Look for inputs that were not finite."
        )
    return features


def features_for_use(features, pred, width: int) -> jax.Array:
    """Features (*batch, features) in float32 or wider; raises unless they fit the predictive and the rows of the fit."""
    if np.shape(features) != (*pred.batch_shape, width):
        raise ValueError(
            f"`features` must have shape {(*pred.batch_shape, width)}, got {np.shape(features)}. "
            "Pass one vector per row of `pred`, of the kind that the fit had."
        )
    return float32_or_wider(features)


def softplus_inverse(value):
    """x with softplus(x) = value, of a positive number."""
    return value + jnp.log(-jnp.expm1(-value))
