"""Sets of scores: checked, named, and mixed at a stated share."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from bayescal.types import Array

Scores = Float[Array, "_"] | Integer[Array, "_"]  # sets differ in size


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
    check_share("outside_share", outside_share)
    inside, outside = checked_scores("inside", inside), checked_scores("outside", outside)
    rows = len(inside) + len(outside)
    is_outside = np.arange(rows) >= len(inside)
    weights = np.where(is_outside, outside_share / len(outside), (1 - outside_share) / len(inside))
    return OpenDomain(np.concatenate([inside, outside]), is_outside, rows * weights)


def named(inside, shifted, outside) -> dict[str, np.ndarray]:
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
    return dict(zip(names, (checked_scores(k, x) for k, x in {"inside": inside, **checked}.items()), strict=True))


def checked_scores(name: str, scores) -> np.ndarray:
    """The scores in float64; raises for NaN, no rows, or another shape."""
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


def check_share(name: str, share: float) -> None:
    """Raises unless the share lies in (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"`{name}` must lie in (0, 1), got {share!r}. 0.1 = one row in ten.")
