"""Coverage of conformal sets over 1,000 repetitions, each with its own calibration rows, against its exact distribution.

The true conditional distribution is softmax(z); what the scores see is a distorted one, of two members. Repetitions are one
vmapped, jitted program, and every seed is fixed. A row of `CASES` puts a score of classes through all of it.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles_conformal as oracle
import pytest
from conformal_bands import ALPHAS, coverage_band

import bayescal as bc
from bayescal import conformal as cf

pytestmark = pytest.mark.core
REPETITIONS, ROWS, NEW, CLASSES = 1000, 100, 30, 6
KEY = jax.random.key(2024)


class Case(NamedTuple):
    """score: of classes. tight: continuous, so that coverage is beta-binomial; else it is at least that. oracle: by loops,
    of the pool's probabilities and u. top: whether the most probable class is in every set that is not empty."""

    score: cf.Conformity
    tight: bool
    oracle: object = None
    top: bool = True


CASES = {
    "lac": Case(cf.lac(), True, oracle.lac),
    "margin": Case(cf.margin(), True, oracle.margin),
    "aps": Case(cf.aps(), True, oracle.aps),
    "raps": Case(cf.raps(penalty=0.05, start=2), True, oracle.raps(0.05, 2)),
    "saps": Case(cf.saps(penalty=0.2), True, oracle.saps(0.2)),
    "saps, whole": Case(cf.saps(penalty=0.2, randomised=False), True, oracle.saps(0.2)),
    "lac by epistemic": Case(cf.epistemic(cf.lac(), floor=0.05), True),
    "aps by epistemic": Case(cf.epistemic(cf.aps(), floor=0.05), True),
    "aps averaged": Case(cf.averaged(cf.aps()), True, None, False),
    "aps, whole": Case(cf.aps(randomised=False), False, oracle.aps),
    "raps, whole": Case(cf.raps(penalty=0.05, start=2, randomised=False), False, oracle.raps(0.05, 2)),
    "top k": Case(cf.top_k(), False, oracle.top_k),
    "aps, never empty": Case(cf.never_empty(cf.aps()), False, oracle.never_empty(oracle.aps)),
    "lac, never empty": Case(cf.never_empty(cf.lac()), False, oracle.never_empty(oracle.lac)),
}


class Runs(NamedTuple):
    """Everything over (repetition, alpha, new, ...): sets and thresholds, with what they were made from."""

    sets: np.ndarray
    thresholds: np.ndarray
    probs: np.ndarray
    targets: np.ndarray
    u: np.ndarray
    top: np.ndarray


def draw(key, rows):
    """Two members' logits, over-confident and noisy, and labels from the true distribution."""
    centre, noise, label = jax.random.split(key, 3)
    true = 3 * jax.random.normal(centre, (rows, CLASSES))
    logits = 1.5 * true + 1.5 * jax.random.normal(noise, (2, rows, CLASSES))
    return logits, jax.random.categorical(label, true)


def own(score, key):
    return key if score.randomised else None


@cache
def problems():
    """Logits (repetition, member, row, class), targets and the two keys of every repetition, for all cases."""

    def once(key):
        data, first, second = jax.random.split(key, 3)
        logits, targets = draw(data, ROWS + NEW)
        shares = [1 - jax.random.uniform(k, (n,)) for k, n in ((first, ROWS), (second, NEW))]
        return logits, targets, first, second, jnp.concatenate(shares), bc.Categorical(logits).pooled_mean()

    return jax.jit(jax.vmap(once))(jax.random.split(KEY, REPETITIONS))


@jax.jit
@jax.vmap
def decide(old, new):
    """Thresholds and sets, as `fit_split` has them: see `test_repetitions_are_fit_split`."""
    thresholds = jnp.stack([cf.order_statistic(old, cf.rank(ROWS, alpha)) for alpha in ALPHAS])
    return thresholds, ~(new > thresholds[:, None, None])


