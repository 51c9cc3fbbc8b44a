"""Vector and matrix scaling: softmax regression on the centred log-probabilities of the pool."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    like,
    pooled_log_probs,
    require_every_class,
    rows_for_fit,
)
from bayescal.calibrate.solve import (
    MOST_UNPENALISED,
    NEWTON_PARAMETERS,
    blocked_sum,
    contrasts,
    converged_parameters,
    require_positive_classes,
    require_strength,
    solve,
)
from bayescal.predictive import Bernoulli, Categorical
from bayescal.types import Array, pytree


@pytree
class VectorScaling(Calibrator):
    """softmax(slopes * z + intercepts) of the pool, z = log p - mean over classes of log p. A probability of zero gives NaN.

    Args:
        slopes: one per class; all 1 / T and no intercept is temperature scaling.
        intercepts: nats, summing to zero; above 0 = the class more probable than before.
        gradient: largest absolute derivative of the objective where the fit ended, nats; 0 = converged.
    """

    accuracy_preserving = False

    slopes: Float[Array, "classes"]
    intercepts: Float[Array, "classes"]
    gradient: Float[Array, ""]

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool, then the map.

        Raises:
            ValueError: for another number of classes than in the fit.
        """
        logits = centred(pooled_log_probs(pred, self.slopes.shape[0])) * self.slopes + self.intercepts
        return like(pred, jax.nn.log_softmax(logits))


