import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import blobs, pure_model

import bayescal as bc
from bayescal.methods.experiments import runner_keys
from bayescal.train.fit import _purposes
from bayescal.train.member import Plan, Runner, shuffle
from bayescal.train.progress import describe

pytestmark = pytest.mark.core


def method(learning_rate=0.05):
    return bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(learning_rate))


def shuffled(keys, epoch, rows, batch_size):
    """Leading member axis: index and padding of every batch of an epoch."""
    plan = Plan(rows, batch_size, bc.nll(), None, 0, 1)
    one = lambda key: shuffle(plan, method(), Runner(key, key, jnp.int32(0), jnp.int32(0), ()), jnp.int32(epoch))[0]
    steps = jax.vmap(one)(keys)
    assert (steps.number == jnp.arange(plan.steps)).all()
    return np.asarray(steps.index), np.asarray(steps.padding)


def test_every_row_once_an_epoch_and_padding_last():
    keys = jax.random.split(jax.random.key(0), 3)
    index, padding = shuffled(keys, 0, 10, 4)
    assert index.shape == (3, 3, 4)
    for m in range(3):
        flat, counted = index[m].ravel(), padding[m].ravel()
        assert sorted(flat[counted > 0]) == list(range(10))
        assert list(counted) == [1] * 10 + [0] * 2
    assert (index[0] != index[1]).any(), "members shuffle apart"
    later, _ = shuffled(keys, 1, 10, 4)
    assert (later != index).any(), "epochs shuffle afresh"


def test_an_epoch_is_its_updates_by_hand(key):
    """One epoch of `fit` against a plain loop over the same batches."""
    data = blobs()
    fitted = bc.fit(method(), data, key, epochs=1, batch_size=8, progress=False)
    init_keys, train_keys, _ = _purposes(runner_keys(method(), key))
    index, padding = shuffled(train_keys, 0, 30, 8)
    variables, losses = method().init(init_keys[0], None).variables.params, []
    w, b = (np.asarray(variables[k], float) for k in ("w", "b"))
    for rows, mask in zip(index[0], padding[0]):
        x, y = data.inputs[rows].astype(float), data.targets[rows]
        logits = x @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append((-(np.log(p[np.arange(8), y]) * mask).sum() / mask.sum(), mask.sum()))
        error = (p - np.eye(3)[y]) * mask[:, None] / mask.sum()
        w, b = w - 0.05 * x.T @ error, b - 0.05 * error.sum(0)
    np.testing.assert_allclose(fitted.state.variables.params["w"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fitted.state.variables.params["b"], b, rtol=1e-4, atol=1e-6)
    mean = sum(a * n for a, n in losses) / 30
    np.testing.assert_allclose(fitted.history["loss"], [[mean]], rtol=1e-5)
    np.testing.assert_allclose(fitted.members.last_finite_loss, losses[-1][0], rtol=1e-5)
    assert fitted.members.stopped_step == 4


def test_row_weights_are_repetition(key):
    data = blobs()
    weights = np.tile([2.0, 0.0, 1.0], 10).astype(np.float32)
    weighted = bc.fit(method(), data._replace(weights=weights), key, epochs=5, batch_size=30, progress=False)
    rows = np.repeat(np.arange(30), weights.astype(int))
    repeated = bc.fit(
        method(), bc.Dataset(data.inputs[rows], data.targets[rows]), key, epochs=5, batch_size=30, progress=False
    )
    np.testing.assert_allclose(
        weighted.state.variables.params["w"], repeated.state.variables.params["w"], rtol=1e-4, atol=1e-6
    )


def test_row_weights_count_in_small_batches(key):
    """One pass of tiny steps, a row each, moves the parameters along the weighted mean gradient."""
    data = blobs()
    weights = np.array([100.0, 1.0, 0.0] * 10, np.float32)
    start = method().init(key, None)

    def weighted_loss(params):
        pred = bc.Categorical((data.inputs @ params["w"] + params["b"])[None])
        return -jnp.mean(weights / weights.mean() * pred.log_prob(data.targets))

    gradient = jax.grad(weighted_loss)(start.variables.params)
    weighted = data._replace(weights=weights)
    fitted = bc.fit(method(1e-4), weighted, key, epochs=1, batch_size=1, start=start, progress=False)
    moved = (start.variables.params["w"] - fitted.state.variables.params["w"]) / (1e-4 * 30)
    np.testing.assert_allclose(moved, gradient["w"], rtol=0.03, atol=0.01)
    np.testing.assert_allclose(fitted.history["loss"][0, 0], weighted_loss(start.variables.params), rtol=0.01)


def test_batches_of_weight_zero_move_nothing(key):
    weights = np.array([1.0] * 5 + [0.0] * 25, np.float32)
    fitted = bc.fit(method(), blobs()._replace(weights=weights), key, epochs=2, batch_size=2, progress=False)
    assert np.isfinite(fitted.history["loss"]).all()


def test_a_member_spoilt_by_its_last_update_does_not_count(key):
    build = lambda s: bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(s))
    both = bc.ensemble(build, settings=jnp.array([0.05, jnp.inf]))
    fitted = bc.fit(both, blobs(), key, epochs=1, batch_size=30, progress=False)
    assert np.isfinite(fitted.history["loss"]).all() and list(fitted.members.alive) == [True, False]
    assert np.isfinite(bc.predict(both, fitted.state, blobs().inputs, key).pooled_mean()).all()


