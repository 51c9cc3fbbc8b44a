"""The study of the estimators' noise: its variance is numpy's, and its smoke runs."""

from functools import partial

import estimators as study
import jax
import numpy as np
from conftest import REPOSITORY
from methods import blobs

import bayescal as bc
from bayescal.config import load_config


def test_smoke(tmp_path):
    config = load_config(study.Config, REPOSITORY / "configs" / "estimators" / "smoke.yaml")
    (case,) = study.main(config, tmp_path)
    assert case["variance"]["local_reparametrisation"].value == 1 and case["variance"]["flipout"].n == 2
    assert (tmp_path / "metrics.json").exists()


def test_variance_is_that_of_the_gradients(key):
    dense = partial(bc.models.variational_dense, initial_scale=0.3)
    model, data, keys = bc.models.mlp(4, (3,), 3, dense=dense), blobs(), jax.random.split(key, 7)
    variables = model.init(key)

    def objective(params, key):
        outputs, _, kl = model.train(variables._replace(params=params), data.inputs, key)
        return -jax.nn.log_softmax(outputs)[np.arange(30), data.targets].mean() + kl / 30

    rows = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.grad(objective)(variables.params, k))]) for k in keys
    ]
    expected = np.var(np.array(rows, float), axis=0, ddof=1).sum()
    np.testing.assert_allclose(study.variance(model, 30, variables, data, keys), expected, rtol=1e-4)
