"""Exact ranks: which order statistic is the threshold, weighted or not."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles_conformal as oracle
import pytest
from conformal_bands import ALPHAS, coverage_band

from bayescal.conformal import order_statistic, rank, ranks, smallest_alpha, weighted_threshold
from bayescal.conformal.groups import group_thresholds

pytestmark = pytest.mark.core
PERCENT = tuple(a / 100 for a in range(1, 60))


@pytest.mark.parametrize("alpha", [*ALPHAS, 0.3, 0.123456789, 1e-9, 1 - 1e-9])
def test_rank_is_the_least_that_covers(alpha):
    """P(new score <= k-th smallest of n) = k / (n + 1) without ties: k is the least with that >= 1 - alpha."""
    wanted = 1 - Fraction(str(alpha))
    for n in range(5, 2001):
        k = rank(n, alpha)
        assert Fraction(k, n + 1) >= wanted > Fraction(k - 1, n + 1)
    assert ranks(2000, alpha)[5:].tolist() == [rank(n, alpha) for n in range(5, 2001)]


def test_rank_where_floats_go_wrong():
    """Pitfall 38: ceil of the float product is one too high where (n + 1)(1 - alpha) is a whole number, as for 99 and 0.1."""
    assert rank(99, 0.1) == 90 and rank(9, 0.1) == 9 and rank(19, 0.05) == 19 and rank(8, 0.1) == 9
    wrong = sum(int(np.ceil((n + 1) * (1 - a))) != rank(n, a) for a in PERCENT for n in range(5, 2000))
    assert wrong > 100  # the naive formula; that of one too high of `method="higher"` is another


def test_numpy_quantile_method_higher_is_another_rank():
    """Pitfall 38, as released by a peer for a while: one order statistic too high for whole numbers."""
    scores = np.arange(1, 100.0)
    level = np.ceil(100 * 0.9) / 99
    assert np.quantile(scores, level, method="higher") == 91 != float(order_statistic(scores, rank(99, 0.1)))


def test_order_statistic_by_hand():
    scores = jnp.array([0.3, 0.1, jnp.nan, 0.2])
    assert [float(order_statistic(scores, k)) for k in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])
    assert np.isnan(order_statistic(scores, 4)) and order_statistic(scores, 5) == jnp.inf
    assert order_statistic(jnp.ones((3, 2)), 2).shape == (2,)
    assert smallest_alpha(99) == 0.01 and rank(99, 0.01) == 99 and rank(98, 0.01) == 99


@pytest.mark.parametrize("n", [5, 9, 10, 19, 99, 123, 1999, 9999, 1_000_000])
def test_equal_weights_are_the_exact_rank(n):
    scores = np.arange(1, n + 1, dtype=np.float32)
    for alpha, weight in ((0.01, 1.0), (0.05, 0.7), (0.1, 1e-3), (0.2, 1.0), (0.07, 0.7), (0.33, 1e6))[
        :: 1 + n // 10**6
    ]:
        own, k = jnp.float32(weight), rank(n, alpha)
        assert weighted_threshold(scores, np.full(n, own), own, alpha) == (k if k <= n else np.inf), (alpha, weight)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weighted_threshold_equals_the_oracle(alpha):
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=200).astype(np.float32), rng.gamma(0.5, size=200).astype(np.float32)
    own = np.append(rng.gamma(0.5, size=30), [0, 1e3]).astype(np.float32)
    find = partial(weighted_threshold, alpha=alpha)
    got = find(scores, weights, own)
    expected = [oracle.threshold(scores, alpha, weights, w) for w in own]
    np.testing.assert_array_equal(got, np.float32(expected))
    assert got[-1] == jnp.inf
    np.testing.assert_array_equal(jax.jit(find)(scores, weights, own), got)
    np.testing.assert_array_equal(jax.vmap(find, (None, None, 0))(scores, weights, own), got)
    two = jax.vmap(jax.vmap(find, (None, 0, 0)), (0, None, None))  # scores by weights
    other = weights[::-1].copy()
    both = two(np.stack([scores, 2 * scores]), np.stack([weights, other]), np.stack([own, own]))
    np.testing.assert_array_equal(both[0, 0], got)
    np.testing.assert_array_equal(both[1], 2 * both[0])
    np.testing.assert_array_equal(both[0, 1], find(scores, other, own))


def test_weighted_threshold_by_hand():
    """Weights 1, 1, 2 and own 1: of 5 the set needs 3 at alpha 0.4, reached at the third score; 2 at 0.6, at the second."""
    scores, weights = jnp.array([1.0, 2, 3]), jnp.array([1.0, 1, 2])
    assert weighted_threshold(scores, weights, jnp.float32(1), 0.4) == 3
    assert weighted_threshold(scores, weights, jnp.float32(1), 0.6) == 2
    assert weighted_threshold(scores, weights, jnp.float32(1), 0.1) == jnp.inf
    own = jnp.array([jnp.nan, 1, -1])
    assert np.isnan(weighted_threshold(scores, weights, own, 0.4)).tolist() == [True, False, True]
    for wrong in ([1.0, -1, 2], [0.0, 0, 0], [1.0, jnp.nan, 1]):
        assert np.isnan(weighted_threshold(scores, jnp.array(wrong), jnp.float32(1), 0.4))
    assert weighted_threshold(jnp.array([1, jnp.nan, 2]), weights, jnp.float32(1), 0.1) == jnp.inf


@pytest.mark.parametrize("dim", [None, 2])
def test_groups_each_have_their_own_rank(dim):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(90,) if dim is None else (90, dim)).astype(np.float32)
    groups = rng.choice(5, p=[0.5, 0.3, 0.15, 0.05, 0], size=90)
    groups[:4] = [-1, 7, -1, 7]  # count for nothing
    fit = jax.jit(lambda s, g: group_thresholds(s, g, num_groups=5, alpha=0.1))
    threshold, rows = fit(scores, groups.astype(np.int8))
    assert rows.tolist() == [(groups == g).sum() for g in range(5)]
    for g in range(5):
        own = scores[groups == g]
        np.testing.assert_array_equal(threshold[g], order_statistic(own, rank(len(own), 0.1)))
    assert np.isinf(threshold[4]).all()


def test_band_by_hand():
    """One repetition, one new row: covered with probability k / (n + 1), so that the band of 99.9 % is everything."""
    assert coverage_band(1, 9, 1, 9) == (0, 1) and coverage_band(5, 9, 3, 10) == (1, 1)
    low, high = coverage_band(1000, 99, 30, 90)
    assert 0.88 < low < 0.9 < high < 0.92


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, float("nan"), "0.1", None, jnp.float32(0.1)])
def test_bad_alpha(alpha, unchecked):
    for call in (lambda: rank(10, alpha), lambda: ranks(10, alpha)):
        with pytest.raises(ValueError, match=r"`alpha` must be the miscoverage wanted, a number in \(0, 1\), got"):
            call()