def test_a_good_best_state_survives_divergence(key):
    schedule = lambda step: jnp.where(step < 9, 0.1, jnp.inf)
    wild = bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(schedule))
    data = blobs()
    fitted = bc.fit(wild, data, key, epochs=5, batch_size=10, validation=data, progress=False)
    assert not fitted.members.alive[0] and fitted.members.stopped_epoch[0] == 3
    assert np.isfinite(bc.predict(wild, fitted.best, data.inputs, key).log_probs()).all()


def test_purposes_do_not_share_random_numbers(key):
    """One key for everything: no stream of fit is one that prediction or a batch could draw."""
    streams = [
        *_purposes(key[None]),
        jax.random.split(key, 50),
        jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(50)),
    ]
    data = [tuple(np.asarray(jax.random.key_data(k))) for part in streams[:3] for k in part]
    small = {tuple(x) for part in streams[3:] for x in np.asarray(jax.random.key_data(part))}
    assert len(set(data)) == 3 and not set(data) & small


def test_inputs_may_be_a_pytree(key):
    base = pure_model()
    split = lambda x: {"left": x[:, :2], "right": x[:, 2:]}
    join = lambda x: jnp.concatenate([x["left"], x["right"]], -1)
    model = bc.Model(base.init, lambda v, x, k: base.apply(v, join(x), k), lambda v, x, k: base.train(v, join(x), k))
    data = blobs()
    tree = bc.Dataset(split(data.inputs), data.targets)
    one = bc.fit(
        bc.map_estimate(model, bc.Categorical, optax.sgd(0.1)), tree, key, epochs=2, batch_size=8, progress=False
    )
    two = bc.fit(method(0.1), data, key, epochs=2, batch_size=8, progress=False)
    np.testing.assert_allclose(one.state.variables.params["w"], two.state.variables.params["w"], rtol=1e-5, atol=1e-7)
    treed = bc.map_estimate(model, bc.Categorical, optax.sgd(0.1))
    pred = bc.predict(treed, one.state, tree.inputs, key, chunk_size=7)
    assert pred.batch_shape == (30,)
    ragged = bc.Dataset({"left": data.inputs, "right": data.inputs[:3]}, data.targets)
    with pytest.raises(ValueError, match=r"`data.inputs` must have the same rows in every leaf, got \[3, 30\]"):
        bc.fit(treed, ragged, key, epochs=1, batch_size=8)


def test_a_fit_is_not_a_state(unchecked, key):
    fitted = bc.fit(method(), blobs(), key, epochs=1, batch_size=10, progress=False)
    with pytest.raises(TypeError, match="`state` must be a state, got a Fit"):
        bc.predict(method(), fitted, blobs().inputs, key)
    with pytest.raises(TypeError, match="`start` must be a state, got a Fit"):
        bc.fit(method(), blobs(), key, epochs=1, batch_size=10, start=fitted)
    with pytest.raises(TypeError, match="`start` must be Variables or a state that has `variables`, got dict"):
        bc.fit(method(), blobs(), key, epochs=1, batch_size=10, start={"w": 1.0})


