"""Mean-field variational inference: the seconds of one training step, against Bayes-by-backprop written by hand.

Ours: `bc.fit` of `bc.variational` as a script calls it, its `update` alone in the loop of the hand-written step, and `bc.fit`
of a network of variational layers (whose biases are point estimates). By hand: plain functions with location and raw scale of
every leaf, w = location + softplus(raw scale) * noise, the KL in closed form, and Adam; in JAX all epochs as one jitted scan
with the rows on the device, in PyTorch a loop. Network, batches, prior and start are the same. The difference is that of
the mean losses of the last epoch, of other random numbers.
"""

import importlib
import time
from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import entry, installed, interleaved

import bayescal as bc

if TYPE_CHECKING:
    from bench_methods import Config

INITIAL_SCALE, LEARNING_RATE = 0.01, 1e-3
ESTIMATORS = ("shared_noise", "local_reparametrisation", "flipout")  # of `bc.models`


class Network(NamedTuple):
    """A perceptron, and how it is trained."""

    in_features: int
    hidden: tuple[int, ...]
    classes: int
    batch_size: int

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.in_features, *self.hidden, self.classes)


NETWORKS = {"variational_mlp": Network(784, (200, 200), 10, 128), "variational_small": Network(64, (256, 256), 8, 64)}


class Case(NamedTuple):
    """A network, its data, and how long it is trained."""

    model: bc.Model
    data: bc.Dataset
    batch_size: int
    epochs: int

    @property
    def steps(self) -> int:
        """Updates an epoch; rows that fill no batch are left out, for all."""
        return len(self.data.targets) // self.batch_size


def case_of(name: str, config: "Config") -> Case:
    """Normal rows and random labels, as many as fill whole batches."""
    network, rng = NETWORKS[name], np.random.default_rng(0)
    batch_size = min(network.batch_size, config.rows)
    rows = config.rows - config.rows % batch_size
    inputs = rng.standard_normal((rows, network.in_features)).astype(np.float32)
    data = bc.Dataset(inputs, rng.integers(0, network.classes, rows).astype(np.int32))
    return Case(bc.models.mlp(network.in_features, network.hidden, network.classes), data, batch_size, config.epochs)


def variational(case: Case, optimizer=None) -> bc.Method:
    """The mean-field guide over all weights; its prior is Normal(0, 1) unless it is told otherwise."""
    how: dict[str, Any] = dict(num_data=len(case.data.targets), num_draws=1, initial_scale=INITIAL_SCALE)
    return bc.variational(case.model, bc.Categorical, optimizer or optax.adam(LEARNING_RATE), **how)


def layers(case: Case, network: Network, estimator: str) -> bc.Method:
    """The same network of variational layers."""
    how: dict[str, Any] = dict(estimator=getattr(bc.models, estimator), prior_scale=1.0, initial_scale=INITIAL_SCALE)
    dense = partial(bc.models.variational_dense, **how)
    model = bc.models.mlp(network.in_features, network.hidden, network.classes, dense=dense)
    return bc.bayes_by_backprop(
        model, bc.Categorical, optax.adam(LEARNING_RATE), num_data=len(case.data.targets), num_draws=1
    )


def fitted(case: Case, method: bc.Method) -> Callable[[], Any]:
    """Whole trainings by `bc.fit`; the loss of each epoch."""
    numbers = count()
    how: dict[str, Any] = dict(epochs=case.epochs, batch_size=case.batch_size, progress=False)
    return lambda: bc.fit(method, case.data, jax.random.key(next(numbers)), **how).history["loss"]


class ByHand(NamedTuple):
    """Posterior leaf by leaf, and Adam's moments."""

    posterior: Any
    opt_state: Any


def by_hand(case: Case, optimizer=None) -> tuple[Callable, Callable]:
    """`init(key)` and `step(state, batch, key)` of Bayes-by-backprop in plain JAX."""
    optimizer = optimizer or optax.adam(LEARNING_RATE)

    def init(key):
        location = case.model.init(key).params
        raw = jnp.log(jnp.expm1(INITIAL_SCALE))
        posterior = location, jax.tree.map(lambda x: jnp.full_like(x, raw), location)
        return ByHand(posterior, optimizer.init(posterior))

    def step(state, batch, key):
        gradient, loss = jax.grad(objective, has_aux=True)(state.posterior, batch, key, case)
        change, opt_state = optimizer.update(gradient, state.opt_state, state.posterior)
        return ByHand(optax.apply_updates(state.posterior, change), opt_state), {"loss": loss}

    return init, step


def objective(posterior, batch, key, case: Case):
    """Mean nll of one draw of the weights + KL / rows; and the nll alone."""
    location, raw_scale = posterior
    leaves, structure = jax.tree.flatten(location)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    scale = jax.tree.map(jax.nn.softplus, raw_scale)
    params = jax.tree.map(lambda m, s, k: m + s * jax.random.normal(k, m.shape), location, scale, keys)
    logits = case.model.apply(bc.Variables(params), batch.inputs, None)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()
    kl = jax.tree.map(_kl, location, scale)
    return loss + sum(jax.tree.leaves(kl)) / len(case.data.targets), loss


