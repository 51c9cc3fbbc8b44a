import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracles
import oracles_ranking as loops
import pytest
from scipy.stats import norm

import bayescal as bc
from bayescal.detection import (
    WORDS,
    compare_detection,
    detection_rates,
    detection_threshold,
    evaluate_detection,
    open_domain,
)
from bayescal.metrics import auroc, average_precision, fpr_at_tpr

pytestmark = pytest.mark.core

REFERENCE = Path(os.environ.get("BAYESCAL_DATA", "../shared/data")).parent / "reference"


def sets(rng, sizes=(60, 45, 30), steps=1):
    """Scores with ties: of inside rows, and of an outside set that is near and one that is far."""
    return [(shift + rng.normal(size=n)).round(steps) for shift, n in zip((0, 0.7, 1.8), sizes, strict=True)]


def joined(inside, outside):
    return np.concatenate([inside, outside]), np.arange(len(inside) + len(outside)) >= len(inside)


def values(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


def test_against_loops(rng):
    for steps in (1, 8):
        inside, near, far = sets(rng, steps=steps)
        found = evaluate_detection(inside, {"near": near, "far": far})
        for name, outside in (("near", near), ("far", far)):
            scores, positive = joined(inside, outside)
            expected = {
                "auroc": oracles.auroc(scores, positive),
                "aupr_out": loops.average_precision(scores, positive),
                "aupr_in": loops.average_precision(-scores, ~positive),
                "fpr95_out": loops.fpr_at_tpr(scores, positive, 0.95),
                "fpr95_in": loops.fpr_at_tpr(-scores, ~positive, 0.95),
            }
            assert values(found[name]) == pytest.approx(expected, rel=1e-12)
            assert {estimate.n for estimate in found[name].values()} == {len(scores)}


def test_stored_oracles():
    """Scikit-learn's and OpenOOD's numbers, which another program has stored."""
    path = REFERENCE / "metrics_oracle_inputs.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    stored = np.load(path)
    outside = stored["o"].astype(bool)
    found = values(evaluate_detection(stored["s"][~outside], {"it": stored["s"][outside]})["it"])
    expected = {"auroc": 0.80575, "aupr_out": 0.7357370741, "aupr_in": 0.8605330906}
    assert found == pytest.approx({**expected, "fpr95_out": 0.725, "fpr95_in": 0.6416666667}, rel=1e-9)


def test_by_hand():
    found = evaluate_detection(np.array([1.0, 2, 3]), {"it": np.array([2.0, 4])})["it"]
    # pairs: 2 beats 1, ties 2, loses to 3; 4 beats all: 4.5 of 6. Falling: 4 | 3 | 2 2 | 1
    precision_in = (1 + 2 / 3 + 3 / 4) / 3  # rising: 1 | 2 2 | 3 | 4
    expected = {
        "auroc": 4.5 / 6,
        "aupr_out": (1 + 2 / 4) / 2,
        "aupr_in": precision_in,
        "fpr95_out": 2 / 3,
        "fpr95_in": 0.5,
    }
    assert values(found) == pytest.approx(expected, rel=1e-12)
    for name, estimate in found.items():
        assert estimate.n == 5 and estimate.convention.startswith(WORDS[name])
    assert found["aupr_in"].convention.endswith("; outside share 0.4")


def test_perfect_reversed_and_chance(rng):
    inside = rng.normal(size=400)
    perfect, reverse, tied = ({"it": x} for x in (inside + 99, inside - 99, np.zeros(100)))
    found = evaluate_detection(inside, perfect)["it"]
    assert values(found) == {"auroc": 1, "aupr_out": 1, "aupr_in": 1, "fpr95_out": 0, "fpr95_in": 0}
    assert all(
        x.low is None and x.high is None for m, x in found.items() if m[:3] != "fpr"
    )  # no noise seen, no certainty
    assert all(x.low == 0 < x.high < 0.04 for m, x in found.items() if m[:3] == "fpr")  # none of so many counts
    found = values(evaluate_detection(inside, reverse)["it"])
    assert (found["auroc"], found["fpr95_out"], found["fpr95_in"]) == (0, 1, 1) and found["aupr_out"] < 0.5
    found = evaluate_detection(np.zeros(300), tied)["it"]
    assert values(found) == pytest.approx(
        {"auroc": 0.5, "aupr_out": 0.25, "aupr_in": 0.75, "fpr95_out": 1, "fpr95_in": 1}
    )
    found = evaluate_detection(inside, {"it": rng.normal(size=300)})["it"]
    assert found["auroc"].low < 0.5 < found["auroc"].high


def test_order_and_monotone_maps_do_not_matter(rng):
    inside, near, far = sets(rng)
    once = evaluate_detection(inside, {"near": near, "far": far})
    again = evaluate_detection(np.exp(inside)[::-1], {"far": np.exp(far), "near": np.exp(near)})
    on_device = evaluate_detection(jnp.asarray(inside), {"far": jnp.asarray(far), "near": jnp.asarray(near)})
    for name in once:
        assert values(on_device[name]) == values(once[name])
        assert values(again[name]) == pytest.approx(values(once[name]), rel=1e-12)
    # the other way round, inside and outside change places
    turned = values(evaluate_detection(-near, {"it": -inside})["it"])
    swapped = {"auroc": "auroc", "aupr_out": "aupr_in", "fpr95_out": "fpr95_in"}
    swapped |= {other: one for one, other in swapped.items()}
    assert {swapped[m]: x for m, x in turned.items()} == pytest.approx(values(once["near"]), rel=1e-12)


def test_infinite_scores(rng):
    found = evaluate_detection(np.array([-np.inf, 0, 1]), {"it": np.array([np.inf, 0.5])})["it"]
    assert found["auroc"].value == pytest.approx(5 / 6)


def test_mean_over_sets_is_not_the_pool(rng):
    inside, near, far = sets(rng)
    found = evaluate_detection(inside, {"a": near, "b": far}, groups={"all": ["a", "b"], "one": ["b"]})
    assert list(found) == ["a", "b", "all, mean of sets", "all, pooled", "one, mean of sets", "one, pooled"]
    mean = {m: (found["a"][m].value + found["b"][m].value) / 2 for m in WORDS}
    assert values(found["all, mean of sets"]) == pytest.approx(mean, rel=1e-12)
    pooled = evaluate_detection(inside, {"it": np.concatenate([near, far])})["it"]
    assert values(found["all, pooled"]) == pytest.approx(values(pooled), rel=1e-12)
    assert all(abs(found["all, pooled"][m].value - x) > 1e-3 for m, x in mean.items())
    assert found["one, pooled"] == found["one, mean of sets"] == found["b"]
    assert "mean of 2 sets" in found["all, mean of sets"]["auroc"].convention
    assert found["all, mean of sets"]["aupr_in"].convention.endswith("outside share 0.4286, 0.3333")
    assert {x.n for x in found["all, mean of sets"].values()} == {135}


def test_outside_share_is_repetition(rng):
    """Average precision at a stated share, by weights: as if the inside rows were there nine times; the rest stays."""
    inside, near, _ = sets(rng, (60, 60, 1))
    plain, rare = (evaluate_detection(inside, {"it": near}, outside_share=x)["it"] for x in (None, 0.1))
    often = values(evaluate_detection(np.tile(inside, 9), {"it": near})["it"])
    assert values(rare) == pytest.approx(often, rel=1e-12)
    assert rare["aupr_out"].value < plain["aupr_out"].value and rare["aupr_in"].value > plain["aupr_in"].value
    for m in ("auroc", "fpr95_out", "fpr95_in"):
        assert rare[m] == plain[m]
    assert rare["aupr_out"].convention.endswith("outside share 0.1") and rare["aupr_out"].n == 120


def test_open_domain_columns(rng):
    inside, near, _ = sets(rng)
    mix = open_domain(inside, near, outside_share=0.2)
    assert mix.weights.sum() == pytest.approx(105) and mix.weights[mix.outside].sum() == pytest.approx(21)
    found = evaluate_detection(inside, {"it": near}, outside_share=0.2)["it"]
    functions = {
        "auroc": auroc(mix.scores, mix.outside, weights=mix.weights),
        "aupr_out": average_precision(*mix[:2], weights=mix.weights),
        "aupr_in": average_precision(-mix.scores, ~mix.outside, weights=mix.weights),
        "fpr95_out": fpr_at_tpr(*mix[:2], weights=mix.weights),
        "fpr95_in": fpr_at_tpr(-mix.scores, ~mix.outside, weights=mix.weights),
    }
    functions = {name: float(value) for name, value in functions.items()}
    assert values(found) == pytest.approx(functions, rel=1e-12)


def test_full_spectrum(rng):
    """Shifted rows count as inside: joined row by row, or at a stated share of the inside weight."""
    inside, near, _ = sets(rng)
    noise, blur = 0.4 + rng.normal(size=20).round(1), 0.8 + rng.normal(size=10).round(1)
    settings = {"shifted": {"noise": noise, "blur": blur}, "groups": {"all": ["it"]}}
    rows = evaluate_detection(inside, {"it": near}, **settings)["it"]
    both = np.concatenate([inside, noise, blur])
    assert values(rows) == pytest.approx(values(evaluate_detection(both, {"it": near})["it"]), rel=1e-12)
    assert "inside: 66.67 % inside, 22.22 % noise, 11.11 % blur" in rows["auroc"].convention
    half = evaluate_detection(inside, {"it": near}, shifted_share=0.5, **settings)["it"]
    double = np.concatenate([inside, *[noise, blur] * 2])
    at = evaluate_detection(double, {"it": near}, outside_share=45 / 135)["it"]  # the weight of inside stays 90 rows
    assert values(half) == pytest.approx(values(at), rel=1e-12)
    assert "inside: 50 % inside, 33.33 % noise, 16.67 % blur" in half["fpr95_in"].convention and half["auroc"].n == 135
    assert half["auroc"].value < rows["auroc"].value  # what is shifted looks more like outside


def standard_error(estimate):
    """Read back from the interval on the logit scale."""
    low, high = (math.log(x / (1 - x)) for x in (estimate.low, estimate.high))
    return (high - low) / 2 / 1.959963984540054 * estimate.value * (1 - estimate.value)


def test_interval_of_auroc_is_delong(rng):
    inside, near, _ = sets(rng, (160, 120, 1))
    found, expected = (
        evaluate_detection(inside, {"it": near})["it"]["auroc"],
        bc.auroc_estimate(*joined(inside, near), "x"),
    )
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-10)


