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
NETCAL = ("lenet-5-cifar-10", "wideresnet-16-4-cifar-10", "wideresnet-16-4-cifar-100")
LARGEST_CAPACITY = 10  # classes with which maps of classes x classes parameters are fitted


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

    @property
    def num_classes(self) -> int:
        """Classes that it tells apart."""
        return self.fit.pred.num_classes


def stored() -> dict[str, PredictionSet]:
    """Every recorded set under BAYESCAL_DATA.

    Raises:
        FileNotFoundError: naming what is not there.
    """
    folder = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
    files = {
        "hmc resnet-20-frn": folder / "hmc_cifar10/hmc_resnet20_frn_probs.npz",
        **{f"netcal {name}": folder / f"probs_netcal/{name}.npz" for name in NETCAL},
        **{
            f"{on} {name}": folder / f"probs_classical/{on}/{name}.npz"
            for on in ("kitti", "mnist")
            for name in CLASSICAL
        },
    }
    networks = [folder / f"logits_cifar10/{name}.npz" for name in NETWORKS]
    options = folder / "llm/mmlu_option_probs.parquet"
    missing = [str(path) for path in [*networks, *files.values(), options] if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"`BAYESCAL_DATA` must name the folder of the recorded predictions, got {folder}, without {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}. Set it, or run `source=digits`."
        )
    read: dict[str, Any] = {path.stem: bc.read_predictions(path) for path in networks}
    logits = np.stack([np.asarray(x.pred.logits[0]) for x in read.values()])
    labels = next(iter(read.values())).targets.astype(np.int32)
    sets = {name: halves(bc.Categorical(own[None]), labels) for name, own in zip(read, logits, strict=True)}
    sets["mean of the 4 networks"] = halves(bc.Categorical(logits), labels)
    for name, path in files.items():
        one: Any = bc.read_predictions(path)
        sets[name] = halves(bc.calibrate.clip_probabilities(one.pred, CLIP), one.targets.astype(np.int32))
    return sets | _options(options)


def _rows(pred: Any, targets: np.ndarray) -> Rows:
    return Rows(pred, targets)


def halves(pred: bc.Categorical, targets: np.ndarray) -> PredictionSet:
    """Fit on the first half of the rows, judge on the second."""
    rows, half = Rows(pred, targets), len(targets) // 2
    return PredictionSet(rows.take(np.arange(half)), rows.take(np.arange(half, len(targets))), "first and second half")


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
        own = np.flatnonzero((model == one) & (mode == how) & (probs.sum(-1) > 0))  # a few rows name no option at all
        own = own[np.argsort(question[own], kind="stable")]
        shares = (probs[own] / probs[own].sum(-1, keepdims=True)).astype(np.float32)
        rows = Rows(bc.calibrate.clip_probabilities(bc.Probabilities(shares[None]), CLIP), answers[own])
        even = question[own] % 2 == 0
        sets[f"mmlu {one} {how}"] = PredictionSet(rows.take(even), rows.take(~even), "even and odd questions")
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
        fit, judged = (
            _rows(bc.predict(method, state, flat(part).inputs, key), part.targets)
            for part in (data.validation, data.test)
        )
        name = "mlp " + "-".join(map(str, hidden))
        alone = lambda rows: rows._replace(pred=bc.Categorical(rows.pred.logits[:1]))
        sets[name] = PredictionSet(alone(fit), alone(judged), "validation and test rows")
        sets[f"mean of {members} {name}"] = PredictionSet(fit, judged, "validation and test rows")
    return sets
