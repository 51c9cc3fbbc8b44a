"""Distance to the k-th neighbour: against loops and scikit-learn, in chunks, at near duplicates."""

import math

import numpy as np
import oracles_scores_ood as oracles
import pytest
from rows_scores import (
    TEST,
    TRAIN,
    wide,
)
from sklearn.neighbors import NearestNeighbors

from bayescal.scores.neighbours import fit_neighbours

pytestmark = pytest.mark.core


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
