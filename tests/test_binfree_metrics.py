"""Calibration metrics without bins: smooth, cumulative, and the kernel of yes-or-no events."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_binfree as oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_binfree import ROWS, events, kept, numbers, smooth_value, some_weights, stored_oracles, sums_of, two

import bayescal as bc
from bayescal.evaluate import measure
from bayescal.metrics import binfree
from bayescal.metrics.binfree import ks_error, ks_test, kuiper_error, kuiper_test, spiegelhalter_test
from bayescal.metrics.events import one_class, top_label
from bayescal.metrics.kernel import mmce
from bayescal.metrics.smooth import gap_field, smooth_calibration_error, smooth_curve
from bayescal.metrics.whole import whole
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


@jax.jit
def of_events(p, y, w):
    return {
        "ks": ks_error(p, y, weights=w),
        "kuiper": kuiper_error(p, y, weights=w),
        "mmce": mmce(p, y, weights=w),
        "narrow": mmce(p, y, weights=w, width=0.003),
        "unbiased": mmce(p, y, weights=w, estimator="U"),
    }


@pytest.mark.parametrize("sigma", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_smooth_error_against_loops(rng, sigma, ties):
    p, y = events(rng, ties)
    w = some_weights(rng)
    expected = oracles.smooth_calibration_error(*kept(w, p, y), sigma)
    np.testing.assert_allclose(smooth_value(p, y, w, sigma=sigma), expected, rtol=2e-3, atol=2e-5)


def test_smooth_fixed_point_against_loops(rng):
    p, y = events(rng)
    value, curve = smooth_value(p, y), smooth_curve(sums_of(p, y))
    assert abs(curve.residual.min()) > 0.03 < curve.residual.max()  # a sign change: not the mean gap alone
    assert value > abs((p - y).mean()) + 0.01
    np.testing.assert_allclose(value, oracles.smooth_fixed_point(*kept(np.ones_like(p), p, y)), atol=2e-5)
    np.testing.assert_allclose(curve.sigma, value, rtol=2e-6)  # a grid of widths would be off by up to half its step


def test_smooth_curve_against_loops_and_scipy(rng):
    from scipy.ndimage import gaussian_filter1d

    p, y = events(rng)
    w, sums, t = some_weights(rng), None, np.arange(3841) / 3840
    sums = sums_of(p, y, w)
    curve = smooth_curve(sums, sigma=0.07)
    q, z, v = kept(w, p, y)
    density, residual, outcome, confidence = (
        oracles.smoothed(q, v * x, 0.07, t) / v.sum() for x in (np.ones_like(q), q - z, z, q)
    )
    np.testing.assert_allclose(curve.t, t)
    np.testing.assert_allclose(curve.density, density, atol=1e-4)
    np.testing.assert_allclose(curve.residual, residual, atol=3e-5)
    np.testing.assert_allclose(curve.accuracy, outcome / density, atol=1e-4)
    np.testing.assert_allclose(curve.confidence, confidence / density, atol=1e-4)
    filtered = gaussian_filter1d(sums.gap / sums.weight.sum() * 3840, 0.07 * 3840, mode="reflect", truncate=8)
    np.testing.assert_allclose((curve.residual[1:] + curve.residual[:-1]) / 2, filtered, atol=2e-3)


def test_events_against_loops(rng):
    p, y = events(rng)
    w = some_weights(rng)
    ours, columns = numbers(of_events(p, y, w)), kept(w, p, y)
    np.testing.assert_allclose(ours["ks"], oracles.ks(*columns), rtol=1e-5)
    np.testing.assert_allclose(ours["kuiper"], oracles.kuiper(*columns), rtol=1e-5)
    np.testing.assert_allclose(ours["mmce"], oracles.mmce_square(*columns, 0.4, False) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(ours["narrow"], oracles.mmce_square(*columns, 0.003, False) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(ours["unbiased"], oracles.mmce_square(*columns, 0.4, True), rtol=1e-5, atol=1e-8)
    from sklearn.metrics.pairwise import laplacian_kernel

    q, z, v = columns
    gap = v * (z - q)
    second = np.sqrt(gap @ laplacian_kernel(q[:, None], gamma=1 / 0.4) @ gap) / v.sum()
    np.testing.assert_allclose(ours["mmce"], second, rtol=1e-5)


def test_tests_against_loops(rng):
    p, y = events(rng)
    w = some_weights(rng)
    q, z, v = kept(w, p, y)
    scale = oracles.cumulative_scale(q, v)
    for test, loop in ((ks_test, oracles.ks), (kuiper_test, oracles.kuiper)):
        ours = test(p, y, weights=w)
        np.testing.assert_allclose(ours[:2], [loop(q, z, v), loop(q, z, v) / scale], rtol=1e-9)
    ours = spiegelhalter_test(p, y, weights=w)
    np.testing.assert_allclose(ours.scaled, oracles.spiegelhalter(q, z, v), rtol=1e-9)
    np.testing.assert_allclose(ours.p_value, math.erfc(abs(ours.scaled) / math.sqrt(2)), rtol=1e-9)


def test_by_hand():
    # two rows, probabilities 0.2 and 0.6, of which the first happened: D = 0, 0.4, 0.1
    p, y, w = np.zeros(ROWS, np.float32), np.zeros(ROWS, np.float32), np.zeros(ROWS, np.float32)
    p[:2], y[0], w[:2] = (0.2, 0.6), 1, 1
    ours, k = numbers(of_events(p, y, w)), math.exp(-1)
    np.testing.assert_allclose([ours["ks"], ours["kuiper"]], [0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(ours["mmce"], math.sqrt(0.64 + 0.36 - 2 * 0.48 * k) / 2, rtol=1e-6)
    np.testing.assert_allclose(ours["unbiased"], -0.48 * k, rtol=1e-6)
    test = ks_test(p[:2], y[:2])
    np.testing.assert_allclose(test.scaled, 0.8 / math.sqrt(0.16 + 0.24), rtol=1e-6)
    z = (0.8 * 0.6 + 0.6 * 0.2) / math.sqrt(0.36 * 0.16 + 0.04 * 0.24)
    np.testing.assert_allclose(spiegelhalter_test(p[:2], y[:2]).scaled, z, rtol=1e-6)


def test_smooth_error_by_hand():
    one = np.float32([1.0])
    p, y = np.repeat(np.float32([0.75]), 8), np.tile(np.float32([1, 0]), 4)
    np.testing.assert_allclose(
        [smooth_value(p, y), smooth_value(p, y, sigma=0.03)], 0.25, rtol=1e-6
    )  # one sign: any width
    curve = smooth_curve(sums_of(p, y))
    near = ~np.isnan(curve.accuracy)
    np.testing.assert_allclose(curve.confidence[near], 0.75, rtol=1e-6)
    np.testing.assert_allclose(curve.accuracy[near], 0.5, rtol=1e-6)
    assert np.isnan(smooth_curve(sums_of(p, y), sigma=0.02).accuracy[0])
    np.testing.assert_allclose(np.trapezoid(curve.density, curve.t), 1, rtol=1e-6)
    # a wrong 1 and a wrong 0: half the difference of two reflected Gaussians, 2 (2 Phi(1 / 2 sigma) - 1/2 - Phi(3 / 2 sigma))
    value = smooth_value(np.float32([0, 1]), np.float32([1, 0]), sigma=0.3)
    np.testing.assert_allclose(value, 0.808838, rtol=1e-5)
    assert smooth_value(one, one) == 0  # right, and certain of it
    assert math.isnan(smooth_value(one, one, np.float32([0])))  # no rows
    np.testing.assert_allclose(smooth_value(one - np.float32(3e-4), one), 3e-4, rtol=1e-3)  # below the narrowest kernel


def test_stored_smooth_errors():
    oracle, inputs = stored_oracles()
    oracle = oracle["smooth_ece"]
    many = Probabilities(inputs["P"].astype(np.float32)[None]), inputs["Y"].astype(np.int32)
    binary = two(inputs["pb"].astype(np.float32)), inputs["yb"].astype(np.int32)
    top, fixed, first = (
        smooth_calibration_error(),
        smooth_calibration_error(sigma=0.05),
        smooth_calibration_error(events=one_class(1)),
    )
    sums = measure(*many, {"it": top})["it"]
    ours = [top.compute(sums), fixed.compute(sums), first.compute(measure(*binary, {"it": first})["it"])]
    exact = [
        oracle["ref_exact_fixed_point_[value,sigma]"][0],
        oracle["ref_exact_sigma_0.05"],
        oracle["ref_exact_fixed_point_binary_[value,sigma]"][0],
    ]
    np.testing.assert_allclose(ours, exact, rtol=1e-4)
    relplot = [
        oracle["relplot_smECE_top_label_[value,width]"][0],
        oracle["relplot_smECE_sigma_0.05"],
        oracle["relplot_smECE_binary_[value,width]"][0],
    ]
    np.testing.assert_allclose(ours, relplot, atol=1e-3)
    np.testing.assert_allclose(smooth_curve(sums).sigma, exact[0], rtol=1e-4)


def test_stored_events():
    oracle, inputs = stored_oracles()
    cumulative, kernels = oracle["bin_free_tests"], oracle["mmce_laplace_width_0.4"]
    p, y, w = inputs["pb"].astype(np.float32), inputs["yb"].astype(np.int32), np.ones(ROWS, np.float32)
    one = numbers(of_events(*one_class(1).read(two(p), y), w))
    top = numbers(of_events(*top_label().read(two(p), y), w))
    many = Probabilities(inputs["P"].astype(np.float32)[None])
    multi = numbers(of_events(*top_label().read(many, inputs["Y"].astype(np.int32)), w))
    ref = cumulative["ref"]
    close = dict(rtol=1e-5)
    np.testing.assert_allclose([one["ks"], one["kuiper"]], [ref["ks_max_abs"], ref["kuiper_range"]], **close)
    np.testing.assert_allclose(multi["mmce"], kernels["netcal_multiclass"], **close)
    np.testing.assert_allclose(multi["unbiased"], kernels["ref_unbiased_squared"], **close)
    np.testing.assert_allclose(top["mmce"], kernels["ref_binary_top_label"], **close)
    np.testing.assert_allclose(one["mmce"], kernels["ref_binary_positive_class"], **close)
    ks, kuiper, z = (test(inputs["pb"], inputs["yb"]) for test in (ks_test, kuiper_test, spiegelhalter_test))
    np.testing.assert_allclose(ks, [ref["ks_max_abs"], ref["ks_over_sigma"], ks.p_value], rtol=1e-12)
    expected = [cumulative[f"mcgrad_ecce{x}"] for x in ("(Kuiper range)", "_sigma", "_pvalue")]
    np.testing.assert_allclose(kuiper, expected, rtol=1e-12)
    np.testing.assert_allclose(z.scaled, ref["spiegelhalter_z"], rtol=1e-12)
    np.testing.assert_allclose(
        [ks.scaled, kuiper.scaled], [cumulative[f"mapie_{x}_stat"] for x in ("ks", "kuiper")], 1e-7
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_weights_are_repetition_and_order_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    p, y = events(rng)
    rows, order = rng.integers(0, 60, ROWS), rng.permutation(ROWS)
    counts = np.bincount(rows, minlength=ROWS).astype(np.float32)  # rows 60.. weigh nothing
    weighted = numbers(of_events(p, y, counts))
    repeated = numbers(of_events(p[rows], y[rows], np.ones(ROWS, np.float32)))
    shuffled = numbers(of_events(p[order], y[order], 3 * counts[order]))
    for name, value in weighted.items():
        np.testing.assert_allclose(shuffled[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
        if name != "unbiased":  # whose pairs are of different rows
            np.testing.assert_allclose(repeated[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(smooth_value(p, y, counts), smooth_value(p[rows], y[rows]), rtol=1e-5)
    tests = [test(p, y, weights=counts) for test in (ks_test, kuiper_test, spiegelhalter_test)]
    again = [t(p[order], y[order], weights=3 * counts[order]) for t in (ks_test, kuiper_test, spiegelhalter_test)]
    np.testing.assert_allclose(tests, again, rtol=1e-9)


def test_merging_splits(rng):
    p, y = events(rng)
    metric = smooth_calibration_error(events=one_class(1))
    once, parts = (measure(two(p), y.astype(int), {"it": metric}, batch_size=size)["it"] for size in (ROWS, 70))
    for a, b in zip(once, parts):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(metric.compute(once), metric.compute(parts), rtol=1e-5)
    np.testing.assert_allclose(metric.compute(jax.tree.map(jnp.asarray, once)), metric.compute(once), rtol=1e-5)


def test_ties_are_looked_at_together(rng):
    """Four rows of p = 1/2, half of which happen, are perfectly calibrated, in whatever order they come."""
    p, y, w = np.full(ROWS, 0.5, np.float32), np.tile(np.float32([1, 1, 0, 0]), ROWS // 4), np.ones(ROWS, np.float32)
    assert np.abs(np.cumsum(y - p)).max() / ROWS > 0.004  # row by row there is a gap
    ours = numbers(of_events(p, y, w))
    assert max(ours["ks"], ours["kuiper"], ours["mmce"]) < 1e-7 and ks_test(p, y).p_value == 1


def test_the_path_starts_at_zero():
    """Distinct probabilities of what never happens: D only falls, and its range is that from 0, not from D_1."""
    p, zeros = np.linspace(0.5, 1, ROWS, dtype=np.float32), np.zeros(ROWS, np.float32)
    ours = numbers(of_events(p, zeros, zeros + 1))
    np.testing.assert_allclose([ours["ks"], ours["kuiper"]], [0.75, 0.75], rtol=1e-6)
    np.testing.assert_allclose(kuiper_test(1 - p, zeros + 1).statistic, 0.75, rtol=1e-6)  # and only rises


def test_the_events_are_those_named():
    """p = P(class 1) is 0 or 1 and always right: no error of any kind. `correct - p1` (netcal) is 1 on half of the rows."""
    p, y = np.tile(np.float32([0, 1]), ROWS // 2), np.tile([0, 1], ROWS // 2)
    for read in (one_class(1).read, top_label().read):
        columns = [np.asarray(x) for x in read(two(p), y)]
        assert not any(numbers(of_events(*columns, np.ones(ROWS, np.float32))).values())
    assert smooth_calibration_error(events=one_class(1)).compute(sums_of(p, y.astype(np.float32))) == 0
    naive = of_events(p, np.ones(ROWS, np.float32), np.ones(ROWS, np.float32))
    assert naive["mmce"] > 0.4


def test_many_rows_and_half_precision():
    """2**17 rows of one probability: a gap of 1/2 on all; float32 sums one after another would lose digits."""
    rows = 2**17
    p, y = np.full(rows, 0.75, np.float32), (np.arange(rows) % 4 == 0).astype(np.float32)
    ours = numbers(of_events(p, y, np.ones(rows, np.float32)))
    for name, value in {"ks": 0.5, "kuiper": 0.5, "mmce": 0.5, "narrow": 0.5, "unbiased": 0.25}.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(smooth_value(p, y), 0.5, rtol=1e-5)
    half, all_alike = p[:ROWS].astype(np.float16), np.ones(ROWS, np.float32)
    assert ks_error(half, y[:ROWS]) == 0.5 and mmce(half, y[:ROWS]).dtype == np.float32
    assert np.isfinite(float(of_events(half, y[:ROWS], all_alike)["mmce"]))


def test_every_setting_changes_the_value(rng):
    p, y = events(rng)
    assert smooth_value(p, y, sigma=0.05) != smooth_value(p, y, sigma=0.2)
    metric = whole(mmce, one_class(1), width=0.4, estimator="U")
    assert metric.convention == "class 1; Laplace kernel of the probability; width = 0.4; estimator = U"
    assert not metric.regular and not smooth_calibration_error().regular


def test_laws_of_brownian_motion(rng):
    steps = 2000
    path = np.cumsum(rng.normal(size=(3000, steps), scale=steps**-0.5), 1)
    top, bottom = np.maximum(path.max(1), 0), np.minimum(path.min(1), 0)
    unseen = 0.5826 / math.sqrt(steps)  # mean excess between the steps
    for law, values in (
        (binfree.brownian_sup_p_value, np.maximum(top, -bottom) + unseen),
        (binfree.brownian_range_p_value, top - bottom + 2 * unseen),
    ):
        p = np.array([law(x) for x in (0.4, 0.8, 0.999, 1.001, 1.5, 1.599, 1.601, 2, 3)])
        seen = [(values > x).mean() for x in (0.4, 0.8, 0.999, 1.001, 1.5, 1.599, 1.601, 2, 3)]
        np.testing.assert_allclose(p, seen, atol=0.03)
        assert law(0.0) == law(1e-6) == 1 and law(math.inf) == 0 and math.isnan(law(math.nan))
        assert 0 < law(20.0) < 1e-80  # the far tail is not one minus one
    np.testing.assert_allclose(binfree.brownian_sup_p_value(binfree.SUP_95), 0.05, rtol=1e-8)
    np.testing.assert_allclose(binfree.brownian_range_p_value(binfree.RANGE_95), 0.05, rtol=1e-8)


@pytest.mark.parametrize("x", [0.5, 0.9, 0.9999, 1.0, 1.3, 1.5999, 1.6, 2.2, 3.0])
def test_both_series_agree(x):
    np.testing.assert_allclose(binfree.brownian_sup_p_value(x), 1 - oracles.brownian_sup_cdf(x), atol=1e-12)
    np.testing.assert_allclose(binfree.brownian_range_p_value(x), oracles.brownian_range_tail(x), atol=1e-12)


def test_covariance_of_the_smoothed_gap(rng, monkeypatch):
    """That of the rows' own spread, but for the floor for stretches whose rows went one way, which is left out here."""
    monkeypatch.setattr("bayescal.metrics.smooth._at_least_binomial", lambda own, sums: own)
    p, y = events(rng, False)
    w = some_weights(rng)
    field = gap_field(sums_of(p, y, w), sigma=0.06)
    q, z, v = kept(w, p, y)
    t = np.rint(np.linspace(0, 3840, 81)) / 3840
    of_row = np.array([b * (a - o) * oracles.reflected_gaussian(t, a, 0.06) for a, o, b in zip(q, z, v)]) / v.sum()
    gap = of_row.sum(0)
    covariance = of_row.T @ of_row - np.outer(gap, gap) * (v**2).sum() / v.sum() ** 2
    np.testing.assert_allclose(field.gap, gap, atol=1e-4)
    np.testing.assert_allclose(field.covariance, covariance, atol=2e-3 * covariance.max())
    np.testing.assert_allclose([field.share.sum(), field.share @ abs(gap)], [1, np.trapezoid(abs(gap), t)], rtol=2e-3)


