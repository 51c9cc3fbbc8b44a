"""The study of people's disagreement: its stored figures on recorded networks, and its smoke run on simulated votes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import human_uncertainty as study
import numpy as np
import pytest
from conftest import REPOSITORY
from scipy.stats import norm

from bayescal.config import load_config

pytestmark = pytest.mark.core

DATA = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
SMOKE = REPOSITORY / "configs" / "human_uncertainty" / "smoke.yaml"


def test_entropy_of_votes_ties_whatever_the_class():
    votes = np.array([[47, 3, 1, 0], [0, 1, 47, 3], [51, 0, 0, 0], [1, 1, 1, 1]])
    found = study.human_entropy(votes)
    assert found[0] == found[1] and found[2] == 0
    np.testing.assert_allclose(found[3], np.log(4))
    np.testing.assert_allclose(found[0], -sum(x / 51 * np.log(x / 51) for x in (47, 3, 1)))


def test_mean_of_rows_has_the_package_s_interval(rng):
    x = rng.normal(size=50)
    found = study.mean_of_rows(x, "words")
    half = norm.ppf(0.975) * x.std(ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(found[:3], [x.mean(), x.mean() - half, x.mean() + half], rtol=1e-12)


def test_the_config_states_what_to_expect():
    """The figures in its comment are those that the test below finds."""
    words = SMOKE.with_name("cifar10h.yaml").read_text()
    for figure in ("0.3104", "0.3110", "0.2940", "0.0170", "0.4357", "0.3233", "0.3863"):
        assert figure in words


def test_recorded_networks_against_people(tmp_path):
    """Figures that another program computed in float64 from the same files."""
    needed = [DATA / name for name in ("logits_cifar10", "cifar10h", "hmc_cifar10")]
    if not all(x.is_dir() for x in needed):
        pytest.skip(f"{DATA} has no recorded networks and votes; set BAYESCAL_DATA to the folder of the shared data")
    result = study.main(study.Config(source="cifar10h"), tmp_path)
    all_rows, raw, own, pooled = result["pools"].values()
    nats = {part: all_rows["nats"][part].value for part in study.PARTS}
    assert nats == pytest.approx({"total": 0.103755, "aleatoric": 0.052451, "epistemic": 0.051305}, abs=1e-6)
    assert nats["total"] == pytest.approx(nats["aleatoric"] + nats["epistemic"], abs=1e-6)
    spearman = {part: x.value for part, x in all_rows["spearman"].items()}
    assert spearman == pytest.approx({"total": 0.3104, "aleatoric": 0.3110, "epistemic": 0.2940}, abs=5e-5)
    assert result["human_entropy"].value == pytest.approx(0.154460, abs=5e-7)
    assert {x.n for x in all_rows["spearman"].values()} == {10_000} and raw["nll"].n == pooled["nll"].n == 5_000

    stored = {  # name -> (cross-entropy to people, NLL, temperature of the first half)
        "densenet_BC_100_12": (0.6723, 0.2017, 1.9738),
        "resnet_basic_110": (0.8718, 0.3272, 2.5709),
        "vgg_15_BN_64": (0.7772, 0.3439, 2.2873),
        "wrn_28_10": (0.4678, 0.1611, 1.4092),
        "HMC, ResNet-20-FRN": (0.4318, 0.2773, None),
    }
    for name, (cross_entropy, nll, temperature) in stored.items():
        found = result["alone"][name]
        values = found["cross-entropy"].value, found["nll"].value
        assert values == pytest.approx((cross_entropy, nll), abs=6e-5), name
        assert result["temperatures"].get(name) == (temperature and pytest.approx(temperature, abs=1e-4)), name
    assert result["alone"]["HMC, ResNet-20-FRN"]["spearman"]["total"].value == pytest.approx(0.36426, abs=5e-6)
    assert all_rows["cross-entropy"].value == pytest.approx(0.4357, abs=5e-5)
    assert result["temperatures"]["pool"] == pytest.approx(1.2003, abs=1e-4)
    assert (raw["nll"].value, pooled["nll"].value) == pytest.approx((0.1162, 0.1159), abs=6e-5)

    difference = all_rows["aleatoric - epistemic"].value, own["cross-entropy"].value, pooled["cross-entropy"].value
    assert difference == pytest.approx((0.0170, 0.3233, 0.3863), abs=6e-5)

    # aleatoric uncertainty follows people more closely, by little: epistemic follows them too
    assert 0 < all_rows["aleatoric - epistemic"].low < all_rows["aleatoric - epistemic"].high < 0.03
    assert all_rows["spearman"]["epistemic"].low > 0.25
    for after in (own, pooled):  # temperatures are fitted on labels, and bring the pool nearer to people
        assert after["cross-entropy"].high < raw["cross-entropy"].value
    assert set(pooled["spearman"]) == {"total"}


def leaves(tree, path=()):
    if isinstance(tree, dict) and "value" in tree:
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))


def test_smoke_leaves_what_it_promises(tmp_path, capsys):
    result = study.main(load_config(study.Config, SMOKE), tmp_path)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert set(stored) == {"source", "human_entropy", "pools", "alone", "temperatures", "config", "versions"}
    assert "SIMULATED votes" in stored["source"] and "no person was asked" in stored["source"]
    assert len(stored["pools"]) == 4 and len(stored["alone"]) == 3 and len(stored["temperatures"]) == 4
    found = list(leaves(stored))
    assert len(found) > 25
    for path, leaf in found:
        assert leaf["low"] <= leaf["value"] <= leaf["high"] and leaf["n"] in (360, 180), path
        assert leaf["convention"], path
    pools = list(result["pools"].values())
    assert pools[1] != pools[2] and list(result["pools"])[1].startswith("last 180 images")
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("data:image/png") == 1
        and "SIMULATED" in page
        and "epochs: 3" in (tmp_path / "config.yaml").read_text()
    )
    assert "a temperature for each" in capsys.readouterr().out


def test_without_the_data_it_says_how_to_set_it(tmp_path):
    script, yaml = REPOSITORY / "experiments" / "human_uncertainty.py", SMOKE.with_name("cifar10h.yaml")
    environment = os.environ | {"BAYESCAL_DATA": str(tmp_path / "nowhere")}
    command = [sys.executable, str(script), str(yaml), f"out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "`BAYESCAL_DATA` must name the folder of the recorded predictions, got" in done.stderr
    assert "cifar10h-counts.npz" in done.stderr and "Set it, `BAYESCAL_DATA=/path/to/data python" in done.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_files_that_do_not_belong_together(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESCAL_DATA", str(tmp_path))
    for name in ("logits_cifar10", "cifar10h", "hmc_cifar10"):
        (tmp_path / name).mkdir()
    np.savez(tmp_path / "cifar10h/cifar10h-counts.npz", counts=np.ones((2, 2), int))
    np.savez(tmp_path / "hmc_cifar10/hmc_resnet20_frn_probs.npz", probs=np.full((2, 2), 0.5), labels=np.array([0, 1]))
    with pytest.raises(FileNotFoundError, match=r"without .*logits_cifar10/\*\.npz\. Set it"):
        study.cifar10h(study.Config())
    np.savez(tmp_path / "logits_cifar10/net.npz", logits=np.zeros((2, 2), np.float32), labels=np.array([1, 0]))
    with pytest.raises(ValueError, match="`labels` must be the same in all files, got others"):
        study.cifar10h(study.Config())


def test_unknown_source(tmp_path):
    with pytest.raises(
        ValueError, match=r"`source` must be one of simulated, cifar10h, got people\. Check the spelling"
    ):
        study.main(study.Config(source="people"), tmp_path)
