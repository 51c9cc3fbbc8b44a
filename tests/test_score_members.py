"""Several scores as one: combinations, and the members of an ensemble."""

import jax
import numpy as np
import oracles_scores_ood as oracles
import pytest
from jax.tree_util import Partial
from rows_scores import ALL, HEAD, LABELS, VARIABLES, data, linear, members_of

from bayescal.scores.combine import fit_combination, fit_members
from bayescal.scores.mahalanobis import fit_mahalanobis
from bayescal.scores.shaping import ash_p

pytestmark = pytest.mark.core


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


def test_what_members_share():
    """A fit that closes over everything but its features, with a head of arrays and with one of none."""
    train, test, _, _ = data(3, (3,))
    for head in (HEAD, lambda f: f @ VARIABLES[0]):
        score = fit_members(lambda f, head=head: ash_p(head, quantile=0.5), train)
        each = [ash_p(head, quantile=0.5)(own) for own in test]
        np.testing.assert_allclose(score(test), np.mean(each, 0), rtol=1e-5)
        np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(score, test), score(test), rtol=1e-5)
    row_sum = lambda rows: rows.sum(-1)  # a plain function, the same for all
    np.testing.assert_allclose(fit_members(lambda f: row_sum, train)(test), test.sum(-1).mean(0), rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_members_weigh_as_in_a_pool(name):
    train, test, _, variables = data(3, (3,))
    heads = Partial(linear, variables)
    each = np.stack([ALL[name](train[s], Partial(linear, [x[s] for x in variables]))(test[s]) for s in range(3)])
    weights = np.array([0.5, 3, 0.25])
    score = fit_members(ALL[name], train, heads, member_weights=weights)
    np.testing.assert_allclose(score(test), np.average(each, 0, weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(score.member_weights, weights)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("out", [0, 1])
def test_members_left_out_are_not_fitted(name, out):
    """The first or another diverged: NaN wherever it is, and none of it in the score."""
    train, test, _, variables = data(3, (3,))
    alive = np.arange(3) != out
    for x in (train, test, *variables):
        x[out] = np.nan
    fits = []
    build = lambda f, head: fits.append(len(f)) or ALL[name](f, head)
    score = fit_members(build, train, Partial(linear, variables), member_weights=alive)
    kept = fit_members(ALL[name], train[alive], Partial(linear, [x[alive] for x in variables]))
    assert len(fits) == 2
    np.testing.assert_allclose(score(test), kept(test[alive]), rtol=1e-5, atol=1e-5)
    test[2, 4] = np.nan
    np.testing.assert_array_equal(np.isnan(score(test)), np.arange(8) == 4)
    own = jax.tree.map(lambda leaf: leaf[out], score.fitted)  # nothing that could be taken for a fit
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(own))
