"""Monte-Carlo dropout: a trained network whose dropout stays on at prediction."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from bayescal.methods.draws import check_draws
from bayescal.methods.map_estimate import MAPState, map_estimate, one_member
from bayescal.sharding import run_members
from bayescal.types import Key, Method, Model

if TYPE_CHECKING:
    import optax


def predict(state: MAPState, inputs, key: Key | None, model: Model, likelihood: Callable, num_draws: int):
    """`num_draws` networks, each with one dropout mask for all examples; `key=None` is the network without dropout.

    One mask a draw makes each draw a function: the same for any chunking of the data and any batch mates. Every
    example alone sees the distribution that fresh masks would give it.

    What comes before the first dropout is computed once for all draws: the compiler takes it out of the loop over them,
    and where they run side by side it has no axis of draws. Random numbers are drawn per draw and unit, not per example,
    so that fewer bits of them would save nothing.
    """
    if key is None:
        return likelihood(one_member(model.apply(state.variables, inputs, None)))

    def draw(draw_key, variables, inputs):
        def one(row):
            outputs = model.apply(variables, jax.tree.map(lambda x: x[None], row), draw_key)
            return jax.tree.map(lambda x: x[0], outputs)

        return jax.vmap(one)(inputs)

    return likelihood(run_members(draw, jax.random.split(key, num_draws), shared=(state.variables, inputs)))


def mc_dropout(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_draws: int,
    **settings,
) -> Method:
    """`map_estimate` whose prediction is a mixture over `num_draws` dropout masks; batch norm uses running moments.

    Args:
        model: a network with dropout; one without a random stream raises at the first prediction.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation.
        num_draws: members of the predictive.
        **settings: those of `map_estimate`.

    Raises:
        ValueError: for fewer than one draw.
    Source: Gal and Ghahramani 2016.
    """
    check_draws(num_draws)
    base = map_estimate(model, likelihood, optimizer, **settings)
    return base._replace(predict=lambda state, inputs, key: predict(state, inputs, key, model, likelihood, num_draws))