@pytest.mark.parametrize("protocol", ["one", "mean", "pooled", "full-spectrum"])
def test_intervals_are_the_jackknife_of_each_set(rng, protocol):
    """Leaving rows out one by one, set by set, at fixed shares. Every row is there fifty times, so that leaving out one is
    close to the slope that the interval rests on."""
    sizes, copies = {"inside": 60, "noise": 40, "near": 50, "far": 30}, 50
    shifts = {"inside": 0, "noise": 0.3, "near": 0.7, "far": 1.8}
    scores = {name: np.tile(shifts[name] + rng.normal(size=n), copies) for name, n in sizes.items()}

    def figures(scores):
        outside = {"near": scores["near"], "far": scores["far"]}
        spectrum = {"shifted": {"noise": scores["noise"]}, "shifted_share": 0.4} if protocol == "full-spectrum" else {}
        found = evaluate_detection(
            scores["inside"], outside, groups={"g": list(outside)}, outside_share=0.3, **spectrum
        )
        return found[{"mean": "g, mean of sets", "pooled": "g, pooled"}.get(protocol, "near")]

    used = [name for name in sizes if name != "noise" or protocol == "full-spectrum"]
    used = [name for name in used if name != "far" or protocol in ("mean", "pooled")]
    variance = dict.fromkeys(("auroc", "aupr_out", "aupr_in"), 0.0)
    for name in used:
        left = [values(figures(scores | {name: np.delete(scores[name], i)})) for i in range(sizes[name])]
        for m in variance:
            x = np.array([each[m] for each in left])
            variance[m] += copies * ((x - x.mean()) ** 2).sum()
    found = figures(scores)
    for m, expected in variance.items():
        np.testing.assert_allclose(standard_error(found[m]), math.sqrt(expected), rtol=0.005)


