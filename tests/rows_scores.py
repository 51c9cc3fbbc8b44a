"""The rows, heads and fits that the scores of features are tested on."""

from functools import cache

import numpy as np
from jax.tree_util import Partial

from bayescal.scores.combine import fit_members
from bayescal.scores.density import density_ratio, fit_gaussian_density
from bayescal.scores.gradient import grad_norm
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.shaping import ash_b, ash_p, ash_s, fit_react, scale
from bayescal.scores.subspace import fit_residual, fit_vim

ROWS, WIDTH, CLASSES = 60, 6, 3


def linear(variables, features):
    weights, bias = variables
    return features @ weights + bias[None]


def data(seed=0, members=()):
    """Training features (correlated, >= 0), labels, test features, and a head; float32."""
    rng = np.random.default_rng(seed)
    labels = np.arange(ROWS) % CLASSES
    mix = rng.normal(size=(*members, WIDTH, WIDTH))
    means = 2 * rng.normal(size=(*members, CLASSES, WIDTH))
    draw = lambda n, y: (rng.normal(size=(*members, n, WIDTH)) + means[..., y, :]) @ mix
    train, test = draw(ROWS, labels), draw(8, np.arange(8) % CLASSES)
    variables = rng.normal(size=(*members, WIDTH, CLASSES)), rng.normal(size=(*members, CLASSES)) + 3
    return *(np.asarray(abs(x), np.float32) for x in (train, test)), labels, [np.float32(x) for x in variables]


def wider(features, times=3):
    """The same rows, `times` as far from their mean: a background that is wider than every class."""
    mean = features.mean(0, keepdims=True)
    return mean + times * (features - mean)


TRAIN, TEST, LABELS, VARIABLES = data()
HEAD = Partial(linear, VARIABLES)
SHAPES = {"p": ash_p, "b": ash_b, "s": ash_s, "scale": scale}
ALL = {
    "mahalanobis": lambda f, head: fit_mahalanobis(f, LABELS),
    "relative": lambda f, head: fit_relative_mahalanobis(f, LABELS),
    "density": lambda f, head: fit_gaussian_density(f, LABELS),
    "ratio": lambda f, head: density_ratio(fit_gaussian_density(f, LABELS), fit_gaussian_density(wider(f), 0 * LABELS)),
    "neighbours": lambda f, head: fit_neighbours(f, k=5, chunk=16),
    "residual": lambda f, head: fit_residual(f, dim=2),
    "vim": lambda f, head: fit_vim(f, head, dim=2),
    "react": lambda f, head: fit_react(f, head),
    "gradient": lambda f, head: grad_norm(head),
    **{f"ash {kind}": lambda f, head, build=build: build(head, quantile=0.5) for kind, build in SHAPES.items()},
}


@cache
def fitted(name):
    return ALL[name](TRAIN, HEAD)


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def members_of(name, arrays):
    """Fitted on three members: with their heads where the score has one."""
    train, _, _, variables = arrays
    return fit_members(ALL[name], train, Partial(linear, variables))
