"""Draws folded in one at a time or a few: parts of predictives that merge exactly, in any order and grouping."""

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.decompose.information import (
    IMPOSSIBLE,
    ClassPredictive,
    divergence_of,
    member_mean,
    only,
    pool_ratios,
    ratios_against,
    standing_logits,
)
from bayescal.decompose.normal import matched_information
from bayescal.decompose.rows import MEMORY_NUMBERS, in_blocks, map_blocks, numbers_at_once
from bayescal.decompose.uncertainty import Uncertainty, check_raw
from bayescal.predictive import (
    Categorical,
    Gaussian,
    Predictive,
    Probabilities,
    float32_or_wider,
    join_members,
    refuse,
    variance_of_means,
    weighted_sum,
)


class LogPool(NamedTuple):
    """A pool's log-probabilities in parts, so that pools which nearly agree differ by exactly what they differ.

    log p = reference - peak - log_norm + log_ratio, nats; reference, log_ratio: (*batch, classes); peak, log_norm:
    (*batch, 1).
    """

    reference: jax.Array
    peak: jax.Array
    log_norm: jax.Array
    log_ratio: jax.Array

    def log_probs(self) -> Float[jax.Array, "*batch classes"]:
        """Log-probabilities, nats."""
        return (self.reference - self.peak - self.log_norm) + self.log_ratio

    def above(self, other: "LogPool") -> Float[jax.Array, "*batch classes"]:
        """log p - log p_other, nats."""
        return (self.reference - other.reference) - self.norms_above(other) + (self.log_ratio - other.log_ratio)

    def norms_above(self, other: "LogPool") -> Float[jax.Array, "*batch one"]:
        """By how much the norms differ, nats."""
        return (self.peak - other.peak) + (self.log_norm - other.log_norm)


class ClassDraws(NamedTuple):
    """What draws of class probabilities leave: two numbers a class, and a few for each example.

    weight: of all draws; pool: their mean distribution; entropy: mean of the draws' own;
    information: mutual information; energy: mean free energy, None for probabilities; each (*batch,), nats.
    """

    weight: Float[jax.Array, "*batch"]
    pool: LogPool
    entropy: Float[jax.Array, "*batch"]
    information: Float[jax.Array, "*batch"]
    energy: Float[jax.Array, "*batch"] | None


class NormalDraws(NamedTuple):
    """What draws of normal distributions leave, each (*batch, dim).

    reference + offset: the mean of means, taken apart so that means far from zero lose no digits; in squared unit their
    variance `spread`, the mean noise, and the mean of what is known of the means' own variance.
    """

    weight: Float[jax.Array, "*batch"]
    reference: Float[jax.Array, "*batch dim"]
    offset: Float[jax.Array, "*batch dim"]
    spread: Float[jax.Array, "*batch dim"]
    noise: Float[jax.Array, "*batch dim"]
    known: Float[jax.Array, "*batch dim"]


Draws = ClassDraws | NormalDraws

TOGETHER = 8  # draws that are folded in as one: a block of members costs a quarter of as many merges
BLOCK_NUMBERS = 2**19  # of these draws on a CPU: 2 MB in float32, enough rows for a network to be worth its call


def accumulate(pred: Predictive) -> Draws:
    """The members of a predictive as draws that can be merged with others: `merge(accumulate(a), accumulate(b))`.

    Args:
        pred: raw logits, one logit, probabilities or normals. Weights count as they are: two blocks merge as if their
            members stood in one predictive.

    Raises:
        ValueError: for a pooled or calibrated predictive.
        TypeError: for Dirichlets.
    """
    check_raw(pred)
    if isinstance(pred, Gaussian):
        return _accumulate_normals(pred)
    if not isinstance(pred, ClassPredictive):
        refuse(type(pred).__name__, "accumulate", "Dirichlets are taken apart in closed form by `decompose`.")
    raw = pred if isinstance(pred, Categorical) else pred.as_categorical()
    weights = None if raw.member_weights is None else raw.weights()[..., None]
    found = standing_logits(float32_or_wider(raw.logits), weights)
    ratios, most = ratios_against(found.against, found.probs, weights)
    pooled = pool_ratios(ratios, weights)
    mean = lambda x: member_mean(x, weights)[0, ..., 0]
    information = divergence_of(ratios, pooled, weights)
    return ClassDraws(
        _total_weight(pred, information.dtype),
        LogPool(found.reference[0], found.peak[0], found.log_norm[0], (most + pooled.log_ratio)[0]),
        mean(found.entropy),
        information,
        None if isinstance(pred, Probabilities) else mean(found.energy),
    )


