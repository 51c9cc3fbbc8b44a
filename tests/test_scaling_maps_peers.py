"""Scaling maps against scikit-learn, betacal, netcal and recorded values."""

import json
import warnings

import numpy as np
import pytest
from test_metrics import REFERENCE
from test_scaling_maps import ROWS, binary, padded, several

import bayescal as bc
from bayescal import calibrate

pytestmark = pytest.mark.core


def small():
    """Twelve rows of two classes, written out."""
    p = np.array([0.03, 0.9, 0.2, 0.55, 0.7, 0.4, 0.97, 0.12, 0.61, 0.83, 0.35, 0.5])
    targets = np.array([0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1], np.int32)
    return bc.Probabilities(np.stack([1 - p, p], -1).astype(np.float32)[None]), targets


def test_platt_is_scikit_learns():
    from sklearn.calibration import _SigmoidCalibration

    for pred, targets, scores, weights in (
        (*binary(np.random.default_rng(0)), None),
        (
            *binary(np.random.default_rng(1), slope=2, spread=1),
            np.random.default_rng(2).integers(0, 4, ROWS).astype(float),
        ),
    ):
        theirs = _SigmoidCalibration().fit(scores, targets, weights)
        fitted = calibrate.fit_platt(pred, targets, weights=None if weights is None else weights.astype(np.float32))
        np.testing.assert_allclose([fitted.slope, fitted.intercept], [-theirs.a_, -theirs.b_], rtol=2e-4)


@pytest.mark.parametrize("fit", [calibrate.fit_matrix, calibrate.fit_dirichlet])
def test_linear_maps_are_logistic_regression(fit):
    """On centred log p of 4 classes, of rank 3, and on log p; without penalty."""
    from sklearn.linear_model import LogisticRegression

    pred, targets, scores = several(np.random.default_rng(0))
    if fit is calibrate.fit_matrix:
        scores = scores - scores.mean(1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=2000).fit(scores, targets)
    np.testing.assert_allclose(fit(pred, targets)(pred).pooled_mean(), theirs.predict_proba(scores), atol=1e-5)


@pytest.mark.parametrize("parameters", ["abm", "am", "ab"])
def test_beta_is_betacals(parameters):
    """To 2e-4: betacal's own search stops at a derivative of 1e-4."""
    betacal = pytest.importorskip("betacal")
    pred, targets, scores = binary(np.random.default_rng(0))
    probs = 1 / (1 + np.exp(-scores))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = betacal.BetaCalibration(parameters).fit(probs, targets)
    fitted = calibrate.fit_beta(pred, targets, parameters=parameters)
    np.testing.assert_allclose(fitted(pred).pooled_mean()[:, 1], theirs.predict(probs), atol=2e-4)
    np.testing.assert_allclose([fitted.a, fitted.b], theirs.calibrator_.map_[:2], rtol=2e-3)


def test_netcals():
    """Its logistic calibration, which has no smoothing, and its beta calibration, both with weak priors of their own."""
    scaling = pytest.importorskip("netcal.scaling")
    pred, targets, scores = binary(np.random.default_rng(0))
    probs = 1 / (1 + np.exp(-scores))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for theirs, fitted in (
            (scaling.LogisticCalibration(), calibrate.fit_platt(pred, targets, smooth_targets=False)),
            (scaling.BetaCalibration(), calibrate.fit_beta(pred, targets)),
        ):
            expected = np.ravel(theirs.fit(probs, targets).transform(probs))
            np.testing.assert_allclose(fitted(pred).pooled_mean()[:, 1], expected, atol=2e-3)


def test_recorded_values():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    group = next(v for k, v in json.loads(path.read_text())["oracles"].items() if k.startswith("calibrators("))
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    targets = inputs["yb"][:100].astype(np.int32)
    theirs = next(v for k, v in group.items() if k.startswith("sklearn_platt"))["value"]
    pred, targets, weights = padded(bc.Bernoulli(inputs["zb"][None, :100].astype(np.float32)), targets)
    fitted = calibrate.fit_platt(pred, targets, weights=weights)
    np.testing.assert_allclose([fitted.slope, fitted.intercept], [-theirs["a"], -theirs["b"]], rtol=1e-4)
    p = inputs["pb"][:100]
    pred, _, _ = padded(bc.Probabilities(np.stack([1 - p, p], -1).astype(np.float32)[None]), targets[:100])
    for parameters in ("abm", "am", "ab"):
        theirs = group[f"betacal_{parameters}"]["value"]
        fitted = calibrate.fit_beta(pred, targets, parameters=parameters, weights=weights)
        np.testing.assert_allclose([fitted.a, fitted.b], theirs["map"][:2], rtol=5e-3)


def test_golden_numbers():
    """scikit-learn 1.9.1 `_SigmoidCalibration().fit(log(p / (1 - p)), y)`: a_, b_; betacal 1.1.0
    `BetaCalibration(parameters).fit(p, y)`: a, b, predictions of the first three rows."""
    pred, targets, weights = padded(*small())
    fitted = calibrate.fit_platt(pred, targets, weights=weights)
    np.testing.assert_allclose([-fitted.slope, -fitted.intercept], [-0.453224899162, 0.034972343574], rtol=2e-4)
    for parameters, slopes, probs in (
        ("abm", [0.7228049643, 0.6595064860], [0.07492529, 0.80899623, 0.26599102]),
        ("am", [0.6901576473, 0.6901576473], [0.0791359, 0.81173778, 0.26661768]),
        ("ab", [0.7576331929, 0.6243721616], [0.07274306, 0.81003151, 0.27137265]),
    ):
        fitted = calibrate.fit_beta(pred, targets, parameters=parameters, weights=weights)
        np.testing.assert_allclose([fitted.a, fitted.b], slopes, rtol=5e-3)
        np.testing.assert_allclose(fitted(pred).pooled_mean()[:3, 1], probs, atol=2e-4)  # its search ends at 1e-4
