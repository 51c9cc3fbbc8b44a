"""Cyclical stochastic gradient Langevin dynamics: every cycle looks for another mode, then samples around it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bayescal.methods.langevin import langevin
from bayescal.methods.map_estimate import check_whole
from bayescal.methods.sgmcmc import scheduled, sgmcmc
from bayescal.schedules import cyclical_cosine
from bayescal.types import Method, Model


def cyclical_sgld(
    model: Model,
    likelihood: Callable,
    *,
    num_data: int,
    step_size: Any,
    cycle_length: int,
    samples_per_cycle: int,
    num_samples: int,
    exploration: float = 0.8,
    prior_precision: Any,
    temperature: Any = 1.0,
) -> Method:
    """`sgld` with the step step_size / 2 * (1 + cos(pi * (k mod cycle_length) / cycle_length)) at update k.

    The first part of every cycle, of large steps, is without noise: gradient ascent to a mode. The rest is Langevin. The
    networks kept are evenly spaced in that rest, the last of them where the cycle ends; they are weighed alike. It is not
    blackjax's `csgld`, which is contour SGLD. The law is no exact posterior, whatever the steps: each mode weighs as often as
    it is found.

    Args:
        model, likelihood, num_data, prior_precision, temperature: as in `sgld`.
        step_size: at the beginning of each cycle, in the unit of `sgld`; may be a member's own setting.
        cycle_length: updates (not epochs) in a cycle.
        samples_per_cycle: networks kept in each cycle.
        num_samples: networks held, the last that were kept: the number of cycles times `samples_per_cycle` for all.
        exploration: part of each cycle that is without noise, in [0, 1); rounded to whole updates.

    Returns:
        Method whose state is `SGMCMCState` and whose info is `loss` and `kept`, as in `sgmcmc`.

    Raises:
        ValueError: for settings out of range; more samples in a cycle than updates with noise.
    Source: Zhang et al. 2020, algorithm 1 (recalled).
    """
    check_whole("cycle_length", cycle_length, 1, "It counts updates (not epochs).")
    check_whole("samples_per_cycle", samples_per_cycle, 1, "It counts networks kept in a cycle.")
    if not 0 <= exploration < 1:
        raise ValueError(f"`exploration` must be in [0, 1), got {exploration!r}. It is a part of each cycle.")
    explored = round(exploration * cycle_length)
    spacing = (cycle_length - explored) // samples_per_cycle
    if spacing < 1:
        raise ValueError(
            f"`samples_per_cycle` must be at most the {cycle_length - explored} updates of a cycle that have noise, got "
            f"{samples_per_cycle}. Lengthen the cycle, or explore less of it."
        )
    sampling = scheduled(temperature=temperature)

    def due(step):
        left = cycle_length - 1 - step % cycle_length
        return (left % spacing == 0) & (left < spacing * samples_per_cycle)

    return sgmcmc(
        model,
        likelihood,
        langevin(),
        num_data=num_data,
        num_samples=num_samples,
        prior_precision=prior_precision,
        step_size=cyclical_cosine(step_size, cycle_length=cycle_length),
        temperature=lambda step: jnp.where(step % cycle_length < explored, 0.0, sampling(step)),
        due=due,
    )