@cache
def runs(name):
    score = CASES[name].score
    logits, targets, first, second, u, probs = problems()

    def once(logits, targets, first, second):
        old, new = bc.Categorical(logits[:, :ROWS]), bc.Categorical(logits[:, ROWS:])
        return score.measure(old, targets[:ROWS], own(score, first)), score.candidates(new, own(score, second))

    thresholds, sets = decide(*jax.jit(jax.vmap(once))(logits, targets, first, second))
    u = u if score.randomised else jnp.ones_like(u)
    return Runs(*map(np.asarray, (sets, thresholds, probs, targets, u, probs[:, ROWS:].argmax(-1))))


def covered(sets, targets):
    """(..., new) of sets (repetition, ..., new, classes) and targets (repetition, new)."""
    targets = targets.reshape(targets.shape[:1] + (1,) * (sets.ndim - 3) + targets.shape[1:])
    return np.take_along_axis(sets, np.broadcast_to(targets, sets.shape[:-1])[..., None], -1)[..., 0]


@pytest.mark.parametrize("name", CASES)
def test_split_covers(name):
    run = runs(name)
    coverage = covered(run.sets, run.targets[:, ROWS:]).mean((0, 2))
    for alpha, got in zip(ALPHAS, coverage):
        low, high = coverage_band(REPETITIONS, ROWS, NEW, cf.rank(ROWS, alpha))
        assert got >= low and (got <= high or not CASES[name].tight), (alpha, got, low, high)


@pytest.mark.parametrize("name", CASES)
def test_repetitions_are_fit_split(name):
    """One repetition through the public names, without jit and with."""
    score, (logits, targets, first, second, *_) = CASES[name].score, jax.tree.map(lambda x: x[0], problems())
    old, new = bc.Categorical(logits[:, :ROWS]), bc.Categorical(logits[:, ROWS:])
    fit = cf.fit_split(old, np.asarray(targets[:ROWS]), score, alpha=ALPHAS[2], key=own(score, first))
    np.testing.assert_allclose(fit.threshold, runs(name).thresholds[0, 2], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(fit(new, key=own(score, second)), runs(name).sets[0, 2])


@pytest.mark.parametrize("name", CASES)
def test_sets_are_sensible(name):
    """What coverage alone does not see (pitfall 37): size, nesting, and the most probable class."""
    run = runs(name)
    assert (run.sets[:, :-1] >= run.sets[:, 1:]).all()  # of a smaller alpha they hold those of a larger one
    size = run.sets.sum(-1)
    top = np.take_along_axis(run.sets, np.broadcast_to(run.top[:, None], size.shape)[..., None], -1)[..., 0]
    if CASES[name].top:
        assert (top | (size == 0)).all()
    if "never empty" in name:
        assert top.all()
    assert size.mean((0, 2))[-1] < 0.75 * CLASSES  # inverted ones have 0.95
    if name == "top k":
        assert (size == size[..., :1]).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.oracle])
def test_sets_equal_the_oracle(name):
    """The first 8 repetitions with the same u: thresholds to float32, sets equal but for rounding, hence their mean size."""
    run, size, expected_size = runs(name), 0, 0
    for r in range(8):
        for a, alpha in enumerate(ALPHAS):
            probs = run.probs[r].astype(np.float64)
            probs /= probs.sum(-1, keepdims=True)
            scores, threshold = oracle.sets(
                CASES[name].oracle, probs[:ROWS], run.targets[r], run.u[r, :ROWS], probs[ROWS:], run.u[r, ROWS:], alpha
            )
            np.testing.assert_allclose(run.thresholds[r, a], threshold, rtol=1e-5, atol=1e-6)
            expected = scores <= threshold + 1e-9
            gap = abs(scores - threshold)[run.sets[r, a] != expected]
            assert (
                (gap > 1e-9) & (gap < 1e-6)
            ).all()  # float32 may tie so near the threshold; ties that are meant must be in
            size, expected_size = size + run.sets[r, a].sum(), expected_size + expected.sum()
    assert abs(size / expected_size - 1) < 0.02


def test_whole_aps_is_larger_and_lac_smallest():
    """Pitfall 39: without randomisation sets only grow; LAC's are the smallest on average, here for alphas that bind."""
    size = {name: runs(name).sets.sum(-1).mean((0, 2)) for name in ("aps", "aps, whole", "lac", "top k")}
    assert (size["aps, whole"] > size["aps"]).all() and (size["lac"] < size["aps"])[1:].all()
    assert (size["lac"] < size["top k"])[1:].all()


