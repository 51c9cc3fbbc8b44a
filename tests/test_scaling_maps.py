"""Platt, vector and matrix scaling, Dirichlet and beta calibration: known maps, closed forms, invariances, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import softmax

import bayescal as bc
from bayescal import calibrate

pytestmark = pytest.mark.core
MAPS = {
    "vector": calibrate.fit_vector,
    "matrix": calibrate.fit_matrix,
    "dirichlet": calibrate.fit_dirichlet,
    "diagonal": calibrate.fit_diagonal_dirichlet,
}
ROWS = 3000  # of almost every test: one shape, so that each fit is compiled once; fewer count by weights of 0


def binary(rng, rows=ROWS, slope=0.5, intercept=0.3, spread=3):
    """Log-odds as a Categorical of shifted raw logits, with labels from sigmoid(slope s + intercept)."""
    scores = spread * rng.normal(size=rows)
    shift = rng.normal(size=rows)
    targets = (rng.uniform(size=rows) < 1 / (1 + np.exp(-slope * scores - intercept))).astype(np.int32)
    return bc.Categorical(np.stack([shift, shift + scores], -1).astype(np.float32)[None]), targets, scores


def padded(pred, targets):
    """The rows, more of weight 0 up to `ROWS`, and the weights."""
    more = ROWS - len(targets)
    values = [
        np.pad(np.asarray(x), ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        for x in jax.tree.leaves(pred)
    ]
    pred = jax.tree.unflatten(jax.tree.structure(pred), values)
    return pred, np.pad(targets, (0, more)), (np.arange(ROWS) < len(targets)).astype(np.float32)


def several(rng, rows=ROWS, classes=4, matrix=None, intercepts=None):
    """Log-probabilities (float64) and labels from softmax(matrix log p + intercepts)."""
    log_probs = np.log([softmax(z) for z in 2 * rng.normal(size=(rows, classes))])
    matrix = 0.6 * np.eye(classes) if matrix is None else matrix
    logits = log_probs @ matrix.T + (0 if intercepts is None else intercepts)
    targets = (logits + rng.gumbel(size=logits.shape)).argmax(1).astype(np.int32)
    return bc.Categorical(log_probs.astype(np.float32)[None]), targets, log_probs


def objective(matrix, intercepts, scores, targets, off_diagonal, intercept):
    """Mean nll and ODIR penalties, by loops."""
    classes, total = len(intercepts), 0.0
    for z, y in zip(scores, targets):
        total -= math.log(
            softmax([sum(matrix[i][j] * z[j] for j in range(classes)) + intercepts[i] for i in range(classes)])[y]
        )
    pairs = [(i, j) for i in range(classes) for j in range(classes) if i != j]
    return (
        total / len(targets)
        + off_diagonal * sum(matrix[i][j] ** 2 for i, j in pairs) / len(pairs)
        + intercept * sum(b**2 for b in intercepts) / classes
    )


def test_platt_by_hand():
    """Two values of the score: the fit goes through Platt's targets' mean at both. 3 of 4 right at s = 2, 1 of 4 at -2."""
    scores = np.repeat([2.0, -2.0], 4)
    targets = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    pred = bc.Bernoulli(scores.astype(np.float32)[None])
    pred, targets, weights = padded(pred, targets)
    plain = calibrate.fit_platt(pred, targets, smooth_targets=False, weights=weights)
    np.testing.assert_allclose([plain.slope, plain.intercept], [math.log(3) / 2, 0], atol=1e-6)
    smooth = calibrate.fit_platt(
        pred, targets, weights=weights
    )  # targets 5/6 and 1/6: mean (3 * 5/6 + 1/6) / 4 = 2/3 at s = 2
    np.testing.assert_allclose([smooth.slope, smooth.intercept], [math.log(2) / 2, 0], atol=1e-6)
    np.testing.assert_allclose(smooth(pred).pooled_mean()[:8], np.where(scores > 0, 2 / 3, 1 / 3), rtol=1e-5)
    assert isinstance(smooth(pred), bc.Bernoulli) and float(smooth.gradient) < 1e-6


def test_beta_by_hand():
    """Counts at p = 1/5, 1/2 and 4/5 that the map with a = 2, b = 1, c = log 2 gives exactly."""
    p = np.array([1 / 5, 1 / 2, 4 / 5])
    wanted = 1 / (1 + np.exp(-(2 * np.log(p) - np.log(1 - p) + np.log(2))))
    np.testing.assert_allclose(wanted, [1 / 11, 1 / 2, 32 / 37])
    pred = bc.Bernoulli(np.log(np.repeat(p / (1 - p), 2)).astype(np.float32)[None])
    pred, targets, weights = padded(pred, np.tile([0, 1], 3))
    weights[:6] = np.stack([1 - wanted, wanted], -1).ravel()
    fitted = calibrate.fit_beta(pred, targets, weights=weights)
    np.testing.assert_allclose([fitted.a, fitted.b, fitted.c], [2, 1, math.log(2)], rtol=2e-4)


def test_recovers_a_platt_map(rng):
    """Within 4 standard errors, from the inverse Fisher information of the true map."""
    pred, targets, scores = binary(rng)
    fitted = calibrate.fit_platt(pred, targets)
    p = 1 / (1 + np.exp(-0.5 * scores - 0.3))
    design = np.stack([scores, np.ones_like(scores)], -1)
    error = np.sqrt(np.diag(np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design)))
    assert (abs(np.array([fitted.slope, fitted.intercept]) - [0.5, 0.3]) < 4 * error).all()
    assert not fitted.accuracy_preserving
    zero = jnp.float32(0)
    assert calibrate.PlattScaling(jnp.float32(2), zero, zero).accuracy_preserving
    assert not calibrate.PlattScaling(jnp.float32(-2), zero, zero).accuracy_preserving


@pytest.mark.parametrize("name", ["matrix", "dirichlet"])
def test_recovers_a_known_matrix(name):
    """Twice the log-likelihood ratio to the true map is chi-squared with as many degrees of freedom as parameters."""
    rng, classes = np.random.default_rng(3), 4
    matrix = 0.6 * np.eye(classes) + 0.15 * rng.normal(size=(classes, classes))
    if name == "matrix":
        matrix -= matrix.mean(1, keepdims=True)  # rows that sum to zero need no centred log p
    intercepts = rng.normal(size=classes) / 2
    pred, targets, log_probs = several(rng, ROWS, classes, matrix, intercepts)
    fitted = MAPS[name](pred, targets)
    best = -np.asarray(fitted(pred).log_prob(targets), np.float64).mean()
    gain = 2 * len(targets) * (objective(matrix, intercepts, log_probs, targets, 0, 0) - best)
    degrees = (classes - 1) * (classes if name == "matrix" else classes + 1)
    assert 0 < gain < degrees + 4 * math.sqrt(2 * degrees)
    assert float(fitted.gradient) < 1e-6
    np.testing.assert_allclose(fitted.intercepts.sum(), 0, atol=1e-5)
    np.testing.assert_allclose(fitted.matrix.sum(0), np.ones(classes), atol=1e-5)  # as those of I: the nearest to it
    assert (abs(fitted.intercepts - (intercepts - intercepts.mean())) < 0.35).all()


@pytest.mark.parametrize("fit", [calibrate.fit_matrix, calibrate.fit_dirichlet])
def test_penalties_are_those_of_the_formula(fit, rng):
    """No step in any parameter lowers the objective as loops write it: at the optimum central differences vanish."""
    pred, targets, scores = several(rng)
    if fit is calibrate.fit_matrix:
        scores = scores - scores.mean(1, keepdims=True)
    weights = (np.arange(ROWS) % 50 == 0).astype(np.float32)
    scores, counted = scores[weights > 0], targets[weights > 0]
    fitted = fit(pred, targets, off_diagonal=0.05, intercept=0.02, weights=weights)
    at = np.concatenate([np.asarray(fitted.matrix, np.float64), np.asarray(fitted.intercepts, np.float64)[:, None]], 1)
    value = lambda x: objective(x[:, :4], x[:, 4], scores, counted, 0.05, 0.02)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-4
        assert abs(value(at + step) - value(at - step)) / 2e-4 < 2e-6


def test_strong_penalties_leave_slopes(rng):
    """ODIR at its limit is a slope a class and no intercept, and on temperature-like data near one temperature."""
    pred, targets, _ = several(rng)
    fitted = calibrate.fit_matrix(pred, targets, off_diagonal=1e4, intercept=1e4)
    matrix = np.asarray(fitted.matrix)
    assert abs(matrix - np.diag(np.diag(matrix))).max() < 1e-3 and abs(fitted.intercepts).max() < 1e-3
    scaler = bc.fit_temperature(pred, targets)
    np.testing.assert_allclose(np.diag(matrix), 1 / float(scaler.temperature), atol=0.1)
    np.testing.assert_allclose(fitted(pred).pooled_mean(), scaler(pred).pooled_mean(), atol=0.03)


def test_two_classes_agree(rng):
    """Vector and matrix scaling are Platt's map without smoothing, diagonal Dirichlet is beta's, "am" is Platt's."""
    pred, targets, _ = binary(rng)
    platt = calibrate.fit_platt(pred, targets, smooth_targets=False)
    vector, matrix = calibrate.fit_vector(pred, targets), calibrate.fit_matrix(pred, targets)
    np.testing.assert_allclose(vector.slopes, [platt.slope] * 2, rtol=1e-5)
    np.testing.assert_allclose(vector.intercepts, [-platt.intercept / 2, platt.intercept / 2], rtol=1e-4)
    for one in (vector, matrix, calibrate.fit_beta(pred, targets, parameters="am")):
        np.testing.assert_allclose(one(pred).pooled_mean(), platt(pred).pooled_mean(), atol=2e-6)
    beta, diagonal = calibrate.fit_beta(pred, targets), calibrate.fit_diagonal_dirichlet(pred, targets)
    np.testing.assert_allclose([beta.b, beta.a], np.diag(diagonal.matrix), rtol=1e-4)


