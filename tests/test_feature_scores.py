"""Scores of features: against float64 loops and a second library, in float32, and for rows that are not finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_scores_ood as oracles
import pytest
from jax.tree_util import Partial
from rows_scores import (
    ALL,
    HEAD,
    LABELS,
    ROWS,
    TEST,
    TRAIN,
    VARIABLES,
    WIDTH,
    fitted,
    linear,
    wide,
    wider,
)
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA

from bayescal.scores.density import fit_gaussian_density
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.subspace import fit_residual, fit_vim, head_origin

pytestmark = pytest.mark.core


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize(
    ("fit", "oracle"),
    [
        (fit_mahalanobis, oracles.mahalanobis),
        (fit_relative_mahalanobis, oracles.relative_mahalanobis),
        (fit_gaussian_density, oracles.gaussian_density),
    ],
)
def test_gaussian_scores_against_loops(strict, fit, oracle, ridge):
    expected = oracle(*wide(TRAIN), LABELS, *wide(TEST), ridge)
    np.testing.assert_allclose(fit(TRAIN, LABELS, ridge=ridge)(TEST), expected, rtol=2e-5, atol=1e-4)


def test_gaussian_scores_against_other_libraries():
    train, test = wide(TRAIN, TEST)
    one = EmpiricalCovariance().fit(train).mahalanobis(test)
    np.testing.assert_allclose(fit_mahalanobis(TRAIN, 0 * LABELS)(TEST), one, rtol=1e-5)
    normal = lambda rows: multivariate_normal(rows.mean(0), np.cov(rows.T)).pdf(test)
    mixture = sum(normal(train[k == LABELS]) / 3 for k in range(3))
    np.testing.assert_allclose(fitted("density")(TEST), -np.log(mixture), rtol=1e-5)
    np.testing.assert_allclose(fitted("ratio")(TEST), -np.log(mixture / normal(wider(train))), rtol=1e-4, atol=1e-4)


def test_gaussian_scores_by_hand():
    # classes at -3 and 3, spread 1 (0.5 over rows - 1, doubled): 5 is 2 from its mean, and 5 / sqrt(10) from that of all
    train, labels = np.array([[-4.0], [-2.0], [2.0], [4.0]], np.float32), np.array([0, 0, 1, 1])
    far = np.array([[5.0]], np.float32)
    np.testing.assert_allclose(fit_mahalanobis(train, labels)(far), [4], rtol=1e-6)
    np.testing.assert_allclose(fit_relative_mahalanobis(train, labels)(far), [4 - 25 / 10], rtol=1e-6)
    by_hand = -math.log(0.5 * sum(math.exp(-(x**2) / 4) for x in (2, 8)) / math.sqrt(4 * math.pi))
    np.testing.assert_allclose(fit_gaussian_density(train, labels)(far), [by_hand], rtol=1e-6)
    with_ridge = fit_gaussian_density(train, labels, ridge=0.25)
    np.testing.assert_allclose(with_ridge.ridges, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(fit_mahalanobis(train, labels, ridge=0.25).ridge, 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", ["mahalanobis", "relative", "ratio"])
def test_affine_maps_change_nothing(rng, name):
    matrix, shift = rng.normal(size=(WIDTH, WIDTH)), 10 * rng.normal(size=WIDTH)
    units = 10.0 ** np.arange(-3, 3)  # columns of other units make nothing singular
    mapped = [(x @ matrix + shift) * units for x in wide(TRAIN, TEST)]
    np.testing.assert_allclose(ALL[name](mapped[0], HEAD)(mapped[1]), fitted(name)(TEST), rtol=2e-3, atol=2e-3)


def test_a_density_moves_by_the_log_of_its_unit():
    moved = fit_gaussian_density(4 * TRAIN, LABELS)(4 * TEST) - fitted("density")(TEST)
    np.testing.assert_allclose(moved, np.full(len(TEST), WIDTH * math.log(4)), rtol=1e-4)


def test_a_mean_of_1000_beside_a_spread_of_a_twentieth(rng):
    train = (1000 + 0.05 * rng.normal(size=(400, 5))).astype(np.float32)
    test = (1000 + 0.1 * rng.normal(size=(20, 5))).astype(np.float32)
    labels = np.arange(400) % 4
    for fit, oracle in (
        (fit_mahalanobis, oracles.mahalanobis),
        (fit_relative_mahalanobis, oracles.relative_mahalanobis),
        (fit_gaussian_density, oracles.gaussian_density),
    ):
        score = fit(train, labels)
        expected = oracle(*wide(train), labels, *wide(test))
        np.testing.assert_allclose(score(test), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.jit(lambda x, s=score: s(x))(test), expected, rtol=1e-5, atol=1e-5)
    expected = oracles.residual(*wide(train, test), 2, wide(train)[0].mean(0))
    np.testing.assert_allclose(fit_residual(train, dim=2)(test), expected, rtol=1e-5)
    raw = oracles.kth_neighbour(train, test, 3, False)
    np.testing.assert_allclose(fit_neighbours(train, k=3, normalise=False)(test), raw, rtol=1e-5)


def test_relative_distances_do_not_cancel(rng):
    """Far out both distances are a million and their difference is of the order of one."""
    train = (rng.normal(size=(300, 8)) + 0.5 * (np.arange(300) % 2)[:, None] * np.eye(8)[0]).astype(np.float32)
    far = (np.concatenate([np.zeros((5, 1)), 300 * rng.normal(size=(5, 7))], 1)).astype(np.float32)
    expected = oracles.relative_mahalanobis(*wide(train), np.arange(300) % 2, *wide(far))
    np.testing.assert_allclose(fit_relative_mahalanobis(train, np.arange(300) % 2)(far), expected, rtol=1e-3)


def test_collapsed_classes_keep_their_digits(rng):
    """Class means 10,000 spreads apart, as neural collapse has them: |x|^2 - 2 x m + |m|^2 would be off by ten."""
    labels = np.arange(200) % 4
    train = (100 * np.eye(4)[labels] + 0.01 * rng.normal(size=(200, 4))).astype(np.float32)
    test = (train[:20] + 0.02 * rng.normal(size=(20, 4))).astype(np.float32)
    expected = oracles.mahalanobis(*wide(train), labels, *wide(test))
    np.testing.assert_allclose(fit_mahalanobis(train, labels)(test), expected, rtol=2e-5)
    expected = oracles.gaussian_density(*wide(train), labels, *wide(test))
    np.testing.assert_allclose(fit_gaussian_density(train, labels)(test), expected, rtol=2e-5)


def test_dead_units_need_a_ridge(unchecked):
    dead = np.concatenate([TRAIN, np.zeros((ROWS, 2), np.float32), TRAIN[:, :1] + TRAIN[:, 1:2]], 1)
    for fit, of in (
        (fit_mahalanobis, "within classes"),
        (fit_relative_mahalanobis, "within classes"),
        (fit_gaussian_density, "within class 0"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"`features` must spread in every direction, got no spread in 3 of 9 directions {of} with",
        ):
            fit(dead, LABELS)
        score = fit(dead, LABELS, ridge=1e-4)
        awake = dead[:1] + np.eye(9, dtype=np.float32)[6]
        if fit is not fit_relative_mahalanobis:
            assert score(awake)[0] > 100 + score(dead).max()
    with pytest.raises(ValueError, match="no spread in 9 of 9 directions within class 0"):
        fit_gaussian_density(np.ones((4, 9), np.float32), np.zeros(4, int), ridge=1e-4)
    with pytest.raises(ValueError, match="no spread in 3 of 6 directions within class 0"):
        fit_gaussian_density(TRAIN[:12], LABELS[:12])


def test_rotations_change_no_distance(rng):
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    for name in ("neighbours", "residual"):
        np.testing.assert_allclose(
            ALL[name](TRAIN @ turn, HEAD)(TEST @ turn), fitted(name)(TEST), rtol=1e-4, err_msg=name
        )
    stretched = TEST * np.geomspace(1e-20, 1e25, 8, dtype=np.float32)[:, None]  # squares over- and underflow
    np.testing.assert_allclose(fitted("neighbours")(stretched), fitted("neighbours")(TEST), rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 4])
def test_residual_against_loops_and_pca(strict, dim):
    train, test = wide(TRAIN, TEST)
    ours = fit_residual(TRAIN, dim=dim)(TEST)
    np.testing.assert_allclose(ours, oracles.residual(train, test, dim, train.mean(0)), rtol=1e-5)
    pca = PCA(dim).fit(train)
    np.testing.assert_allclose(
        ours, np.linalg.norm(test - pca.inverse_transform(pca.transform(test)), axis=1), rtol=1e-5
    )


def test_vim_against_loops(strict):
    train, test, weights, bias = wide(TRAIN, TEST, *VARIABLES)
    origin = -np.linalg.pinv(weights.T) @ bias
    np.testing.assert_allclose(head_origin(HEAD, TRAIN), origin, rtol=1e-4, atol=1e-5)
    flat, offset = weights[:, [0, 1, 0, 1]], np.array([0.3, 1.7, 2.9, -4.1])  # of rank 2: the rest is rounding
    own = head_origin(Partial(linear, [np.float32(x) for x in (flat, offset)]), TRAIN)
    np.testing.assert_allclose(own, -np.linalg.pinv(flat.T, rcond=1e-9) @ offset, rtol=1e-4, atol=1e-5)
    expected = oracles.vim(train, test, weights, bias, 2, origin)
    np.testing.assert_allclose(fitted("vim")(TEST), expected, rtol=1e-4, atol=1e-4)
    expected = oracles.vim(train, test, weights, bias, 2, train.mean(0))
    np.testing.assert_allclose(fit_vim(TRAIN, HEAD, dim=2, origin=TRAIN.mean(0))(TEST), expected, rtol=1e-4, atol=1e-4)


def test_residual_and_vim_by_hand():
    # rows along the first axis, half as much along the second: residual = |second|; logits (first, 0) and u = (0, 0)
    train = np.array([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]], np.float32)
    head = lambda f: jnp.stack([f[:, 0], 0 * f[:, 0]], 1)
    np.testing.assert_allclose(fit_residual(train, dim=1)(np.array([[7.0, -3.0]])), [3], rtol=1e-6)
    vim = fit_vim(train, head, dim=1)  # mean largest logit (2 + 2 + 0 + 0) / 4 = 1, mean residual 1
    np.testing.assert_allclose(vim.alpha, 1, rtol=1e-6)
    np.testing.assert_allclose(vim(np.array([[0.0, -3.0]])), [3 - math.log(2)], rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_pytree_that_jits(name):
    score = fitted(name)
    ours = score(TEST)
    assert ours.shape == (len(TEST),) and ours.dtype == jnp.float32 and np.isfinite(ours).all()
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(score, TEST), ours, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([score(TEST[:4]), score(TEST[4:])]), ours, rtol=1e-5, atol=1e-5)
    again = jax.tree.unflatten(jax.tree.structure(score), jax.tree.leaves(score))
    np.testing.assert_array_equal(again(TEST), ours)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_is_never_familiar(name):
    rows = TEST.copy()
    rows[1, 2], rows[4, 0], rows[6, 5] = np.nan, np.inf, -np.inf
    score = np.asarray(fitted(name)(rows))
    np.testing.assert_array_equal(np.isnan(score), np.isin(np.arange(len(TEST)), [1, 4, 6]))
    huge = np.asarray(fitted(name)(np.float32(1e30) * (1 + TEST[:2])))  # squares and logits overflow
    assert (np.isnan(huge) | (huge > -np.inf)).all()