@pytree
class MatrixScaling(Calibrator):
    """softmax(matrix z + intercepts) of the pool, z = log p - mean over classes of log p. A probability of zero gives NaN.

    Args:
        matrix: (class after, class before); I / T and no intercept is temperature scaling.
        intercepts: nats, summing to zero; above 0 = the class more probable than before.
        gradient: largest absolute derivative of the objective where the fit ended, nats; 0 = converged.
    """

    accuracy_preserving = False

    matrix: Float[Array, "classes classes"]
    intercepts: Float[Array, "classes"]
    gradient: Float[Array, ""]

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool, then the map.

        Raises:
            ValueError: for another number of classes than in the fit.
        """
        scores = centred(pooled_log_probs(pred, self.matrix.shape[0]))
        return like(pred, jax.nn.log_softmax(transformed(self.matrix, scores) + self.intercepts))


def fit_vector(
    pred: Classes, targets, *, intercept: float = 0.0, weights: Float[Array, "rows"] | None = None
) -> VectorScaling:
    """argmin_(w, b) of mean nll(softmax(w * z + b)) + intercept * mean over classes of b^2, z the centred log p of the pool.

    Two numbers a class. z is log p less its mean over classes, so that logits and log-probabilities give the same fit. Of
    equally good intercepts, those that sum to zero. Two classes without a penalty: `fit_platt` without smoothing.

    Args:
        pred: predictive of the calibration rows; only the pool counts.
        targets: integer labels (rows,).
        intercept: strength of the penalty on intercepts, nats. The objective is the mean nll: a strength means as much
            whatever the number of rows, and one of c / rows is a prior of fixed weight.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: for a probability of zero (`clip_probabilities`); a class that is no row's target, where the intercepts
            have no penalty; rows that leave no finite best map; and for unusable predictions, targets or weights.
    Source: Guo et al. 2017, section 4.2 (recalled; there on raw logits).
    """
    require_strength("intercept", intercept)
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    if intercept == 0:
        require_every_class(targets, weights, log_probs.shape[-1])
    require_positive_classes(log_probs, weights, "vector scaling")
    slopes, intercepts, gradient = fit_diagonal(centred(log_probs), targets, weights, intercept, shared=True)
    return VectorScaling(slopes, intercepts, gradient)


def fit_matrix(
    pred: Classes,
    targets,
    *,
    off_diagonal: float = 0.0,
    intercept: float = 0.0,
    weights: Float[Array, "rows"] | None = None,
) -> MatrixScaling:
    """argmin_(W, b) of mean nll(softmax(W z + b)) + ODIR penalties, z the centred log p of the pool.

    The penalties are off_diagonal * sum_(i != j) W_ij^2 / (K (K - 1)) + intercept * sum_i b_i^2 / K for K classes: off-
    Diagonal and Intercept Regularisation, under which large strengths leave slopes of single classes. K^2 numbers: with
    few rows a class they fit the noise, and with fewer still the best ones are infinite; then a penalty, or `fit_vector`.
    Without a penalty on them, W is the nearest to I of those that give the same probabilities; b sums to zero.

    Args:
        pred: predictive of the calibration rows; only the pool counts.
        targets: integer labels (rows,).
        off_diagonal: strength of the penalty on entries off the diagonal, nats; it is added to the mean nll, so that it
            means as much whatever the number of rows.
        intercept: strength of the penalty on intercepts, likewise.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: as `fit_vector`; for a negative or infinite strength; for more than 32 classes without a penalty off the
            diagonal.
    Source: Guo et al. 2017, section 4.2; Kull et al. 2019 (ODIR), both recalled.
    """
    log_probs, targets, weights = linear_rows(pred, targets, weights, off_diagonal, intercept, "matrix scaling")
    between = contrasts(log_probs.shape[-1])  # rows of z sum to zero: a constant along a row of W changes nothing
    fitted = fit_full(centred(log_probs), targets, weights, off_diagonal, intercept, between, MATRIX_REMEDY)
    return MatrixScaling(*fitted)


MATRIX_REMEDY = (
    "Give `off_diagonal` and `intercept` a strength such as 0.01, use more calibration rows, or `fit_temperature`."
)


def linear_rows(pred, targets, weights, off_diagonal, intercept, name):
    """`rows_for_fit` for a map with a full matrix, and its checks."""
    require_strength("off_diagonal", off_diagonal)
    require_strength("intercept", intercept)
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    if intercept == 0:
        require_every_class(targets, weights, log_probs.shape[-1])
    require_positive_classes(log_probs, weights, name)
    return log_probs, targets, weights


def fit_diagonal(scores, targets, weights, intercept, *, shared):
    """Slopes, intercepts and gradient of softmax(slopes * scores + intercepts).

    shared: whether the scores of a row sum to zero, so that of two classes only the mean slope counts.
    """
    classes = scores.shape[-1]
    centre = middle(scores, weights, intercept)
    features = jnp.stack([scores - centre, jnp.ones_like(scores)], -1)
    penalty = np.tile([0.0, intercept / classes], (classes, 1))
    slopes = np.full((2, 1), 0.5**0.5) if shared and classes == 2 else np.eye(classes)
    shifts = np.kron(contrasts(classes), [[0], [1]])
    slopes = np.kron(slopes, [[1], [0]])
    basis = np.concatenate([slopes, shifts], 1)
    unpenalised = basis if intercept == 0 else slopes
    remedy = "Use more calibration rows, or one slope for all classes (`fit_temperature`)."
    wanted = jax.nn.one_hot(targets, classes, dtype=scores.dtype)
    solution = solve(features, wanted, weights, penalty, basis=basis, unpenalised=unpenalised)
    slopes, intercepts = converged_parameters(solution, remedy).T
    intercepts = intercepts - slopes * centre
    return slopes, intercepts - intercepts.mean(), solution.gradient


def fit_full(scores, targets, weights, off_diagonal, intercept, inputs, remedy):
    """Matrix, intercepts and gradient of softmax(matrix scores + intercepts) with ODIR penalties.

    inputs: (classes, directions), orthonormal: in which the scores vary.
    """
    classes, dtype = scores.shape[-1], scores.dtype
    centre = middle(scores, weights, intercept)
    features = jnp.concatenate([scores - centre, jnp.ones_like(scores[:, :1])], -1)[:, None]
    off = np.where(np.eye(classes), 0, off_diagonal / (classes * (classes - 1)))
    penalty = np.concatenate([off, np.full((classes, 1), intercept / classes)], 1)
    how = (
        _newton_directions(classes, inputs) if penalty.size <= NEWTON_PARAMETERS else _lbfgs_directions(penalty, inputs)
    )
    solution = solve(features, jax.nn.one_hot(targets, classes, dtype=dtype), weights, penalty, **how)
    fitted = converged_parameters(solution, remedy)
    matrix, intercepts = fitted[:, :classes], fitted[:, classes]
    if off_diagonal == 0:  # of the same probabilities, the matrix nearest to I
        left, right = (jnp.asarray(x @ x.T, dtype) for x in (contrasts(classes), inputs))
        eye = jnp.eye(classes, dtype=dtype)
        matrix = eye + multiply(multiply(left, matrix - eye), right)
    intercepts = intercepts - transformed(matrix, centre)
    return matrix, intercepts - intercepts.mean(), solution.gradient


def _newton_directions(classes, inputs):
    outputs, (first, last) = contrasts(classes), np.split(np.eye(classes + 1), [classes], axis=1)
    return {"basis": np.concatenate([np.kron(outputs, first @ inputs), np.kron(outputs, last)], 1)}


def _lbfgs_directions(penalty, inputs):
    """Slopes of single classes have no penalty; the others and the intercepts have none where their strength is 0."""
    classes = len(penalty)
    outputs, (first, last) = contrasts(classes), np.split(np.eye(classes + 1), [classes], axis=1)
    if penalty[0, 1] > 0:
        slopes = np.eye(penalty.size)[:, :: classes + 2]
    elif outputs.shape[1] * inputs.shape[1] <= MOST_UNPENALISED:
        slopes = np.kron(outputs, first @ inputs)
    else:
        raise ValueError(
            f"`off_diagonal` must be positive for {classes} classes, got 0. So many numbers without a penalty cannot be "
            "checked to have one finite best value: give it a strength such as 0.01."
        )
    return {"unpenalised": slopes if penalty[0, -1] > 0 else np.concatenate([slopes, np.kron(outputs, last)], 1)}


def middle(scores, weights, intercept):
    """Mean of the scores over the rows, which an intercept without penalty makes up for: about it slopes and intercepts have
    little to do with each other. 0 where the intercept has a penalty."""
    if intercept > 0:
        return jnp.zeros_like(scores[0])
    return jax.vmap(blocked_sum)((weights[:, None] * scores).T) / blocked_sum(weights)


def multiply(left, right):
    """Matrix product in full precision, on accelerators too."""
    return jnp.matmul(left, right, precision="highest")


def transformed(matrix, scores):
    """matrix . scores of every row, (*batch, classes)."""
    return multiply(scores, matrix.T)


def centred(log_probs):
    """log p less its mean over classes, nats: the same for logits and for log-probabilities."""
    return log_probs - log_probs.mean(-1, keepdims=True)
