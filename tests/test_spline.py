"""The spline of the top label's gap, against scipy's splines and projections in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

import bayescal as bc
from bayescal import calibrate
from bayescal.calibrate import spline as spline_module

pytestmark = pytest.mark.core


def binary(confidence, correct):
    """Two classes, the top one of them right where `correct`."""
    probs = np.stack([confidence, 1 - confidence], -1)
    return bc.Categorical(np.log(probs)[None].astype(np.float32)), np.where(correct, 0, 1).astype(np.int32)


def test_spline_equals_scipy(rng):
    heights, t = rng.normal(size=6), np.linspace(0, 1, 201)
    curve = CubicSpline(np.linspace(0, 1, 6), heights, bc_type="natural")
    basis = spline_module._basis(jnp.float32(t), 6)
    np.testing.assert_allclose(basis @ heights, curve(t), atol=1e-5)
    np.testing.assert_allclose(spline_module._slope(jnp.float32(heights), jnp.float32(t)), curve(t, 1), atol=1e-4)


def test_spline_recovers_a_known_map():
    """Accuracy 0.9 c^2 + 0.1 for confidence c: at each c the standard error is about sqrt(7 / (4 rows)) = 0.009."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.55, 0.999, 20_000)
    pred, targets = binary(confidence, rng.uniform(size=20_000) < 0.9 * confidence**2 + 0.1)
    fitted = calibrate.fit_spline(pred, targets)
    asked = np.linspace(0.57, 0.98, 20)
    moved = np.asarray(fitted(binary(asked, asked > 0)[0]).pooled_mean())[:, 0]
    np.testing.assert_allclose(moved, 0.9 * asked**2 + 0.1, atol=0.04)


def test_spline_counts_ties_and_weights_as_repetitions():
    rng = np.random.default_rng(0)
    confidence = rng.choice([0.6, 0.7, 0.8, 0.95], 300)
    correct = rng.uniform(size=300) < confidence - 0.1
    weights = rng.permutation(np.arange(300) % 3)  # of sum 300, so that the shape is one
    rows = np.repeat(np.arange(300), weights)
    pred, targets = binary(confidence, correct)
    weighted = calibrate.fit_spline(pred, targets, weights=weights.astype(np.float32))
    order = rng.permutation(len(rows))
    repeated = calibrate.fit_spline(*binary(confidence[rows][order], correct[rows][order]))
    np.testing.assert_allclose(weighted.heights, repeated.heights, atol=1e-4)
    np.testing.assert_allclose(weighted(pred).pooled_mean(), repeated(pred).pooled_mean(), atol=1e-3)


@pytest.mark.parametrize("heavy", [0, 1e-8, 1e5])
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_spline_is_the_projection_in_float64(rows, heavy):
    """Of a fine grid of the gap on the natural splines, however few the rows, or uneven their weights."""
    rng = np.random.default_rng(rows)
    confidence, weights = rng.uniform(0.55, 0.95, rows), (np.arange(300) < rows).astype(np.float64)
    correct = rng.uniform(size=rows) < confidence
    weights[0] = heavy or 1
    confidence, correct = (
        np.resize(confidence, 300),
        np.resize(correct, 300),
    )  # more of weight 0, so that the shape is one
    pred, targets = binary(confidence, correct)
    fitted = calibrate.fit_spline(pred, targets, weights=weights.astype(np.float32))
    shares, below, gap = weights / weights.sum(), [0.0], [0.0]
    for c in np.unique(confidence):
        tied = confidence == c
        below.append(below[-1] + shares[tied].sum())
        gap.append(gap[-1] + (shares * (correct - confidence))[tied].sum())
    t = (np.arange(20_000) + 0.5) / 20_000
    basis = CubicSpline(np.linspace(0, 1, 7), np.eye(7), bc_type="natural")(t)
    best = np.linalg.lstsq(basis, np.interp(t, below, gap), rcond=None)[0]
    np.testing.assert_allclose(fitted.heights, best, atol=1e-4)
    assert np.isfinite(fitted(pred).pooled_mean()).all()


def test_spline_limits():
    certain = bc.Categorical(jnp.log(jnp.array([[[1.0, 0, 0], [0.5, 0.3, 0.2]]])))
    flat = calibrate.Spline(jnp.array([0.5, 1.0]), jnp.array([0.25, 0.75]), jnp.zeros(3), 0.1)
    np.testing.assert_allclose(flat(certain).pooled_mean(), [[0.9, 0.05, 0.05], [0.5, 0.3, 0.2]], rtol=1e-5)
