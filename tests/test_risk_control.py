"""Conformal risk control and learn then test."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformal_bands import ALPHAS
from scipy.stats import binom

import bayescal as bc
from bayescal.conformal import (
    absolute,
    bonferroni,
    control_risk,
    false_negative_rate,
    fit_split,
    fixed_sequence,
    hoeffding_bentkus,
    lac,
    learn_then_test,
)

pytestmark = pytest.mark.core
GRID = np.linspace(0, 1, 21).astype(np.float32)


def labelled(seed, rows=50, classes=6):
    """Probabilities of labels, any number of which are right, and the labels."""
    rng = np.random.default_rng(seed)
    probs = rng.uniform(size=(rows, classes)).astype(np.float32)
    return probs, rng.uniform(size=probs.shape) < probs**2


def missed(probs, labels, thresholds):
    """Loops over rows, settings and labels."""
    losses = np.zeros((len(probs), len(thresholds)))
    for i, (p, true) in enumerate(zip(probs, labels)):
        for j, t in enumerate(thresholds):
            right = [k for k in range(len(p)) if true[k]]
            losses[i, j] = sum(1 - p[k] > t for k in right) / max(len(right), 1)
    return losses


def test_false_negative_rate():
    probs, labels = labelled(0)
    labels[3] = False
    got = np.asarray(false_negative_rate(probs, labels, GRID))
    np.testing.assert_allclose(got, missed(probs, labels, GRID), rtol=1e-6)
    assert (got[3] == 0).all() and (got[:, -1] == 0).all()
    probs[2, 1] = np.nan
    got = np.asarray(jax.jit(false_negative_rate)(probs, labels, GRID))
    assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, 0)).all()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.5])
def test_risk_control_is_its_definition(alpha):
    probs, labels = labelled(1)
    losses = missed(probs, labels, GRID)
    chosen = control_risk(false_negative_rate(probs, labels, GRID), GRID, alpha=alpha, bound=1)
    good = [j for j in range(len(GRID)) if (losses[:, j].sum() + 1) / 51 <= alpha]
    assert int(chosen.index) == good[0] and float(chosen.parameter) == GRID[good[0]]
    np.testing.assert_allclose(chosen.risk, losses[:, good[0]].mean(), rtol=1e-6)


def test_whole_numbers_are_compared_exactly():
    """9 rows, bound 1, alpha 0.1: (0 + 1) / 10 is 0.1 exactly, as 199 rows with 19 losses are."""
    for rows, lost in ((9, 0), (199, 19)):
        for more in (0, 1):
            losses = np.zeros((rows, 2), np.float32)
            losses[: lost + more, 0] = 1
            assert int(control_risk(losses, np.arange(2.0), alpha=0.1, bound=1).index) == more


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool, np.float16])
def test_losses_of_any_kind(dtype, unchecked):
    """Whole numbers stay below the parameters' fractions, and halves add up to more than 2,048."""
    losses = np.zeros((5000, 3), dtype)
    losses[:3000, 0], losses[:499, 1] = 1, 1
    chosen = control_risk(losses, np.array([0.25, 0.5, 0.75]), alpha=0.1, bound=1)
    assert chosen.parameter == 0.5 and chosen.risk == np.float32(0.0998)
    expected = hoeffding_bentkus(losses.astype(np.float32), alpha=0.1)
    np.testing.assert_array_equal(hoeffding_bentkus(losses, alpha=0.1), expected)


def test_losses_in_another_unit():
    """Ten times the losses, the bound and alpha choose the same."""
    losses = false_negative_rate(*labelled(1), GRID)
    chosen = [int(control_risk(unit * losses, GRID, alpha=unit * 0.25, bound=unit).index) for unit in (1, 8)]
    assert chosen[0] == chosen[1]


