"""Stochastic gradient Hamiltonian Monte Carlo, on blackjax's diffusion with friction."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bayescal.methods.map_estimate import check_positive
from bayescal.methods.sgmcmc import Kernel, kept_every, scheduled, sgmcmc
from bayescal.types import Method, Model


def hamiltonian(friction: Any) -> Kernel:
    """Langevin with a momentum of unit mass, which is carried from update to update and never drawn anew.

    It starts from its stationary normal, of variance `temperature` in the limit of small steps.
    """
    from blackjax.sgmcmc.diffusions import sghmc as with_friction
    from blackjax.util import generate_gaussian_noise

    move = with_friction(friction, 0.0)

    def start(key, params, temperature):
        return jax.tree.map(lambda x: jnp.sqrt(temperature) * x, generate_gaussian_noise(key, params))

    return Kernel(start, move)


def sghmc(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    step_size: Any,
    friction: Any,
    num_samples: int,
    burn_in: int,
    every: int = 1,
    prior_precision: Any,
    temperature: Any = 1.0,
) -> Method:
    """Langevin chain with momentum p: params + step_size * p; (1 - friction * step_size) * p + step_size * gradient + noise.

    Both from the values before the update, with noise of variance 2 * friction * temperature * step_size. The gradient is
    that of the log posterior density of the whole data, as in `sgmcmc`. In the terms of an optimiser: the learning rate on the
    log density is step_size^2, the momentum's decay 1 - friction * step_size. Stable where friction > step_size * largest
    curvature, and friction * step_size is well below 1. Noise of batches is not subtracted (Chen et al.'s B = 0): it adds to
    the temperature, the less the smaller the step.

    Args:
        model, likelihood, num_data: as in `sgmcmc`.
        step_size: number, may be a member's own setting, or a schedule `step -> step size`; time of the dynamics.
        friction: per unit of that time, positive.
        num_samples, burn_in, every, prior_precision, temperature: as in `sgld`.

    Returns:
        Method whose state is `SGMCMCState`, which carries the momentum, and whose info is `loss` and `kept`, as in `sgmcmc`.

    Raises:
        ValueError: for settings out of range.
    Source: Chen et al. 2014, scaled as in Ma et al. 2015 (recalled); blackjax `diffusions.sghmc`.
    """
    check_positive(friction=friction)
    return sgmcmc(
        model,
        likelihood,
        hamiltonian(friction),
        num_data=num_data,
        num_samples=num_samples,
        prior_precision=prior_precision,
        step_size=scheduled(step_size=step_size),
        temperature=scheduled(temperature=temperature),
        due=kept_every(burn_in, every),
    )
