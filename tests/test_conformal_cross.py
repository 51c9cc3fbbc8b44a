"""CV+, jackknife+ and the minmax through the member axis."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformal_bands import ALPHAS, coverage_band
from test_conformal_intervals import SCORES, inside, normals

import bayescal as bc
from bayescal import conformal
from bayescal.conformal import absolute, fit_cv_minmax, fit_cv_plus, fit_split, hold_out, normalised, rank

pytestmark = pytest.mark.core


def linear_problem(seed, rows=60, new=9):
    rng = np.random.default_rng(seed)
    inputs, test = rng.normal(size=(rows, 3)), rng.normal(size=(new, 3))
    return inputs, inputs @ [1, 2, -1] + rng.normal(size=rows), test


def gaussian(means):
    means = np.asarray(means, np.float32)[..., None]
    return bc.Gaussian(means, np.ones_like(means))


def cv_oracle(means, new, targets, unseen, alpha, minmax):
    """Ends (2, new rows): means (member, rows), unseen (member, rows) of zeros and ones."""
    rows = len(targets)
    k = math.ceil((rows + 1) * (1 - Fraction(str(alpha))))
    held = lambda values, i: np.mean([values[m] for m in range(len(means)) if unseen[m][i]])
    residuals = [abs(targets[i] - held(means[:, i], i)) for i in range(rows)]
    q = sorted(residuals)[k - 1] if k <= rows else np.inf
    ends = []
    for j in range(new.shape[1]):
        at = [held(new[:, j], i) for i in range(rows)]
        if minmax:
            ends.append((min(at) - q, max(at) + q))
        elif k > rows:
            ends.append((-np.inf, np.inf))
        else:
            low = sorted(a - r for a, r in zip(at, residuals))[rows - k]
            ends.append((low, sorted(a + r for a, r in zip(at, residuals))[k - 1]))
    return np.transpose(ends)


@pytest.mark.parametrize(("fit", "minmax"), [(fit_cv_plus, False), (fit_cv_minmax, True)])
def test_cv_plus_equals_the_oracle(fit, minmax):
    rng = np.random.default_rng(8)
    means, new, targets = rng.normal(size=(5, 30)), rng.normal(size=(5, 11)), rng.normal(size=30)
    folds = np.arange(30) % 5
    bags = rng.integers(0, 2, size=(5, 30)) | (np.arange(5)[:, None] == folds)
    of_folds = hold_out(gaussian(means), folds)
    for unseen, held in ((np.asarray(of_folds.member_weights), of_folds), (bags, None)):
        held = held or bc.Gaussian(
            gaussian(means).mean, gaussian(means).variance, member_weights=bags.astype(np.float32)
        )
        width = 0.0
        for alpha in (0.3, 0.1, 0.05, 0.01):
            got = fit(held, targets.astype(np.float32)[:, None], absolute(), alpha=alpha)(gaussian(new))
            expected = cv_oracle(means, new, targets, unseen, alpha, minmax)
            np.testing.assert_allclose(np.stack(got)[..., 0], expected, rtol=1e-5, atol=1e-5)
            assert float((got.high - got.low).mean()) >= width
            width = float((got.high - got.low).mean())


def test_cv_plus_of_one_member_is_split():
    """The same fit for every row, which saw none of them."""
    pred, targets = normals(9, members=1)
    new, _ = normals(10, members=1, rows=6)
    held = hold_out(pred, np.zeros(40, np.int32))
    for score in (SCORES["normalised"], SCORES["above"]):
        plain = fit_split(pred, targets, score, alpha=0.1)(new)
        for fit in (fit_cv_plus, fit_cv_minmax):
            np.testing.assert_allclose(
                np.stack(fit(held, targets, score, alpha=0.1)(new)), np.stack(plain), rtol=1e-5, atol=1e-5
            )


@pytest.mark.slow
def test_equals_mapie():
    sklearn = pytest.importorskip("sklearn.linear_model")
    peer, model_selection = pytest.importorskip("mapie.regression"), pytest.importorskip("sklearn.model_selection")
    inputs, targets, test = linear_problem(3)
    split = model_selection.KFold(5)
    folds = np.zeros(60, np.int32)
    for fold, (_, rows) in enumerate(split.split(inputs)):
        folds[rows] = fold
    for method, fit in (("plus", fit_cv_plus), ("minmax", fit_cv_minmax)):
        other = peer.CrossConformalRegressor(sklearn.Ridge(), confidence_level=0.9, method=method, cv=split)
        _, expected = other.fit_conformalize(inputs, targets).predict_interval(test)
        nets = other._mapie_regressor.estimator_.estimators_
        pred, new = (gaussian([net.predict(x) for net in nets]) for x in (inputs, test))
        got = fit(hold_out(pred, folds), targets.astype(np.float32)[:, None], absolute(), alpha=0.1)(new)
        np.testing.assert_allclose(np.concatenate(got, -1), expected[..., 0], rtol=1e-5, atol=1e-5)

    bags = peer.JackknifeAfterBootstrapRegressor(sklearn.Ridge(), confidence_level=0.9, resampling=20, random_state=0)
    _, expected = bags.fit_conformalize(inputs, targets).predict_interval(test)
    inner = bags._mapie_regressor.estimator_
    unseen = np.nan_to_num(inner.k_.T, nan=0).astype(np.float32)
    pred, new = (gaussian([net.predict(x) for net in inner.estimators_]) for x in (inputs, test))
    held = bc.Gaussian(pred.mean, pred.variance, member_weights=unseen)
    got = fit_cv_plus(held, targets.astype(np.float32)[:, None], absolute(), alpha=0.1)(new)
    np.testing.assert_allclose(np.concatenate(got, -1), expected[..., 0], rtol=1e-5, atol=1e-5)


def least_squares(inputs, targets, weights):
    """Predictions at `inputs` of the fit on the rows of weight one, for batches: (..., rows)."""
    gram = np.einsum("...n,...ni,...nj->...ij", weights, inputs, inputs)
    return np.linalg.solve(gram, np.einsum("...n,...ni,...n->...i", weights, inputs, targets)[..., None])[..., 0]


@pytest.mark.parametrize(("rows", "members"), [(30, 5), (30, 30)], ids=["CV+", "jackknife+"])
def test_cv_plus_covers(rows, members):
    """Not below the band of an exact method (and so far above 1 - 2 alpha); the minmax is wider."""
    repetitions, new, rng = 1000, 10, np.random.default_rng(12)
    inputs = rng.normal(size=(repetitions, rows + new, 3))
    targets = inputs.sum(-1) + rng.normal(size=inputs.shape[:2])
    folds = np.arange(rows) % members
    means = np.stack(
        [
            np.einsum(
                "rni,ri->rn",
                inputs,
                least_squares(inputs[:, :rows], targets[:, :rows], np.broadcast_to(folds != m, (repetitions, rows))),
            )
            for m in range(members)
        ],
        1,
    )

    @jax.jit
    @jax.vmap
    def run(means, targets):
        pred = bc.Gaussian(means[..., None], jnp.ones_like(means)[..., None])
        held, test = hold_out(bc.take(pred, slice(0, rows)), folds), bc.take(pred, slice(rows, None))
        fits = [
            f(held, targets[:rows, None], absolute(), alpha=a) for f in (fit_cv_plus, fit_cv_minmax) for a in ALPHAS
        ]
        return jnp.array([inside(fit(test), targets[rows:, None]) for fit in fits])

    got = np.asarray(run(jnp.asarray(means, jnp.float32), jnp.asarray(targets, jnp.float32))).mean(0).reshape(2, -1)
    for place, alpha in enumerate(ALPHAS):
        low, _ = coverage_band(repetitions, rows, new, rank(rows, alpha))
        assert got[1, place] >= got[0, place] >= low > 1 - 2 * alpha, (alpha, got[:, place], low)
        assert got[0, place] <= 1 - alpha + 0.06 or rank(rows, alpha) > rows  # not trivially wide


def test_cv_plus_of_classes_covers():
    """Nearest-centroid networks, one a fold: not below the band of an exact method."""
    repetitions, rows, new, members, rng = 1000, 30, 10, 5, np.random.default_rng(14)
    targets = rng.integers(3, size=(repetitions, rows + new))
    centres = np.array([[0, 2], [-1.7, -1], [1.7, -1]])
    inputs = centres[targets] + rng.normal(size=(repetitions, rows + new, 2))
    folds, logits = np.arange(rows) % members, []
    for m in range(members):
        seen = (targets[:, :rows, None] == np.arange(3)) & (folds != m)[None, :, None]
        sums = np.einsum("rnk,rni->rki", seen, inputs[:, :rows])
        centroids = sums / np.maximum(seen.sum(1), 1)[..., None]
        logits.append(-0.5 * ((inputs[:, :, None] - centroids[:, None]) ** 2).sum(-1))

    @jax.jit
    @jax.vmap
    def run(logits, targets):
        pred = bc.Categorical(logits)
        held, test = hold_out(bc.take(pred, slice(0, rows)), folds), bc.take(pred, slice(rows, None))
        sets = [fit_cv_plus(held, targets[:rows], conformal.lac(), alpha=alpha)(test) for alpha in ALPHAS]
        return jnp.stack([jnp.take_along_axis(own, targets[rows:, None], -1).mean() for own in sets])

    got = np.asarray(run(jnp.asarray(np.stack(logits, 1), jnp.float32), jnp.asarray(targets, jnp.int32))).mean(0)
    for place, alpha in enumerate(ALPHAS):
        low, _ = coverage_band(repetitions, rows, new, rank(rows, alpha))
        assert got[place] >= low > 1 - 2 * alpha, (alpha, got[place], low)


def test_cv_plus_of_classes():
    """Sets by their definition: #{i: s_i < s of y under the members that never saw i} < k; and one member is split."""
    rng = np.random.default_rng(13)
    logits, new = (2 * rng.normal(size=(4, n, 3)).astype(np.float32) for n in (25, 8))
    targets, folds = rng.integers(3, size=25), np.arange(25) % 4
    held = hold_out(bc.Categorical(logits), folds)
    prob = lambda z: np.exp(z.astype(float)) / np.exp(z.astype(float)).sum(-1, keepdims=True)
    scores = [1 - prob(logits[f, i])[y] for i, (f, y) in enumerate(zip(folds, targets))]
    for alpha in (0.3, 0.03):
        k = rank(25, alpha)
        strange = [[[scores[i] < 1 - prob(new[folds[i], j])[y] for i in range(25)] for y in range(3)] for j in range(8)]
        got = fit_cv_plus(held, targets, conformal.lac(), alpha=alpha)(bc.Categorical(new))
        np.testing.assert_array_equal(got, np.sum(strange, -1) < k)
        union = fit_cv_minmax(held, targets, conformal.lac(), alpha=alpha)(bc.Categorical(new))
        assert (np.asarray(union) >= np.asarray(got)).all()
    one = bc.Categorical(logits[:1]), bc.Categorical(new[:1])
    alone = fit_cv_plus(hold_out(one[0], np.zeros(25, np.int32)), targets, conformal.lac(), alpha=0.2)(one[1])
    np.testing.assert_array_equal(alone, fit_split(one[0], targets, conformal.lac(), alpha=0.2)(one[1]))


