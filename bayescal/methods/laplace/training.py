"""Training whose prior precision, and noise, follow the marginal likelihood: model selection without validation rows."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.laplace.evidence import maximise
from bayescal.methods.laplace.method import LaplaceState, laplace
from bayescal.methods.laplace.structures import Structure
from bayescal.methods.laplace.view import ggn, noise_scales, of_leaves
from bayescal.methods.map_estimate import one_member, share_of_penalty, start_variables, weighted_mean
from bayescal.predictive import Gaussian
from bayescal.types import Batch, Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax


class EvidenceState(NamedTuple):
    """A network in training, and the Laplace approximation that its prior precision comes from.

    epoch: passes over the data that are over. log_evidence: nats, of the last evidence epoch; -infinity before.
    """

    laplace: LaplaceState
    opt_state: PyTree
    epoch: jax.Array
    log_evidence: jax.Array

    @property
    def variables(self) -> Variables:
        return self.laplace.variables

    @property
    def prior_precision(self) -> jax.Array:
        return self.laplace.prior_precision

    @property
    def noise_scale(self) -> jax.Array:
        return self.laplace.noise_scale


def marginal_likelihood_training(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_data: int,
    structure: Structure,
    prior_precision: Any,
    burn_in: int,
    every: int,
    noise: bool = False,
    curvature: Callable[[Callable], Callable] = ggn,
    newton_steps: int = 20,
) -> Method:
    """`map_estimate` under a normal prior whose precision maximises the Laplace estimate of log p(data) as it trains.

    After `burn_in` epochs, every `every`-th is an evidence epoch: the network is held, its curvature is summed over the
    data, and the prior precision (and noise) takes up to `newton_steps` steps of Newton's method, in the logarithms, of
    at most 2 each. The other epochs train with -log p(y) + prior precision / 2 * |params|^2 / num_data.

    Args:
        model, likelihood, structure, curvature: as in `laplace`.
        optimizer: any optax transformation, of the parameters.
        num_data: number of training rows; never inferred.
        prior_precision: the first; one number, or one for each layer.
        burn_in: epochs before the first evidence epoch.
        every: one of so many epochs is an evidence epoch, at least 2.
        noise: the likelihood's variance is multiplied, too; for normal noise of a fixed variance.
        newton_steps: in an evidence epoch at most.

    Returns:
        Method whose state is `EvidenceState`, a `start` for `laplace(..., prior_precision=state.prior_precision)`, which takes
        the noise from it; its info is
        `loss`, mean nats per example, `prior_precision`, the geometric mean over layers, and `log_evidence`.

    Raises:
        ValueError: for settings out of range.
        TypeError: for `noise` with a likelihood or curvature that does not scale with it.
    Source: Immer et al. 2021 (scalable marginal likelihood estimation), algorithm 1, with Newton's for gradient steps.
    """
    for name, value, least in (("burn_in", burn_in, 0), ("every", every, 2), ("newton_steps", newton_steps, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"`{name}` must be a whole number of at least {least}, got {value!r}. It counts epochs or steps."
            )
    base: Any = laplace(
        model,
        likelihood,
        num_data=num_data,
        structure=structure,
        prior_precision=prior_precision,
        curvature=curvature,
    )

    def scaled(outputs, scale):
        pred = likelihood(one_member(outputs))
        return dataclasses.replace(pred, variance=pred.variance * scale) if isinstance(pred, Gaussian) else pred

    def init(key: Key, start: PyTree | None = None) -> EvidenceState:
        variables = model.init(key) if start is None else start_variables(start)
        own = base.init(key, variables)
        return EvidenceState(
            own, optimizer.init(variables.params), jnp.zeros((), jnp.int32), jnp.full_like(own.rows, -jnp.inf)
        )

    def is_evidence(state: EvidenceState):
        return (state.epoch >= burn_in) & ((state.epoch - burn_in) % every == every - 1)

    def train(state: EvidenceState, batch: Batch, key: Key):
        import optax

        own = state.laplace

        def objective(params):
            outputs, stats, penalty = model.train(own.variables._replace(params=params), batch.inputs, key)
            if noise and not noise_scales(likelihood, curvature, outputs):
                raise TypeError(
                    "`noise` needs normal noise of a fixed variance, and `ggn`, got another likelihood or curvature, which "
                    "it would not divide. Leave `noise` out, or use `homoscedastic`."
                )
            loss = -weighted_mean(scaled(outputs, own.noise_scale).log_prob(batch.targets), jnp.asarray(batch.weights))
            each = of_leaves(own.prior_precision, params)
            pull = sum(p * (x**2).sum() for p, x in zip(each, jax.tree.leaves(params), strict=True))
            return loss + share_of_penalty(penalty, num_data) + 0.5 * pull / num_data, (stats, loss)

        params = own.variables.params
        gradient, (stats, loss) = jax.grad(objective, has_aux=True)(params)
        change, opt_state = optimizer.update(gradient, state.opt_state, params)
        variables = Variables(optax.apply_updates(params, change), stats)
        return state._replace(laplace=own._replace(variables=variables), opt_state=opt_state), loss

    def measure(state: EvidenceState, batch: Batch, key: Key):
        own, info = base.update(state.laplace, batch, key)
        return state._replace(laplace=own), info["loss"]

    def update(state: EvidenceState, batch: Batch, key: Key):
        state, loss = jax.lax.cond(is_evidence(state), measure, train, state, batch, key)
        precision = jnp.exp(jnp.log(state.prior_precision).mean())
        return state, {"loss": loss, "prior_precision": precision, "log_evidence": state.log_evidence}

    def tune(state: EvidenceState) -> EvidenceState:
        own = base.end_epoch(state.laplace)
        (precision, scale), _ = maximise(lambda settings, state: base.evidence(state), noise, newton_steps, (), own)
        own = own._replace(prior_precision=precision, noise_scale=scale)
        reached = base.evidence(own)
        empty = base.init(jax.random.key(0), own.variables)  # nothing summed up for the network that will be
        own = empty._replace(variables=own.variables, prior_precision=precision, noise_scale=scale)
        return state._replace(laplace=own, log_evidence=reached)

    def end_epoch(state: EvidenceState) -> EvidenceState:
        state = jax.lax.cond(is_evidence(state), tune, lambda state: state, state)
        return state._replace(epoch=state.epoch + 1)

    def predict(state: EvidenceState, inputs, key: Key | None):
        return scaled(model.apply(state.variables, inputs, None), state.laplace.noise_scale)

    return Method(init, update, predict, end_epoch=end_epoch)
