"""Monte-Carlo dropout: the logits of many draws, against every PyTorch form that may be its best.

A perceptron 784-200-200-10 with dropout after both hidden layers. `bc.predict` with its checks draws one mask a draw, for
all rows; PyTorch runs in inference mode with the same weights and one mask a row or a draw, what comes before the first
dropout computed once. A heat with a tenth of the draws finds the best batch, threads and workers of each kind of mask;
those run in turn with ours, over all draws. The difference is of logits without dropout, relative to the largest.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from bench import entry, installed, interleaved
from bench_prediction_torch import Form, perceptron, runs, torch_form

import bayescal as bc

if TYPE_CHECKING:
    from bench_methods import Config

MASKS = ("", "row, 16 bits", "draw", "draw, in the weights", "draw, kept units")  # as in `Form`


def measured(name: str, config: "Config", absent: dict[str, str]) -> list[dict]:
    """Ours against the best form of each kind of mask, rate after rate."""
    return [line for rate in config.rates for line in rate_of(rate, config, absent)]


def rate_of(rate: float, config: "Config", absent: dict[str, str]) -> list[dict]:
    model = bc.models.mlp(784, (200, 200), 10, dropout=rate)
    method = bc.mc_dropout(model, bc.Categorical, optax.sgd(0.1), num_draws=config.draws)
    state: Any = jax.jit(method.init)(jax.random.key(0), None)
    inputs = np.random.default_rng(0).standard_normal((config.rows, 784)).astype(np.float32)
    params = jax.tree.map(np.asarray, state.variables.params)

    def logits(key):
        pred: Any = bc.predict(method, state, inputs, key)
        return pred.logits

    def peers(forms: list[Form], draws: int) -> dict:
        network = partial(perceptron, rate=rate)
        makers = {form.name(): partial(torch_form, form, network) for form in forms}
        return installed(makers, absent, [params], inputs, draws)

    best = [heat(forms, peers(forms, max(1, config.draws // 10))) for forms in forms_of(config)]
    theirs = peers([form for form in best if form], config.draws)
    key = jax.random.key(1)
    seconds = interleaved({"ours": lambda: logits(key), **theirs}, config.rounds, time.perf_counter)
    mean = np.asarray(logits(None))
    title = f"mc_dropout, S = {config.draws}, N = {config.rows}, rate {rate:g}"

    def difference(peer):
        return float(np.abs(mean - peer(mean=True).numpy()).max() / np.abs(mean).max())

    return [
        entry(title, peer, seconds["ours"], seconds[peer], difference=difference(predict))
        for peer, predict in theirs.items()
    ]


def forms_of(config: "Config") -> list[list[Form]]:
    """Of each kind of mask every number of rows, threads and workers."""
    where = [(batch, *run) for batch in config.torch_batches for run in runs(sorted({1, config.threads}))]
    return [[Form(*at, prefix=True, masks=masks) for at in where] for masks in MASKS]


def heat(forms: list[Form], peers: dict) -> Form | None:
    """The fastest of two calls each; None without PyTorch."""
    if not peers:
        return None
    seconds = interleaved(peers, 2, time.perf_counter)
    return min(forms, key=lambda form: seconds[form.name()].min())
