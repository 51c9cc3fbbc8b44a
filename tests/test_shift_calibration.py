"""Calibration under covariate shift and label shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayescal as bc
from bayescal import calibrate

pytestmark = pytest.mark.core
KEY = jax.random.key(5)
MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
SOURCE, TARGET = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])


def by_class(prior, rows, seed):
    """Exact posteriors under SOURCE of rows drawn with other class frequencies."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(3, size=rows, p=prior).astype(np.int32)
    inputs = MEANS[targets] + rng.normal(size=(rows, 2))
    log_joint = -0.5 * ((inputs[:, None] - MEANS) ** 2).sum(-1) + np.log(SOURCE)
    return bc.Categorical(log_joint.astype(np.float32)[None]), targets


def test_em_finds_the_prior():
    """Within four standard errors by Fisher's information; a float64 loop of EM gives the same."""
    pred, targets = by_class(TARGET, 5000, 0)
    fitted = calibrate.fit_label_shift_em(pred, source_prior=SOURCE)
    probs = np.exp(np.asarray(pred.log_probs(), np.float64))
    q = SOURCE
    for _ in range(300):
        new = probs * q / SOURCE
        q = (new / new.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(fitted.target_prior, q, atol=1e-3)
    ratio = probs / SOURCE
    score = (ratio[:, :2] - ratio[:, 2:]) / (ratio @ TARGET)[:, None]
    errors = np.sqrt(np.diag(np.linalg.inv(score.T @ score)))
    assert (abs(fitted.target_prior[:2] - TARGET[:2]) < 4 * errors).all()
    better, known = fitted(pred), calibrate.prior_shift(SOURCE, TARGET)(pred)
    assert fitted.needs == ("unlabelled",) and calibrate.prior_shift(SOURCE, TARGET).needs == ()
    nll = lambda p: -float(p.log_prob(targets).mean())
    assert nll(better) < nll(pred) - 0.05 and abs(nll(better) - nll(known)) < 1e-3
    # By hand: p = (.5, .5) under priors (.5, .5) -> (.2, .8).
    half = bc.Categorical(np.zeros((1, 1, 2), np.float32))
    np.testing.assert_allclose(
        calibrate.prior_shift(np.array([0.5, 0.5]), np.array([0.2, 0.8]))(half).pooled_mean(), [[0.2, 0.8]], rtol=1e-6
    )


def test_bbse_is_exact_on_a_population():
    """Rows whose top classes stand in the proportions of a known confusion matrix."""
    confusion = np.array([[8, 1, 1], [1, 7, 3], [1, 2, 6]])  # top class by label, in tenths
    source, target = np.array([2, 1, 1]), np.array([1, 1, 3])

    def rows(counts):
        cells = [(j, k) for k in range(3) for j in range(3) for _ in range(confusion[j, k] * counts[k])]
        top, targets = np.array(cells).T
        return bc.Categorical(3 * np.eye(3, dtype=np.float32)[top][None]), targets.astype(np.int32)

    fitted = calibrate.fit_label_shift_bbse(*rows(source), rows(target)[0])
    np.testing.assert_allclose(fitted.target_prior, target / 5, atol=1e-5)
    np.testing.assert_allclose(fitted.source_prior, source / 4, atol=1e-6)


def test_label_shift_errors(unchecked):
    pred, targets = by_class(SOURCE, 300, 1)
    bbse, em = calibrate.fit_label_shift_bbse, calibrate.fit_label_shift_em
    flat = bc.Categorical(np.tile(np.array([1.0, 0, 0], np.float32), (1, 300, 1)))
    with pytest.raises(ValueError, match="`pred` must tell the classes apart, got a confusion matrix"):
        bbse(flat, targets, flat)
    with pytest.raises(ValueError, match="`targets` must hold every one of the 3 classes"):
        bbse(pred, np.minimum(targets, 1), pred)
    with pytest.raises(ValueError, match="`unlabelled` must give shares that are not negative"):
        bbse(pred, targets, flat)
    assert (np.asarray(bbse(pred, targets, flat, least=0).target_prior) >= 0).all()
    with pytest.raises(ValueError, match="`least` must lie in"):
        bbse(pred, targets, pred, least=1)
    with pytest.raises(ValueError, match="`unlabelled` must have at least one row"):
        bbse(pred, targets, bc.Categorical(pred.logits[:, :0]))
    with pytest.raises(ValueError, match="`unlabelled` must have 3 classes"):
        bbse(pred, targets, bc.Categorical(pred.logits[..., :2]))
    with pytest.raises(ValueError, match="`source_prior` must be one share per class"):
        em(pred, source_prior=np.array([0.5, 0.2, 0.2]))
    with pytest.raises(ValueError, match="`source_prior` must be positive for every class"):
        em(pred, source_prior=np.array([0.5, 0.5, 0.0]))
    with pytest.raises(ValueError, match="`pred` must have 2 classes, got shape"):
        calibrate.prior_shift(SOURCE[:2] / SOURCE[:2].sum(), np.array([0.5, 0.5]))(pred)
    with pytest.raises(ValueError, match="`source_prior` must have 3 classes"):
        em(pred, source_prior=np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        em(bc.Categorical(jnp.asarray(pred.logits).at[0, 0].set(jnp.nan)), source_prior=SOURCE)


def predict(x):
    return bc.Categorical(jnp.stack([2 * x[:, 0], 2 * x[:, 1], 0 * x[:, 0]], -1)[None])


def shifted(seed=0, rows=4000):
    """Source N(0, 1), target N(m, 1); the right temperature is higher where the target is."""
    rng = np.random.default_rng(seed)
    mean = np.array([1.0, 0.5])
    inputs = [(rng.normal(size=(rows, 2)) + m).astype(np.float32) for m in (0, mean)]
    targets = [
        (np.asarray(predict(x).logits[0]) / (2 * np.exp(0.5 * x[:, :1])) + rng.gumbel(size=(rows, 3))).argmax(1)
        for x in inputs
    ]
    return inputs, [y.astype(np.int32) for y in targets], np.exp(inputs[0] @ mean - mean @ mean / 2)


def test_importance_weights():
    (source, target), (labels, truth), ratio = shifted()
    found = calibrate.density_ratio_weights(source, target, source, penalty=0.0)
    assert np.abs(np.log(found.weights) - np.log(ratio)).max() < 0.5 and float(found.gradient) < 1e-5
    w = np.asarray(found.weights, np.float64)
    np.testing.assert_allclose(found.effective_size, w.sum() ** 2 / (w**2).sum(), rtol=1e-4)
    from sklearn.linear_model import LogisticRegression

    peer = LogisticRegression(C=np.inf, tol=1e-8).fit(np.r_[source, target], np.repeat([0, 1], len(source)))
    np.testing.assert_allclose(np.log(found.weights), peer.decision_function(source), atol=2e-3)
    temperatures = [
        float(bc.fit_temperature(predict(x), y, weights=v).temperature)
        for x, y, v in ((source, labels, None), (source, labels, w), (target, truth, None))
    ]
    plain, weighted, best = np.log(temperatures)
    assert abs(weighted - best) < abs(plain - best) / 2
    assert float(calibrate.density_ratio_weights(source, target, source, clip=2.0).weights.max()) <= 2


def test_control_variates_lower_the_variance():
    """600 draws of a Gaussian shift: unbiased within four errors, and closer to the truth than weighting alone."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 500))
    chance = 1 / (1 + np.exp(-1 - x))
    correct, weights = rng.uniform(size=x.shape) < chance, np.exp(0.8 * x - 0.32)
    new = rng.normal(size=1_000_000) + 0.8
    truth, confidence = (1 / (1 + np.exp(-1 - new))).mean(), (1 / (1 + np.exp(-1 - (new - 0.8)))).mean()
    found = jax.vmap(calibrate.shifted_accuracy, (0, 0, None))(
        correct.astype(np.float32), weights.astype(np.float32), jnp.float32(confidence)
    )
    accuracy, weighted = np.asarray(found.accuracy), np.asarray(found.weighted)
    assert abs(accuracy.mean() - truth) < 4 * accuracy.std() / 600**0.5 + 2e-3  # and a bias of order 1 / rows
    assert accuracy.std() < weighted.std()
    same = calibrate.shifted_accuracy(
        correct[0].astype(np.float32), np.ones(500, np.float32), jnp.float32(correct[0].mean())
    )
    np.testing.assert_allclose(same.accuracy, correct[0].mean(), rtol=1e-5)


def test_transcal_and_matching():
    (source, target), (labels, truth), ratio = shifted(rows=4000)
    fitted = calibrate.fit_transcal(
        predict(target), source=predict(source), source_targets=labels, source_weights=ratio.astype(np.float32)
    )
    accuracy = (np.asarray(predict(target).logits[0]).argmax(1) == truth).mean()
    assert abs(fitted.accuracy - accuracy) < 0.04
    np.testing.assert_allclose(fitted(predict(target)).top_label()[0].mean(), fitted.accuracy, atol=1e-4)
    # A density ratio of 0 is a value: rows that have it are no absent ones, whose labels would not be looked at.
    ends = [
        calibrate.fit_transcal(
            predict(target),
            source=predict(source),
            source_targets=labels,
            source_weights=np.where(ratio < 1, least, ratio),
        )
        for least in (0, 1e-9)
    ]
    np.testing.assert_allclose(ends[0].accuracy, ends[1].accuracy, rtol=1e-5)
    np.testing.assert_allclose(ends[0].temperature, ends[1].temperature, rtol=1e-4)
    # By hand: |z| = 3, two classes, accuracy .8: T = 3 / log(.8 / .2) = 2.16404.
    pred = bc.Categorical(np.tile(np.array([3.0, 0.0], np.float32), (1, 5, 1)))
    np.testing.assert_allclose(calibrate.fit_confidence_matching(pred, accuracy=0.8).temperature, 2.16404, rtol=1e-4)


def test_perturbed_and_pseudo_target_rows():
    (source, target), (labels, _), _ = shifted(rows=1000)
    rows = calibrate.perturbed_rows(KEY, predict, source, labels, levels=3)
    assert rows.pred.batch_shape == rows.targets.shape == (4000,)
    assert rows.noise[0] == 0 and (np.diff(rows.noise) > 0).all()
    steps = np.diff(rows.accuracy)
    np.testing.assert_allclose(steps[:2], (rows.accuracy[-1] - rows.accuracy[0]) / 3, atol=0.03)
    clean = calibrate.perturbed_rows(KEY, predict, source, labels, levels=0)
    np.testing.assert_array_equal(clean.pred.logits, predict(source).logits)
    hotter = bc.fit_temperature(rows.pred, rows.targets).temperature
    assert hotter > bc.fit_temperature(clean.pred, clean.targets).temperature
    pseudo = calibrate.pseudo_target_rows(KEY, predict, target)
    assert 0 < len(pseudo.targets) < 1000 and pseudo.pred.batch_shape == pseudo.targets.shape
    wrong = (np.asarray(pseudo.pred.log_probs()).argmax(-1) != pseudo.targets).mean()
    assert 0 < wrong < 0.5


def test_shift_errors(unchecked):
    (source, target), (labels, _), _ = shifted(rows=60)
    weigh = calibrate.density_ratio_weights
    with pytest.raises(ValueError, match="`target_features` must have shape"):
        weigh(source, target[:, :1], source)
    with pytest.raises(ValueError, match="`query` must be finite"):
        weigh(source, target, source * np.nan)
    with pytest.raises(ValueError, match="`penalty` must be finite and not negative"):
        weigh(source, target, source, penalty=-1)
    with pytest.raises(ValueError, match="`clip` must be a positive number"):
        weigh(source, target, source, clip=0)
    apart = np.concatenate([target[:, :1] + 20, target[:, 1:]], 1)
    with pytest.raises(ValueError, match="`penalty` must be positive for domains that a plane separates, got 0"):
        weigh(source, apart, source, penalty=0.0)
    assert np.isfinite(weigh(source, apart, source).weights).all()
    traced = jax.jit(lambda *parts: weigh(*parts, penalty=0.0).weights)(source, apart, source)
    assert np.isnan(traced).all()
    with pytest.raises(ValueError, match="`query` must have finite weights, got a log-ratio of up to"):
        weigh(source, target, source * 1000)
    assert float(weigh(source, target, source * 1000, clip=5.0).weights.max()) == 5
    for accuracy in (0.2, 1.0):
        with pytest.raises(ValueError, match="`accuracy` must lie between"):
            calibrate.fit_confidence_matching(predict(target), accuracy=accuracy)
    with pytest.raises(ValueError, match=r"`power` must lie in \[0, 1\]"):
        calibrate.fit_transcal(
            predict(target), source=predict(source), source_targets=labels, source_weights=np.ones(60), power=2
        )
    for levels in (-1, 2.5):
        with pytest.raises(ValueError, match=f"`levels` must be a whole number, not negative, got {levels}"):
            calibrate.perturbed_rows(KEY, predict, source, labels, levels=levels)
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):  # whose top class would be the NaN's
        calibrate.pseudo_target_rows(KEY, predict, jnp.asarray(target).at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="`inputs` must be floats"):
        calibrate.perturbed_rows(KEY, predict, source.astype(int), labels, levels=1)
    with pytest.raises(ValueError, match="`predict` must lose accuracy under noise"):
        calibrate.perturbed_rows(KEY, lambda x: predict(0 * x), source, labels, levels=1)
    with pytest.raises(ValueError, match=r"`share` must lie in \(0.5, 1\)"):
        calibrate.pseudo_target_rows(KEY, predict, target, share=0.5)
    with pytest.raises(ValueError, match="`inputs` must be rows of more than one top class"):
        calibrate.pseudo_target_rows(KEY, lambda x: predict(0 * x), target)
