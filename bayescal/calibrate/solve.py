"""Convex fits of maps whose logits are linear in their parameters: Newton, L-BFGS where they are many, one check."""

import math
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.calibrate.calibrator import concrete
from bayescal.predictive import undefined_where

NEWTON_PARAMETERS = 400  # beyond, an eigendecomposition a step costs more than many gradients
NEWTON_STEPS, LBFGS_STEPS = 50, 3000
SMALL_STEP = 1e-3  # nats of any logit: the error of Newton's step is its square
LARGE_STEP = 0.05  # no rounding error; towards an optimum at infinity every step is about 1
FLAT = 1e-6  # of the largest curvature, each parameter in its own unit: what float32 cannot tell from none
LBFGS_GRADIENT, LBFGS_LARGEST = (
    1e-6,
    1e-4,
)  # of the objective where curvatures are 1: where it stops, the most it may be
MOST_UNPENALISED = 1000  # directions beyond Newton's size: each costs a pass over the rows, their eigenvalues the cube


class Solution(NamedTuple):
    """Where a fit ended.

    parameters: (outputs, inputs); read them through `converged_parameters`.
    objective: mean nll and penalties, nats.
    gradient: largest absolute derivative of the objective, nats; 0 = converged.
    iterations: steps taken.
    converged: whether the optimum is finite, unique and reached.
    """

    parameters: jax.Array
    objective: jax.Array
    gradient: jax.Array
    iterations: jax.Array
    converged: jax.Array


