"""Monte-Carlo dropout: a trained network whose dropout stays on at prediction."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from bayescal.methods.draws import check_draws, predict_passes
from bayescal.methods.map_estimate import map_estimate
from bayescal.types import Method, Model

if TYPE_CHECKING:
    import optax


def mc_dropout(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_draws: int,
    **settings,
) -> Method:
    """`map_estimate` whose prediction is a mixture over `num_draws` dropout masks; batch norm uses running moments.

    One mask a draw for all examples makes each draw a function. `key=None` is the network without dropout. Rates may be
    members' own settings (`dropout_layer`), or learnt (`concrete_dropout`, whose penalty needs `num_data`); masks may lie on
    weights instead of units (`drop_connect`). The penalty of `concrete_dropout` is a prior over weights already: leave
    `prior_precision` at 0 for it, and weight decay such as `optax.adamw`'s, or there are two.

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
    drawing = partial(predict_passes, model=model, likelihood=likelihood, num_draws=num_draws)
    return base._replace(predict=lambda state, inputs, key: drawing(state, inputs, key))