@pytest.mark.parametrize("parameters", ["abm", "am", "ab"])
def test_beta_bounds_are_exact(parameters):
    """Against SciPy's bounded search, on data whose free optimum has a < 0, b < 0 or neither."""
    from scipy.optimize import minimize

    for seed, (a, b) in enumerate([(1.2, -0.4), (-0.3, 0.8), (0.5, 1.5), (-0.5, -0.5)]):
        rng = np.random.default_rng(seed)
        p = rng.uniform(0.02, 0.98, ROWS)
        targets = (rng.uniform(size=ROWS) < 1 / (1 + np.exp(-a * np.log(p) + b * np.log(1 - p)))).astype(np.int32)
        pred = bc.Probabilities(np.stack([1 - p, p], -1).astype(np.float32)[None])

        def nll(x, p=p, targets=targets):
            a, b, c = {"abm": lambda: x, "am": lambda: (x[0], *x), "ab": lambda: (*x, (x[0] - x[1]) * math.log(2))}[
                parameters
            ]()
            odds = a * np.log(p) - b * np.log(1 - p) + c
            return np.logaddexp(0, np.where(targets == 1, -odds, odds)).mean()

        free = {"abm": 1, "am": 1, "ab": 0}[parameters]
        size = len(parameters) if parameters == "abm" else 2
        best = minimize(nll, np.full(size, 0.5), bounds=[(0, None)] * (size - free) + [(None, None)] * free, tol=1e-12)
        fitted = calibrate.fit_beta(pred, targets, parameters=parameters)
        assert fitted.a >= 0 and fitted.b >= 0
        np.testing.assert_allclose(-fitted(pred).log_prob(targets).mean(), best.fun, rtol=2e-6)


