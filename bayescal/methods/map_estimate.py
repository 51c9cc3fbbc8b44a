"""Maximum a posteriori training of one network: the base of most other methods."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.types import Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax  # whoever trains brings it; who only measures need not wait for it


class MAPState(NamedTuple):
    """A network, its optimiser's state, and the number of updates made."""

    variables: Variables
    opt_state: PyTree
    step: jax.Array


def init(key: Key, start: PyTree | None, model: Model, optimizer: "optax.GradientTransformation") -> MAPState:
    """A fresh network, or the one in `start` (`Variables`, or a state that has `variables`) with a fresh optimiser."""
    variables = model.init(key) if start is None else start_variables(start)
    return MAPState(variables, optimizer.init(variables.params), jnp.zeros((), jnp.int32))


def update(state: MAPState, batch, key: Key, objective: Callable, optimizer: "optax.GradientTransformation"):
    """One optimiser step on the objective; returns the state and the objective's info."""
    import optax

    def of_params(params):
        return objective(state.variables._replace(params=params), batch, key, state.step)

    gradient, (stats, info) = jax.grad(of_params, has_aux=True)(state.variables.params)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.variables.params)
    params = optax.apply_updates(state.variables.params, change)
    return MAPState(Variables(params, stats), opt_state, state.step + 1), info


def predict(state: MAPState, inputs, key: Key | None, model: Model, likelihood: Callable):
    """The likelihood of the deterministic network's outputs, as one member; the key is not used."""
    return likelihood(one_member(model.apply(state.variables, inputs, None)))


def map_estimate(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    loss: Callable | None = None,
    objective: Callable | None = None,
    prior_precision: Any = 0.0,
    num_data: int | None = None,
) -> Method:
    """Minimises mean_i w_i loss_i + (penalty + prior_precision / 2 * |params|^2) / num_data over the batch.

    With the default loss, the likelihood's -log p, that is maximum likelihood, or maximum a posteriori under a normal
    prior of mean 0 and variance 1 / prior_precision on every parameter.

    Args:
        model: the network.
        likelihood: outputs with a leading member axis -> predictive, e.g. `Categorical`.
        optimizer: any optax transformation.
        loss: `(outputs, targets) -> (batch,)`, nats per example; replaces the likelihood's -log p in training.
        objective: `(variables, batch, key, step) -> (scalar, (new_stats, info))`; replaces everything above.
        prior_precision: inverse variance of the prior; 0 = no prior.
        num_data: number of training rows; required with a prior or a model that has a penalty.

    Returns:
        Method whose state is `MAPState` and whose info is `loss`, mean nats per example.

    Raises:
        ValueError: a prior or penalty without `num_data`; `loss` or a prior beside `objective`; negative settings.
    """
    import optax

    no_prior = isinstance(prior_precision, (int, float)) and prior_precision == 0
    if num_data is not None:
        check_positive(num_data=num_data)
    check_not_negative("0 means no prior.", prior_precision=prior_precision)
    if num_data is None and not no_prior:
        raise ValueError(
            "`num_data` is required with `prior_precision`, got None: the prior's share of a batch depends on it. "
            "Pass the number of training rows."
        )
    if objective is not None and (loss is not None or not no_prior):
        raise ValueError(
            "`objective` replaces the whole objective, got `loss` or `prior_precision` beside it. "
            "Put them into the objective, or leave it out."
        )
    if loss is None:
        loss = lambda outputs, targets: -likelihood(one_member(outputs)).log_prob(targets)

    def default_objective(variables, batch, key, step):
        outputs, stats, penalty = model.train(variables, batch.inputs, key)
        mean_loss = weighted_mean(loss(outputs, batch.targets), batch.weights)
        total = mean_loss + share_of_penalty(penalty, num_data)
        if not no_prior and num_data is not None:
            total = total + 0.5 * prior_precision * optax.tree.norm(variables.params, squared=True) / num_data
        return total, (stats, {"loss": mean_loss})

    objective = objective or default_objective
    return Method(
        lambda key, start=None: init(key, start, model, optimizer),
        lambda state, batch, key: update(state, batch, key, objective, optimizer),
        lambda state, inputs, key: predict(state, inputs, key, model, likelihood),
    )