def test_random_scores_draw_for_each_row():
    logits = np.zeros((2, 400, 2), np.float32)
    pred, targets, key = bc.Categorical(logits), np.zeros(400, np.int32), jax.random.key(3)
    fit = fit_cv_plus(hold_out(pred, np.arange(400) % 2), targets, conformal.aps(), alpha=0.3, key=key)
    sizes = np.asarray(fit(pred, key=jax.random.key(4)).sum(-1))
    assert len(set(sizes.tolist())) > 1  # the same draw for all rows would give one size


def test_chunks_change_nothing(monkeypatch):
    pred, targets = normals(14)
    new, _ = normals(15, rows=11)
    fit = fit_cv_plus(hold_out(pred, np.arange(40) % 3), targets, normalised(), alpha=0.1)
    whole = np.stack(fit(new))
    monkeypatch.setattr(conformal.cross, "MOST_VALUES", 500)  # 4 rows at a time, and 3 left over
    np.testing.assert_allclose(np.stack(fit(new)), whole, rtol=1e-6)
    np.testing.assert_allclose(np.stack(jax.jit(fit.__call__)(new)), whole, rtol=1e-5)


def test_undefined_rows_stay_undefined_and_dead_members_do_not_count():
    pred, targets = normals(16)
    new, _ = normals(17, rows=6)
    spoiled = bc.Gaussian(jnp.asarray(new.mean).at[1, 2, 0].set(jnp.nan), new.variance)
    held = hold_out(pred, np.arange(40) % 3)
    for fitted in (fit(held, targets, absolute(), alpha=0.1) for fit in (fit_cv_plus, fit_cv_minmax)):
        got = np.stack(jax.jit(lambda f, p: f(p))(fitted, spoiled))
        assert np.isnan(got[:, 2, 0]).all() and not np.isnan(np.delete(got, 2, 1)).any()

    dead = bc.Gaussian(jnp.asarray(pred.mean).at[2].set(jnp.nan), pred.variance, member_weights=jnp.array([1.0, 1, 0]))
    fitted = fit_cv_plus(hold_out(dead, np.arange(40) % 2), targets, absolute(), alpha=0.1)
    gone = bc.Gaussian(jnp.asarray(new.mean).at[2].set(jnp.nan), new.variance)
    assert np.isfinite(np.stack(fitted(gone))).all()

    logits = np.zeros((2, 10, 3), np.float32)
    sets = fit_cv_plus(
        hold_out(bc.Categorical(logits), np.arange(10) % 2), np.arange(10) % 3, conformal.lac(), alpha=0.2
    )
    lost = bc.Categorical(jnp.asarray(logits).at[0, 4].set(jnp.nan))
    assert jax.jit(lambda f, p: f(p))(sets, lost)[4].all()
    with pytest.raises(ValueError, match=r"`pred` must have a score .* NaN in 1 of 10 rows, first at 4\. Look"):
        sets(lost)


