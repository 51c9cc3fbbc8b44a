import sys

import jax
import numpy as np
import pytest
from scipy.stats import ncx2, norm

import bayescal as bc
from bayescal.compare import _poisson, _replicates, bootstrap_intervals, compare
from bayescal.evaluate import row_influences, standard_error
from bayescal.metrics import auroc
from bayescal.metrics.calibration import calibration_error, squared_calibration_error
from bayescal.metrics.inversion import gap_norm_interval, signed_square_interval
from bayescal.metrics.whole import whole

pytestmark = pytest.mark.core

INF = float("inf")
Z = norm.ppf(0.975)
ROWS = 300
METRICS = {  # one dict, one number of rows and of replicates: one program
    "accuracy": bc.accuracy(),
    "nll": bc.nll(),
    "brier": bc.brier(),
    "squared": squared_calibration_error(),
    "auroc": whole(auroc),
}
NUMBER = 400


def predictions(rng, scale=2.0, rows=ROWS):
    logits = rng.normal(size=(1, rows, 4)).astype(np.float32) * scale
    probs = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
    return bc.Categorical(logits), (probs.cumsum(-1)[:, :-1] < rng.uniform(size=(rows, 1))).sum(-1)


def test_one_bin_far_from_zero_is_a_normal_interval():
    for order in (1, 2, 3, INF):
        ends = gap_norm_interval(np.array([-0.5]), np.array([0.01**2]), np.ones(1), norm=order)
        np.testing.assert_allclose(ends, [0.5 - Z * 0.01, 0.5 + Z * 0.01], atol=1e-4)
    low, high = gap_norm_interval(np.array([0.5]), np.array([0.01**2]), np.ones(1), level=0.68)
    np.testing.assert_allclose(high - low, 2 * norm.ppf(0.84) * 0.01, rtol=0.01)


def test_norm_against_the_noncentral_chi_square():
    """For equal shares and variances, the square of norm 2 is a noncentral chi square, whatever the shape."""
    bins, spread, gap = 15, 0.02, np.linspace(-0.05, 0.09, 15)
    observed = (gap**2).sum() / spread**2
    low, high = gap_norm_interval(gap, np.full(bins, spread**2), np.full(bins, 1 / bins), norm=2)
    for end, tail in ((low, 0.975), (high, 0.025)):
        assert abs(ncx2.cdf(observed, bins, bins * (end / spread) ** 2) - tail) < 0.006


def test_full_covariance_of_independent_bins_is_their_variances():
    gap, variance, share = np.array([0.1, -0.06, 0.0]), np.array([4e-4, 1e-4, 9e-4]), np.array([0.5, 0.3, 0.2])
    for order in (1, 2, INF):
        one, other = (gap_norm_interval(gap, v, share, norm=order) for v in (variance, np.diag(variance)))
        np.testing.assert_allclose(one, other, atol=4e-3)
    one, other = (signed_square_interval(gap, v, share) for v in (variance, np.diag(variance)))
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_perfectly_correlated_bins_are_one():
    together = gap_norm_interval(np.full(2, 0.1), np.full((2, 2), 4e-4), np.full(2, 0.5))
    np.testing.assert_allclose(together, gap_norm_interval(np.array([0.1]), np.array([4e-4]), np.ones(1)), atol=1e-3)


def test_norm_interval_at_the_boundary():
    noise, share = np.full(5, 0.03**2), np.full(5, 0.2)
    low, high = gap_norm_interval(np.array([0.02, -0.03, 0.01, 0.03, -0.02]), noise, share)
    assert low == 0 < high < 0.1
    assert gap_norm_interval(np.zeros(5), noise, share)[1] > 0, "an observed zero does not make the truth zero"
    assert gap_norm_interval(np.full(5, 0.2), noise, share)[0] > 0.1
    assert gap_norm_interval(np.full(5, 0.99), noise, share)[1] == 1
    assert gap_norm_interval(np.array([0.3, -0.1]), np.zeros(2), np.full(2, 0.5)) == pytest.approx((0.2, 0.2), abs=1e-5)
    assert gap_norm_interval(np.zeros(2), np.zeros(2), np.full(2, 0.5)) == (0, 0)