def delong(a, b, outside):
    """(difference, standard error) by loops over pairs."""
    beat = lambda x, y: 1.0 if x > y else 0.5 if x == y else 0.0
    ins, outs = np.flatnonzero(~outside), np.flatnonzero(outside)
    gap = np.array([[beat(a[j], a[i]) - beat(b[j], b[i]) for i in ins] for j in outs])
    return gap.mean(), math.sqrt(gap.mean(1).var(ddof=1) / len(outs) + gap.mean(0).var(ddof=1) / len(ins))


def test_comparison_against_loops(rng):
    inside, near, _ = sets(rng, (130, 110, 1))
    a, outside = joined(inside, near)
    b = (a + rng.normal(size=len(a))).round(1)
    found = compare_detection(a, b, outside)
    value, error = delong(a, b, outside)
    z = norm.ppf(0.975)
    np.testing.assert_allclose(found.difference[:3], [value, value - z * error, value + z * error], rtol=1e-9)
    np.testing.assert_allclose(found.p_value, 2 * norm.sf(abs(value) / error), rtol=1e-6)
    assert found.a == bc.auroc_estimate(a, outside, "outside") and found.difference.n == 240
    assert found.difference.value > 0 and found.difference.high - found.difference.low < found.b.high - found.b.low
    turned = compare_detection(np.exp(b), a, outside)
    np.testing.assert_allclose([-turned.difference.value, turned.p_value], [value, found.p_value], rtol=1e-9)


