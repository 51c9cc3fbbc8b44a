import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from bayescal.metrics.association import FEWEST, spearman, spearman_difference

pytestmark = pytest.mark.core


def loops(a, b, weights=None):
    """Mid-ranks by counting pairs, then Pearson's formula."""
    w = [1.0] * len(a) if weights is None else [float(x) for x in weights]

    def ranks(x):
        return [sum(w[j] * ((x[j] < x[i]) + (x[j] == x[i]) / 2) for j in range(len(x))) for i in range(len(x))]

    r, s = ranks(a), ranks(b)
    total = sum(w)
    mean_r, mean_s = (sum(k * x for k, x in zip(w, y, strict=True)) / total for y in (r, s))
    moment = lambda x, mx, y, my: sum(k * (p - mx) * (q - my) for k, p, q in zip(w, x, y, strict=True))
    return moment(r, mean_r, s, mean_s) / math.sqrt(moment(r, mean_r, r, mean_r) * moment(s, mean_s, s, mean_s))


def columns(rng, rows=60, zeros=0.3):
    """Two columns that go together, the second with many ties, as entropies of votes have."""
    a, noise = rng.normal(size=(2, rows))
    b = a + noise
    return a.round(1), np.where(b < np.quantile(b, zeros), 0, b.round(1))


def test_against_scipy_and_loops(rng):
    for zeros in (0.0, 0.3, 0.6):
        a, b = columns(rng, zeros=zeros)
        found = spearman(a, b)
        np.testing.assert_allclose(found.value, spearmanr(a, b)[0], rtol=1e-12)
        np.testing.assert_allclose(found.value, loops(a, b), rtol=1e-12)
        assert found.low < found.value < found.high and found.n == 60 and "ties" in found.convention


def test_by_hand():
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1)) = 0.6
    assert spearman(np.arange(4), np.array([2, 1, 4, 3])).value == pytest.approx(0.6, abs=1e-15)
    # ranks 1.5 1.5 3 and 1 2 3: covariance 0.5 (0.5 + 1), by 1.5 and 2
    assert spearman(np.array([0, 0, 1]), np.array([0, 1, 2])).value == pytest.approx(
        1.5 / math.sqrt(1.5 * 2), abs=1e-15
    )


def test_direction_and_ends(rng):
    a = rng.normal(size=50)
    same, reverse = spearman(a, np.exp(a)), spearman(a, -(a**3))
    assert (same.value, reverse.value) == (1, -1)
    assert same.low is None and reverse.high is None  # its influence is nothing there, which is not certainty
    assert spearman(a[: FEWEST - 1], a[::-1][: FEWEST - 1]).low is None
    assert spearman(np.array([-np.inf, 0, np.inf]), np.array([1, 2, 3])).value == 1


def test_invariances(rng):
    a, b = columns(rng)
    found, order = spearman(a, b), rng.permutation(len(a))
    for other in (spearman(b, a), spearman(np.exp(a), 3 * b - 1), spearman(a[order], b[order])):
        np.testing.assert_allclose(other[:3], found[:3], rtol=1e-12)
    turned = spearman(-a, b)
    np.testing.assert_allclose([-turned.value, -turned.high, -turned.low], found[:3], rtol=1e-12)


def test_weights_are_repetition_and_rows_of_weight_0_are_absent(rng):
    a, b = columns(rng)
    weights = rng.integers(0, 4, len(a))
    often = np.repeat(np.arange(len(a)), weights)
    found = spearman(np.where(weights > 0, a, np.nan), b, weights=weights)
    np.testing.assert_allclose(found.value, spearmanr(a[often], b[often])[0], rtol=1e-12)
    np.testing.assert_allclose(found.value, loops(a, b, weights), rtol=1e-12)
    assert found.n == (weights > 0).sum()
    np.testing.assert_allclose(spearman(a, b, weights=0.01 * weights)[:3], found[:3], rtol=1e-10)  # the scale is free
    np.testing.assert_allclose(spearman(a, b, weights=np.full(len(a), 7))[:3], spearman(a, b)[:3], rtol=1e-12)


def test_fewest_rows_are_effective_rows(rng):
    """A row that weighs as much as all others together leaves few observations, however many rows there are."""
    columns = rng.normal(size=(3, 200))
    for rows, heavy, known in ((FEWEST, 1, True), (FEWEST - 1, 1, False), (200, 20, True), (200, 60, False)):
        weights = np.where(np.arange(rows) == 0, heavy, 1) * 0.1
        assert (weights.sum() ** 2 / (weights**2).sum() >= FEWEST - 1e-9) == known
        a, b, target = columns[:, :rows]
        for found in (spearman(a, b, weights=weights), spearman_difference(a, b, target, weights=weights)):
            assert (found.low is not None) == known and found.n == rows


def test_large_weights_do_not_overflow(rng):
    a, b = columns(rng)
    weights = rng.uniform(0.5, 1, 60)
    for scale in (1e308, 1e-300):
        np.testing.assert_allclose(
            spearman(a, b, weights=scale * weights)[:3], spearman(a, b, weights=weights)[:3], rtol=1e-12
        )


def standard_error(estimate):
    """Read back from the interval on Fisher's scale."""
    return (math.atanh(estimate.high) - math.atanh(estimate.low)) / 2 / 1.959963984540054 * (1 - estimate.value**2)