def test_norm_interval_scales_and_ignores_empty_bins():
    gap, variance, share = np.array([0.1, -0.06, 0.02]), np.array([4e-4, 1e-4, 9e-4]), np.array([0.5, 0.3, 0.2])
    once, twice = gap_norm_interval(gap, variance, share), gap_norm_interval(2 * gap, 4 * variance, share)
    np.testing.assert_allclose(twice, 2 * np.array(once), atol=1e-5)
    padded = [np.append(x, tail) for x, tail in ((gap, 0.9), (variance, np.nan), (share, 0))]
    assert gap_norm_interval(*padded) == once == gap_norm_interval(gap, variance, share)
    assert np.isfinite(gap_norm_interval(*padded, norm=INF)).all()
    assert signed_square_interval(*padded) == signed_square_interval(gap, variance, share)
    np.testing.assert_allclose(gap_norm_interval(gap[::-1], variance[::-1], share[::-1]), once, atol=2e-3)


def test_a_bin_of_one_row_has_the_variance_of_a_calibrated_event():
    gap, share = np.array([0.05, 0.7]), np.array([0.9, 0.1])
    unknown = gap_norm_interval(gap, np.array([1e-4, np.nan]), share)
    assert unknown == pytest.approx(gap_norm_interval(gap, np.array([1e-4, 0.7 * 0.3]), share), abs=1e-9)
    full = gap_norm_interval(gap, np.array([[1e-4, np.nan], [np.nan, np.nan]]), share)
    np.testing.assert_allclose(full, unknown, atol=4e-3)
    assert np.isnan(gap_norm_interval(gap, np.array([1e-4, np.nan]), share, norm=INF)).all()


def test_norm_interval_draws_nothing_from_the_global_stream():
    np.random.seed(3)
    expected = np.random.uniform()
    np.random.seed(3)
    gap_norm_interval(np.full(7, 0.1), np.full(7, 1e-3), np.full(7, 1 / 7))
    assert np.random.uniform() == expected


@pytest.mark.parametrize("kind", ["calibrated", "one bin", "sloped"])
def test_intervals_of_normal_gaps_cover(rng, kind):
    bins, sets = 12, 100
    share = rng.dirichlet(np.full(bins, 3.0))
    mu = {"calibrated": np.zeros(bins), "one bin": 0.15 * np.eye(bins)[4], "sloped": np.linspace(-0.05, 0.1, bins)}[
        kind
    ]
    spread = 0.03 / np.sqrt(bins * share)
    near = np.exp(-0.5 * (np.subtract.outer(np.arange(bins), np.arange(bins)) / 2) ** 2)  # a smoothed field's noise
    correlated = near * np.outer(spread, spread)
    hits = {}
    for variance, root in (
        (spread**2, np.diag(spread)),
        (correlated, np.linalg.cholesky(correlated + 1e-12 * np.eye(bins))),
    ):
        for gap in mu + rng.normal(size=(sets, bins)) @ root.T:
            for order in (1, 2, INF):
                low, high = gap_norm_interval(gap, variance, share, norm=order)
                true = np.abs(mu).max() if order == INF else (share @ np.abs(mu) ** order) ** (1 / order)
                hits.setdefault((variance.ndim, order), []).append(low <= true + 1e-9 and true <= high)
            low, high = signed_square_interval(gap, variance, share)
            hits.setdefault((variance.ndim, "signed"), []).append(low <= share @ mu**2 <= high)
    assert all(np.mean(x) >= 0.9 for x in hits.values()), {k: np.mean(x) for k, x in hits.items()}


def test_signed_square_by_hand():
    one = np.ones(1)
    low, high = signed_square_interval(0 * one, 1e-4 * one, one)  # D = -v; at t <= 0 its error is sqrt(2) v
    np.testing.assert_allclose([low, high], [-1e-4 - Z * 2**0.5 * 1e-4, high], rtol=1e-9)
    low, high = signed_square_interval(0.5 * one, 1e-6 * one, one)  # far away (mu +- z s)^2, but for z^2 s^2
    np.testing.assert_allclose([low, high], [(0.5 - Z * 1e-3) ** 2, (0.5 + Z * 1e-3) ** 2], rtol=1e-4)
    for gap in (0.0, 0.001, 0.01, 0.02, 0.3):
        low, high = signed_square_interval(gap * one, 1e-4 * one, one)
        assert low < gap**2 - 1e-4 < high