def test_beta_keeps_a_half(rng):
    pred, targets, _ = binary(rng)
    half, zero = bc.Bernoulli(jnp.zeros((1, 2))), bc.Bernoulli(jnp.array([[-jnp.inf, jnp.inf]]))
    kept, moved = (calibrate.fit_beta(pred, targets, parameters=x) for x in ("ab", "abm"))
    np.testing.assert_allclose(kept(half).pooled_mean(), 0.5, atol=1e-7)
    assert kept.accuracy_preserving and not moved.accuracy_preserving
    assert abs(float(moved(half).pooled_mean()[0]) - 0.5) > 0.01
    np.testing.assert_array_equal(moved(zero).pooled_mean(), [0, 1])
    flat = calibrate.BetaMap(*map(jnp.float32, (0, 1, 0.5, 0)), parameters="abm")  # 0 log 0 = 0
    np.testing.assert_allclose(flat(zero).pooled_mean(), [1 / (1 + math.exp(-0.5)), 1], rtol=1e-6)


@pytest.mark.parametrize("name", list(MAPS))
def test_constants_a_row_and_names_of_classes_do_not_matter(name, rng):
    pred, targets, _ = several(rng)
    settings = {"intercept": 0.1} | ({"off_diagonal": 0.1} if name in ("matrix", "dirichlet") else {})
    fitted = MAPS[name](pred, targets, **settings)
    order = np.array([2, 0, 3, 1])  # new class i is old class order[i]
    logits = np.asarray(pred.logits) + rng.normal(size=(1, ROWS, 1)).astype(np.float32)
    renamed = bc.Categorical(logits[..., order])
    again = MAPS[name](renamed, np.argsort(order)[targets].astype(np.int32), **settings)
    np.testing.assert_allclose(again(renamed).pooled_mean(), fitted(pred).pooled_mean()[:, order], atol=1e-5)


