"""Ratios of densities: by hand, never inverted far out, and of functions of any kind."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows_scores import HEAD, LABELS, TEST, TRAIN, fitted, wider
from scipy.optimize import minimize

from bayescal.scores.density import density_ratio, fit_gaussian_density

pytestmark = pytest.mark.core

TOO_MUCH = r"`weight` must be at most (\S+) for this background, got \S+: class (\d+) of `numerator` is so wide in one"


def of_all(rows, **settings):
    return fit_gaussian_density(rows, np.zeros(len(rows), int), **settings)


def largest_weight(numerator, background):
    """As the message names it, and the class that sets it."""
    with pytest.raises(ValueError, match=TOO_MUCH) as error:
        density_ratio(numerator, background, weight=1e6)
    weight, number = re.match(TOO_MUCH, str(error.value)).groups()
    return float(weight), int(number)


def exact(rng, rows, matrix, mean=0.0):
    """Rows whose mean, and whose covariance over rows - 1, matrix^T matrix, are exact."""
    draws = rng.normal(size=(rows, len(matrix)))
    draws = np.linalg.qr(draws - draws.mean(0))[0] * np.sqrt(rows - 1)
    return (draws @ matrix + mean).astype(np.float32)


def wide_axis(rng):
    """Nine classes of one kind and one that is five times as wide in a direction."""
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    spread = np.where(np.arange(8) == 3, 5, 1)
    each = [exact(rng, 30, np.diag(spread if k == 4 else np.ones(8)) @ turn, rng.normal(size=8)) for k in range(10)]
    return np.concatenate(each), np.repeat(np.arange(10), 30)


def thin_class(rng):
    """Classes that are flat in different directions, none of them an axis."""
    turns = [np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(5)]
    each = [exact(rng, 40, np.diag([3, 1, 1, 1, 1, 0.01]) @ turn, 2 * rng.normal(size=6)) for turn in turns]
    return np.concatenate(each), np.repeat(np.arange(5), 40)


def rare_class(rng):
    """A class of few rows that is ten times as wide as the others."""
    return np.concatenate([exact(rng, 490, np.eye(4)), exact(rng, 10, 10 * np.eye(4))]), np.repeat([0, 1], [490, 10])


def tied(rng):
    """All classes alike: equal to the background wherever their means do not differ."""
    each = [exact(rng, 50, np.eye(5), 3 * np.eye(5)[k]) for k in range(2)]
    return np.concatenate(each), np.repeat([0, 1], 50)


@pytest.mark.parametrize("case", [wide_axis, thin_class, rare_class, tied])
def test_never_inverted_far_out(rng, case):
    """The same rows as one class make a background that most classes outgrow: refused, and with the weight named it rises."""
    rows, labels = case(rng)
    numerator, background = fit_gaussian_density(rows, labels), of_all(rows)
    weight, _ = largest_weight(numerator, background)
    if case is not tied:
        with pytest.raises(ValueError, match=TOO_MUCH):
            density_ratio(numerator, background)
    ratio = density_ratio(numerator, background, weight=weight)
    width = rows.shape[1]
    own = np.array(numerator.maps, np.float64)
    axes = np.concatenate([np.linalg.inv(map) for map in own])  # a spread of each class, along and against all its axes
    others = np.concatenate([np.linalg.inv(background.maps[0]), rng.normal(size=(100, width))])
    rays = np.concatenate([axes, -axes, others, -others])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    before = np.full(len(rays), max(ratio(rows)))
    for far in (1e4, 1e5, 1e6, 1e9):
        now = np.asarray(ratio((rows.mean(0) + far * rays).astype(np.float32)))
        assert (now > before).all()
        before = now


@pytest.mark.parametrize("case", [wide_axis, thin_class, rare_class])
def test_a_third_of_the_least_share_is_always_sound(rng, case):
    """No class is wider, nor its mean farther away, than its share of all rows lets it be; with the same ridge as without."""
    rows, labels = case(rng)
    kept = np.flatnonzero((labels > 0) | (np.arange(len(rows)) < 2))  # also where a class has two rows
    for chosen, ridge in ((slice(None), 0.0), (slice(None), 0.1), (kept, 0.1)):
        of, y = rows[chosen], labels[chosen]
        least = np.bincount(y).min() / len(y)
        density_ratio(fit_gaussian_density(of, y, ridge=ridge), of_all(of, ridge=ridge), weight=least / 3)


def near_and_rising(weight, rows, others):
    """Whether the ratio's lowest point, by a minimiser, is among the rows, and 1 % of the squared distance is left far out."""
    (mean, covariance), (centre, other) = ((x.mean(0, dtype=float), np.cov(x.T.astype(float))) for x in (rows, others))
    inside, outside = np.linalg.inv(covariance), np.linalg.inv(other)
    distance = lambda f, at, inverse: (f - at) @ inverse @ (f - at)
    ratio = lambda f: distance(f, mean, inside) - weight * distance(f, centre, outside)
    lowest = minimize(ratio, mean, method="BFGS", options={"gtol": 1e-9}).x
    left = 1 - weight * np.linalg.eigvals(outside @ covariance).real.max()
    assert left > 0
    return distance(lowest, mean, inside) <= len(mean) and left >= 0.01


