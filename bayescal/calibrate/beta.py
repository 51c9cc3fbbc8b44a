"""Beta calibration of two classes: the map between two beta distributions of the score."""

import dataclasses
import itertools
import math

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
from bayescal.calibrate.platt import binary_log_probs, check_two_classes
from bayescal.calibrate.solve import converged_parameters, require_positive_classes, solve
from bayescal.predictive import Bernoulli, Categorical
from bayescal.types import Array, pytree

BOUNDED = {"abm": (0, 1), "am": (0,), "ab": (0, 1)}  # which of the parameters fitted must not be negative


@pytree
class BetaMap(Calibrator):
    """P(y = 1) = sigmoid(a log p_1 - b log p_0 + c) of the pool, two classes; a, b >= 0, so never falling in p_1.

    Args:
        a: how fast the odds grow near p_1 = 0.
        b: how fast they grow near p_1 = 1; a = b = 1 and c = 0 change nothing.
        c: nats; above 0 = class 1 more probable than before.
        gradient: largest absolute derivative of the mean nll by a parameter that is not held at 0, where the fit ended,
            nats; 0 = converged.
        parameters: which were fitted, "abm", "am" or "ab".
    """

    a: Float[Array, ""]
    b: Float[Array, ""]
    c: Float[Array, ""]
    gradient: Float[Array, ""]
    parameters: str = dataclasses.field(metadata={"static": True})

    @property
    def accuracy_preserving(self) -> bool:  # type: ignore[override]
        """Whether P(y = 1) = 1/2 stays there: by construction for parameters "ab"."""
        return self.parameters == "ab"

    def __call__(self, pred: Classes) -> Categorical | Bernoulli:
        """The pool, then the map. A probability of zero is taken to its limit.

        Raises:
            ValueError: for more than two classes.
        """
        check_two_classes(pred, "`fit_dirichlet`")
        log_probs = pooled_log_probs(pred)
        times = lambda slope, x: jnp.where((slope == 0) & (x == -jnp.inf), 0, slope * x)
        logits = times(self.a, log_probs[..., 1]) - times(self.b, log_probs[..., 0]) + self.c
        return like(pred, binary_log_probs(logits))


def fit_beta(
    pred: Classes, targets, *, parameters: str = "abm", weights: Float[Array, "rows"] | None = None
) -> BetaMap:
    """argmin_(a, b >= 0, c) of mean nll(y, sigmoid(a log p - b log(1 - p) + c)), p = P(y = 1) under the pool, two classes.

    "abm" fits all three. "am" has a = b: Platt scaling without smoothing, with a slope that is not negative. "ab" has
    c = (a - b) log 2, so that 1/2 stays 1/2. (The m of the names is the p that becomes 1/2: c = b log(1 - m) - a log m.)
    The bounds are exact: of the optima with each of a and b free or 0, the best that keeps to them. Labels that are
    unrelated to p give a = b = 0, their share for every row ("ab": 1/2).

    Args:
        pred: predictive of the calibration rows over two classes.
        targets: integers 0 and 1 (rows,).
        parameters: "abm", "am" or "ab".
        weights: weight of each row; None = ones.

    Raises:
        ValueError: for more than two classes; other `parameters`; a probability of zero; rows of one class; separable
            rows; and for unusable predictions, targets or weights.
    Source: Kull, Silva Filho and Flach 2017; the three families as in betacal 1.1.0 (code read).
    """
    check_two_classes(pred, "`fit_dirichlet`")
    if parameters not in BOUNDED:
        raise ValueError(f'`parameters` must be "abm", "am" or "ab", got {parameters!r}. "abm" fits all three.')
    log_probs, targets, weights = rows_for_fit(pred, targets, weights)
    require_positive_classes(log_probs, weights, "beta calibration")
    require_every_class(targets, weights, 2)
    one = jnp.ones_like(log_probs[:, 0])
    rising, falling = log_probs[:, 1], -log_probs[:, 0]
    columns = {
        "abm": (rising, falling, one),
        "am": (rising + falling, one),
        "ab": (rising + math.log(2), falling - math.log(2)),
    }[parameters]
    features = jnp.stack(columns, -1)[:, None]
    best = _bounded(features, jax.nn.one_hot(targets, 2, dtype=features.dtype), weights, BOUNDED[parameters])
    fitted = converged_parameters(
        best, "Use more calibration rows, or a map that separable rows leave finite: `fit_platt`."
    )
    a, b, c = {
        "abm": lambda a, b, c: (a, b, c),
        "am": lambda a, c: (a, a, c),
        "ab": lambda a, b: (a, b, (a - b) * math.log(2)),
    }[parameters](*fitted[0])
    return BetaMap(a, b, c, best.gradient, parameters)


def _bounded(features, targets, weights, bounded):
    """The optimum with the `bounded` parameters at least 0. The problem is convex: on the face where the optimum lies it is
    that face's free optimum, so the best free optimum that keeps to the bounds is it."""
    size = features.shape[-1]
    faces = np.ones((2 ** len(bounded), 1, size), bool)
    faces[:, 0, list(bounded)] = list(itertools.product((True, False), repeat=len(bounded)))
    penalty = np.zeros((1, size))
    optima = jax.vmap(lambda free: solve(features, targets, weights, penalty, free=free))(jnp.asarray(faces))
    allowed = (optima.parameters >= 0) | ~jnp.isin(jnp.arange(size), jnp.asarray(bounded))
    best = jnp.where(allowed.all((1, 2)), optima.objective, jnp.inf).argmin()
    return jax.tree.map(lambda x: x[best], optima)
