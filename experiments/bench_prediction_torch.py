"""PyTorch's side of the benchmarks of prediction: its networks with our weights, and the forms that may be its best."""

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np


def library(name: str) -> Any:
    return importlib.import_module(name)


class Form(NamedTuple):
    """A way to predict with PyTorch: rows at a time (0 = all), threads, workers that share the rows, and what is reused.

    masks: of dropout. "" = one a row, as `nn.Dropout`; "row, 16 bits" = one a row, of a quarter of the random bits, which
    rounds the rate to 1 / 65536; "draw" = one for all rows of a call, as ours; "draw, in the weights" = the same,
    multiplied into the next layer's weights; "draw, kept units" = the same, products with the units that are kept alone.
    """

    batch: int = 0
    threads: int = 1
    workers: int = 1
    prefix: bool = False
    channels_last: bool = False
    masks: str = ""

    def name(self) -> str:
        words = [f"a mask a {self.masks}"] * bool(self.masks) + ["prefix reused"] * self.prefix
        words += ["channels last"] * self.channels_last
        words += [f"batches of {self.batch}"] * (self.batch > 0)
        count = f"{self.workers} workers" if self.workers > 1 else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return ", ".join(["torch", *words, count])


def runs(threads: Sequence[int]) -> list[tuple[int, int]]:
    """Threads and workers of a form: as many threads, and where there are several as many workers of one each."""
    return [(number, 1) for number in threads] + [(1, number) for number in threads if number > 1]


def perceptron(torch, params: dict, form: Form, rate: float = 0.0) -> tuple:
    """The perceptron in two parts: what comes before the first dropout, and the rest, with dropout where `rate` > 0."""
    nn = torch.nn
    first, second = params["dense"].values()
    layers = [_dense(torch, second), nn.ReLU(inplace=True), _dense(torch, params["head"])]
    if rate and form.masks == "draw, in the weights":
        layers = [_dropout(torch)["weights"](part, rate) if isinstance(part, nn.Linear) else part for part in layers]
    elif rate and form.masks == "draw, kept units":
        layers = [_dropout(torch)["kept"](layers[0], layers[2], rate)]
    elif rate:
        dropout = {"": nn.Dropout, "draw": _dropout(torch)["draw"], "row, 16 bits": _dropout(torch)["bits"]}[form.masks]
        # what comes before is reused, and so stays as it is; what follows may be written over
        layers = [dropout(rate), *layers[:2], dropout(rate, inplace=True), layers[2]]
    return nn.Sequential(_dense(torch, first), nn.ReLU(inplace=True)), nn.Sequential(*layers)


def lenet(torch, params: dict, form: Form) -> tuple:
    """LeNet-5 in two parts, convolutions and dense layers."""
    nn, layers = torch.nn, list(params["dense"].values())

    def convolution(own, padding):
        kernel = own["kernel"].transpose(3, 2, 0, 1)
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], padding=padding)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.copy()), torch.tensor(own["bias"])
        return layer

    first, second = params["conv"].values()
    kernel = layers[0]["kernel"]  # of pixels with their channels last; PyTorch's come first
    kernel = kernel.reshape(5, 5, 16, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    pooled = [nn.MaxPool2d(2), nn.ReLU()]
    body = [convolution(first, 2), *pooled, convolution(second, 0), *pooled, nn.Flatten()]
    rest = [_dense(torch, layers[0] | {"kernel": kernel}), nn.ReLU(), _dense(torch, layers[1]), nn.ReLU()]
    return nn.Sequential(*body), nn.Sequential(*rest, _dense(torch, params["head"]))


def torch_form(form: Form, network: Callable, parameters: list[dict], inputs: np.ndarray, draws: int = 1) -> Callable:
    """What predicts: the logits of each network's draws; with `mean` dropout is off.

    Args:
        form: how.
        network: (torch, params, form) -> two parts, of which the first has no dropout.
        parameters: of each network.
        inputs: rows, of images with their channels last.
        draws: of each network.
    """
    torch = library("torch")
    layout = {"memory_format": torch.channels_last} if form.channels_last else {}
    networks = [[part.to(**layout) for part in network(torch, own, form)] for own in parameters]
    rows = torch.tensor(inputs)
    rows = rows.permute(0, 3, 1, 2).contiguous(**layout) if rows.ndim == 4 else rows

    def of(rows, mean):
        outputs = []
        for before, after in networks:
            before.train(not mean)
            after.train(not mean)
            shared = before(rows) if form.prefix else None
            outputs += [after(before(rows) if shared is None else shared) for _ in range(1 if mean else draws)]
        return torch.stack(outputs)

    @torch.inference_mode()
    def share(rows, mean=False):
        torch.set_num_threads(form.threads)
        return torch.cat([of(part, mean) for part in (rows.split(form.batch) if form.batch else [rows])], 1)

    def predict(mean=False):
        if form.workers == 1:
            return share(rows, mean)
        parts = rows.chunk(form.workers)
        return torch.cat(list(pool.map(lambda part: share(part, mean), parts)), 1)

    pool = ThreadPoolExecutor(form.workers)
    return predict


def _dense(torch, own: dict):
    layer = torch.nn.Linear(*own["kernel"].shape)
    layer.weight.data, layer.bias.data = torch.tensor(own["kernel"].T.copy()), torch.tensor(own["bias"])
    return layer


@cache
def _dropout(torch) -> dict[str, type]:
    """Dropout layers that PyTorch lacks; a function, since torch may be absent."""
    nn = torch.nn

    def mask_of(units, rate):
        return torch.empty(units).bernoulli_(1 - rate) / (1 - rate)

    class DrawDropout(nn.Dropout):
        """One mask for all rows of a call."""

        def forward(self, x):
            if not self.training:
                return x
            mask = mask_of(x.shape[-1], self.p)
            return x.mul_(mask) if self.inplace else x * mask

    class BitsDropout(nn.Dropout):
        """One mask a row, of 16 random bits a unit, four of which come from one number."""

        def forward(self, x):
            if not self.training:
                return x
            bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
            mask = bits[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
            return (x.mul_(mask) if self.inplace else x * mask).mul_(1 / (1 - self.p))

    class MaskedLinear(nn.Module):
        """A dense layer whose weights take the mask of what it is given."""

        def __init__(self, layer, rate):
            super().__init__()
            self.layer, self.rate = layer, rate

        def forward(self, x):
            weight = self.layer.weight
            weight = weight * mask_of(weight.shape[1], self.rate) if self.training else weight
            return nn.functional.linear(x, weight, self.layer.bias)

    class KeptLinears(nn.Module):
        """Two dense layers and dropout before each, of which only products of kept units are computed."""

        def __init__(self, hidden, head, rate):
            super().__init__()
            self.hidden, self.head, self.rate = hidden, head, rate

        def forward(self, x):
            linear, hidden, head, scale = nn.functional.linear, self.hidden, self.head, 1 / (1 - self.rate)
            if not self.training:
                return head(hidden(x).relu_())
            first, second = ((torch.rand(own.in_features) >= self.rate).nonzero()[:, 0] for own in (hidden, head))
            weight, bias = hidden.weight[second][:, first] * scale, hidden.bias[second]
            x = linear(x.index_select(1, first), weight, bias).relu_()
            return linear(x, head.weight[:, second] * scale, head.bias)

    return {"draw": DrawDropout, "bits": BitsDropout, "weights": MaskedLinear, "kept": KeptLinears}
