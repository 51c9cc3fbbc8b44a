"""Jackknife+ and CV+ through the member axis: every row calibrates, by the members that never saw it."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from bayescal.conformal.conformity import Conformity, Interval
from bayescal.conformal.split import calibration_scores, check_key
from bayescal.conformal.threshold import check_alpha, order_statistic, rank
from bayescal.predictive import Predictive, undefined_where
from bayescal.types import Array, Key, pytree

MOST_VALUES = 2**22  # members x calibration rows x new rows that are held at a time


@pytree
class CrossPlus:
    """Targets that are not stranger than k - 1 of the calibration rows, k = ceil((n + 1)(1 - alpha)), each row's members
    asked apart: `sets(pred) -> bool (rows, classes)`, or `Interval` for regression.

    A class y is in the set of x where #{i: s_i < s_-i(x, y)} < k. An interval runs from the k-th largest lower end to the
    k-th smallest upper end of {y : s_-i(x, y) <= s_i}: for `absolute()`, of mean_-i(x) -+ |y_i - mean_-i(x_i)|.

    Args:
        scores: s_i = s_-i(x_i, y_i), each row's by the members that never saw it, (rows,) or (rows, dim).
        unseen: weight of each member in what is asked of a row, 0 = it saw the row; (member, rows), summing to one.
        score: what was measured.
        alpha: miscoverage wanted.
    """

    scores: Float[Array, "rows *dim"]
    unseen: Float[Array, "member rows"]
    score: Conformity = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Predictive, *, key: Key | None = None) -> Any:
        """Sets of new rows, in chunks; the work is members x calibration rows x new rows.

        A row where a member that counts is NaN gets NaN ends; of classes, an error, or where traced every class.

        Args:
            pred: of the new rows by all members, which keep their places; its own member weights do not count.
            key: for a randomised score, and only for one; another than that of the fit.

        Raises:
            ValueError: for other members than those of the fit, a missing or needless key, rows without a score.
        """
        return _over_rows(self, pred, self.scores, _plus, key)


@pytree
class CrossMinmax:
    """Targets that any row's members find not stranger than the k-th smallest score: `sets(pred)`, as `CrossPlus`.

    For `absolute()`: [min_i mean_-i(x) - threshold, max_i mean_-i(x) + threshold].

    Args:
        threshold: the k-th smallest score, k = ceil((n + 1)(1 - alpha)); +infinity where k > n. () or (dim,).
        unseen, score, alpha: as in `CrossPlus`.
    """

    threshold: Float[Array, "*dim"]
    unseen: Float[Array, "member rows"]
    score: Conformity = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})

    def __call__(self, pred: Predictive, *, key: Key | None = None) -> Any:
        """Sets of new rows; see `CrossPlus`."""
        thresholds = jnp.broadcast_to(self.threshold, (self.unseen.shape[1], *self.threshold.shape))
        return _over_rows(self, pred, thresholds, _union, key)


def hold_out(pred: Predictive, folds: Int[Array, "rows"]) -> Predictive:
    """`pred` with member weights (member, rows) by which each row is asked of member `folds[row]` alone.

    What `fit_cv_plus` takes, for an ensemble whose member m was trained without the rows of fold m. With a fold a row it
    is the jackknife. For an ensemble trained on bootstraps use `bc.out_of_bag`. Members without weight keep none.

    Args:
        pred: of the training rows, by all members.
        folds: the member that never saw each row, in [0, members).

    Raises:
        ValueError: for folds of another shape or outside the members. A fold whose member diverged is an error in the fit.
    """
    if jnp.shape(folds) != pred.batch_shape or len(pred.batch_shape) != 1:
        raise ValueError(
            f"`folds` must have one member per row of `pred`, whose batch shape is {pred.batch_shape}, got shape "
            f"{jnp.shape(folds)}. Pass the fold that each row was left out with; flatten other batch axes."
        )
    if not isinstance(folds, Tracer):
        given = np.asarray(folds)
        wrong = given.size and (given.min() < 0 or given.max() >= pred.num_members)
        if not np.issubdtype(given.dtype, np.integer) or wrong:
            raise ValueError(
                f"`folds` must be integers in [0, {pred.num_members}), the members, got {given.dtype} from {given.min()} to "
                f"{given.max()}. Train one member a fold, in the folds' order."
            )
    alone = jax.nn.one_hot(jnp.asarray(folds), pred.num_members, axis=0)
    return dataclasses.replace(pred, member_weights=alone * (pred.weights() > 0))


def fit_cv_plus(pred: Predictive, targets, score: Conformity, *, alpha: float, key: Key | None = None) -> CrossPlus:
    """CV+, jackknife+ and jackknife+-after-bootstrap: scores s_i = s_-i(x_i, y_i) of rows by members that never saw them.

    No row is set aside. Coverage is at least 1 - 2 alpha for the jackknife+, less min(2 (1 - 1/K) / (n/K + 1),
    (1 - K/n) / (K + 1)) for K folds of one size; in practice about 1 - alpha, unless the fits are unstable. With one
    member, the same for all rows, it is split conformal.

    Args:
        pred: of the training rows, with member weights (member, rows) that are 0 where a member saw a row: from
            `hold_out(pred, folds)` or `bc.out_of_bag(pred, method, key)`.
        targets: one per row, as the family takes them.
        score: such as `absolute()` or `lac()`.
        alpha: miscoverage wanted, in (0, 1).
        key: for a randomised score, and only for one.

    Raises:
        ValueError: for member weights that do not say who saw which row, and as `fit_split`.
    Source: Barber et al. 2021, equation 1.4, theorems 1 and 4; Romano, Sesia and Candès 2020, section 2.3 for classes;
        Kim, Xu and Barber 2020 for bootstraps, whose number must be random for the theory to hold (recalled).
    """
    alpha = check_alpha(alpha)
    scores, unseen = _held_out_scores(pred, targets, score, key)
    return CrossPlus(scores, unseen, score, alpha)


def fit_cv_minmax(pred: Predictive, targets, score: Conformity, *, alpha: float, key: Key | None = None) -> CrossMinmax:
    """Jackknife-minmax: the k-th smallest of s_i, and the union over all held-out fits. Wider than `fit_cv_plus`.

    Coverage is at least 1 - alpha for the jackknife.

    Args:
        pred, targets, score, alpha, key: as in `fit_cv_plus`.

    Raises:
        ValueError: as `fit_cv_plus`.
    Source: Barber et al. 2021, theorem 3 (recalled).
    """
    alpha = check_alpha(alpha)
    scores, unseen = _held_out_scores(pred, targets, score, key)
    return CrossMinmax(order_statistic(scores, rank(scores.shape[0], alpha)), unseen, score, alpha)


def _held_out_scores(pred, targets, score, key):
    weights = pred.member_weights
    if weights is None or jnp.shape(weights) != (pred.num_members, *pred.batch_shape):
        raise ValueError(
            "`pred` must have member weights (member, rows), 0 where a member saw a row, got "
            f"{None if weights is None else jnp.shape(weights)}. Pass `hold_out(pred, folds)` or `bc.out_of_bag(...)`."
        )
    return calibration_scores(pred, targets, score, key), pred.weights()


def _plus(regions, k):
    if isinstance(regions, Interval):
        return Interval(-order_statistic(-regions.low, k), order_statistic(regions.high, k))
    return (~regions).sum(0) < k


def _union(regions, k):
    if isinstance(regions, Interval):
        return Interval(regions.low.min(0), regions.high.max(0))
    return regions.any(0)


def _over_rows(fitted, pred, thresholds, combine, key):
    """`combine` of the regions of all calibration rows, for each new row; undefined where a member that counts is."""
    check_key(fitted.score, key)
    members, rows = fitted.unseen.shape
    if pred.num_members != members or len(pred.batch_shape) != 1:
        raise ValueError(
            f"`pred` must be of the {members} members of the fit, with one batch axis, got {pred.num_members} members and "
            f"batch shape {pred.batch_shape}. Predict with the same ensemble, and do not pool."
        )
    bare = jax.tree.map(jnp.asarray, dataclasses.replace(pred, member_weights=None))
    used = (fitted.unseen > 0).any(1)[:, None]
    broken = [jnp.isnan(x).any(tuple(range(2, x.ndim))) for x in jax.tree.leaves(bare)]
    lost = (jnp.stack(broken).any(0) & used).any(0)
    if fitted.score.candidates is not None and not isinstance(lost, Tracer) and lost.any():
        raise ValueError(
            f"`pred` must have a score for every class under every member, got NaN in {int(lost.sum())} of {lost.size} rows, "
            f"first at {int(lost.argmax())}. Look for members that diverged, or leave these rows out."
        )
    settings = fitted.score, combine, rank(rows, fitted.alpha), max(1, min(lost.size, MOST_VALUES // (members * rows)))
    return _in_chunks(fitted.unseen, thresholds, bare, lost, key, *settings)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _in_chunks(unseen, thresholds, pred, lost, key, score, combine, k, chunk):
    def one(row):
        place, undefined, leaves = row
        alone = jax.tree.map(lambda x: x[:, None], leaves)
        own = None if key is None else jax.random.fold_in(key, place)

        def region(weights, threshold):
            return score.region(dataclasses.replace(alone, member_weights=weights), threshold, own)

        combined = combine(jax.vmap(region)(unseen.T, thresholds), k)
        return jax.tree.map(
            lambda x: (x | undefined if x.dtype == bool else undefined_where(undefined, x))[0], combined
        )

    rows_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), pred)
    return jax.lax.map(one, (jnp.arange(lost.size), lost, rows_first), batch_size=chunk)
