"""False-positive rates with intervals in which nothing is drawn, and thresholds."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, norm

from bayescal.detection import WORDS, detection_rates, detection_threshold, evaluate_detection
from bayescal.metrics import fpr_at_tpr

pytestmark = pytest.mark.core

RATES = ("fpr95_out", "fpr95_in")


def width(estimate):
    return (estimate.high - estimate.low) / 2 / 1.96


def test_interval_by_hand():
    """Outside 0..99 and inside 0..99 in halves: the threshold is 5, and the interval's order statistics are known."""
    outside, inside = np.arange(100.0), np.arange(0, 100, 0.5)
    found = evaluate_detection(inside, {"it": outside})["it"]["fpr95_out"]
    assert found.value == 190 / 200  # inside of at least 5
    assert [binom.ppf(q, 100, 0.95) for q in (0.025, 0.975)] == [90, 99]
    # of outside 90 rows are at least 10, where 180 of inside are; 100 rows at least 0, where all are
    z2 = 1.959963984540054**2
    centre = (0.95 + z2 / 400) / (1 + z2 / 200)
    half = math.sqrt(z2 * (0.95 * 0.05 / 200 + z2 / 4 / 200**2)) / (1 + z2 / 200)
    low = 0.95 - math.hypot(0.95 - (centre - half), 0.95 - 0.9)
    high = 0.95 + math.hypot(centre + half - 0.95, 1 - 0.95)
    np.testing.assert_allclose([found.low, found.high], [low, min(high, 1)], rtol=1e-12)


def test_an_interval_depends_on_its_own_sets_alone(rng):
    inside, near, far = rng.normal(size=200), 1 + rng.normal(size=100), 2 + rng.normal(size=150)
    alone = evaluate_detection(inside, {"near": near})["near"]
    assert alone["fpr95_out"].low < alone["fpr95_out"].value < alone["fpr95_out"].high
    for outside in ({"near": near, "far": far}, {"far": far, "near": near}, {"x": far, "y": far[:9], "near": near}):
        found = evaluate_detection(inside, outside)["near"]
        assert [found[m] for m in RATES] == [alone[m] for m in RATES]  # low and high too, to the bit
        for m in set(WORDS) - set(RATES):
            np.testing.assert_allclose(found[m].value, alone[m].value, rtol=1e-12)
        np.testing.assert_allclose(found["auroc"][:3], alone["auroc"][:3], rtol=1e-12)
    turned = evaluate_detection(inside, {"far": far, "near": near}, groups={"g": ["near", "far"]})
    again = evaluate_detection(inside, {"near": near, "far": far}, groups={"g": ["far", "near"]})
    for name in ("g, mean of sets", "g, pooled"):
        for m in RATES:
            np.testing.assert_allclose(turned[name][m][:3], again[name][m][:3], rtol=1e-12)


def test_the_other_way_round(rng):
    inside, outside = rng.normal(size=200), 1 + rng.normal(size=150)
    one, other = evaluate_detection(inside, {"it": outside})["it"], evaluate_detection(-outside, {"it": -inside})["it"]
    np.testing.assert_allclose(one["fpr95_out"][:3], other["fpr95_in"][:3], rtol=1e-12)
    np.testing.assert_allclose(one["fpr95_in"][:3], other["fpr95_out"][:3], rtol=1e-12)


