"""Metrics whose bins follow the data (equal mass, swept, classwise), and what these and decompositions refuse."""

import math

import jax
import numpy as np
import oracles_adaptive as oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows_adaptive import FORMS, NIXON, ROWS, RULES, all_nixon, everything, forecasts, swept

import bayescal as bc
from bayescal.binning import reliability
from bayescal.metrics.adaptive import (
    classwise_equal_mass_calibration_error,
    equal_mass_calibration_error,
    equal_mass_histogram,
    nixon_calibration_error,
    squared_equal_mass_calibration_error,
)
from bayescal.metrics.corp import consistency_band, corp, murphy, refinement, reliability_curve
from bayescal.metrics.events import one_class
from bayescal.metrics.sweep import sweep_calibration_error
from bayescal.metrics.whole import whole
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


def of_loops(probability, outcome, weights):
    out = {}
    for ties, rule in RULES.items():
        bins = rule(probability, weights, 15)
        for name, form in FORMS.items():
            out[f"{ties} {name}"] = oracles.norm_of_gaps(bins, probability, outcome, weights, **form)
        out[f"{ties} square"] = oracles.debiased_square(bins, probability, outcome, weights)
        out[f"{ties} mass"] = [sum(float(weights[i]) * s for i, s in rows) for rows in bins]
        out[f"{ties} hits"] = [sum(float(weights[i] * outcome[i]) * s for i, s in rows) for rows in bins]
    return out


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [None, "continuous", "sparse"])
def test_against_loops(rng, ties, weighted):
    """With ties, with weights, and with seven rows that weigh anything for fifteen bins."""
    probability, outcome = forecasts(rng, ties)
    weights = rng.uniform(0.5, 2, ROWS).astype(np.float32) if weighted else None
    if weighted == "sparse":
        weights = np.where(np.arange(ROWS) % 29 == 3, 1, 0).astype(np.float32)
    ours = everything(probability, outcome, weights)
    expected = of_loops(probability, outcome, np.ones(ROWS) if weights is None else weights)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_by_hand():
    """Four rows that weigh anything, in fifteen bins."""
    weights = (np.arange(ROWS) < 4).astype(np.float32)
    probability = np.resize(np.array([0.1, 0.2, 0.3, 0.4], np.float32), ROWS)
    outcome = np.resize(np.array([0, 0, 1, 1], np.float32), ROWS)
    ours = everything(probability, outcome, weights)
    for ties in RULES:  # gaps 0.1, 0.2, -0.7, -0.6; bins of one row have no noise that could be taken off
        np.testing.assert_allclose(ours[f"{ties} l1"], 0.4, rtol=1e-6)
        np.testing.assert_allclose(ours[f"{ties} l2"], math.sqrt(0.9 / 4), rtol=1e-6)
        np.testing.assert_allclose(ours[f"{ties} max"], 0.7, rtol=1e-6)
        assert ours[f"{ties} square"] == 0
    half = everything(np.full(ROWS, 0.5, np.float32), outcome, weights)  # one group: gap 0, noise 0.25 / 3
    assert half["grouped l1"] == 0 and half["grouped mass"].max() == 4
    np.testing.assert_allclose(half["grouped square"], -0.25 / 3, rtol=1e-6)
    np.testing.assert_allclose(half["grouped debiased l1"], -math.sqrt(0.25 / 4 * 2 / math.pi), rtol=1e-6)
    assert half["grouped debiased l2"] == 0
    one = everything(probability, outcome, (np.arange(ROWS) == 5).astype(np.float32))
    np.testing.assert_allclose([one["grouped l1"], one["rank max"]], 0.2, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
@example(53272)  # the debiased root is 0.0037 here: one float32 rounding of its square is 2e-4 of it
def test_row_order_does_not_matter(seed):
    """Half of the rows share one probability, which every cut in the middle parts: a stable sort alone would not do."""
    rng = np.random.default_rng(seed)
    probability, outcome = forecasts(rng, ties=seed % 2 == 0)
    probability[: ROWS // 2] = 0.5
    by_outcome = np.lexsort((outcome, probability))
    by_failure = np.lexsort((1 - outcome, probability))
    naive = [
        oracles.norm_of_gaps([[(i, 1.0) for i in part] for part in np.array_split(order, 15)], *columns)
        for order in (by_outcome, by_failure)
        for columns in [(probability, outcome, np.ones(ROWS))]
    ]
    assert abs(naive[0] - naive[1]) > 1e-4 or seed % 2 == 0
    ours = [everything(probability[o], outcome[o], None) for o in (by_outcome, by_failure, rng.permutation(ROWS))]
    for name in ours[0]:
        for other in ours[1:]:
            if name.endswith(
                "debiased l2"
            ):  # a root of a difference: rounding is that of the square, which is compared
                np.testing.assert_allclose(other[name] ** 2, ours[0][name] ** 2, rtol=1e-5, atol=2e-8, err_msg=name)
            else:
                np.testing.assert_allclose(other[name], ours[0][name], rtol=1e-5, atol=2e-7, err_msg=name)
    for scheme in ("mass", "width"):
        values = [swept(probability[o], outcome[o], None, scheme) for o in (by_outcome, by_failure)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_a_parted_tie_is_the_mean_over_orders(rng):
    """Bins by rank hold the mean, over orders of the rows, of what each order would put there."""
    probability, outcome = forecasts(rng, ties=True)
    mean = np.zeros(15)
    for _ in range(2000):
        order = rng.permutation(ROWS)
        order = order[np.argsort(probability[order], kind="stable")]
        mean += [outcome[part].sum() / 2000 for part in np.array_split(order, 15)]
    np.testing.assert_allclose(everything(probability, outcome, None)["rank hits"], mean, atol=0.15)
    assert np.abs(mean - np.round(mean)).max() > 0.1


def test_no_row_is_lost_and_ties_stay_together(rng):
    """A forecaster with three probabilities has three bins; their counts add up, whatever the number of bins."""
    probability = rng.choice(np.array([0.1, 0.9, 1.0], np.float32), ROWS, p=[0.1, 0.2, 0.7])
    outcome = (rng.uniform(size=ROWS) < probability - 0.05).astype(np.float32)
    ours = everything(probability, outcome, None)
    mass = np.asarray(ours["grouped mass"])
    np.testing.assert_array_equal(mass[mass > 0], np.unique(probability, return_counts=True)[1])
    np.testing.assert_allclose(ours["rank mass"], [14] * 5 + [13] * 10, rtol=1e-6)
    for num_bins in (1, 10):
        sums = equal_mass_histogram(probability, outcome, num_bins=num_bins)
        assert sums.weight.sum() == ROWS and (np.asarray(sums.weight) > 0).sum() == min(num_bins, 3)
        np.testing.assert_allclose(np.nansum(reliability(sums).accuracy * sums.weight), outcome.sum(), rtol=1e-6)
    assert np.isnan(reliability(sums).accuracy).sum() == 7


@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_repetition(rng, ties):
    """Equal probabilities grouped: the plain errors and the sweep. (Debiased, weights are not counts.)"""
    probability, outcome = forecasts(rng, ties)
    weights = rng.multinomial(ROWS, np.full(ROWS, 1 / ROWS)).astype(np.float32)
    rows = rng.permutation(np.repeat(np.arange(ROWS), weights.astype(int)))
    assert (weights == 0).any() and weights.max() > 2
    padding = np.where(weights == 0, np.nan, 1).astype(np.float32)  # rows of weight 0 may hold anything
    weighted, repeated = (
        everything(probability * padding, outcome * padding, weights),
        everything(probability[rows], outcome[rows], np.ones(ROWS, np.float32)),
    )
    scaled = everything(probability * padding, outcome * padding, weights / 128)
    plain = everything(probability[rows], outcome[rows], None)
    for name in ("grouped l1", "grouped l2", "grouped max"):
        np.testing.assert_allclose(weighted[name], repeated[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(scaled[name], weighted[name], rtol=1e-5, err_msg=name)
    for name, value in plain.items():
        np.testing.assert_allclose(repeated[name], value, rtol=1e-5, atol=2e-7, err_msg=name)
    for scheme in ("mass", "width"):
        ours = swept(probability * padding, outcome * padding, weights, scheme)
        np.testing.assert_allclose(ours, swept(probability[rows], outcome[rows], None, scheme), rtol=1e-5)


def test_duplicating_all_rows(rng):
    probability, outcome = forecasts(rng)
    twice = np.arange(ROWS) % (ROWS // 2)
    once = (np.arange(ROWS) < ROWS // 2).astype(np.float32)
    single, double = everything(probability, outcome, once), everything(probability[twice], outcome[twice], None)
    for name in ("grouped l1", "grouped l2", "grouped max"):
        np.testing.assert_allclose(double[name], single[name], rtol=1e-5, err_msg=name)
    assert float(double["grouped square"]) > float(single["grouped square"])  # twice the rows, half the noise


def test_many_rows_keep_their_digits(rng):
    rows = 2**17
    probability = rng.uniform(0.5, 1, rows).astype(np.float32)
    outcome = (rng.uniform(size=rows) < probability - 0.01 * np.sin(20 * probability)).astype(np.float32)
    order = np.argsort(probability, kind="stable")
    gaps = [np.sum(probability[part].astype(float) - outcome[part]) for part in np.array_split(order, 16)]
    sums = equal_mass_histogram(probability, outcome, num_bins=16)
    np.testing.assert_allclose(np.abs(sums.gap).sum(), np.abs(gaps).sum(), rtol=1e-5)
    np.testing.assert_array_equal(sums.weight, rows / 16)


@pytest.mark.parametrize("scheme", ["mass", "width"])
@pytest.mark.parametrize("ties", [False, True])
def test_sweep_against_loops(rng, scheme, ties):
    numbers = []
    for power in (1, 3, 5):  # the steeper the curve, the more bins rise
        probability, _ = forecasts(rng, ties)
        curve = probability**power / (probability**power + (1 - probability) ** power)
        outcome = (rng.uniform(size=ROWS) < curve).astype(np.float32)
        bins, number = oracles.sweep(probability, outcome, np.ones(ROWS), scheme, 60)
        value, ours = swept(probability, outcome, None, scheme)
        numbers.append(int(ours))
        assert int(ours) == number
        expected = oracles.norm_of_gaps(bins, probability, outcome, np.ones(ROWS))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert len(set(numbers)) > 1 and max(numbers) > 3


def test_sweep_ends():
    """At a decrease, at as many bins as rows, or where it is told to; a decrease later on does not matter."""
    probability = np.linspace(0.01, 0.99, ROWS).astype(np.float32)
    assert int(swept(probability, np.ones(ROWS, np.float32), None)[1]) == 60
    assert int(swept(probability, (probability > 0.5).astype(np.float32), None)[1]) == 60
    assert int(swept(probability, (probability < 0.5).astype(np.float32), None)[1]) == 1
    few = swept(probability, np.ones(ROWS, np.float32), (np.arange(ROWS) < 3).astype(np.float32))
    np.testing.assert_allclose(few[0], 1 - probability[:3].mean(), rtol=1e-6)


def predictions(rng):
    logits = 2 * rng.normal(size=(ROWS, 4))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs.astype(np.float32), rng.integers(0, 3, ROWS)  # one class never happens


def test_nixon_against_loops(rng):
    probs, targets = predictions(rng)
    weights = rng.uniform(0.5, 2, ROWS).astype(np.float32)
    ours = all_nixon(probs, targets, weights)
    assert len({round(float(x), 4) for x in ours.values()}) == len(NIXON)  # no setting is ignored
    for name, form in NIXON.items():
        form = {k: v for k, v in form.items() if k != "ties"}
        rule = oracles.rank_bins if "rank" in name else oracles.grouped_bins
        expected = oracles.nixon(probs, targets, weights, 15, rule=rule, **form)
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, err_msg=name)
    relabelled = all_nixon(probs[:, ::-1], 3 - targets, weights)
    for name in NIXON:
        np.testing.assert_allclose(relabelled[name], ours[name], rtol=1e-5)


def test_every_setting_changes_the_value(rng):
    """A threshold or a norm that is passed on to nobody has been seen elsewhere."""
    probability, outcome = forecasts(rng)
    ours = everything(probability, outcome, None)
    values = [float(ours[name]) for name in ours if "mass" not in name and "hits" not in name]
    assert len({round(x, 5) for x in values}) == len(values)
    curve = (rng.uniform(size=ROWS) < probability).astype(np.float32)
    by_mass, by_width = (swept(probability, curve, None, scheme)[0] for scheme in ("mass", "width"))
    assert abs(float(by_mass) - float(by_width)) > 1e-4
    terms = [murphy(probability, outcome, num_bins=n) for n in (5, 15)]
    assert terms[0].reliability != terms[1].reliability
    grid = np.round(probability, 1)
    assert murphy(grid, outcome, num_bins=10) != murphy(grid, outcome, num_bins=10, closed="left")


def test_in_evaluate(rng):
    probs, targets = predictions(rng)
    metrics = {
        "root": whole(equal_mass_calibration_error, one_class(1), norm=2, debiased=True),
        "sweep": whole(sweep_calibration_error, max_bins=60),
        "tace": classwise_equal_mass_calibration_error(threshold=0.01),
    }
    estimates = bc.evaluate(Probabilities(probs[None]), targets, metrics, batch_size=ROWS)
    confidence, correct = probs.max(1), (probs.argmax(1) == targets).astype(np.float32)
    expected = {
        "root": everything(probs[:, 1], (targets == 1).astype(np.float32), None)["grouped debiased l2"],
        "sweep": swept(confidence, correct, None)[0],
        "tace": all_nixon(probs, targets, np.ones(ROWS, np.float32))["tace"],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(estimates[name].value, value, rtol=1e-5, err_msg=name)
    assert estimates["root"].low < estimates["root"].value < estimates["root"].high
    assert estimates["sweep"].low is None and estimates["tace"].low is None
    assert estimates["root"].convention.startswith("class 1; equal-mass bins; num_bins = 15; norm = 2")
    assert estimates["root"].convention.endswith("ties = grouped; debiased = True")
    assert "probabilities above 0.01" in estimates["tace"].convention
    assert classwise_equal_mass_calibration_error(threshold=0.01) is metrics["tace"]


def test_intervals_and_bias(rng):
    """Of 100 data sets, the intervals hold a known gap of 0.1 (and of 0); debiased errors are right on average."""
    from bayescal.metrics.adaptive import _equal_mass_interval, _square_interval

    held, values = np.zeros(2), []
    for gap in (0.0, 0.1):
        for _ in range(50):
            probability = rng.uniform(0.15, 0.95, ROWS).astype(np.float32)
            outcome = (rng.uniform(size=ROWS) < probability - gap).astype(np.float32)
            low, high = _square_interval(probability, outcome)
            held += [low <= gap**2 <= high, 0]
            low, high = _equal_mass_interval(probability, outcome, norm=1, debiased=True)
            held += [0, low <= gap <= high]
            values.append(everything(probability, outcome, None))
    assert (held >= 90).all(), held
    for name in ("grouped square", "rank square"):
        x = np.array([float(v[name]) for v in values]).reshape(2, 50)
        np.testing.assert_array_less(np.abs(x.mean(1) - [0, 0.01]), 3.5 * x.std(1) / 50**0.5)
    plain = np.array([float(v["grouped l1"]) for v in values[:50]])
    debiased = np.array([float(v["grouped debiased l1"]) for v in values[:50]])
    assert plain.mean() > 0.08 and debiased.mean() < 0.7 * plain.mean()


def test_vmap_and_gradient_in_the_weights(rng):
    probability, outcome = forecasts(rng, ties=True)
    weights = rng.uniform(0.5, 2, (3, ROWS)).astype(np.float32)

    def square(w):
        return squared_equal_mass_calibration_error(probability, outcome, weights=w)

    together, slopes = jax.jit(jax.vmap(jax.value_and_grad(square)))(weights)
    alone = [everything(probability, outcome, w)["grouped square"] for w in weights]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-7)
    for i in range(0, ROWS, 40):
        step = np.float32(0.02) * (np.arange(ROWS) == i)
        moved = [everything(probability, outcome, weights[0] + sign * step)["grouped square"] for sign in (1, -1)]
        np.testing.assert_allclose((moved[0] - moved[1]) / 0.04, slopes[0][i], atol=2e-5)
    assert np.abs(slopes[0]).max() > 1e-4


def test_undefined_is_nan():
    empty = np.zeros(0, np.float32)
    none = np.zeros(ROWS, np.float32)
    half = np.full(ROWS, 0.5, np.float32)
    ours = everything(half, half, none)
    for name in ours:
        if "mass" not in name and "hits" not in name:
            assert np.isnan(ours[name]), name
    assert math.isnan(swept(half, half, none)[0])
    assert math.isnan(equal_mass_calibration_error(empty, empty)) and math.isnan(sweep_calibration_error(empty, empty))
    assert math.isnan(all_nixon(np.full((ROWS, 4), 0.25, np.float32), np.zeros(ROWS, int), none)["ace"])
    assert math.isnan(everything(np.where(np.arange(ROWS) == 3, np.nan, half), half, None)["grouped l1"])
    np.testing.assert_allclose(everything(half, np.ones(ROWS, np.float32), np.eye(ROWS)[5])["rank l1"], 0.5)


P, Y = np.array([0.25, 0.75], np.float32), np.array([0.0, 1.0], np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: equal_mass_calibration_error(P, Y, num_bins=0),
            "`num_bins` must be a whole number of at least 1, got 0",
        ),
        (lambda: equal_mass_calibration_error(P, Y, ties="even"), "`ties` must be 'grouped' or 'rank', got 'even'"),
        (lambda: equal_mass_calibration_error(P, Y, norm=0.5), "`norm` must be at least 1"),
        (
            lambda: equal_mass_calibration_error(P, Y, norm=3, debiased=True),
            "`debiased` needs `norm` 1 or 2, got norm 3",
        ),
        (lambda: equal_mass_calibration_error(P, Y[:, None]), "must be one axis of the same length, got"),
        (
            lambda: squared_equal_mass_calibration_error(P, Y, weights=np.ones(3)),
            "must be one axis of the same length, got",
        ),
        (lambda: sweep_calibration_error(P, Y, scheme="both"), "`scheme` must be 'mass' or 'width', got 'both'"),
        (lambda: sweep_calibration_error(P, Y, max_bins=0), "must be a whole number of at least 1, got 0"),
        (lambda: sweep_calibration_error(P, Y, norm=0), "`norm` must be at least 1"),
        (lambda: nixon_calibration_error(P, Y), "`probs` and `targets` must have shapes"),
        (lambda: nixon_calibration_error(P[:, None], Y, threshold=1.0), "`threshold` must lie in"),
        (
            lambda: nixon_calibration_error(P[:, None], Y, norm=math.inf),
            "`norm` must be finite for a mean over classes, got inf",
        ),
        (lambda: corp(P, Y, score="crps"), "`score` must be 'brier' or 'log', got 'crps'"),
        (lambda: corp(P * 2, Y), "`probability` must lie in .0, 1., got 1 of 2 outside, the first 1.5"),
        (lambda: corp(P * np.nan, Y), "`probability` must lie in .0, 1., got 2 of 2 outside, the first nan"),
        (lambda: murphy(P, Y + 1), "`outcome` must be 0 or 1, got 2.0"),
        (lambda: murphy(P, Y, num_bins=0), "`num_bins` must be a whole number"),
        (lambda: corp(P, Y[:1]), "must be one axis of the same length, got shapes"),
        (lambda: corp(P, Y, weights=np.array([-1, 2])), "`weights` must be finite, non-negative and not all zero"),
        (
            lambda: corp(P[:0], Y[:0]),
            "`weights` must be finite, non-negative and not all zero, got sum 0.0 over 0 rows",
        ),
        (lambda: refinement(P, Y, recalibration=" "), "`recalibration` must say what was fitted"),
        (lambda: reliability_curve(P, Y, level=1.0), "`level` must lie in .0, 1., got 1.0"),
        (lambda: consistency_band(equal_mass_histogram(P, Y), level=95), "`level` must lie in .0, 1., got 95"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
