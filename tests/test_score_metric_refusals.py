"""What metrics of scores and of members refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

import bayescal as bc
from bayescal.metrics.joint import dyadic_nll, joint_log_prob, joint_nll
from bayescal.metrics.likelihood import brier, nll
from bayescal.metrics.members import disagreement, diversity, member_metric

pytestmark = pytest.mark.core

NORMALS = bc.Gaussian(np.zeros((1, 2, 1), np.float32), np.ones((1, 2, 1), np.float32))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nll(clip=0.0), ValueError, r"`clip` must lie in \(0, 1\), got 0.0"),
        (lambda: nll(clip=-1e-3), ValueError, r"`clip` must lie in \(0, 1\), got -0.001"),
        (
            lambda: nll(clip=0.1).measure(NORMALS, np.zeros((2, 1), np.float32), jnp.ones(2)),
            TypeError,
            "`clip` is a smallest probability, got densities",
        ),
        (lambda: brier(scale="mean"), ValueError, "`scale` must be 'sum' or 'half', got 'mean'"),
        (lambda: member_metric(nll(), summary="max"), ValueError, "`summary` must be one of 'mean', .* got 'max'"),
        (lambda: disagreement(against="all"), ValueError, "`against` must be 'pairs' or 'pool', got 'all'"),
        (
            lambda: diversity().measure(NORMALS, np.zeros((2, 1)), jnp.ones(2)),
            TypeError,
            "`pred` must be of classes, got Gaussian",
        ),
        (lambda: joint_nll(tau=0), ValueError, "`tau` must be a whole number of at least 1, got 0"),
        (lambda: dyadic_nll(tau=2.5), ValueError, "`tau` must be a whole number of at least 1, got 2.5"),
        (lambda: joint_nll(per="bit"), ValueError, "`per` must be 'row' or 'block', got 'bit'"),
        (
            lambda: joint_log_prob(bc.Categorical(np.zeros((2, 3, 2)), np.ones((2, 3))), np.zeros(3, int)),
            ValueError,
            "`member_weights` must be the same for all rows of a block",
        ),
    ],
)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()