def test_one_start_for_all_members(key):
    start = bc.Variables({"w": jnp.ones((4, 3)), "b": jnp.zeros(3)})
    fitted = bc.fit(bc.ensemble(method(0.0), 2), blobs(), key, epochs=1, batch_size=10, start=start, progress=False)
    np.testing.assert_array_equal(fitted.state.members.variables.params["w"], np.ones((2, 4, 3)))


def test_history_and_report(key):
    fitted = bc.fit(bc.ensemble(method(), 3), blobs(), key, epochs=4, batch_size=10, progress=False)
    assert fitted.history["loss"].shape == (4, 3)
    assert (fitted.history["loss"][-1] < fitted.history["loss"][0]).all()
    assert fitted.members.alive.all() and (fitted.members.stopped_epoch == 4).all()
    assert (fitted.members.reason == "trained").all() and (fitted.members.stopped_step == 12).all()
    assert fitted.members.sentences() == [] and fitted.history["alive"].all()
    assert fitted.seconds["epochs"] == 4 and fitted.seconds["first_epoch"] > 0


def test_best_state_by_validation(key):
    """A huge step at the end spoils the last state and not the best one."""
    schedule = optax.piecewise_constant_schedule(0.1, {27: 1e4})  # 3 updates an epoch, 10 epochs
    wild = bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(schedule))
    data = blobs()
    fitted = bc.fit(bc.ensemble(wild, 2), data, key, epochs=10, batch_size=10, validation=data, progress=False)
    scores = fitted.history["validation_score"]
    assert (scores.argmin(0) < 9).all() and (scores[-1] > 2 * scores.min(0)).all()
    for m in range(2):
        one = jax.tree.map(lambda x, m=m: x[m], fitted.best.members)
        pred = bc.predict(wild, one, data.inputs, key)
        np.testing.assert_allclose(-pred.log_prob(data.targets).mean(), scores[:, m].min(), rtol=1e-5)


def test_a_diverged_member_is_reported_and_does_not_count(key):
    build = lambda s: bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(s))
    data = blobs()
    both = bc.ensemble(build, settings=jnp.array([0.05, jnp.inf]))
    fitted = bc.fit(both, data, key, epochs=3, batch_size=10, progress=False)
    assert list(fitted.members.alive) == [True, False]
    assert fitted.members.stopped_epoch[1] == 0 and fitted.members.stopped_step[1] == 1
    assert fitted.members.reason[1] == "loss not finite" and np.isfinite(fitted.members.last_finite_loss[1])
    assert not fitted.history["alive"][:, 1].any() and not np.isfinite(fitted.history["loss"][:, 1]).any()
    (sentence,) = fitted.members.sentences()
    assert "member 1 diverged and weighs nothing in `state`: loss not finite in epoch 0, after 1 updates" in sentence
    pred = bc.predict(both, fitted.state, data.inputs, key)
    healthy = bc.fit(
        bc.ensemble(build, settings=jnp.array([0.05, 0.05])), data, key, epochs=3, batch_size=10, progress=False
    )
    alone = jax.tree.map(lambda x: x[:1], bc.predict(both, healthy.state, data.inputs, key))
    np.testing.assert_allclose(pred.pooled_mean(), alone.pooled_mean(), rtol=1e-5)
    assert not bc.decompose(pred).epistemic.any()


def test_all_members_diverged(key):
    with pytest.raises(
        ValueError, match=r"`loss` must stay finite for at least one member, got none of 1.*epochs \[0\]"
    ):
        bc.fit(method(jnp.inf), blobs(), key, epochs=2, batch_size=10, progress=False)


@pytest.mark.parametrize("chunk_size", [1, 7, 10, 30, 100])
def test_chunks_do_not_matter(key, chunk_size):
    net = bc.models.mlp(4, (8,), 3, dropout=0.5)
    dropout = bc.ensemble(bc.mc_dropout(net, bc.Categorical, optax.sgd(0.1), num_draws=2), 2)
    state = dropout.init(key, None)
    whole = bc.predict(dropout, state, blobs().inputs, key)
    parts = bc.predict(dropout, state, blobs().inputs, key, chunk_size=chunk_size)
    assert whole.logits.shape == (4, 30, 3)
    np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-5, atol=1e-6)


def bad(**changes):
    data = blobs()._replace(**changes)
    return lambda key: bc.fit(method(), data, key, epochs=1, batch_size=10, progress=False)


