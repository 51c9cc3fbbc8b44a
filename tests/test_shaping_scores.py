"""Scores of the head: shaped activations and gradients, against loops, by hand, and heads of every kind."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_scores_ood as oracles
import pytest
from jax.tree_util import Partial
from rows_scores import (
    ALL,
    CLASSES,
    HEAD,
    SHAPES,
    TEST,
    TRAIN,
    VARIABLES,
    WIDTH,
    fitted,
    linear,
    wide,
)

from bayescal.scores.gradient import grad_norm
from bayescal.scores.shaping import ash_b, ash_p, fit_react, scale
from bayescal.scores.subspace import head_origin

pytestmark = pytest.mark.core


def test_react_against_a_loop(strict):
    for quantile in (0.5, 0.9):
        clipped = np.minimum(*wide(TEST, np.percentile(TRAIN.astype(np.float64), 100 * quantile)))
        expected = oracles.energy(clipped @ wide(VARIABLES[0])[0] + VARIABLES[1])
        np.testing.assert_allclose(fit_react(TRAIN, HEAD, quantile=quantile)(TEST), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.8])
def test_shaped_energies_against_loops(strict, kind, quantile):
    rows = np.where(np.median(TEST) > TEST, 0, TEST)  # ties at zero, as rectified features have
    expected = oracles.energy(oracles.shaped(rows, quantile, kind) @ wide(VARIABLES[0])[0] + VARIABLES[1])
    np.testing.assert_allclose(SHAPES[kind](HEAD, quantile=quantile)(rows), expected, rtol=2e-5, atol=1e-4)


def test_shaping_by_hand():
    row = np.array([[1.0, 3.0, 0.0, 2.0]], np.float32)  # half kept: 3 and 2, of a sum of 6
    head = lambda f: jnp.stack([f.sum(-1), jnp.full(len(f), -1e4)], 1)  # energy = -sum
    expected = {"p": -5, "b": -6, "s": -5 * math.exp(6 / 5), "scale": -6 * math.exp(6 / 5)}
    for kind, value in expected.items():
        np.testing.assert_allclose(SHAPES[kind](head, quantile=0.5)(row), [value], rtol=1e-6, err_msg=kind)


def test_shaping_invariances(rng):
    order = rng.permutation(WIDTH)
    turned = Partial(linear, [VARIABLES[0][order], VARIABLES[1]])
    for kind, build in SHAPES.items():
        ours = build(HEAD, quantile=0.5)(TEST)
        np.testing.assert_allclose(build(turned, quantile=0.5)(TEST[:, order]), ours, rtol=1e-5, err_msg=kind)
        # shapes are homogeneous: activations three times as large are those of a head three times as steep
        steep = Partial(linear, [3 * VARIABLES[0], VARIABLES[1]])
        np.testing.assert_allclose(
            build(HEAD, quantile=0.5)(3 * TEST), build(steep, quantile=0.5)(TEST), rtol=1e-5, err_msg=kind
        )
    plain = oracles.energy(TEST @ VARIABLES[0] + VARIABLES[1])
    np.testing.assert_allclose(ash_p(HEAD, quantile=0.0)(TEST), plain, rtol=1e-5)
    np.testing.assert_allclose(fit_react(np.maximum(TRAIN, TEST.max()), HEAD, quantile=1.0)(TEST), plain, rtol=1e-5)


def test_shift_of_all_logits():
    shifted = Partial(linear, [VARIABLES[0], VARIABLES[1] + 7])
    for name in ("react", *(f"ash {kind}" for kind in SHAPES)):
        moved = ALL[name](TRAIN, shifted)(TEST) - fitted(name)(TEST)
        np.testing.assert_allclose(moved, np.full(len(TEST), -7), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(grad_norm(shifted)(TEST), fitted("gradient")(TEST), rtol=1e-4)


def test_gradient_norm_against_loops_and_autodiff(strict):
    np.testing.assert_allclose(
        fitted("gradient")(TEST), oracles.gradient_norm(TEST, *wide(*VARIABLES)), rtol=1e-5, atol=1e-5
    )
    weights, bias = VARIABLES

    def divergence(w, row):
        return -jax.nn.log_softmax(row @ w + bias).mean() - math.log(CLASSES)

    gradient = jax.vmap(jax.grad(divergence), (None, 0))(weights, TEST)
    np.testing.assert_allclose(fitted("gradient")(TEST), -abs(gradient).sum((1, 2)), rtol=1e-4, atol=1e-5)


def test_rows_without_a_meaning_are_nan():
    negative, zeros = TEST.copy(), np.zeros((1, WIDTH), np.float32)
    negative[3, 1] = -1e-3
    for name, of_negative, of_zeros in (
        ("ash p", False, False),
        ("ash b", True, False),
        ("ash s", True, True),
        ("ash scale", True, True),
        ("neighbours", False, True),
    ):
        np.testing.assert_array_equal(np.isnan(fitted(name)(negative)), of_negative & (np.arange(8) == 3), name)
        assert np.isnan(fitted(name)(zeros)[0]) == of_zeros, name
    overflow = lambda f: jnp.stack([f.sum(-1) * jnp.inf, f.sum(-1)], 1)
    assert np.isnan(ash_p(overflow, quantile=0.5)(TEST)).all()
    sure = lambda f: jnp.stack([0 * f[:, 0] + 9, 0 * f[:, 0]], 1)
    assert np.isnan(grad_norm(sure)(np.full((1, WIDTH), 3e38, np.float32))).all()  # a norm that overflows
    even = np.ones((1, 200), np.float32)  # the factor exp(200 / 2) is infinite
    assert np.isnan(scale(lambda f: f[:, :2], quantile=0.99)(even)).all()


def test_heads_of_every_kind():
    """A closure, a pytree of one leaf, and one of none."""
    weights = VARIABLES[0]
    expected = oracles.energy(TEST @ weights)
    for head in (lambda f: f @ weights, Partial(lambda w, f: f @ w, weights), Partial(lambda f: f @ weights)):
        np.testing.assert_allclose(ash_p(head, quantile=0.0)(TEST), expected, rtol=1e-5)
        np.testing.assert_allclose(head_origin(head, TRAIN), np.zeros(WIDTH), atol=1e-6)


def test_heads_that_are_pytrees_are_one_program():
    """The same function with other weights is compiled once; a function made anew is another program."""
    traced = []

    def layer(weights, f):
        traced.append(len(f))
        return f @ weights

    for times in (1, 2, 3):
        ash_p(Partial(layer, times * VARIABLES[0]), quantile=0.5)(TEST)
    assert len(traced) == 1
    for times in (1, 2, 3):
        ash_p(lambda f, times=times: layer(times * VARIABLES[0], f), quantile=0.5)(TEST)
    assert len(traced) == 4


def test_a_head_is_a_function(unchecked):
    for build in (grad_norm, lambda head: ash_b(head, quantile=0.5), lambda head: fit_react(TRAIN, head)):
        with pytest.raises(
            TypeError,
            match=r"`head` must be a function of features \(rows, features\), got ndarray\. .*`Partial\(lambda w, b",
        ):
            build(VARIABLES[0])