def _accumulate_normals(pred: Gaussian) -> NormalDraws:
    weights, means = pred.weights()[..., None], float32_or_wider(pred.mean)
    lead = jnp.argmax(jnp.broadcast_to(weights, means.shape), axis=0, keepdims=True)
    reference = jnp.take_along_axis(means, lead, axis=0)
    known = jnp.zeros_like(means) if pred.mean_variance is None else float32_or_wider(pred.mean_variance)
    return NormalDraws(
        _total_weight(pred, means.dtype),
        reference[0],
        weighted_sum(means - reference, weights),
        variance_of_means(pred),
        weighted_sum(float32_or_wider(pred.variance), weights),
        weighted_sum(known, weights),
    )


def _total_weight(pred: Predictive, dtype) -> jax.Array:
    if pred.member_weights is None:
        return jnp.full(pred.batch_shape, pred.num_members, dtype)
    total = jnp.asarray(pred.member_weights, dtype).sum(0)
    return jnp.broadcast_to(total if total.ndim else total.reshape((1,) * len(pred.batch_shape)), pred.batch_shape)


def merge(a: Draws, b: Draws) -> Draws:
    """All draws of `a` and `b`, for the same examples; the order and the grouping matter to rounding alone.

    I = w_a I_a + w_b I_b + w_a KL(p_a || p) + w_b KL(p_b || p), every term >= 0, p the pool of both; variances by Chan's
    formula. Draws of weight 0 count for nothing.

    Args:
        a, b: as `accumulate` or `merge` gives them.

    Raises:
        TypeError: for draws of different kinds: classes and normals, logits and probabilities.
        ValueError: for other shapes: nothing is broadcast.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        kinds = [f"{type(x).__name__}{' without energies' if getattr(x, 'energy', 0) is None else ''}" for x in (a, b)]
        raise TypeError(
            f"`a` and `b` must be draws of one kind, got {' and '.join(kinds)}. Merge normals with normals, logits with "
            "logits, and probabilities with probabilities."
        )
    shapes = [[x.shape for x in jax.tree.leaves(draws[1:])] for draws in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`a` and `b` must be draws for the same examples, got shapes {shapes[0][0]} and {shapes[1][0]}. Accumulate the "
            "same rows and classes."
        )
    if isinstance(a, NormalDraws) and isinstance(b, NormalDraws):
        return _merge_normals(a, b)
    assert isinstance(a, ClassDraws) and isinstance(b, ClassDraws)
    return _merge_classes(a, b)


def _shares(a, b):
    weights = jnp.stack([a.weight, b.weight])
    return (weights / weights.sum(0, keepdims=True))[..., None]


def _merge_normals(a: NormalDraws, b: NormalDraws) -> NormalDraws:
    weights = _shares(a, b)
    mean = lambda x, y: weighted_sum(jnp.stack([x, y]), weights)
    nothing = weights == 0
    reference = jnp.where(nothing[0], b.reference, a.reference)
    offset = jnp.where(nothing[0], b.offset, a.offset)
    difference = jnp.where(nothing.any(0), 0, (b.reference - a.reference) + (b.offset - a.offset))
    spread = mean(a.spread, b.spread) + weights[0] * weights[1] * difference**2
    noise, known = mean(a.noise, b.noise), mean(a.known, b.known)
    return NormalDraws(a.weight + b.weight, reference, offset + weights[1] * difference, spread, noise, known)


def _merge_classes(a: ClassDraws, b: ClassDraws) -> ClassDraws:
    weights = _shares(a, b)
    heavier = weights[0] > weights[1]  # what the pool is told against: the lighter may weigh nothing
    base = jax.tree.map(lambda x, y: jnp.where(heavier, x, y), a.pool, b.pool)
    other = jax.tree.map(lambda x, y: jnp.where(heavier, y, x), a.pool, b.pool)
    share = jnp.sort(weights, axis=0)[::-1]
    apart, counted = other.above(base), share != 0
    against = only(counted, jnp.stack([jnp.zeros_like(apart), apart]), IMPOSSIBLE)
    probs = only(counted, jnp.exp(jnp.stack([base.log_probs(), other.log_probs()])), 0)
    ratios, most = ratios_against(against, probs, share)
    pooled = pool_ratios(ratios, share)
    mean = lambda x, y: weighted_sum(jnp.stack([x, y]), weights[..., 0])
    most, above = most[0], pooled.log_ratio[0]
    far = most > 1  # there the other's reference says it in smaller numbers; nearer, the base's stays as it came
    reference = jnp.where(far, other.reference - other.norms_above(base), base.reference)
    log_ratio = jnp.where(far, other.log_ratio + above, base.log_ratio + (most + above))
    return ClassDraws(
        a.weight + b.weight,
        base._replace(reference=reference, log_ratio=log_ratio),
        mean(a.entropy, b.entropy),
        mean(a.information, b.information) + divergence_of(ratios, pooled, share),
        None if a.energy is None or b.energy is None else mean(a.energy, b.energy),
    )


def finish(draws: Draws) -> Uncertainty:
    """The parts that `decompose` gives for all the draws in one predictive; for probabilities `ood` is the pool's entropy."""
    if isinstance(draws, NormalDraws):
        epistemic = draws.spread + draws.known
        return Uncertainty(draws.noise + epistemic, draws.noise, epistemic, matched_information(draws.noise, epistemic))
    total = draws.entropy + draws.information
    return Uncertainty(total, draws.entropy, draws.information, total if draws.energy is None else draws.energy)