def test_the_lowest_point_stays_near_its_class(rng):
    """The weight that is named is sound, and 1 in 100 more is not."""
    for number in range(6):
        rows = exact(rng, 40, rng.normal(size=(3, 3)), 3 * rng.normal(size=3))
        others = exact(rng, 60, (1 + number) * rng.normal(size=(3, 3)), 3 * rng.normal(size=3))
        named, _ = largest_weight(of_all(rows), of_all(others))
        assert near_and_rising(named, rows, others) and not near_and_rising(1.01 * named, rows, others)


def test_weights_by_hand():
    """Normals at 0 and at 1, spread 1: (f^2 - w (f - 1)^2) / 2 is lowest at -w / (1 - w), one spread away for w = 1/2."""
    pair = np.sqrt(0.5) * np.array([[-1.0], [1.0]], np.float32)
    numerator, background = of_all(pair), of_all(pair + 1)
    assert largest_weight(numerator, background)[0] == pytest.approx(0.5, rel=1e-2)
    ratio = density_ratio(numerator, background, weight=0.4)
    constant = 0.6 * np.log(2 * np.pi) / 2
    np.testing.assert_allclose(ratio(np.array([[3.0]])), [(9 - 0.4 * 4) / 2 + constant], rtol=1e-6)
    # spread 2 about the same mean: never inverted below 4, of which 1 in 100 is kept
    assert largest_weight(numerator, of_all(2 * pair))[0] == pytest.approx(0.99 * 4, rel=1e-2)
    # of several backgrounds the one that allows most
    two = fit_gaussian_density(np.concatenate([2 * pair, pair]), np.array([0, 0, 1, 1]))
    assert largest_weight(numerator, two)[0] == pytest.approx(0.99 * 4, rel=1e-2)
    # of several classes the widest
    three = fit_gaussian_density(np.concatenate([pair, 3 * pair, 2 * pair]), np.repeat([0, 1, 2], 2))
    weight, number = largest_weight(three, of_all(6 * pair))
    assert weight == pytest.approx(0.99 * 4, rel=1e-2) and number == 1


def test_weight_is_a_wider_background():
    """0.25 of one normal distribution, and all of one twice as wide: the same but for a constant."""
    numerator = fit_gaussian_density(TRAIN, LABELS)
    part = density_ratio(numerator, of_all(TRAIN), weight=0.25)(TEST)
    whole = density_ratio(numerator, of_all(wider(TRAIN, 2)))(TEST)
    np.testing.assert_allclose(part - part[0], whole - whole[0], rtol=1e-4, atol=1e-3)


def test_a_background_elsewhere_is_refused(rng):
    """As wide as the class but for 1 in 1000, and 30 spreads away: the lowest point would be 30,000 spreads out."""
    rows = exact(rng, 50, np.eye(3))
    away = exact(rng, 50, np.sqrt(1.001) * np.eye(3), np.array([30.0, 0, 0]))
    with pytest.raises(ValueError, match=TOO_MUCH):
        density_ratio(of_all(rows), of_all(away))


def test_functions_of_every_kind():
    """Plain functions and pytrees, under jit too; where the background alone is infinite nothing is known."""
    plain = density_ratio(lambda f: f[:, 0], lambda f: jnp.where(f[:, 1] > 1, jnp.inf, f[:, 1]), weight=0.5)
    rows = np.array([[3.0, 1.0], [3.0, 2.0], [np.inf, 1.0], [3.0, np.nan]], np.float32)
    np.testing.assert_array_equal(plain(rows), [2.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(jax.jit(lambda s, x: s(x))(plain, rows), plain(rows))
    np.testing.assert_array_equal(jax.jit(plain)(rows), plain(rows))
    mixed = density_ratio(fitted("density"), Partial(lambda c, f: c * f.sum(-1), jnp.float32(0.1)))
    np.testing.assert_allclose(mixed(TEST), fitted("density")(TEST) - 0.1 * TEST.sum(-1), rtol=1e-5)
    infinite = density_ratio(lambda f: f[:, 0] * jnp.inf, lambda f: f[:, 0])
    np.testing.assert_array_equal(infinite(TEST), np.full(len(TEST), np.inf))


def test_refusals(unchecked):
    density = fitted("density")
    for name, parts in (("numerator", (TRAIN, density)), ("background", (density, None))):
        with pytest.raises(
            TypeError, match=rf"`{name}` must be a function of features \(rows, features\), got .* Pass a"
        ):
            density_ratio(*parts)
    for weight in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match=rf"`weight` must be positive and finite, got {weight}\. 1 is the ratio"):
            density_ratio(density, density, weight=weight)
    with pytest.raises(
        ValueError, match=r"`background` must be of as many features as `numerator`, 6, got 5\. Fit both"
    ):
        density_ratio(density, of_all(TRAIN[:, :5]))
    with pytest.raises(TypeError, match="`numerator` must be a function"):
        density_ratio(HEAD.args[0][0], density)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint64])
def test_labels_of_every_integer(unchecked, dtype):
    np.testing.assert_array_equal(fit_gaussian_density(TRAIN, LABELS.astype(dtype))(TEST), fitted("density")(TEST))
