"""The prediction sets of `recalibrate.py`: recorded ones, and ensembles on the embedded digits."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import bayescal as bc

CLIP = 1e-12  # of recorded probabilities: as low as float32 files tell them from zero
NETWORKS = ("densenet_BC_100_12", "resnet_basic_110", "vgg_15_BN_64", "wrn_28_10")
CLASSICAL = ("1layer_NN", "AdaBoost", "XGBoost", "mondrian_forest", "random_forest")
CIFAR10 = "CIFAR-10 test images"
NETCAL = {
    "lenet-5-cifar-10": CIFAR10,
    "wideresnet-16-4-cifar-10": CIFAR10,
    "wideresnet-16-4-cifar-100": "CIFAR-100 test images",
}
NONE = "none"  # no calibrator


class Rows(NamedTuple):
    """Predictions and labels of some rows."""

    pred: bc.Categorical
    targets: np.ndarray

    def take(self, index) -> "Rows":
        """The rows `index`."""
        pred: Any = bc.take(self.pred, index)
        return Rows(pred, self.targets[index])


class PredictionSet(NamedTuple):
    """One network's or ensemble's predictions: what calibrators are fitted on, and other rows that judge them."""

    fit: Rows
    judged: Rows
    words: str  # how the rows were divided
    data: str  # what is predicted: sets on the same are dependent


def stored() -> dict[str, PredictionSet]:
    """Every recorded set under BAYESCAL_DATA.

    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: for networks whose labels differ.
    """
    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
    files = {
        "hmc resnet-20-frn": (folder / "hmc_cifar10/hmc_resnet20_frn_probs.npz", CIFAR10),
        **{f"netcal {name}": (folder / f"probs_netcal/{name}.npz", data) for name, data in NETCAL.items()},
        **{
            f"{on} {name}": (folder / f"probs_classical/{on}/{name}.npz", data)
            for on, data in {"kitti": "KITTI objects", "mnist": "MNIST test images"}.items()
            for name in CLASSICAL
        },
    }
    networks = [folder / f"logits_cifar10/{name}.npz" for name in NETWORKS]
    options = folder / "llm/mmlu_option_probs.parquet"
    missing = [str(x) for x in (*networks, *(path for path, _ in files.values()), options) if not x.is_file()]
    if missing:
        raise FileNotFoundError(
            f"`BAYESCAL_DATA` must name the folder of the recorded predictions, got {folder}, without {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}. Set it, or run `source=digits`."
        )
    read: dict[str, Any] = {path.stem: bc.read_predictions(path) for path in networks}
    logits = np.stack([np.asarray(x.pred.logits[0]) for x in read.values()])
    labels = next(iter(read.values())).targets.astype(np.int32)
    for name, one in read.items():
        if not np.array_equal(one.targets, labels):
            raise ValueError(
                f"The networks' files must have the same labels in the same order to be averaged, got others in {name}. "
                "Sort their rows alike."
            )
    sets = {name: halves(bc.Categorical(own[None]), labels, CIFAR10) for name, own in zip(read, logits, strict=True)}
    sets["mean of the 4 networks"] = halves(bc.Categorical(logits), labels, CIFAR10)
    for name, (path, data) in files.items():
        one: Any = bc.read_predictions(path)
        sets[name] = halves(bc.calibrate.clip_probabilities(one.pred, CLIP), one.targets.astype(np.int32), data)
    return sets | _options(options)


def halves(pred: bc.Categorical, targets: np.ndarray, data: str) -> PredictionSet:
    """Fit on the first half of the rows, judge on the second."""
    rows, half = Rows(pred, targets), len(targets) // 2
    first, second = rows.take(np.arange(half)), rows.take(np.arange(half, len(targets)))
    return PredictionSet(first, second, "first and second half", data)


def _options(path: Path) -> dict[str, PredictionSet]:
    """Probabilities that language models give the four options of MMLU's questions, made to sum to one.

    Questions stand by subject, so that halves would be other subjects: every other question is judged.
    """
    import pyarrow.parquet as parquet

    table = parquet.read_table(path).to_pydict()
    model, mode, question = (np.array(table[name]) for name in ("model", "mode", "qid"))
    probs = np.stack([np.array(table[name], float) for name in ("pa", "pb", "pc", "pd")], -1)
    answers, sets = np.array(table["answer"], np.int32), {}
    for one, how in sorted(set(zip(model.tolist(), mode.tolist(), strict=True))):
        asked = (model == one) & (mode == how)
        own = np.flatnonzero(asked & (probs.sum(-1) > 0))
        shares = (probs[own] / probs[own].sum(-1, keepdims=True)).astype(np.float32)
        rows = Rows(bc.calibrate.clip_probabilities(bc.Probabilities(shares[None]), CLIP), answers[own])
        even = question[own] % 2 == 0
        words = f"even and odd questions; {int(asked.sum()) - len(own)} without a probability of any option left out"
        sets[f"mmlu {one} {how}"] = PredictionSet(rows.take(even), rows.take(~even), words, "MMLU questions")
    return sets


def digits(seed: int, members: int = 4, epochs: int = 30) -> dict[str, PredictionSet]:
    """Networks on scikit-learn's digits, alone and together, trained on a fifth of the training rows so that they err.

    Fit on the validation rows, judge on the test rows.
    """
    data, key = bc.data.digits(seed, known=range(10), unseen=()), jax.random.key(seed)
    few = bc.Dataset(*(x[::5] for x in data.train[:2]))
    sets = {}
    for hidden in ((32,), (128, 128)):
        model = bc.models.mlp(64, hidden, 10)
        method = bc.ensemble(bc.map_estimate(model, bc.Categorical, optax.adam(1e-2)), members)
        flat = lambda part: part._replace(inputs=part.inputs.reshape(len(part.targets), -1))
        state = bc.fit(method, flat(few), key, epochs=epochs, batch_size=32).state
        pool: Any = [bc.predict(method, state, flat(part).inputs, key) for part in (data.validation, data.test)]
        name = "mlp " + "-".join(map(str, hidden))
        for whose, preds in (name, [bc.Categorical(p.logits[:1]) for p in pool]), (f"mean of {members} {name}", pool):
            fit, judged = (Rows(p, part.targets) for p, part in zip(preds, (data.validation, data.test), strict=True))
            sets[whose] = PredictionSet(fit, judged, "validation and test rows", "digits")
    return sets