@pytest.mark.slow
def test_whole_aps_of_a_model_that_knows_nothing():
    """The last of 3 classes is the target in a third of the rows: at 0.1 the threshold is 1, and every set is everything."""
    logits, label = jax.random.normal(KEY, (1, 2000, 3)), jax.random.randint(jax.random.key(1), (2000,), 0, 3)
    old, new = bc.Categorical(logits[:, :1000]), bc.Categorical(logits[:, 1000:])
    assert cf.fit_split(old, label[:1000], cf.aps(randomised=False), alpha=0.1)(new).all()
    sets = cf.fit_split(old, label[:1000], cf.aps(), alpha=0.1, key=KEY)(new, key=jax.random.key(2))
    assert abs(cf.set_coverage(sets, label[1000:]).value - 0.9) < 0.04 and cf.mean_set_size(sets) < 2.8


def test_fewer_rows_than_the_rank():
    """k = 101 of 100 rows: the stated result is every class, not an error."""
    logits, targets, *_ = jax.tree.map(lambda x: x[0], problems())
    old, new = bc.Categorical(logits[:, :ROWS]), bc.Categorical(logits[:, ROWS:])
    sets = cf.fit_split(old, targets[:ROWS], cf.lac(), alpha=0.009)
    assert sets.threshold == jnp.inf and sets(new).all()
    assert jnp.isfinite(cf.fit_split(old, targets[:ROWS], cf.lac(), alpha=1 / (ROWS + 1) + 1e-6).threshold)


def test_inverted_sets_are_seen():
    """Pitfall 37 in our terms: sets of the strangest classes cover as promised, and fail everything else."""
    run = runs("lac")
    inverted = run.probs[:, None, ROWS:] < np.quantile(
        np.take_along_axis(run.probs[:, :ROWS], run.targets[:, :ROWS, None], -1)[..., 0], 0.9, axis=1
    ).reshape(-1, 1, 1, 1)
    coverage = covered(inverted, run.targets[:, ROWS:]).mean()
    assert abs(coverage - 0.9) < 0.01
    top = np.take_along_axis(inverted, run.top[:, None, :, None], -1)
    assert top.mean() < 0.95 and inverted.sum(-1).mean() > 2 * run.sets[:, 2].sum(-1).mean()


GROUP_ROWS, GROUP_NEW = (60, 30, 15), 10


def by_group(fit, key):
    """Sets (alpha, new, classes) with targets and groups of the new rows; `fit` makes them."""
    groups, new_groups = np.repeat(np.arange(3), GROUP_ROWS), np.repeat(np.arange(3), GROUP_NEW)
    rows = len(groups)
    label, noise = jax.random.split(key)
    every = jnp.concatenate([groups, new_groups])
    targets, spread = every, jnp.array([0.6, 1.2, 2.4])[every]  # the group is the class, for class-conditional
    if fit is not fit_classes:
        targets = jax.random.randint(label, every.shape, 0, 3)
    logits = 3 * jax.nn.one_hot(targets, 3) + spread[:, None] * jax.random.normal(noise, (len(every), 3))
    old, new = bc.Categorical(logits[None, :rows]), bc.Categorical(logits[None, rows:])
    sets = [fit(a, old, targets[:rows], groups, new, new_groups) for a in ALPHAS]
    return jnp.stack(sets), targets[rows:]


def fit_groups(alpha, old, targets, groups, new, new_groups):
    fit = cf.fit_mondrian(old, targets, cf.lac(), alpha=alpha, groups=groups, num_groups=3)
    return fit(new, groups=new_groups)


def fit_classes(alpha, old, targets, groups, new, new_groups):
    return cf.fit_class_conditional(old, targets, cf.lac(), alpha=alpha)(new)


def fit_plain(alpha, old, targets, groups, new, new_groups):
    return cf.fit_split(old, targets, cf.lac(), alpha=alpha)(new)