def test_comparison_where_the_variance_says_nothing(rng):
    inside, near, _ = sets(rng, (150, 150, 1))
    a, outside = joined(inside, near)
    same = compare_detection(a, 2 * a, outside)
    assert same.difference[:3] == (0, None, None) and math.isnan(same.p_value)
    for few in (slice(249), slice(51, None)):  # 99 rows of a class: AUROC's interval would hold the truth too seldom
        found = compare_detection(a[few], -a[few], outside[few])
        assert math.isnan(found.p_value) and {x.low for x in (found.difference, found.a, found.b)} == {None}
    found = compare_detection(a[:250], -a[:250], outside[:250])
    assert None not in {x.low for x in (found.difference, found.a, found.b)} and found.p_value < 0.05


@pytest.mark.parametrize(("metric", "fewest"), [("auroc", 100), ("aupr_out", 300), ("aupr_in", 300)])
def test_fewest_rows_for_an_interval(rng, metric, fewest):
    inside, outside = rng.normal(size=2 * fewest), 1 + rng.normal(size=fewest)
    one = lambda *columns, **settings: evaluate_detection(*columns, **settings)[
        "g, pooled" if "groups" in settings else "a"
    ]
    assert one(inside, {"a": outside})[metric].low is not None
    assert one(inside, {"a": outside[1:]})[metric].low is None
    assert one(inside[: fewest - 1], {"a": outside})[metric].low is None
    both = {"a": outside[2:], "b": outside[:2]}  # a pool is as large as its sets together
    assert one(inside, both, groups={"g": ["a", "b"]})[metric].low is not None
    # 25 shifted rows that weigh as much as all others: together at most 4 x 25 effective rows
    spectrum = {"shifted": {"s": inside[:25]}, "shifted_share": 0.5}
    assert one(inside, {"a": outside}, **spectrum)[metric].low is None


def test_small_sets(rng):
    found = evaluate_detection(np.array([0.0]), {"it": np.array([1.0]), "many": rng.normal(size=9)})
    assert found["it"]["auroc"][:4] == (1, None, None, 2)
    assert all(x.low is None for x in found["many"].values())


