"""Priors of variational inference: what they refuse. Their KL is in test_variational.py."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from methods import pure_model
from test_variational import classes

import bayescal as bc

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
