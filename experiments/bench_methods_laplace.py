"""Kronecker-factored Laplace against laplace-torch, with the same weights.

From arrays on the host to the curvature's sums ("sums"), and on to the decomposed posterior of all layers ("posterior"):
`bc.fit` of `bc.laplace` for one epoch, and `fit` of laplace-torch's KronLaplace with two of its backends. Both sum the
generalised Gauss-Newton factors of every class; of one batch of 100 the log-determinants are compared.
"""

import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from bench import entry, installed, interleaved

import bayescal as bc

if TYPE_CHECKING:
    from bench_methods import Config

BACKENDS = ("CurvlinopsGGN", "AsdlGGN")
CLASSES = 10


class Case(NamedTuple):
    """A network with its weights, and images with labels."""

    model: bc.Model
    variables: bc.Variables
    data: bc.Dataset


def case_of(name: str, config: "Config") -> Case:
    """A network as it is initialised, normal images and random labels: time does not depend on them."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((config.rows, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(0, CLASSES, config.rows).astype(np.int32)
    model = {
        "kfac_mlp": lambda: bc.models.mlp(784, config.hidden, CLASSES),
        "kfac_convnet": lambda: bc.models.convnet((28, 28, 1), config.channels, 64, CLASSES),
    }[name]()
    return Case(model, jax.jit(model.init)(jax.random.key(0)), bc.Dataset(images, labels))


def ours(case: Case, batch: int, part: str = "posterior") -> Callable:
    """One pass over the data, and for the posterior the decomposition of every layer's factors."""
    rows, key = len(case.data.targets), jax.random.key(0)
    settings: dict[str, Any] = dict(num_data=rows, structure=bc.kronecker(bias="apart"), prior_precision=1.0)
    method = bc.laplace(case.model, bc.Categorical, **settings)
    if part == "sums":
        method = method._replace(end_epoch=None)
    how: dict[str, Any] = dict(epochs=1, batch_size=batch, start=case.variables, progress=False)
    return lambda: bc.fit(method, case.data, key, **how).state


def torch_network(torch, case: Case):
    """The same network with our weights: channels first, so that the dense layer's inputs are turned."""
    nn, layers = torch.nn, []
    params = jax.tree.map(np.asarray, case.variables.params)

    def dense(own, kernel):
        layer = nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(own["bias"])
        return layer

    for own in params.get("conv", {}).values():
        kernel = own["kernel"].transpose(3, 2, 0, 1)
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.copy()), torch.tensor(own["bias"])
        layers += [layer, nn.MaxPool2d(2), nn.ReLU()]
    layers.append(nn.Flatten())
    if "conv" in params:
        kernel, channels = params["dense"]["kernel"], layers[-4].out_channels
        side = round((kernel.shape[0] // channels) ** 0.5)
        turned = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        layers += [dense(params["dense"], turned), nn.ReLU()]
    else:
        for own in params["dense"].values():
            layers += [dense(own, own["kernel"]), nn.ReLU()]
    return nn.Sequential(*layers, dense(params["head"], params["head"]["kernel"]))


def laplace_torch(backend: str, batch: int, part: str = "posterior") -> Callable:
    """Case -> what makes laplace-torch's posterior."""

    def make(case: Case, config: "Config") -> Callable:
        torch, laplace = importlib.import_module("torch"), importlib.import_module("laplace")
        torch.set_num_threads(config.threads)
        network = torch_network(torch, case).eval()
        images = torch.tensor(case.data.inputs.transpose(0, 3, 1, 2).copy())
        data = torch.utils.data.TensorDataset(images, torch.tensor(case.data.targets.astype(np.int64)))
        loader = torch.utils.data.DataLoader(data, batch_size=batch)
        curvature = getattr(laplace.curvature, backend)

        def fit():
            settings = dict(subset_of_weights="all", hessian_structure="kron", backend=curvature)
            posterior = laplace.Laplace(network, "classification", **settings)
            whole: Any = posterior if part == "posterior" else super(type(posterior), posterior)
            whole.fit(loader)  # KronLaplace sums as its parent does, and then decomposes
            return posterior

        return fit

    return make


def difference(case: Case, config: "Config", backend: str) -> float:
    """Relative, of log det of the posterior precision, for one batch: over several the peer sums its factors otherwise."""
    rows = min(100, config.rows)
    few = case._replace(data=bc.Dataset(case.data.inputs[:rows], case.data.targets[:rows]))
    state: Any = ours(few, rows)()
    structure = bc.kronecker(bias="apart")
    value = float(structure.log_det(state.spectrum, state.prior_precision, state.variables.params))
    theirs = float(laplace_torch(backend, rows)(few, config)().log_det_posterior_precision)
    return abs(theirs / value - 1)


def measured(name: str, config: "Config", absent: dict[str, str]) -> list[dict]:
    """The sums and the posterior of one network."""
    return [line for part in config.parts for line in part_of(name, part, config, absent)]


def part_of(name: str, part: str, config: "Config", absent: dict[str, str]) -> list[dict]:
    """Our best number of rows at a time against each of theirs."""
    case = case_of(name, config)
    which = [(backend, n) for backend in BACKENDS for n in config.batches]
    makers = {f"laplace-torch, {b}, batches of {n}": laplace_torch(b, n, part) for b, n in which}
    theirs = installed(makers, absent, case, config)
    own = {f"ours, batches of {n}": ours(case, n, part) for n in config.batches}
    seconds = interleaved({**own, **theirs}, config.rounds, time.perf_counter)
    best = min(own, key=lambda form: float(np.median(seconds[form])))
    title = f"{name}, {part}, {config.rows} images, {best}"
    apart = {b: difference(case, config, b) for b in BACKENDS if any(b in peer for peer in theirs)}
    entries = [
        entry(title, peer, seconds[best], seconds[peer], difference=next(d for b, d in apart.items() if b in peer))
        for peer in theirs
    ]
    return entries + [entry(title, form, seconds[best], seconds[form]) for form in own if form != best]
