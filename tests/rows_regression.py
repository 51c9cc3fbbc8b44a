"""Forecasts of numbers and the metrics of them, of one shape, so that few programs are compiled."""

import math

import jax
import numpy as np

import bayescal as bc
from bayescal.evaluate import measure
from bayescal.metrics.crps import crps, crps_ensemble, energy_score, mixture_crps, variogram_score
from bayescal.metrics.members import member_metric
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
    interval_width,
    quantile_score,
    root_mean_squared_error,
    sharpness,
    squared_error,
    winkler_score,
)
from bayescal.metrics.variances import ence, uce

MEMBERS, ROWS, DIM = 3, 200, 2  # of every array here, so that few programs are compiled
EQUAL = np.ones(MEMBERS, np.float32)
UT_LEVELS = tuple(np.linspace(0, 1, 100))
FEW = (0.05, 0.3, 0.5, 0.95)

METRICS = {
    "crps": crps(),
    "crps sum": crps(over_dim="sum"),
    "nll": bc.nll(),
    "mse": squared_error(),
    "mse sum": squared_error(over_dim="sum"),
    "rmse": root_mean_squared_error(),
    "sharpness": sharpness(),
    "coverage": coverage(level=0.9),
    "width": interval_width(level=0.9),
    "winkler": winkler_score(level=0.9),
    "quantile": quantile_score(quantile=0.05),
    "qce": quantile_calibration_error(levels=FEW),
    "qce interval": quantile_calibration_error(levels=FEW, kind="interval", norm=2),
    "qce max": quantile_calibration_error(levels=FEW, norm=math.inf),
    "area": miscalibration_area(levels=FEW),
    "mace": quantile_calibration_error(levels=UT_LEVELS, kind="interval"),
    "rmsce": quantile_calibration_error(levels=UT_LEVELS, kind="interval", norm=2),
    "ut area": miscalibration_area(levels=UT_LEVELS, kind="interval"),
    "ut quantile": quantile_calibration_error(levels=UT_LEVELS),
    "ut quantile rms": quantile_calibration_error(levels=UT_LEVELS, norm=2),
    "ut quantile area": miscalibration_area(levels=UT_LEVELS),
    "at 0.9": quantile_calibration_error(levels=(0.9,), kind="interval"),
    "kuleshov": quantile_calibration_error(levels=tuple(np.arange(1, 11) / 10), norm=2),
    "mean mse": member_metric(squared_error()),
}
SUMS = METRICS | {"pit": pit_histogram(num_bins=5), "curve": calibration_curve(levels=FEW)}


PAIRS = np.array([[0, 1, 2], [1, 0, 0.5], [0, 3, 0]], np.float32)
EMPTY = np.zeros((ROWS, 16, 3), np.float32), np.zeros((ROWS, 3), np.float32)


@jax.jit
def of_variances(variance, squared_error, weights):
    both = {"uce": uce, "ence": ence}
    return {
        f"{name} {binning}": f(variance, squared_error, weights=weights, num_bins=10, binning=binning)
        for name, f in both.items()
        for binning in ("mass", "width")
    }


@jax.jit
def of_samples(samples, y, many, seen):
    return {
        "fair": crps_ensemble(samples, y),
        "v": crps_ensemble(samples, y, estimator="v"),
        "energy fair": energy_score(many, seen),
        "energy v": energy_score(many, seen, estimator="v"),
        "variogram": variogram_score(many, seen),
        "variogram 1": variogram_score(many, seen, p=1.0, pair_weights=PAIRS),
    }


@jax.jit
def of_mixtures(pred, y):
    return {"crps": mixture_crps(pred, y), "pit": pit(pred, y), "ends": central_interval(pred, level=0.98)}


def values(pred, targets, weights=None, batch_size=2**16):
    sums = measure(pred, targets, SUMS, weights=weights, batch_size=batch_size)
    return {name: m.compute(sums[name]) for name, m in METRICS.items()}, sums


def normals(rng, member_weights=EQUAL, shape=(MEMBERS, ROWS, DIM)):
    """Forecasts whose intervals are too short and whose means are too low."""
    mean = rng.normal(size=shape).astype(np.float32)
    variance, known = (np.exp(0.8 * rng.normal(size=shape)).astype(np.float32) for _ in range(2))
    y = (mean[0] + 0.3 + 1.6 * np.sqrt(variance[0]) * rng.normal(size=shape[1:])).astype(np.float32)
    return bc.Gaussian(mean, variance, 0.3 * known, member_weights), y
