"""Calibrators that know how unsure they are: a posterior of the map, whose nodes or draws come out as members."""

import math
from numbers import Integral
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import Calibrator, Classes, concrete, pooled_log_probs, rows_for_fit
from bayescal.calibrate.newton import minimise
from bayescal.predictive import Bernoulli, Categorical
from bayescal.types import Array, Key, pytree

# Standard deviations of the posterior that the nodes span, either way, and nodes of the first passes.
REACH, COARSE = 6.0, 49


@pytree
class BayesianTemperature(Calibrator):
    """Mixture over the posterior of T: p = sum_q v_q softmax(log p / T_q), the pool first.

    What comes out has one member per node, so that its `mutual_information` is the calibrator's own uncertainty, epistemic,
    and nothing of the ensemble's, which was pooled.

    Args:
        temperatures: nodes, evenly spaced in log T over the posterior; above 1 = less confident than before.
        node_weights: their posterior masses, of sum 1.
    """

    accuracy_preserving: ClassVar[bool] = True

    temperatures: Float[Array, "node"]
    node_weights: Float[Array, "node"]

    def mean(self) -> Float[jax.Array, ""]:
        """Posterior mean of log T, nats."""
        return (self.node_weights * jnp.log(self.temperatures)).sum()

    def std(self) -> Float[jax.Array, ""]:
        """Posterior standard deviation of log T; falls as 1 / sqrt(rows)."""
        return jnp.sqrt((self.node_weights * (jnp.log(self.temperatures) - self.mean()) ** 2).sum())

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool at every node's temperature, as members weighted by the posterior.

        Raises:
            TypeError: for a predictive that is not over classes.
        """
        log_probs = pooled_log_probs(pred)
        return _as_members(
            pred, log_probs / self.temperatures.reshape(-1, *[1] * log_probs.ndim), jnp.asarray(self.node_weights)
        )


@pytree
class BayesianVector(Calibrator):
    """Mixture over draws of vector scaling: p = mean_d softmax(a_d * c + b_d), c the pool's centred log-probabilities.

    What comes out has one member per draw, as in `BayesianTemperature`.

    Args:
        scales: a of each draw.
        offsets: b of each draw, nats.
        mode: a and b where the posterior is largest.
        gradient: largest absolute derivative there of the mean nll with its share of the prior, nats.
    """

    accuracy_preserving: ClassVar[bool] = False

    scales: Float[Array, "draw classes"]
    offsets: Float[Array, "draw classes"]
    mode: Float[Array, "2 classes"]
    gradient: Float[Array, ""]

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool under every draw, as equal members; NaN for rows with a class of probability zero.

        Raises:
            TypeError: for a predictive that is not over classes.
            ValueError: for another number of classes than in the fit.
        """
        centred = _centred(pooled_log_probs(pred, self.scales.shape[-1]))
        shape = (-1, *[1] * (centred.ndim - 1), centred.shape[-1])
        return _as_members(pred, self.scales.reshape(shape) * centred + self.offsets.reshape(shape), None)


def fit_bayesian_temperature(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    prior_scale: float = 1.0,
    num_nodes: int = 25,
    weights: Float[Array, "rows"] | None = None,
) -> BayesianTemperature:
    """p(log T | rows) prop. to N(log T; 0, prior_scale^2) prod_i softmax(log p_i / T)_{y_i}^{w_i}, by quadrature.

    Nodes are evenly spaced over the posterior's mean +- 6 standard deviations (the trapezoidal rule, whose error for a bell
    of that reach is below 1e-6 with 25 nodes). The prior keeps T finite where labels are separable, and few.

    Args:
        pred: predictive of the validation rows.
        targets: integer labels (rows,).
        prior_scale: standard deviation of log T before the rows, at most 10; 1 = T between 1/7 and 7, most likely.
        num_nodes: members of what comes out.
        weights: how often each row counts; None = once. Their sum is the number of rows that the posterior believes in.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for a prior scale outside (0, 10], fewer than 5 nodes, unusable predictions, targets or weights.
    """
    if not 0 < prior_scale <= 10:
        raise ValueError(f"`prior_scale` must lie in (0, 10], of log T, got {prior_scale!r}. 1 is usual.")
    if not isinstance(num_nodes, Integral) or num_nodes < 5:
        raise ValueError(
            f"`num_nodes` must be a whole number of at least 5, got {num_nodes!r}. 25 is exact to float32."
        )
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    nodes, masses = _quadrature(log_probs, targets, weights, float(prior_scale), jnp.linspace(-REACH, REACH, num_nodes))
    if concrete(masses) and not jnp.isfinite(masses).all():
        raise ValueError(
            "`targets` must have positive probability, got some of probability zero: no temperature explains them. Pass "
            "`bc.calibrate.clip_probabilities(pred, 1e-12)`."
        )
    return BayesianTemperature(jnp.exp(nodes), masses)


