"""The fast forms of binning and of the value check say what their slow, obvious forms say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayescal as bc
from bayescal.binning import bin_index, histogram
from bayescal.predictive import Probabilities, check_predictive
from bayescal.predictive.checks import _bad_rows, all_good

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("closed", "side"), [("right", "left"), ("left", "right")])
def test_bins_are_those_of_a_search(rng, closed, side):
    """Edges, their neighbours on both sides, middles and anything else; a naive floor(p * M) fails at the edges."""
    naive = 0
    for bins in (1, 3, 15, 49, 1000, 3840):
        edges = (np.arange(bins + 1) / bins).astype(np.float32)
        near = [np.nextafter(edges, np.float32(end)) for end in (-1, 2)]
        middles = ((np.arange(bins) + 0.5) / bins).astype(np.float32)
        p = np.concatenate([edges, *near, middles, rng.uniform(size=999).astype(np.float32), np.float32([1e-30, 0, 1])])
        expected = np.clip(np.searchsorted(edges, p, side=side) - 1, 0, bins - 1)
        np.testing.assert_array_equal(bin_index(p, bins, closed), expected)
        rounded = np.ceil(p * bins) - 1 if closed == "right" else np.floor(p * bins)
        naive += (np.clip(rounded, 0, bins - 1) != expected).sum()
    assert naive > 0


def test_half_precision_bins_are_those_of_its_own_edges(rng):
    p = rng.uniform(size=500).astype(np.float16)
    edges = (np.arange(16) / 15).astype(np.float16)
    np.testing.assert_array_equal(bin_index(p, 15, "left"), np.clip(np.searchsorted(edges, p, side="right") - 1, 0, 14))


def test_histogram_in_blocks_against_float64(rng):
    """Many rows in one bin: one float32 sum of 2**18 terms would be off by far more."""
    p = np.full(2**18, 0.7000001, np.float32)
    y, w = (rng.uniform(size=2**18) < 0.7).astype(np.float32), rng.integers(0, 3, 2**18).astype(np.float32)
    p[w == 0] = np.nan  # padding may hold anything
    sums = jax.jit(lambda p, y, w: histogram(p, y, w, num_bins=15))(p, y, w)
    gap = np.where(w == 0, 0, w * (p.astype(np.float64) - y))
    for ours, exact in ((sums.weight, w.sum()), (sums.gap, gap.sum()), (sums.weight_square, (w**2).sum())):
        assert np.asarray(ours)[10] == pytest.approx(exact, rel=2e-6, abs=2e-2 if ours is sums.gap else 0)
        assert not np.asarray(ours)[[*range(10), *range(11, 15)]].any()


def spoilt(probs, place, value):
    changed = probs.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        (np.nan, False),
        (np.inf, False),
        (-np.inf, False),
        (-1e-30, False),
        (1.5, False),
        (0.25 + 2e-3, False),
        (0.25 + 5e-4, True),
    ],
)
def test_the_quick_check_never_hides_what_the_slow_one_finds(value, passes):
    probs = np.full((1, 64, 4), 0.25, np.float32)
    assert all_good(Probabilities(probs))
    pred = Probabilities(spoilt(probs, (0, 17, 2), value))
    found = any(np.asarray(x).any() for x in _bad_rows(pred))
    assert found != passes and not (found and all_good(pred))
    if passes:
        check_predictive(pred)
    else:
        with pytest.raises(ValueError, match="in 1 of 64 examples, first at 17"):
            check_predictive(pred)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_quick_check_of_logits(value):
    pred = bc.Categorical(spoilt(np.zeros((2, 64, 4), np.float32), (1, 3, 2), value))
    assert all_good(bc.Categorical(np.zeros((2, 64, 4), np.float32))) and not all_good(pred)
    if value == -np.inf:
        check_predictive(pred)  # one impossible class is no fault
    else:
        with pytest.raises(ValueError, match="first at 3"):
            check_predictive(pred)


def test_arrays_of_jax_and_numpy_evaluate_alike(rng):
    probs, targets = rng.dirichlet(np.ones(4), 300).astype(np.float32)[None], rng.integers(0, 4, 300)
    metrics = {"ece": bc.calibration_error(), "accuracy": bc.accuracy()}
    of_numpy, of_jax = (
        bc.evaluate(Probabilities(x), targets, metrics, batch_size=128) for x in (probs, jnp.asarray(probs))
    )
    assert of_numpy == of_jax
