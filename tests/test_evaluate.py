import numpy as np
import pytest

import bayescal as bc
from bayescal.evaluate import row_influences

pytestmark = pytest.mark.core
NLL = {"nll": bc.nll()}


def pred(rows=6, members=2, classes=3):
    return bc.Categorical(np.random.default_rng(0).normal(size=(members, rows, classes)).astype(np.float32))


def broken(value, **settings):
    logits = np.array(pred().logits)
    logits[1, 2, 0] = value
    return bc.Categorical(logits, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bc.evaluate(pred(), np.zeros(0, int), NLL), "`targets` must have at least one row, got none"),
        (
            lambda: bc.evaluate(pred(), np.zeros(5, int), NLL),
            r"`pred` must have batch shape \(5,\) like `targets`, got \(6,\)",
        ),
        (
            lambda: bc.evaluate(bc.Categorical(np.zeros((6, 3), np.float32)), np.zeros(6, int), NLL),
            r"For one network add the member axis: `logits\[None\]`",
        ),
        (lambda: bc.evaluate(pred(), np.full(6, 3), NLL), r"`targets` must lie in \[0, 3\)"),
        (lambda: bc.evaluate(pred(), np.zeros(6), NLL), "`targets` must be integer class labels, got float64"),
        (
            lambda: bc.evaluate(broken(np.nan), np.zeros(6, int), NLL),
            r"`pred` must not hold NaN, \+infinity or examples.*got some in 1 of 6 examples, first at 2",
        ),
        (
            lambda: bc.evaluate(broken(np.inf), np.zeros(6, int), NLL),
            r"`pred` must not hold NaN, \+infinity or examples",
        ),
        (
            lambda: bc.evaluate(bc.Categorical(np.full((1, 2, 3), -np.inf, np.float32)), np.zeros(2, int), NLL),
            "examples without a possible class, got some in 2 of 2",
        ),
        (
            lambda: bc.evaluate(
                bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.zeros((1, 2, 1), np.float32)),
                np.zeros((2, 1), np.float32),
                NLL,
            ),
            "`variance` must be positive and `mean_variance` not negative, got others in 2 of 2 examples",
        ),
        (
            lambda: bc.evaluate(broken(0, member_weights=np.array([1, -1], np.float32)), np.zeros(6, int), NLL),
            "`member_weights` must be finite, not negative",
        ),
        (
            lambda: bc.evaluate(pred(), np.zeros(6, int), NLL, weights=np.ones(5)),
            r"`weights` must be one finite non-negative number per row, \(6,\)",
        ),
        (
            lambda: bc.evaluate(pred(), np.zeros(6, int), NLL, batch_size=0),
            r"`batch_size` must be a whole number from 1 to 2\*\*20, got 0",
        ),
        (
            lambda: bc.evaluate(
                bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32)),
                np.array([[0.0], [np.nan]], np.float32),
                NLL,
            ),
            "`targets` must be finite, got 1 NaN or infinite of 2",
        ),
        (
            lambda: bc.evaluate(
                bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32)), np.zeros((2, 1), int), NLL
            ),
            "`targets` must be floats, got int64",
        ),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_dropped_member_may_be_nan():
    weights = np.array([1, 0], np.float32)
    estimate = bc.evaluate(broken(np.nan, member_weights=weights), np.zeros(6, int), NLL)["nll"]
    alone = bc.evaluate(bc.Categorical(np.array(pred().logits)[:1]), np.zeros(6, int), NLL)["nll"]
    np.testing.assert_allclose(estimate.value, alone.value, rtol=1e-6)


def test_minus_infinity_is_an_impossible_class():
    assert np.isfinite(bc.evaluate(broken(-np.inf), np.ones(6, int), NLL)["nll"].value)


def test_mean_over_runs_by_hand():
    # 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.3027
    estimate = bc.mean_over_runs([1.0, 2.0, 3.0], "metres")
    np.testing.assert_allclose([estimate.low, estimate.high], 2 + np.array([-1, 1]) * 4.302653 / np.sqrt(3), rtol=1e-6)
    assert estimate.n == 3 and estimate.convention == "metres; mean over 3 runs, 95 % t interval"
    assert bc.mean_over_runs([1.5]).low is None


def test_json_form():
    assert bc.Estimate(1.0, n=3).json() == {"value": 1.0, "n": 3}
    assert set(bc.Estimate(1.0, 0.5, 1.5, 3, "x").json()) == {"value", "low", "high", "n", "convention"}


def test_no_row_counts_twice_where_the_last_batch_reaches_back(rng):
    """Sums, columns and influences, for batches that do not divide the rows, and for the size that is chosen."""
    logits, targets = rng.normal(size=(2, 103, 4)).astype(np.float32), rng.integers(0, 4, 103)
    pred, weights = bc.Categorical(logits), rng.integers(0, 3, 103).astype(np.float32)
    metrics = {"nll": bc.nll(), "ece": bc.calibration_error(), "auroc": bc.whole(bc.auroc)}
    for given in (None, weights):
        whole, odd = (bc.evaluate(pred, targets, metrics, weights=given, batch_size=size) for size in (None, 40))
        moved = [row_influences(bc.nll(), pred, targets, weights=given, batch_size=size) for size in (103, 40)]
        np.testing.assert_allclose(*moved, rtol=1e-4, atol=1e-7)
        for name in metrics:
            np.testing.assert_allclose(odd[name][:3], whole[name][:3], rtol=1e-5)