def test_bad_folds(unchecked):
    pred, targets = normals(19)
    with pytest.raises(ValueError, match=r"`folds` must have one member per row .* got shape \(39,\)\. Pass"):
        hold_out(pred, np.zeros(39, np.int32))
    for folds in (np.full(40, 3), np.full(40, -1), np.zeros(40)):
        with pytest.raises(ValueError, match=r"`folds` must be integers in \[0, 3\), the members, got"):
            hold_out(pred, folds)
    with pytest.raises(ValueError, match=r"`pred` must have member weights \(member, rows\), .* got None\. Pass"):
        fit_cv_plus(pred, targets, absolute(), alpha=0.1)
    for fit in (fit_cv_plus, fit_cv_minmax):
        for alpha in (0, 1, -0.1, math.nan):
            with pytest.raises(ValueError, match=r"`alpha` must be the miscoverage wanted, a number in \(0, 1\), got"):
                fit(hold_out(pred, np.arange(40) % 3), targets, absolute(), alpha=alpha)
    fitted = fit_cv_plus(hold_out(pred, np.arange(40) % 3), targets, absolute(), alpha=0.1)
    with pytest.raises(ValueError, match=r"`pred` must be of the 3 members of the fit, .* got 2 members and"):
        fitted(bc.Gaussian(pred.mean[:2], pred.variance[:2]))
    with pytest.raises(ValueError, match="`key` must be None for a score without randomness"):
        fitted(pred, key=jax.random.key(0))
    dead = bc.Gaussian(pred.mean, pred.variance, member_weights=jnp.array([1.0, 1, 0]))
    with pytest.raises(ValueError, match="`member_weights` must be finite, not negative and not all zero"):
        fit_cv_plus(hold_out(dead, np.arange(40) % 3), targets, absolute(), alpha=0.1)