@pytest.mark.slow
def test_matrix_overfits_many_classes_and_vector_does_not():
    """Guo et al.: with few rows a class a full matrix learns noise. On calibrated data the nll on new rows rises by about
    parameters / (2 rows): 210 / 1800 for the matrix, 29 / 1800 for the vector."""
    rng, classes = np.random.default_rng(0), 15
    (pred, targets, _), (new, new_targets, _) = (several(rng, rows, classes, np.eye(classes)) for rows in (900, 4000))
    rise = lambda fitted: float((new.log_prob(new_targets) - fitted(new).log_prob(new_targets)).mean())
    matrix = rise(calibrate.fit_matrix(pred, targets))
    assert matrix > 0.08 and abs(rise(calibrate.fit_vector(pred, targets))) < 0.04
    assert rise(calibrate.fit_matrix(pred, targets, off_diagonal=1, intercept=1)) < matrix


MANY = 24  # classes: more parameters than Newton's method takes


def test_many_classes_search_without_a_hessian():
    """Beyond Newton's size L-BFGS; the penalised optimum's derivative, written out in float64, vanishes."""
    pred, targets, log_probs = several(np.random.default_rng(1), 1500, MANY)
    scores = log_probs - log_probs.mean(1, keepdims=True)
    fitted = calibrate.fit_matrix(pred, targets, off_diagonal=1, intercept=1)
    matrix, intercepts = np.asarray(fitted.matrix, np.float64), np.asarray(fitted.intercepts, np.float64)
    residual = np.array([softmax(z) for z in scores @ matrix.T + intercepts]) - np.eye(MANY)[targets]
    gradient = residual.T @ scores / 1500 + 2 * (1 - np.eye(MANY)) * matrix / (MANY * (MANY - 1))
    assert abs(gradient).max() < 1e-4 and abs(residual.mean(0) + 2 * intercepts / MANY).max() < 1e-4
    # In a unit in which all rows are close to uniform derivatives are small everywhere; the map is the same.
    close = bc.Categorical((np.asarray(pred.logits) / 300).astype(np.float32))
    again = calibrate.fit_matrix(close, targets, off_diagonal=300.0**-2, intercept=1)
    np.testing.assert_allclose(again(close).pooled_mean(), fitted(pred).pooled_mean(), atol=1e-4)


