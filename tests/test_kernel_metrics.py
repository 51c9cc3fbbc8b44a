"""Kernel calibration metrics of all classes and of neighbours; MMCE's values are tested beside the cumulative ones."""

import math

import jax
import numpy as np
import oracles_binfree as oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_binfree import CLASSES, ROWS, class_rows, events, kept, numbers, some_weights, stored_oracles, two

import bayescal as bc
from bayescal.metrics import kernel
from bayescal.metrics.binfree import ks_error, kuiper_error
from bayescal.metrics.events import top_label
from bayescal.metrics.kernel import all_classes, local_calibration_error, median_distance, mmce, skce, skce_test
from bayescal.metrics.whole import whole
from bayescal.predictive import Probabilities

pytestmark = pytest.mark.core


@jax.jit
def of_classes(probs, targets, w):
    return {
        "median": median_distance(probs, weights=w),
        "U": skce(probs, targets, weights=w),
        "V": skce(probs, targets, weights=w, estimator="V"),
        "V 1": skce(probs, targets, weights=w, estimator="V", bandwidth=1.0),
        "U 1": skce(probs, targets, weights=w, bandwidth=1.0),
        "block 2": skce(probs, targets, weights=w, bandwidth=1.0, estimator="block"),
        "block 3": skce(probs, targets, weights=w, bandwidth=1.0, estimator="block", block_size=3),
    }


of_places = jax.jit(lambda p, y, x, w: local_calibration_error(p, y, x, weights=w, gamma=0.2))


def test_classes_against_loops_and_scikit_learn(rng):
    from sklearn.metrics.pairwise import laplacian_kernel

    probs, targets = class_rows(rng)
    w = some_weights(rng)
    ours = numbers(of_classes(probs, targets, w))
    q, t, v = kept(w, probs, targets)
    median = oracles.median_distance(q, v)
    everything = probs.astype(np.float64), targets, w.astype(np.float64)
    expected = {
        "median": median,
        "U": oracles.skce(q, t, v, median, True),
        "V": oracles.skce(q, t, v, median, False),
        "V 1": oracles.skce(q, t, v, 1.0, False),
        "U 1": oracles.skce(q, t, v, 1.0, True),
        "block 2": oracles.skce_block(*everything, 1.0, 2),
        "block 3": oracles.skce_block(*everything, 1.0, 3),  # two rows are left over
    }
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    residual = v[:, None] * (np.eye(CLASSES)[t] - q)
    second = (laplacian_kernel(q, gamma=0.5) * (residual @ residual.T)).sum() / v.sum() ** 2
    np.testing.assert_allclose(ours["V 1"], second, rtol=1e-5)


def test_local_error_against_loops(rng):
    (p, y), x, w = events(rng, False), rng.normal(size=(ROWS, 3)).astype(np.float32), some_weights(rng)
    ours = of_places(p, y, x, w)
    q, z, f, v = kept(w, p, y, x)
    gaps = oracles.local_gaps(q, z, f, v, 0.2, 15)
    np.testing.assert_allclose([float(a) for a in ours], [(v * gaps).sum() / v.sum(), gaps.max()], rtol=1e-5)
    wide = local_calibration_error(p, y, x, gamma=1e6, num_bins=1)  # everybody is a neighbour: the mean gap
    np.testing.assert_allclose([float(a) for a in wide], [abs((p - y).mean())] * 2, rtol=1e-4)


def test_by_hand():
    assert math.isnan(skce(np.full((1, 2), 0.5, np.float32), np.array([0]), bandwidth=1.0))  # one row has no pair
    pair = skce(np.array([[0.8, 0.2], [0.5, 0.5]], np.float32), np.array([0, 1]), bandwidth=0.3)
    np.testing.assert_allclose(float(pair), -0.2 * math.exp(-1), rtol=1e-5)  # (0.2, -0.2).(-0.5, 0.5)


