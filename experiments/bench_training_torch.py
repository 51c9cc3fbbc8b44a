"""The peers of the training benchmark: the same networks, rows and schedule in PyTorch, in each mode that may be its best.

Every form trains from scratch, shuffling included, and returns the mean loss of the last epoch over all networks. PyTorch
is imported by the forms alone. CPU; a device would be one more argument of `tensors` and `network`.
"""

import importlib
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from bench_training_data import CLASSES, LEARNING_RATE, Case, Rows, rows_of

BFLOAT16 = ("baseline", "block")  # networks that are also trained under autocast


def library(name: str) -> Any:
    return importlib.import_module(name)


def network(torch, case: Case, channels_last: bool):
    """A fresh network, initialised as PyTorch does it but on the scale of flax, so that losses can be compared."""
    nn = torch.nn
    conv = partial(nn.Conv2d, padding="same")

    class Residual(nn.Module):
        """Two 3 x 3 convolutions with batch norm, and a 1 x 1 convolution beside them."""

        def __init__(self, depth, width):
            super().__init__()
            self.first, self.second = conv(depth, width, 3, bias=False), conv(width, width, 3, bias=False)
            self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
            self.beside = nn.Conv2d(depth, width, 1)

        def forward(self, x):
            inner = torch.relu(self.norms[0](self.first(x)))
            return torch.relu(self.beside(x) + self.norms[1](self.second(inner)))

    pooled = lambda *layer: [*layer, nn.MaxPool2d(2), nn.ReLU()]  # in this order, as ours: the same, on fewer pixels
    dense = lambda a, b: [nn.Linear(a, b), nn.ReLU()]
    layers = {
        "regression": lambda: [*dense(8, 50), nn.Linear(50, 2)],
        "mlp": lambda: [*dense(784, case.width), *dense(case.width, case.width), nn.Linear(case.width, CLASSES)],
        "lenet": lambda: [
            *[*pooled(conv(1, 16, 5)), *pooled(nn.Conv2d(16, 16, 5)), nn.Flatten()],
            *[*dense(400, 120), *dense(120, 84), nn.Linear(84, CLASSES)],
        ],
        "baseline": lambda: [
            *[*pooled(conv(1, 6, 5)), *pooled(conv(6, 16, 5)), conv(16, 120, 5), nn.ReLU(), nn.Flatten()],
            *[*dense(5880, 84), nn.Linear(84, CLASSES)],
        ],
        "block": lambda: [
            *[conv(3, 16, 3), nn.ReLU(), Residual(16, 32)],
            *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)],
        ],
    }
    net = nn.Sequential(*layers[case.network]())
    with torch.no_grad():
        for name, param in net.named_parameters():
            if name.endswith("bias"):
                param.zero_()
            elif param.ndim > 1:
                param.mul_(math.sqrt(3))  # uniform of variance 1 / (3 fan-in), to 1 / fan-in
    return net.to(memory_format=torch.channels_last) if channels_last else net


def loss_of(torch, case: Case) -> Callable:
    """Mean nats of a batch; the normal one written out, since PyTorch's own fails under vmap."""
    functional = torch.nn.functional
    if case.network != "regression":
        return functional.cross_entropy

    def normal(outputs, targets):
        mean, raw = outputs.chunk(2, dim=-1)
        variance = functional.softplus(raw) + 1e-12
        return (0.5 * ((targets - mean).square() / variance + variance.log() + math.log(2 * math.pi))).mean()

    return normal


def tensors(torch, case: Case, rows: Sequence[Rows], channels_last: bool) -> tuple[Any, Any]:
    """All data sets one after another; images with channels first, but for the form that has them last in memory."""
    inputs, targets = (torch.from_numpy(np.concatenate(part)) for part in zip(*rows, strict=True))
    if case.convolutional and not channels_last:
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    return inputs, targets if case.network == "regression" else targets.long()


def batches(torch, case: Case, job: int):
    """The row numbers of an epoch's batches for a network of data set `job`."""
    return (torch.randperm(case.rows) + job * case.rows).split(case.batch_size)


def one_after_another(case: Case, jobs, inputs, targets, channels_last: bool, bfloat16: bool, threads: int) -> float:
    """The plain loop: over networks, epochs and batches."""
    torch = library("torch")
    torch.set_num_threads(threads)
    criterion, total = loss_of(torch, case), torch.zeros(())
    for job in jobs:
        net = network(torch, case, channels_last)
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)
        for epoch in range(case.epochs):
            for index in batches(torch, case, job):
                x, y = inputs.index_select(0, index), targets.index_select(0, index)  # 4 x faster than inputs[index]
                x = x.permute(0, 3, 1, 2) if channels_last else x
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = criterion(net(x), y)
                loss.backward()
                optimizer.step()
                if epoch == case.epochs - 1:
                    total += loss.detach() * len(index)
    return float(total) / (case.rows * len(jobs))