def test_widths_are_those_of_the_delta_method():
    """Uniform scores, for which all is known: of one set, of a mean, of a pool, and with heavier shifted rows."""
    n, m = 4000, 3000
    uniform = lambda n: (np.arange(n) + 0.5) / n
    inside, near, far = uniform(n), 0.3 + uniform(m), 0.6 + uniform(m)
    found = evaluate_detection(inside, {"near": near, "far": far}, groups={"g": ["near", "far"]})
    quantile = 0.05 * 0.95 / m
    np.testing.assert_allclose(width(found["near"]["fpr95_out"]), math.sqrt(0.65 * 0.35 / n + quantile), rtol=0.04)
    # a row of inside counts in both, in near's alone, or in none: 0.35, 0.3, 0.35
    counted = 0.35 + 0.3 / 4 - 0.5**2
    assert found["g, mean of sets"]["fpr95_out"].value == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(
        width(found["g, mean of sets"]["fpr95_out"]), math.sqrt(counted / n + quantile / 2), rtol=0.04
    )
    # the threshold of inside moves both sets' shares, 0.65 and 0.35, at once
    expected = math.sqrt((0.65 * 0.35 * 2) / 4 / m + 0.05 * 0.95 / n)
    np.testing.assert_allclose(width(found["g, mean of sets"]["fpr95_in"]), expected, rtol=0.04)
    assert found["g, pooled"]["fpr95_in"][:3] == pytest.approx(found["g, mean of sets"]["fpr95_in"][:3], rel=1e-12)
    # a tenth of near lies below 0.4 and none of far: the pool's 5 % point, where inside's share is 0.6
    expected = math.sqrt(0.6 * 0.4 / n + 0.1 * 0.9 / 4 / m * 4)  # the pool's density there is 1/2
    np.testing.assert_allclose(width(found["g, pooled"]["fpr95_out"]), expected, rtol=0.04)
    shifted = {"shifted": {"s": 0.6 + uniform(500)}, "shifted_share": 0.5}
    found = evaluate_detection(inside, {"near": near}, **shifted)["near"]
    # flagged from 0.35 on: 0.65 of inside and all shifted rows
    expected = math.sqrt(0.65 * 0.35 / 4 / n + quantile / 4)
    np.testing.assert_allclose(width(found["fpr95_out"]), expected, rtol=0.04)
    # passed up to 1.5, where a tenth of the shifted rows is beyond: 0.05 is half of it; near ends before
    assert found["fpr95_in"].value == 1 and 1 - found["fpr95_in"].low < 0.002


def test_fewest_rows_of_the_positive_class(rng):
    """0.95^72 < 0.025: of fewer rows all may lie above the true threshold. How many rows are counted does not matter."""
    inside, outside = rng.normal(size=400), 1 + rng.normal(size=72)
    for positive, other, m in ((outside, inside, "fpr95_out"), (inside[:72], outside, "fpr95_in")):
        for rows, counted, known in ((72, 400, True), (71, 400, False), (72, 3, True)):
            own, rest = positive[:rows], other[:counted]
            pair = (own, {"it": rest}) if m == "fpr95_in" else (rest, {"it": own})
            estimate = evaluate_detection(*pair)["it"][m]
            assert (estimate.low is not None) == (estimate.high is not None) == known
            assert not known or estimate.low <= estimate.value <= estimate.high


def test_separated_sets_have_the_bound_of_a_count():
    found = evaluate_detection(np.arange(300.0), {"it": 1000 + np.arange(200.0)})["it"]
    assert found["fpr95_out"][:2] == (0, 0) and found["fpr95_in"][:2] == (0, 0)
    np.testing.assert_allclose(found["fpr95_out"].high, 1.96**2 / (300 + 1.96**2), rtol=1e-3)
    np.testing.assert_allclose(found["fpr95_in"].high, 1.96**2 / (200 + 1.96**2), rtol=1e-3)


def test_weights_that_round_reach_their_rate(rng):
    """Where all rows weigh alike, but for rounding, the threshold is that of rows that weigh 1."""
    for n, k in [(int(a), int(b)) for a, b in rng.integers(1, 40, (60, 2))]:
        inside, shifted, outside = rng.normal(size=n), rng.normal(size=k), rng.normal(size=50)
        plain, weighted = (
            evaluate_detection(inside, {"it": outside}, shifted={"s": shifted}, shifted_share=share)["it"]
            for share in (None, k / (n + k))
        )
        for m in RATES:
            assert weighted[m].value == pytest.approx(plain[m].value, abs=1e-12)


def test_thresholds_keep_what_they_say(rng):
    validation = rng.permutation(np.arange(1, 101))
    assert detection_threshold(validation) == 95 and detection_threshold(validation, tpr=1.0) == 100
    assert detection_threshold(validation, tpr=0.951) == 96 and detection_threshold(validation, tpr=0.003) == 1
    for n in (1, 7, 20, 40, 1000):
        scores = rng.normal(size=n).round(1)
        threshold = detection_threshold(scores)
        assert (scores <= threshold).mean() >= 0.95
        lower = scores[scores < threshold]
        assert not len(lower) or (scores <= lower.max()).mean() < 0.95  # the smallest that does
    assert detection_threshold(np.array([3.0, 3, 3])) == 3  # ties are kept together


def test_smallest_threshold_is_a_row():
    validation = np.arange(100.0)
    assert detection_threshold(validation, tpr=1e-12) == 0 and detection_threshold(validation, tpr=5e-324) == 0
    assert detection_threshold(validation, tpr=0.07) == 6  # 0.07 * 100 is a little more than 7