def test_stored_classes_and_places():
    oracle, inputs = stored_oracles()
    probs, targets = inputs["P"].astype(np.float32), inputs["Y"].astype(np.int32)
    ours = numbers(of_classes(probs, targets, np.ones(ROWS, np.float32)))
    group = oracle["skce_total_variation_exponential_kernel_(x)_identity"]
    (unbiased, median), (biased, _) = (group[f"ref_{x}iased_[value,median_bandwidth]"] for x in ("unb", "b"))
    expected = {"U": unbiased, "V": biased, "median": median, "U 1": group["ref_unbiased_h1"][0]}
    for name, value in (expected | {"block 2": group["ref_linear_block2_h1"]}).items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
    features = (inputs["logits"] - inputs["logits"].mean(0)) / inputs["logits"].std(0)
    p, y = top_label().read(Probabilities(probs[None]), targets)
    local = of_places(np.asarray(p), np.asarray(y), features.astype(np.float32), np.ones(ROWS, np.float32))
    ref = oracle["local_calibration_error_gamma0.2_L1/d_features=standardised_logits"]["ref(Luo et al. 2022 eq 3-4)"]
    np.testing.assert_allclose([float(x) for x in local], [ref["mean_LCE"], ref["MLCE"]], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_weights_are_repetition_and_order_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    (p, y), (probs, targets), x = events(rng), class_rows(rng), rng.normal(size=(ROWS, 3)).astype(np.float32)
    rows, order = rng.integers(0, 60, ROWS), rng.permutation(ROWS)
    counts = np.bincount(rows, minlength=ROWS).astype(np.float32)  # rows 60.. weigh nothing
    ones = np.ones(ROWS, np.float32)
    weighted = numbers(of_classes(probs, targets, counts))
    repeated = numbers(of_classes(probs[rows], targets[rows], ones))
    np.testing.assert_allclose(weighted["V 1"], repeated["V 1"], rtol=2e-5)
    local = [float(a) for a in of_places(p, y, x, counts)]
    np.testing.assert_allclose(local, [float(a) for a in of_places(p[rows], y[rows], x[rows], ones)], rtol=2e-5)
    shuffled = numbers(of_classes(probs[order], targets[order], 3 * counts[order]))
    for name, value in weighted.items():
        if "block" not in name:  # which says that it depends on the order
            np.testing.assert_allclose(shuffled[name], value, rtol=2e-5, atol=1e-7, err_msg=name)


def test_gradients_in_the_weights_are_finite(rng):
    p, y = events(rng)
    x = rng.normal(size=(ROWS, 3)).astype(np.float32)
    probs, targets = class_rows(rng)

    @jax.jit
    @jax.grad
    def slope(w):
        local = local_calibration_error(p, y, x, weights=w).mean
        kernels = mmce(p, y, weights=w) + skce(probs, targets, weights=w, bandwidth=1.0)
        return ks_error(p, y, weights=w) + kuiper_error(p, y, weights=w) + local + kernels

    slopes = slope(np.ones(ROWS, np.float32))
    assert np.isfinite(slopes).all() and (slopes != 0).all()
    assert abs((slopes * 1.0).sum()) < 1e-5  # free of the weights' scale


def test_pairs_are_never_all_in_memory(rng, monkeypatch):
    """20,000 rows have 4e8 pairs, 1.6 GB in float32; and how many rows go at once does not change the value."""
    rows, floats, ints = 20_000, np.float32, np.int32
    of = jax.ShapeDtypeStruct
    for function, shapes in (
        (lambda p, t: skce(p, t), (of((rows, 10), floats), of((rows,), ints))),
        (local_calibration_error, (of((rows,), floats), of((rows,), floats), of((rows, 64), floats))),
    ):
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert 0 < memory.temp_size_in_bytes < 128 * 2**20
    probs, targets = class_rows(rng)
    whole_at_once = skce(probs, targets, bandwidth=1.0)
    monkeypatch.setattr(kernel, "PAIRS_AT_ONCE", 7 * ROWS)  # blocks of seven rows, and four left over
    np.testing.assert_allclose(skce(probs, targets, bandwidth=1.0), whole_at_once, rtol=1e-5)


def test_median_of_many_rows(rng, monkeypatch):
    probs, _ = class_rows(rng)
    exact = oracles.median_distance(probs.astype(np.float64), np.ones(ROWS))
    monkeypatch.setattr(kernel, "MEDIAN_ROWS", 80)
    some = float(median_distance(probs))
    assert some == float(median_distance(probs[::-1])) != exact
    np.testing.assert_allclose(some, exact, rtol=0.1)
    few = np.where(np.arange(ROWS) < 50, 1, 0).astype(np.float32)  # fewer than it would take: all of them
    np.testing.assert_allclose(
        float(median_distance(probs, weights=few)), oracles.median_distance(probs.astype(np.float64), few), rtol=1e-6
    )


def test_every_setting_changes_the_value(rng):
    (p, y), x = events(rng), rng.normal(size=(ROWS, 3)).astype(np.float32)
    base = np.array(local_calibration_error(p, y, x))
    for setting in ({"gamma": 0.5}, {"num_bins": 10}, {"closed": "left"}):
        assert (np.array(local_calibration_error(p, y, x, **setting)) != base).any(), setting


def test_evaluate_names_the_settings(rng):
    p, y = events(rng)
    found = bc.evaluate(two(p), y.astype(int), {"it": whole(skce, all_classes(), bandwidth=0.5, estimator="V")})["it"]
    assert found.low is None and found.value > 0
    assert found.convention.startswith("all classes; kernel exp(-total variation / bandwidth)")
    assert "bandwidth = 0.5; estimator = V" in found.convention


def test_kernel_test(rng, key):
    probs, _ = class_rows(rng)
    right = (probs.cumsum(1) > rng.uniform(size=(ROWS, 1))).argmax(1)
    wrong = np.zeros(ROWS, int)
    for estimator, its_key in (("block", None), ("U", key)):
        good, bad = (skce_test(probs, t, its_key, bandwidth=0.5, estimator=estimator) for t in (right, wrong))
        assert 0.02 < good.p_value <= 1 and bad.p_value < 0.01 and bad.scaled > 2
        np.testing.assert_allclose(
            bad.statistic, float(skce(probs, wrong, bandwidth=0.5, estimator=estimator)), rtol=1e-4
        )
    again = skce_test(probs, right, key, bandwidth=0.5, estimator="U")
    assert again == good
    other = skce_test(probs, right, jax.random.key(1), bandwidth=0.5, estimator="U")
    assert other.statistic == again.statistic and other.scaled != again.scaled


P2, Y2 = np.full(2, 0.5, np.float32), np.ones(2, np.float32)
C2, T2 = np.full((2, 3), 1 / 3, np.float32), np.zeros(2, int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmce(P2, Y2, width=0), "`width` must be positive and finite, got 0"),
        (lambda: mmce(P2, Y2, estimator="u"), "`estimator` must be 'V' or 'U', got 'u'"),
        (lambda: skce(C2, T2, estimator="linear"), "`estimator` must be 'U' or 'V' or 'block', got 'linear'"),
        (lambda: skce(C2, T2, bandwidth=-1.0), "`bandwidth` must be positive and finite, got -1.0"),
        (
            lambda: skce(C2, T2, bandwidth=1.0, estimator="block", block_size=3),
            "`block_size` must be .* from 2 to .* 2, got 3",
        ),
        (lambda: skce(C2, T2[:1]), r"`probs` must have shape \(rows, classes\), .* got \(2, 3\), \(1,\) and \(2,\)"),
        (
            lambda: skce_test(C2, T2, estimator="U"),
            "`key` must be given for the estimator 'U' and for no other, got none",
        ),
        (lambda: skce_test(C2, T2, jax.random.key(0)), "`key` must be given for .* got one for 'block'"),
        (lambda: local_calibration_error(P2, Y2, C2[:1]), r"`features` must have shape \(2, features\), got \(1, 3\)"),
        (lambda: local_calibration_error(P2, Y2, C2, gamma=0.0), "`gamma` must be positive and finite, got 0.0"),
        (lambda: local_calibration_error(P2, Y2, C2, num_bins=0), "`num_bins` must be a whole number"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
