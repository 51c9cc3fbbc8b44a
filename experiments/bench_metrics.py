"""How long the metrics take against other libraries: the same inputs, in turn, in one process.

    python experiments/bench_metrics.py configs/bench_metrics/cpu.yaml [key=value ...]

CPU seconds of all threads. Each library gets arrays of its own kind, made before the clock starts: jax, torch or numpy.
Ours checks every value of the predictions, but for the cases named "unchecked". A peer that is not installed is named in
`absent.json`, with the reason; `pip install bayescal[bench]` and `torch-uncertainty` are all of them.
"""

import importlib
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench import entry, interleaved, publish

import bayescal as bc
from bayescal.compare import bootstrap_intervals
from bayescal.config import command_line
from bayescal.evaluate import measure
from bayescal.metrics.calibration import calibration_error, squared_calibration_error
from bayescal.metrics.classwise import classwise_calibration_error
from bayescal.metrics.crps import crps_ensemble, crps_gaussian
from bayescal.metrics.ranking import auroc
from bayescal.metrics.selective import augrc, aurc
from bayescal.metrics.smooth import smooth_calibration_error
from bayescal.metrics.whole import whole
from bayescal.predictive import Probabilities

PEERS = (
    "torchmetrics",
    "torch-uncertainty",
    "netcal",
    "relplot",
    "scikit-learn",
    "scoringrules",
    "torch",
    "probmetrics",
)


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    cases: tuple[str, ...] = ()  # none = all
    rows: tuple[int, ...] = (100_000, 1_000_000)
    classes: int = 10
    ensemble: int = 20  # samples of the ensemble CRPS
    replicates: int = 1000  # of the bootstrap, at the least of `rows`
    rounds: int = 7
    process: bool = True  # also the first call of a fresh process
    out: str | None = None


class Inputs(NamedTuple):
    """Softmax of 2 x normal logits, labels drawn at temperature 1.7, and a forecast of numbers, all from seed 0."""

    probs: np.ndarray  # float32 (rows, classes)
    labels: np.ndarray  # int32 (rows,)
    confidence: np.ndarray  # float32 (rows,)
    correct: np.ndarray  # bool (rows,)
    mean: np.ndarray  # float32 (rows,)
    std: np.ndarray
    seen: np.ndarray
    samples: np.ndarray  # float32 (rows, ensemble)

    @property
    def pred(self) -> Probabilities:
        return Probabilities(jnp.asarray(self.probs)[None])


@cache
def inputs(rows: int, classes: int, ensemble: int) -> Inputs:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((rows, classes))
    probs = np.asarray(jax.nn.softmax(logits.astype(np.float32), -1))
    labels = (logits / 1.7 + rng.gumbel(size=logits.shape)).argmax(1).astype(np.int32)
    mean, seen = rng.standard_normal((2, rows)).astype(np.float32)
    std = rng.uniform(0.5, 2, rows).astype(np.float32)
    samples = rng.standard_normal((rows, ensemble), np.float32) * std[:, None] + mean[:, None]
    return Inputs(probs, labels, probs.max(1), probs.argmax(1) == labels, mean, std, seen, samples)


# Each form: inputs -> function without arguments. Those of peers import their library, and so say what is missing.


def library(name: str) -> Any:
    return importlib.import_module(name)


def streaming(metric) -> Callable[[Inputs], Callable]:
    """Our value of one streaming metric, from probabilities that are checked."""

    def make(x):
        pred = x.pred
        return lambda: metric.compute(measure(pred, x.labels, {"it": metric})["it"])

    return make


def unchecked(metric) -> Callable[[Inputs], Callable]:
    """The same as one compiled function, which checks no values."""

    def make(x):
        pred, labels, weights = x.pred, jnp.asarray(x.labels), jnp.ones(len(x.labels))
        compiled = jax.jit(lambda pred, labels: metric.compute(metric.measure(pred, labels, weights)))
        return lambda: compiled(pred, labels)

    return make


def torchmetrics_ece(x, validate_args: bool = True):
    torch, functional = library("torch"), library("torchmetrics.functional.classification")
    probs, labels = torch.from_numpy(x.probs.copy()), torch.from_numpy(x.labels).long()
    classes = x.probs.shape[1]
    return lambda: functional.multiclass_calibration_error(probs, labels, classes, 15, validate_args=validate_args)


def torchmetrics_ece_unchecked(x):
    return torchmetrics_ece(x, validate_args=False)


def netcal_ece(x):
    netcal = library("netcal.metrics")
    return lambda: netcal.ECE(15).measure(x.probs, x.labels)


def our_ranking(x):
    return lambda: np.array([auroc(x.confidence, x.correct), aurc(x.confidence, x.correct)])


