"""Recorded predictions from files: what is read, what is refused, and the figures of the stored sets."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

import bayescal as bc
from bayescal.__main__ import main
from bayescal.data.predictions import read_npz, read_predictions
from bayescal.recorded import evaluate_file

pytestmark = pytest.mark.core

DATA = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))

# accuracy, NLL, Brier (sum over classes), ECE with 15 bins: computed in float64 without bayescal, see the data's notes
GOLDEN = {
    "logits_cifar10/densenet_BC_100_12": (0.9562, 0.2017, 0.0736, 0.0254),
    "logits_cifar10/resnet_basic_110": (0.9406, 0.3272, 0.1017, 0.0413),
    "logits_cifar10/vgg_15_BN_64": (0.9318, 0.3439, 0.1154, 0.0465),
    "logits_cifar10/wrn_28_10": (0.9624, 0.1611, 0.0643, 0.0214),
    "hmc_cifar10/hmc_resnet20_frn_probs": (0.9144, 0.2773, 0.1339, 0.0522),
    "probs_classical/kitti/1layer_NN": (0.9617, 0.1229, 0.0629, 0.0059),
    "probs_classical/kitti/AdaBoost": (0.9462, 0.6672, 0.4742, 0.4325),
    "probs_classical/kitti/XGBoost": (0.9673, 0.1182, 0.0579, 0.0390),
    "probs_classical/kitti/mondrian_forest": (0.9534, 0.3930, 0.0816, 0.0489),
    "probs_classical/kitti/random_forest": (0.9636, 0.2324, 0.0764, 0.0733),
    "probs_classical/mnist/1layer_NN": (0.9761, 0.1240, 0.0396, 0.0163),
    "probs_classical/mnist/AdaBoost": (0.7306, 2.1535, 0.8696, 0.6124),
    "probs_classical/mnist/XGBoost": (0.9335, 0.2591, 0.1088, 0.0718),
    "probs_classical/mnist/mondrian_forest": (0.9154, 0.4851, 0.2132, 0.2182),
    "probs_classical/mnist/random_forest": (0.9660, 0.2539, 0.0978, 0.1430),  # stored: 0.1429, see test_the_one_...
    "probs_netcal/lenet-5-cifar-10": (0.5308, 1.3699, 0.6142, 0.1079),
    "probs_netcal/wideresnet-16-4-cifar-10": (0.9109, 0.3782, 0.1439, 0.0537),
    "probs_netcal/wideresnet-16-4-cifar-100": (0.7543, 0.9564, 0.3501, 0.0581),
}


def rows(rng, n=40, classes=3, members=None):
    shape = (n, classes) if members is None else (members, n, classes)
    logits = rng.normal(size=shape).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits, probs, rng.integers(0, classes, n)


@pytest.mark.parametrize("name", GOLDEN)
def test_stored_predictions_give_the_stored_figures(name):
    """The stored NLL counts probabilities below 1e-300 as that; at 1e-12 it differs in three sets, as float64 says too."""
    path = DATA / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    found = read_predictions(path)
    chosen = {"accuracy": bc.accuracy(), "nll": bc.nll(clip=1e-300), "brier": bc.brier(), "ece": bc.calibration_error()}
    figures = bc.evaluate(found.pred, found.targets, chosen | {"clipped": bc.nll(clip=1e-12)})
    assert tuple(float(f"{figures[m].value:.4f}") for m in chosen) == GOLDEN[name]
    probs = np.asarray(found.pred.pooled_mean(), np.float64)[np.arange(len(found.targets)), found.targets]
    np.testing.assert_allclose(figures["clipped"].value, -np.log(np.maximum(probs, 1e-12)).mean(), rtol=1e-5)
    assert "1e-12" in figures["clipped"].convention


def test_the_one_stored_figure_that_edges_in_float64_decide():
    """Multiples of 1/100 in float32: 0.6 is then above the float64 edge 9/15, and on the edge in its own precision."""
    path = DATA / "probs_classical/mnist/random_forest.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    found = read_predictions(path)
    confidence, label = found.pred.probs[0].max(1), found.pred.probs[0].argmax(1)
    gap = confidence.astype(np.float64) - (label == found.targets)
    errors = {}
    for precision in (np.float32, np.float64):
        place = np.searchsorted((np.arange(16) / 15).astype(precision), confidence.astype(precision)) - 1
        errors[precision] = abs(np.bincount(place, gap, 15)).sum() / len(gap)
    assert f"{errors[np.float64]:.4f}" == "0.1429" and f"{errors[np.float32]:.4f}" == "0.1430"
    ours = bc.evaluate(found.pred, found.targets, {"ece": bc.calibration_error()})["ece"].value
    np.testing.assert_allclose(ours, errors[np.float32], rtol=1e-6)


def test_kinds_of_arrays(rng, tmp_path):
    logits, probs, labels = rows(rng, members=2)
    cases = {
        "logits": ({"logits": logits, "labels": labels}, bc.Categorical, 2),
        "probs": ({"probs": probs[0], "targets": labels.astype(float)}, bc.Probabilities, 1),
        "mean": ({"mean": logits[0, :, 0], "variance": probs[0, :, 0], "targets": logits[0, :, 1]}, bc.Gaussian, 1),
        "members": ({"mean": logits[..., 0], "variance": probs[..., 0], "targets": logits[0, :, 1]}, bc.Gaussian, 2),
    }
    for name, (arrays, family, members) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays, other=np.zeros(3), weights=np.ones(40))
        got = read_predictions(tmp_path / f"{name}.npz")
        assert isinstance(got.pred, family) and got.pred.num_members == members and got.pred.batch_shape == (40,)
        assert got.unused == ("other",) and got.weights is not None


def test_large_arrays_are_mapped_and_compressed_ones_unpacked(rng, tmp_path, monkeypatch):
    _, probs, labels = rows(rng)
    np.savez(tmp_path / "a.npz", probs=np.asfortranarray(probs), labels=labels)
    np.savez_compressed(tmp_path / "b.npz", probs=probs, labels=labels)
    monkeypatch.setattr("bayescal.data.predictions.IN_MEMORY", 100)
    for name in ("a", "b"):
        arrays = read_npz(tmp_path / f"{name}.npz")
        assert isinstance(arrays["probs"], np.memmap)
        np.testing.assert_array_equal(arrays["probs"], probs)
        np.testing.assert_array_equal(arrays["labels"], labels)


def test_tables(rng, tmp_path):
    _, probs, labels = rows(rng)
    lines = ["label,probs_0,probs_1,probs_2,group,weight,note"]
    lines += [f"{y},{p[0]},{p[1]},{p[2]},g{i % 4},1,x" for i, (y, p) in enumerate(zip(labels, probs, strict=True))]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    got = read_predictions(tmp_path / "a.csv")
    np.testing.assert_allclose(got.pred.probs[0], probs, rtol=1e-6)
    np.testing.assert_array_equal(got.targets, labels)
    assert set(got.groups) == {"g0", "g1", "g2", "g3"} and got.unused == ("note",)


def test_parquet(rng, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    from pyarrow import parquet

    _, probs, labels = rows(rng, members=2)
    columns = {f"probs_{m}_{k}": probs[m, :, k] for m in range(2) for k in range(3)}
    parquet.write_table(pyarrow.table({"label": labels, **columns}), tmp_path / "a.parquet")
    got = read_predictions(tmp_path / "a.parquet")
    np.testing.assert_allclose(got.pred.probs, probs, rtol=1e-6)


BAD = {
    "objects": (lambda p, y: {"probs": p, "labels": y, "extra": np.array([{}], object)}, "Python objects"),
    "both": (lambda p, y: {"probs": p, "logits": p, "labels": y}, "one of `logits`, `probs` and `mean`"),
    "neither": (lambda p, y: {"p": p, "labels": y}, "one of `logits`, `probs` and `mean`"),
    "no labels": (lambda p, y: {"probs": p}, "must hold `labels` or `targets`"),
    "fractions": (lambda p, y: {"probs": p, "labels": y + 0.5}, "must be whole numbers"),
    "words": (lambda p, y: {"probs": p, "labels": y.astype(str) + np.array("a")}, "must be whole numbers"),
    "range": (lambda p, y: {"probs": p, "labels": y + 1}, "`targets` must lie in \\[0, 3\\)"),
    "rows": (lambda p, y: {"probs": p[:-1], "labels": y}, "`probs` must have shape"),
    "one column": (lambda p, y: {"probs": p[:, :1], "labels": y}, "For two classes give both columns"),
    "feature words": (
        lambda p, y: {"probs": p, "labels": y, "features": p.astype(str)},
        "`features` must hold finite numbers",
    ),
    "feature gaps": (
        lambda p, y: {"probs": p, "labels": y, "features": p + np.nan},
        "`features` must hold finite numbers",
    ),
    "group gaps": (lambda p, y: {"probs": p, "labels": y, "groups": y + np.nan}, "`groups` must hold finite numbers"),
    "complex": (lambda p, y: {"probs": p + 0j, "labels": y}, "must hold whole or floating numbers"),
    "weights of no size": (
        lambda p, y: {"probs": p, "labels": y, "weights": np.full(40, 1e-20)},
        "largest between 1e-12",
    ),
    "no rows": (lambda p, y: {"probs": p[:0], "labels": y[:0]}, "at least one row"),
    "not a number": (lambda p, y: {"probs": np.where(p > 0.5, np.nan, p), "labels": y}, "NaN"),
    "logits": (lambda p, y: {"probs": np.log(p), "labels": y}, "If these are logits, say so"),
    "sums": (lambda p, y: {"probs": p * 1.01, "labels": y}, "sum to one within 0.001"),
    "above one": (lambda p, y: {"probs": np.eye(3)[y] * 1.0001, "labels": y}, "must lie in \\[0, 1\\]"),
    "negative": (
        lambda p, y: {"probs": np.eye(3)[y] * [1, 1, 1] - 1e-4 * (1 - np.eye(3)[y]), "labels": y},
        "must lie in",
    ),
    "weights": (lambda p, y: {"probs": p, "labels": y, "weights": -np.ones(40)}, "`weights` must be"),
    "no weight": (lambda p, y: {"probs": p, "labels": y, "weights": np.zeros(40)}, "not all zero"),
    "groups": (lambda p, y: {"probs": p, "labels": y, "groups": np.zeros(3)}, "`groups` must have one entry"),
    "one group": (lambda p, y: {"probs": p, "labels": y, "groups": np.zeros(40)}, "at least two groups"),
    "variance": (lambda p, y: {"mean": p, "targets": p}, "must hold `variance` beside `mean`"),
    "zero variance": (lambda p, y: {"mean": p, "variance": 0 * p, "targets": p}, "`variance` must be positive"),
    "shapes": (lambda p, y: {"mean": p, "variance": p, "targets": p[:, :2]}, "must have the shape of `targets`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(name, rng, tmp_path, capsys):
    make, words = BAD[name]
    _, probs, labels = rows(rng)
    np.savez(tmp_path / "a.npz", **make(probs, labels))
    with pytest.raises(ValueError, match=words):
        evaluate_file(tmp_path / "a.npz")
    assert main(["evaluate", str(tmp_path / "a.npz")]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label,probs_0,probs_1\n0,0.5,0.5\n1,,0.5\n", "1 missing, first in row 1"),
        ("label,probs_0,probs_1\n0,0.5\n", "3 cells in every line, got 2 in line 2"),
        ("label,probs_0,probs_1\n0,0.5,half\n", "column `probs_1` must hold numbers"),
        ("label,probs_0,probs_2\n0,0.5,0.5\n", "count from 0 without gaps"),
        ("label,probs_0,probs_1\n", "at least one row"),
        ("label,probs_0,probs_1,probs_1\n0,0.5,0.5,0.5\n", "column `probs_1` must be there once"),
        ("label,probs_0,probs_1,probs_01\n0,0.5,0.5,0.5\n", "column `probs_01` must be there once"),
        ("label,labels,probs_0,probs_1\n0,0,0.5,0.5\n", "column `labels` must be there once"),
    ],
)
def test_bad_tables(text, words, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_predictions(tmp_path / "a.csv")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_predictions(tmp_path / "none.npz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in .npz, .csv, .parquet, got a.txt"):
        read_predictions(tmp_path / "a.txt")
    (tmp_path / "a.npz").write_text("x")
    with pytest.raises(ValueError, match="must be a sound npz file"):
        read_predictions(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("probs.npy", "not an array")
    with pytest.raises(ValueError):
        read_predictions(tmp_path / "a.npz")


def test_zero_probabilities_are_infinite_and_counted(tmp_path, capsys):
    probs = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    np.savez(tmp_path / "a.npz", probs=probs, labels=[1, 0, 1, 0])
    assert main(["evaluate", str(tmp_path / "a.npz"), "--out", str(tmp_path / "out")]) == 0
    assert "2 of 4 rows" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["metrics"]["nll"]["value"] == "inf" and found["metrics"]["nll"]["low"] is None
    clipped = evaluate_file(tmp_path / "a.npz", clip=1e-3)["metrics"]["nll"]
    np.testing.assert_allclose(clipped.value, -(2 * np.log(1e-3) + np.log(0.5)) / 4, rtol=1e-5)
    assert "0.001" in clipped.convention


def test_one_row_and_one_class(tmp_path):
    """Every figure of the smallest files is a number, or stated as undefined; nothing raises."""
    np.savez(tmp_path / "a.npz", probs=[[0.75, 0.25]], labels=[0])
    found = evaluate_file(tmp_path / "a.npz")["metrics"]
    assert found["accuracy"].value == 1 and np.isnan(found["auroc_correctness"].value)
    np.testing.assert_allclose(found["ece"].value, 0.25, rtol=1e-6)


def test_the_command_writes_figures_and_a_page(rng, tmp_path, capsys):
    logits, _, labels = rows(rng, n=200, members=3)
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels, groups=np.arange(200) // 10)
    assert main(["evaluate", str(tmp_path / "a.npz"), "--out", str(tmp_path / "out")]) == 0
    assert "classwise_ece" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["n"] == 200 and found["num_members"] == 3
    names = "accuracy nll brier ece mce ece_debiased smooth_ece classwise_ece auroc_correctness aurc augrc"
    for name in [*names.split(), "total", "aleatoric", "epistemic"]:
        figure = found["metrics"][name]
        assert set(figure) >= {"value", "low", "high", "convention"} and figure["convention"]
    parts = {name: found["metrics"][name]["value"] for name in ("total", "aleatoric", "epistemic")}
    np.testing.assert_allclose(parts["total"], parts["aleatoric"] + parts["epistemic"], rtol=1e-5)
    assert "groups" in json.dumps(found["conventions"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "closed on the right" in page and page.count("data:image/png") >= 2


def test_regression_writes_figures_and_a_page(rng, tmp_path):
    mean, noise = rng.normal(size=(2, 3, 80, 2)).astype(np.float32)
    variance = np.full_like(mean, 0.5)
    np.savez(tmp_path / "a.npz", mean=mean, variance=variance, targets=mean.mean(0) + noise[0])
    found = evaluate_file(tmp_path / "a.npz", out=tmp_path / "out")["metrics"]
    assert {"rmse", "nll", "crps", "coverage_90", "sharpness", "quantile_calibration_error", "ence"} <= set(found)
    np.testing.assert_allclose(found["rmse"].value, np.sqrt((noise[0] ** 2).mean()), rtol=1e-5)
    parts = [found[name].value for name in ("total", "aleatoric", "epistemic")]
    np.testing.assert_allclose(parts, [parts[1] + parts[2], 1.0, mean.var(0).sum(-1).mean()], rtol=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 1 and "quantile_calibration_error" in page


def test_weights_groups_and_features(rng, tmp_path):
    """Groups are listed and widen intervals where their rows repeat; features give the local calibration error."""
    _, probs, labels = rows(rng, n=60)
    repeated = {"probs": np.tile(probs, (4, 1)), "labels": np.tile(labels, 4), "weights": np.full(240, 2.0)}
    np.savez(tmp_path / "plain.npz", **repeated)
    np.savez(
        tmp_path / "groups.npz", **repeated, groups=np.tile(np.arange(60) % 20, 4), features=rng.normal(size=(240, 3))
    )
    plain, grouped = (evaluate_file(tmp_path / f"{name}.npz") for name in ("plain", "groups"))
    width = lambda found: found["metrics"]["nll"].high - found["metrics"]["nll"].low
    assert grouped["metrics"]["nll"].value == plain["metrics"]["nll"].value and width(grouped) > 1.5 * width(plain)
    assert len(grouped["groups"]) == 20 and 0 <= grouped["local_calibration"]["mean"] <= 1
    assert plain["metrics"]["ece"].low is not None and "groups" not in plain


def test_bootstrap_option(rng, tmp_path, capsys):
    _, probs, labels = rows(rng, n=60)
    np.savez(tmp_path / "a.npz", probs=probs, labels=labels)
    assert main(["evaluate", str(tmp_path / "a.npz"), "--bootstrap", "50", "--seed", "3"]) == 0
    assert "percentile" in capsys.readouterr().out
    with_seed = [
        evaluate_file(tmp_path / "a.npz", num_replicates=50, seed=seed)["metrics"]["nll"].low for seed in (3, 3, 4)
    ]
    assert with_seed[0] == with_seed[1] != with_seed[2]


def test_damaged_files_are_refused(rng, tmp_path):
    """Bytes that changed, and a header that promises more than there is: what is mapped is checked first."""
    _, probs, labels = rows(rng, n=2000)
    np.savez(tmp_path / "a.npz", probs=probs, labels=labels)
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[5000:5100] = bytes(100)
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="must be a sound npz file"):
        read_predictions(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive, archive.open("probs.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (9000, 3)})
        file.write(probs.tobytes())
    with pytest.raises(ValueError, match="holds 24000 bytes for 108000"):
        read_predictions(tmp_path / "b.npz")


def test_other_byte_orders_and_large_offsets(rng, tmp_path):
    _, probs, labels = rows(rng)
    np.savez(tmp_path / "a.npz", probs=probs.astype(">f4"), labels=labels.astype(">i8"))
    np.testing.assert_array_equal(read_predictions(tmp_path / "a.npz").pred.probs[0], probs)
    noise = rng.normal(size=(2, 500))
    for offset in (0.0, 1.7e9):  # seconds since 1970: float32 holds them to two minutes
        arrays = {"mean": offset + noise[0], "variance": np.ones(500), "targets": offset + noise.sum(0)}
        np.savez(tmp_path / "b.npz", **arrays)
        rmse = evaluate_file(tmp_path / "b.npz")["metrics"]["rmse"].value
        np.testing.assert_allclose(rmse, np.sqrt((noise[1] ** 2).mean()), rtol=1e-4)


def test_densities_have_nothing_to_clip(rng, tmp_path):
    y = rng.normal(size=50)
    np.savez(tmp_path / "a.npz", mean=y + 1, variance=np.ones(50), targets=y)
    with pytest.raises(ValueError, match="`clip` is a smallest probability"):
        evaluate_file(tmp_path / "a.npz", clip=1e-12)
    assert not {"bins", "events", "clip"} & set(evaluate_file(tmp_path / "a.npz")["conventions"])


def test_the_same_shapes_compile_once(rng, tmp_path):
    from bayescal.evaluate import _measure

    logits, _, labels = rows(rng, members=2)
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels)
    evaluate_file(tmp_path / "a.npz")
    compiled = _measure._cache_size()
    evaluate_file(tmp_path / "a.npz")
    assert _measure._cache_size() == compiled


def test_a_page_needs_matplotlib_and_says_so_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install bayescal[experiments]" in capsys.readouterr().err and not (tmp_path / "out").exists()