def test_standard_error_by_influence(rng):
    pred, targets = predictions(rng)
    weights = rng.uniform(0.5, 2, ROWS)
    score = -np.asarray(pred.log_prob(targets), np.float64)
    influence = row_influences(bc.nll(), pred, targets)
    np.testing.assert_allclose(influence, (score - score.mean()) / ROWS, atol=1e-7)
    np.testing.assert_allclose(standard_error(influence), score.std() / ROWS**0.5, rtol=1e-4)
    mean = (weights * score).sum() / weights.sum()
    by_hand = np.sqrt(((weights * (score - mean)) ** 2).sum()) / weights.sum()
    weighted = standard_error(row_influences(bc.nll(), pred, targets, weights=weights), weights)
    np.testing.assert_allclose(weighted, by_hand, rtol=1e-4)


def test_standard_error_of_groups_against_a_loop(rng):
    influence, weights, groups = rng.normal(size=40), rng.uniform(size=40), rng.integers(0, 7, 40)
    total = 0.0
    for group in range(7):
        total += sum(w * x for w, x, g in zip(weights, influence, groups, strict=True) if g == group) ** 2
    np.testing.assert_allclose(standard_error(influence, weights, groups), (7 / 6 * total) ** 0.5, rtol=1e-12)
    names = np.array(list("abcdefg"))[groups]
    assert standard_error(influence, weights, names) == standard_error(influence, weights, groups)


def test_a_replicate_is_the_metric_of_repeated_rows(rng, key):
    pred, targets = predictions(rng)
    weights = rng.uniform(0.5, 2, ROWS)
    ours = _replicates(pred, targets, METRICS, key, NUMBER, weights, None, 2**16)
    counts = np.asarray(_poisson(key, np.uint32(0), (NUMBER, ROWS)))
    for r in (0, 17, 39):
        expected = bc.evaluate(pred, targets, METRICS, weights=weights * counts[r])
        for name, estimate in expected.items():
            np.testing.assert_allclose(ours[name][r], estimate.value, rtol=1e-4, atol=1e-7)
        score = np.repeat(-np.asarray(pred.log_prob(targets), np.float64), counts[r].astype(int))
        repeated = np.repeat(weights, counts[r].astype(int))
        np.testing.assert_allclose(ours["nll"][r], (repeated * score).sum() / repeated.sum(), rtol=1e-5)


def test_blocks_of_rows_and_of_groups(rng, key, monkeypatch):
    """More rows, and more groups, than one device call takes; the last block of rows reaches back, and its last are new."""
    monkeypatch.setattr(sys.modules["bayescal.compare"], "BLOCK_ROWS", 128)  # bayescal.compare is the function
    pred, targets = predictions(rng)
    score = -np.asarray(pred.log_prob(targets), np.float64)
    for groups in (None, np.arange(ROWS)[::-1]):
        sizes = (128, 128, 128 if groups is None else ROWS - 256)
        drawn = [_poisson(key, np.uint32(128 * i), (NUMBER, size)) for i, size in enumerate(sizes)]
        drawn[-1] = drawn[-1][:, -(ROWS - 256) :]
        drawn = np.concatenate(drawn, 1).astype(np.float64)
        drawn = drawn if groups is None else drawn[:, groups]
        ours = _replicates(pred, targets, {"nll": bc.nll()}, key, NUMBER, None, groups, 2**16)["nll"]
        np.testing.assert_allclose(ours, drawn @ score / drawn.sum(1), rtol=1e-5)


def test_resampling_weights_are_poisson(key):
    drawn = np.asarray(_poisson(key, np.uint32(4096), (500, 2000)))
    for k in range(6):
        p = np.exp(-1) / np.prod(np.arange(1, k + 1))
        assert abs((drawn == k).mean() - p) < 4 * (p / drawn.size) ** 0.5
    assert np.abs(np.corrcoef(drawn[:50]) - np.eye(50)).max() < 0.12
    assert not np.array_equal(drawn, np.asarray(_poisson(key, np.uint32(0), (500, 2000))))


