"""How peers go wrong at ranking metrics, and what our functions refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayescal as bc
from bayescal.metrics.ranked import percentile_interval, ranked
from bayescal.metrics.ranking import fpr_at_tpr, roc_curve
from bayescal.metrics.selective import (
    aurc,
    coverage_at_risk,
    prediction_rejection_ratio,
    risk_at_coverage,
    risk_coverage_curve,
)

pytestmark = pytest.mark.core


def test_pitfall_tied_confidences_do_not_follow_the_row_order():
    right_first = np.arange(100) < 50
    for correct in (right_first, ~right_first):
        np.testing.assert_allclose(aurc(np.full(100, 0.9), correct), 0.5, rtol=1e-12)
        np.testing.assert_allclose(risk_at_coverage(np.full(100, 0.9), correct, coverage=0.2), 0.5, rtol=1e-12)
        assert float(coverage_at_risk(np.full(100, 0.9), correct, risk=0.49)) == 0


def test_pitfall_coverage_at_risk_looks_at_every_k():
    scores = np.arange(40.0, 0, -1)
    assert float(coverage_at_risk(scores, np.ones(40), risk=0.05)) == 1  # full coverage meets the risk
    assert float(coverage_at_risk(scores, np.arange(40) > 0, risk=0.05)) == 1  # only from k = 20 on
    assert float(coverage_at_risk(scores, np.arange(40) > 0, risk=0.02)) == 0  # 1 / 40 is above: 0, not NaN
    # a tied group is entered as far as its expected risk allows: 10 right, then 30 with a third wrong
    tied, correct = np.where(np.arange(40) < 10, 2.0, 1.0), np.r_[np.ones(10), np.arange(30) % 3 > 0]
    for function in (coverage_at_risk, jax.jit(coverage_at_risk, static_argnames="risk")):
        np.testing.assert_allclose(function(tied, correct, risk=0.2), 25 / 40, rtol=1e-6)  # 5 of 25


def test_pitfall_tpr_is_reached_not_nearest():
    scores = np.r_[np.full(94, 2.0), np.full(6, 1.0), np.full(50, 1.5), np.full(50, 0.5)]
    positive = np.arange(200) < 100
    assert float(fpr_at_tpr(scores, positive)) == 0.5  # the nearest recall, 0.94, would say 0
    assert float(fpr_at_tpr(scores, positive, tpr=0.94)) == 0


@pytest.mark.slow
def test_counts_above_2_to_the_24():
    """Float32 counts stop there. A share of the rows of each of two scores is positive."""
    n = 2**24 + 2**23
    scores = jnp.asarray((np.arange(n) % 3 == 0).astype(np.float32))
    yes = jnp.asarray((np.arange(n) % 4 == 0).astype(np.float32))
    groups = ranked(scores, yes)
    np.testing.assert_array_equal(groups.weight[:3], [n / 3, n - n / 3, 0])
    np.testing.assert_array_equal(groups.positive[:2], [n / 12, n / 4 - n / 12])
    np.testing.assert_allclose(bc.auroc(scores, yes), 0.5, rtol=1e-6)
    np.testing.assert_allclose(aurc(scores, yes), 0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fpr_at_tpr(np.ones(2), np.ones(2), tpr=0), r"`tpr` must lie in \(0, 1\], got 0. The usual choice"),
        (lambda: risk_at_coverage(np.ones(2), np.ones(2), coverage=1.2), r"`coverage` must lie in \(0, 1\], got 1.2"),
        (lambda: coverage_at_risk(np.ones(2), np.ones(2), risk=-0.1), r"`risk` must lie in \[0, 1\], got -0.1"),
        (
            lambda: prediction_rejection_ratio(np.ones(2), np.ones(2), max_rejection=0),
            r"`max_rejection` must lie in \(0, 1\], got 0",
        ),
        (lambda: aurc(np.ones(2), np.ones(3)), r"one axis of the same length, got \(2,\) and \(3,\). Flatten"),
        (lambda: aurc(np.ones((2, 1)), np.ones((2, 1))), "must be one axis of the same length"),
        (lambda: aurc(np.ones(2), np.ones(2), weights=np.ones(1)), r"got \(2,\) and \(2,\) and \(1,\)"),
        (lambda: roc_curve(np.ones(2), np.ones(2)), "`positive` must hold both classes, got 2 positives of 2"),
        (lambda: roc_curve(np.array([np.nan, 1]), np.arange(2)), "`scores` must not be NaN, got 1 of 2"),
        (lambda: risk_coverage_curve(np.array([np.nan, 1]), np.arange(2)), "`confidence` must be free of NaN"),
        (
            lambda: percentile_interval(aurc, np.ones(2), np.ones(2), seed=0, num_draws=10),
            "`num_draws` must be at least 100 for a 95 % interval, got 10",
        ),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
