"""Bayes by backprop: variational inference in networks that are made of variational layers."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from bayescal.methods.draws import check_draws, predict_passes
from bayescal.methods.map_estimate import (
    check_positive,
    map_estimate,
    one_member,
    share_of_penalty,
    tempered,
    weighted_mean,
)
from bayescal.types import Method, Model

if TYPE_CHECKING:
    import optax


def bayes_by_backprop(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_data: int,
    num_draws: int,
    temperature: Any = 1.0,
    annealing: Callable | None = None,
) -> Method:
    """Minimises mean nll + temperature * annealing(step) * KL[q || prior] / num_data over the layers' posteriors.

    The network is made of `models.variational_dense`, `variational_conv`, `rank_one_dense` and their like, which say how
    their noise is drawn in training and report their KL as the model's penalty. A prediction is a mixture over
    `num_draws` networks, each of one draw of all weights; `key=None` is the network at the posterior's mean, or one member
    for each of its components (`rank_one_dense`), of which `num_draws` must be a multiple. With temperature 1 and no
    annealing it is `map_estimate(model, ..., num_data=num_data)` with that prediction.

    Args:
        model: a network with variational layers; whatever else it has is trained as a point estimate.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation.
        num_data: number of training rows, which scales the KL; never inferred.
        num_draws: members of the predictive.
        temperature: of the posterior: multiplies the KL alone; 1 = Bayes.
        annealing: `step -> share of the KL` in [0, 1], such as `optax.linear_schedule(0.0, 1.0, 1000)`; should end at 1.
            None = 1.

    Returns:
        Method whose state is `MAPState` and whose info is `loss` (mean nats per example), `kl` (nats) and `temperature`,
        by which the KL was multiplied in this step.

    Raises:
        ValueError: for settings that are not positive and finite, a first share outside [0, 1]; at the first update for a
            model without a penalty, at the first prediction for one that draws nothing.
        TypeError: for annealing that is not a function.
    Source: Blundell et al. 2015; scaling as in Graves 2011.
    """
    check_draws(num_draws)
    check_positive(num_data=num_data)
    factor = tempered(temperature, annealing)

    def objective(variables, batch, key, step):
        outputs, stats, kl = model.train(variables, batch.inputs, key)
        if isinstance(kl, (int, float)) and kl == 0:
            raise ValueError(
                "`model` must have variational layers, whose KL is its penalty, got a network without a penalty. Build it of "
                "`models.variational_dense` and its like, or use `variational`, which takes any network."
            )
        loss = weighted_mean(-likelihood(one_member(outputs)).log_prob(batch.targets), batch.weights)
        now = jnp.asarray(factor(step), loss.dtype)
        return loss + now * share_of_penalty(kl, num_data), (stats, {"loss": loss, "kl": kl, "temperature": now})

    predict = partial(predict_passes, model=model, likelihood=likelihood, num_draws=num_draws)
    return map_estimate(model, likelihood, optimizer, objective=objective)._replace(predict=predict)
