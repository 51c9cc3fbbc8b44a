"""What scores of classes, groups, shifts and the metrics of sets refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_conformal_classes import KEY, SETS, absolute_residual, problem, spoiled

import bayescal as bc
from bayescal import conformal as cf

pytestmark = pytest.mark.core


def test_bad_input(unchecked):
    pred, targets = problem()
    gaussian = bc.Gaussian(np.zeros((1, 200, 1), np.float32), np.ones((1, 200, 1), np.float32))
    plain = cf.lac()
    split = lambda pred=pred, y=targets, score=plain, alpha=0.1, key=None: cf.fit_split(
        pred, y, score, alpha=alpha, key=key
    )
    with pytest.raises(
        ValueError, match=r"`alpha` must be the miscoverage wanted, .* got 1\.5\. 0\.1 gives 90 % coverage"
    ):
        split(alpha=1.5)
    with pytest.raises(ValueError, match="`targets` must have at least one row, got none"):
        split(bc.Categorical(pred.logits[:, :0]), targets[:0])
    with pytest.raises(ValueError, match=r"`targets` must lie in \[0, 4\)"):
        split(y=targets + 3)
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        split(bc.Categorical(spoiled(pred.logits, 0)))
    with pytest.raises(
        ValueError, match=r"`key` must be given for a randomised score \(APS: cumulative p, randomised\), got None"
    ):
        split(score=cf.aps())
    with pytest.raises(
        ValueError, match=r"`key` must be None for a score without randomness \(LAC: 1 - p\), got a key\. Leave"
    ):
        split(key=KEY)
    with pytest.raises(ValueError, match="`key` must be given"):
        split(score=cf.aps(), key=KEY)(pred)
    with pytest.raises(ValueError, match="`key` must be None"):
        cf.p_values(pred, cf.lac(), jnp.ones(3), key=KEY)
    with pytest.raises(TypeError, match=r"`pred` must be a predictive over classes, got Gaussian\. For regression use"):
        split(gaussian, np.zeros((200, 1), np.float32))
    for regression in (cf.never_empty, cf.averaged, lambda score: cf.epistemic(score, floor=1.0)):
        with pytest.raises(
            TypeError, match=r"`score` must be one of classes, with `candidates`, got residual\. Build it"
        ):
            regression(absolute_residual())
    with pytest.raises(TypeError, match="`score` must be one of classes"):
        cf.fit_class_conditional(pred, targets, absolute_residual(), alpha=0.1)
    with pytest.raises(ValueError, match="`targets` must have at least one row, got none"):
        cf.set_coverage(SETS[:0], np.zeros(0, int))
    with pytest.raises(ValueError, match=r"`pred` must have at least two classes, got one\. Of one class"):
        split(bc.Categorical(pred.logits[..., :1]), 0 * targets, cf.margin())


PROCEDURES = {  # `fit(pred, targets, alpha)` and `use(fit, pred)` of every procedure; CV+ has test_conformal_cross.py
    "split": (lambda p, y, a: cf.fit_split(p, y, cf.lac(), alpha=a), lambda f, p: f(p)),
    "class-conditional": (lambda p, y, a: cf.fit_class_conditional(p, y, cf.lac(), alpha=a), lambda f, p: f(p)),
    "mondrian": (
        lambda p, y, a: cf.fit_mondrian(p, y, cf.lac(), alpha=a, groups=np.arange(200) % 2, num_groups=2),
        lambda f, p: f(p, groups=np.arange(200) % 2),
    ),
    "weighted": (
        lambda p, y, a: cf.fit_weighted(p, y, cf.lac(), alpha=a, weights=1 + np.arange(200.0)),
        lambda f, p: f(p, weights=1 + np.arange(200.0)),
    ),
    "label shift": (
        lambda p, y, a: cf.fit_label_shift(p, y, cf.lac(), alpha=a, prior_ratio=1 + np.arange(4.0)),
        lambda f, p: f(p),
    ),
}


@pytest.mark.parametrize("name", PROCEDURES)
def test_every_procedure_at_any_alpha(name, unchecked):
    """Sets shrink as alpha grows; an alpha that the rows cannot serve gives everything; one outside (0, 1) is refused."""
    (fit, use), (pred, targets) = PROCEDURES[name], problem()
    sets = [np.asarray(use(fit(pred, targets, alpha), pred)) for alpha in (1e-5, 0.05, 0.2)]
    assert sets[0].all() and (sets[0] >= sets[1]).all() and (sets[1] >= sets[2]).all() and not sets[2].all()
    for alpha in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"`alpha` must be the miscoverage wanted, a number in \(0, 1\), got"):
            fit(pred, targets, alpha)


def test_bad_settings():
    for build in (lambda p: cf.raps(penalty=p, start=1), lambda p: cf.saps(penalty=p)):
        with pytest.raises(ValueError, match=r"`penalty` must be at least 0, got -1\. It is in units of probability"):
            build(-1)
    with pytest.raises(
        ValueError, match=r"`start` must be the last rank without a penalty, at least 0, got -2\. 5 is usual"
    ):
        cf.raps(penalty=0.1, start=-2)
    with pytest.raises(ValueError, match=r"`floor` must be a positive number of nats, got 0\. Take the median"):
        cf.epistemic(cf.lac(), floor=0)


def test_bad_groups_and_weights(unchecked):
    pred, targets = problem()
    fit = lambda groups: cf.fit_mondrian(pred, targets, cf.lac(), alpha=0.1, groups=groups, num_groups=2)
    message = r"`groups` must be whole numbers of shape \(200,\), one per row, got "
    for wrong in (np.zeros(199, int), np.zeros(200), np.zeros((200, 1), int)):
        with pytest.raises(ValueError, match=message):
            fit(wrong)
    with pytest.raises(ValueError, match=r"`groups` must lie in \[0, 2\), got values from 0 to 2\. Give `num_groups`"):
        fit(np.arange(200) % 3)
    with pytest.raises(ValueError, match=r"`groups` must lie in \[0, 2\), got values from -1 to -1"):
        fit(np.arange(200) % 2)(pred, groups=-np.ones(200, int))
    weigh = lambda weights: cf.fit_weighted(pred, targets, cf.lac(), alpha=0.1, weights=weights)
    out_of_range = np.full(200, 1e300), np.full(200, 1e-300), np.full(200, 1e-40)  # infinite and zero in float32
    for wrong in (np.ones(199), -np.ones(200), np.full(200, np.nan), np.zeros(200), *out_of_range):
        with pytest.raises(
            ValueError, match=r"`weights` must be finite non-negative numbers of shape \(200,\), not all zero, got"
        ):
            weigh(wrong)
    with pytest.raises(
        ValueError, match=r"`weights` must be finite non-negative numbers of shape \(200,\), got shape \(3,\)"
    ):
        weigh(np.ones(200))(pred, weights=np.ones(3))
    shift = lambda ratio: cf.fit_label_shift(pred, targets, cf.lac(), alpha=0.1, prior_ratio=ratio)
    for wrong in (np.ones(3), -np.ones(4), np.zeros(4)):
        with pytest.raises(
            ValueError, match=r"`prior_ratio` must be finite non-negative numbers of shape \(4,\), not all zero"
        ):
            shift(wrong)
    with pytest.raises(ValueError, match=r"`prior_ratio\[targets\]` must be finite non-negative numbers"):
        cf.fit_label_shift(pred, 0 * targets, cf.lac(), alpha=0.1, prior_ratio=np.array([0, 1, 1, 1]))