def test_intervals_hold_the_truth():
    """Over-confident logits: of 10 data sets nearly all have intervals that hold the value of many rows."""
    rng = np.random.default_rng(3)

    def draw(rows):
        logit = 1.5 * rng.normal(size=rows)
        p, rate = (1 / (1 + np.exp(-logit / t)) for t in (1, 1.5))
        return p.astype(np.float32), (rng.uniform(size=rows) < rate).astype(np.float32), rate.astype(np.float32)

    p, _, rate = draw(200_000)
    metric = smooth_calibration_error(events=one_class(1), sigma=0.05)
    truth = {"smooth": metric.compute(sums_of(p, rate)), "ks": ks_test(p, rate)[0], "kuiper": kuiper_test(p, rate)[0]}
    assert truth["smooth"] > 0.05
    hits = dict.fromkeys(truth, 0)
    for _ in range(10):
        p, y, _ = draw(ROWS)
        found = {"smooth": metric.interval(sums_of(p, y))}
        found |= {"ks": binfree._ks_interval(p, y), "kuiper": binfree._kuiper_interval(p, y)}
        for name, (low, high) in found.items():
            assert 0 <= low < high < 0.3
            hits[name] += low <= truth[name] <= high
    assert all(number >= 8 for number in hits.values()), hits


