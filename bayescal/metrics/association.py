"""How well one column's order follows another's: Spearman's correlation, with intervals by influence."""

import numpy as np
from jaxtyping import Bool, Float, Integer

from bayescal.binning import Z95
from bayescal.types import Array, Estimate

Column = Float[Array, "rows"] | Integer[Array, "rows"] | Bool[Array, "rows"]
FEWEST = 20  # effective rows, for an interval: below, it would hold the truth in as few as 89 of 100 data sets
NOTHING = 1e-12  # a standard error that is rounding: of a perfect order, or of columns of the same order
TIES = "Spearman; ties share their mean rank"


def spearman(a: Column, b: Column, *, weights: Column | None = None) -> Estimate:
    """Correlation of the rows' ranks: sum_i w_i u_i v_i / sqrt(sum_i w_i u_i^2 sum_i w_i v_i^2), u and v centred mid-ranks.

    In [-1, 1]; 1 = the same order, 0 = none in common. Its 95 % interval is normal on Fisher's scale, with the standard
    error from the rows' influence, which knows that ranks are estimated too: it asks for no normal distributions, and ties
    are allowed. Seen to hold the truth in 93 to 96 of 100 data sets from 50 rows on, in 90 to 97 of 20 to 49 rows. Left
    out at -1 and 1, where the influence is nothing, and for fewer than 20 effective rows, (sum w)^2 / sum w^2. Host only,
    in float64.

    Args:
        a, b: one number per row each; infinities are allowed.
        weights: non-negative weight of each row; None = all rows alike. Rows of weight 0 may hold anything. The value is that
            of rows repeated; the interval takes each row as one observation, whatever it weighs.

    Raises:
        ValueError: for NaN, other lengths, fewer than two rows, unusable weights, or a column of one value.
    Source: Spearman 1904; Croux and Dehon 2010 for the influence of continuous columns (recalled; ties are ours).
    """
    (a, b), shares = _columns({"a": a, "b": b}, weights)
    value, influence = _correlation(a, b, shares)
    error = _standard_error(influence, shares)
    low, high = None, None
    if error > NOTHING and _enough(shares):
        half = Z95 * error / (1 - value**2)
        low, high = (float(np.tanh(np.arctanh(value) + side * half)) for side in (-1, 1))
    return Estimate(value, low, high, len(a), f"{TIES}; interval by influence, normal on Fisher's scale")


def spearman_difference(a: Column, b: Column, target: Column, *, weights: Column | None = None) -> Estimate:
    """spearman(a, target) - spearman(b, target) on the same rows, with a 95 % interval row by row ("paired").

    In [-2, 2]; above 0 = `a` follows the target more closely. The two correlations share the target, and mostly much
    noise: the interval, normal with the difference of their influences, is shorter than those of both suggest. Left out
    where the rows' influences do not differ, and for fewer than 20 effective rows. Host only, in float64.

    Args:
        a, b: the columns to compare.
        target: what both should follow.
        weights: as in `spearman`.

    Raises:
        ValueError: as `spearman`.
    Source: Jaeckel 1972, The infinitesimal jackknife.
    """
    (a, b, target), shares = _columns({"a": a, "b": b, "target": target}, weights)
    (one, moved), (other, moved_too) = (_correlation(x, target, shares) for x in (a, b))
    error = _standard_error(moved - moved_too, shares)
    value, half = one - other, Z95 * error
    known = error > NOTHING and _enough(shares)
    ends = (value - half, value + half) if known else (None, None)
    return Estimate(value, *ends, len(a), f"{TIES}; a - b with the same target, paired influence")


def _correlation(a, b, shares) -> tuple[float, np.ndarray]:
    """(correlation, its derivative in the share of each row), float64."""
    (u, above_a), (v, above_b) = _ranks(a, shares), _ranks(b, shares)
    square_u, square_v = (shares * u**2).sum(), (shares * v**2).sum()
    scale, product = np.sqrt(square_u * square_v), (shares * u * v).sum()
    # A row adds its own term, and lifts the ranks of all rows above it.
    moved = (u * v + above_a(v) + above_b(u) - 3 * product) / scale
    widened = (u**2 + 2 * above_a(u)) / square_u + (v**2 + 2 * above_b(v)) / square_v - 6
    value = float(np.clip(product / scale, -1, 1))  # rounding of a perfect order
    return value, moved - value / 2 * widened


def _ranks(x, shares):
    """(centred mid-ranks as shares, function that sums shares * column over the rows above each, ties half)."""
    _, place = np.unique(x, return_inverse=True)

    def through(column):  # the sum over all rows below, half of those that tie
        groups = np.bincount(place, shares * column)
        return (np.cumsum(groups) - groups / 2)[place]

    return through(np.ones_like(shares)) - 0.5, lambda column: (shares * column).sum() - through(column)


def _standard_error(influence, shares) -> float:
    rows = len(shares)
    return float(np.sqrt(((shares * influence) ** 2).sum() * rows / (rows - 1)))


def _enough(shares) -> bool:
    return bool(1 / (shares**2).sum() >= FEWEST * (1 - 1e-9))  # rounding of rows that weigh the same


def _columns(columns, weights) -> tuple[list[np.ndarray], np.ndarray]:
    """(float64 columns of the rows that weigh something, the rows' shares of the weight); raises for unusable ones."""
    arrays = {name: np.asarray(x) for name, x in columns.items()}
    given = np.ones(len(arrays["a"]) if arrays["a"].ndim else 0) if weights is None else np.asarray(weights, np.float64)
    if any(x.ndim != 1 or x.shape != given.shape for x in (*arrays.values(), given)):
        shapes = " and ".join(str(x.shape) for x in (*arrays.values(), *([] if weights is None else [given])))
        raise ValueError(
            f"`{'`, `'.join(arrays)}` and `weights` must be one axis of the same length, got {shapes}. "
            "Flatten them row by row."
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("`weights` must be finite and non-negative, got others. Leave them out for equal weights.")
    kept = given > 0
    if kept.sum() < 2:
        raise ValueError(
            f"`a` must have at least two rows that weigh something, got {int(kept.sum())}. Pass more rows."
        )
    found = []
    for name, x in arrays.items():
        x = x[kept].astype(np.float64)
        if np.isnan(x).any():
            raise ValueError(
                f"`{name}` must not be NaN, got {int(np.isnan(x).sum())} of {len(x)}. Find out which rows they are."
            )
        if (x == x[0]).all():
            raise ValueError(
                f"`{name}` must hold at least two values, got the same in all {len(x)} rows: it has no order. "
                "Check what it was computed from; the epistemic part of one network is 0."
            )
        found.append(x)
    shares = given[kept] / given.max()  # so that no sum overflows
    return found, shares / shares.sum()
