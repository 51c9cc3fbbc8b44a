"""Does a score tell data unlike the training data from data like it? Sets, groups of sets, mixtures, thresholds."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from bayescal.binning import Z95, wilson_interval
from bayescal.compare import Comparison
from bayescal.evaluate import standard_error
from bayescal.metrics import auroc_estimate
from bayescal.types import Array, Estimate

Scores = Float[Array, "_"] | Integer[Array, "_"]  # sets differ in size
TPR, DRAWS = 0.95, 500
RATES = ("fpr95_out", "fpr95_in")
WORDS = {
    "auroc": "positive class: outside; ties count one half",
    "aupr_out": "average precision, step-wise; positive class: outside",
    "aupr_in": "average precision, step-wise; positive class: inside",
    "fpr95_out": "share of inside flagged where at least 95 % of outside are; positive class: outside",
    "fpr95_in": "share of outside passed where at least 95 % of inside are; positive class: inside",
}


class OpenDomain(NamedTuple):
    """Rows of both kinds as columns, for any function of columns: `bc.average_precision(*mix[:2], weights=mix.weights)`.

    scores: (rows,), higher = more unlike the training data.
    outside: which rows are out of distribution.
    weights: 1 on average; those of outside rows are `outside_share` of their sum.
    """

    scores: Float[Array, "rows"]
    outside: Bool[Array, "rows"]
    weights: Float[Array, "rows"]


def open_domain(inside: Scores, outside: Scores, *, outside_share: float) -> OpenDomain:
    """A mixture of which `outside_share` is out of distribution, by weights: no row is dropped or drawn.

    What depends on how common such rows are (average precision, the risk of what is answered) is then defined at that
    share, whatever the sizes of the two sets.

    Args:
        inside: score of each in-distribution row, higher = more unlike the training data.
        outside: score of each out-of-distribution row.
        outside_share: in (0, 1).

    Raises:
        ValueError: for NaN scores (how many), an empty set, or a share outside (0, 1).
    """
    _check_share("outside_share", outside_share)
    inside, outside = _scores("inside", inside), _scores("outside", outside)
    rows = len(inside) + len(outside)
    is_outside = np.arange(rows) >= len(inside)
    weights = np.where(is_outside, outside_share / len(outside), (1 - outside_share) / len(inside))
    return OpenDomain(np.concatenate([inside, outside]), is_outside, rows * weights)


def evaluate_detection(
    inside: Scores,
    outside: Mapping[str, Scores],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    shifted: Mapping[str, Scores] | None = None,
    shifted_share: float | None = None,
    outside_share: float | None = None,
) -> dict[str, dict[str, Estimate]]:
    """AUROC, AUPR and FPR at 95 % TPR of telling each outside set from the inside rows, with 95 % intervals.

    auroc: P(an outside row scores above an inside row), ties one half; higher is better, 0.5 = chance.
    aupr_out, aupr_in: average precision with that class as the positive one, in (0, 1]; higher is better. It depends on
        how common outside rows are, which the convention states.
    fpr95_out: share of inside flagged by the highest threshold that flags at least 95 % of outside; lower is better.
    fpr95_in: share of outside passed by the lowest threshold that passes at least 95 % of inside; lower is better.

    A mean over sets is not a pool: in the mean every set counts alike (OpenOOD's near and far), in the pool every row.
    Each group gets both, under names that say which. Rows are taken as independent and the sizes of sets as fixed, so that
    intervals come from the noise within each set; sets of a mean share the inside rows, and the interval knows it. AUROC
    (DeLong's variance) and AUPR: by influence, normal on the logit scale. FPR: percentiles of 500 resamples, seed 0. Left
    out where rows show no noise: separated sets, a set of one row. Seen to hold the truth in 93 to 97 of 100 data sets of
    600 inside and 300 outside rows; AUPR is a little too high in small sets, and its interval held it in 92 with 100
    outside rows. About 0.2 s for 10^4 rows. Host only, in float64.

    Args:
        inside: score of each in-distribution test row, higher = more unlike the training data; in the precision of all
            sets, since a number rounded to float32 does not tie with the same in float64.
        outside: name -> scores of an out-of-distribution set.
        groups: name -> names of outside sets, such as near and far.
        shifted: name -> scores of a shifted in-distribution set, which counts as inside ("full-spectrum").
        shifted_share: of the inside weight, that of all shifted rows together; None = every row counts alike.
        outside_share: of the weight of each comparison ("open domain"); None = every row counts alike.

    Returns:
        name -> metric -> Estimate for each outside set, then for `<group>, mean of sets` and `<group>, pooled`.

    Raises:
        ValueError: for NaN scores (how many, and where), empty sets, names that are not distinct, a group of unknown or no
            sets, a share outside (0, 1), or a share of shifted rows without such rows.
    Source: Hendrycks and Gimpel 2017; Yang et al. 2022 and Zhang et al. 2023, OpenOOD (near, far, full-spectrum); DeLong,
    DeLong and Clarke-Pearson 1988; Boyd, Eng and Page 2013 for AUPR on the logit scale (all recalled).
    """
    _check_share("shifted_share", 0.5 if shifted_share is None else shifted_share)
    _check_share("outside_share", 0.5 if outside_share is None else outside_share)
    shifted = dict(shifted or {})
    if shifted_share is not None and not shifted:
        raise ValueError(f"`shifted_share` must come with `shifted` sets, got {shifted_share} and none. Leave it out.")
    sets = _named(inside, shifted, outside)
    parts = {name: [[name]] for name in outside}
    for group, names in (groups or {}).items():
        if isinstance(names, str) or not names or not set(names) <= set(outside) or len(set(names)) < len(names):
            raise ValueError(
                f"`groups[{group!r}]` must be distinct names of outside sets, some of {', '.join(outside)}, got {names!r}. "
                "Check the spelling."
            )
        joined = {f"{group}, mean of sets": [[name] for name in names], f"{group}, pooled": [list(names)]}
        if joined.keys() & parts.keys():
            raise ValueError(f"`groups` must not make names that `outside` has, got {[*joined]}. Rename the sets.")
        parts |= joined
    row = _row_weights({name: len(sets[name]) for name in ("inside", *shifted)}, shifted_share)
    # One sort for all: everything is read from how many rows of each set have each distinct score.
    levels, place = np.unique(np.concatenate(list(sets.values())), return_inverse=True)
    places = dict(zip(sets, np.split(place, np.cumsum([len(x) for x in sets.values()])[:-1]), strict=True))
    counts = {name: np.bincount(x, minlength=len(levels)).astype(np.float64) for name, x in places.items()}
    drawn = _drawn_rates(places, len(levels), row, parts)
    return {name: _estimates(counts, row, each, outside_share, drawn[name]) for name, each in parts.items()}


def detection_threshold(validation: Scores, *, tpr: float = 0.95) -> float:
    """Smallest threshold t with share(validation scores <= t) >= tpr: rows above it are flagged as out of distribution.

    In the score's unit. In-distribution is the positive class: at least `tpr` of its validation rows are kept, all rows of
    equal score together. Outside rows play no part, as they do not where a detector is used.

    Args:
        validation: score of each in-distribution validation row, higher = more unlike the training data.
        tpr: share to keep, in (0, 1].

    Raises:
        ValueError: for NaN scores (how many), no rows, or a share outside (0, 1].
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"`tpr` must lie in (0, 1], got {tpr!r}. The usual choice is 0.95.")
    rising = np.sort(_scores("validation", validation))
    return float(rising[math.ceil(tpr * len(rising) - 1e-9) - 1])


def detection_rates(threshold: float, inside: Scores, outside: Mapping[str, Scores]) -> dict[str, Estimate]:
    """Share of rows with a score above the threshold, in each set, with its 95 % Wilson interval.

    In [0, 1]. Of `inside` (false alarms) lower is better, of the outside sets (detections) higher.

    Args:
        threshold: as `detection_threshold` gives it.
        inside: score of each in-distribution test row: other rows than the threshold was chosen on.
        outside: name -> scores of an out-of-distribution set.

    Raises:
        ValueError: for a threshold that is NaN, NaN scores (how many, and where), empty sets, names not distinct.
    """
    if math.isnan(threshold):
        raise ValueError("`threshold` must be a number, got nan. Choose it by `detection_threshold`.")
    result = {}
    for name, scores in _named(inside, {}, outside).items():
        rate = float((scores > threshold).mean())
        low, high = wilson_interval(rate, len(scores))
        result[name] = Estimate(
            rate, float(low), float(high), len(scores), f"share above {threshold:g}; Wilson interval"
        )
    return result


def compare_detection(
    score_a: Float[Array, "rows"], score_b: Float[Array, "rows"], outside: Bool[Array, "rows"]
) -> Comparison:
    """auroc(a) - auroc(b) of two scores on the same rows, with DeLong's paired 95 % interval and p-value.

    Above 0 = `a` tells outside rows better. Rows that both scores rank alike cancel. NaN p-value and no interval where the
    variance says nothing: no row on which they differ, fewer than two rows of a class.

    Args:
        score_a, score_b: of each row, higher = more unlike the training data; their scales may differ.
        outside: which rows are out of distribution.

    Raises:
        ValueError: for NaN scores, other lengths, outcomes other than 0 and 1, or an absent class.
    Source: DeLong, DeLong and Clarke-Pearson 1988.
    """
    scores = [np.asarray(x, np.float64) for x in (score_a, score_b)]
    a, b = (auroc_estimate(x, np.asarray(outside), "outside") for x in scores)
    outside, error = np.asarray(outside, bool), math.nan
    if 2 <= outside.sum() <= len(outside) - 2:
        moved = [_row_influences(x, outside) for x in scores]
        error = standard_error(moved[0] - moved[1])
    value, half, known = a.value - b.value, Z95 * error, error > 1e-12
    p_value = math.erfc(abs(value) / error / math.sqrt(2)) if known else math.nan
    ends = (value - half, value + half) if known else (None, None)
    words = f"{WORDS['auroc']}; a - b, paired, DeLong"
    return Comparison(Estimate(value, *ends, len(outside), words), p_value, a, b)


def _row_influences(scores, outside) -> np.ndarray:
    """Derivative of the AUROC in each row's weight, a little enlarged, so that squares add up to DeLong's variance."""
    _, place = np.unique(scores, return_inverse=True)
    number = np.where(outside, outside.sum(), (~outside).sum())
    value, of_inside, of_outside = _auroc(np.bincount(place, ~outside), np.bincount(place, outside))
    return (np.where(outside, of_outside[place], of_inside[place]) - value) / np.sqrt(number * (number - 1.0))


def _auroc(inside, outside):
    """(value, its slope in each level's share of inside, and of outside) from the weight at each level, rising scores."""
    total = outside.sum()
    below = (np.cumsum(inside) - inside / 2) / inside.sum()
    above = (total - np.cumsum(outside) + outside / 2) / total
    return (outside * below).sum() / total, above, below


def _average_precision(positive, negative, share):
    """(value, its slope in each level's share of the positives, and of the negatives); the most positive level first."""
    total = positive.sum()
    recall, alarms = np.cumsum(positive) / total, np.cumsum(negative) / negative.sum()
    flagged = share * recall + (1 - share) * alarms
    flagged = np.where(flagged > 0, flagged, 1)
    precision, slope = share * recall / flagged, share * (1 - share) * positive / total / flagged**2
    later = lambda x: np.cumsum(x[::-1])[::-1]  # a row counts at its own threshold and all that come after
    return (positive * precision).sum() / total, precision + later(slope * alarms), -later(slope * recall)


def _rates(inside, outside) -> tuple[float, float]:
    """(fpr95_out, fpr95_in) from weights summed over rising scores."""
    first = np.searchsorted(outside, (1 - TPR + 1e-12) * outside[-1], "right")  # flags at least 95 % of outside
    last = np.searchsorted(inside, (TPR - 1e-12) * inside[-1])  # passes at least 95 % of inside
    flagged = 1 - inside[first - 1] / inside[-1] if first else 1.0
    return float(flagged), float(outside[last] / outside[-1])


def _figures(counts, row, names, outside_share):
    """(metric -> value, metric -> set -> what a row at each level moves, outside share), the sets of `names` pooled."""
    within = np.sum([row[name] * counts[name] for name in row], 0)
    without = np.sum([counts[name] for name in names], 0)
    share = float(without.sum() / (without.sum() + within.sum())) if outside_share is None else outside_share
    aupr, of_outside, of_inside = _average_precision(without[::-1], within[::-1], share)
    found = {
        "auroc": _auroc(within, without),
        "aupr_out": (aupr, of_inside[::-1], of_outside[::-1]),
        "aupr_in": _average_precision(within, without, 1 - share),
    }
    values = {m: float(value) for m, (value, *_) in found.items()}
    values |= dict(zip(RATES, _rates(np.cumsum(within), np.cumsum(without)), strict=True))
    moved = {
        m: {name: row[name] / within.sum() * of_inside for name in row}
        | {name: of_outside / without.sum() for name in names}
        for m, (_, of_inside, of_outside) in found.items()
    }
    return values, moved, share


def _estimates(counts, row, parts, outside_share, drawn) -> dict[str, Estimate]:
    """The metrics of one comparison: the mean over `parts`, each a list of outside sets that are pooled."""
    found = [_figures(counts, row, names, outside_share) for names in parts]
    rows = {name: int(counts[name].sum()) for name in [*row, *(name for names in parts for name in names)]}
    words = "" if len(parts) == 1 else f"; mean of {len(parts)} sets"
    if len(row) > 1:
        weight = {name: row[name] * rows[name] for name in row}
        words += (
            f"; inside: {', '.join(f'{100 * x / sum(weight.values()):.4g} % {name}' for name, x in weight.items())}"
        )
    result = {}
    for m in WORDS:
        value, ends = float(np.mean([values[m] for values, *_ in found])), (None, None)
        if min(rows.values()) > 1 and m in RATES:
            low, high = np.quantile(drawn[m], [0.025, 0.975])
            ends = (float(low), float(high)) if low < high else ends
        elif min(rows.values()) > 1:
            moved = {name: sum(x[m].get(name, 0) for _, x, _ in found) / len(parts) for name in rows}
            ends = _logit_interval(value, sum(_variance(x, counts[name]) for name, x in moved.items()))
        share = f"; outside share {', '.join(f'{x:.4g}' for *_, x in found)}" if m.startswith("aupr") else ""
        result[m] = Estimate(value, *ends, sum(rows.values()), f"{WORDS[m]}{words}{share}")
    return result


def _variance(moved, counts) -> float:
    """Of a sum of what each row moves, the rows drawn independently and their number fixed."""
    number = counts.sum()
    mean = (counts * moved).sum() / number
    return float((counts * (moved - mean) ** 2).sum() * number / (number - 1))


def _logit_interval(value, variance):
    if not 0 < value < 1 or not variance > 1e-24:
        return None, None
    middle, half = math.log(value / (1 - value)), Z95 * math.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-x)) for x in (middle - half, middle + half))
    return low, high


