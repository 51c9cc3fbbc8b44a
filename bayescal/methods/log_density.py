"""The log density of a network's params given the data: what samplers and particle methods move along."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.map_estimate import check_positive, one_member, weighted_mean
from bayescal.types import Batch, Model, PyTree, Variables


def position_type(params: PyTree) -> Any:
    """The one type in which a sampler moves: float32, or float64 under `jax_enable_x64`, in which blackjax makes numbers."""
    return jnp.result_type(jnp.zeros(()), *jax.tree.leaves(params))


def position(params: PyTree) -> PyTree:
    """The params as a sampler's position: half precision would round its steps away."""
    return cast_floats(params, position_type(params))


def cast_floats(tree: PyTree, dtype) -> PyTree:
    """Its floating leaves, Python's too, as arrays of that type; others as arrays of their own."""

    def cast(x):
        own = jnp.result_type(x)
        return jnp.asarray(x, dtype if jnp.issubdtype(own, jnp.floating) else own)

    return jax.tree.map(cast, tree)


def as_stored(moved: PyTree, params: PyTree) -> PyTree:
    """A position in the params' own types."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, params)


class Posterior(NamedTuple):
    """log p = (num_data * mean_i w_i log_prob_i - prior_precision / 2 * |params|^2) / temperature, up to a constant.

    The network is the deterministic one, `apply` without a key: dropout is off and `stats` (the running moments of
    batch norm) stay what they are, for a chain needs one density, the same at every step.

    model: the network.
    likelihood: outputs with a leading member axis -> predictive.
    num_data: number of training rows, with which the mean over any batch is scaled.
    prior_precision: inverse variance of the normal prior, of mean 0, on every parameter.
    temperature: 1 = Bayes; another one flattens or sharpens likelihood and prior alike.
    """

    model: Model
    likelihood: Callable
    num_data: int
    prior_precision: Any
    temperature: Any = 1.0

    def log_probs(self, variables: Variables, batch: Batch) -> jax.Array:
        """(rows,) the likelihood's log p of every row, nats."""
        return self.likelihood(one_member(self.model.apply(variables, batch.inputs, None))).log_prob(batch.targets)

    def loss(self, variables: Variables, batch: Batch) -> jax.Array:
        """Mean negative log-likelihood of the batch, nats per example."""
        return -weighted_mean(self.log_probs(variables, batch), jnp.asarray(batch.weights))

    def log_density(self, variables: Variables, batch: Batch) -> jax.Array:
        """Its estimate from a batch, nats of the whole data set."""
        squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(variables.params))
        return (-self.num_data * self.loss(variables, batch) - 0.5 * self.prior_precision * squares) / self.temperature

    def relative_to(self, origin: Variables, batch: Batch) -> Callable[[PyTree], jax.Array]:
        """`params -> log p(params) - log p(origin)`, summed over differences of rows, in the params' type.

        Samplers want nothing but differences of energy, of about one nat; the energies themselves grow with the number
        of rows, and in float32 their difference would be lost from about a million on.
        """
        known = self.log_probs(origin, batch)

        def difference(params):
            gain = weighted_mean(
                self.log_probs(origin._replace(params=params), batch) - known, jnp.asarray(batch.weights)
            )
            squares = jax.tree.map(lambda x, o: jnp.sum((x - o) * (x + o)), params, origin.params)
            prior = 0.5 * self.prior_precision * sum(jax.tree.leaves(squares))
            nats = (self.num_data * gain - prior) / self.temperature
            return nats.astype(position_type(params))

        return difference

    def check(self) -> None:
        """Raises for settings that are not positive."""
        check_positive(num_data=self.num_data, prior_precision=self.prior_precision, temperature=self.temperature)

    def check_model(self, variables: Variables, inputs) -> None:
        """Raises for a model with a penalty, which the deterministic network does not show."""
        penalties: list = []

        def train(variables, inputs):
            penalties.append(self.model.train(variables, inputs, jax.random.key(0))[2])

        jax.eval_shape(train, variables, inputs)
        if not (isinstance(penalties[0], (int, float)) and penalties[0] == 0):
            raise ValueError(
                "`model` must have no penalty, got one that adds nats of its own (variational layers, learnt dropout "
                "rates): its weights have a posterior already. Sample a model without one, or train it by `map_estimate`."
            )

    def check_batch(self, batch: Batch) -> None:
        """Raises unless the batch has as many rows as the data."""
        rows = batch.weights.shape[0]
        if rows != self.num_data:
            raise ValueError(
                f"`batch_size` must be all `num_data` rows, {self.num_data}, got a batch of {rows}: a transition is "
                "accepted by the density of the whole data. Pass `batch_size=num_data`, or sample by minibatches (`sgld`)."
            )

    def full_loss(self, variables: Variables, batch: Batch) -> jax.Array:
        """`loss`; NaN where the data hold more rows than `num_data`, for which `fit` stops the chain: its message says what
        to look at, since no host sees the rows here."""
        return jnp.where((batch.index < self.num_data).all(), self.loss(variables, batch), jnp.nan)
