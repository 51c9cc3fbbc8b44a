"""Scores and calibration of forecasts of numbers against the stored values, and what is refused."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_regression import (
    ROWS,
    of_samples,
    of_variances,
    values,
)

import bayescal as bc
from bayescal.metrics.crps import crps, crps_ensemble, energy_score, variogram_score
from bayescal.metrics.pit import (
    calibration_curve,
    miscalibration_area,
    pit,
    pit_histogram,
    quantile_calibration_error,
)
from bayescal.metrics.regression import (
    central_interval,
    coverage,
    interval_score,
    interval_width,
    mixture_quantile,
    pinball,
    quantile_score,
    squared_error,
    winkler_score,
)
from bayescal.metrics.variances import ence, uce, uncertainty_calibration_error

pytestmark = pytest.mark.core

REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"


@pytest.fixture(scope="module")
def stored():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    oracle = {k: v["value"] for g in ("regression_scores", "regression_calibration") for k, v in groups[g].items()}
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    inputs = {k: x.astype(np.float32) for k, x in inputs.items() if x.dtype.kind == "f"}
    return oracle, inputs


def doubled(x):
    """One member, and the same dimension twice, so that the shapes here are the ones above but for the members."""
    return np.stack([x, x], -1)


def test_stored_scores(stored):
    oracle, x = stored
    pred = bc.Gaussian(doubled(x["mu"])[None], doubled(x["sg"])[None] ** 2)
    ours, _ = values(pred, doubled(x["yr"]))
    samples = of_samples(x["ens"], x["yr"], x["Emv"], x["Ymv"])
    ours |= {name: float(each.mean()) for name, each in samples.items()}
    ours |= {"nll of one": ours["nll"] / 2}
    endorsed = {
        "crps": ["scoringrules_crps_normal", "properscoring_crps_gaussian", "uncertainty-toolbox_crps_gaussian"],
        "fair": ["scoringrules_crps_ensemble_fair", "scoringrules_crps_ensemble_pwm"],
        "v": [
            *(f"scoringrules_crps_ensemble_{k}" for k in ("nrg", "qd", "int")),
            "properscoring_crps_ensemble",
            "torchmetrics_crps_ensemble",
        ],
        "energy fair": ["scoringrules_energy_score_fair"],
        "energy v": ["scoringrules_energy_score_nrg"],
        "variogram": ["scoringrules_variogram_p0.5"],
        "nll of one": ["scoringrules_logs_normal", "uncertainty-toolbox_nll_gaussian"],
        "winkler": ["scoringrules_interval_score_alpha0.1", "mapie_mwi_score_alpha0.1"],
        "coverage": ["mapie_coverage_90", "netcal_PICP_q0.9"],
        "quantile": ["scoringrules_quantile_score_0.05", "sklearn_pinball_0.05"],
    }
    for name, keys in endorsed.items():
        for key in keys:
            np.testing.assert_allclose(ours[name], oracle[key], rtol=2e-6, err_msg=key)
    np.testing.assert_allclose([ours["v"], ours["fair"]], oracle["ref_crps_ensemble_[V,fair]"], rtol=2e-6)
    # scoringrules' akr and akr_circperm are other quantities: pitfall 35
    assert min(abs(ours["fair"] - oracle[f"scoringrules_crps_ensemble_{k}"]) for k in ("akr", "akr_circperm")) > 0.005
    from scipy.special import ndtri

    levels = np.linspace(0.01, 0.99, 99)
    at = lambda q: (x["mu"] + x["sg"] * ndtri(q)).astype(np.float32)
    check = [pinball(at(q), x["yr"], quantile=float(q)).mean() for q in levels]
    np.testing.assert_allclose(np.mean(check), oracle["uct_check_score_99"], rtol=2e-6)
    width = [interval_score(at((1 - p) / 2), at((1 + p) / 2), x["yr"], level=float(p)).mean() for p in levels]
    np.testing.assert_allclose(np.mean(width), oracle["uct_interval_score_99levels"], rtol=2e-6)


def test_stored_calibration(stored):
    from scipy.stats import cramervonmises, kstest

    oracle, x = stored
    pred = bc.Gaussian(doubled(x["mu"])[None], doubled(x["sg"])[None] ** 2)
    ours, _ = values(pred, doubled(x["yr"]))
    mirrored, _ = values(pred, doubled(2 * x["mu"] - x["yr"]))  # what uncertainty-toolbox calls quantile: pitfall 35
    variances = of_variances(x["sg"] ** 2, (x["mu"] - x["yr"]) ** 2, np.ones(ROWS, np.float32))
    pairs = {
        "uct_mace_interval_100": ours["mace"],
        "uct_rmsce_interval_100": ours["rmsce"],
        "uct_miscal_area_interval_100": ours["ut area"],
        "uct_mace_quantile_100": mirrored["ut quantile"],
        "uct_rmsce_quantile_100": mirrored["ut quantile rms"],
        "uct_miscal_area_quantile_100": mirrored["ut quantile area"],
        "uct_sharpness": ours["sharpness"],
        "netcal_ENCE_10(equal-width std)": variances["ence width"],
        "netcal_UCE_10(equal-width var)": variances["uce width"],
        "ref_ENCE_10_equal_mass": variances["ence mass"],
        "netcal_QCE_bins10_q0.9": ours["at 0.9"],
    }
    for key, value in pairs.items():
        np.testing.assert_allclose(value, oracle[key], rtol=2e-6, err_msg=key)
    u, expected = np.asarray(jax.jit(pit)(pred, doubled(x["yr"])), np.float64)[:, 0], oracle["ref_PIT"]
    tests = {"ks": kstest(u, "uniform").statistic, "cvm": cramervonmises(u, "uniform").statistic}
    tests |= {"mean": u.mean(), "var": u.var(), "kuleshov_sum_sq_10": 10 * ours["kuleshov"] ** 2}
    for key, value in tests.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, err_msg=key)


ONE = bc.Gaussian(np.zeros((1, 4, 2), np.float32), np.ones((1, 4, 2), np.float32))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: crps(over_dim="max"), ValueError, "`over_dim` must be 'mean' or 'sum', got 'max'"),
        (lambda: squared_error(over_dim="max"), ValueError, "`over_dim` must be 'mean' or 'sum', got 'max'"),
        (lambda: coverage(level=90), ValueError, r"`level` must lie in \(0, 1\), got 90. It is a share"),
        (lambda: winkler_score(level=1.0), ValueError, r"`level` must lie in \(0, 1\), got 1.0"),
        (lambda: interval_width(level=0.0), ValueError, r"`level` must lie in \(0, 1\), got 0.0"),
        (lambda: quantile_score(quantile=5), ValueError, r"`quantile` must lie in \(0, 1\), got 5"),
        (
            lambda: pinball(np.ones(2), np.ones(2), quantile=-0.1),
            ValueError,
            r"`quantile` must lie in \(0, 1\), got -0.1",
        ),
        (lambda: interval_score(np.ones(2), np.ones(2), np.ones(2), level=2), ValueError, "`level` must lie in"),
        (lambda: mixture_quantile(ONE, quantile=0), ValueError, "`quantile` must lie in"),
        (lambda: central_interval(ONE, level=95), ValueError, "`level` must lie in"),
        (
            lambda: crps_ensemble(np.ones((2, 3)), np.ones(2), estimator="u"),
            ValueError,
            "`estimator` must be 'fair' or 'v', got 'u'",
        ),
        (
            lambda: crps_ensemble(np.ones((2, 1)), np.ones(2)),
            ValueError,
            "`samples` must have at least 2 members .* got 1",
        ),
        (
            lambda: energy_score(np.ones((2, 0, 3)), np.ones((2, 3)), estimator="v"),
            ValueError,
            "`samples` must have at least 1 members .* got 0",
        ),
        (
            lambda: variogram_score(np.ones((2, 2, 3)), np.ones((2, 3)), p=0.0),
            ValueError,
            "`p` must be positive, got 0.0",
        ),
        (
            lambda: quantile_calibration_error(levels=()),
            ValueError,
            r"`levels` must be one or more numbers in \[0, 1\]",
        ),
        (lambda: miscalibration_area(levels=(5, 95)), ValueError, r"`levels` must be .* got \(5.0, 95.0\)"),
        (lambda: quantile_calibration_error(norm=0.5), ValueError, "`norm` must be at least 1"),
        (lambda: calibration_curve(kind="tail"), ValueError, "`kind` must be 'quantile' or 'interval', got 'tail'"),
        (lambda: pit_histogram(num_bins=0), ValueError, "`num_bins` must be a whole number of at least 1, got 0"),
        (
            lambda: uce(np.ones(3), np.ones(3), num_bins=0),
            ValueError,
            "`num_bins` must be a whole number of at least 1",
        ),
        (
            lambda: ence(np.ones(3), np.ones(3), binning="rank"),
            ValueError,
            "`binning` must be 'mass' or 'width', got 'rank'",
        ),
        (lambda: uce(np.ones(3), np.ones(4)), ValueError, "`variance`, `squared_error` and `weights` must be one axis"),
        (lambda: ence(np.ones(0), np.ones(0)), ValueError, "must be one axis of the same length with at least one row"),
        (
            lambda: uncertainty_calibration_error(dim=2).read(ONE, np.zeros((4, 2))),
            ValueError,
            r"`dim` must lie in \[0, 2\), got 2",
        ),
        (
            lambda: crps().measure(bc.Categorical(np.zeros((1, 4, 2))), np.zeros((4, 2)), jnp.ones(4)),
            TypeError,
            "`pred` must be a Gaussian, got Categorical",
        ),
        (
            lambda: squared_error().measure(bc.Categorical(np.zeros((1, 4, 2))), np.zeros((4, 2)), jnp.ones(4)),
            TypeError,
            "`pred` must be a Gaussian, got Categorical",
        ),
        (lambda: pit(ONE, np.zeros((4, 1), np.float32)), ValueError, r"`targets` must have shape \(4, 2\)"),
    ],
)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()
