"""Forms of the curvature over one vector of all chosen parameters: diagonal, full, low-rank."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bayescal.memory import device_budget
from bayescal.methods.laplace.view import View, layers, of_leaves
from bayescal.predictive import float32_or_wider
from bayescal.types import Batch, Key, PyTree

ROWS_BYTES = 2**26  # of Jacobians held at a time while they are summed


class Structure(NamedTuple):
    """A form of the curvature H = sum over rows of J^T J: how it is summed, decomposed and used.

    Nothing in `decompose` depends on the prior precision, so that it can be changed afterwards; `precision` is () or
    (layers,), and P = H + diag(precision) throughout.

    init: `chosen parameters -> sums`, zeros; refuses parameters that it cannot treat.
    update: `(sums, view, batch, weights) -> sums`, weights (batch,) relative, 0 for padding.
    decompose: `(sums, rows, num_data) -> spectrum` of num_data / rows * sums; NaN for what is not positive semi-definite.
    log_det: `(spectrum, precision, chosen) -> log det P`.
    covariance: `(spectrum, precision, view, inputs) -> (batch, outputs, outputs)`, J P^-1 J^T of the flat outputs.
    noise: `(spectrum, precision, chosen, key) -> pytree` like the chosen, normal with covariance P^-1.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, View, Batch, jax.Array], PyTree]
    decompose: Callable[[PyTree, jax.Array, float], PyTree]
    log_det: Callable[[PyTree, jax.Array, PyTree], jax.Array]
    covariance: Callable[[PyTree, jax.Array, View, Any], jax.Array]
    noise: Callable[[PyTree, jax.Array, PyTree, Key], PyTree]


def diagonal() -> Structure:
    """Only the diagonal of H: sum over rows and roots of J^2; parameters are independent in the posterior."""

    def update(sums, view, batch, weights):
        return _over_rows(lambda sums, jacobian: sums + (jacobian**2).sum((0, 1)), sums, view, batch, weights)

    precisions = lambda spectrum, precision, chosen: spectrum + _each(precision, chosen)

    def covariance(spectrum, precision, view, inputs):
        chosen = view.chosen()
        jacobian = output_jacobian(view, inputs)
        return jnp.einsum("bip,bjp->bij", jacobian / precisions(spectrum, precision, chosen), jacobian)

    def noise(spectrum, precision, chosen, key):
        values = precisions(spectrum, precision, chosen)
        return _unravel(chosen)(jax.random.normal(key, values.shape, values.dtype) / jnp.sqrt(values))

    return Structure(
        lambda chosen: jnp.zeros_like(_float_vector(chosen)),
        update,
        lambda sums, rows, num_data: sums * (num_data / rows),
        lambda spectrum, precision, chosen: jnp.log(precisions(spectrum, precision, chosen)).sum(),
        covariance,
        noise,
    )


class Eigen(NamedTuple):
    """Eigenvalues (number,), and their vectors as columns (size, number), orthonormal."""

    values: jax.Array
    vectors: jax.Array


def full() -> Structure:
    """All of H, (parameters, parameters); for a few thousand parameters.

    In float32 curvature below some 1e-6 of the largest is rounding: where the prior precision is smaller still, variances in
    those directions may be off by tens of percent (`jax.enable_x64` is exact).

    Raises:
        ValueError: at `init`, with the number of bytes, where two such matrices do not fit the device; for a prior
            precision per layer.
    """

    def init(chosen):
        flat = _float_vector(chosen)
        need, budget = 4 * flat.size**2 * flat.dtype.itemsize, device_budget()
        if need > budget:
            raise ValueError(
                f"`full()` must fit the device, got {flat.size} parameters, whose matrices take {need / 1e9:.1f} GB of "
                f"{budget / 1e9:.1f}. Use `kronecker()`, `low_rank(50)`, or `subset` for fewer parameters."
            )
        return jnp.zeros((flat.size, flat.size), flat.dtype)

    def update(sums, view, batch, weights):
        add = lambda sums, jacobian: sums + jnp.einsum("brp,brq->pq", jacobian, jacobian)
        return _over_rows(add, sums, view, batch, weights)

    def covariance(spectrum, precision, view, inputs):
        turned = output_jacobian(view, inputs) @ spectrum.vectors
        return jnp.einsum("bip,bjp->bij", turned / (spectrum.values + _one(precision, "full()")), turned)

    def noise(spectrum, precision, chosen, key):
        values = spectrum.values + _one(precision, "full()")
        normal = jax.random.normal(key, values.shape, values.dtype)
        return _unravel(chosen)(spectrum.vectors @ (normal / jnp.sqrt(values)))

    return Structure(
        init,
        update,
        lambda sums, rows, num_data: eigen(sums * (num_data / rows)),
        lambda spectrum, precision, chosen: jnp.log(spectrum.values + _one(precision, "full()")).sum(),
        covariance,
        noise,
    )


