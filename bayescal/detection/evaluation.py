"""AUROC, AUPR and FPR of telling sets of outside rows from inside rows, one by one, in groups and mixtures."""

from collections.abc import Mapping, Sequence

import numpy as np

from bayescal.detection.false_positives import cuts, false_positive_rate
from bayescal.detection.influence import (
    auroc_and_slopes,
    average_precision_and_slopes,
    logit_interval,
    variance_of_sum,
)
from bayescal.detection.sets import Scores, check_share, named
from bayescal.types import Estimate

FEWEST = {"auroc": 100, "aupr_out": 300, "aupr_in": 300}  # rows of each class, for an interval by influence
WORDS = {
    "auroc": "positive class: outside; ties count one half",
    "aupr_out": "average precision, step-wise; positive class: outside",
    "aupr_in": "average precision, step-wise; positive class: inside",
    "fpr95_out": "share of inside flagged where at least 95 % of outside are; positive class: outside",
    "fpr95_in": "share of outside passed where at least 95 % of inside are; positive class: inside",
}


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
    intervals come from the noise within each set; sets of a mean share the inside rows, and the interval knows it. Nothing
    is drawn: a comparison's figures depend on its own sets alone.

    AUROC (DeLong's variance), from 100 rows of each class on, and AUPR, from 300 on: by influence, normal on the logit
    scale; left out where rows show no noise (separated sets, a set of one row). Weighted rows count as (sum w)^2 / sum w^2.
    Seen to hold the truth in 93 to 97 of 100 data sets of 600 inside and 300 outside rows, and in 89 to 97 with the fewest
    rows, where AUPR is a little too high. FPR, from 72 rows of the positive class on: by order statistics and counts, see
    `false_positive_rate`; seen to hold the truth in 94 to 99 of 100 data sets, and wide below 100 rows.
    About 20 ms for 2 x 10^4 rows. Host only, in float64.

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
    check_share("shifted_share", 0.5 if shifted_share is None else shifted_share)
    check_share("outside_share", 0.5 if outside_share is None else outside_share)
    shifted = dict(shifted or {})
    if shifted_share is not None and not shifted:
        raise ValueError(f"`shifted_share` must come with `shifted` sets, got {shifted_share} and none. Leave it out.")
    sets = named(inside, shifted, outside)
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
    return {name: _estimates(counts, row, each, outside_share) for name, each in parts.items()}


def _figures(counts, row, names, outside_share):
    """(metric -> value, metric -> set -> what a row at each level moves, outside share), the sets of `names` pooled."""
    within = np.sum([row[name] * counts[name] for name in row], 0)
    without = np.sum([counts[name] for name in names], 0)
    share = float(without.sum() / (without.sum() + within.sum())) if outside_share is None else outside_share
    aupr, of_outside, of_inside = average_precision_and_slopes(without[::-1], within[::-1], share)
    found = {
        "auroc": auroc_and_slopes(within, without),
        "aupr_out": (aupr, of_inside[::-1], of_outside[::-1]),
        "aupr_in": average_precision_and_slopes(within, without, 1 - share),
    }
    values = {m: float(value) for m, (value, *_) in found.items()}
    moved = {
        m: {name: row[name] / within.sum() * of_inside for name in row}
        | {name: of_outside / without.sum() for name in names}
        for m, (_, of_inside, of_outside) in found.items()
    }
    return values, moved, share


def _estimates(counts, row, parts, outside_share) -> dict[str, Estimate]:
    """The metrics of one comparison: the mean over `parts`, each a list of outside sets that are pooled."""
    found = [_figures(counts, row, names, outside_share) for names in parts]
    rows = {name: int(counts[name].sum()) for name in [*row, *(name for names in parts for name in names)]}
    weight = {name: row[name] * rows[name] for name in row}
    inside_rows = sum(weight.values()) ** 2 / sum(row[name] * x for name, x in weight.items())  # Kish's
    fewest = min(inside_rows, *(sum(rows[name] for name in names) for names in parts))
    words = "" if len(parts) == 1 else f"; mean of {len(parts)} sets"
    if len(row) > 1:
        shares = (f"{100 * x / sum(weight.values()):.4g} % {name}" for name, x in weight.items())
        words += f"; inside: {', '.join(shares)}"
    result = {}
    for m, least in FEWEST.items():
        value, ends = float(np.mean([values[m] for values, *_ in found])), (None, None)
        if fewest >= least * (1 - 1e-9) and min(rows.values()) > 1:
            moved = {name: sum(x[m].get(name, 0) for _, x, _ in found) / len(parts) for name in rows}
            ends = logit_interval(value, sum(variance_of_sum(x, counts[name]) for name, x in moved.items()))
        share = f"; outside share {', '.join(f'{x:.4g}' for *_, x in found)}" if m.startswith("aupr") else ""
        result[m] = Estimate(value, *ends, sum(rows.values()), f"{WORDS[m]}{words}{share}")
    for m, own in cuts(counts, row, parts).items():
        rate = false_positive_rate(counts, own, outside_positive=m == "fpr95_out")
        result[m] = Estimate(*rate, sum(rows.values()), f"{WORDS[m]}{words}")
    return result


def _row_weights(rows: dict[str, int], shifted_share) -> dict[str, float]:
    """Weight of a row of each inside set: 1 on average."""
    if shifted_share is None:
        return dict.fromkeys(rows, 1.0)
    total, plain = sum(rows.values()), rows["inside"]
    shifted = shifted_share * total / (total - plain)
    return {name: (1 - shifted_share) * total / plain if name == "inside" else shifted for name in rows}
