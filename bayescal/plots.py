"""Figures: numpy in, matplotlib axes out. Nothing here computes a metric."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bayescal.binning import Reliability
from bayescal.predictive import Categorical, Predictive

COLOURS = ("#4c5a67", "#0b6e99", "#d9730d", "#7b4fb5", "#2a8c55", "#b5396b", "#8a6d00", "#3d7ea6")


def reliability_diagram(axes, reliability: Reliability, *, title: str = "", colour: str = COLOURS[1]):
    """Accuracy against mean confidence per bin with its 95 % Wilson band; point area grows with the bin's weight."""
    shown = reliability.weight > 0
    x, y = reliability.confidence[shown], reliability.accuracy[shown]
    low, high = reliability.low[shown], reliability.high[shown]
    axes.plot([0, 1], [0, 1], color="#b8bec4", lw=1, zorder=1)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0, zorder=2)
    axes.vlines(x, low, high, color=colour, lw=1, alpha=0.6, zorder=3)
    share = reliability.weight[shown] / reliability.weight.sum()
    axes.scatter(x, y, s=10 + 120 * share, color=colour, zorder=4)
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), title=title, xlabel="confidence", ylabel="accuracy")
    axes.set_aspect("equal")
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
