"""Dirichlet calibration: softmax regression on the log-probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.calibrate.calibrator import Calibrator, Classes, like, pooled_log_probs
from bayescal.calibrate.vector import (
    MATRIX_REMEDY,
    fit_diagonal,
    fit_full,
    linear_rows,
    transformed,
)
from bayescal.predictive import Bernoulli, Categorical
from bayescal.types import Array, pytree


@pytree
class DirichletMap(Calibrator):
    """softmax(matrix log p + intercepts) of the pool. A probability of zero gives NaN.

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
        log_probs = pooled_log_probs(pred, self.matrix.shape[0])
        return like(pred, jax.nn.log_softmax(transformed(self.matrix, log_probs) + self.intercepts))


def fit_dirichlet(
    pred: Classes,
    targets,
    *,
    off_diagonal: float = 0.0,
    intercept: float = 0.0,
    weights: Float[Array, "rows"] | None = None,
) -> DirichletMap:
    """argmin_(W, b) of mean nll(softmax(W log p + b)) + ODIR penalties, p the pool.

    What one gets where p follows a Dirichlet distribution within each class. Unlike `fit_matrix`, log p is not centred: W
    also sees the mean of log p, by which peaked rows differ from flat ones, and each class may use it (K - 1 numbers more);
    matrix scaling is this map with rows of W that sum to the same. Penalties and what is best without them: `fit_matrix`.

    Args:
        pred: predictive of the calibration rows; only the pool counts.
        targets: integer labels (rows,).
        off_diagonal: strength of the penalty on entries off the diagonal, nats, added to the mean nll.
        intercept: strength of the penalty on intercepts, likewise.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: as `fit_matrix`.
    Source: Kull et al. 2019 (recalled).
    """
    log_probs, targets, weights = linear_rows(pred, targets, weights, off_diagonal, intercept, "Dirichlet calibration")
    everywhere = np.eye(log_probs.shape[-1])
    fitted = fit_full(log_probs, targets, weights, off_diagonal, intercept, everywhere, MATRIX_REMEDY)
    return DirichletMap(*fitted)


def fit_diagonal_dirichlet(
    pred: Classes, targets, *, intercept: float = 0.0, weights: Float[Array, "rows"] | None = None
) -> DirichletMap:
    """argmin_(w, b) of mean nll(softmax(w * log p + b)) + intercept * mean over classes of b^2, p the pool.

    `fit_dirichlet` with a diagonal matrix: two numbers a class. For two classes it is beta calibration, with slopes that may
    be negative.

    Args:
        pred: predictive of the calibration rows; only the pool counts.
        targets: integer labels (rows,).
        intercept: strength of the penalty on intercepts, nats, added to the mean nll.
        weights: weight of each row; None = ones.

    Raises:
        ValueError: as `fit_vector`.
    Source: Kull et al. 2019 (recalled).
    """
    log_probs, targets, weights = linear_rows(pred, targets, weights, 0.0, intercept, "Dirichlet calibration")
    slopes, intercepts, gradient = fit_diagonal(log_probs, targets, weights, intercept, shared=False)
    return DirichletMap(jnp.diag(slopes), intercepts, gradient)