def torch_ranking(x):
    """AUROC of torchmetrics and AURC of torch-uncertainty, whose step of finding the top label is left out."""
    torch, functional = library("torch"), library("torchmetrics.functional.classification")
    uncertainty = library("torch_uncertainty.metrics.classification")
    warnings.filterwarnings("ignore", message="The ``compute`` method of metric AURC")  # its columns are set below
    confidence, correct = torch.from_numpy(x.confidence), torch.from_numpy(x.correct).long()
    wrong = 1.0 - correct

    def both():
        risk = uncertainty.AURC()
        risk.scores, risk.errors = [confidence], [wrong]
        return np.array([float(functional.binary_auroc(confidence, correct)), float(risk.compute())])

    return both


def torchmetrics_auroc(x):
    torch, functional = library("torch"), library("torchmetrics.functional.classification")
    confidence, correct = torch.from_numpy(x.confidence), torch.from_numpy(x.correct).long()
    return lambda: functional.binary_auroc(confidence, correct)


def relplot_smooth(x):
    relplot = library("relplot")
    return lambda: relplot.smECE(x.confidence, x.correct)


def sklearn_brier(x):
    sklearn = library("sklearn.metrics")
    return lambda: sklearn.brier_score_loss(x.labels, x.probs, labels=np.arange(x.probs.shape[1]), scale_by_half=False)


def sklearn_log_loss(x):
    sklearn = library("sklearn.metrics")
    return lambda: sklearn.log_loss(x.labels, x.probs, labels=np.arange(x.probs.shape[1]))


def our_one_vs_rest(x):
    return lambda: np.array([auroc(x.probs[:, k], x.labels == k) for k in range(x.probs.shape[1])])


def sklearn_one_vs_rest(x):
    sklearn = library("sklearn.metrics")
    return lambda: sklearn.roc_auc_score(x.labels, x.probs, multi_class="ovr", average=None)


def our_temperature(x):
    pred = x.pred
    return lambda: bc.fit_temperature(pred, x.labels).temperature


def sklearn_temperature(x):
    """Its own search, on logits: of probabilities it takes the logarithm of p + eps."""
    scaling, logits = library("sklearn.calibration")._TemperatureScaling, np.log(x.probs)
    return lambda: 1 / scaling().fit(logits, x.labels).beta_


def probmetrics_temperature(x):
    """Given logits; its temperature is read off the first row, of which it scales the log-probabilities."""
    torch, calibrators = library("torch"), library("probmetrics.calibrators")
    distributions = library("probmetrics.distributions")
    logits, labels = torch.log(torch.from_numpy(x.probs.copy())), torch.from_numpy(x.labels).long()
    first = np.log(x.probs[0].astype(np.float64))

    def fit():
        calibrator = calibrators.get_calibrator("temp-scaling")
        calibrator.fit_torch(distributions.CategoricalLogits(logits), labels)
        after = calibrator.predict_proba_torch(distributions.CategoricalLogits(logits[:1])).get_probs()[0].numpy()
        return (first[0] - first[1]) / (np.log(np.float64(after[0])) - np.log(np.float64(after[1])))

    return fit


def our_crps_gaussian(x):
    columns = [jnp.asarray(c) for c in (x.mean, x.std, x.seen)]
    compiled = jax.jit(crps_gaussian)
    return lambda: compiled(*columns)


def scoringrules_gaussian(x):
    scoringrules = library("scoringrules")
    return lambda: scoringrules.crps_normal(x.seen, x.mean, x.std)


def our_crps_ensemble(estimator):
    def make(x):
        return lambda: crps_ensemble(x.samples, x.seen, estimator=estimator)

    return make


def scoringrules_ensemble(estimator):
    def make(x):
        scoringrules = library("scoringrules")
        return lambda: scoringrules.crps_ensemble(x.seen, x.samples, estimator=estimator)

    return make


def standard_metrics() -> dict[str, Any]:
    """What one call of `evaluate` is asked for."""
    return {
        "accuracy": bc.accuracy(),
        "nll": bc.nll(),
        "brier": bc.brier(),
        "ece": calibration_error(),
        "mce": calibration_error(norm=float("inf")),
        "ece_debiased": calibration_error(debiased=True),
        "squared_ece": squared_calibration_error(),
        "smooth_ece": smooth_calibration_error(),
        "classwise_ece": classwise_calibration_error(),
        "auroc_correctness": whole(auroc),
        "aurc": whole(aurc),
        "augrc": whole(augrc),
    }


def our_evaluate(x):
    pred, metrics = x.pred, standard_metrics()
    return lambda: [e.value for e in bc.evaluate(pred, x.labels, metrics).values()]


