"""The order of an epoch's rows: a permutation, each equally frequent, each row anywhere, neighbours never kept together."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bayescal.train.shuffle import permutation

pytestmark = pytest.mark.core


def drawn(rows, number, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(jax.jit(jax.vmap(partial(permutation, rows=rows)))(keys))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 10, 97, 256, 1437])
def test_every_row_once(rows):
    orders = drawn(rows, 20)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(rows), (20, 1)))
    assert rows < 10 or len({tuple(order) for order in orders}) == 20  # another key, another order


def test_many_rows_and_strict_types(strict):
    order = np.asarray(permutation(jax.random.key(3), 100_003))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(100_003))


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7])
def test_all_orders_are_equally_frequent(rows):
    orders = drawn(rows, 200_000, seed=rows)
    _, counts = np.unique(orders @ (10 ** np.arange(rows)), return_counts=True)
    assert len(counts) == math.factorial(rows)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("rows", [7, 8, 9, 25, 49, 50, 81])
def test_odd_and_even_permutations_are_equally_frequent(rows):
    parity = lambda order: sum((order[:i] > order[i]).sum() for i in range(rows)) % 2
    odd = sum(parity(order) for order in drawn(rows, 1000, seed=rows))
    assert stats.binomtest(int(odd), 1000).pvalue > 1e-3


def test_a_row_may_stand_anywhere_and_beside_any_other():
    rows, number = 101, 20_000
    orders = drawn(rows, number, seed=1)
    for place in (0, 50, 100):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=rows)).pvalue > 1e-3
    gaps = (np.diff(orders, axis=1) % rows).ravel()  # a gap of 1 = a pair of neighbours kept
    counts = np.bincount(gaps, minlength=rows)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_orders_of_neighbouring_keys_do_not_resemble_each_other():
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(400))
    orders = np.asarray(jax.jit(jax.vmap(partial(permutation, rows=500)))(keys))
    correlations = [stats.spearmanr(a, b)[0] for a, b in itertools.pairwise(orders)]
    assert stats.kstest(correlations, stats.norm(0, 1 / math.sqrt(499)).cdf).pvalue > 1e-3