def test_many_classes_without_a_penalty_have_one_finite_optimum_or_none():
    """Small derivatives alone are found on the way to infinity, and where two maps are equally good, too."""
    rng = np.random.default_rng(1)
    pred, targets, log_probs = several(rng, 1500, MANY)
    fitted = calibrate.fit_matrix(pred, targets)
    scores = log_probs - log_probs.mean(1, keepdims=True)
    residual = np.asarray(fitted(pred).pooled_mean(), np.float64) - np.eye(MANY)[targets]
    assert abs(residual.T @ scores).max() / 1500 < 1e-5
    separated, twins = np.array(pred.logits), np.array(pred.logits)
    separated[0, :, 0] = np.where(targets == 0, 3, -3) * (1 + rng.uniform(size=1500))
    twins[..., 1] = twins[..., 2]
    for logits in (separated, twins):
        with pytest.raises(ValueError, match="`targets` must leave one finite best map"):
            calibrate.fit_matrix(bc.Categorical(logits), targets)
    with pytest.raises(ValueError, match="`off_diagonal` must be positive for 40 classes, got 0"):
        calibrate.fit_matrix(bc.Categorical(np.zeros((1, 40, 40), np.float32)), np.arange(40))


def test_rows_close_to_uniform():
    """Log-probabilities that hardly vary are about as constant as the intercept's column: the same map all the same."""
    pred, targets, log_probs = several(np.random.default_rng(4))
    shares = np.array([softmax(z / 100) for z in log_probs])
    fitted = calibrate.fit_dirichlet(bc.Probabilities(shares.astype(np.float32)[None]), targets)
    centred = calibrate.fit_matrix(pred, targets)
    after = lambda calibrator, p: -np.asarray(calibrator(p).log_prob(targets), np.float64).mean()
    # Twice the gain of the few parameters more that a Dirichlet map has is chi-squared, 3 degrees of freedom.
    gain = 2 * ROWS * (after(centred, pred) - after(fitted, bc.Probabilities(shares.astype(np.float32)[None])))
    assert -0.5 < gain < 3 + 4 * math.sqrt(6)


def test_smoothing_makes_separable_rows_finite():
    scores = np.linspace(-3, 3, ROWS).astype(np.float32)
    pred, targets = bc.Bernoulli(scores[None]), (scores > 0).astype(np.int32)
    some = (np.arange(ROWS) % 75 == 37).astype(np.float32)
    fitted = calibrate.fit_platt(pred, targets, weights=some)
    assert 0 < float(fitted.slope) < 10 and float(fitted.gradient) < 1e-6
    lone = calibrate.fit_platt(
        pred, np.zeros(ROWS, np.int32), weights=some
    )  # one class: its smoothed share, 1 / (40 + 2), everywhere
    np.testing.assert_allclose(lone(pred).pooled_mean(), 1 / 42, rtol=1e-4)


def test_separable_rows(unchecked):
    scores = np.linspace(-3, 3, ROWS).astype(np.float32)
    pred, targets = bc.Bernoulli(scores[None]), (scores > 0).astype(np.int32)
    refused = lambda remedy: pytest.raises(
        ValueError, match=f"`targets` must leave one finite best map, got .*{remedy}"
    )
    with refused("`smooth_targets=True`"):
        calibrate.fit_platt(pred, targets, smooth_targets=False)
    for parameters in ("abm", "am", "ab"):
        with refused("`fit_platt`"):
            calibrate.fit_beta(pred, targets, parameters=parameters)
    traced = jax.jit(lambda pred, targets: calibrate.fit_platt(pred, targets, smooth_targets=False))(pred, targets)
    assert np.isnan(traced.slope) and np.isnan(traced(pred).pooled_mean()).all()
    with refused("do not tell parameters apart|`smooth_targets"):
        calibrate.fit_platt(bc.Bernoulli(jnp.ones((1, ROWS))), targets)