def _drawn_rates(places, levels, row, parts) -> dict[str, dict[str, np.ndarray]]:
    """Comparison -> metric -> the false-positive rate in each resample; all comparisons see the same resamples."""
    rng = np.random.default_rng(0)
    found = {name: [] for name in parts}
    for _ in range(DRAWS):
        through = {
            name: np.cumsum(np.bincount(place[rng.integers(0, len(place), len(place))], minlength=levels))
            for name, place in places.items()
        }
        within = np.sum([row[name] * through[name] for name in row], 0)
        for name, each in parts.items():
            found[name].append(np.mean([_rates(within, np.sum([through[k] for k in part], 0)) for part in each], 0))
    return {name: dict(zip(RATES, np.array(x).T, strict=True)) for name, x in found.items()}


def _row_weights(rows: dict[str, int], shifted_share) -> dict[str, float]:
    """Weight of a row of each inside set: 1 on average."""
    if shifted_share is None:
        return dict.fromkeys(rows, 1.0)
    total, plain = sum(rows.values()), rows["inside"]
    shifted = shifted_share * total / (total - plain)
    return {name: (1 - shifted_share) * total / plain if name == "inside" else shifted for name in rows}


def _named(inside, shifted, outside) -> dict[str, np.ndarray]:
    """Every set under its own name, checked; the plain in-distribution rows are called inside."""
    names = ["inside", *shifted, *outside]
    if not outside or len(set(names)) < len(names):
        raise ValueError(
            "`outside` must hold at least one set, and names be distinct and other than 'inside', got "
            f"{[*shifted, *outside]}. Rename the sets."
        )
    checked = {
        f"{kind}[{name!r}]": x for kind, x in (("shifted", shifted), ("outside", outside)) for name, x in x.items()
    }
    return dict(zip(names, (_scores(k, x) for k, x in {"inside": inside, **checked}.items()), strict=True))


def _scores(name: str, scores) -> np.ndarray:
    scores = np.asarray(scores).astype(np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"`{name}` must be one score per row, at least one, got shape {scores.shape}. Check the split."
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"`{name}` must not be NaN, got {int(np.isnan(scores).sum())} of {len(scores)} rows: no score says nothing of "
            "where a row is from. Find out which rows they are."
        )
    return scores


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"`{name}` must lie in (0, 1), got {share!r}. 0.1 = one row in ten.")
