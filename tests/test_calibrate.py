import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import greedy_selection, normal_log_density, softmax

import bayescal as bc
from bayescal.calibrate import MemberSelection, fit_member_selection

pytestmark = pytest.mark.core


MEMBERS, ROWS = 7, 40


def categorical(rng):
    targets = rng.integers(3, size=ROWS).astype(np.int32)
    logits = (rng.normal(size=(MEMBERS, ROWS, 3)) + np.eye(3)[targets]).astype(np.float32)
    return bc.Categorical(logits), targets, [[softmax(z)[y] for z, y in zip(own, targets)] for own in logits]


def bernoulli(rng):
    targets = rng.integers(2, size=ROWS).astype(np.int32)
    logits = (rng.normal(size=(MEMBERS, ROWS)) + targets - 0.5).astype(np.float32)
    return bc.Bernoulli(logits), targets, [[softmax([0, z])[y] for z, y in zip(own, targets)] for own in logits]


def gaussian(rng):
    targets = rng.normal(size=(ROWS, 2)).astype(np.float32)
    mean = (targets + 2 * rng.normal(size=(MEMBERS, ROWS, 2))).astype(np.float32)
    variance = rng.uniform(0.5, 4, size=mean.shape).astype(np.float32)
    density = lambda *row: math.exp(sum(normal_log_density(*map(float, one)) for one in zip(*row)))
    densities = [[density(*row) for row in zip(targets, *own)] for own in zip(mean, variance)]
    return bc.Gaussian(mean, variance), targets, densities


log_prob = jax.jit(lambda pred, targets: pred.log_prob(targets))


@pytest.mark.parametrize("family", [categorical, bernoulli, gaussian])
def test_selection_equals_the_oracle(family):
    """Every seed with other row weights (some 0, where anything may stand), a diverged member and a duplicate."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        pred, targets, densities = family(rng)
        duplicate, dead = rng.permutation(MEMBERS)[:2]
        densities, alive = np.array(densities), np.ones(MEMBERS, np.float32)
        if seed:
            best = int(densities.prod(1).argmax())
            pred = jax.tree.map(lambda x, to=duplicate, best=best: _put(x, to, x[best]), pred)
            densities[duplicate] = densities[best]
            if dead != best:
                pred = jax.tree.map(lambda x, dead=dead: _put(x, dead, np.nan), pred)
                alive[dead] = 0
        weights = rng.integers(3, size=ROWS).astype(np.float32)
        pred = type(pred)(**{**vars(pred), "member_weights": alive})
        selection = fit_member_selection(pred, targets, num_members=6, weights=weights)
        order, curve = greedy_selection(densities, 6, weights, alive)
        np.testing.assert_array_equal(selection.order, order)
        np.testing.assert_allclose(selection.nll, curve, rtol=1e-5)
        np.testing.assert_allclose(selection.member_weights, np.bincount(order, minlength=MEMBERS) / 6, rtol=1e-6)
        pooled = np.average(-log_prob(selection(pred), targets), weights=weights)
        np.testing.assert_allclose(pooled, selection.nll[-1], rtol=1e-5)


def _put(x, member, value):
    x = np.array(x)
    x[member] = value
    return x


def test_selection_by_hand():
    """The member that is fair on both rows, then the two experts; the first of them wins the tie."""
    probabilities = jnp.array([[0.9, 0.2], [0.2, 0.9], [0.45, 0.45]])  # of the targets
    pred = bc.Categorical(jnp.log(jnp.stack([probabilities, 1 - probabilities], -1)))
    selection = fit_member_selection(pred, np.array([0, 0]), num_members=3)
    assert selection.order.tolist() == [2, 0, 1]
    by_hand = [-math.log(0.45), -math.log(0.675 * 0.325) / 2, -math.log(1.55 / 3)]
    np.testing.assert_allclose(selection.nll, by_hand, rtol=1e-6)


def test_selection_stays_in_log_space():
    """Probabilities near exp(-300) underflow in float32, and would all look alike."""
    pred = bc.Categorical(jnp.tile(jnp.array([[[-310.0, 0]], [[-300.0, 0]], [[-320.0, 0]]]), (1, 2, 1)))
    selection = fit_member_selection(pred, np.array([0, 0]), num_members=3)
    assert selection.order.tolist() == [1, 1, 1]
    np.testing.assert_allclose(selection.nll, [300, 300, 300])
    assert jax.jit(selection)(pred).member_weights.tolist() == [0, 1, 0]


def test_bad_selections(unchecked):
    pred, targets, _ = categorical(np.random.default_rng(0))
    weighted = lambda weights: bc.Categorical(pred.logits, jnp.asarray(weights, jnp.float32))
    fit = lambda pred, number=2: fit_member_selection(pred, targets, num_members=number)
    with pytest.raises(ValueError, match=r"`num_members` must be a whole number of at least 1, got 0\. 5 is usual"):
        fit(pred, 0)
    with pytest.raises(TypeError, match=r"`pred` must be a predictive, got ArrayImpl\. Pass what `predict` returns"):
        fit(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`pred` must have members to choose from, got 1\. Pass the predictive of"):
        fit(bc.pool(pred))
    with pytest.raises(
        ValueError, match=r"`member_weights` must not differ between examples, got shape \(7, 40\)\. Mem"
    ):
        fit(weighted(np.ones((MEMBERS, ROWS))))
    with pytest.raises(
        ValueError, match=r"`member_weights` must be equal or 0, got values from 1\.0 to 2\.0: the choice"
    ):
        fit(weighted([1, 2, 0, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="`pred` must not hold NaN"):
        fit(bc.Categorical(_put(pred.logits, 0, np.nan)))
    impossible = np.where(np.arange(3) == targets[:, None], -np.inf, pred.logits).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"`targets` must have positive probability, got some of probability zero under"
    ):
        fit(bc.Categorical(impossible))

    weights = jnp.array([0, 0.5, 0.5, 0, 0, 0, 0])
    selection = MemberSelection(weights, jnp.array([1, 2]), jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"`pred` must have the 7 members that the selection was fitted on, got 1\. Pass"
    ):
        selection(bc.pool(pred))
    lost = weighted([0, 1, 0, 1, 1, 1, 1])
    with pytest.raises(
        ValueError, match=r"`pred` must have the members that were chosen, got members \[2\] of them with"
    ):
        selection(lost)
    np.testing.assert_array_equal(np.isnan(jax.jit(selection)(lost).member_weights), np.arange(MEMBERS) == 2)
    with pytest.raises(ValueError, match="`member_weights` must be equal or 0"):
        selection(selection(weighted([0, 1, 1, 1, 1, 1, 0]))) if 0 else fit(weighted([3, 2, 1, 1, 1, 1, 1]))
