"""Scores of features: against float64 loops and a second library, what they are blind to, and what they refuse."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracles_scores_ood as oracles
import pytest
from jax.tree_util import Partial
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import make_moons
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier

from bayescal.scores.combine import fit_combination, fit_members
from bayescal.scores.density import density_ratio, fit_gaussian_density
from bayescal.scores.gradient import grad_norm
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.shaping import ash_b, ash_p, ash_s, fit_react, scale
from bayescal.scores.subspace import fit_residual, fit_vim, head_origin

pytestmark = pytest.mark.core

ROWS, WIDTH, CLASSES = 60, 6, 3


def linear(variables, features):
    weights, bias = variables
    return features @ weights + bias[None]


def data(seed=0, members=()):
    """Training features (correlated, >= 0), labels, test features, and a head; float32."""
    rng = np.random.default_rng(seed)
    labels = np.arange(ROWS) % CLASSES
    mix = rng.normal(size=(*members, WIDTH, WIDTH))
    means = 2 * rng.normal(size=(*members, CLASSES, WIDTH))
    draw = lambda n, y: (rng.normal(size=(*members, n, WIDTH)) + means[..., y, :]) @ mix
    train, test = draw(ROWS, labels), draw(8, np.arange(8) % CLASSES)
    variables = rng.normal(size=(*members, WIDTH, CLASSES)), rng.normal(size=(*members, CLASSES)) + 3
    return *(np.asarray(abs(x), np.float32) for x in (train, test)), labels, [np.float32(x) for x in variables]


TRAIN, TEST, LABELS, VARIABLES = data()
HEAD = Partial(linear, VARIABLES)
SHAPES = {"p": ash_p, "b": ash_b, "s": ash_s, "scale": scale}
ALL = {
    "mahalanobis": lambda f, head: fit_mahalanobis(f, LABELS),
    "relative": lambda f, head: fit_relative_mahalanobis(f, LABELS),
    "density": lambda f, head: fit_gaussian_density(f, LABELS),
    "ratio": lambda f, head: density_ratio(fit_gaussian_density(f, LABELS), fit_gaussian_density(f, 0 * LABELS)),
    "neighbours": lambda f, head: fit_neighbours(f, k=5, chunk=16),
    "residual": lambda f, head: fit_residual(f, dim=2),
    "vim": lambda f, head: fit_vim(f, head, dim=2),
    "react": lambda f, head: fit_react(f, head),
    "gradient": lambda f, head: grad_norm(head),
    **{f"ash {kind}": lambda f, head, build=build: build(head, quantile=0.5) for kind, build in SHAPES.items()},
}


@cache
def fitted(name):
    return ALL[name](TRAIN, HEAD)


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


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
    np.testing.assert_allclose(fitted("ratio")(TEST), -np.log(mixture / normal(train)), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("normalise", [True, False])
def test_neighbours_against_loops_and_scikit_learn(strict, normalise):
    for k in (1, 5):
        ours = fit_neighbours(TRAIN, k=k, normalise=normalise)(TEST)
        np.testing.assert_allclose(ours, oracles.kth_neighbour(TRAIN, TEST, k, normalise), rtol=1e-5)
    bank, rows = (x / np.linalg.norm(x, axis=1, keepdims=True) if normalise else x for x in wide(TRAIN, TEST))
    theirs = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(bank).kneighbors(rows)[0][:, -1]
    np.testing.assert_allclose(fit_neighbours(TRAIN, k=5, normalise=normalise)(TEST), theirs, rtol=1e-5)


def test_neighbours_by_hand():
    bank, rows = np.array([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]), np.array([[5.0, 0.0]])
    for k, distance in ((1, 0), (2, math.sqrt(2)), (3, 2)):
        np.testing.assert_allclose(fit_neighbours(bank, k=k)(rows), [distance], rtol=1e-6)
    np.testing.assert_allclose(fit_neighbours(bank, k=2, normalise=False)(rows), [math.sqrt(29)], rtol=1e-6)


@pytest.mark.parametrize(("chunk", "k"), [(1, 3), (7, 10), (59, 3), (60, 60), (1000, 3)])
def test_chunks_do_not_matter(chunk, k):
    """Also fewer rows in a chunk than neighbours, and a last chunk that overlaps the one before."""
    ours = fit_neighbours(TRAIN, k=k, chunk=chunk)(TEST)
    np.testing.assert_allclose(ours, oracles.kth_neighbour(TRAIN, TEST, k, True), rtol=1e-5)


def test_near_duplicates(rng):
    """Angles near 1e-4, where 2 - 2 cos in float32 is off by more than the distance itself."""
    bank = rng.normal(size=(1, 40)) + 1e-4 * rng.normal(size=(50, 40))
    bank, rows = bank[:40].astype(np.float32), bank[40:].astype(np.float32)
    truth = oracles.kth_neighbour(bank, rows, 5, True)
    assert truth.max() < 3e-4
    np.testing.assert_allclose(fit_neighbours(bank, k=5)(rows), truth, atol=3e-7)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, rows)]
    product = np.sqrt(np.maximum(np.sort(2 - 2 * unit[1] @ unit[0].T, axis=1)[:, 4], 0))
    assert abs(product - truth).max() > 5e-5
    np.testing.assert_allclose(fit_neighbours(bank, k=1)(bank), np.zeros(40), atol=3e-7)


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


def test_react_against_a_loop(strict):
    for quantile in (0.5, 0.9):
        clipped = np.minimum(*wide(TEST, np.percentile(TRAIN.astype(np.float64), 100 * quantile)))
        expected = oracles.energy(clipped @ wide(VARIABLES[0])[0] + VARIABLES[1])
        np.testing.assert_allclose(fit_react(TRAIN, HEAD, quantile=quantile)(TEST), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.8])
def test_shaped_energies_against_loops(strict, kind, quantile):
    rows = np.where(np.median(TEST) > TEST, 0, TEST)  # ties at zero, as rectified features have
    expected = oracles.energy(oracles.shaped(rows, quantile, kind) @ wide(VARIABLES[0])[0] + VARIABLES[1])
    np.testing.assert_allclose(SHAPES[kind](HEAD, quantile=quantile)(rows), expected, rtol=2e-5, atol=1e-4)


def test_shaping_by_hand():
    row = np.array([[1.0, 3.0, 0.0, 2.0]], np.float32)  # half kept: 3 and 2, of a sum of 6
    head = lambda f: jnp.stack([f.sum(-1), jnp.full(len(f), -1e4)], 1)  # energy = -sum
    expected = {"p": -5, "b": -6, "s": -5 * math.exp(6 / 5), "scale": -6 * math.exp(6 / 5)}
    for kind, value in expected.items():
        np.testing.assert_allclose(SHAPES[kind](head, quantile=0.5)(row), [value], rtol=1e-6, err_msg=kind)


def test_shaping_invariances(rng):
    order = rng.permutation(WIDTH)
    turned = Partial(linear, [VARIABLES[0][order], VARIABLES[1]])
    for kind, build in SHAPES.items():
        ours = build(HEAD, quantile=0.5)(TEST)
        np.testing.assert_allclose(build(turned, quantile=0.5)(TEST[:, order]), ours, rtol=1e-5, err_msg=kind)
        # shapes are homogeneous: activations three times as large are those of a head three times as steep
        steep = Partial(linear, [3 * VARIABLES[0], VARIABLES[1]])
        np.testing.assert_allclose(
            build(HEAD, quantile=0.5)(3 * TEST), build(steep, quantile=0.5)(TEST), rtol=1e-5, err_msg=kind
        )
    plain = oracles.energy(TEST @ VARIABLES[0] + VARIABLES[1])
    np.testing.assert_allclose(ash_p(HEAD, quantile=0.0)(TEST), plain, rtol=1e-5)
    np.testing.assert_allclose(fit_react(np.maximum(TRAIN, TEST.max()), HEAD, quantile=1.0)(TEST), plain, rtol=1e-5)


def test_shift_of_all_logits():
    shifted = Partial(linear, [VARIABLES[0], VARIABLES[1] + 7])
    for name in ("react", *(f"ash {kind}" for kind in SHAPES)):
        moved = ALL[name](TRAIN, shifted)(TEST) - fitted(name)(TEST)
        np.testing.assert_allclose(moved, np.full(len(TEST), -7), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(grad_norm(shifted)(TEST), fitted("gradient")(TEST), rtol=1e-4)


def test_gradient_norm_against_loops_and_autodiff(strict):
    np.testing.assert_allclose(
        fitted("gradient")(TEST), oracles.gradient_norm(TEST, *wide(*VARIABLES)), rtol=1e-5, atol=1e-5
    )
    weights, bias = VARIABLES

    def divergence(w, row):
        return -jax.nn.log_softmax(row @ w + bias).mean() - math.log(CLASSES)

    gradient = jax.vmap(jax.grad(divergence), (None, 0))(weights, TEST)
    np.testing.assert_allclose(fitted("gradient")(TEST), -abs(gradient).sum((1, 2)), rtol=1e-4, atol=1e-5)


def test_combination_against_a_loop(rng, strict):
    validation, scores = rng.normal(size=(3, 50)) * [[1], [100], [0.01]] + [[0], [1e3], [5]], rng.normal(size=(3, 8))
    for weights in (None, [1.0, 0.5, 0.0]):
        fit = fit_combination(validation, weights=None if weights is None else np.array(weights))
        expected = oracles.combination(validation, scores, weights or [1, 1, 1])
        np.testing.assert_allclose(fit(scores.astype(np.float32)), expected, rtol=1e-4)
    units = np.array([[2.0], [0.1], [30.0]])
    moved = fit_combination(validation * units - 4)((scores * units - 4).astype(np.float32))
    np.testing.assert_allclose(moved, fit_combination(validation)(scores.astype(np.float32)), rtol=1e-3)
    hole = np.where(np.arange(8) == 2, np.nan, scores).astype(np.float32)
    of_none = fit_combination(validation, weights=np.array([1.0, 0, 0]))(np.stack([scores[0], *hole[1:]]))
    np.testing.assert_array_equal(np.isnan(of_none), np.arange(8) == 2)


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


def test_rows_without_a_meaning_are_nan():
    negative, zeros = TEST.copy(), np.zeros((1, WIDTH), np.float32)
    negative[3, 1] = -1e-3
    for name, of_negative, of_zeros in (
        ("ash p", False, False),
        ("ash b", True, False),
        ("ash s", True, True),
        ("ash scale", True, True),
        ("neighbours", False, True),
    ):
        np.testing.assert_array_equal(np.isnan(fitted(name)(negative)), of_negative & (np.arange(8) == 3), name)
        assert np.isnan(fitted(name)(zeros)[0]) == of_zeros, name
    overflow = lambda f: jnp.stack([f.sum(-1) * jnp.inf, f.sum(-1)], 1)
    assert np.isnan(ash_p(overflow, quantile=0.5)(TEST)).all()
    sure = lambda f: jnp.stack([0 * f[:, 0] + 9, 0 * f[:, 0]], 1)
    assert np.isnan(grad_norm(sure)(np.full((1, WIDTH), 3e38, np.float32))).all()  # a norm that overflows
    even = np.ones((1, 200), np.float32)  # the factor exp(200 / 2) is infinite
    assert np.isnan(scale(lambda f: f[:, :2], quantile=0.99)(even)).all()


def members_of(name, arrays):
    """Fitted on three members: with their heads where the score has one."""
    train, _, _, variables = arrays
    return fit_members(ALL[name], train, Partial(linear, variables))


@pytest.mark.parametrize("name", ["mahalanobis", "relative", "ratio", "neighbours", "vim", "react", "ash s"])
def test_members_are_the_mean_of_single_fits(name):
    train, test, _, variables = arrays = data(3, (3,))
    score = members_of(name, arrays)
    heads = [Partial(linear, [x[s] for x in variables]) for s in range(3)]
    each = np.array([ALL[name](train[s], heads[s])(test[s]) for s in range(3)])
    np.testing.assert_allclose(score(test), each.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(score, test), score(test), rtol=1e-5)
    test[1, 4] = np.nan
    np.testing.assert_array_equal(np.isnan(score(test)), np.arange(8) == 4)


def test_members_of_one_and_their_order():
    train, test, _, _ = data(3, (3,))
    fit = lambda f: fit_mahalanobis(f, LABELS)
    np.testing.assert_allclose(fit_members(fit, train[:1])(test[:1]), fit(train[0])(test[0]), rtol=1e-6)
    order = [2, 0, 1]
    np.testing.assert_allclose(fit_members(fit, train[order])(test[order]), fit_members(fit, train)(test), rtol=1e-5)


@cache
def moons():
    """A small network trained on two moons: features and head, and AUROC of any score against two sets of other inputs."""
    inputs, labels = make_moons(600, noise=0.1, random_state=0)
    held_out, _ = make_moons(300, noise=0.1, random_state=1)
    net = MLPClassifier((32, 32), random_state=0, max_iter=300, learning_rate_init=0.01).fit(inputs, labels)
    assert net.score(inputs, labels) > 0.98

    def features(x):
        for weights, bias in zip(net.coefs_[:-1], net.intercepts_[:-1], strict=True):
            x = np.maximum(x @ weights + bias, 0)
        return x.astype(np.float32)

    head = Partial(
        linear, [np.concatenate([-x, x], -1).astype(np.float32) / 2 for x in (net.coefs_[-1], net.intercepts_[-1])]
    )
    angle = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    circle = lambda radius: [0.5, 0.25] + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    between = np.random.default_rng(0).normal([0.5, 0.25], 0.05, size=(300, 2))  # in the gap between the moons

    def auroc(score):
        familiar = score(features(held_out))
        assert np.isfinite(familiar).all()
        return {
            name: roc_auc_score(np.repeat([0, 1], 300), np.concatenate([familiar, score(features(other))]))
            for name, other in {"far": circle(4), "farther": circle(10), "between": between}.items()
        }

    return features(inputs), labels, head, auroc


ON_MOONS = {
    "mahalanobis": lambda f, y, head: fit_mahalanobis(f, y, ridge=1e-6),
    "relative": lambda f, y, head: fit_relative_mahalanobis(f, y, ridge=1e-6),
    "density": lambda f, y, head: fit_gaussian_density(f, y, ridge=1e-6),
    "ratio": lambda f, y, head: density_ratio(
        fit_gaussian_density(f, y, ridge=1e-6), fit_gaussian_density(f, 0 * y, ridge=1e-6)
    ),
    "neighbours": lambda f, y, head: fit_neighbours(f, k=10),
    "neighbours, any length": lambda f, y, head: fit_neighbours(f, k=10, normalise=False),
    "residual": lambda f, y, head: fit_residual(f, dim=8),
    "vim": lambda f, y, head: fit_vim(f, head, dim=8),
}
BY_HEAD = {
    "react": lambda f, y, head: fit_react(f, head),
    "gradient": lambda f, y, head: grad_norm(head),
    **{f"ash {kind}": lambda f, y, head, build=build: build(head, quantile=0.65) for kind, build in SHAPES.items()},
}


@pytest.mark.parametrize("name", ON_MOONS)
def test_distances_find_what_lies_far_from_the_moons(name):
    features, labels, head, auroc = moons()
    of = auroc(ON_MOONS[name](features, labels, head))
    exact = name in ("mahalanobis", "density", "neighbours, any length", "residual", "vim")
    assert min(of["far"], of["farther"]) > (0.99 if exact else 0.85), of


@pytest.mark.parametrize("name", BY_HEAD)
def test_scores_of_the_head_find_the_gap_and_miss_what_is_far(name):
    """By construction: far from the data a rectified network is linear, its logits grow, and energy falls for ever."""
    features, labels, head, auroc = moons()
    of = auroc(BY_HEAD[name](features, labels, head))
    assert of["between"] > 0.95, of
    assert max(of["far"], of["farther"]) < 0.3, of


def test_together_they_find_both():
    features, labels, head, auroc = moons()
    parts = [ON_MOONS["mahalanobis"](features, labels, head), BY_HEAD["react"](features, labels, head)]
    together = lambda x: jnp.stack([part(x) for part in parts])
    held_out = together(features[::2])
    combined = fit_combination(held_out)
    of = auroc(lambda x: combined(together(x)))
    assert min(of.values()) > 0.95, of


BAD = np.where(np.arange(ROWS)[:, None] == 5, np.nan, TRAIN)
REFUSALS = {
    r"`features` must be finite, got NaN or infinity in 1 of 60 rows, first in row 5\. Look for members": [
        lambda: fit_mahalanobis(BAD, LABELS),
        lambda: fit_gaussian_density(BAD, LABELS),
        lambda: fit_neighbours(BAD),
        lambda: fit_residual(BAD, dim=2),
        lambda: fit_react(BAD, HEAD),
    ],
    r"`features` must have shape \(rows, features\) with at least 2 rows, got \(3, 60, 6\)\. Flatten": [
        lambda: fit_mahalanobis(np.zeros((3, ROWS, WIDTH)), LABELS),
    ],
    r"`features` must have shape \(rows, features\) with at least 1 rows, got \(0, 6\)": [
        lambda: fit_neighbours(TRAIN[:0]),
    ],
    r"`features` must have shape \(rows, 6\), got \(6,\)\. For one row add the axis: `features\[None\]`": [
        lambda name=name: fitted(name)(TEST[0])
        for name in ("mahalanobis", "relative", "density", "neighbours", "residual", "vim")
    ],
    r"`features` must have shape \(rows, 6\), got \(8, 5\)": [lambda: fitted("mahalanobis")(TEST[:, :5])],
    r"`features` must have shape \(rows, features\), got \(6,\)\. For one row": [
        lambda name=name: fitted(name)(TEST[0]) for name in ("react", "gradient", "ash p")
    ],
    r"`labels` must be whole numbers of shape \(60,\), one per row of `features`, got float64 of shape \(60,\)\. Of": [
        lambda: fit_mahalanobis(TRAIN, LABELS * 1.0),
    ],
    r"`labels` must be whole numbers of shape \(60,\), one per row of `features`, got int64 of shape \(59,\)": [
        lambda: fit_gaussian_density(TRAIN, LABELS[1:]),
    ],
    r"`labels` must lie in \[0, 2\), got 0 to 2\. Leave rows without a class out": [
        lambda: fit_mahalanobis(TRAIN, LABELS, num_classes=2),
    ],
    r"`labels` must lie in \[0, classes\), got -1 to 1": [lambda: fit_mahalanobis(TRAIN, LABELS - 1)],
    r"`labels` must have at least 2 rows of every class, got 0 of class 3 \(1 such classes of 4\)\. Number the": [
        lambda: fit_mahalanobis(TRAIN, LABELS, num_classes=4),
    ],
    r"at least 2 rows of every class, got 1 of class 3": [
        lambda: fit_gaussian_density(TRAIN, np.where(np.arange(ROWS) == 7, 3, LABELS)),
    ],
    r"`labels` must have at least 2 classes, got 1: both distances are the same\. Use `fit_mahalanobis`": [
        lambda: fit_relative_mahalanobis(TRAIN, 0 * LABELS),
    ],
    r"`ridge` must be finite and not negative, got -1\. 1e-6 is enough for dead units": [
        lambda: fit_mahalanobis(TRAIN, LABELS, ridge=-1),
    ],
    r"`k` must be a whole number from 1 to the number of training rows, 60, got 61\. 50 is usual": [
        lambda: fit_neighbours(TRAIN, k=61),
    ],
    r"`k` must be a whole number .* got 2\.0": [lambda: fit_neighbours(TRAIN, k=2.0)],
    r"`chunk` must be a whole number of at least 1, got 0\. 1024 takes 4 MiB": [lambda: fit_neighbours(TRAIN, chunk=0)],
    r"`features` must have a direction in every training row, got 1 rows of zeros, first row 60\. Leave": [
        lambda: fit_neighbours(np.concatenate([TRAIN, 0 * TRAIN[:1]])),
    ],
    r"`dim` must be a whole number from 1 to 5, one less than the features, got 6\. Half of them is usual": [
        lambda: fit_residual(TRAIN, dim=6),
        lambda: fit_vim(TRAIN, HEAD, dim=6),
    ],
    r"`origin` must be finite and of shape \(6,\) like a row of `features`, got shape \(5,\)\. Leave it out": [
        lambda: fit_residual(TRAIN, dim=2, origin=np.zeros(5)),
    ],
    r"`head` must be affine in the features, got logits that are off by .* from its own weights and bias\. Pass the": [
        lambda: fit_vim(TRAIN, lambda f: linear(VARIABLES, f**2), dim=2),
        lambda: head_origin(lambda f: jnp.abs(linear(VARIABLES, f)), TRAIN),
    ],
    r"`head` must give a positive and finite mean of the largest logits of the training rows, got -.*turn the score": [
        lambda: fit_vim(TRAIN, Partial(linear, [VARIABLES[0], VARIABLES[1] - 1000]), dim=2),
    ],
    r"`dim` must leave a residual of the training rows, got 4 of 6, which hold them all: alpha would be infinite\. Pass": [
        lambda: fit_vim(TRAIN * (np.arange(WIDTH) < 4), HEAD, dim=4, origin=np.zeros(WIDTH)),
    ],
    r"`head` must give logits \(8, classes\) of at least two classes, got \(8, 1\)\. Of one logit z give \[0, z\]": [
        lambda: ash_p(lambda f: f[:, :1], quantile=0.5)(TEST),
        lambda: grad_norm(lambda f: f[:, :1])(TEST),
    ],
    r"`quantile` must lie in \[0, 1\), got 90\. Write 0\.9 for the 90th percentile": [
        lambda build=build: build(HEAD, quantile=90) for build in SHAPES.values()
    ],
    r"`quantile` must keep at least one of the 6 features of a row, got 0\.95, which keeps none\. Pass a smaller": [
        lambda: scale(HEAD, quantile=0.95)(TEST),
    ],
    r"`quantile` must lie in \(0, 1\], got 90\. 0\.9 is that of the paper, not 90": [
        lambda: fit_react(TRAIN, HEAD, quantile=90),
    ],
    r"`quantile` must be above that of the least activation, got 0\.9, at which all are clipped to 0 and all rows alike": [
        lambda: fit_react(TRAIN * (np.arange(ROWS)[:, None] < 3), HEAD),
    ],
    r"`scores` must be finite and of shape \(score, rows\) with at least two rows, got shape \(2, 3\) with 1 values that": [
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 2.0]])),
    ],
    r"`scores` must vary over the validation rows, got the same value for all in score 1\. Leave it out": [
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]])),
    ],
    r"`weights` must be 2 finite numbers, none negative and not all zero, got \[1\.0, -1\.0\]\. To turn a score round": [
        lambda: fit_combination(np.array([[1.0, 2.0], [3.0, 1.0]]), weights=np.array([1.0, -1.0])),
    ],
    r"`scores` must have shape \(2, rows\), the scores in the order of the fit, got \(3, 9\)\. Join them by": [
        lambda: fit_combination(np.array([[1.0, 2.0], [3.0, 1.0]]))(np.zeros((3, 9))),
    ],
    r"`features` must have shape \(3, rows, features\), got \(2, 9, 6\)\. Pass those of the members that were fitted": [
        lambda: members_of("mahalanobis", data(3, (3,)))(np.zeros((2, 9, WIDTH))),
    ],
    r"Member 1: `features` must be finite, got NaN or infinity in 1 of 60 rows, first in row 5": [
        lambda: fit_members(lambda f: fit_neighbours(f), np.stack([TRAIN, BAD])),
    ],
    r"`arguments` must be arrays with one leading member axis, got leading axes \[\(2,\), \(60,\)\]\. Close over": [
        lambda: fit_members(fit_mahalanobis, np.stack([TRAIN, TRAIN]), LABELS),
    ],
    r"`arguments` must be arrays with one leading member axis, got leading axes \[\(\)\]": [
        lambda: fit_members(lambda head: ash_p(head, quantile=0.5), lambda f: f),
    ],
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(unchecked, message):
    for call in REFUSALS[message]:
        with pytest.raises(ValueError, match=message):
            call()


def test_heads_of_every_kind():
    """A closure, a pytree of one leaf, and one of none."""
    weights = VARIABLES[0]
    expected = oracles.energy(TEST @ weights)
    for head in (lambda f: f @ weights, Partial(lambda w, f: f @ w, weights), Partial(lambda f: f @ weights)):
        np.testing.assert_allclose(ash_p(head, quantile=0.0)(TEST), expected, rtol=1e-5)
        np.testing.assert_allclose(head_origin(head, TRAIN), np.zeros(WIDTH), atol=1e-6)


def test_a_head_is_a_function(unchecked):
    for build in (grad_norm, lambda head: ash_b(head, quantile=0.5), lambda head: fit_react(TRAIN, head)):
        with pytest.raises(
            TypeError, match=r"`head` must be a function of features \(rows, features\), got ndarray\. Of a"
        ):
            build(VARIABLES[0])