def _kl(location, scale):
    """KL[Normal(location, scale) || Normal(0, 1)], summed over the leaf."""
    return (0.5 * (scale**2 + location**2 - 1) - jnp.log(scale)).sum()


def scanned(case: Case, init: Callable, step: Callable) -> Callable[[], Any]:
    """A training as one jitted scan over epochs of a scan over steps, with fresh batches each epoch; losses of each epoch."""
    rows, numbers = len(case.data.targets), count()

    def epoch(state, key, data):
        order_key, step_key = jax.random.split(key)
        order = jax.random.permutation(order_key, rows).reshape(case.steps, case.batch_size)

        def one(state, at):
            number, index = at
            batch = bc.Batch(data.inputs[index], data.targets[index], jnp.ones(case.batch_size), index)
            state, info = step(state, batch, jax.random.fold_in(step_key, number))
            return state, info["loss"]

        state, losses = jax.lax.scan(one, state, (jnp.arange(case.steps), order))
        return state, losses.mean()

    @jax.jit
    def train(key, data):
        keys = jax.random.split(key, case.epochs + 1)
        return jax.lax.scan(lambda state, key: epoch(state, key, data), init(keys[0]), keys[1:])

    data = jax.device_put(case.data)
    return lambda: train(jax.random.key(next(numbers)), data)[1]


def in_torch(case: Case, network: Network, threads: int) -> Callable[[], Any]:
    """The same training in PyTorch, with fused Adam on locations and raw scales."""
    torch = importlib.import_module("torch")
    inputs, targets = torch.tensor(case.data.inputs), torch.tensor(case.data.targets.astype(np.int64))

    def train():
        torch.set_num_threads(threads)
        layers = [torch.nn.Linear(*pair) for pair in pairwise(network.widths)]
        location = [own for layer in layers for own in layer.parameters()]
        raw = float(np.log(np.expm1(INITIAL_SCALE)))
        raw_scale = [torch.full_like(x, raw, requires_grad=True) for x in location]
        optimizer = torch.optim.Adam([*location, *raw_scale], lr=LEARNING_RATE, fused=True)
        for _ in range(case.epochs):
            losses = []
            for index in torch.randperm(len(targets)).split(case.batch_size):
                total, loss = torch_objective(torch, location, raw_scale, inputs[index], targets[index], len(targets))
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                optimizer.step()
                losses.append(loss.detach())
        return [float(torch.stack(losses).mean())]

    return train


def torch_objective(torch, location: list, raw_scale: list, x, targets, num_data: int):
    """As `objective`; weights and biases of the layers are in turn, weights with outputs first."""
    functions = torch.nn.functional
    scale = [functions.softplus(raw) for raw in raw_scale]
    drawn = [torch.addcmul(m, s, torch.randn_like(m)) for m, s in zip(location, scale, strict=True)]
    for number in range(0, len(drawn), 2):
        x = functions.linear(x if number == 0 else functions.relu(x), drawn[number], drawn[number + 1])
    loss = functions.cross_entropy(x, targets)
    both = zip(location, scale, strict=True)
    kl = sum((s.square() + m.square()).sum() / 2 - s.log().sum() - m.numel() / 2 for m, s in both)
    return loss + kl / num_data, loss


def measured(name: str, config: "Config", absent: dict[str, str]) -> list[dict]:
    """Seconds of a step of each of ours, against both hand-written forms."""
    case, network = case_of(name, config), NETWORKS[name]
    method = variational(case)
    ours = {
        "variational, bc.fit": fitted(case, method),
        "variational, update alone": scanned(case, lambda key: method.init(key, None), method.update),
        **{
            f"layers, {word.replace('_', ' ')}, bc.fit": fitted(case, layers(case, network, word))
            for word in ESTIMATORS
        },
    }
    peers = {
        "by hand, jax": scanned(case, *by_hand(case)),
        **installed({"by hand, torch": in_torch}, absent, case, network, config.threads),
    }
    losses: dict[str, float] = {}

    def kept(form: str, train: Callable) -> Callable:
        def run():
            losses[form] = float(np.mean(train()[-1]))

        return run

    forms = {form: kept(form, train) for form, train in {**ours, **peers}.items()}
    seconds = interleaved(forms, config.rounds, time.perf_counter)
    steps = case.steps * case.epochs
    title = f"{name}, {'-'.join(map(str, network.widths))}, batch {case.batch_size}"
    return [
        entry(
            f"{title}, {own}",
            peer,
            seconds[own] / steps,
            seconds[peer] / steps,
            difference=abs(losses[own] / losses[peer] - 1),
        )
        for own in ours
        for peer in peers
    ]