def test_bootstrap_agrees_with_influence(rng, key):
    pred, targets = predictions(rng)
    weights = rng.uniform(0, 2, ROWS)
    ours = bootstrap_intervals(pred, targets, METRICS, key, weights=weights, num_replicates=NUMBER)
    for name in ("nll", "auroc"):
        error = standard_error(row_influences(METRICS[name], pred, targets, weights=weights), weights)
        np.testing.assert_allclose(ours[name].high - ours[name].low, 2 * Z * error, rtol=0.2, err_msg=name)
        assert ours[name].low < ours[name].value < ours[name].high and "400 replicates" in ours[name].convention
    again = bootstrap_intervals(pred, targets, METRICS, key, weights=weights, num_replicates=NUMBER, batch_size=299)
    for name in METRICS:
        np.testing.assert_allclose(again[name][1:3], ours[name][1:3], rtol=1e-6, err_msg="batches matter")
    other = bootstrap_intervals(pred, targets, METRICS, jax.random.key(0), weights=weights, num_replicates=NUMBER)
    assert all(other[name].low != ours[name].low for name in METRICS)


def test_bootstrap_of_groups_resamples_whole_groups(rng, key):
    """Every row twice, as a group of two: the replicates of the single rows, neither more nor less certain."""
    pred, targets = predictions(rng)
    rows = rng.permutation(np.repeat(np.arange(ROWS), 2))
    twice = _replicates(bc.take(pred, rows), targets[rows], METRICS, key, NUMBER, None, rows, 2**16)
    once = _replicates(pred, targets, METRICS, key, NUMBER, np.ones(ROWS), None, 2**16)
    for name in METRICS:
        if name != "squared":  # which counts rows
            np.testing.assert_allclose(twice[name], once[name], rtol=1e-4, err_msg=name)
    apart = bootstrap_intervals(bc.take(pred, rows), targets[rows], {"nll": bc.nll()}, key, num_replicates=NUMBER)[
        "nll"
    ]
    np.testing.assert_allclose(
        apart.high - apart.low, np.ptp(np.quantile(once["nll"], [0.025, 0.975])) / 2**0.5, rtol=0.2
    )


def test_undefined_replicates_leave_no_interval(rng, key):
    pred, _ = predictions(rng)
    label = np.array(pred.log_probs().argmax(-1))
    label[0] = (label[0] + 1) % 4  # one wrong row: a third of the replicates are without it
    estimate = bootstrap_intervals(pred, label, METRICS, key, num_replicates=NUMBER)["auroc"]
    assert estimate.low is None and "undefined" in estimate.convention and np.isfinite(estimate.value)


@pytest.mark.parametrize("name", ["squared", "auroc"])
def test_compare_is_antisymmetric(rng, key, name):
    metric = METRICS[name]
    pred, targets = predictions(rng)
    other = bc.Categorical(pred.logits * 0.5 + rng.normal(size=pred.logits.shape).astype(np.float32) * 0.1)
    for how in ({}, {"key": key, "num_replicates": NUMBER}):
        ab, ba = compare(metric, pred, other, targets, **how), compare(metric, other, pred, targets, **how)
        np.testing.assert_allclose(
            [ab.difference.value, ab.difference.low, ab.difference.high],
            [-ba.difference.value, -ba.difference.high, -ba.difference.low],
            atol=1e-6,
        )
        np.testing.assert_allclose(ab.p_value, ba.p_value, rtol=1e-3)
        assert (ab.a, ab.b) == (ba.b, ba.a) and ab.difference.value == ab.a.value - ab.b.value
        same = compare(metric, pred, pred, targets, **how)
        assert same.difference.value == 0 and same.p_value == 1


def test_compare_by_hand_and_by_bootstrap(rng, key):
    pred, targets = predictions(rng)
    other = bc.Categorical(pred.logits * 0.8)
    gain = np.asarray(other.log_prob(targets) - pred.log_prob(targets), np.float64)  # nll of a less that of b
    found, drawn = (
        compare(bc.nll(), pred, other, targets),
        compare(bc.nll(), pred, other, targets, key=key, num_replicates=NUMBER),
    )
    error = gain.std() / ROWS**0.5
    np.testing.assert_allclose(found.difference.value, gain.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.difference.high, gain.mean() + Z * error, atol=1e-5)
    np.testing.assert_allclose(found.p_value, 2 * norm.sf(abs(gain.mean()) / error), rtol=1e-3)
    np.testing.assert_allclose(drawn.difference.low, found.difference.low, atol=0.4 * error)
    np.testing.assert_allclose(drawn.difference.high, found.difference.high, atol=0.4 * error)
    assert found.difference.high - found.difference.low < 0.5 * (found.a.high - found.a.low), "not paired"
    rows = np.repeat(np.arange(ROWS), 2)
    grouped = compare(bc.nll(), bc.take(pred, rows), bc.take(other, rows), targets[rows], groups=rows)
    np.testing.assert_allclose(grouped.difference.high, found.difference.high, atol=0.01 * error)