def low_rank(rank: int) -> Structure:
    """The `rank` largest eigenvalues of H with their vectors, kept up to date batch by batch; exact where H has no more.

    Each batch's roots are joined to what is kept, and the largest directions of both are kept on. In float32 eigenvalues
    below some 1e-13 of the largest are rounding.

    Args:
        rank: eigenvectors kept: rank x parameters numbers, and as many more for a batch's Jacobian.

    Raises:
        ValueError: for a rank below one, or a prior precision per layer.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` must be a whole number of at least 1, got {rank!r}. 10 to 100 is usual.")

    def init(chosen):
        flat = _float_vector(chosen)
        return jnp.zeros((min(rank, flat.size), flat.size), flat.dtype)

    def update(sums, view, batch, weights):
        def join(kept, jacobian):
            rows = jnp.concatenate([kept, jacobian.reshape(-1, kept.shape[1])])
            return _largest(rows, kept.shape[0])

        return _over_rows(join, sums, view, batch, weights)

    def decompose(sums, rows, num_data):
        values = (sums**2).sum(1)
        lengths = jnp.sqrt(jnp.where(values == 0, 1, values))
        return Eigen(values * (num_data / rows), (sums / lengths[:, None]).T)

    def log_det(spectrum, precision, chosen):
        precision, size = _one(precision, "low_rank"), spectrum.vectors.shape[0]
        kept = jnp.log(spectrum.values + precision).sum()
        return kept + (size - spectrum.values.size) * jnp.log(precision)

    def covariance(spectrum, precision, view, inputs):
        """What the kept directions leave of the Jacobian has the prior's variance: no difference of large numbers."""
        precision, jacobian = _one(precision, "low_rank"), output_jacobian(view, inputs)
        turned = jacobian @ spectrum.vectors
        rest = jacobian - turned @ spectrum.vectors.T
        rest = rest - (rest @ spectrum.vectors) @ spectrum.vectors.T  # once more: the first leaves rounding
        known = jnp.einsum("bip,bjp->bij", turned / (spectrum.values + precision), turned)
        return jnp.einsum("bip,bjp->bij", rest, rest) / precision + known

    def noise(spectrum, precision, chosen, key):
        precision, size = _one(precision, "low_rank"), spectrum.vectors.shape[0]
        normal = jax.random.normal(key, (size,), spectrum.values.dtype)
        shrink = jax.lax.rsqrt(spectrum.values + precision) - jax.lax.rsqrt(precision)
        moved = spectrum.vectors @ (shrink * (normal @ spectrum.vectors))
        return _unravel(chosen)(normal * jax.lax.rsqrt(precision) + moved)

    return Structure(init, update, decompose, log_det, covariance, noise)


def eigen(matrix: jax.Array) -> Eigen:
    """Eigenvalues and vectors of a matrix that is positive semi-definite but for rounding.

    A value below zero by no more than sqrt(eps) * the largest, which sums over many rows round to, is zero; one further
    below makes all NaN: the matrix is indefinite, and no normal distribution has it for a precision.
    """
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    slack = math.sqrt(jnp.finfo(values.dtype).eps) * jnp.abs(values).max()
    indefinite = values.min() < -slack
    return Eigen(jnp.where(indefinite, jnp.nan, jnp.maximum(values, 0)), vectors)


def output_jacobian(view: View, inputs) -> jax.Array:
    """(batch, outputs, parameters): of the flat outputs of every row with respect to the flat chosen parameters."""
    flat, unravel = ravel_pytree(view.chosen())
    one = lambda flat, row: view.outputs(unravel(flat), jax.tree.map(lambda x: x[None], row)).ravel()
    return float32_or_wider(jax.vmap(jax.jacrev(one), in_axes=(None, 0))(flat, inputs))


