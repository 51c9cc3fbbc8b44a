"""Predictions from networks that are drawn from a posterior: what its methods share."""

from collections.abc import Callable

import jax

from bayescal.methods.map_estimate import check_whole, one_member
from bayescal.sharding import run_members
from bayescal.types import Key, Model, State, Variables


def predict_draws(
    state: State,
    inputs,
    key: Key | None,
    *,
    model: Model,
    likelihood: Callable,
    draw: Callable[[State, Key], Variables],
    centre: Callable[[State], Variables],
    num_draws: int,
):
    """The likelihood of `num_draws` networks drawn from the posterior, as members; `key=None` is its central network.

    A draw depends on the state and its key alone, so it is one network for any inputs.

    Args:
        state: of the method.
        inputs: (rows, ...).
        key: of the draws, each of which has one split off it.
        model: the network.
        likelihood: outputs with a leading member axis -> predictive.
        draw: one network from the posterior.
        centre: the network that stands for the whole posterior: its mean or mode.
        num_draws: members of the predictive.
    """
    if key is None:
        return likelihood(one_member(model.apply(centre(state), inputs, None)))

    def outputs(draw_key, state, inputs):
        return model.apply(draw(state, draw_key), inputs, None)

    return likelihood(run_members(outputs, jax.random.split(key, num_draws), shared=(state, inputs)))


def check_draws(num_draws: int) -> None:
    """Raises unless `num_draws` is a whole number of at least one."""
    check_whole("num_draws", num_draws, 1, "10 to 100 is usual.")
