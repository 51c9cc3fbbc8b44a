"""How members run: alone, side by side, over devices; frozen, stopped, resampled, repeated, streamed."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import blobs, pictures, pure_model

import bayescal as bc
from bayescal.methods.ensemble import member_keys
from bayescal.methods.experiments import runner_keys, runners
from bayescal.methods.resample import member_rows
from bayescal.train import forms
from bayescal.train.rows import stack

pytestmark = pytest.mark.core
FORMS = {"map": ("map", 1), "vmap": ("vmap", 1), "groups": (2, 1), "mesh": ("map", 2)}


def states(fitted):
    return [np.asarray(x) for x in jax.tree.leaves(fitted.state.members)]


def sgd(rate):
    return bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(rate))


def adam(rate):
    return bc.map_estimate(pure_model(), bc.Categorical, optax.adam(rate))


def run(build, rates, key, form="map", **settings):
    execution, devices = FORMS[form]
    method = bc.ensemble(build, settings=jnp.asarray(rates))
    settings = {"epochs": 4, "batch_size": 10, **settings}
    mesh = bc.make_mesh(devices)
    return bc.fit(method, blobs(), key, execution=execution, mesh=mesh, progress=False, **settings)


@pytest.mark.parametrize("form", ["map", "vmap", "mesh"])
@pytest.mark.parametrize(("build", "reason"), [(sgd, None), (adam, "loss above 1000 x its first")])
def test_a_member_that_diverges_is_frozen_and_the_others_do_not_notice(key, form, build, reason):
    """At 1e6 sgd overflows or runs away, and Adam stays finite."""
    healthy = run(build, [0.05, 0.05, 0.02], key, form)
    sick = run(build, [0.05, 1e6, 0.02], key, form)
    assert list(sick.members.alive) == [True, False, True] and healthy.members.alive.all()
    assert sick.members.reason[1] == reason or reason is None
    assert sick.members.stopped_epoch[1] == 0 and 0 < sick.members.stopped_step[1] <= 3
    assert np.isfinite(sick.members.last_finite_loss).all()
    assert sick.members.sentences()[0].startswith("member 1 diverged and weighs nothing in `state`: loss ")
    for a, b in zip(states(healthy), states(sick), strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    np.testing.assert_array_equal(healthy.history["loss"][:, [0, 2]], sick.history["loss"][:, [0, 2]])
    assert not sick.history["alive"][:, 1].any() and np.isnan(sick.history["loss"][1:, 1]).all()
    frozen = run(build, [0.05, 1e6, 0.02], key, form, epochs=1)
    for a, b in zip(states(frozen), states(sick), strict=True):
        np.testing.assert_array_equal(a[1], b[1], "a frozen member must stay as it is")


def test_a_start_that_is_not_alive_stays_out(key):
    method = bc.ensemble(sgd(0.05), 3)
    start = method.init(key, None)._replace(alive=jnp.array([True, False, True]))
    fitted = bc.fit(method, blobs(), key, epochs=2, batch_size=10, start=start, progress=False)
    assert list(fitted.members.alive) == [True, False, True]
    assert fitted.members.reason[1] == "not alive at the start" and fitted.members.stopped_step[1] == 0
    np.testing.assert_array_equal(states(fitted)[0][1], jax.tree.leaves(start.members)[0][1])


@pytest.mark.parametrize("form", ["vmap", "mesh", "groups"])
def test_forms_agree_to_rounding(key, form):
    """Two hundred steps; three members on two devices are filled up to four."""
    one, other = (run(sgd, [0.05, 0.1, 0.02], key, f, epochs=67) for f in ("map", form))
    assert one.members.stopped_step[0] == 201
    for a, b in zip(states(one), states(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rows_shared_by_two_devices_give_the_same_parameters(key):
    method = bc.ensemble(sgd(0.05), 2)
    settings = dict(epochs=17, batch_size=10, progress=False)
    one = bc.fit(method, blobs(), key, mesh=bc.make_mesh(1), **settings)
    two = bc.fit(method, blobs(), key, mesh=bc.make_mesh(1, 2), **settings)
    for a, b in zip(states(one), states(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_permuting_members_permutes_results_and_changes_nothing_else(key, form, monkeypatch):
    """Settings and keys in another order: on a mesh members change their devices too."""
    rates, order = np.array([0.05, 0.1, 0.2, 0.3], np.float32), np.array([2, 0, 3, 1])
    forth = run(sgd, rates, key, form)
    module = sys.modules["bayescal.train.fit"]
    monkeypatch.setattr(module, "runner_keys", lambda method, key: member_keys(key, 4)[order])
    back = run(sgd, rates[order], key, form)
    for a, b in zip(states(forth), states(back), strict=True):
        np.testing.assert_array_equal(a[order], b)
    np.testing.assert_array_equal(forth.history["loss"][:, order], back.history["loss"])


def test_early_stopping_keeps_the_best_and_stops_each_member_by_itself(key):
    """A rate that turns huge at step 12 (epoch 4) for one member; another never gets better than its first epoch."""
    schedule = lambda s: lambda step: jnp.where(step < s["good"], s["rate"], s["then"])
    build = lambda s: bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(schedule(s)))
    good, rate, then = jnp.array([1000, 12]), jnp.array([0.1, 0.1]), jnp.array([0.1, -0.3])
    method = bc.ensemble(build, settings={"good": good, "rate": rate, "then": then})
    settings = dict(epochs=30, batch_size=10, validation=blobs(), progress=False)
    fitted = bc.fit(method, blobs(), key, patience=3, **settings)
    assert list(fitted.members.reason) == ["trained", "no better validation score"]
    assert list(fitted.members.stopped_epoch) == [30, 6] and list(fitted.members.best_epoch) == [29, 3]
    assert list(fitted.members.stopped_step) == [90, 21] and fitted.members.alive.all()
    assert np.isnan(fitted.history["loss"][7:, 1]).all() and np.isfinite(fitted.history["loss"][:, 0]).all()
    short = bc.fit(method, blobs(), key, **{**settings, "epochs": 4})
    for whole, best in zip(states(short), jax.tree.leaves(fitted.best.members), strict=True):
        np.testing.assert_array_equal(whole[1], best[1])
    both = bc.fit(method, blobs(), key, patience=3, **{**settings, "score": bc.brier()})
    assert both.members.best_epoch[1] == 3 and (both.history["validation_score"][:4] < 2).all()


def test_training_ends_when_every_member_has_stopped(key):
    method = bc.ensemble(sgd(-0.1), 2)  # it only gets worse
    fitted = bc.fit(
        method, blobs(), key, epochs=50, batch_size=10, validation=blobs(), patience=2, progress=False, checkpoint=None
    )
    assert fitted.history["loss"].shape == (3, 2) and fitted.seconds["epochs"] <= 5
    assert list(fitted.members.best_epoch) == [0, 0] and list(fitted.members.stopped_epoch) == [2, 2]


def test_validation_in_chunks(key, monkeypatch):
    module = sys.modules["bayescal.train.fit"]
    monkeypatch.setattr(module, "VALIDATION_ROWS", 7)
    settings = dict(epochs=3, batch_size=10, validation=blobs(), progress=False)
    chunked = bc.fit(sgd(0.1), blobs(), key, **settings)
    monkeypatch.undo()
    whole = bc.fit(sgd(0.1), blobs(), key, **settings)
    np.testing.assert_allclose(chunked.history["validation_score"], whole.history["validation_score"], rtol=1e-5)


def test_bootstrap_weights_are_repetition(key):
    """A member with bootstrap weights is the method trained on the rows it drew, as often as it drew them."""
    method = bc.ensemble(sgd(0.05), 2, resample=bc.bootstrap)
    fitted = bc.fit(method, blobs(), key, epochs=5, batch_size=30, progress=False)
    counts = np.asarray(member_rows(bc.bootstrap, member_keys(key, 2), 30)).astype(int)
    assert (counts.sum(1) == 30).all() and (counts[0] != counts[1]).any() and 0.1 < (counts == 0).mean() < 0.6
    for m in range(2):
        rows = np.repeat(np.arange(30), counts[m])
        drawn = bc.Dataset(blobs().inputs[rows], blobs().targets[rows])
        alone = jax.random.fold_in(key, m)
        lone = bc.fit(sgd(0.05), drawn, alone, epochs=5, batch_size=30, progress=False)
        np.testing.assert_allclose(states(fitted)[1][m], lone.state.variables.params["w"], rtol=1e-4, atol=1e-5)


def test_out_of_bag_asks_those_who_never_saw_a_row(key):
    """Of 12 members with two draws each, one of which is not alive: it weighs nothing still."""
    dropout = bc.mc_dropout(bc.models.mlp(4, (8,), 3, dropout=0.2), bc.Categorical, optax.sgd(0.1), num_draws=2)
    method = bc.ensemble(dropout, 12, resample=bc.Subsample(0.5))
    state = method.init(key, None)._replace(alive=jnp.arange(12) != 3)
    pred = bc.predict(method, state, blobs().inputs, key)
    own = bc.out_of_bag(pred, method, key)
    weights = np.asarray(own.member_weights)
    assert weights.shape == (24, 30) and (weights[6:8] == 0).all() and (weights[::2] == weights[1::2]).all()
    assert ((weights > 0).sum(1)[[0, 2, 4]] == 15).all() and np.isfinite(own.log_prob(blobs().targets)).all()
    lone = dataclasses.replace(pred, member_weights=jnp.zeros(24).at[0].set(1.0))
    with pytest.raises(ValueError, match="`pred` must have a member that never saw each row, got 15 rows"):
        bc.out_of_bag(lone, method, key)
    study = bc.experiments(bc.ensemble(sgd(0.1), 12, resample=bc.Subsample(0.5)), 2)
    both = bc.predict(study, study.init(key, None), blobs().inputs, key)
    weights = np.asarray(bc.out_of_bag(both, study, key).member_weights)
    assert weights.shape == (12, 2, 30) and (weights[:, 0] != weights[:, 1]).any()


def test_bagging_keeps_a_share_of_the_rows(key, unchecked):
    kept = bc.Subsample(0.5)(key, 31)
    assert kept.sum() == 15 and set(np.unique(kept)) == {0, 1}
    method = bc.ensemble(sgd(0.05), 2, resample=bc.Subsample(0.5))
    fitted = bc.fit(method, blobs(), key, epochs=1, batch_size=10, progress=False)
    folds = [blobs(), bc.Dataset(blobs().inputs[:6], blobs().targets[:6])]
    bc.fit(bc.experiments(method, 2), folds, key, epochs=1, batch_size=6, progress=False)
    with pytest.raises(ValueError, match=r"`fraction` must lie in \(0, 1\], got 1.5"):
        bc.Subsample(1.5)
    with pytest.raises(ValueError, match="`fraction` must leave at least one of the 3 rows"):
        bc.Subsample(0.1)(key, 3)
    with pytest.raises(ValueError, match="`method` must be an ensemble with `resample`"):
        bc.out_of_bag(bc.predict(method, fitted.state, blobs().inputs, key), bc.ensemble(sgd(0.05), 2), key)
    with pytest.raises(ValueError, match="`resample` must give one finite weight of at least 0"):
        negative = bc.ensemble(sgd(0.05), 2, resample=lambda key, rows: -jnp.ones(rows))
        bc.fit(negative, blobs(), key, epochs=1, batch_size=10, progress=False)
    with pytest.raises(ValueError, match="`resample` must leave every member a row of positive weight"):
        nothing = bc.ensemble(sgd(0.05), 2, resample=lambda key, rows: jnp.zeros(rows))
        bc.fit(nothing, blobs(), key, epochs=1, batch_size=10, progress=False)


def test_a_setting_that_is_branched_on_is_an_error_that_says_so(key):
    def build(rate):
        return bc.map_estimate(pure_model(), bc.Categorical, optax.sgd(0.1 if rate > 0.5 else 0.2))

    schedule = lambda s: bc.map_estimate(
        pure_model(), bc.Categorical, optax.sgd(optax.warmup_cosine_decay_schedule(0.0, s, 5, 10))
    )
    for bad in (build, schedule):
        method = bc.ensemble(bad, settings=jnp.array([0.1, 0.9]))
        with pytest.raises(TypeError, match="`settings` must be used arithmetically, got a method that branches"):
            bc.fit(method, blobs(), key, epochs=1, batch_size=10, progress=False)


@pytest.mark.parametrize("stream", [1, 3])
def test_streaming_changes_nothing(key, stream):
    method = bc.ensemble(sgd(0.05), 3)
    settings = dict(epochs=2, batch_size=8, progress=False)
    resident = bc.fit(method, blobs(), key, **settings)
    streamed = bc.fit(method, blobs(), key, stream=stream, **settings)
    for a, b in zip(states(resident), states(streamed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(resident.history["loss"], streamed.history["loss"], rtol=1e-5)


def test_streaming_from_a_memory_map_and_what_does_not_fit(key, tmp_path, monkeypatch, unchecked):
    data = blobs()
    np.save(tmp_path / "x.npy", data.inputs)
    mapped = bc.Dataset(np.load(tmp_path / "x.npy", mmap_mode="r"), data.targets)
    settings = dict(epochs=2, batch_size=8, progress=False)
    resident = bc.fit(sgd(0.05), data, key, **settings)
    monkeypatch.setattr("bayescal.train.stream.device_budget", lambda: 100)  # bytes
    streamed = bc.fit(sgd(0.05), mapped, key, **settings)
    np.testing.assert_allclose(streamed.state.variables.params["w"], resident.state.variables.params["w"], rtol=1e-6)
    with pytest.raises(ValueError, match="`stream` must be a whole number of steps of at least 1, or None, got 0"):
        bc.fit(sgd(0.05), data, key, stream=0, **settings)


def test_mesh_settings(unchecked):
    with pytest.raises(ValueError, match="`member` x `data` must be between 1 and the 2 devices, got 3 x 1"):
        bc.make_mesh(3)
    assert dict(bc.make_mesh(data=2).shape) == {"member": 1, "data": 2}
    assert bc.use_all_cores() == 2  # the tests have set two devices; nothing changes


@pytest.mark.parametrize("patience", [0, 2.5, 3])
def test_bad_patience(key, patience, unchecked):
    validation = None if patience == 3 else blobs()
    with pytest.raises(ValueError, match="`patience` must be a whole number of at least 1, with `validation`"):
        bc.fit(sgd(0.1), blobs(), key, epochs=1, batch_size=10, validation=validation, patience=patience)


def test_the_log_of_a_run_without_a_terminal(key, capsys, monkeypatch):
    monkeypatch.setattr("bayescal.train.progress._TELL_EVERY", 0.0)
    bc.fit(bc.ensemble(sgd(0.1), 3), blobs(), key, epochs=3, batch_size=10, mesh=bc.make_mesh(2))
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("memory per device, estimated: ")
    assert [line.split("  ")[0] for line in told[1:]] == ["epoch 1/3", "epoch 3/3"]
    shown = told[-1].split("updates/s  loss ")[1].split()
    assert len(shown) == 3 and all(float(x) > 0 for x in shown), "what fills up the devices must not show"


def test_hyper_deep_ensemble_selects_among_settings(key):
    """Candidates with their own learning rates, the best pool of three by validation NLL."""
    method = bc.ensemble(sgd, settings=jnp.array([1e-4, 0.02, 0.1, 0.3]))
    fitted = bc.fit(method, blobs(), key, epochs=8, batch_size=10, progress=False)
    pred = bc.predict(method, fitted.state, blobs().inputs, key)
    chosen = bc.fit_member_selection(pred, blobs().targets, num_members=3)
    assert 0 not in np.asarray(chosen.order) and chosen.nll[-1] <= chosen.nll[0] + 1e-6
    np.testing.assert_allclose(-chosen(pred).log_prob(blobs().targets).mean(), chosen.nll[-1], rtol=1e-5)


def test_a_start_with_other_members_is_an_error(key, unchecked):
    one, three = bc.ensemble(sgd(0.05), 1), bc.ensemble(sgd(0.05), 3)
    settings = dict(epochs=1, batch_size=10, progress=False)
    for method, start in ((three, one), (one, three), (sgd(0.05), one), (bc.experiments(one, 2), three)):
        with pytest.raises(ValueError, match="`start` must have members of shape"):
            bc.fit(method, blobs(), key, start=start.init(key, None), **settings)


def test_a_score_that_is_never_a_number_is_an_error(key):
    nothing = bc.nll()._replace(compute=lambda sums: jnp.nan * sums.value)
    settings = dict(epochs=2, batch_size=10, validation=blobs(), progress=False)
    with pytest.raises(ValueError, match="`score` must be a number for at least one member and epoch"):
        bc.fit(sgd(0.05), blobs(), key, score=nothing, **settings)


def test_a_score_of_which_higher_is_better(key):
    settings = dict(epochs=6, batch_size=10, validation=blobs(), progress=False)
    fitted = bc.fit(sgd(0.02), blobs(), key, score=bc.accuracy(), **settings)
    scores = fitted.history["validation_score"][:, 0]
    assert fitted.members.best_epoch[0] == scores.argmax() and scores.argmax() > scores.argmin()


@pytest.mark.parametrize("score", ["nll", None])
def test_bad_score(key, score, unchecked):
    given = {"score": bc.nll, "validation": blobs()} if score else {"score": bc.nll()}
    with pytest.raises(ValueError, match="`score` must be a Metric such as"):
        bc.fit(sgd(0.1), blobs(), key, epochs=1, batch_size=10, **given)


def test_an_optimiser_may_keep_an_infinity(key):
    keeps = optax.GradientTransformation(
        lambda params: jnp.inf, lambda g, s, p=None: (jax.tree.map(lambda x: -0.1 * x, g), s)
    )
    method = bc.map_estimate(pure_model(), bc.Categorical, keeps)
    assert bc.fit(method, blobs(), key, epochs=2, batch_size=10, progress=False).members.alive.all()


def test_a_mesh_is_an_argument(key, unchecked):
    settings = dict(epochs=1, batch_size=10, progress=False)
    with jax.set_mesh(bc.make_mesh(2)), pytest.raises(ValueError, match=r"`mesh` must be passed as an argument"):
        bc.fit(sgd(0.1), blobs(), key, **settings)
    with pytest.raises(ValueError, match=r"`mesh` must have the axes 'member' and 'data', got \('batch',\)"):
        bc.fit(sgd(0.1), blobs(), key, mesh=jax.make_mesh((2,), ("batch",)), **settings)


def test_streaming_rows_that_do_not_divide_the_devices(key):
    settings = dict(epochs=1, batch_size=9, progress=False)
    one = bc.fit(bc.ensemble(sgd(0.1), 2), blobs(), key, mesh=bc.make_mesh(1), **settings)
    two = bc.fit(bc.ensemble(sgd(0.1), 2), blobs(), key, mesh=bc.make_mesh(1, 2), stream=2, **settings)
    np.testing.assert_allclose(states(one)[1], states(two)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("members", "hidden", "expected"), [(8, 5, "vmap"), (6, 5, "map"), (8, 3000, "map")])
def test_many_tiny_members_run_side_by_side(key, members, hidden, expected, monkeypatch):
    module = sys.modules["bayescal.train.fit"]
    taken, choose = [], module.choose
    monkeypatch.setattr(module, "choose", lambda *args, **kwargs: taken.append(choose(*args, **kwargs)) or taken[-1])
    model = bc.models.mlp(4, (hidden,), 3)
    method = bc.ensemble(bc.map_estimate(model, bc.Categorical, optax.sgd(0.01)), members)
    settings = dict(epochs=1, batch_size=20, mesh=bc.make_mesh(2), progress=False)
    default = bc.fit(method, blobs(), key, **settings)
    assert [form.execution for form in taken] == [expected]
    assert bc.fit(method, blobs(), key, execution="map", **settings).history["loss"] == pytest.approx(
        default.history["loss"], rel=1e-5
    )


def test_convolutions_never_run_side_by_side_on_cpu(key):
    model = bc.models.convnet((4, 4, 1), (2,), 4, 2)
    method = bc.ensemble(bc.map_estimate(model, bc.Categorical, optax.sgd(0.1)), 4)
    apart = runners(method)
    assert not forms._is_tiny(apart, stack(pictures(), "data", None), 2, 4, runner_keys(method, key), None)
    dense = bc.ensemble(bc.map_estimate(bc.models.mlp(2, (4,), 2), bc.Categorical, optax.sgd(0.1)), 4)
    assert forms._is_tiny(runners(dense), stack(blobs(), "data", None), 2, 4, runner_keys(dense, key), None)


@pytest.mark.parametrize("block", [1, 2, 64])
def test_epochs_in_one_program_are_those_one_by_one(key, block, monkeypatch):
    """With validation, patience and a member that stops: history, states and report to the bit."""
    module = sys.modules["bayescal.train.fit"]
    settings = dict(validation=blobs(), patience=2, epochs=70)
    whole = run(adam, [0.1, 0.2, 1e6], key, **settings)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "BLOCK_SECONDS", 1e9)
    other = run(adam, [0.1, 0.2, 1e6], key, **settings)
    jax.tree.map(np.testing.assert_array_equal, (whole.history, states(whole)), (other.history, states(other)))
    np.testing.assert_array_equal(whole.members.stopped_epoch, other.members.stopped_epoch)


def test_info_of_an_update_is_scalars(key):
    base = sgd(0.1)
    vector = base._replace(update=lambda s, b, k: (s, {"loss": jnp.float32(1), "v": jnp.arange(3.0)}))
    with pytest.raises(ValueError, match=r"`info` of an update must be scalars, got 'v' of shape \(3,\)"):
        bc.fit(vector, blobs(), key, epochs=1, batch_size=10)


def test_an_update_without_a_hash_trains(key):
    class Update:
        __hash__ = None  # pyright: ignore

        def __call__(self, state, batch, key):
            return base.update(state, batch, key)

    base = sgd(0.1)
    plain, wrapped = (bc.fit(m, blobs(), key, epochs=2, batch_size=10) for m in (base, base._replace(update=Update())))
    np.testing.assert_array_equal(plain.history["loss"], wrapped.history["loss"])


def test_raw_keys_train_ensembles_and_experiments():
    key = jax.random.PRNGKey(0)
    for method in (bc.ensemble(sgd(0.1), 3), bc.experiments(bc.ensemble(sgd(0.1), 2), 2)):
        typed, raw = (bc.fit(method, blobs(), k, epochs=1, batch_size=10) for k in (jax.random.wrap_key_data(key), key))
        np.testing.assert_array_equal(typed.history["loss"], raw.history["loss"])


def test_side_by_side_only_what_fits(key, monkeypatch):
    module = sys.modules["bayescal.train.forms"]
    method = bc.ensemble(sgd(0.1), 8)
    monkeypatch.setattr(module, "device_budget", lambda: 1)
    taken, choose = [], sys.modules["bayescal.train.fit"].choose
    monkeypatch.setattr(
        sys.modules["bayescal.train.fit"], "choose", lambda *a, **k: taken.append(choose(*a, **k)) or taken[-1]
    )
    bc.fit(method, blobs(), key, epochs=1, batch_size=10, mesh=bc.make_mesh(1), stream=1)
    assert taken[0].execution == "map" and taken[0].memory.concurrent == 1