def fit_bayesian_vector(
    key: Key,
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    num_draws: int = 32,
    prior_scale: float = 1.0,
    weights: Float[Array, "rows"] | None = None,
) -> BayesianVector:
    """Laplace's approximation of p(a, b | rows), a ~ N(1, prior_scale^2), b ~ N(0, prior_scale^2): draws about the mode.

    With two classes it is Platt scaling with a posterior. The nll is convex, so there is one mode; the normal about it is
    right for many rows, and too narrow or wide for few.

    Args:
        key: of the draws, which are part of the result.
        pred: predictive of the validation rows, every class possible.
        targets: integer labels (rows,).
        num_draws: members of what comes out.
        prior_scale: standard deviation of every scale about 1 and offset about 0.
        weights: how often each row counts; None = once.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for settings that are not positive, a class of probability zero, an optimum that was not reached,
            unusable predictions, targets or weights.
    """
    if not 0 < prior_scale < math.inf:
        raise ValueError(f"`prior_scale` must be positive and finite, got {prior_scale!r}. 1 is usual.")
    if not isinstance(num_draws, Integral) or num_draws < 1:
        raise ValueError(f"`num_draws` must be a whole number of at least 1, got {num_draws!r}. 32 is usual.")
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    if concrete(log_probs) and jnp.isneginf(log_probs).any():
        raise ValueError(
            "`pred` must give every class a positive probability, got zeros: they cannot be scaled class by class. Pass "
            "`bc.calibrate.clip_probabilities(pred, 1e-12)`."
        )
    mode, gradient, draws = _laplace(key, _centred(log_probs), targets, weights, float(prior_scale), int(num_draws))
    if concrete(gradient) and not gradient < 1e-3:
        raise ValueError(
            f"`pred` must let the fit converge, got a derivative of {float(gradient):.3g} nats where it ended. Fit it on "
            "`fit_temperature(pred, targets)(pred)`, or take a smaller `prior_scale`."
        )
    return BayesianVector(draws[:, 0], draws[:, 1], mode, gradient)


def _as_members(pred, logits, member_weights):
    log_probs = jax.nn.log_softmax(logits)
    if isinstance(pred, Bernoulli):
        return Bernoulli(log_probs[..., 1] - log_probs[..., 0], member_weights, normalised=True)
    return Categorical(log_probs, member_weights, normalised=True)


def _centred(log_probs):
    return log_probs - log_probs.mean(-1, keepdims=True)


@jax.jit
def _quadrature(log_probs, targets, weights, prior_scale, places):
    """(log temperatures, masses) at `places`, in posterior standard deviations about the posterior mean."""

    def row_nlls(log_temperature):
        scaled = jax.nn.log_softmax(jnp.where(log_probs == -jnp.inf, -jnp.inf, log_probs * jnp.exp(-log_temperature)))
        return -jnp.take_along_axis(scaled, targets[:, None], -1)[:, 0]

    def masses(nodes, centre):
        """Differences to `centre` are summed row by row: totals of many rows have no digits left for them."""
        reference = row_nlls(centre)
        log_likelihood = jax.lax.map(lambda t: -jnp.dot(weights, row_nlls(t) - reference, precision="highest"), nodes)
        return jax.nn.softmax(log_likelihood - 0.5 * (nodes / prior_scale) ** 2)

    def moments(nodes, shares):
        mean = (shares * nodes).sum()
        return mean, jnp.sqrt((shares * (nodes - mean) ** 2).sum())

    def narrow(_, centre_and_spread):
        """Spread of one node's spacing at least: the next grid then covers what fell between two nodes of this."""
        centre, spread = centre_and_spread
        nodes = centre + spread * jnp.linspace(-REACH, REACH, COARSE)
        mean, new = moments(nodes, masses(nodes, centre))
        return mean, jnp.maximum(new, spread * 2 * REACH / (COARSE - 1) / 2)

    centre, spread = jax.lax.fori_loop(0, 8, narrow, (jnp.float32(0), jnp.float32(prior_scale)))
    nodes = centre + spread * places
    return nodes, masses(nodes, centre)


@jax.jit
def _posterior_parts(centred, targets, weights, prior_scale):
    shares, rows = weights / weights.sum(), weights.sum()
    classes = centred.shape[-1]
    onehot = jax.nn.one_hot(targets, classes, dtype=centred.dtype)
    start = jnp.concatenate([jnp.ones(classes), jnp.zeros(classes)]).astype(centred.dtype)
    strength = 1 / (rows * prior_scale**2)

    def value(theta):
        scaled = jax.nn.log_softmax(theta[:classes] * centred + theta[classes:])
        nll = -(shares[:, None] * onehot * scaled).sum()
        return nll + 0.5 * strength * ((theta - start) ** 2).sum()

    def derivatives(theta):
        probs = jax.nn.softmax(theta[:classes] * centred + theta[classes:])
        lean = shares[:, None] * (probs - onehot)
        gradient = jnp.concatenate([(lean * centred).sum(0), lean.sum(0)]) + strength * (theta - start)
        both = jnp.concatenate([probs * centred, probs], -1)
        weighed = shares[:, None] * probs
        squares, cross = jnp.diag((weighed * centred**2).sum(0)), jnp.diag((weighed * centred).sum(0))
        own = jnp.block([[squares, cross], [cross, jnp.diag(weighed.sum(0))]])
        hessian = own - jnp.matmul((shares[:, None] * both).T, both, precision="highest")
        return gradient, hessian + strength * jnp.eye(2 * classes, dtype=hessian.dtype)

    theta, gradient = minimise(value, derivatives, start)
    return theta, gradient, rows * derivatives(theta)[1]


def _laplace(key, centred, targets, weights, prior_scale, number):
    theta, gradient, precision = _posterior_parts(centred, targets, weights, prior_scale)
    classes = centred.shape[-1]
    noise = jax.random.normal(key, (2 * classes, number), precision.dtype)
    apart = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(precision), noise, lower=True, trans="T")
    return theta.reshape(2, classes), gradient, (theta + apart.T).reshape(number, 2, classes)
