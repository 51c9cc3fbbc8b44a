"""Experiments: splits, folds and grid points as one program, never pooled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import blobs, curve, pure_model

import bayescal as bc

pytestmark = pytest.mark.core


def states(fitted):
    return [np.asarray(x) for x in jax.tree.leaves(fitted.state.members)]


def sgd(rate):
    return bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(rate))


def test_splits_by_members_by_weight_decays_are_one_program(key):
    """20 splits x 5 members x 3 weight decays of a small regression, compiled once, each what a lone fit gives."""
    traces = []
    net = bc.models.mlp(4, (5,), 4)
    base = net.train
    net = net._replace(train=lambda *args: (traces.append(1), base(*args))[1])

    def build(decay):
        optimizer = optax.adamw(0.01, weight_decay=decay)
        return bc.ensemble(bc.map_estimate(net, bc.heteroscedastic, optimizer), 5)

    data, rng = curve(), np.random.default_rng(0)
    splits = [rng.permutation(30)[:24] for _ in range(20)]
    train = [bc.Dataset(data.inputs[rows], data.targets[rows]) for rows in splits]
    grid = [(split, decay) for split in range(20) for decay in (0.0, 0.01, 0.1)]
    study = bc.experiments(build, settings=jnp.array([decay for _, decay in grid]))
    settings = dict(epochs=3, batch_size=8, progress=False)
    fitted = bc.fit(study, [train[split] for split, _ in grid], key, **settings)
    number = len(traces)
    assert number <= 3, "the network's training pass must be traced for shapes and for one program"
    bc.fit(study, [train[split] for split, _ in grid], jax.random.key(1), **settings)
    assert len(traces) == number
    assert fitted.history["loss"].shape == (3, 60, 5) and fitted.members.alive.shape == (60, 5)
    pred = bc.predict(study, fitted.state, data.inputs, key, chunk_size=16)
    assert pred.batch_shape == (60, 30) and pred.num_members == 5

    e = 3 * 7 + 1  # the eighth split, the second weight decay
    alone, lone_key = build(0.01), jax.random.fold_in(key, e)
    lone = bc.fit(alone, train[7], lone_key, mesh=bc.make_mesh(2), **settings)
    assert (lone.members.stopped_step == fitted.members.stopped_step[e]).all()
    for a, b in zip(jax.tree.leaves(fitted.state.members), states(lone), strict=True):
        np.testing.assert_allclose(a[e], b, rtol=1e-5, atol=1e-6)
    own = bc.predict(alone, lone.state, data.inputs, lone_key)
    np.testing.assert_allclose(bc.take(pred, e).mean, own.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bc.take(pred, e).log_prob(data.targets), own.log_prob(data.targets), rtol=1e-3)
    each = bc.predict(study, fitted.state, [data.inputs[splits[s]] for s, _ in grid], key)
    np.testing.assert_allclose(each.mean[:, e], pred.mean[:, e][:, splits[7]], rtol=1e-5, atol=1e-6)


def test_experiments_of_a_lone_method_with_folds_of_unequal_size(key):
    data = blobs()
    folds = [bc.Dataset(data.inputs[:20], data.targets[:20]), bc.Dataset(data.inputs[:15], data.targets[:15])]
    study = bc.experiments(sgd(0.05), 2)
    fitted = bc.fit(study, folds, key, epochs=3, batch_size=20, validation=folds, progress=False)
    assert fitted.history["validation_score"].shape == (3, 2)
    lone = bc.fit(sgd(0.05), folds[1], jax.random.fold_in(key, 1), epochs=3, batch_size=15, progress=False)
    np.testing.assert_allclose(fitted.state.variables.params["w"][1], lone.state.variables.params["w"], rtol=1e-4)
    again = bc.fit(study, folds, key, epochs=1, batch_size=20, start=fitted.state, progress=False)
    assert (again.history["loss"] < fitted.history["loss"][0]).all()
    assert bc.predict(study, again.state, data.inputs, None).batch_shape == (2, 30)


def test_experiments_refuse(key, unchecked):
    study = bc.experiments(sgd(0.05), 2)
    with pytest.raises(ValueError, match="`data` must be a Dataset, or for a method of `experiments` a list"):
        bc.fit(study, [blobs()] * 3, key, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="`data` must be a Dataset, or for a method of `experiments` a list"):
        bc.fit(sgd(0.05), [blobs()], key, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="`inputs` must be a list of 2 arrays, one for each experiment, got 3"):
        bc.predict(study, study.init(key, None), [blobs().inputs] * 3, key)
    with pytest.raises(ValueError, match="`number` or `settings` must be given"):
        bc.experiments(sgd(0.05))
    for again in (lambda: bc.experiments(study, 2), lambda: bc.ensemble(study, 2)):
        with pytest.raises(ValueError, match="`method` must be one without experiments"):
            again()
    nested = bc.experiments(lambda s: bc.experiments(sgd(s), 2), settings=jnp.ones(2))
    with pytest.raises(ValueError, match="`method` must be one without experiments"):
        bc.fit(nested, blobs(), key, epochs=1, batch_size=10, progress=False)


def test_experiments_of_an_ensemble_with_settings(key):
    """A hyper-deep ensemble over two splits, built before the experiments: settings as numpy or jax arrays."""
    data = [blobs(), blobs()._replace(targets=np.roll(blobs().targets, 1))]
    settings = dict(epochs=2, batch_size=10, progress=False)
    for array in (np.asarray, jnp.asarray):
        inner = bc.ensemble(sgd, settings=array([0.02, 0.1], dtype=np.float32))
        fitted = bc.fit(bc.experiments(inner, 2), data, key, **settings)
        lone = bc.fit(inner, data[1], jax.random.fold_in(key, 1), **settings)
        for a, b in zip(states(fitted), states(lone), strict=True):
            np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-6)


def test_one_experiment_at_a_time_is_evaluated(key, unchecked):
    study = bc.experiments(sgd(0.1), 2)
    fitted = bc.fit(study, blobs(), key, epochs=1, batch_size=10, progress=False)
    pred = bc.predict(study, fitted.state, blobs().inputs, key)
    with pytest.raises(ValueError, match=r"Of experiments take one at a time: `bc\.take\(pred, e\)`"):
        bc.evaluate(pred, blobs().targets, {"nll": bc.nll()})
    assert bc.evaluate(bc.take(pred, 1), blobs().targets, {"nll": bc.nll()})["nll"].n == 30
