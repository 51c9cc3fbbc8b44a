"""Priors of variational inference: whose scale is whose, and what they refuse. Their KL is in test_variational.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from methods import pure_model
from test_variational import classes

import bayescal as bc
from bayescal.methods.selection import selected

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bc.priors.normal(0.0), r"`scale` must be positive, got 0\.0\. See"),
        (lambda: bc.priors.normal({"w": 1.0, "b": -1.0}), r"`scale` must be positive, got -1\.0\. See"),
        (lambda: bc.priors.normal(float("nan")), r"`scale` must be positive, got nan\. See"),
        (lambda: bc.priors.normal({"w": np.ones(3)}), r"`scale` must be one number, got shape \(3,\)\. Give"),
        (lambda: bc.priors.normal({}), r"`scale` must hold at least one number, got {}\. 1\.0 is usual"),
        (lambda: bc.priors.student_t(0.0, 1.0), r"`df` must be positive, got 0\.0\. See"),
        (lambda: bc.priors.student_t(3.0, -1.0), r"`scale` must be positive, got -1\.0\. See"),
        (
            lambda: bc.priors.scale_mixture((1.0, 0.1), (1.0,)),
            r"`weights` must be as many as `scales`, .* got 1 and 2\. Give",
        ),
        (lambda: bc.priors.scale_mixture((), ()), r"`weights` must be as many as `scales`, .* got 0 and 0\. Give"),
        (
            lambda: bc.priors.scale_mixture((1.0, 0.1), (0.5, 0.4)),
            r"`weights` must sum to 1, got .* sum to 0\.9\. Divide",
        ),
        (lambda: bc.priors.normal(np.inf), r"`scale` must be finite, got inf\. See"),
        (lambda: bc.priors.normal({"w": np.inf, "b": 1.0}), r"`scale` must be finite, got inf\. See"),
        (lambda: bc.priors.student_t(np.inf, 1.0), r"`df` must be finite, got inf\. See"),
        (lambda: bc.priors.student_t(None, 1.0), r"`df` must be one number, got NoneType\. Give"),
        (lambda: bc.priors.scale_mixture((None, 1.0), (0.5, 0.5)), r"`scales` must be one number, got NoneType\. Give"),
        (lambda: bc.priors.scale_mixture((1.0, 0.0), (0.5, 0.5)), r"`scales` must be positive, got 0\.0\. See"),
        (lambda: bc.priors.scale_mixture((1.0, 0.1), (1.5, -0.5)), r"`weights` must be positive, got -0\.5\. See"),
        (
            lambda: classes(model=pure_model(), prior=bc.priors.normal({"w": 1.0})),
            r"`scale` must be one number or have the first keys of the parameters, got .*'w'.* for .*'b'.*\. Give a number",
        ),
        (
            lambda: classes(model=pure_model(), prior=lambda params: dist.Normal(jnp.zeros(15), 1.0)),
            r"`prior` must give a distribution with event shape \(15,\), .* got batch shape \(15,\) and event shape \(\)\. Use",
        ),
    ],
)
def test_errors(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: bc.priors.scale_mixture(1.0, (1.0,)),
            r"`scales` must be a sequence of numbers, got float\. Give each",
        ),
        (
            lambda: bc.priors.scale_mixture((1.0,), 1.0),
            r"`weights` must be a sequence of numbers, got float\. Give each",
        ),
        (lambda: of(1.0), r"`prior` must be a function from parameters to a distribution, got float\. Pass"),
        (lambda: of(dist.Normal(0.0, 1.0)), r"`prior` must be a function from .*, got Normal\. Pass"),
        (lambda: of(bc.priors.normal), r"`prior` must be a function from .*, got `priors\.normal` itself\. Pass"),
        (lambda: of(bc.priors.student_t), r"`prior` must be a function from .*, got `priors\.student_t` itself\. Pass"),
        (lambda: of(lambda params: 1.0), r"`prior` must give one of NumPyro's distributions, got float\. Pass"),
    ],
)
def test_what_is_no_prior(unchecked, build, message):
    with pytest.raises(TypeError, match=message):
        build()


def of(prior):
    return classes(model=pure_model(), prior=prior)


def scales(scale, model, subset):
    """Of every weight that has a posterior, as its prior is given them."""
    params = jax.eval_shape(model.init, jax.random.key(0)).params
    chosen = selected(subset)
    prior = bc.priors.normal(scale)(jax.eval_shape(chosen.take, params, jax.eval_shape(chosen.find, params)))
    return np.broadcast_to(prior.base_dist.scale, prior.event_shape)


def test_scales_are_of_what_the_subset_takes():
    """4 x 8 + 8, 8 x 6 + 6 and 6 x 3 + 3 weights; parts of which nothing is chosen may be left out, or named."""
    net = bc.models.mlp(4, (8, 6), 3)
    by_layer = {"dense": {0: 1.0, 1: 0.5}, "head": 0.3}
    for scale, subset, expected in (
        ({"dense": 1.0, "head": 0.3}, None, ([1.0, 0.3], [94, 21])),
        (by_layer, None, ([1.0, 0.5, 0.3], [40, 54, 21])),
        (by_layer, bc.without_biases(), ([1.0, 0.5, 0.3], [32, 48, 18])),
        (by_layer, bc.subtrees(("head",)), ([0.3], [21])),
        ({"head": 0.3}, bc.subtrees(("head",)), ([0.3], [21])),
        ({"dense": {1: 0.5}, "head": 0.3}, bc.subtrees(("dense", 1), ("head",)), ([0.5, 0.3], [54, 21])),
        ({"kernel": 0.2, "bias": 0.7}, ("head",), ([0.7, 0.2], [3, 18])),
        ({"weights": 0.2}, bc.subnetwork(5), ([0.2], [5])),
    ):
        np.testing.assert_allclose(scales(scale, net, subset), np.repeat(*expected))
        assert bc.variational(
            net, bc.Categorical, optax.adam(0.1), num_data=30, num_draws=1, subset=subset, prior=bc.priors.normal(scale)
        ).draw