def decompose_draws(draw: Callable, draws, inputs, *shared, rows: int | None = None) -> Uncertainty:
    """What `decompose` gives for all draws together, which are never there together: predicted, folded in and forgotten.

    One program goes through the rows in blocks, and for each through the draws, a few at a time, so a draw that makes its
    own network makes it once a block: where networks fit in memory pass them as `draws`. It compiles once for a `draw`:
    keep that in a variable.

    Args:
        draw: `(one of draws, inputs of some rows, *shared) -> Predictive` of these rows, any number of members.
        draws: pytree of arrays with a leading axis: keys, or networks (an ensemble's stacked variables).
        inputs: pytree of arrays (rows, ...).
        shared: pytrees that all draws get, such as a network's variables.
        rows: of a block; None = as many as hold 2**19 numbers of eight draws on a CPU, 2**27 elsewhere.

    Raises:
        ValueError: for no draws, inputs of different lengths, or a number of rows below 1.
    """
    number, length = _leading("draws", draws), _leading("inputs", inputs)
    if rows is None:
        one = jax.eval_shape(draw, *_one_of(draws, inputs), *shared)
        numbers = BLOCK_NUMBERS if jax.default_backend() == "cpu" else MEMORY_NUMBERS
        rows = max(1, numbers // max(1, TOGETHER * sum(x.size for x in jax.tree.leaves(one))))
    if not isinstance(rows, Integral) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"`rows` must be a whole number of at least 1, got {rows!r}. Leave it out for a good one.")
    return _decompose_draws(draw, min(int(rows), length), number, draws, inputs, shared)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decompose_draws(draw, size, number, draws, inputs, shared):
    together = min(TOGETHER, number)
    whole, rest = divmod(number, together)
    several = math.isqrt(whole)  # groups that are folded into one before they join the rest: fewer roundings in a row

    def block(first):
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 0), inputs)
        one = lambda i: draw(jax.tree.map(lambda x: x[i], draws), own, *shared)

        def group(start, members):
            pred = join_members(jax.lax.map(one, start + jnp.arange(members)))  # weights count as they are
            return in_blocks(accumulate, pred, numbers=numbers_at_once(jax.default_backend()))

        def folded(g):
            stop = jnp.minimum((g + 1) * several, whole)
            join = lambda i, found: merge(found, group(i * together, together))
            return jax.lax.fori_loop(g * several + 1, stop, join, group(g * several * together, together))

        found = jax.lax.fori_loop(1, -(-whole // several), lambda g, found: merge(found, folded(g)), folded(0))
        return finish(merge(found, group(whole * together, rest)) if rest else found)

    return map_blocks(block, jax.tree.leaves(inputs)[0].shape[0], size)


def _leading(name: str, tree) -> int:
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"`{name}` must be arrays with one leading axis of the same length, at least 1, got lengths {sorted(lengths)}. "
            "Stack them."
        )
    return lengths.pop()


def _one_of(draws, inputs):
    """Shapes of one draw and of one row."""
    shape = lambda x: jax.eval_shape(lambda x: x[0], x)
    row = lambda x: jax.eval_shape(lambda x: x[:1], x)
    return jax.tree.map(shape, draws), jax.tree.map(row, inputs)