def start_variables(start: PyTree) -> Variables:
    """The network in `start`: `Variables`, or a state that has `variables`.

    Raises:
        TypeError: for anything else.
    """
    variables = getattr(start, "variables", start)
    if not isinstance(variables, Variables):
        raise TypeError(
            f"`start` must be Variables or a state that has `variables`, got {type(start).__name__}. "
            "Pass a fit's `state`, the network in the middle of a posterior, `method.draw(state, None)`, or "
            "`Variables(params, stats)`."
        )
    return variables


def check_positive(**settings) -> None:
    """Raises unless each is one positive, finite number; of one that is traced the value is not known."""
    for name, value in settings.items():
        number = _one_number(name, value)
        if not number > 0:
            raise ValueError(f"`{name}` must be positive, got {value!r}. See the docstring for its unit.")
        if not number < math.inf:
            raise ValueError(f"`{name}` must be finite, got {value!r}. See the docstring for its unit.")


def check_not_negative(advice: str, **settings) -> None:
    """`check_positive` for settings that may be 0; the advice says what 0 means."""
    for name, value in settings.items():
        if not _one_number(name, value) >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value!r}. {advice}")


def _one_number(name: str, value) -> Any:
    """The setting, or 1 for one that is traced.

    Raises:
        ValueError: for what is no number, and for an array or a pytree of several.
    """
    if not _is_number(value):
        raise ValueError(
            f"`{name}` must be one number, got {_what(value)}. Give one for the whole network; to let the members of an "
            "ensemble differ use `ensemble(build, settings=...)`."
        )
    return 1 if isinstance(value, Tracer) else value


def _is_number(value) -> bool:
    return not np.shape(value) and isinstance(value, (Real, np.generic, np.ndarray, jax.Array))


def _what(value) -> str:
    return f"shape {np.shape(value)}" if np.shape(value) else type(value).__name__


def check_whole(name: str, value, least: int, advice: str) -> None:
    """Raises unless the setting is a whole number, Python's or numpy's, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not int(value) >= least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}. {advice}")


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """sum w x / rows over the batch, unbiased for any batch size; rows of weight 0 may hold anything."""
    return jnp.where(weights == 0, 0, weights * jnp.where(weights == 0, 0, values)).sum() / weights.shape[0]


def share_of_penalty(penalty, num_data: int | None):
    """A model's penalty (nats for the whole data set) per example.

    Raises:
        ValueError: for a model with a penalty and no `num_data`.
    """
    if isinstance(penalty, (int, float)) and penalty == 0:
        return 0.0
    if num_data is None:
        raise ValueError(
            "`num_data` is required for a model with a penalty (variational layers, learnt dropout rates), got None. "
            "Pass the number of training rows."
        )
    return penalty / num_data


def tempered(temperature: Any, annealing: Callable | None) -> Callable[[jax.Array], Any]:
    """`step -> temperature * annealing(step)`, what a KL is multiplied by.

    Raises:
        ValueError: for a temperature that is not positive; a first share that is not one number in [0, 1].
        TypeError: for annealing that is not a function.
    """
    check_positive(temperature=temperature)
    if annealing is None:
        return lambda step: temperature
    if not callable(annealing):
        raise TypeError(
            f"`annealing` must be a function of the step, got {type(annealing).__name__}. Pass a schedule, such as "
            "`optax.linear_schedule(0.0, 1.0, 500)`; a constant share of the KL is a `temperature`."
        )
    share: Any = annealing(jnp.zeros((), jnp.int32))
    known = not isinstance(share, Tracer)
    if not _is_number(share) or (known and not 0 <= share <= 1):
        got = share if _is_number(share) else _what(share)
        raise ValueError(
            f"`annealing` must give one number in [0, 1], got {got} at step 0. It is a share of the KL, such as "
            "`optax.linear_schedule(0.0, 1.0, 500)`; a factor of it is a `temperature`."
        )
    return lambda step: temperature * annealing(step)


def one_member(outputs):
    """Outputs of one network with the member axis that likelihoods want."""
    return jax.tree.map(lambda x: x[None], outputs)
