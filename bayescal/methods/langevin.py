"""Stochastic gradient Langevin dynamics, plain and preconditioned, on blackjax's overdamped diffusion."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.methods.map_estimate import check_positive
from bayescal.methods.sgmcmc import Kernel, kept_every, scheduled, sgmcmc
from bayescal.types import Method, Model, PyTree


def langevin() -> Kernel:
    """params + step_size * gradient + sqrt(2 * temperature * step_size) * noise; carries nothing."""
    from blackjax.sgmcmc.diffusions import overdamped_langevin

    move = overdamped_langevin()
    return Kernel(
        lambda key, params, temperature: (),
        lambda key, params, carried, gradient, step_size, temperature: (
            move(key, params, gradient, step_size, temperature),
            carried,
        ),
    )


def preconditioned_langevin(start: Callable[[PyTree], PyTree], precondition: Callable) -> Kernel:
    """params + step_size * G gradient + sqrt(2 * temperature * step_size * G) * noise, with a positive diagonal G.

    That is `langevin` in the coordinates params / sqrt(G). A G that depends on params would need a drift, the divergence
    of G, for the exact law; it is left out.

    Args:
        start: `params -> carried`.
        precondition: `(carried, gradient) -> (G, carried)`, G a pytree like params.
    """
    plain = langevin()

    def step(key, params, carried, gradient, step_size, temperature):
        diagonal, carried = precondition(carried, gradient)
        root = jax.tree.map(jnp.sqrt, diagonal)
        origin = jax.tree.map(jnp.zeros_like, params)
        gradient = jax.tree.map(jnp.multiply, root, gradient)
        change, _ = plain.step(key, origin, (), gradient, step_size, temperature)
        return jax.tree.map(lambda p, r, c: p + r * c, params, root, change), carried

    return Kernel(lambda key, params, temperature: start(params), step)


def sgld(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    step_size: Any,
    num_samples: int,
    burn_in: int,
    every: int = 1,
    prior_precision: Any,
    temperature: Any = 1.0,
    preconditioner: PyTree | None = None,
) -> Method:
    """Langevin chain: params + step_size * gradient + sqrt(2 * temperature * step_size) * noise.

    The gradient is that of the log posterior density of the whole data, estimated from the batch (`sgmcmc` says how it is
    scaled): steps are of the order of 0.1 / num_data and less. This is blackjax's step size, half of Welling and Teh's.
    A constant step leaves a bias: on a normal posterior of precision A the chain's covariance is
    temperature * (A (1 - step_size / 2 * A))^-1 for full batches, and noise of batches adds to it. A step above 2 / largest
    curvature diverges. Steps that decay are weighed alike all the same.

    Args:
        model, likelihood, num_data: as in `sgmcmc`.
        step_size: number, may be a member's own setting, or a schedule `step -> step size`.
        num_samples: networks held, the last that were kept; all are members of the predictive.
        burn_in: updates (not epochs) before the first that may be kept.
        every: of how many updates one position is kept.
        prior_precision: inverse variance of the normal prior on every weight; 0 = a flat prior.
        temperature: of the posterior, number or schedule; 1 = Bayes. To be reported with results.
        preconditioner: positive diagonal G, a pytree like the params: gradient and noise variance are multiplied by it. The
            chain moves at other speeds to the same law, in the limit of small steps. None = 1.

    Returns:
        Method whose state is `SGMCMCState` and whose info is `loss` and `kept`, as in `sgmcmc`.

    Raises:
        ValueError: for settings out of range; a preconditioner unlike the params, or not positive.
    Source: Welling and Teh 2011; blackjax `overdamped_langevin`.
    """
    return sgmcmc(
        model,
        likelihood,
        langevin() if preconditioner is None else _fixed(preconditioner),
        num_data=num_data,
        num_samples=num_samples,
        prior_precision=prior_precision,
        step_size=scheduled(step_size=step_size),
        temperature=scheduled(temperature=temperature),
        due=kept_every(burn_in, every),
    )


def psgld(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    step_size: Any,
    num_samples: int,
    burn_in: int,
    every: int = 1,
    prior_precision: Any,
    temperature: Any = 1.0,
    decay: float = 0.99,
    damping: float = 1e-5,
) -> Method:
    """`sgld` with the diagonal G = 1 / (damping + sqrt(V)), V = decay * V + (1 - decay) * (gradient / num_data)^2.

    V starts at 0. As in the paper's practice the drift that a G depending on params needs (its Gamma) is left out, so that
    the law is only approximate, the better the nearer `decay` to 1; with `decay` = 1, G is constant and this is `sgld` with
    step_size / damping. Unlike the paper's, the gradient in V includes the prior's share, and the step is half of theirs.

    Args:
        model, likelihood, num_data, step_size, num_samples, burn_in, every, prior_precision, temperature: as in `sgld`;
            its step is step_size * G, where 1 / G is about the size of gradients per example.
        decay: of the second moments, in (0, 1].
        damping: added to sqrt(V), nats per example and unit of params; positive.

    Returns:
        Method whose state is `SGMCMCState`, which carries V, and whose info is `loss` and `kept`, as in `sgmcmc`.

    Raises:
        ValueError: for settings out of range.
    Source: Li et al. 2016, algorithm 1 (recalled).
    """
    check_positive(damping=damping, decay=decay)
    if not isinstance(decay, Tracer) and decay > 1:
        raise ValueError(
            f"`decay` must be at most 1, got {decay!r}. 0.99 is usual; 1 keeps the preconditioner constant."
        )

    def precondition(moments, gradient):
        moments = jax.tree.map(lambda v, g: decay * v + (1 - decay) * jnp.square(g / num_data), moments, gradient)
        return jax.tree.map(lambda v: 1 / (damping + jnp.sqrt(v)), moments), moments

    return sgmcmc(
        model,
        likelihood,
        preconditioned_langevin(lambda params: jax.tree.map(jnp.zeros_like, params), precondition),
        num_data=num_data,
        num_samples=num_samples,
        prior_precision=prior_precision,
        step_size=scheduled(step_size=step_size),
        temperature=scheduled(temperature=temperature),
        due=kept_every(burn_in, every),
    )


def _fixed(preconditioner: PyTree) -> Kernel:
    """Langevin with a constant diagonal."""
    for leaf in jax.tree.leaves(preconditioner):
        if not isinstance(leaf, Tracer) and not (np.asarray(leaf) > 0).all():
            raise ValueError(
                f"`preconditioner` must be positive, got a least value of {np.min(leaf)}. It multiplies variances."
            )

    def start(params):
        given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (preconditioner, params))
        same = [jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple)) for tree in (given, wanted)]
        if same[0] != same[1]:
            raise ValueError(
                f"`preconditioner` must be a pytree of shapes like the params, {wanted}, got {given}. Map a function over "
                "`model.init(key).params`."
            )
        return ()

    return preconditioned_langevin(start, lambda carried, gradient: (preconditioner, carried))
