"""Temperatures of the stored predictions: fitted on the first half of the rows, compared on the second half."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import bayescal as bc
from bayescal.calibrate import clip_probabilities, fit_temperature
from bayescal.data.predictions import read_predictions

pytestmark = pytest.mark.core

DATA = Path(os.environ.get("BAYESCAL_DATA", "../shared/data"))
NETS = [f"logits_cifar10/{name}" for name in ("densenet_BC_100_12", "resnet_basic_110", "vgg_15_BN_64", "wrn_28_10")]
MEAN = "mean of the four nets"
BOUNDED = "probs_classical/kitti/AdaBoost"  # its stored T is the end of a search over log T in [-4, 4]

# T of the first half; ECE (15 bins) and NLL of the second half, before and after: computed in float64 without bayescal,
# probabilities below 1e-12 counted as that. See the notes of the stored predictions.
GOLDEN = {
    NETS[0]: (1.9738, 0.0256, 0.0069, 0.1896, 0.1427),
    NETS[1]: (2.5709, 0.0431, 0.0056, 0.3234, 0.1888),
    NETS[2]: (2.2873, 0.0437, 0.0065, 0.3117, 0.2087),
    NETS[3]: (1.4092, 0.0191, 0.0085, 0.1449, 0.1298),
    MEAN: (1.2003, 0.0120, 0.0151, 0.1162, 0.1159),  # the ECE rises, while the NLL falls
    "hmc_cifar10/hmc_resnet20_frn_probs": (0.7158, 0.0507, 0.0088, 0.2727, 0.2507),
    "probs_classical/kitti/1layer_NN": (1.0021, 0.0091, 0.0088, 0.1081, 0.1081),
    BOUNDED: (0.0183, 0.4269, 0.0536, 0.6633, 0.1706),
    "probs_classical/kitti/XGBoost": (0.6243, 0.0311, 0.0046, 0.1091, 0.0934),
    "probs_classical/kitti/mondrian_forest": (0.7231, 0.0373, 0.0104, 0.1590, 0.1457),
    "probs_classical/kitti/random_forest": (0.4976, 0.0630, 0.0056, 0.1540, 0.1157),
    "probs_classical/mnist/1layer_NN": (2.4044, 0.0162, 0.0061, 0.1193, 0.0746),
    "probs_classical/mnist/AdaBoost": (0.0256, 0.6092, 0.1212, 2.1543, 0.9828),
    "probs_classical/mnist/XGBoost": (0.6458, 0.0716, 0.0064, 0.2583, 0.2107),
    "probs_classical/mnist/mondrian_forest": (0.3866, 0.2159, 0.0213, 0.4809, 0.2995),
    # Multiples of 1/100 lie on edges: 0.14427 before with float64 edges, which is stored, and 0.14435 with float32 ones.
    "probs_classical/mnist/random_forest": (0.3722, 0.1443, 0.0084, 0.2526, 0.1028),
    "probs_netcal/lenet-5-cifar-10": (1.3736, 0.1193, 0.0224, 1.3905, 1.3260),
    "probs_netcal/wideresnet-16-4-cifar-10": (2.0576, 0.0552, 0.0067, 0.3737, 0.2704),
    "probs_netcal/wideresnet-16-4-cifar-100": (1.1099, 0.0583, 0.0436, 0.9439, 0.9347),
}


def stored(name):
    """Predictive of one member or, for the mean, four, and labels."""
    paths = [DATA / f"{n}.npz" for n in (NETS if name == MEAN else [name])]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    found = [read_predictions(path) for path in paths]
    if name == MEAN:
        return bc.Categorical(np.concatenate([x.pred.logits for x in found])), found[0].targets
    return found[0].pred, found[0].targets


def softmax(scores):
    e = np.exp(scores - scores.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def float64_scores(pred):
    """Log-probabilities of the pool, clipped where the file holds probabilities."""
    if isinstance(pred, bc.Categorical):
        return np.log(np.mean([softmax(z.astype(np.float64)) for z in pred.logits], 0))
    return np.log(np.maximum(pred.probs[0].astype(np.float64), 1e-12))


def float64_nll(scores, targets):
    return -np.log(softmax(scores)[np.arange(len(targets)), targets]).mean()


@pytest.fixture(scope="module", params=GOLDEN)
def case(request):
    pred, targets = stored(request.param)
    scores, half = float64_scores(pred), len(targets) // 2
    ours = pred if isinstance(pred, bc.Categorical) else clip_probabilities(pred, 1e-12)
    scaler = fit_temperature(bc.take(ours, slice(None, half)), targets[:half])
    return request.param, ours, targets, scores, half, scaler


def test_moment_condition(case):
    """mean(E_p[z] - z_y) = 0 to 1e-6, in float64."""
    _, _, targets, scores, half, scaler = case
    z = scores[:half]
    expected = (softmax(z / float(scaler.temperature)) * z).sum(1)
    assert abs((expected - z[np.arange(half), targets[:half]]).mean()) < 1e-6
    assert abs(float(scaler.gradient)) < 1e-6


def test_stored_figures(case):
    name, pred, targets, scores, half, scaler = case
    temperature, *figures = GOLDEN[name]
    rest, labels = bc.take(pred, slice(half, None)), targets[half:]
    chosen = {"ece": bc.calibration_error(), "nll": bc.nll()}
    raw, scaled = (bc.evaluate(p, labels, chosen) for p in (rest, scaler(rest)))
    found = [raw["ece"].value, scaled["ece"].value, raw["nll"].value, scaled["nll"].value]
    if name == BOUNDED:  # only what is before the temperature can be compared
        figures, found = figures[::2], found[::2]
    else:
        np.testing.assert_allclose(scaler.temperature, temperature, atol=1e-3)
    np.testing.assert_allclose(found, figures, atol=1e-4)
    if name != MEAN:
        assert scaled["ece"].value < raw["ece"].value
    else:
        assert scaled["ece"].value > raw["ece"].value + 0.002
    assert scaled["nll"].value < raw["nll"].value
    np.testing.assert_allclose(
        scaled["nll"].value, float64_nll(scores[half:] / float(scaler.temperature), labels), rtol=1e-5
    )


def test_beyond_the_bound_of_the_stored_search():
    """AdaBoost on KITTI: the optimum is below exp(-4) = 0.0183, and better than it."""
    pred, targets = stored(BOUNDED)
    scores, half = float64_scores(pred), len(targets) // 2
    loss = lambda log_temperature: float64_nll(scores[:half] / math.exp(log_temperature), targets[:half])
    best = minimize_scalar(loss, bounds=(-8, 4), method="bounded", options={"xatol": 1e-10}).x
    ours = fit_temperature(clip_probabilities(bc.take(pred, slice(None, half)), 1e-12), targets[:half])
    temperature = float(ours.temperature)
    assert temperature < math.exp(-4)
    np.testing.assert_allclose(temperature, math.exp(best), rtol=1e-3)
    at_bound, without = (float64_nll(scores[half:] / t, targets[half:]) for t in (math.exp(-4), temperature))
    assert without < at_bound and abs(at_bound - GOLDEN[BOUNDED][-1]) < 1e-4