def side_by_side(case: Case, jobs, inputs, targets, threads: int) -> float:
    """All networks in one call: `torch.func`, vmapped gradients, one Adam over the stacked parameters."""
    torch = library("torch")
    torch.set_num_threads(threads)
    criterion, total = loss_of(torch, case), torch.zeros(())
    nets = [network(torch, case, False) for _ in jobs]
    params, buffers = torch.func.stack_module_state(nets)
    skeleton = nets[0].to("meta")
    optimizer = torch.optim.Adam(list(params.values()), lr=LEARNING_RATE, fused=True)

    def of_one(params, buffers, x, y):
        return criterion(torch.func.functional_call(skeleton, (params, buffers), (x,)), y)

    gradients = torch.func.vmap(torch.func.grad_and_value(of_one))
    for epoch in range(case.epochs):
        for index in zip(*[batches(torch, case, job) for job in jobs], strict=True):
            x, y = (part.index_select(0, torch.cat(index)).unflatten(0, (len(nets), -1)) for part in (inputs, targets))
            found, loss = gradients(params, buffers, x, y)
            for name, param in params.items():
                param.grad = found[name]
            optimizer.step()
            if epoch == case.epochs - 1:
                total += loss.detach().mean() * len(index[0])
    return float(total) / case.rows


_kept: dict[str, Any] = {}  # of a worker process: its form and its tensors, made when it starts


def _start(case: Case, train: Callable, channels_last: bool) -> None:
    data = tensors(library("torch"), case, rows_of(case), channels_last)
    _kept["train"] = lambda jobs: train(case, jobs, *data)


def _work(jobs) -> float:
    return _kept["train"](jobs)


def looped(case: Case, closing: ExitStack, *, threads: int, channels_last=False, bfloat16=False) -> Callable:
    data = tensors(library("torch"), case, rows_of(case), channels_last)
    return lambda: one_after_another(case, case.jobs, *data, channels_last, bfloat16, threads)


def vmapped(case: Case, closing: ExitStack, *, threads: int) -> Callable:
    data = tensors(library("torch"), case, rows_of(case), False)
    return lambda: side_by_side(case, case.jobs, *data, threads)


def shared_loop(case: Case, closing: ExitStack, *, processes: int, channels_last=False, bfloat16=False) -> Callable:
    train = partial(one_after_another, channels_last=channels_last, bfloat16=bfloat16, threads=1)
    return shared_out(case, closing, train, processes, channels_last)


def shared_vmap(case: Case, closing: ExitStack, *, processes: int) -> Callable:
    return shared_out(case, closing, partial(side_by_side, threads=1), processes)


def shared_out(case: Case, closing: ExitStack, train: Callable, processes: int, channels_last=False) -> Callable:
    """Networks dealt to processes of one thread each, which start once and stay until `closing` closes."""
    library("torch")
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, _start, (case, train, channels_last)) for _ in range(processes)]
    for pool in pools:
        closing.enter_context(pool)
    hands = [case.jobs[i::processes] for i in range(processes)]

    def run():
        losses = [pool.submit(_work, hand) for pool, hand in zip(pools, hands, strict=True) if hand]
        return float(np.average([loss.result() for loss in losses], weights=[len(hand) for hand in hands if hand]))

    return run


def bagging(case: Case, closing: ExitStack, *, processes: int | None = None) -> Callable:
    """scikit-learn's networks of one output and squared loss; all rows, as many epochs, no early stop."""
    ensemble, neural, base = (
        library("sklearn.ensemble"),
        library("sklearn.neural_network"),
        library("sklearn.exceptions"),
    )
    warnings = library("warnings")
    inputs, targets = rows_of(case)[0]
    schedule = {"batch_size": case.batch_size, "max_iter": case.epochs, "tol": 0.0, "n_iter_no_change": 10**9}
    net = neural.MLPRegressor(hidden_layer_sizes=(50,), alpha=0.0, learning_rate_init=LEARNING_RATE, **schedule)
    members = ensemble.BaggingRegressor(net, case.members, bootstrap=False, n_jobs=processes)

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", base.ConvergenceWarning)
            members.fit(inputs, targets[:, 0])
        return math.nan  # another loss: not to be compared

    return run


def makers(case: Case, cores: int) -> dict[str, Callable]:
    """Name -> `(case, closing) -> form`, of every mode that fits the case."""
    threads = lambda n: f"{n} thread" + "s" * (n > 1)
    found: dict[str, Callable] = {
        f"torch loop, {threads(1)}": partial(looped, threads=1),
        f"torch loop, {threads(cores)}": partial(looped, threads=cores),
        f"torch.func vmap, {threads(1)}": partial(vmapped, threads=1),
        f"torch.func vmap, {threads(cores)}": partial(vmapped, threads=cores),
    }
    shared = cores > 1 and len(case.jobs) > 1
    if shared:
        found[f"torch {cores} processes"] = partial(shared_loop, processes=cores)
        found[f"torch.func vmap, {cores} processes"] = partial(shared_vmap, processes=cores)
    if case.convolutional:
        found[f"torch channels_last, {threads(cores)}"] = partial(looped, threads=cores, channels_last=True)
        if shared:
            found[f"torch channels_last {cores} processes"] = partial(shared_loop, processes=cores, channels_last=True)
    if case.network in BFLOAT16:
        faster = [name for name in found if "vmap" not in name and (cores == 1 or name != "torch loop, 1 thread")]
        found |= {f"{name}, bfloat16": partial(found[name], bfloat16=True) for name in faster}
    if case.network == "regression" and case.experiments is None:
        found["sklearn bagging"] = bagging
        if cores > 1:
            found[f"sklearn bagging, {cores} processes"] = partial(bagging, processes=cores)
    return found