def test_thresholds_are_those_of_the_false_positive_rate(rng):
    """One rule: what `fpr_at_tpr` passes at its threshold, and what is not above `detection_threshold`."""
    for tpr in (1e-12, 0.05, 0.07, 0.29, 0.58, 0.95, 0.951, 1.0):
        for n in (1, 20, 100, 999, 1000):
            inside, outside = rng.normal(size=(2, n)).round(2)
            passed = (outside <= detection_threshold(inside, tpr=tpr)).mean()
            scores, positive = -np.append(inside, outside), np.arange(2 * n) < n
            assert float(fpr_at_tpr(scores, positive, tpr=tpr)) == pytest.approx(passed, abs=1e-12)


def test_rates(rng):
    threshold = detection_threshold(np.arange(100.0))
    found = detection_rates(threshold, np.array([0, 94.0, 95, 200]), {"far": jnp.arange(60, 160), "one": np.array([7])})
    assert [found[k].value for k in ("inside", "far", "one")] == [0.5, 0.65, 0]  # a row at the threshold is kept
    share, n, z = 0.65, 100, norm.ppf(0.975)
    centre, half = share + z**2 / 2 / n, z * math.sqrt(share * (1 - share) / n + z**2 / 4 / n**2)
    np.testing.assert_allclose(found["far"][1:3], [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)])
    assert found["one"].high > 0.7 and found["one"].n == 1 and "share above 94" in found["far"].convention


def coverage(draw, sets, name="a"):
    """metric -> share of data sets whose interval holds the truth, of those that have one (NaN = none has)."""
    truth = draw(np.random.default_rng(1), 1000)
    rng, found = np.random.default_rng(0), []
    for _ in range(sets):
        found.append(draw(rng, 1)[name])
    known = {m: [x[m].low <= truth[name][m].value <= x[m].high for x in found if x[m].low is not None] for m in WORDS}
    assert all(len(x) in (0, sets) for x in known.values())
    return {m: float(np.mean(x)) if x else math.nan for m, x in known.items()}


def rows(inside, outside, shift, spread, **settings):
    """A function that draws normal scores of so many rows."""

    def draw(rng, times):
        sizes = [max(n * times, 200_000) if times > 1 else n for n in (inside, outside)]
        pair = {name: shift + i / 2 + spread * rng.normal(size=sizes[1]) for i, name in enumerate("ab")}
        return evaluate_detection(rng.normal(size=sizes[0]), pair, **settings)

    return draw


def test_coverage_of_a_small_set():
    found = coverage(rows(100, 72, 1.5, 1.0), 300)
    assert found["fpr95_out"] > 0.93 and found["fpr95_in"] > 0.93


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (1.5, 1.0), (2.5, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize(
    ("inside", "outside"),
    [(100, 20), (20, 100), (1000, 30), (1000, 72), (72, 1000), (1000, 100), (100, 1000), (100, 100)],
)
def test_coverage_of_small_sets(inside, outside, shift, spread):
    """1,000 data sets of 20 to 100 rows of a class, about five seconds each: held often enough, or not given."""
    found = coverage(rows(inside, outside, shift, spread), 1000)
    print(inside, outside, shift, spread, found)
    assert math.isnan(found["aupr_out"]) and math.isnan(found["aupr_in"])
    assert math.isnan(found["auroc"]) == (min(inside, outside) < 100) and not found["auroc"] < 0.92
    for m, positive in (("fpr95_out", outside), ("fpr95_in", inside)):
        assert math.isnan(found[m]) == (positive < 72) and not found[m] < 0.935


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("name", ["a", "g, mean of sets", "g, pooled"])
def test_coverage(shift, name):
    """1,000 data sets of 600 inside rows and 2 x 300 outside, normal, half a unit apart; about ten seconds each."""
    found = coverage(rows(600, 300, shift, 1.0, groups={"g": ["a", "b"]}, outside_share=0.2), 1000, name)
    print(shift, name, found)
    assert all(0.93 <= share <= (0.99 if m in RATES else 0.975) for m, share in found.items()), found


@pytest.mark.slow
def test_coverage_where_shifted_rows_weigh_more():
    spectrum = {"groups": {"g": ["a", "b"]}, "shifted_share": 0.5}

    def draw(rng, times):
        shifted = 0.5 + rng.normal(size=150 if times == 1 else 100_000)
        return rows(300, 100, 1.5, 1.0, shifted={"s": shifted}, **spectrum)(rng, times)

    for name in ("a", "g, mean of sets", "g, pooled"):
        found = coverage(draw, 1000, name)
        print(name, found)
        assert min(found[m] for m in RATES) >= 0.935
