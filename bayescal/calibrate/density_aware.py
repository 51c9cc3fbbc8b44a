"""Density-aware calibration: a temperature that grows with the distance from the training data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bayescal.calibrate.calibrator import (
    Calibrator,
    Classes,
    concrete,
    like,
    pooled_log_probs,
    require_possible,
    rows_for_fit,
)
from bayescal.calibrate.region_temperature import temperature_of_regions
from bayescal.predictive import undefined_where
from bayescal.types import Array, pytree

CONVERGED = 1e-4  # nats, by the change of T in units of the plain temperature: an nll off by about its square


@pytree
class DensityAware(Calibrator):
    """log p / T(x), normalised again, with T(x) = base + sum_l slopes_l distance_l(x): `calibrator(pred, features=distances)`.

    Args:
        base: temperature at distance 0, >= 0.
        slopes: temperature per unit of distance in each layer, >= 0; 0 = the layer tells nothing.
        gradient: largest absolute derivative of the mean nll at the end, by each part of T as a share of the plain
            temperature, nats; of a part at 0 only where more of it would help.
    """

    accuracy_preserving = True
    needs = ("features",)

    base: Float[Array, ""]
    slopes: Float[Array, "layers"]
    gradient: Float[Array, ""]

    def __call__(self, pred: Classes, *, features: Float[Array, "*batch layers"]) -> Classes:
        """The pool, each row at its own temperature.

        Args:
            pred: predictive over classes.
            features: distances of each row, as in the fit. NaN where T(x) is not positive.

        Raises:
            ValueError: for distances of another shape.
        """
        _check_shape(features, pred.batch_shape, len(self.slopes))
        temperature = jnp.asarray(self.base) + (jnp.asarray(features) * self.slopes).sum(-1)
        temperature = undefined_where(~(temperature > 0), temperature)
        return like(pred, jax.nn.log_softmax(pooled_log_probs(pred) / temperature[..., None]))


def fit_density_aware(
    pred: Classes,
    targets: Int[Array, "rows"],
    *,
    features: Float[Array, "rows layers"],
    weights: Float[Array, "rows"] | None = None,
) -> DensityAware:
    """argmin over w >= 0 of mean nll(softmax(log p / T)), T(x) = w_0 + sum_l w_l d_l(x): less sure the farther away.

    Distances are to the k-th nearest training row in one layer or several,

        neighbours = bc.scores.fit_neighbours(train_features, k=50)
        distances = neighbours(features)[:, None]

    and on rows like the training data they may tell little: the gain is under shift. Starts from the plain temperature,
    which it never falls behind on these rows. Projected Fisher scoring, for the nll is not convex in T.

    Args:
        pred: predictive of the calibration rows.
        targets: integer labels.
        features: distances, finite and not negative.
        weights: weight of each row; None = ones; a weight is a repetition.

    Raises:
        TypeError: for a predictive that is not over classes.
        ValueError: for unusable rows or distances, no finite best temperature, or a search that did not converge.
    Source: Tomani et al. 2023.
    """
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    layers = jnp.shape(features)[-1] if jnp.ndim(features) else 0
    _check_shape(features, pred.batch_shape, layers)
    if concrete(features, weights):
        counted = np.asarray(features)[np.asarray(weights) > 0]
        if not (np.isfinite(counted) & (counted >= 0)).all():
            raise ValueError(
                "`features` must be finite distances that are not negative, got others. Use `bc.scores.fit_neighbours`, and "
                "leave out rows whose features are not finite."
            )
    require_possible(log_probs, targets, weights)
    weighed, gradient = _fit(log_probs, targets, weights, jnp.asarray(features, jnp.float32))
    if concrete(weighed):
        _require_converged(float(weighed[0]), float(gradient))
    return DensityAware(weighed[0], weighed[1:], gradient)


def _check_shape(features, batch, layers) -> None:
    if jnp.shape(features) != (*batch, layers):
        raise ValueError(
            f"`features` must be distances of shape {(*batch, layers)}, a row for each prediction and a column for each layer "
            f"of the fit, got {jnp.shape(features)}. Of one layer pass `distances[:, None]`."
        )


def _require_converged(base: float, gradient: float) -> None:
    if np.isnan(base):
        raise ValueError(
            "`targets` must leave a finite best temperature, got predictions for which it is 0 (every label is the most "
            "probable class) or infinity (labels unrelated to predictions). Use more calibration rows."
        )
    if not gradient <= CONVERGED:
        raise ValueError(
            f"`features` must allow the search to converge to a gradient of {CONVERGED:g}, got {gradient:.2g}. Leave out "
            "layers whose distances are nearly constant or nearly sums of others."
        )


@jax.jit
def _fit(log_probs, targets, weights, distances):
    times = partial(jnp.matmul, precision="highest")  # accelerators round the factors to fewer digits by default
    weights = weights / weights.sum()
    z = jnp.where(log_probs == -jnp.inf, -1e18, log_probs)  # its square is finite
    z = z - z.max(-1, keepdims=True)
    chosen = jnp.take_along_axis(z, targets[:, None], -1)[:, 0]
    distances = jnp.where(weights[:, None] > 0, distances, 0)
    plain, _ = temperature_of_regions(log_probs, targets, weights, jnp.zeros_like(targets), 1)
    # Each column in units of the plain temperature at the mean distance: what is fitted are shares of T near 1.
    mean = times(weights, distances)
    unit = plain / jnp.where(mean > 0, mean, 1)
    columns = jnp.concatenate([jnp.broadcast_to(plain, (len(z), 1)), distances * unit], -1)

    def nll(shares):
        scaled = z / times(columns, shares)[:, None]
        return times(weights, jax.nn.logsumexp(scaled, -1) - jnp.take_along_axis(scaled, targets[:, None], -1)[:, 0])

    def derivatives(shares):  # of the nll; the Fisher information stands for the second
        temperature = times(columns, shares)
        probs = jax.nn.softmax(z / temperature[:, None])
        mean = (probs * z).sum(-1)
        first = weights * (chosen - mean) / temperature**2
        second = weights * (probs * (z - mean[:, None]) ** 2).sum(-1) / temperature**4
        return times(first, columns), times((columns * second[:, None]).T, columns)

    def open_gradient(shares, gradient):
        return jnp.where((shares <= 0) & (gradient > 0), 0, gradient)

    def step(state):
        shares, value, steps, _ = state
        gradient, fisher = derivatives(shares)
        gradient = open_gradient(shares, gradient)
        free = (gradient != 0) & (jnp.diag(fisher) > 0)
        fisher = jnp.where(free[:, None] & free, fisher, 0)
        fisher = fisher + jnp.diag(jnp.where(free, 1e-6 * jnp.diag(fisher), 1))
        direction = -jnp.linalg.solve(fisher, gradient)

        def moved(size):
            return jnp.maximum(shares + size * direction, 0)

        def worse(search):
            size, after = search
            enough = value + 1e-4 * times(gradient, moved(size) - shares) + slack
            return ~(after <= enough) & (size > 1e-6)  # also NaN, where T is not positive

        def halve(search):
            size, _ = search
            return size / 2, nll(moved(size / 2))

        size, after = jax.lax.while_loop(worse, halve, (jnp.float32(1), nll(moved(1))))
        # Near the end the value has no digits left, while the gradient has.
        improved = (after < value - slack) | (largest(moved(size)) < largest(shares))
        return jnp.where(improved, moved(size), shares), jnp.where(improved, after, value), steps + 1, improved

    largest = lambda shares: abs(open_gradient(shares, derivatives(shares)[0])).max()
    start = jnp.zeros(columns.shape[1]).at[0].set(1)
    slack = 8 * jnp.finfo(z.dtype).eps * (1 + nll(start))
    state = start, nll(start), 0, ~jnp.isnan(plain[0])
    shares, *_ = jax.lax.while_loop(lambda state: state[3] & (state[2] < 100), step, state)
    return shares * jnp.concatenate([plain, unit]), largest(shares)
