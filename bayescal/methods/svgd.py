"""Stein variational gradient descent: particles that descend together and push each other apart, through blackjax."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.methods.ensemble import member_keys
from bayescal.methods.log_density import Posterior
from bayescal.methods.map_estimate import check_whole, start_variables
from bayescal.sharding import run_members
from bayescal.types import Key, Method, Model, PyTree, Variables

if TYPE_CHECKING:
    import optax


class SVGDState(NamedTuple):
    """All particles (`variables` with a leading particle axis), the optimiser's state, and the number of updates made."""

    variables: Variables
    opt_state: PyTree
    step: jax.Array

    @property
    def networks(self) -> Variables:
        """The particles, which `refresh` takes its networks from."""
        return self.variables


def init(key: Key, start: PyTree | None, model: Model, optimizer, num_particles: int) -> SVGDState:
    """Particles from keys of their own, as an ensemble's members, or those in `start`, with a fresh optimiser."""
    fresh = jax.vmap(model.init)
    if start is None:
        variables = fresh(member_keys(key, num_particles))
    else:
        variables = start_variables(start)
        wanted = jax.eval_shape(fresh, jax.eval_shape(lambda k: member_keys(k, num_particles), key))
        check_particles(variables, wanted, num_particles)
    return SVGDState(variables, optimizer.init(variables.params), jnp.zeros((), jnp.int32))


def update(state: SVGDState, batch, key: Key, posterior: Posterior, optimizer):
    """One step of all particles along mean_j [k(x_j, x_i) grad log p(x_j) + grad_j k(x_j, x_i)], per row of the data."""
    from blackjax.vi import svgd as stein

    posterior.check_model(jax.tree.map(lambda x: x[0], state.variables), batch.inputs)

    def gradient(particle):
        of_params = lambda params: posterior.log_density(particle._replace(params=params), batch)
        return Variables(jax.grad(of_params)(particle.params), _zeros(particle.stats))

    def kernel(x, y, length_scale):
        return stein.rbf_kernel(x.params, y.params, length_scale)

    loss = jax.vmap(lambda particle: posterior.loss(particle, batch))(state.variables).mean()
    scale = stein.median_heuristic({}, state.variables.params)
    particles: Any = stein.SVGDState(state.variables, scale, state.opt_state)
    moved: Any = stein.build_kernel(_of_params(optimizer, posterior.num_data))(particles, gradient, kernel)
    return SVGDState(moved.particles, moved.opt_state, state.step + 1), {"loss": loss}


def predict(state: SVGDState, inputs, model: Model, likelihood: Callable):
    """The likelihood of every particle's network, as members of equal weight."""
    return likelihood(run_members(lambda v, x: model.apply(v, x, None), state.variables, shared=(inputs,)))


def draw(state: SVGDState, key: Key) -> Variables:
    """One of the particles, each as likely as the others."""
    which = jax.random.randint(key, (), 0, jax.tree.leaves(state.variables.params)[0].shape[0])
    return jax.tree.map(lambda x: x[which], state.variables)


def svgd(
    model: Model,
    likelihood: Callable,
    optimizer: "optax.GradientTransformation",
    *,
    num_data: int,
    num_particles: int,
    prior_precision: Any,
    temperature: Any = 1.0,
) -> Method:
    """Moves particles along phi(x) = mean_j [k(x_j, x) grad log p(x_j) + grad_j k(x_j, x)] / num_data.

    The first term draws them to high density, the second apart; k(x, y) = exp(-|x - y|^2 / h) with h = median^2 of their
    distances / log(num_particles). log p is that of the whole data, whatever the batch: num_data * mean of the batch, and
    the prior. Divided by num_data as in `map_estimate`, so that a learning rate means the same. In many dimensions the
    particles are known to spread less than the posterior. The particles need one another: `fit` trains them whole, and a
    step's memory grows with num_particles^2 * parameters. The network is the deterministic one: dropout is off, and batch
    norm keeps the moments it starts with.

    Args:
        model: a network without a penalty.
        likelihood: outputs with a leading member axis -> predictive.
        optimizer: any optax transformation; it sees the params of all particles at once, on a leading axis.
        num_data: number of training rows, with which gradients of a batch are scaled; never inferred.
        num_particles: members of the predictive, at least 2.
        prior_precision: inverse variance of the normal prior, of mean 0, on every parameter.
        temperature: of the posterior; 1 = Bayes, below 1 = "cold", for likelihood and prior alike.

    Returns:
        Method whose state is `SVGDState` and whose info is `loss` (mean nats per example, and over the particles). `fit`
        may start from the members of an ensemble, `start=fitted.state.members`, or from a state of its own. Particles
        that are equal never separate: `init` refuses them, but inside `fit`, where it does not see values, it cannot;
        where all are equal, their distances are 0 and the first update gives NaN, of which `fit` takes note.

    Raises:
        ValueError: for settings out of range; in `init`, a start without a particle axis of that length, or with two
            particles that are equal; in `update`, a model with a penalty.
    Source: Liu and Wang 2016 (recalled); kernel, bandwidth and step are blackjax's.
    """
    posterior = Posterior(model, likelihood, num_data, prior_precision, temperature)
    posterior.check()
    check_whole("num_particles", num_particles, 2, "10 to 50 is usual; one particle is `map_estimate`.")
    return Method(
        lambda key, start=None: init(key, start, model, optimizer, num_particles),
        lambda state, batch, key: update(state, batch, key, posterior, optimizer),
        lambda state, inputs, key: predict(state, inputs, model, likelihood),
        draw=draw,
    )


def check_particles(variables: Variables, wanted: Variables, num_particles: int) -> None:
    """Raises unless every leaf has the leading axis of `num_particles`, and no two of them are equal where one can see."""
    advice = (
        f"Particles that are equal never separate. Pass `fitted.state.members` of `ensemble(map_estimate(...), "
        f"{num_particles})`."
    )
    own, of_model = (jax.tree_util.tree_leaves_with_path(tree) for tree in (variables, wanted))
    same_structure = jax.tree.structure(variables) == jax.tree.structure(wanted)
    if not same_structure:
        raise ValueError(
            f"`start` must hold {num_particles} networks of this model, got a tree {jax.tree.structure(variables)} instead "
            f"of {jax.tree.structure(wanted)}. {advice}"
        )
    for (path, leaf), (_, like) in zip(own, of_model, strict=True):
        if jnp.shape(leaf) != like.shape:
            raise ValueError(
                f"`start` must hold {num_particles} networks on a leading axis, {like.shape} at "
                f"`{jax.tree_util.keystr(path)}`, got {jnp.shape(leaf)}. {advice}"
            )
    leaves = jax.tree.leaves(variables.params)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    flat = np.concatenate([np.asarray(leaf, float).reshape(num_particles, -1) for leaf in leaves], axis=1)
    different = len(np.unique(flat, axis=0))
    if different < num_particles:
        raise ValueError(f"`start` must hold {num_particles} different networks, got {different}. {advice}")


def _of_params(optimizer, num_data):
    """The optimiser of `Variables` that moves params per row of the data and leaves stats alone."""
    import optax

    def init(params: Any):
        return optimizer.init(params.params)

    def update(updates: Any, state, params: Any = None):
        per_row = jax.tree.map(lambda x: x / num_data, updates.params)
        change, state = optimizer.update(per_row, state, params.params)
        return Variables(change, _zeros(params.stats)), state

    return optax.GradientTransformation(init, update)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)
