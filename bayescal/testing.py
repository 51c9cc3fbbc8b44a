"""Protocol tests for any method, your own included: `check_method(method, model, data)`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.decompose import decompose
from bayescal.methods.ensemble import ensemble
from bayescal.predictive import Dirichlet, concatenate
from bayescal.sharding import make_mesh
from bayescal.train import fit
from bayescal.train.predict import over_rows
from bayescal.types import Batch, Dataset, EnsembleState, Method, Model


def check_method(
    method: Method, model: Model, data: Dataset, *, rtol: float = 1e-4, batch_size: int | None = None
) -> None:
    """Raises AssertionError, saying what is broken, unless the method keeps the protocol that the rest relies on.

    Checked: init, predict and draw depend on their keys alone; update keeps the state's structure; jit changes nothing;
    padded rows do not count; predictions do not depend on chunks or batch mates; total = aleatoric + epistemic, and one
    member has no epistemic part (but one in closed form); a state survives a round trip through numpy; fit compiles once
    and repeats to the bit; members of an ensemble are the lone runs to the bit, differ from each other, and their order
    does not matter.

    Args:
        method: what to check, alone or already an ensemble.
        model: the network it was built from.
        data: a few dozen rows that it can be trained on.
        rtol: relative tolerance where only rounding may differ.
        batch_size: rows an update, on which nothing may depend; all of them for a method that must see all at once. None
            = a third of the rows.
    """
    batch_size = batch_size or max(1, len(data.targets) // 3)
    with jax.default_matmul_precision("highest"):  # rounding alone may differ, on accelerators too
        _check(method, model, data, jax.random.key(20), rtol, batch_size)


def _check(method, model, data, key, rtol, batch_size):
    _check_model(model, data, key)
    _check_init(method, key)
    _check_update(method, model, data, key, rtol, batch_size)
    traces: list = []
    counted = _counting(method, traces)  # used from here on, so that what is the same compiles once
    state = _check_fit(counted, data, key, traces, batch_size)
    _check_predict(method, state, data, key, rtol)
    _check_round_trip(method, state, data, key)
    if method.draw is not None:
        _check_draw(method, model, state, key)
    if method.members is None:
        _check_members(counted, data, key, rtol, batch_size)


def _check_model(model, data, key):
    inputs = data.inputs[:4]
    variables = jax.jit(model.init)(key)
    once, again = (jax.jit(lambda v: model.apply(v, inputs, None))(variables) for _ in range(2))
    _same(once, again, "a deterministic pass (key=None) must repeat to the bit")
    one = jax.jit(lambda v: model.apply(v, inputs[:1], None))(variables)
    _close(jax.tree.map(lambda x: x[:1], once), one, 1e-4, "an output must not depend on its batch mates")


def _check_init(method, key):
    init = jax.jit(method.init)
    _same(init(key, None), init(key, None), "init must give the same state for the same key")
    assert _differ(init(key, None), init(jax.random.fold_in(key, 1), None)), "init must depend on its key"


def _check_update(method, model, data, key, rtol, batch_size):
    state = jax.jit(method.init)(key, None)
    batch = _batch(data, batch_size)
    update = jax.jit(method.update)
    new, info = update(state, batch, key)
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    assert jax.tree.structure(new) == jax.tree.structure(state), "update must return a state of the same structure"
    assert shapes(new) == shapes(state), "update must keep the shapes and types of the state"
    assert isinstance(info, dict) and "loss" in info, "update's info must be a dict that holds `loss`"
    assert _differ(new, state), "update must change the state"
    _same(update(state, batch, key), (new, info), "update must give the same answer for the same key")
    if not jax.tree.leaves(jax.eval_shape(model.init, key).stats):  # batch statistics do see padding
        weights = jnp.asarray(batch.weights).at[-3:].set(0)
        junk = jax.tree.map(lambda x: x.at[-3:].set(x[0]), (batch.inputs, batch.targets))
        one = update(state, batch._replace(weights=weights), key)
        two = update(state, batch._replace(inputs=junk[0], targets=junk[1], weights=weights), key)
        _close(one, two, rtol, "rows of weight 0 must not count in update")


def _check_predict(method, state, data, key, rtol):
    inputs = jnp.asarray(data.inputs[:8])
    compiled = jax.jit(method.predict)
    for k in (key, None):
        whole = compiled(state, inputs, k)
        assert whole.batch_shape == (8,), f"predict must have batch shape (8,), got {whole.batch_shape}"
        _same(compiled(state, inputs, k), whole, "predict must give the same answer for the same key")
        halves = [compiled(state, inputs[:4], k), compiled(state, inputs[4:], k)]
        _close(concatenate(halves), whole, rtol, "a prediction must not depend on chunks or batch mates")
        parts = decompose(whole)
        _close(parts.aleatoric + parts.epistemic, parts.total, 1e-6, "total must be aleatoric + epistemic")
        if whole.num_members == 1 and not _knows_its_own(whole):
            assert not np.any(parts.epistemic), "one member must have no epistemic uncertainty"
        else:
            order = np.random.default_rng(0).permutation(whole.num_members)
            permuted = jax.tree.map(lambda x, order=order: x[order], whole)
            _close(decompose(permuted), parts, rtol, "the order of members must not matter")
    _close(method.predict(state, inputs, key), compiled(state, inputs, key), rtol, "predict must not change under jit")


def _check_draw(method, model, state, key):
    draw = jax.jit(method.draw)
    one = draw(state, key)
    _same(draw(state, key), one, "draw must give the same network for the same key")
    keys = jax.random.split(key, 16)  # of few networks two draws may well be the same
    if np.all(getattr(state, "ready", True)):  # a chain that has kept nothing has one network to give
        assert any(_differ(draw(state, k), one) for k in keys), "draw must depend on its key"
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(one) == shapes(jax.eval_shape(model.init, key)), "draw must give variables as the model's init does"
    assert all(np.isfinite(x).all() for x in _leaves(one.params)), "a drawn network must be finite"


def _knows_its_own(pred) -> bool:
    """Whether a single member has an epistemic part in closed form."""
    return isinstance(pred, Dirichlet) or getattr(pred, "mean_variance", None) is not None


def _check_round_trip(method, state, data, key):
    def through_numpy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.asarray(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x)
            )
        return jnp.asarray(np.asarray(x))

    restored = jax.tree.map(through_numpy, state)
    run = jax.jit(method.predict)
    inputs = jnp.asarray(data.inputs[:8])
    _same(run(restored, inputs, key), run(state, inputs, key), "a state must survive a round trip through numpy")


def _check_fit(method, data, key, traces, batch_size):
    settings: dict[str, Any] = dict(batch_size=batch_size, progress=False, execution="map")
    settings["mesh"] = None if method.members else make_mesh(1)  # the program that `_check_members` runs again
    first = fit(method, data, key, epochs=2, **settings)
    after_first = len(traces)
    again = fit(method, data, key, epochs=2, **settings)
    assert len(traces) == after_first, "fit must compile update once, and not again for the same shapes"
    _same(again.state, first.state, "fit must repeat to the bit for the same key")
    number = 1 if method.members is None else method.members.number
    assert first.history["loss"].shape == (2, number), "history must be (epoch, member)"
    assert np.isfinite(first.history["loss"]).all(), "the loss of the first epochs must be finite"
    other = fit(method, data, jax.random.fold_in(key, 1), epochs=2, **settings)
    assert _differ(other.state, first.state), "fit must depend on its key"
    return first.state


def _check_members(method, data, key, rtol, batch_size):
    both, one_device = ensemble(method, 2), make_mesh(1)  # promises to the bit hold for one number of devices
    settings: dict[str, Any] = dict(epochs=1, batch_size=batch_size, progress=False)
    mapped = fit(both, data, key, execution="map", mesh=one_device, **settings)
    stacked = _leaves(mapped.state.members)
    for m in range(2):
        lone = fit(method, data, jax.random.fold_in(key, m), execution="map", mesh=one_device, **settings)
        sentence = f"member {m} under map must be the lone run with fold_in(key, {m}), to the bit"
        _same([x[m] for x in stacked], _leaves(lone.state), sentence)
    vmapped = fit(both, data, key, execution="vmap", **settings)
    # Losses, not states: a bias before batch norm has no gradient but rounding, which Adam blows up to full steps.
    _close(
        vmapped.history["loss"],
        mapped.history["loss"],
        rtol,
        "vmap and map, on whatever devices, must agree to rounding",
    )

    # As `bayescal.predict`, which refuses chains that have kept no sample yet: theirs may need many epochs.
    spread = partial(over_rows, both.predict, networks=2, chunk_size=None, mesh=None)
    pred = jax.tree.map(np.asarray, spread(mapped.state, data.inputs[:8], key))
    own = pred.num_members // 2
    first, second = (jax.tree.map(lambda x, part=part: x[part], pred) for part in (slice(own), slice(own, None)))
    assert _differ(first, second), "members must differ"
    spoilt = EnsembleState(jax.tree.map(_spoil_second, mapped.state.members), jnp.array([True, False]))
    rest = spread(spoilt, data.inputs[:8], key)
    _close(decompose(rest)[:3], decompose(first)[:3], rtol, "a member that is not alive must not count")


def _spoil_second(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    leaf = np.array(leaf)
    leaf[1] = np.nan
    return leaf


def _counting(method, traces):
    def count(update):
        def counted(state, batch, key):
            traces.append(1)
            return update(state, batch, key)

        return counted

    if method.members is None:
        return method._replace(update=count(method.update))
    build = method.members.build

    def counted_build(settings):
        one = build(settings)
        return one._replace(update=count(one.update))

    return method._replace(members=method.members._replace(build=counted_build))


def _batch(data, rows):
    part = jax.tree.map(lambda x: jnp.asarray(x[:rows]), (data.inputs, data.targets))
    return Batch(part[0], part[1], jnp.ones(rows), jnp.arange(rows))


def _leaves(tree):
    numbers = lambda x: jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x
    return [np.asarray(numbers(x)) for x in jax.tree.leaves(tree)]


def _same(a, b, sentence):
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(_leaves(a), _leaves(b), strict=True)), sentence


def _differ(a, b):
    return any(not np.array_equal(x, y, equal_nan=True) for x, y in zip(_leaves(a), _leaves(b), strict=True))


def _close(a, b, rtol, sentence):
    for x, y in zip(_leaves(a), _leaves(b), strict=True):
        scale = max(1.0, float(np.nanmax(np.abs(y), initial=0))) if np.issubdtype(y.dtype, np.floating) else 1
        assert np.allclose(x, y, rtol=rtol, atol=rtol * scale, equal_nan=True), sentence