def group_coverages(fit):
    """(alpha, group)."""
    sets, targets = jax.jit(jax.vmap(partial(by_group, fit)))(jax.random.split(KEY, REPETITIONS))
    assert (sets[:, :-1] >= sets[:, 1:]).all()  # of a smaller alpha they hold those of a larger one
    return covered(np.asarray(sets), np.asarray(targets)).reshape(REPETITIONS, len(ALPHAS), 3, GROUP_NEW).mean((0, 3))


@pytest.mark.parametrize("fit", [fit_groups, fit_classes])
def test_every_group_is_covered(fit):
    """Each group alone is beta-binomial with its own rows; those with too few are covered always."""
    for alpha, row in zip(ALPHAS, group_coverages(fit)):
        for rows, got in zip(GROUP_ROWS, row):
            low, high = coverage_band(REPETITIONS, rows, GROUP_NEW, cf.rank(rows, alpha))
            assert low <= got <= high, (alpha, rows, got, low, high)


@pytest.mark.slow
def test_plain_split_fails_some_group():
    assert group_coverages(fit_plain)[2, 2] < 0.9 - 0.05


def check_shift(once, plain_below):
    """`once(key)` gives whether new rows were covered, (alpha, method, new), the method that knows of the shift first."""
    hits = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, REPETITIONS)))
    assert (hits[:, :-1] >= hits[:, 1:]).all()  # what the set of a larger alpha holds, that of a smaller one does
    hit = hits.mean(-1)
    mean, error = hit.mean(0), hit.std(0) / REPETITIONS**0.5
    for a, alpha in enumerate(ALPHAS):
        assert mean[a, 0] > 1 - alpha - 3.3 * error[a, 0], (alpha, mean[a])
        assert mean[a, 1] < 1 - alpha - plain_below * alpha, (alpha, mean[a])
    assert mean[-1, 0] < 1 - ALPHAS[-1] + 0.03  # and not by giving everything


def test_weighted_covers_under_covariate_shift():
    """Inputs move from N(0, 1) to N(1, 1), so that w = exp(x - 1/2); the model is the worse the larger x is."""

    def once(key):
        place, label = jax.random.split(key)
        x = jax.random.normal(place, (330,)) + (jnp.arange(330) >= 300)
        true = jnp.stack([0 * x, 1.5 - x, x - 1.5], -1)
        targets = jax.random.categorical(label, true)
        logits = true * jnp.where(x > 0.5, 0.2, 1)[:, None] + jnp.array([1.0, 1, 0]) * jnp.maximum(x, 0)[:, None]
        old, new = bc.Categorical(logits[None, :300]), bc.Categorical(logits[None, 300:])
        ratio, found = jnp.exp(x - 0.5), []
        for alpha in ALPHAS:
            weighted = cf.fit_weighted(old, targets[:300], cf.lac(), alpha=alpha, weights=ratio[:300])
            plain = cf.fit_split(old, targets[:300], cf.lac(), alpha=alpha)
            both = weighted(new, weights=ratio[300:]), plain(new)
            found.append(jnp.stack([cf.covered(sets, targets[300:]) for sets in both]))
        return jnp.stack(found)

    check_shift(once, 0.3)


def test_label_shift_covers():
    """The class that the model knows least of comes 2.4 times as often, w = (0.2, 0.4, 2.4)."""
    ratio = jnp.array([0.2, 0.4, 2.4])

    def once(key):
        label, later, noise = jax.random.split(key, 3)
        old = jax.random.randint(label, (300,), 0, 3)
        targets = jnp.concatenate([old, jax.random.categorical(later, jnp.log(ratio), shape=(30,))])
        strength = jnp.array([4.0, 3, 1])[targets]
        logits = strength[:, None] * jax.nn.one_hot(targets, 3) + jax.random.normal(noise, (330, 3))
        old, new, found = bc.Categorical(logits[None, :300]), bc.Categorical(logits[None, 300:]), []
        for alpha in ALPHAS:
            shifted = cf.fit_label_shift(old, targets[:300], cf.lac(), alpha=alpha, prior_ratio=ratio)
            plain = cf.fit_split(old, targets[:300], cf.lac(), alpha=alpha)
            found.append(jnp.stack([cf.covered(fit(new), targets[300:]) for fit in (shifted, plain)]))
        return jnp.stack(found)

    check_shift(once, 0.3)
