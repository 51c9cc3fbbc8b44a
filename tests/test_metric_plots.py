"""What is drawn equals the numbers given, read back from the artists."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color

import bayescal as bc
from bayescal import plots
from bayescal.binning import Reliability

pytestmark = pytest.mark.core

# three bins of five are filled; means are far from the bins' centres 0.1, 0.5, 0.9
CURVE = Reliability(
    confidence=np.array([0.02, np.nan, 0.58, np.nan, 0.81]),
    accuracy=np.array([0.10, np.nan, 0.50, np.nan, 0.81]),
    low=np.array([0.01, 0, 0.40, 0, 0.70]),
    high=np.array([0.30, 1, 0.60, 1, 0.90]),
    weight=np.array([10.0, 0, 50, 0, 40]),
)
FULL = [0, 2, 4]


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    figure.canvas.draw()  # whatever was drawn can be rendered
    plt.close(figure)


def of_kind(axes, kind):
    return [c for c in axes.collections if type(c).__name__ == kind]


def segments(lines):
    return np.array(lines.get_segments())  # (lines, 2, 2)


def outline(area):
    """Lower and upper edge at each x of an area filled between two curves: {x: (low, high)}."""
    points = np.concatenate([path.vertices for path in area.get_paths()])
    return {
        x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in np.unique(points[:, 0])
    }


def test_reliability_points_are_at_the_mean_confidence(axes):
    assert plots.reliability_diagram(axes, CURVE, title="t", label="net") is axes
    points = of_kind(axes, "PathCollection")[0]
    np.testing.assert_allclose(points.get_offsets(), np.c_[CURVE.confidence, CURVE.accuracy][FULL])
    sizes = points.get_sizes()
    np.testing.assert_allclose(np.diff(sizes) / np.diff([0.1, 0.5, 0.4]), (sizes[1] - sizes[0]) / 0.4)  # by share
    (bars,) = of_kind(axes, "LineCollection")
    expected = np.stack([np.c_[CURVE.confidence, CURVE.low], np.c_[CURVE.confidence, CURVE.high]], 1)[FULL]
    np.testing.assert_allclose(segments(bars), expected)
    (area,) = of_kind(axes, "FillBetweenPolyCollection")
    assert outline(area) == {CURVE.confidence[i]: (CURVE.low[i], CURVE.high[i]) for i in FULL}
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0], [1, 1]])
    assert axes.get_title() == "t" and axes.get_legend_handles_labels()[1] == ["net"]


def test_reliability_band_curve_and_gaps(axes):
    band = np.array([0.0, np.nan, 0.45, np.nan, 0.75]), np.array([0.05, np.nan, 0.7, np.nan, 0.85])
    curve = np.array([0.1, 0.2, 0.9]), np.array([0.2, np.nan, 0.8])
    plots.reliability_diagram(axes, CURVE, band=band, curve=curve, gaps=True)
    (area,) = of_kind(axes, "FillBetweenPolyCollection")
    assert outline(area) == {CURVE.confidence[i]: (band[0][i], band[1][i]) for i in FULL}
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), np.c_[curve])
    over, under, _ = of_kind(axes, "LineCollection")
    np.testing.assert_allclose(segments(over), [[[0.58, 0.58], [0.58, 0.5]]])  # from the diagonal to the accuracy
    np.testing.assert_allclose(segments(under), [[[0.02, 0.02], [0.02, 0.1]]])  # and none where they are equal
    assert over.get_label() == "over-confident" and same_color(over.get_color()[0][:3], plots.OVER)
    assert under.get_label() == "under-confident" and same_color(under.get_color()[0][:3], plots.UNDER)


def test_prediction_histogram_beneath(axes):
    plots.reliability_diagram(axes, CURVE)
    under = plots.prediction_histogram(plots.below(axes), CURVE.weight)
    np.testing.assert_allclose([bar.get_height() for bar in under.patches], CURVE.weight / 100)
    np.testing.assert_allclose([bar.get_x() for bar in under.patches], [0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose([bar.get_width() for bar in under.patches], 0.2)
    assert under.get_xlim() == axes.get_xlim() and (axes.get_xlabel(), under.get_xlabel()) == ("", "confidence")
    axes.figure.canvas.draw()
    assert under.get_window_extent().y1 < axes.get_window_extent().y0  # it hides nothing


def test_prediction_histogram_with_edges(axes):
    plots.prediction_histogram(axes, np.array([1, 3]), edges=np.array([0, 0.9, 1]))
    assert [(b.get_x(), round(b.get_width(), 9), b.get_height()) for b in axes.patches] == [
        (0, 0.9, 0.25),
        (0.9, 0.1, 0.75),
    ]


def test_risk_coverage(axes):
    lines = {name: (np.array([0.2, 0.6, 1.0]), np.array([0.0, 0.1, 0.1 * k])) for k, name in enumerate("abcdefghij")}
    plots.risk_coverage(axes, lines, title="t", ylabel="generalised risk")
    drawn = axes.lines[::2]
    assert [line.get_label() for line in drawn] == list(lines)  # ten methods are ten lines
    for line, end, (x, y) in zip(drawn, axes.lines[1::2], lines.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.c_[x, y])
        np.testing.assert_array_equal(end.get_xydata(), [[1.0, y[-1]]])
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == len(lines)
    assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "generalised risk"


@pytest.mark.parametrize("band", [(0.8, 1.3), (np.full(4, 0.8), np.full(4, 1.3))])
def test_pit(axes, band):
    density = np.array([1.6, 0.4, 0.8, 1.2])
    plots.pit_histogram(axes, density, band=band)
    np.testing.assert_array_equal([bar.get_height() for bar in axes.patches], density)
    np.testing.assert_array_equal([bar.get_x() for bar in axes.patches], [0, 0.25, 0.5, 0.75])
    (area,) = of_kind(axes, "FillBetweenPolyCollection")
    assert outline(area) == dict.fromkeys(np.arange(5) / 4, (0.8, 1.3))
    assert set(axes.lines[0].get_ydata()) == {1} and axes.get_xlim() == (0, 1)


def test_score_histograms(axes, rng):
    scores = {"in": rng.normal(size=300), "out": rng.normal(2, size=50)}
    plots.score_histograms(axes, scores, bins=10, xlabel="energy")
    edges = np.histogram_bin_edges(np.r_[scores["in"], scores["out"]], 10)
    for polygon, (name, values) in zip(axes.patches, scores.items(), strict=True):
        corners = polygon.get_xy()  # a set of 50 is as tall as one of 300: densities
        np.testing.assert_allclose(corners[1:20:2, 1], np.histogram(values, edges, density=True)[0])
        np.testing.assert_allclose(np.unique(corners[:, 0]), edges)
        assert polygon.get_label() == name
    assert axes.get_xlabel() == "energy" and [t.get_text() for t in axes.get_legend().get_texts()] == ["in", "out"]


def test_critical_difference(axes):
    plots.critical_difference(axes, {"worse": 2.5, "best": 1.25, "worst": 3.0}, 0.5)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["best", "worse", "worst"]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn[:3] == [[[1.0, 0], [1.5, 0]], [[1.25, 0]], [[2.25, 1], [2.75, 1]]]
    assert axes.get_xlabel() == "mean rank, 1 = best; critical difference 0.50"
    assert axes.get_xlim() == (0.5, 3.5)  # no rank is below 1, however long the bars


def test_forest(axes):
    estimates = {
        "single": bc.Estimate(0.12, 0.1, 0.15, 100),
        "ensemble": (0.05, 0.04, 0.06),
        "exact": (0.08, None, None),
    }
    plots.forest(axes, estimates, reference="single", xlabel="ECE")
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn[:5] == [[[0.1, 0], [0.15, 0]], [[0.12, 0]], [[0.04, 1], [0.06, 1]], [[0.05, 1]], [[0.08, 2]]]
    assert set(axes.lines[5].get_xdata()) == {0.12}
    assert [t.get_text() for t in axes.get_yticklabels()] == list(estimates)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is on top


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda axes: plots.reliability_diagram(axes, CURVE._replace(high=np.ones(3))),
            r"`reliability` must be of one axis of length 5, got .*\(3,\).* Give one number for each point or bin",
        ),
        (
            lambda axes: plots.reliability_diagram(axes, CURVE, band=(np.zeros(3), np.ones(3))),
            r"`band` must be of one axis of length 5, got \(3,\) and \(3,\)",
        ),
        (
            lambda axes: plots.reliability_diagram(axes, CURVE, curve=(np.zeros(3), np.ones((3, 1)))),
            r"`curve` must be of one axis of length 3, got \(3,\) and \(3, 1\)",
        ),
        (
            lambda axes: plots.prediction_histogram(axes, np.ones(4), edges=np.ones(4)),
            r"`edges` must be of one axis of length 5, got \(4,\)",
        ),
        (
            lambda axes: plots.risk_coverage(axes, {"a": (np.ones(4), np.ones(3))}),
            r"`a` must be of one axis of length 4, got \(4,\) and \(3,\)",
        ),
        (lambda axes: plots.pit_histogram(axes, 1.0), r"`density` must be of one axis"),
        (
            lambda axes: plots.pit_histogram(axes, np.ones(4), band=(0.5, np.ones(3))),
            r"`band` must be of one axis of length 4, got \(4,\) and \(3,\)",
        ),
        (
            lambda axes: plots.score_histograms(axes, {"a": np.array([1.0, np.nan])}),
            r"`scores\['a'\]` must be one axis of finite values, got shape \(2,\) with 1 finite. Leave the others out",
        ),
        (lambda axes: plots.score_histograms(axes, {"a": np.zeros(0)}), "must be one axis of finite values"),
        (
            lambda axes: plots.forest(axes, {"a": (0.5, 0.6, 0.4)}),
            r"`a` must have low <= high, got 0.6 and 0.4. Give \(value, low, high\)",
        ),
        (
            lambda axes: plots.forest(axes, {"a": (0.5, 0.4, 0.6)}, reference="b"),
            "`reference` must be one of a, got 'b'. Check the spelling",
        ),
        (
            lambda axes: plots.critical_difference(axes, {"a": 1.0}, 1.0),
            r"`ranks` must be at least two, none below 1, and `distance` positive and finite, got {'a': 1.0} and 1.0",
        ),
        (lambda axes: plots.critical_difference(axes, {"a": 1.0, "b": 2.0}, 0.0), "'b': 2.0} and 0.0"),
        (lambda axes: plots.critical_difference(axes, {"a": 1.0, "b": 2.0}, np.inf), "'b': 2.0} and inf"),
        (lambda axes: plots.critical_difference(axes, {"a": np.nan, "b": 2.0}, 1.0), "none below 1, .* got {'a': nan"),
        (lambda axes: plots.critical_difference(axes, {"a": 0.5, "b": 1.5}, 1.0), "none below 1, .* got {'a': 0.5"),
    ],
)
def test_bad_input(unchecked, axes, call, message):
    with pytest.raises(ValueError, match=message):
        call(axes)
