"""Predictions from networks that are drawn: from a posterior, or by the network's own random layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bayescal.methods.map_estimate import check_whole, one_member
from bayescal.models.rank_one import num_components, take_component
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


def predict_passes(state: State, inputs, key: Key | None, *, model: Model, likelihood: Callable, num_draws: int):
    """The likelihood of `num_draws` stochastic passes, one network each, as members; `key=None` is the mean network.

    A pass is one network for all examples, the same for any chunking of the data and any batch mates: what its key draws
    (masks, weights) does not depend on the row. Every example alone sees the distribution that fresh draws would give it.

    What comes before the first random layer is computed once for all passes: the compiler takes it out of the loop over
    them, and where they run side by side it has no axis of draws. Random numbers are drawn per pass and unit or weight, not
    per example, so that fewer bits of them would save nothing.

    Of a network with components (`rank_one_dense`) the passes take one after the other, so that each counts alike; its
    `key=None` is as many members as components, each at its own mean.

    Args:
        state: has `variables`.
        inputs: (rows, ...).
        key: of the passes, each of which has one split off it.
        model: the network.
        likelihood: outputs with a leading member axis -> predictive.
        num_draws: members of the predictive; a multiple of the network's components.

    Raises:
        ValueError: for a network whose outputs do not depend on its key: all passes would be the same. For a number of
            draws that is no multiple of its components.
    """
    number = num_components(state.variables.params)
    if num_draws % number:
        raise ValueError(
            f"`num_draws` must be a multiple of the network's {number} components, got {num_draws}, so that each counts "
            f"alike. Use {number * -(-num_draws // number)}."
        )

    def network(variables, component):
        if component is None:
            return variables
        return variables._replace(params=take_component(variables.params, component))

    if key is None and number == 1:
        return likelihood(one_member(model.apply(state.variables, inputs, None)))
    if key is None:
        centre = lambda component, variables, inputs: model.apply(network(variables, component), inputs, None)
        return likelihood(run_members(centre, jnp.arange(number), shared=(state.variables, inputs)))
    if not depends(lambda key: model.apply(state.variables, inputs, key), key):
        raise ValueError(
            "`model` must draw random numbers, got one whose outputs do not depend on its key, so that all draws would be the "
            "same network. Add dropout or variational layers, or use `map_estimate`."
        )

    many_rows = _many_rows(model, inputs)

    def draw(draw_key, component, variables, inputs):
        variables = network(variables, component)
        if many_rows is not None:
            return many_rows(variables, inputs, draw_key)

        def one(row):
            outputs = model.apply(variables, jax.tree.map(lambda x: x[None], row), draw_key)
            return jax.tree.map(lambda x: x[0], outputs)

        return jax.vmap(one)(inputs)

    components = None if number == 1 else jnp.arange(num_draws) % number
    keys = jax.random.split(key, num_draws)
    return likelihood(run_members(draw, keys, components, shared=(state.variables, inputs)))


def _many_rows(model: Model, inputs) -> Callable | None:
    """The model's own way for many rows of one draw; only on CPU: where draws run side by side, so would its branches."""
    fast = model.one_network
    if fast is None or fast.apply is not model.apply or jax.default_backend() != "cpu":
        return None
    return fast.outputs if jax.tree.leaves(inputs)[0].shape[0] >= fast.least_rows else None


def depends(function: Callable, x) -> bool:
    """Whether what `function` gives depends on `x`, judged by the program, inside jit, loops and branches too."""
    from jax.interpreters.partial_eval import dce_jaxpr

    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    return any(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])


def reached(jaxpr, variables) -> set:
    """Everything in the program that `variables` lead to."""
    found = set(variables)
    for equation in jaxpr.eqns:
        if any(v in found for v in equation.invars if not hasattr(v, "val")):
            found.update(equation.outvars)
    return found


def check_draws(num_draws: int) -> None:
    """Raises unless `num_draws` is a whole number of at least one."""
    check_whole("num_draws", num_draws, 1, "10 to 100 is usual.")
