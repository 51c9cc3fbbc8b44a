"""Proportions of a mixture whose components are known, by EM: member weights, and class shares under label shift."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.predictive import weighted_sum

STEPS, TOLERANCE = 20_000, 1e-5


class Proportions(NamedTuple):
    """Where EM ended.

    shares: of the components, non-negative, of sum 1.
    log_density: weighted mean over rows of the mixture's log-density, nats.
    gap: how much higher the best mixture's can be at most, nats; at most 1e-5 where 20,000 steps were enough.
    """

    shares: Float[jax.Array, "component"]
    log_density: Float[jax.Array, ""]
    gap: Float[jax.Array, ""]


@jax.jit
def mixture_proportions(
    log_densities: Float[jax.Array, "component rows"],
    weights: Float[jax.Array, "rows"],
    start: Float[jax.Array, "component"],
) -> Proportions:
    """argmax_s of mean log sum_k s_k f_k(row), s on the simplex: s_k <- s_k g_k, g_k = mean f_k / sum_j s_j f_j.

    Each step raises the mean, which is concave in s, so that max_k g_k - 1 bounds what is missing. NaN where all
    components of a row that counts have density zero.

    Args:
        log_densities: of each row under each component, nats; anything where the row or the component counts for nothing.
        weights: of the rows.
        start: shares to begin with; 0 = the component stays out.
    """
    shares = weights / weights.sum()
    used = (start > 0)[:, None]
    logs = jnp.where(used & (shares > 0), log_densities, jnp.where(used, 0, -jnp.inf))
    most = logs.max(0)
    densities = jnp.exp(logs - most)  # the densest component of a row has 1: no row underflows

    def gains(at):
        return jnp.matmul(densities / jnp.matmul(at, densities, precision="highest"), shares, precision="highest")

    def step(carry):
        at, gain, count = carry
        at = at * gain
        at = at / at.sum()
        return at, gains(at), count + 1

    at = start / start.sum()
    at, gain, _ = jax.lax.while_loop(
        lambda carry: (carry[1].max() > 1 + TOLERANCE) & (carry[2] < STEPS), step, (at, gains(at), 0)
    )
    value = weighted_sum(jnp.log(jnp.matmul(at, densities, precision="highest")) + most, shares)
    return Proportions(at, value, gain.max() - 1)