@pytest.mark.parametrize("weighted", [False, True])
def test_interval_is_the_slope_in_the_weights(rng, weighted):
    """Against differences of the value as each row's weight moves, ranks and all."""
    a, b = columns(rng)
    n = len(a)
    weights = rng.uniform(0.5, 2, n) if weighted else np.ones(n)
    step = 1e-6
    ends = [[loops(a, b, weights + sign * step * (np.arange(n) == i)) for i in range(n)] for sign in (1, -1)]
    slopes = np.subtract(*ends) / (2 * step)
    expected = math.sqrt(((weights * slopes) ** 2).sum() * n / (n - 1))
    np.testing.assert_allclose(standard_error(spearman(a, b, weights=weights)), expected, rtol=1e-6)


def test_interval_is_about_the_jackknife(rng):
    a, b = columns(rng, rows=400)
    left_out = np.array([spearman(np.delete(a, i), np.delete(b, i)).value for i in range(400)])
    expected = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    np.testing.assert_allclose(standard_error(spearman(a, b)), expected, rtol=0.01)


def test_difference(rng):
    a, target = columns(rng, rows=300)
    b = a + 0.3 * rng.normal(size=300)
    found = spearman_difference(a, b, target)
    one, other = spearman(a, target), spearman(b, target)
    np.testing.assert_allclose(found.value, one.value - other.value, rtol=1e-12)
    assert found.low < found.value < found.high and found.value > 0  # noise takes away from the order
    apart = math.hypot(one.high - one.low, other.high - other.low)
    assert found.high - found.low < 0.5 * apart  # what is common cancels
    left_out = [np.delete(np.stack([a, b, target]), i, 1) for i in range(300)]
    values = np.array([spearman(x, t).value - spearman(y, t).value for x, y, t in left_out])
    expected = math.sqrt(299 / 300 * ((values - values.mean()) ** 2).sum())
    np.testing.assert_allclose((found.high - found.low) / 2 / 1.96, expected, rtol=0.02)
    turned = spearman_difference(b, a, target)
    np.testing.assert_allclose([-turned.value, -turned.high, -turned.low], found[:3], rtol=1e-9)
    same = spearman_difference(a, np.exp(a), target)
    assert abs(same.value) < 1e-12 and same.low is None


def test_errors(rng, unchecked):
    a, b = columns(rng)
    broken = a.copy()
    broken[[3, 5]] = np.nan
    with pytest.raises(ValueError, match=r"`b` must not be NaN, got 2 of 60. Find out which rows"):
        spearman(b, broken)
    with pytest.raises(ValueError, match=r"`target` must not be NaN, got 2 of 60"):
        spearman_difference(a, b, broken)
    with pytest.raises(
        ValueError, match=r"`a`, `b` and `weights` must be one axis of the same length, got \(60,\) and \(59,\)"
    ):
        spearman(a, b[1:])
    with pytest.raises(ValueError, match=r"got \(60,\) and \(60,\) and \(3,\). Flatten"):
        spearman(a, b, weights=np.ones(3))
    with pytest.raises(ValueError, match="one axis of the same length"):
        spearman(a[:, None], b[:, None])
    with pytest.raises(ValueError, match="`a` must hold at least two values, got the same in all 60 rows"):
        spearman(np.zeros(60), b)
    with pytest.raises(ValueError, match="`target` must hold at least two values"):
        spearman_difference(a, b, np.zeros(60))
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="`weights` must be finite and non-negative"):
            spearman(a, b, weights=np.where(np.arange(60) == 2, wrong, 1))
    with pytest.raises(ValueError, match="at least two rows that weigh something, got 1"):
        spearman(a, b, weights=(np.arange(60) == 2).astype(float))
    with pytest.raises(ValueError, match="at least two rows that weigh something, got 0"):
        spearman(np.zeros(0), np.zeros(0))


def draw(kind, rng, rows):
    if kind == "spread grows":
        a = rng.exponential(size=rows)
        return a, a * (0.8 + rng.normal(size=rows))
    a, noise = rng.normal(size=(2, rows))
    b = 0.6 * a + 0.8 * noise
    return a, b if kind == "normal" else np.where(b < 0.3, 0, b.round(1))


def coverage(kind, rows, sets, seed=0):
    """Share of data sets whose intervals hold the truth: of the correlation, and of the difference to a noisier column."""
    rng = np.random.default_rng(seed)
    large = draw(kind, rng, 10**6)
    noisy = lambda a: a + 0.5 * np.random.default_rng(len(a)).normal(size=len(a))
    truth = spearmanr(*large)[0]
    difference = truth - spearmanr(noisy(large[0]), large[1])[0]
    hits, known = np.zeros(2), np.zeros(2)
    for _ in range(sets):
        a, b = draw(kind, rng, rows)
        found = spearman(a, b), spearman_difference(a, a + 0.5 * rng.normal(size=rows), b)
        known += [x.low is not None for x in found]
        hits += [x.low is not None and x.low <= value <= x.high for x, value in zip(found, (truth, difference))]
    return hits / known


@pytest.mark.parametrize("kind", ["normal", "ties", "spread grows"])
def test_coverage(kind):
    assert (np.abs(coverage(kind, 100, 400) - 0.95) < 0.035).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "ties", "spread grows"])
def test_coverage_of_many(kind):
    """4,000 data sets a cell; about half a minute each."""
    found = {rows: coverage(kind, rows, 4000) for rows in (FEWEST, 50, 200, 1000)}
    print(kind, {rows: x.round(3).tolist() for rows, x in found.items()})
    for rows, share in found.items():
        assert (share > (0.9 if rows < 50 else 0.925)).all() and (share < 0.97).all(), (rows, share)