def _over_rows(join: Callable, sums, view: View, batch: Batch, weights: jax.Array):
    """`join(sums, jacobian)` of the rows' weighted root Jacobians (rows, roots, parameters), a group of rows at a time."""
    flat, unravel = ravel_pytree(view.chosen())

    def roots(flat, row, target):
        one = lambda x: jax.tree.map(lambda leaf: leaf[None], x)
        return view.root(view.outputs(unravel(flat), one(row)), one(target))[0]

    def of_group(group):
        inputs, targets, weight = group
        jacobian = float32_or_wider(jax.vmap(jax.jacrev(roots), in_axes=(None, 0, 0))(flat, inputs, targets))
        weight = weight[:, None, None]
        return jnp.where(weight == 0, 0, jnp.sqrt(weight) * jnp.where(weight == 0, 0, jacobian))

    first = jax.tree.map(lambda x: x[0], (batch.inputs, batch.targets))
    number = jax.eval_shape(roots, flat, *first).size
    add = lambda sums, group: join(sums, of_group(group))
    bytes_a_row = number * flat.size * flat.dtype.itemsize
    return in_groups(add, sums, (batch.inputs, batch.targets, weights), ROWS_BYTES // bytes_a_row)


def in_groups(add: Callable, sums, rows: tuple, size: int):
    """`sums = add(sums, group)` for groups of at most `size` rows of (inputs, targets, weights), one after another.

    Not where devices share the rows: each has its own part of any group.
    """
    inputs, targets, weights = rows
    number = weights.shape[0]
    groups = -(-number // min(max(size, 1), number))
    if groups == 1 or dict(jax.sharding.get_abstract_mesh().shape).get("data", 1) > 1:
        return add(sums, rows)
    size = -(-number // groups)
    missing = groups * size - number  # rows that fill up the last group: the first again, at weight 0

    def grouped(x, more):
        x = jnp.asarray(x)
        filled = jnp.concatenate([x, jnp.broadcast_to(more(x[:1]), (missing, *x.shape[1:]))])
        return filled.reshape(groups, size, *x.shape[1:])

    parts = (*jax.tree.map(lambda x: grouped(x, lambda row: row), (inputs, targets)), grouped(weights, jnp.zeros_like))
    return jax.lax.scan(lambda sums, part: (add(sums, part), None), sums, parts)[0]


def _largest(rows: jax.Array, number: int) -> jax.Array:
    """(number, size) orthogonal rows with the same product rows^T rows, but for its smallest directions.

    By singular values: eigenvalues of rows rows^T would lose half of the digits.
    """
    _, values, vectors = jnp.linalg.svd(rows, full_matrices=False)
    return values[:number, None] * vectors[:number]


def _unravel(chosen: PyTree) -> Callable[[jax.Array], PyTree]:
    """From one vector to a pytree of the same shapes, in the vector's own precision."""
    leaves, structure = jax.tree.flatten(chosen)
    ends = np.cumsum([x.size for x in leaves])[:-1]

    def unravel(flat):
        parts = jnp.split(flat, ends)
        return jax.tree.unflatten(structure, [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])

    return unravel


def _each(precision: jax.Array, chosen: PyTree) -> jax.Array:
    """(parameters,) prior precision of each."""
    leaves = jax.tree.leaves(chosen)
    parts = [jnp.broadcast_to(p, x.shape).ravel() for p, x in zip(of_leaves(precision, chosen), leaves, strict=True)]
    return jnp.concatenate(parts)


def _one(precision: jax.Array, name: str) -> jax.Array:
    if precision.ndim:
        raise ValueError(
            f"`prior_precision` must be one number for `{name}`, got one for each of {precision.size} layers. Use "
            "`diagonal()` or `kronecker()` for those."
        )
    return precision


def _float_vector(chosen: PyTree) -> jax.Array:
    """All as one vector, in float32 or wider: sums over many rows need it."""
    flat = ravel_pytree(chosen)[0]
    if not flat.size or not jnp.issubdtype(flat.dtype, jnp.floating):
        raise ValueError(
            f"`subset` must hold floating parameters, got {flat.size} of type {flat.dtype}. The layers of the network "
            f"are {sorted(layers(chosen))}."
        )
    return float32_or_wider(flat)


def count(chosen: PyTree) -> int:
    """How many numbers there are."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(chosen))
