"""What the scores of features refuse, and in which words."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows_scores import HEAD, LABELS, ROWS, SHAPES, TEST, TRAIN, VARIABLES, WIDTH, data, fitted, linear, members_of

from bayescal.scores.combine import fit_combination, fit_members
from bayescal.scores.density import fit_gaussian_density
from bayescal.scores.gradient import grad_norm
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.shaping import ash_p, fit_react, scale
from bayescal.scores.subspace import fit_residual, fit_vim, head_origin

pytestmark = pytest.mark.core

BAD = np.where(np.arange(ROWS)[:, None] == 5, np.nan, TRAIN)


BOTH = np.stack([TRAIN, TRAIN]), jnp.stack([VARIABLES[0], VARIABLES[0]])
SECOND_OUT = np.array([1.0, 0, 1, 1])
ONE_AWAY = np.where(np.arange(ROWS)[:, None] == 3, -2, TRAIN)


def made_inside(features, weights):
    return fit_vim(features, lambda f: f @ weights + 3, dim=2)


REFUSALS = {
    r"`features` must be finite, got NaN or infinity in 1 of 60 rows, first in row 5\. Look for members": [
        lambda: fit_mahalanobis(BAD, LABELS),
        lambda: fit_gaussian_density(BAD, LABELS),
        lambda: fit_neighbours(BAD),
        lambda: fit_residual(BAD, dim=2),
        lambda: fit_react(BAD, HEAD),
    ],
    r"`features` must have shape \(rows, features\) with at least 2 rows, got \(3, 60, 6\)\. Flatten": [
        lambda: fit_mahalanobis(np.zeros((3, ROWS, WIDTH)), LABELS),
    ],
    r"`features` must have shape \(rows, features\) with at least 1 rows, got \(0, 6\)": [
        lambda: fit_neighbours(TRAIN[:0]),
    ],
    r"`features` must have shape \(rows, 6\), got \(6,\)\. For one row add the axis: `features\[None\]`": [
        lambda name=name: fitted(name)(TEST[0])
        for name in ("mahalanobis", "relative", "density", "neighbours", "residual", "vim")
    ],
    r"`features` must have shape \(rows, 6\), got \(8, 5\)": [lambda: fitted("mahalanobis")(TEST[:, :5])],
    r"`features` must have shape \(rows, features\), got \(6,\)\. For one row": [
        lambda name=name: fitted(name)(TEST[0]) for name in ("react", "gradient", "ash p")
    ],
    r"`labels` must be whole numbers of shape \(60,\), one per row of `features`, got float64 of shape \(60,\)\. Of": [
        lambda: fit_mahalanobis(TRAIN, LABELS * 1.0),
    ],
    r"`labels` must be whole numbers of shape \(60,\), one per row of `features`, got int64 of shape \(59,\)": [
        lambda: fit_gaussian_density(TRAIN, LABELS[1:]),
    ],
    r"`labels` must lie in \[0, 2\), got 0 to 2\. Leave rows without a class out": [
        lambda: fit_mahalanobis(TRAIN, LABELS, num_classes=2),
    ],
    r"`labels` must lie in \[0, classes\), got -1 to 1": [lambda: fit_mahalanobis(TRAIN, LABELS - 1)],
    r"`labels` must have at least 2 rows of every class, got 0 of class 3 \(1 such classes of 4\)\. Number the": [
        lambda: fit_mahalanobis(TRAIN, LABELS, num_classes=4),
    ],
    r"at least 2 rows of every class, got 1 of class 3": [
        lambda: fit_gaussian_density(TRAIN, np.where(np.arange(ROWS) == 7, 3, LABELS)),
    ],
    r"`labels` must have at least 2 classes, got 1: both distances are the same\. Use `fit_mahalanobis`": [
        lambda: fit_relative_mahalanobis(TRAIN, 0 * LABELS),
    ],
    r"`ridge` must be finite and not negative, got -1\. 1e-6 is enough for dead units": [
        lambda: fit_mahalanobis(TRAIN, LABELS, ridge=-1),
    ],
    r"`k` must be a whole number from 1 to the number of training rows, 60, got 61\. 50 is usual": [
        lambda: fit_neighbours(TRAIN, k=61),
    ],
    r"`k` must be a whole number .* got 2\.0": [lambda: fit_neighbours(TRAIN, k=2.0)],
    r"`chunk` must be a whole number of at least 1, got 0\. 1024 takes 4 MiB": [lambda: fit_neighbours(TRAIN, chunk=0)],
    r"`features` must have a direction in every training row, got 1 rows of zeros, first row 60\. Leave": [
        lambda: fit_neighbours(np.concatenate([TRAIN, 0 * TRAIN[:1]])),
    ],
    r"`dim` must be a whole number from 1 to 5, one less than the features, got 6\. Half of them is usual": [
        lambda: fit_residual(TRAIN, dim=6),
        lambda: fit_vim(TRAIN, HEAD, dim=6),
    ],
    r"`origin` must be finite and of shape \(6,\) like a row of `features`, got shape \(5,\)\. Leave it out": [
        lambda: fit_residual(TRAIN, dim=2, origin=np.zeros(5)),
    ],
    r"`head` must be affine in the features, got logits that are off by .* from its own weights and bias\. Pass the": [
        lambda: fit_vim(TRAIN, lambda f: linear(VARIABLES, f**2), dim=2),
        lambda: head_origin(lambda f: jnp.abs(linear(VARIABLES, f)), TRAIN),
    ],
    r"`head` must give a positive and finite mean of the largest logits of the training rows, got -.*turn the score": [
        lambda: fit_vim(TRAIN, Partial(linear, [VARIABLES[0], VARIABLES[1] - 1000]), dim=2),
    ],
    r"`dim` must leave a residual of the training rows, got 4 of 6, which hold them all: alpha would be infinite\. Pass": [
        lambda: fit_vim(TRAIN * (np.arange(WIDTH) < 4), HEAD, dim=4, origin=np.zeros(WIDTH)),
    ],
    r"`head` must give logits \(8, classes\) of at least two classes, got \(8, 1\)\. Of one logit z give \[0, z\]": [
        lambda: ash_p(lambda f: f[:, :1], quantile=0.5)(TEST),
        lambda: grad_norm(lambda f: f[:, :1])(TEST),
    ],
    r"`quantile` must lie in \[0, 1\), got 90\. Write 0\.9 for the 90th percentile": [
        lambda build=build: build(HEAD, quantile=90) for build in SHAPES.values()
    ],
    r"`quantile` must keep at least one of the 6 features of a row, got 0\.95, which keeps none\. Pass a smaller": [
        lambda: scale(HEAD, quantile=0.95)(TEST),
    ],
    r"`quantile` must lie in \(0, 1\], got 90\. 0\.9 is that of the paper, not 90": [
        lambda: fit_react(TRAIN, HEAD, quantile=90),
    ],
    r"`quantile` must be above that of the least activation, got 0\.9, at which all are clipped to 0 and all rows alike": [
        lambda: fit_react(TRAIN * (np.arange(ROWS)[:, None] < 3), HEAD),
    ],
    r"`scores` must be finite and of shape \(score, rows\) with at least one score and two rows, got shape \(2, 3\) with 1": [
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 2.0]])),
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [1.0, 1e39, 2.0]])),
    ],
    r"`scores` must be finite and of shape \(score, rows\) .* got shape \(0, 5\) with 0 values that are not finite in f": [
        lambda: fit_combination(np.zeros((0, 5))),
    ],
    r"`scores` must vary over the validation rows, got the same value for all in score 1\. Leave it out": [
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1]])),
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [1e8, 1e8 + 1, 1e8 + 2]])),  # the same in float32
        lambda: fit_combination(np.array([[1.0, 2.0, 3.0], [1e-40, 2e-40, 3e-40]])),  # a spread that is 0 on the device
    ],
    r"`weights` must be 2 finite numbers, none negative and not all zero, got \[1\.0, -1\.0\]\. To turn a score round": [
        lambda: fit_combination(np.array([[1.0, 2.0], [3.0, 1.0]]), weights=np.array([1.0, -1.0])),
    ],
    r"`weights` must be 2 finite numbers, .* got \[inf, 1\.0\]": [
        lambda: fit_combination(np.array([[1.0, 2.0], [3.0, 1.0]]), weights=np.array([1e39, 1.0])),
    ],
    r"`weights` must be 2 finite numbers, .* got \[0\.0, 0\.0\]": [
        lambda: fit_combination(np.array([[1.0, 2.0], [3.0, 1.0]]), weights=np.array([1e-50, 0.0])),
    ],
    r"`scores` must have shape \(2, rows\), the scores in the order of the fit, got \(3, 9\)\. Join them by": [
        lambda: fit_combination(np.array([[1.0, 2.0], [3.0, 1.0]]))(np.zeros((3, 9))),
    ],
    r"`features` must have shape \(3, rows, features\), got \(2, 9, 6\)\. Pass those of the members that were fitted": [
        lambda: members_of("mahalanobis", data(3, (3,)))(np.zeros((2, 9, WIDTH))),
    ],
    r"Member 1: `features` must be finite, got NaN or infinity in 1 of 60 rows, first in row 5": [
        lambda: fit_members(lambda f: fit_neighbours(f), np.stack([TRAIN, BAD])),
    ],
    r"`arguments` must be arrays with one leading member axis, got leading axes \[\(2,\), \(60,\)\]\. Close over": [
        lambda: fit_members(fit_mahalanobis, np.stack([TRAIN, TRAIN]), LABELS),
    ],
    r"`arguments` must be arrays with one leading member axis, got leading axes \[\(\)\]": [
        lambda: fit_members(lambda head: ash_p(head, quantile=0.5), lambda f: f),
    ],
    r"`fit` must give all members one structure, got member 2 unlike member 0: a function that is made inside .*`Partial\(": [
        lambda: fit_members(
            made_inside, np.stack([TRAIN] * 4), np.stack([VARIABLES[0]] * 4), member_weights=SECOND_OUT
        ),
    ],
    r"got member 1 unlike member 0: .* or another setting": [
        lambda: fit_members(lambda f: lambda rows: rows.sum(-1), np.stack([TRAIN, TRAIN])),
    ],
    r"`fit` must give all members arrays of the same shapes, got \[\(59, 6\)\] for member 1 and \[\(60, 6\)\] for member 0": [
        lambda: fit_members(lambda f: fit_neighbours(f[f[:, 0] > -1], k=5), np.stack([TRAIN, ONE_AWAY])),
    ],
    r"`member_weights` must be 2 finite numbers, none negative and not all zero, got \[0\.0, 0\.0\]\. Give": [
        lambda: fit_members(fit_neighbours, np.stack([TRAIN, TRAIN]), member_weights=np.zeros(2)),
    ],
    r"`member_weights` must be 2 finite numbers, .* got \[1\.0, 1\.0, 1\.0\]": [
        lambda: fit_members(fit_neighbours, np.stack([TRAIN, TRAIN]), member_weights=np.ones(3)),
    ],
    r"`member_weights` must be 2 finite numbers, .* got \[1\.0, nan\]": [
        lambda: fit_members(fit_neighbours, np.stack([TRAIN, TRAIN]), member_weights=np.array([1, np.nan])),
    ],
    r"`member_weights` must be 2 finite numbers, .* got \[1\.0, -1\.0\]": [
        lambda: fit_members(fit_neighbours, np.stack([TRAIN, TRAIN]), member_weights=np.array([1.0, -1.0])),
    ],
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(unchecked, message):
    for call in REFUSALS[message]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit_members(lambda f, w: grad_norm(w), *BOTH),
            r"Member 0: `head` must be a function .* got ArrayImpl\. Of a",
        ),
        (
            lambda: fit_members(lambda f: grad_norm(HEAD), *BOTH),
            r"Member 0: .* takes 1 positional argument but 2 were given",
        ),
        (
            lambda: fit_members(lambda f, w: f.sum(-1), *BOTH),
            r"Member 0: `fit\(\.\.\.\)` must be a function of features \(rows, features\), got .* Give a fitted score",
        ),
    ],
)
def test_wrong_types(unchecked, call, message):
    with pytest.raises(TypeError, match=message):
        call()