@pytest.mark.parametrize("name", list(MAPS))
def test_one_class_of_several_separable(name, unchecked):
    """Two classes overlap, the third is told by its own logit: no finite optimum, though the nll does not go to zero."""
    rng = np.random.default_rng(0)
    pred, targets, _ = several(rng)
    logits = np.array(pred.logits)
    logits[0, :, 0] = np.where(targets == 0, 3, -3) * (1 + rng.uniform(size=ROWS))
    with pytest.raises(ValueError, match="separate classes, or that do not tell parameters apart"):
        MAPS[name](bc.Categorical(logits), targets)


@pytest.mark.parametrize("name", ["matrix", "dirichlet"])
def test_twin_classes_need_a_penalty(name, rng):
    pred, targets, _ = several(rng)
    logits = np.array(pred.logits)
    logits[..., 1] = logits[..., 2]
    with pytest.raises(
        ValueError, match=r"do not tell parameters apart .* Give `off_diagonal` and `intercept` a strength"
    ):
        MAPS[name](bc.Categorical(logits), targets)
    for strength in (1e-3, 1e-2):  # at 1e-6 the twins' curvature, 3e-7, is less than float32 tells from none: refused
        fitted = MAPS[name](bc.Categorical(logits), targets, off_diagonal=strength, intercept=strength)
        assert np.isfinite(fitted.matrix).all() and float(fitted.gradient) < 1e-5


def test_refusals(unchecked, rng):
    pred, targets, _ = several(rng)
    for fit, instead in ((calibrate.fit_platt, "`fit_vector`"), (calibrate.fit_beta, "`fit_dirichlet`")):
        with pytest.raises(ValueError, match=f"`pred` must have two classes, got 4. For more classes use {instead}"):
            fit(pred, targets)
    two, labels, _ = binary(rng)
    one = jnp.float32(1)
    for fitted in (calibrate.PlattScaling(one, one, one), calibrate.BetaMap(one, one, one, one, parameters="abm")):
        with pytest.raises(ValueError, match="`pred` must have two classes, got 4"):
            fitted(pred)
    with pytest.raises(ValueError, match='`parameters` must be "abm", "am" or "ab", got \'a\''):
        calibrate.fit_beta(two, labels, parameters="a")
    for fit in (calibrate.fit_beta, lambda *rows: calibrate.fit_platt(*rows, smooth_targets=False)):
        with pytest.raises(ValueError, match=r"`targets` must hold every one of the 2 classes, got none of \[1\]"):
            fit(two, np.zeros(ROWS, np.int32))
    sure = bc.Categorical(jnp.asarray(two.logits).at[0, 3, 0].set(-jnp.inf))
    for fit in (calibrate.fit_platt, calibrate.fit_beta, *MAPS.values()):
        with pytest.raises(
            ValueError, match=r"positive probability for .*, got a zero in 1 of 3000 rows. Pass .*clip_prob"
        ):
            fit(sure, labels)
    clipped = calibrate.clip_probabilities(sure, 1e-6)
    assert np.isfinite(calibrate.fit_vector(clipped, labels)(clipped).pooled_mean()).all()
    line, square = jnp.ones(3), jnp.eye(3)
    for fitted in (
        calibrate.VectorScaling(line, line, one),
        calibrate.MatrixScaling(square, line, one),
        calibrate.DirichletMap(square, line, one),
    ):
        with pytest.raises(ValueError, match="`pred` must have the 3 classes of the fit, got 4"):
            fitted(pred)
    for name, fit in MAPS.items():
        with pytest.raises(ValueError, match=r"`targets` must hold every one of the 4 classes, got none of \[2, 3\]"):
            fit(pred, np.minimum(targets, 1))
        with pytest.raises(ValueError, match="`intercept` must be a finite number of at least 0, got -1"):
            fit(pred, targets, intercept=-1)
        if name in ("matrix", "dirichlet"):
            with pytest.raises(ValueError, match="`off_diagonal` must be a finite number of at least 0, got inf"):
                fit(pred, targets, off_diagonal=math.inf)
