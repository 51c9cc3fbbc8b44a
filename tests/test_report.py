import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

import bayescal as bc
from bayescal import plots
from bayescal.binning import Reliability
from bayescal.report import (
    Picture,
    Section,
    Table,
    figure_png,
    number,
    plain,
    save_json,
    save_predictions,
    write_report,
)


def test_json_leaves(tmp_path):
    value = {"a": bc.Estimate(np.float64(0.5), 0.4, 0.6, 10, "x"), 3: [np.int64(2), np.float32(1.5)], "n": None}
    expected = {"a": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "convention": "x"}, "3": [2, 1.5], "n": None}
    assert plain(value) == expected
    assert plain({"x": bc.Estimate(np.inf)}) == {"x": {"value": "inf"}}
    save_json(tmp_path / "sub" / "m.json", value)
    assert json.loads((tmp_path / "sub" / "m.json").read_text()) == expected
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (bc.Estimate(0.98312), "0.9831"),
        (bc.Estimate(0.5, 0.25, 0.75), "0.5000 [0.2500, 0.7500]"),
        (0.000123456, "0.000123"),
        (0.0, "0"),
        (1234.5, "1.23e+03"),
        ("word", "word"),
    ],
)
def test_numbers_in_words(value, words):
    assert number(value) == words


def test_predictions_file(tmp_path):
    pred = bc.Categorical(np.zeros((2, 3, 4), np.float32), np.ones(2, np.float32))
    save_predictions(tmp_path / "a.npz", pred, np.arange(3))
    stored = np.load(tmp_path / "a.npz")
    assert set(stored) == {"logits", "labels"} and stored["logits"].shape == (2, 3, 4)
    save_predictions(tmp_path / "b.npz", bc.Categorical(pred.logits, np.array([1, 0], np.float32)), np.arange(3))
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["member_weights"], [1, 0])


def test_page_is_self_contained(tmp_path):
    figure, axes = plt.subplots()
    plots.curves(axes, {"a": (np.arange(3), np.arange(3))})
    sections = [
        Section("Numbers <&>", "first\nsecond", [Table(["name", "x"], [["a<b", bc.Estimate(1.0, 0.5, 2.0)]])]),
        Section("Figure", "", [Picture("a 'curve'", figure_png(figure))]),
    ]
    write_report(tmp_path / "r.html", "Title", "lead", sections)
    page = (tmp_path / "r.html").read_text()
    assert "Numbers &lt;&amp;&gt;" in page and "a&lt;b" in page and "0.5000 – 2.0000" in page
    assert "data:image/png;base64," in page and "http" not in page.replace("<!doctype html>", "")
    plt.close(figure)


def test_figures_draw_what_they_are_given(rng):
    figure, axes = plt.subplots(1, 3)
    columns = [0.2, np.nan, 0.9], [0.3, np.nan, 0.8], [0.1, 0, 0.6], [0.5, 1, 0.9], [5, 0, 9]
    curve = Reliability(*(np.array(x) for x in columns))
    plots.reliability_diagram(axes[0], curve, title="t")
    points = axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(points, [[0.2, 0.3], [0.9, 0.8]])  # empty bins are not drawn
    values = {"test": {"total": rng.uniform(size=9), "epistemic": rng.uniform(size=9)}}
    plots.uncertainty_parts(axes[1], values)
    assert len(axes[1].patches) == 2
    plots.images([axes[2]], rng.uniform(size=(1, 4, 4, 1)), ["seven"])
    assert axes[2].get_title() == "seven"
    plt.close(figure)
    pred = bc.Categorical(rng.normal(size=(3, 2, 4)).astype(np.float32))
    grid = plots.members(pred, rng.uniform(size=(2, 4, 4)))
    np.testing.assert_allclose(grid[1, 0].images[0].get_array(), np.exp(pred.member_log_probs()[:, 0]), rtol=1e-6)
    plt.close("all")


def test_members_figure_needs_classes(unchecked):
    with pytest.raises(TypeError, match="`pred` must be a Categorical, got Bernoulli"):
        plots.members(bc.Bernoulli(np.zeros((2, 3), np.float32)), np.zeros((3, 4, 4)))