def test_of_misses_it_is_split_conformal():
    rng = np.random.default_rng(2)
    pred = bc.Categorical((2 * rng.normal(size=(1, 60, 4))).astype(np.float32))
    targets = rng.integers(4, size=60).astype(np.int32)
    scores = np.sort(np.asarray(lac().measure(pred, targets, None)))
    losses = (scores[:, None] > scores[None]).astype(np.float32)
    for alpha in (0.05, 0.1, 0.2):
        split = fit_split(pred, targets, lac(), alpha=alpha)
        assert float(control_risk(losses, scores, alpha=alpha, bound=1).parameter) == float(split.threshold)
    regression = bc.Gaussian(np.zeros((1, 60, 1), np.float32), np.ones((1, 60, 1), np.float32))
    residuals = rng.normal(size=(60, 1)).astype(np.float32)
    widths = np.sort(abs(residuals[:, 0]))
    chosen = control_risk((widths[:, None] > widths[None]).astype(np.float32), widths, alpha=0.1, bound=1)
    assert chosen.parameter == fit_split(regression, residuals, absolute(), alpha=0.1).threshold[0]


def test_risk_is_controlled():
    """Mean loss of new rows over 1,000 repetitions at most alpha, and above alpha - 2 / (n + 1) less the grid's step."""
    repetitions, rows, new, grid = 1000, 120, 30, jnp.linspace(0, 1, 201)

    @jax.jit
    @jax.vmap
    def run(key):
        one, two = jax.random.split(key)
        probs = jax.random.uniform(one, (rows + new, 5))
        losses = false_negative_rate(probs, jax.random.uniform(two, probs.shape) < probs**2, grid)
        chosen = jnp.array([control_risk(losses[:rows], grid, alpha=a, bound=1).index for a in ALPHAS])
        return losses[rows:, chosen].mean(0)

    risks = np.asarray(run(jax.random.split(jax.random.key(1), repetitions)))
    for alpha, risk in zip(ALPHAS, risks.T):
        error = risk.std() / np.sqrt(repetitions)
        assert alpha - 2 / (rows + 1) - 0.005 - 3.3 * error <= risk.mean() <= alpha + 3.3 * error, (alpha, risk.mean())


def test_p_values_are_the_definition():
    rng = np.random.default_rng(3)
    losses = rng.uniform(size=(40, 12)).astype(np.float32) * np.linspace(0, 1, 12, dtype=np.float32)
    for alpha in (0.1, 0.3):
        expected = []
        for column in losses.T.astype(float):
            r, n = min(column.mean(), alpha), len(column)
            h = (r * math.log(r / alpha) if r else 0) + (1 - r) * math.log((1 - r) / (1 - alpha))
            tail = sum(math.comb(n, j) * alpha**j * (1 - alpha) ** (n - j) for j in range(math.ceil(column.sum()) + 1))
            expected.append(min(math.exp(-n * h), math.e * tail, 1))
        np.testing.assert_allclose(hoeffding_bentkus(losses, alpha=alpha), expected, rtol=2e-5)
    # No loss in 40 rows, by hand: Hoeffding gives 0.9^40, Bentkus e times that.
    np.testing.assert_allclose(hoeffding_bentkus(np.zeros((40, 1)), alpha=0.1), [0.9**40], rtol=1e-5)


def test_p_values_equal_mapie():
    losses = (np.arange(200)[:, None] < np.array([0, 5, 10, 15, 20, 30])).astype(np.float32)
    got = hoeffding_bentkus(losses, alpha=0.1)
    # MAPIE 1.6.0: mapie.risk_control.methods.compute_hoeffding_bentkus_p_value(losses.mean(0), 200, 0.1)
    np.testing.assert_allclose(got, [7.0550791e-10, 1.0522994e-4, 2.1939932e-2, 0.38891935, 1, 1], rtol=1e-5)
    methods = pytest.importorskip("mapie.risk_control.methods")
    peer = methods.compute_hoeffding_bentkus_p_value(losses.astype(float).mean(0), 200, 0.1)
    np.testing.assert_allclose(got, np.ravel(peer), rtol=1e-5)


def test_families_of_hypotheses_by_hand():
    p = np.array([0.3, 0.001, 0.06, 0.02, 0.01], np.float32)
    assert fixed_sequence(p, 0.05).tolist() == [False, False, False, True, True]
    assert bonferroni(p, 0.05).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("test", [bonferroni, fixed_sequence])