ECE = calibration_error(num_bins=15, closed="left")  # as torchmetrics and netcal close bins
CASES: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "ECE": (streaming(ECE), {"torchmetrics": torchmetrics_ece, "netcal": netcal_ece}),
    "ECE unchecked": (unchecked(ECE), {"torchmetrics": torchmetrics_ece_unchecked, "netcal": netcal_ece}),
    "AUROC": (lambda x: lambda: auroc(x.confidence, x.correct), {"torchmetrics": torchmetrics_auroc}),
    "AUROC and AURC": (our_ranking, {"torchmetrics + torch-uncertainty": torch_ranking}),
    "smooth ECE": (streaming(smooth_calibration_error()), {"relplot": relplot_smooth}),
    "Brier": (streaming(bc.brier()), {"sklearn": sklearn_brier}),
    "log loss": (streaming(bc.nll()), {"sklearn": sklearn_log_loss}),
    "AUROC one-vs-rest": (our_one_vs_rest, {"sklearn": sklearn_one_vs_rest}),
    "temperature": (our_temperature, {"sklearn": sklearn_temperature, "probmetrics": probmetrics_temperature}),
    "CRPS normal": (our_crps_gaussian, {"scoringrules": scoringrules_gaussian}),
    "CRPS ensemble fair": (our_crps_ensemble("fair"), {"scoringrules": scoringrules_ensemble("pwm")}),
    "CRPS ensemble": (our_crps_ensemble("v"), {"scoringrules": scoringrules_ensemble("qd")}),
}
ALONE = {"evaluate": ("budget of 1 s", 1.0), "bootstrap": ("budget of 10 s", 10.0)}  # measured against a budget


def against_peers(config: Config, case: str, rows: int, absent: dict[str, str]) -> list[dict]:
    """Ours and every peer that is installed, in turn."""
    x = inputs(rows, config.classes, config.ensemble)
    make, makers = CASES[case]
    forms = {"ours": make(x)}
    for peer, make_peer in makers.items():
        try:
            forms[peer] = make_peer(x)
        except ImportError as error:
            absent[peer] = str(error)
    if len(forms) == 1:
        return []
    seconds = interleaved(forms, config.rounds)
    value = np.asarray(forms["ours"](), np.float64)
    entries = []
    for peer in list(forms)[1:]:
        difference = float(np.max(abs(np.asarray(forms[peer](), np.float64) - value) / np.maximum(abs(value), 1e-3)))
        name = f"{case}, N = {rows}"
        entries.append(entry(name, peer, seconds["ours"], seconds[peer], difference=difference))
    return entries


def alone(config: Config, case: str, rows: int) -> list[dict]:
    """Ours against a budget in seconds."""
    x = inputs(rows, config.classes, 1)
    if case == "evaluate":
        form, rounds = our_evaluate(x), config.rounds
    else:
        pred, metrics = x.pred, {"accuracy": bc.accuracy(), "nll": bc.nll(), "brier": bc.brier()}
        key, rounds = jax.random.key(0), min(config.rounds, 3)
        form = lambda: [
            e.value
            for e in bootstrap_intervals(pred, x.labels, metrics, key, num_replicates=config.replicates).values()
        ]
    seconds = interleaved({"ours": form}, rounds)["ours"]
    peer, budget = ALONE[case]
    size = f", {config.replicates} replicates" if case == "bootstrap" else f" of {len(standard_metrics())} metrics"
    return [entry(f"{case}{size}, N = {rows}", peer, seconds, np.full(rounds, budget))]


def first_call(rows: int, classes: int) -> tuple[float, float]:
    """CPU seconds of the first call of `evaluate` in this process, compilation and all, and of the second."""
    form, seconds = our_evaluate(inputs(rows, classes, 1)), []
    for _ in range(2):
        start = time.process_time()
        form()
        seconds.append(time.process_time() - start)
    return seconds[0], seconds[1]


def in_fresh_process(config: Config, rows: int) -> list[dict]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        first, second = pool.apply(first_call, (rows, config.classes))
    return [entry(f"evaluate, first call, N = {rows}", "its second call", [first], [second], phase="process")]


def main(config: Config, folder: Path) -> list[dict]:
    """Measures every case on every number of rows, and writes what it found."""
    wrong = [case for case in config.cases if case not in {**CASES, **ALONE}]
    if wrong:
        raise ValueError(f"`cases` must be some of {', '.join([*CASES, *ALONE])}, got {wrong[0]}. Check the spelling.")
    cases, absent, entries = config.cases or (*CASES, *ALONE), {}, []
    for rows in config.rows:
        for case in cases:
            if case in CASES:
                entries += against_peers(config, case, rows, absent)
            elif case == "evaluate" or rows == min(config.rows):
                entries += alone(config, case, rows)
    if config.process and "evaluate" in cases:
        entries += in_fresh_process(config, max(config.rows))
    about = (
        f"CPU seconds of all threads, medians of {config.rounds} rounds in turn; {config.classes} classes, float32. "
        "Ratios are peer / ours of the same round, median [range]: above 1 = ours is faster. The difference is the largest "
        "relative one of the two results; smooth ECE of relplot is on a grid, AURC of torch-uncertainty a trapezium rule."
    )
    return publish(entries, folder, title="Metrics against other libraries", about=about, peers=PEERS, absent=absent)


if __name__ == "__main__":
    bc.keep_programs()  # in this process alone: the fresh one compiles, as a first call does
    main(*command_line(Config, sys.argv))
