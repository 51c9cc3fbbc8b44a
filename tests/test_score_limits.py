"""What fits of features cost and can resolve: memory on the host, digits in float32, and where features lie."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import oracles_scores_ood as oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from rows_scores import ALL, HEAD, LABELS, TEST, TRAIN, VARIABLES, fitted, linear, wide

from bayescal.scores import features as shared
from bayescal.scores.combine import fit_members
from bayescal.scores.density import fit_gaussian_density
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.shaping import fit_react
from bayescal.scores.subspace import fit_residual, fit_vim, head_origin

pytestmark = pytest.mark.core

FITS = {
    "mahalanobis": lambda f, y, head: fit_mahalanobis(f, y),
    "relative": lambda f, y, head: fit_relative_mahalanobis(f, y),
    "density": lambda f, y, head: fit_gaussian_density(f, y),
    "neighbours": lambda f, y, head: fit_neighbours(f),
    "residual": lambda f, y, head: fit_residual(f, dim=8),
    "vim": lambda f, y, head: fit_vim(f, head, dim=8),
    "react": lambda f, y, head: fit_react(f, head),
}


@pytest.mark.parametrize("name", FITS)
def test_no_copy_in_float64(rng, monkeypatch, name):
    """Host memory in float32 features: some blocks, and a copy in float32 that a quantile needs; it was 3 to 8."""
    monkeypatch.setattr(shared, "VALUES_AT_ONCE", 2**15)
    rows, labels = rng.random((20_000, 32), np.float32), np.arange(20_000) % 4
    head = Partial(linear, [rng.random((32, 4), np.float32), np.zeros(4, np.float32)])
    FITS[name](rows, labels, head)
    tracemalloc.start()
    FITS[name](rows, labels, head)
    peak = tracemalloc.get_traced_memory()[1] / rows.nbytes
    tracemalloc.stop()
    assert peak < (1.1 if name == "react" else 0.7), peak


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("values", [1, 7 * TRAIN.shape[1], 60 * TRAIN.shape[1]])
def test_blocks_do_not_matter(monkeypatch, name, values):
    """Single rows, blocks that do not divide them and lack classes, and one block to the last row."""
    expected = fitted(name)(TEST)
    monkeypatch.setattr(shared, "VALUES_AT_ONCE", values)
    np.testing.assert_allclose(ALL[name](TRAIN, HEAD)(TEST), expected, rtol=1e-5, atol=1e-5)


def test_precisions_of_features():
    """Narrow and wide floats, and rows that are not contiguous, are what they are in float32."""
    half, wider = jnp.asarray(TRAIN, jnp.bfloat16), TRAIN.astype(np.float64)
    every_other = np.repeat(TRAIN, 2, axis=1)[:, ::2]
    for name in ("mahalanobis", "density", "neighbours", "residual", "vim", "react"):
        for rows in (half, wider, every_other, jnp.asarray(TRAIN)):
            same = np.asarray(rows, np.float32)
            np.testing.assert_allclose(
                ALL[name](rows, HEAD)(TEST), ALL[name](same, HEAD)(TEST), rtol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("width", [2, 12])
@pytest.mark.parametrize(
    ("fit", "oracle"), [(fit_mahalanobis, oracles.mahalanobis), (fit_gaussian_density, oracles.gaussian_density)]
)
def test_digits_or_refusal(rng, unchecked, fit, oracle, width):
    """Two columns apart by less and less: squared distances to 1 in 1000, or an error; never wrong without one."""
    labels, refused = np.arange(300) % 2, []
    for apart in np.geomspace(1e-1, 1e-7, 13):
        for ridge in (0.0, 1e-12, 1e-9):
            rows = rng.normal(size=(300, width))
            rows[:, 1] = rows[:, 0] + apart * rng.normal(size=300)
            test = np.concatenate([rows[:20], rng.normal(size=(5, width)), 100 * rng.normal(size=(5, width))])
            rows, test = rows.astype(np.float32), test.astype(np.float32)
            try:
                score = fit(rows, labels, ridge=ridge)
            except ValueError as error:
                assert "no spread in 1 of" in str(error) and "too little for float32" in str(error)
                refused.append(apart)
                continue
            truth = oracle(*wide(rows), labels, *wide(test), ridge)
            distance = oracles.mahalanobis(*wide(rows), labels, *wide(test), ridge)
            assert (abs(score(test) - truth) <= 1e-3 * np.maximum(distance, 1)).all(), (apart, ridge)
    assert 1e-5 < max(refused) < 1e-3  # a spread of a thousandth is no reason to refuse


def test_a_ridge_that_is_too_small_is_refused():
    double = np.concatenate([TRAIN, TRAIN[:, :1]], 1)
    with pytest.raises(
        ValueError, match=r"no spread in 1 of 7 directions within classes with ridge 1e-12, or too little"
    ):
        fit_mahalanobis(double, LABELS, ridge=1e-12)
    expected = oracles.mahalanobis(*wide(double), LABELS, *wide(double[:8]), 1e-5)
    np.testing.assert_allclose(fit_mahalanobis(double, LABELS, ridge=1e-5)(double[:8]), expected, rtol=1e-3)


def test_finite_in_float32(unchecked):
    """What overflows is refused; what underflows has no direction, and would be NaN, which counts as nearest."""
    huge, tiny = TRAIN.astype(np.float64), TRAIN.astype(np.float64)
    huge[7, 2], tiny[9] = 1e39, 1e-40
    for name in FITS:
        with pytest.raises(
            ValueError, match=r"NaN or infinity in 1 of 60 rows, first in row 7\. .* values beyond float32"
        ):
            FITS[name](huge, LABELS, HEAD)
    with pytest.raises(ValueError, match=r"got 1 rows of zeros, first row 9\. .*below 1e-38 are zeros in float32"):
        fit_neighbours(tiny, k=5)
    assert np.isfinite(fit_neighbours(tiny, k=5, normalise=False)(TEST)).all()


def test_a_large_bias_costs_no_digits():
    """A difference of logits would keep two digits of the weights beside a bias of 1e5."""
    weights, bias = np.float32(0.1 * VARIABLES[0]), np.float32([1e5, -2e5, 3e5])
    expected = -np.linalg.pinv(wide(weights)[0].T) @ bias
    np.testing.assert_allclose(head_origin(Partial(linear, [weights, bias]), TRAIN), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="`head` must be affine"):
        head_origin(lambda f: jnp.maximum(linear([weights, np.zeros(3, np.float32)], f), 0), TRAIN)
    with pytest.raises(ValueError, match="`head` must be affine"):
        head_origin(lambda f: linear([weights, bias], f) * jnp.inf, TRAIN)


@pytest.mark.parametrize("name", ALL)
def test_auto_axes_are_taken_and_explicit_ones_refused(name):
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(kind,), devices=jax.devices()[:2])
        spread = jax.device_put(TEST, NamedSharding(mesh, PartitionSpec("rows")))
        if kind is AxisType.Auto:
            np.testing.assert_allclose(fitted(name)(spread), fitted(name)(TEST), rtol=1e-4, atol=1e-4)
            continue
        with pytest.raises(
            ValueError, match=r"`features` must be spread over Auto mesh axes, got Explicit axes \('rows',"
        ):
            fitted(name)(spread)
        members = fit_members(ALL[name], TRAIN[None], Partial(linear, [x[None] for x in VARIABLES]))
        with pytest.raises(ValueError, match="`features` must be spread over Auto mesh axes"):
            members(jax.device_put(TEST[None], NamedSharding(mesh, PartitionSpec(None, "rows"))))