def test_learn_then_test_errs_at_most_delta(test):
    """Share of 1,000 repetitions in which some certified setting has a risk above alpha: at most the 99.9 % of delta."""
    repetitions, rows, alpha, delta = 1000, 200, 0.1, 0.1
    risk = jnp.concatenate([jnp.array([0.3, 0.15, 0.101]), jnp.linspace(0.1, 0.02, 7)[1:]])

    @jax.jit
    @jax.vmap
    def run(key):
        losses = (jax.random.uniform(key, (rows, 1)) < risk).astype(jnp.float32)
        return learn_then_test(losses, alpha=alpha, delta=delta, test=test).certified

    certified = np.asarray(run(jax.random.split(jax.random.key(2), repetitions)))
    wrong = int(certified[:, np.asarray(risk) > alpha].any(1).sum())
    assert wrong <= binom.ppf(0.999, repetitions, delta)
    assert certified[:, -1].mean() > 0.95  # and not by certifying nothing


def test_learn_then_test_takes_losses_that_are_not_monotone():
    losses = np.zeros((200, 3), np.float32)
    losses[:100, 1] = 1
    found = learn_then_test(losses, alpha=0.1, delta=0.05)
    assert found.certified.tolist() == [True, False, True] and float(found.p_values[1]) == 1
    assert not learn_then_test(losses[:5], alpha=0.1, delta=0.05).certified.any()  # too few rows: none


def test_traced_values_that_are_undefined_are_nan():
    losses = np.tile(np.array([1, 0.5, 0], np.float32), (50, 1))
    choose = jax.jit(lambda x: control_risk(x, jnp.arange(3.0), alpha=0.1, bound=1))
    assert float(choose(losses).parameter) == 2
    broken = jnp.asarray(losses).at[4, 0].set(jnp.nan)
    for bad in (losses[:, ::-1], losses[:5], broken):  # rising, too few rows, NaN
        assert np.isnan(choose(bad).parameter) and np.isnan(choose(bad).risk)
    p = jax.jit(lambda x: hoeffding_bentkus(x, alpha=0.1))(broken)
    assert np.isnan(p).tolist() == [True, False, False]


def test_bad_input(unchecked):
    losses = np.tile(np.array([1, 0.5, 0], np.float32), (50, 1))
    control = lambda losses, alpha=0.1, parameters=3, bound=1: control_risk(
        losses, np.arange(parameters), alpha=alpha, bound=bound
    )
    with pytest.raises(
        ValueError, match=r"`losses` must never increase .* 50 of 50 rows that do, first at 0\. .*learn_th"
    ):
        control(losses[:, ::-1])
    with pytest.raises(
        ValueError, match=r"`losses` must be finite and in \[-inf, 0\.5\], got values from 0\.0 to 1\.0"
    ):
        control(losses, bound=0.5)
    with pytest.raises(ValueError, match="`losses` must be finite"):
        control(losses * np.nan)
    with pytest.raises(ValueError, match=r"`losses` must be finite and in \[0, 1\], got values from 0\.0 to 2\.0"):
        learn_then_test(2 * losses, alpha=0.1, delta=0.1)
    for bad in (losses[:0], losses[0]):
        with pytest.raises(ValueError, match=r"`losses` must have shape \(rows, settings\), with at least one of each"):
            control(bad)
    with pytest.raises(ValueError, match=r"`parameters` must have shape \(3,\), one per column .* got \(4,\)\. Pass"):
        control(losses, parameters=4)
    with pytest.raises(ValueError, match=r"`alpha` must be at least 0\.167, .* got 0\.1\. Use more rows"):
        control(losses[:5])
    with pytest.raises(ValueError, match=r"`alpha` must be at least 0\.51, .* got 0\.1\. Add more conservative"):
        control(losses[:, :2], parameters=2)
    for alpha in (0, 1, math.nan):
        with pytest.raises(ValueError, match=r"`alpha` must be a number in \(0, 1\), got .* is the risk allowed"):
            control(losses, alpha=alpha)
        with pytest.raises(ValueError, match=r"`delta` must be a number in \(0, 1\), got"):
            learn_then_test(losses, alpha=0.1, delta=alpha)