def test_evaluate_gives_intervals_and_conventions(rng):
    p, y = events(rng)
    metrics = {"smooth": smooth_calibration_error(events=one_class(1)), "ks": whole(ks_error, one_class(1))}
    found = bc.evaluate(two(p), y.astype(int), metrics)
    for estimate in found.values():
        assert 0 <= estimate.low < estimate.high < 0.4
    np.testing.assert_allclose(found["ks"].value, ks_test(p, y).statistic, rtol=1e-5)
    assert found["smooth"].convention == "class 1; reflected Gaussian kernel, width the fixed point; 3840 fine bins"


P2, Y2 = np.full(2, 0.5, np.float32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smooth_calibration_error(num_bins=15), "`num_bins` must be at least 100, got 15"),
        (lambda: smooth_calibration_error(num_bins=0), "`num_bins` must be a whole number of at least 1, got 0"),
        (
            lambda: smooth_calibration_error(sigma=0.0),
            r"`sigma` must lie in \[2 / num_bins, 1\] = \[0.000520833, 1\], got 0.0",
        ),
        (lambda: smooth_calibration_error(sigma=math.nan), "`sigma` must lie in .* got nan"),
        (lambda: ks_error(P2, Y2[:1]), "must be one axis of the same length with at least one row, got"),
        (lambda: ks_error(P2[:0], Y2[:0]), "with at least one row, got"),
        (lambda: kuiper_error(P2[None], Y2[None]), "must be one axis of the same length"),
        (lambda: mmce(P2, Y2, weights=Y2[:1]), "must be one axis of the same length"),
        (lambda: ks_test(P2 + 1, Y2), r"`probability` must lie in \[0, 1\], got 1.5"),
        (lambda: kuiper_test(P2, Y2 * math.nan), r"`outcome` must lie in \[0, 1\], got nan"),
        (
            lambda: spiegelhalter_test(P2, Y2, weights=0 * Y2),
            "`weights` must be non-negative and finite, and not all zero",
        ),
        (lambda: ks_test(P2, Y2, weights=np.float32([2, -1])), "`weights` must be non-negative"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_above_one_is_one():
    above = np.float32([1.0000001, 0.5])
    for test in (ks_test, kuiper_test, spiegelhalter_test):
        np.testing.assert_allclose(test(above, np.float32([0, 1])), test(np.float32([1, 0.5]), np.float32([0, 1])))
    assert math.isfinite(binfree._ks_interval(above, Y2)[1])


def test_undefined_is_nan():
    """One class, certain probabilities, no weight: undefined, and not 0 or 1/2."""
    sure = np.float32([1, 1])
    assert all(math.isnan(test(sure, Y2).p_value) for test in (ks_test, kuiper_test, spiegelhalter_test))
    assert ks_test(sure, 0 * Y2).p_value == 0  # certain and wrong
    assert math.isnan(mmce(P2[:1], Y2[:1], estimator="U")) and math.isnan(mmce(P2, Y2, weights=0 * Y2))
