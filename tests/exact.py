"""Bayesian linear regression, whose posterior is known: what methods of inference are held against."""

from typing import NamedTuple

import jax
import numpy as np

import bayescal as bc

FEATURES, ROWS = 20, 200
NOISE = 0.25  # variance, known
PRIOR = 4.0  # precision of every weight


class Exact(NamedTuple):
    """The posterior normal(mean, inverse of precision) of the weights, in float64."""

    mean: np.ndarray
    precision: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        return np.linalg.inv(self.precision)


def linear_model(features: int = FEATURES) -> bc.Model:
    """(rows, features) -> (rows, 1), without a bias; starts at weights from its key."""

    def init(key):
        return bc.Variables(0.1 * jax.random.normal(key, (features, 1)))

    def apply(variables, inputs, key):
        return inputs @ variables.params

    return bc.Model(init, apply, lambda v, x, k: (apply(v, x, None), (), 0.0))


def linear_data(rows: int = ROWS, features: int = FEATURES, dtype=np.float32) -> bc.Dataset:
    """Correlated inputs, so that no two of full, diagonal and mean-field answers agree."""
    rng = np.random.default_rng(11)
    inputs = rng.normal(size=(rows, features)) @ (np.eye(features) + 0.3 / np.sqrt(features))
    targets = inputs @ rng.normal(size=(features, 1)) * 0.5 + np.sqrt(NOISE) * rng.normal(size=(rows, 1))
    return bc.Dataset(inputs.astype(dtype), targets.astype(dtype))


def exact_posterior(data: bc.Dataset, *, prior: float = PRIOR, noise: float = NOISE) -> Exact:
    inputs, targets = np.asarray(data.inputs, float), np.asarray(data.targets, float)
    precision = inputs.T @ inputs / noise + prior * np.eye(inputs.shape[1])
    return Exact(np.linalg.solve(precision, inputs.T @ targets / noise)[:, 0], precision)