def test_p_values_are_uniform_where_predictions_are_exchangeable(rng):
    """Two forecasts with independent noise of the same size: which is a and which is b does not matter."""
    p_values = []
    for _ in range(150):
        pred, targets = predictions(rng)
        a, b = (bc.Categorical(pred.logits + rng.normal(size=pred.logits.shape).astype(np.float32)) for _ in range(2))
        p_values.append(compare(bc.brier(), a, b, targets).p_value)
    shares = np.histogram(p_values, np.linspace(0, 1, 6))[0] / 150
    assert (np.abs(shares - 0.2) < 0.11).all() and np.mean(np.array(p_values) < 0.05) < 0.11


def test_comparison_of_what_is_not_known(rng):
    pred, targets = predictions(rng, rows=1)
    other = bc.Categorical(pred.logits * 0.5)
    assert np.isnan(compare(bc.nll(), pred, other, targets).p_value)
    logits = np.zeros((1, 2, 3), np.float32)
    logits[0, 0, 0] = -np.inf
    never = compare(bc.nll(), bc.Categorical(logits), bc.Categorical(np.zeros((1, 2, 3), np.float32)), np.zeros(2, int))
    assert never.difference.value == INF and never.difference.low is None and np.isnan(never.p_value)


def small():
    return bc.Categorical(np.random.default_rng(0).normal(size=(1, 6, 3)).astype(np.float32))


def boot(metric=None, **settings):
    return bootstrap_intervals(small(), np.zeros(6, int), {"it": metric or bc.nll()}, jax.random.key(0), **settings)


def against_itself(metric=None, **settings):
    return compare(metric or bc.nll(), small(), small(), np.zeros(6, int), **settings)


ONE = np.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: boot(calibration_error()),
            r"`metrics` must be regular .* got \['it'\].*down to 0 % .* inverts a test",
        ),
        (lambda: against_itself(calibration_error()), "compare by `squared_calibration_error`"),
        (lambda: boot(num_replicates=10), "`num_replicates` must be a whole number of at least 40, got 10"),
        (lambda: against_itself(num_replicates=100), "needs a key, got 100 and key None"),
        (
            lambda: boot(groups=np.zeros(6)),
            r"`groups` must be one label per row, \(6,\), of at least two groups.* with 1",
        ),
        (lambda: boot(groups=np.arange(5)), r"got shape \(5,\)"),
        (lambda: against_itself(groups=np.arange(5)), r"`groups` must be one label per row"),
        (lambda: boot(weights=-np.ones(6)), "`weights` must be one finite non-negative number per row"),
        (lambda: gap_norm_interval(ONE, ONE, 0.5 * ONE), "`share` must be non-negative of sum 1, got sum 0.5"),
        (lambda: gap_norm_interval(ONE, np.ones(2), ONE), r"`gap`, `variance` and `share` must have shapes"),
        (lambda: gap_norm_interval(ONE, ONE, ONE, norm=0.5), "`norm` must be at least 1 .* got 0.5"),
        (lambda: gap_norm_interval(ONE * np.nan, ONE, ONE), "`gap` must not be NaN"),
        (lambda: signed_square_interval(ONE, ONE, ONE, level=95), r"`level` must lie in \(0, 1\), got 95"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_row_has_no_interval_of_a_difference():
    pair = [bc.Categorical(np.array([[[a, 0.0, 0.0]]], np.float32)) for a in (1.0, 2.0)]
    found = bc.compare(bc.nll(), *pair, np.array([0]))
    assert found.difference.value > 0 and found.difference.low is None and found.difference.high is None
    assert np.isnan(found.p_value)