def with_value(value):
    inputs = blobs().inputs.copy()
    inputs[4, 2] = value
    return inputs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            bad(inputs=with_value(np.nan)),
            "`data.inputs` must be finite, got NaN or infinity in 1 of 30 rows, first in row 4",
        ),
        (bad(inputs=with_value(np.inf)), "`data.inputs` must be finite"),
        (bad(inputs=np.zeros((0, 4), np.float32)), "`data.inputs` must have at least one row"),
        (bad(targets=np.zeros(29, np.int32)), "`data.targets` must have the 30 rows of `data.inputs`"),
        (bad(targets=np.full(30, 3, np.int32)), r"`targets` must lie in \[0, 3\), got values from 3 to 3"),
        (bad(targets=np.zeros(30, np.float32)), "`targets` must be integer class labels, got float32"),
        (bad(targets=np.zeros((30, 2), np.int32)), "`targets` must be integer class labels of shape"),
        (bad(weights=-np.ones(30)), "`data.weights` must be one non-negative number a row"),
        (
            lambda key: bc.fit(method(), blobs(), key, epochs=0, batch_size=10),
            "`epochs` must be a whole number of at least 1, got 0",
        ),
        (
            lambda key: bc.fit(method(), blobs(), key, epochs=1, batch_size=31),
            "`batch_size` must be a whole number from 1 to the 30 rows of the data, got 31",
        ),
        (
            lambda key: bc.fit(method(), blobs(), key, epochs=1, batch_size=10, execution="pmap"),
            "`execution` must be 'map', 'vmap', a positive number or None, got 'pmap'",
        ),
        (
            lambda key: bc.fit(
                method(), blobs(), key, epochs=1, batch_size=10, validation=blobs()._replace(targets=np.full(30, 9))
            ),
            r"`validation.targets` must lie in \[0, 3\)",
        ),
        (
            lambda key: bc.predict(method(), method().init(key, None), with_value(np.nan), key),
            "`inputs` must be finite, got NaN or infinity in 1 of 30 rows",
        ),
        (
            lambda key: bc.predict(method(), method().init(key, None), np.zeros((0, 4), np.float32), key),
            "`inputs` must have at least one row",
        ),
        (
            lambda key: bc.predict(method(), method().init(key, None), blobs().inputs, key, chunk_size=0),
            "`chunk_size` must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_bad_input(unchecked, key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)


def test_no_dataset(unchecked, key):
    with pytest.raises(TypeError, match=r"`data` must be a Dataset\(inputs, targets\), got tuple"):
        bc.fit(method(), (blobs().inputs, blobs().targets), key, epochs=1, batch_size=10)


def test_progress_names_every_loss_or_their_range():
    yes = np.ones(2, bool)
    assert describe(np.array([0.5, 0.25]), yes, yes) == "loss 0.500 0.250"
    assert describe(np.array([0.5, 0.25]), np.array([True, False]), ~yes) == (
        "loss 0.500 0.250 (1 stopped early, 1 diverged of 2)"
    )
    alive = np.arange(10) < 9
    assert describe(np.r_[np.linspace(1, 2, 9), np.nan], alive, alive) == "loss 1.000 to 2.000 (1 diverged of 10)"
    assert describe(np.full(9, np.nan), alive[1:], alive[1:]) == "loss nowhere finite (1 diverged of 9)"


@pytest.mark.slow
def test_one_logit_from_data_to_parts(key):
    data = blobs(classes=2)
    binary = bc.ensemble(bc.map_estimate(bc.models.mlp(4, (8,), 1), bc.one_logit, optax.adam(0.02)), 2)
    fitted = bc.fit(binary, data, key, epochs=40, batch_size=10, progress=False)
    pred = bc.predict(binary, fitted.state, data.inputs, key)
    assert isinstance(pred, bc.Bernoulli) and pred.logits.shape == (2, 30)
    metrics = {"accuracy": bc.accuracy(), "nll": bc.nll(), "brier": bc.brier(), "ece": bc.calibration_error()}
    figures = bc.evaluate(pred, data.targets, metrics)
    assert figures["accuracy"].value > 0.9 and figures["nll"].value < 0.4
    parts = bc.decompose(pred)
    np.testing.assert_allclose(parts.total, pred.entropy(), rtol=1e-4)
