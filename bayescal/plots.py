"""Figures: numpy in, matplotlib axes out. Nothing here computes a metric."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bayescal.binning import Reliability
from bayescal.predictive import Categorical, Predictive

COLOURS = ("#4c5a67", "#0b6e99", "#d9730d", "#7b4fb5", "#2a8c55", "#b5396b", "#8a6d00", "#3d7ea6")
OVER, UNDER = "#d55e00", "#0072b2"  # over- and under-confident: apart for every kind of colour vision


def reliability_diagram(
    axes,
    reliability: Reliability,
    *,
    band: tuple[np.ndarray, np.ndarray] | None = None,
    curve: tuple[np.ndarray, np.ndarray] | None = None,
    gaps: bool = False,
    title: str = "",
    label: str = "",
    colour: str = COLOURS[1],
):
    """Accuracy against mean confidence per bin, with intervals; the area of a point grows with its bin's weight.

    Points are at the mean confidence, not at the bins' centres: calibrated bins lie on the diagonal.

    Args:
        axes: matplotlib axes.
        reliability: of each bin; empty bins are not drawn. `low` and `high` are bars at the points.
        band: (low, high), each (bins,), where calibrated bins would lie ("consistency"), shaded in grey; None = the
            intervals are shaded instead.
        curve: (confidence, accuracy), each (points,), of a smooth estimate; drawn as a line, not where NaN.
        gaps: draws each bin's distance to the diagonal, in one colour where over-confident, another where
            under-confident.
        title: of the axes.
        label: of the points, for a legend.
        colour: of points, intervals and curve.

    Raises:
        ValueError: for arrays of other lengths.
    """
    bins = _lengths("reliability", *reliability)
    shown = reliability.weight > 0
    x, y = reliability.confidence[shown], reliability.accuracy[shown]
    low, high = reliability.low[shown], reliability.high[shown]
    axes.plot([0, 1], [0, 1], color="#b8bec4", lw=1, zorder=1)
    if band is None:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0, zorder=2)
    else:
        _lengths("band", *band, expected=bins)
        axes.fill_between(x, *(np.asarray(end)[shown] for end in band), color="#8a939b", alpha=0.3, lw=0, zorder=2)
    if gaps:
        for name, side, tint in (("over-confident", x > y, OVER), ("under-confident", x < y, UNDER)):
            axes.vlines(x[side], x[side], y[side], color=tint, lw=5, alpha=0.75, zorder=2.5, label=name)
    if curve is not None:
        _lengths("curve", *curve)
        axes.plot(*curve, color=colour, lw=1.8, zorder=3.5)
    axes.vlines(x, low, high, color=colour, lw=1, alpha=0.6, zorder=3)
    share = reliability.weight[shown] / reliability.weight.sum()
    axes.scatter(x, y, s=10 + 120 * share, color=colour, zorder=4, label=label or None)
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), title=title, xlabel="confidence", ylabel="accuracy")
    axes.set_aspect("equal")
    return axes


def prediction_histogram(axes, weight: np.ndarray, *, edges: np.ndarray | None = None, colour: str = COLOURS[1]):
    """Share of the predictions in each bin, as bars.

    Args:
        axes: matplotlib axes; `below(axes)` makes some beneath a reliability diagram.
        weight: of each bin, (bins,): counts or sums of weights.
        edges: of the bins, (bins + 1,); None = equal widths on [0, 1].
        colour: of the bars.

    Raises:
        ValueError: for edges that do not fit the bins.
    """
    weight = np.asarray(weight)
    edges = np.arange(len(weight) + 1) / len(weight) if edges is None else np.asarray(edges)
    _lengths("edges", edges, expected=len(weight) + 1)
    axes.bar(
        edges[:-1], weight / weight.sum(), np.diff(edges), align="edge", color=colour, alpha=0.6, ec="white", lw=0.5
    )
    axes.set(xlim=(0, 1.02), ylabel="share", xlabel="confidence")
    return axes


def below(axes, height: float = 0.22):
    """Axes beneath others, with the same x axis, whose ticks and label they take over: for `prediction_histogram`.

    Args:
        axes: matplotlib axes.
        height: of the new axes, as a share of the given ones'.
    """
    under = axes.inset_axes([0, -height - 0.04, 1, height], sharex=axes)
    axes.tick_params(labelbottom=False)
    under.set_xlabel(axes.get_xlabel())
    axes.set_xlabel("")
    return under


def risk_coverage(axes, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "", ylabel: str = "risk"):
    """Risk of what is answered against the share answered, one line a method; its end is the risk without rejection.

    Args:
        axes: matplotlib axes.
        lines: name -> (coverage, risk), each (points,).
        title: of the axes.
        ylabel: which risk.

    Raises:
        ValueError: for a coverage and a risk of other lengths.
    """
    styles = ("-", "--", "-.")  # three styles and eight colours repeat together after 24 methods
    for i, (name, (coverage, risk)) in enumerate(lines.items()):
        _lengths(name, coverage, risk)
        style = {"color": COLOURS[(i + 1) % len(COLOURS)], "zorder": 3}
        axes.plot(coverage, risk, label=name, lw=1.8, ls=styles[i % len(styles)], **style)
        axes.plot(coverage[-1:], risk[-1:], marker="o", ms=4, **style)
    axes.set(xlim=(0, 1.02), title=title, xlabel="coverage", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e7eaed", lw=0.7)
    return axes


def pit_histogram(axes, density: np.ndarray, *, band: tuple | None = None, title: str = "", colour: str = COLOURS[1]):
    """Density of the probability integral transform in bins of equal width: flat at 1 where forecasts are calibrated.

    Hollow in the middle = intervals too narrow, a hump = too wide, a slope = biased.

    Args:
        axes: matplotlib axes.
        density: of each bin, (bins,): its share of the rows times the number of bins.
        band: (low, high), scalars or (bins,): where a calibrated forecaster's bins would lie.
        title: of the axes.
        colour: of the bars.

    Raises:
        ValueError: for a band of another length.
    """
    bins = _lengths("density", density)
    edges = np.arange(bins + 1) / bins
    axes.bar(edges[:-1], density, 1 / bins, align="edge", color=colour, alpha=0.6, ec="white", lw=0.5, zorder=2)
    if band is not None:
        low, high = (np.broadcast_to(end, bins) if np.ndim(end) == 0 else np.asarray(end) for end in band)
        _lengths("band", low, high, expected=bins)
        ends = [np.append(end, end[-1]) for end in (low, high)]
        axes.fill_between(edges, *ends, step="post", color="#4c5a67", alpha=0.25, lw=0, zorder=3)
    axes.axhline(1, color="#4c5a67", lw=1, zorder=3)
    axes.set(xlim=(0, 1), title=title, xlabel="probability integral transform", ylabel="density")
    axes.set_ylim(bottom=0)
    return axes


def score_histograms(axes, scores: Mapping[str, np.ndarray], *, bins: int = 40, title: str = "", xlabel: str = "score"):
    """Densities of a score in two or more sets, over the same bins: in- and out-of-distribution, correct and wrong.

    Args:
        axes: matplotlib axes.
        scores: name of the set -> values (n,), finite; sets may differ in size.
        bins: how many, from the least to the largest of all values.
        title: of the axes.
        xlabel: which score.

    Raises:
        ValueError: for values that are not finite, or an empty set.
    """
    for name, values in scores.items():
        if not np.size(values) or np.ndim(values) != 1 or not np.isfinite(values).all():
            raise ValueError(
                f"`scores[{name!r}]` must be one axis of finite values, got shape {np.shape(values)} with "
                f"{int(np.isfinite(values).sum())} finite. Leave the others out, and say so in the title."
            )
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(x) for x in scores.values()]), bins)
    for (name, values), colour, hatch in zip(scores.items(), COLOURS[1:], ("", "///", "...", "xxx"), strict=False):
        look = {"fc": f"{colour}66", "ec": colour, "lw": 1.4, "hatch": hatch}
        axes.hist(values, edges, density=True, histtype="stepfilled", label=name, **look)
    axes.set(title=title, xlabel=xlabel, ylabel="density")
    axes.legend(fontsize=8, frameon=False)
    return axes


def forest(axes, estimates: Mapping[str, tuple], *, reference: str | None = None, title: str = "", xlabel: str = ""):
    """One figure of several models with its intervals, a row each, the first on top ("forest plot").

    Args:
        axes: matplotlib axes.
        estimates: name -> (value, low, high), or an `Estimate`; None for low and high = no interval.
        reference: name whose value is drawn through all rows.
        title: of the axes.
        xlabel: the figure's name.

    Raises:
        ValueError: for an interval that is the wrong way round, or a reference that is none of the names.
    """
    if reference is not None and reference not in estimates:
        raise ValueError(f"`reference` must be one of {', '.join(estimates)}, got {reference!r}. Check the spelling.")
    for row, (name, (value, low, high, *_)) in enumerate(estimates.items()):
        if low is not None and not low <= high:
            raise ValueError(f"`{name}` must have low <= high, got {low!r} and {high!r}. Give (value, low, high).")
        colour = COLOURS[1]
        if low is not None:
            axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="butt", zorder=2)
        axes.plot([value], [row], marker="o", ms=6, color=colour, zorder=3)
    if reference is not None:
        axes.axvline(estimates[reference][0], color="#8a939b", lw=1, ls="--", zorder=1)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set(ylim=(len(estimates) - 0.5, -0.5), title=title, xlabel=xlabel)
    axes.grid(axis="x", color="#e7eaed", lw=0.7)
    return axes


def critical_difference(axes, ranks: Mapping[str, float], distance: float, *, title: str = ""):
    """Mean ranks of methods over data sets, best on top, with bars of half the critical difference to each side.

    Two methods are told apart where their bars do not overlap.

    Args:
        axes: matplotlib axes.
        ranks: name -> mean rank, 1 = best.
        distance: least difference of two mean ranks that is told from chance (Nemenyi's, for one).
        title: of the axes.

    Raises:
        ValueError: for fewer than two names, ranks below 1 or NaN, or a distance that is not positive and finite.
    Source: Demsar 2006.
    """
    if len(ranks) < 2 or not 0 < distance < np.inf or not min(ranks.values()) >= 1:
        raise ValueError(
            "`ranks` must be at least two, none below 1, and `distance` positive and finite, got "
            f"{dict(ranks)} and {distance!r}. "
            "Pass mean ranks over data sets, and the critical difference."
        )
    names = sorted(ranks, key=lambda name: ranks[name])
    bars = {name: (ranks[name], ranks[name] - distance / 2, ranks[name] + distance / 2) for name in names}
    forest(axes, bars, title=title, xlabel=f"mean rank, 1 = best; critical difference {distance:.2f}")
    axes.set_xlim(0.5, max(ranks.values()) + 0.5)  # no rank is better than the first: bars beyond it say nothing
    return axes


def uncertainty_parts(axes, parts: Mapping[str, Mapping[str, np.ndarray]], *, title: str = "", unit: str = "nats"):
    """Quartile boxes of total, aleatoric and epistemic uncertainty, one group of boxes per data set.

    Args:
        axes: matplotlib axes.
        parts: data set -> part -> values (n,).
        title: of the axes.
        unit: of the values.
    """
    names = list(parts)
    kinds = list(next(iter(parts.values())))
    width = 0.8 / len(kinds)
    for j, kind in enumerate(kinds):
        boxes = axes.boxplot(
            [parts[name][kind] for name in names],
            positions=np.arange(len(names)) + (j - (len(kinds) - 1) / 2) * width,
            widths=width * 0.85,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            medianprops={"color": "black"},
        )
        for box in boxes["boxes"]:
            box.set(facecolor=COLOURS[j], alpha=0.75, lw=0.5)
        boxes["boxes"][0].set_label(kind)
    axes.set_xticks(range(len(names)), names)
    axes.set(title=title, ylabel=unit)
    return axes


def curves(
    axes, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "", xlabel: str = "", ylabel: str = ""
):
    """One line per name; `lines` is name -> (x, y), drawn in the order given."""
    for (name, (x, y)), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(x, y, label=name, color=colour, lw=1.6, marker="o" if len(x) < 12 else None, ms=3)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#e7eaed", lw=0.7)
    return axes


def images(axes: Iterable, pictures: np.ndarray, titles: Sequence[str]):
    """One picture (height, width) or (height, width, channels) per axes, with a title each."""
    for one, picture, title in zip(axes, pictures, titles, strict=False):
        one.imshow(np.squeeze(picture), cmap="gray_r", interpolation="nearest")
        one.set_title(title, fontsize=8)
        one.set_xticks([])
        one.set_yticks([])
    return axes


def members(pred: Predictive, inputs: np.ndarray):
    """Each picture above the class probabilities of every member (rows): where members disagree, rows differ.

    Args:
        pred: predictive of a few examples, such as `take(pred, worst)`.
        inputs: their pictures (n, height, width) or (n, height, width, channels).

    Returns:
        The matplotlib figure's axes, shape (2, n).
    """
    import matplotlib.pyplot as plt

    if not isinstance(pred, Categorical):
        raise TypeError(
            f"`pred` must be a Categorical, got {type(pred).__name__}. This figure shows class probabilities."
        )

    probs = np.exp(np.asarray(pred.member_log_probs()))
    number = probs.shape[1]
    figure, axes = plt.subplots(2, number, figsize=(1.3 * number, 2.8), squeeze=False, layout="constrained")
    images(axes[0], inputs, [""] * number)
    for i, one in enumerate(axes[1]):
        one.imshow(probs[:, i], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        one.set_xticks(range(probs.shape[-1]))
        one.set_yticks([])
        one.tick_params(labelsize=6)
    axes[1, 0].set_ylabel("member")
    figure.supxlabel("class", fontsize=9)
    return axes


def panels(number: int, *, width: float = 4.6, height: float = 4.6):
    """A figure of `number` axes side by side: (figure, list of axes).

    Args:
        number: of axes.
        width: of each, in inches.
        height: in inches.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, number, figsize=(width * number, height), squeeze=False, layout="constrained")
    plt.close(figure)  # drawn by whoever holds it: pyplot need not keep it
    return figure, list(axes[0])


def _lengths(name: str, *arrays, expected: int | None = None) -> int:
    shapes = [np.shape(x) for x in arrays]
    expected = shapes[0][0] if expected is None and shapes[0] else expected
    if any(shape != (expected,) for shape in shapes):
        raise ValueError(
            f"`{name}` must be of one axis of length {expected}, got {' and '.join(map(str, shapes))}. "
            "Give one number for each point or bin."
        )
    return shapes[0][0]
