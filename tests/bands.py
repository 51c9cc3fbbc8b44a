"""What tests of chains share: a batch of all rows, and samples held against an exact normal posterior."""

import jax.numpy as jnp
import numpy as np
from exact import Exact
from scipy.stats import norm

import bayescal as bc


def all_rows(data: bc.Dataset) -> bc.Batch:
    rows = len(data.targets)
    return bc.Batch(jnp.asarray(data.inputs), jnp.asarray(data.targets), jnp.ones(rows), jnp.arange(rows))


def positions(fitted: bc.Fit) -> np.ndarray:
    """(chain, sample, features) held by an ensemble of chains of the linear model."""
    return np.asarray(fitted.state.members.samples.params)[..., 0]


def deviations(samples: np.ndarray, exact: Exact, level: float = 0.99) -> dict[str, float]:
    """Greatest deviation of means and of covariances, each over the half width of its `level` Monte-Carlo band.

    At most 1 = inside. In coordinates where the exact posterior is standard normal, every mean, variance and covariance
    has a known standard error, 1, sqrt(2) and 1 over the root of the effective sample size; the bands hold for all of
    a kind together (Bonferroni).

    Args:
        samples: (chain, sample, features).
        exact: what they should follow.
        level: probability that a right chain is inside.
    """
    from blackjax.diagnostics import effective_sample_size

    white = (samples.astype(float) - exact.mean) @ np.linalg.cholesky(exact.precision)
    first, second = np.triu_indices(white.shape[-1])
    products = white[..., first] * white[..., second]
    told = {}
    for name, values, wanted, scale in (
        ("mean", white, 0.0, 1.0),
        ("covariance", products, first == second, np.where(first == second, np.sqrt(2), 1)),
    ):
        effective = np.asarray(effective_sample_size(jnp.asarray(values, jnp.float32)))
        error = np.abs(values.mean((0, 1)) - wanted) / (scale / np.sqrt(effective))
        told[name] = float(error.max() / norm.isf((1 - level) / 2 / values.shape[-1]))
    return told