class Problem(NamedTuple):
    """sum_n weights_n nll(targets_n, softmax(logits_n)) + sum penalty * parameters^2, logits_no = features_no . parameters_o.

    features: (rows, outputs or 1, inputs); 1 where all outputs have the same features.
    targets: (rows, classes), probabilities; with one output less than classes, class 0 has logit 0.
    weights: (rows,), summing to one.
    penalty: (outputs, inputs), not negative.
    """

    features: jax.Array
    targets: jax.Array
    weights: jax.Array
    penalty: jax.Array

    def linear(self, parameters):
        """features . parameters, (rows, outputs)."""
        if self.features.shape[1] == 1:
            return jnp.matmul(self.features[:, 0], parameters.T, precision="highest")
        return (self.features * parameters[None]).sum(-1)

    def with_reference(self, outputs):
        """Logits of all classes: with that of class 0 where it has none."""
        missing = self.targets.shape[-1] - outputs.shape[-1]
        return jnp.pad(outputs, ((0, 0), (missing, 0)))

    def objective(self, outputs, parameters):
        nll = -(self.targets * jax.nn.log_softmax(self.with_reference(outputs))).sum(-1)
        return blocked_sum(self.weights * nll) + (self.penalty * parameters**2).sum()

    def probs(self, outputs):
        return jax.nn.softmax(self.with_reference(outputs))[:, -outputs.shape[-1] :]

    def gradient(self, outputs, parameters):
        residual = (self.probs(outputs) - self.targets[:, -outputs.shape[-1] :]) * self.weights[:, None]
        return self.back(residual) + 2 * self.penalty * parameters

    def back(self, residual):
        """sum_n residual_no features_noi, (outputs, inputs): the transpose of `linear`."""
        if self.features.shape[1] == 1:
            return jnp.matmul(residual.T, self.features[:, 0], precision="highest")
        return (residual[..., None] * self.features).sum(0)

    def hessian(self, outputs):
        """(outputs * inputs, the same): per row diag(p) - p p^T of the logits, taken through the features."""
        probs, size = self.probs(outputs), self.penalty.size
        block = max(256, 2**21 // size)  # rows at a time: never rows x parameters at once

        def add(total, rows):
            features, probs, weights = rows
            seen = probs[..., None] * features
            features = jnp.broadcast_to(features, seen.shape)
            own = jnp.einsum("n,noi,noj->oij", weights, seen, features, precision="highest")
            seen = seen.reshape(len(weights), size)
            across = jnp.matmul((seen * weights[:, None]).T, seen, precision="highest")
            return (total[0] + own, total[1] + across), None

        count, inputs = self.penalty.shape
        start = jnp.zeros((count, inputs, inputs), probs.dtype), jnp.zeros((size, size), probs.dtype)
        rows = self.features, probs, self.weights
        blocks = -(-len(probs) // block)
        if blocks == 1:
            own, across = add(start, rows)[0]
        else:
            split = lambda x: _pad_rows(x, blocks * block).reshape(blocks, block, *x.shape[1:])
            own, across = jax.lax.scan(add, start, jax.tree.map(split, rows))[0]
        own = jnp.einsum("oij,op->oipj", own, jnp.eye(count, dtype=own.dtype)).reshape(size, size)
        return own - across + jnp.diag(2 * self.penalty.ravel())

    def separated(self, parameters):
        """Whether the parameters without penalty alone put every target on top: multiplied by ever more, they lower the
        nll for ever, so that no optimum is finite."""
        outputs = self.with_reference(self.linear(jnp.where(self.penalty == 0, parameters, 0)))
        target = self.targets >= 1
        others = jnp.where(target, -jnp.inf, outputs).max(-1)
        ahead = jnp.where(target, outputs, -jnp.inf).max(-1) > others
        return (ahead | (self.weights == 0)).all()


def blocked_sum(values):
    """Sum of (rows,) in blocks: one running float32 sum of a million rows loses three digits."""
    size = 1024
    return _pad_rows(values, -(-len(values) // size) * size).reshape(-1, size).sum(-1).sum()


def _pad_rows(x, rows):
    return jnp.pad(x, ((0, rows - len(x)),) + ((0, 0),) * (x.ndim - 1))


def solve(
    features,
    targets,
    weights,
    penalty: np.ndarray,
    *,
    basis: np.ndarray | None = None,
    unpenalised: np.ndarray | None = None,
    free=None,
) -> Solution:
    """The minimum of a `Problem`, from parameters 0: pure, for jit and vmap.

    Up to `NEWTON_PARAMETERS` by Newton's method, beyond by L-BFGS where `unpenalised` are given.

    Args:
        features: (rows, outputs or 1, inputs).
        targets: (rows, classes) probabilities.
        weights: (rows,), any scale.
        penalty: (outputs, inputs), on the host.
        basis: (outputs * inputs, directions), orthonormal: the parameters that the probabilities depend on, the others
            being what the penalty makes them; None = all. For Newton alone, which finds those without penalty itself.
        unpenalised: (outputs * inputs, directions), orthonormal, of those without penalty. For L-BFGS alone.
        free: bool (outputs, inputs), parameters that may leave 0; None = all. For Newton alone.
    """
    problem = Problem(features, targets, weights, jnp.asarray(penalty, features.dtype))
    if penalty.size > NEWTON_PARAMETERS and unpenalised is not None:
        return _solve(_lbfgs, problem, jnp.asarray(unpenalised, features.dtype))
    free = jnp.ones(penalty.shape, bool) if free is None else free
    basis = np.eye(penalty.size) if basis is None else basis
    return _solve(
        _newton, problem, free, *(jnp.asarray(x, features.dtype) for x in _directions(basis, penalty.ravel()))
    )


def _directions(basis, penalty):
    """Where the parameters may move, each direction with the least penalty of those that give the same probabilities; and,
    orthonormal, all that has no penalty and changes a probability. In float64: a small penalty's curvature along what
    changes no probability would be lost in float32."""
    if not penalty.any():
        return basis, basis
    null = np.linalg.svd(basis)[0][:, basis.shape[1] :]
    weighted = null.T * penalty
    moves = basis - null @ (np.linalg.pinv(weighted @ null, rcond=1e-12, hermitian=True) @ (weighted @ basis))
    chosen = np.eye(len(penalty))[:, penalty == 0]
    _, seen, mixed = np.linalg.svd(basis.T @ chosen, full_matrices=False)
    return moves, chosen @ mixed[seen > 1e-6].T


@partial(jax.jit, static_argnums=0)
def _solve(search, problem, *how):
    problem = problem._replace(weights=problem.weights / blocked_sum(problem.weights))
    solution = search(problem, *how)
    converged = solution.converged & ~problem.separated(solution.parameters) & jnp.isfinite(solution.objective)
    return solution._replace(converged=converged)


def _newton(problem, free, moves, unpenalised):
    shape, dtype = problem.penalty.shape, problem.features.dtype
    product = partial(jnp.matmul, precision="highest")
    expand = lambda reduced: jnp.where(free, product(moves, reduced).reshape(shape), 0)  # held is exactly 0

    def within(directions, gradient, hessian):
        """Both in those directions, those of parameters that are held left out, in units that give curvature 1."""
        movable = (directions**2 * free.reshape(-1, 1)).sum(0) > 0
        gradient = jnp.where(movable, product(directions.T, gradient.ravel()), 0)
        hessian = product(directions.T, product(hessian, directions))
        hessian = jnp.where(movable[:, None] & movable[None], hessian, jnp.eye(len(movable), dtype=dtype))
        curvature = jnp.diagonal(hessian)
        scale = jax.lax.rsqrt(jnp.where(curvature > 0, curvature, 1))
        return gradient * scale, hessian * scale[:, None] * scale[None], scale

    def step(state):
        parameters, outputs, objective, _, count = state
        gradient, hessian, scale = within(moves, problem.gradient(outputs, parameters), problem.hessian(outputs))
        values, vectors = jnp.linalg.eigh(hessian)
        values = jnp.maximum(values, FLAT / 10 * values[-1])
        move = -product(vectors, product(vectors.T, gradient) / values)
        slope, direction = (move * gradient).sum(), expand(scale * move)
        change = problem.linear(direction)
        slack = 8 * jnp.finfo(dtype).eps * (1 + abs(objective))
        value = lambda size: problem.objective(outputs + size * change, parameters + size * direction)

        def too_long(search):
            size, reached = search
            return ~(reached <= objective + 1e-4 * size * slope + slack) & (size > 1e-8)

        size, reached = jax.lax.while_loop(
            too_long, lambda search: (search[0] / 2, value(search[0] / 2)), (jnp.ones((), dtype), value(1))
        )
        largest = jnp.where(problem.weights[:, None] > 0, abs(change), 0).max()
        parameters = parameters + size * direction
        return parameters, problem.linear(parameters), reached, largest, count + 1

    def unfinished(state):
        return (state[3] > SMALL_STEP) & (state[4] < NEWTON_STEPS) & jnp.isfinite(state[2])

    parameters = jnp.zeros(shape, dtype)
    outputs = problem.linear(parameters)
    start = parameters, outputs, problem.objective(outputs, parameters), jnp.asarray(jnp.inf, dtype), jnp.int32(0)
    parameters, outputs, objective, largest, count = jax.lax.while_loop(unfinished, step, start)
    gradient, hessian = problem.gradient(outputs, parameters), problem.hessian(outputs)
    # Towards infinity, and where two maps are equally good, there is no curvature; only penalties make up for that.
    values = jnp.linalg.eigvalsh(within(unpenalised, gradient, hessian)[1])
    converged = (largest <= LARGE_STEP) & (values[0] > FLAT * values[-1])
    return Solution(parameters, objective, jnp.where(free, abs(gradient), 0).max(), count, converged)


def _lbfgs(problem, unpenalised):
    """In units that give every parameter curvature 1 at the start: derivatives then mean the same whatever the features'."""
    import optax  # a second of the import of bayescal

    share = 1 / problem.targets.shape[-1]
    curvature = jnp.einsum("n,noi->oi", problem.weights, problem.features**2, precision="highest") * share * (1 - share)
    curvature = curvature + 2 * problem.penalty
    scale = jax.lax.rsqrt(jnp.where(curvature > 0, curvature, 1))

    def value(scaled):
        return problem.objective(problem.linear(scale * scaled), scale * scaled)

    optimiser = optax.lbfgs(memory_size=20)
    with_gradient = optax.value_and_grad_from_state(value)

    def step(state):
        scaled, inner, _, _, count = state
        objective, gradient = with_gradient(scaled, state=inner)
        updates, inner = optimiser.update(gradient, inner, scaled, value=objective, grad=gradient, value_fn=value)
        scaled = optax.apply_updates(scaled, updates)
        largest = abs(optax.tree_utils.tree_get(inner, "grad")).max()
        return scaled, inner, objective, largest, count + 1

    def unfinished(state):
        return (state[3] > LBFGS_GRADIENT) & (state[4] < LBFGS_STEPS) & jnp.isfinite(state[2])

    start = jnp.zeros(problem.penalty.shape, problem.features.dtype)
    objective = value(start)
    state: Any = start, optimiser.init(start), objective, jnp.full_like(objective, jnp.inf), jnp.int32(0)
    scaled, _, _, _, count = jax.lax.while_loop(unfinished, step, state)
    objective, gradient = jax.value_and_grad(value)(scaled)
    bend = lambda move: jax.jvp(jax.grad(value), (scaled,), (move,))[1]
    # Small derivatives do not say that an optimum is near: Newton's step along what has no penalty, and its curvature, do.
    units = unpenalised / scale.reshape(-1, 1)
    along = jax.lax.map(lambda move: bend(move.reshape(start.shape)).ravel(), units.T)
    reduced, slope = (jnp.matmul(x, units, precision="highest") for x in (along, gradient.ravel()))
    own = jnp.diagonal(reduced)
    unit = jax.lax.rsqrt(jnp.where(own > 0, own, 1))
    values, vectors = jnp.linalg.eigh(reduced * unit[:, None] * unit)
    move = vectors @ ((vectors.T @ (unit * slope)) / jnp.maximum(values, FLAT / 10 * values[-1]))
    change = problem.linear(jnp.matmul(unpenalised, unit * move, precision="highest").reshape(start.shape))
    change = jnp.where(problem.weights[:, None] > 0, abs(change), 0).max()
    reached = (abs(gradient).max() <= LBFGS_LARGEST) & (change <= LARGE_STEP)
    converged = reached & (values[0] > FLAT * values[-1])
    return Solution(scale * scaled, objective, abs(gradient / scale).max(), count, converged)


def contrasts(classes: int) -> np.ndarray:
    """Orthonormal (classes, classes - 1), every column summing to zero: numbers of which only differences count."""
    start = np.eye(classes) - 1 / classes
    return np.linalg.svd(start)[0][:, : classes - 1]


def require_positive_classes(log_probs, weights, name: str) -> None:
    """Raises where a row that counts has a class of probability zero: the map `name` takes logarithms."""
    if not concrete(log_probs, weights):
        return
    lost = int((jnp.isneginf(log_probs).any(-1) & (weights > 0)).sum())
    if lost:
        raise ValueError(
            f"`pred` must give every class a positive probability for {name}, got a zero in {lost} of {len(log_probs)} "
            "rows. Pass `bc.calibrate.clip_probabilities(pred, 1e-12)`, in the fit and in use."
        )


def require_strength(name: str, value) -> None:
    """Raises unless the strength of a penalty is a finite number, zero or above."""
    if isinstance(value, Real) and math.isfinite(float(value)) and float(value) >= 0:
        return
    raise ValueError(
        f"`{name}` must be a finite number of at least 0, got {value!r}. 0 = no penalty; it is added to the mean nll, so "
        "that it need not grow with the rows."
    )


def converged_parameters(solution: Solution, remedy: str) -> jax.Array:
    """The parameters of an optimum; NaN, or an error on the host, where it is not finite, not unique or was not reached."""
    if concrete(solution) and not bool(solution.converged):
        raise ValueError(
            "`targets` must leave one finite best map, got predictions that separate classes, or that do not tell "
            f"parameters apart (largest derivative {float(solution.gradient):.1e} nats after "
            f"{int(solution.iterations)} steps). {remedy}"
        )
    return undefined_where(~solution.converged, solution.parameters)