def test_errors(rng, unchecked):
    inside, near, far = sets(rng)
    broken = near.copy()
    broken[[4, 9]] = np.nan
    with pytest.raises(ValueError, match=r"`outside\['b'\]` must not be NaN, got 2 of 45 rows: no score says nothing"):
        evaluate_detection(inside, {"a": far, "b": broken})
    with pytest.raises(ValueError, match=r"`inside` must not be NaN, got 2 of 45 rows"):
        evaluate_detection(broken, {"a": far})
    with pytest.raises(ValueError, match=r"`shifted\['noise'\]` must not be NaN, got 2 of 45 rows"):
        evaluate_detection(inside, {"a": far}, shifted={"noise": broken})
    with pytest.raises(ValueError, match=r"`validation` must not be NaN, got 2 of 45 rows"):
        detection_threshold(broken)
    with pytest.raises(ValueError, match=r"`outside\['a'\]` must not be NaN"):
        detection_rates(0.0, inside, {"a": broken})
    with pytest.raises(ValueError, match=r"`outside` must not be NaN"):
        open_domain(inside, broken, outside_share=0.5)
    with pytest.raises(ValueError, match=r"`outside\['a'\]` must be one score per row, at least one, got shape \(0,\)"):
        evaluate_detection(inside, {"a": np.zeros(0)})
    with pytest.raises(ValueError, match=r"`inside` must be one score per row, at least one, got shape \(60, 1\)"):
        evaluate_detection(inside[:, None], {"a": near})
    with pytest.raises(ValueError, match=r"`outside` must hold at least one set, .* got \[\]"):
        evaluate_detection(inside, {})
    with pytest.raises(ValueError, match=r"names be distinct and other than 'inside', got \['inside'\]. Rename"):
        detection_rates(0.0, inside, {"inside": near})
    with pytest.raises(ValueError, match=r"got \['a', 'a'\]"):
        evaluate_detection(inside, {"a": near}, shifted={"a": near})
    for names in (["b"], [], ["a", "a"], "a"):
        with pytest.raises(
            ValueError, match=r"`groups\['near'\]` must be distinct names of outside sets, some of a, got"
        ):
            evaluate_detection(inside, {"a": near}, groups={"near": names})
    with pytest.raises(
        ValueError, match=r"`groups` must not make names that `outside` has, got \['a, mean of sets', 'a, po"
    ):
        evaluate_detection(inside, {"a": near, "a, pooled": far}, groups={"a": ["a"]})
    with pytest.raises(ValueError, match=r"`shifted_share` must come with `shifted` sets, got 0.5 and none"):
        evaluate_detection(inside, {"a": near}, shifted_share=0.5)
    for name in ("shifted_share", "outside_share"):
        for share in (0.0, 1.0, math.nan):
            with pytest.raises(ValueError, match=rf"`{name}` must lie in \(0, 1\), got {share}"):
                evaluate_detection(inside, {"a": near}, shifted={"b": far}, **{name: share})
    with pytest.raises(ValueError, match=r"`outside_share` must lie in \(0, 1\), got 2"):
        open_domain(inside, near, outside_share=2)
    for tpr in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`tpr` must lie in \(0, 1\], got"):
            detection_threshold(inside, tpr=tpr)
    with pytest.raises(ValueError, match=r"`threshold` must be a number, got nan\. Choose it by"):
        detection_rates(math.nan, inside, {"a": near})
    scores, outside = joined(inside, broken)
    with pytest.raises(ValueError, match="`scores` must not be NaN, got 2 of 105"):
        compare_detection(scores, scores, outside)
    scores = np.nan_to_num(scores)
    with pytest.raises(ValueError, match="must be one axis of the same length"):
        compare_detection(scores, scores[1:], outside)
    with pytest.raises(ValueError, match="must hold both classes"):
        compare_detection(scores, -scores, np.zeros(105, bool))
    with pytest.raises(ValueError, match="must hold both classes"):
        compare_detection(scores, -scores, np.where(outside, 2, 0))
