"""Monte-Carlo dropout: a draw is one network, and what draws share is computed once."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import blobs

import bayescal as bc

pytestmark = pytest.mark.core
SGD = optax.sgd(0.1)


def net(dropout=0.0):
    return bc.models.mlp(4, (16, 8), 3, dropout=dropout)


def dropped(draws=3):
    return bc.mc_dropout(net(0.5), bc.Categorical, SGD, num_draws=draws)


def rows(number, width=4):
    return np.random.default_rng(0).normal(size=(number, width)).astype(np.float32)


def state_of(method, key):
    return jax.jit(method.init)(key, None)


def test_draws_are_networks_with_a_mask_each(key):
    """Each draw of each row against the network applied to that row alone with the draw's key; other keys, other masks."""
    method, inputs = dropped(4), rows(300)
    state = state_of(method, key)
    logits = bc.predict(method, state, inputs, key).logits
    apply = jax.jit(net(0.5).apply)
    for s, draw_key in enumerate(jax.random.split(key, 4)):
        for row in (0, 64, 299):
            np.testing.assert_allclose(
                logits[s, row], apply(state.variables, inputs[row : row + 1], draw_key)[0], rtol=1e-5, atol=1e-6
            )
    same = bc.predict(method, state, np.ones((300, 4), np.float32), key).logits
    assert np.ptp(same, axis=1).max() == 0, "one mask for all rows, in every block and on every device"
    assert (same[0] != same[1]).any()
    assert (bc.predict(method, state, inputs, jax.random.key(8)).logits != logits).any()


def loops_over(text, shape):
    """Text of the smallest loop of a compiled program, with all that it calls, in which an array of that shape is."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def closure(name, seen):
        if name not in seen:
            seen.add(name)
            for other in re.findall(r"(?:calls|body|condition|to_apply)=%([^\s,)}]+)", bodies[name]):
                closure(other, seen)
        return "".join(bodies[n] for n in seen)

    inside = [closure(name, set()) for name in set(re.findall(r"body=%([^\s,)}]+)", text))]
    return min((t for t in inside if re.search(shape, t)), key=len)


@pytest.mark.parametrize("ensembled", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_what_comes_before_the_first_dropout_is_computed_once(first, ensembled, key):
    """The loop over draws does not even read the inputs, unless they are what is dropped."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(37, 19, rngs=rngs), nnx.Linear(19, 23, rngs=rngs)
            self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(23, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.one(self.dropout(x) if first else x))
            return self.head(self.dropout(nnx.relu(self.two(self.dropout(x)))))

    method = bc.mc_dropout(bc.from_nnx(Net), bc.Categorical, SGD, num_draws=5)
    method = bc.ensemble(method, 2) if ensembled else method
    args = state_of(method, key), rows(48, 37), key
    text = jax.jit(method.predict).lower(*args).compile().as_text()
    draws = loops_over(text, r"\[48,(1,)?23\]")
    assert re.search(r"\[48,(1,)?37\]", text) and bool(re.search(r"\[48,(1,)?37\]", draws)) == first


def test_side_by_side_the_first_layer_has_no_draws(key):
    """On accelerators draws run under vmap: operations grow with them from the first dropout on alone."""
    model = bc.models.mlp(40, (50, 6), 3, dropout=0.5)
    variables, inputs = model.init(key), jnp.ones((64, 40))

    def operations(draws):
        one = lambda k: jax.vmap(lambda row: model.apply(variables, row[None], k)[0])(inputs)
        return jax.jit(jax.vmap(one)).lower(jax.random.split(key, draws)).cost_analysis()["flops"]

    first_layer = 2 * 64 * 40 * 50
    assert first_layer < operations(4) and operations(8) - operations(4) < 4 * first_layer / 2


def units(layer, rate, rngs):
    """A dropout layer before the layer."""
    from flax import nnx

    class Dropped(nnx.Module):
        def __init__(self):
            self.dropout, self.layer = bc.models.dropout_layer(rate, rngs), layer

        def __call__(self, x):
            return self.layer(self.dropout(x))

    return Dropped()


KINDS = {
    "units": units,
    "concrete": lambda layer, rate, rngs: bc.models.concrete_dropout(layer, rate=rate, temperature=1e-3, rngs=rngs),
    "connect": lambda layer, rate, rngs: bc.models.drop_connect(layer, rate=rate, rngs=rngs),
}  # of temperature so low that masks are of zeros and ones


def one_layer(kind, rate, inputs, outputs, **settings):
    """A network of one dense layer whose inputs or weights are dropped."""
    from flax import nnx

    dense = lambda a, b, *, rngs: KINDS[kind](nnx.Linear(a, b, rngs=rngs, **settings), rate, rngs)
    return bc.models.mlp(inputs, (), outputs, dense=dense)


def agreement(masks):
    """Share of places where two masks agree, for each pair."""
    bits = masks.reshape(len(masks), -1) > 0.5
    return [np.mean(a == b) for i, a in enumerate(bits) for b in bits[:i]]


@pytest.mark.parametrize("execution", ["map", "vmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_members_never_share_masks_in_training(kind, execution, key):
    """The kernel's gradient for a row of ones is the mask: after each update the change of a kernel tells it.

    Of 400 fair coins two share half, with a standard error of 2.5 %.
    """
    from flax import nnx

    model = one_layer(kind, 0.5, 400, 1, kernel_init=nnx.initializers.zeros)
    method = bc.mc_dropout(
        model,
        bc.homoscedastic(1.0),
        optax.sgd(1.0),
        num_draws=2,
        num_data=10**9,  # the penalty counts for nothing
        loss=lambda outputs, targets: -outputs.sum(-1),
    )
    data = bc.Dataset(np.ones((1, 400), np.float32), np.zeros((1, 1), np.float32))
    kernels, start = [np.zeros((3, 400))], None
    for epoch in range(2):
        fitted = bc.fit(
            bc.ensemble(method, 3),
            data,
            jax.random.fold_in(key, epoch),
            epochs=1,
            batch_size=1,
            progress=False,
            execution=execution,
            start=start,
        )
        start = fitted.state
        kernels.append(np.asarray(start.members.variables.params["head"]["layer"]["kernel"])[..., 0])
    masks = np.diff(kernels, axis=0).reshape(6, 400)
    assert np.mean(np.minimum(abs(masks), abs(masks - 2)) < 1e-3) > 0.98, (
        "zeros and twos, but for few of the relaxed ones"
    )
    assert all(abs(share - 0.5) < 5 * 0.025 for share in agreement(masks))


@pytest.mark.parametrize("kind", KINDS)
def test_members_never_share_masks_in_prediction(kind, key):
    """Identity kernels and inputs of one: each draw of each member puts out its mask; rows and chunks share it."""
    model = one_layer(kind, 0.5, 400, 400, kernel_init=lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype))
    method = bc.ensemble(bc.mc_dropout(model, bc.homoscedastic(1.0), optax.sgd(1.0), num_draws=2, num_data=1), 3)
    state, ones = state_of(method, key), np.ones((5, 400), np.float32)
    masks = np.asarray(bc.predict(method, state, ones, key).mean)
    assert masks.shape == (6, 5, 400) and (masks == masks[:, :1]).all()
    assert all(abs(share - 0.5) < 5 * 0.025 for share in agreement(masks[:, 0]))
    np.testing.assert_array_equal(bc.predict(method, state, ones, key, chunk_size=2).mean, masks)
    other = np.asarray(bc.predict(method, state, ones, jax.random.key(8)).mean)[:, 0]
    assert all(abs(share - 0.5) < 5 * 0.025 for share in agreement(np.concatenate([masks[:, 0], other])))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_a_network_never_share_masks(kind, key):
    """Two layers of one width with identity kernels: of inputs of one each puts out its mask, in training too."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            identity = lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype)
            layer = lambda: KINDS[kind](nnx.Linear(400, 400, kernel_init=identity, rngs=rngs), 0.5, rngs)
            self.one, self.two = layer(), layer()

        def __call__(self, x):
            return jnp.stack([self.one(x), self.two(x)], 1)

    model, ones = bc.from_nnx(Net), jnp.ones((1, 400))
    variables = model.init(key)
    for masks in (model.apply(variables, ones, key), model.train(variables, ones, key)[0]):
        assert np.asarray(masks[0]).std(1).min() > 0.9
        assert abs(agreement(np.asarray(masks[0]))[0] - 0.5) < 5 * 0.025


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_the_same_to_the_bit(kind, key, tmp_path):
    method = bc.mc_dropout(one_layer(kind, 0.3, 4, 3), bc.Categorical, optax.adam(1e-2), num_data=30, num_draws=2)
    run = lambda: bc.fit(method, blobs(), key, epochs=2, batch_size=10, progress=False, checkpoint=tmp_path)
    whole = run()
    shutil.rmtree(tmp_path / "steps" / "2")  # as if killed before its last save
    resumed = run()
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "resumed"
    assert resumed.seconds["epochs"] == 1
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["member", "experiment"])
def test_a_grid_of_rates(axis, kind, key):
    """Of a linear network: each rate's own closed form, p / (1 - p) sum w^2 x^2, in one program.

    20,000 draws: the standard error of a variance is at most sqrt((kurtosis - 1) / 20,000) = 2 %, with the kurtosis of a
    mask of rate 0.1, 8, at most.
    """
    rates, x = jnp.array([0.1, 0.3, 0.6]), rows(3, 6)

    def build(own):
        model = one_layer(kind, own["rate"], 6, 1)
        return bc.mc_dropout(model, bc.homoscedastic(1.0), optax.sgd(0.1), num_draws=20_000, num_data=10)

    if axis == "member":
        method = bc.ensemble(build, settings={"rate": rates})
        state = state_of(method, key)
        params, means = state.members.variables.params, bc.predict(method, state, x, key).mean.reshape(3, 20_000, 3)
    else:
        method = bc.experiments(build, settings={"rate": rates})
        state = state_of(method, key)
        params, means = state.variables.params, bc.predict(method, state, x, key).mean[..., 0].swapaxes(0, 1)
    kernels = np.asarray(params["head"]["layer"]["kernel"])[..., 0]
    assert np.ptp(kernels, axis=0).min() > 0
    wanted = [p / (1 - p) * (x**2 @ w**2) for p, w in zip(np.asarray(rates), kernels, strict=True)]
    np.testing.assert_allclose(np.var(means, axis=1), wanted, rtol=0.1)


def test_a_rate_of_zero_in_a_grid_is_the_plain_network(key):
    """A traced value is not known, and one that is known must not change the program: no error and no variance."""
    build = lambda own: bc.mc_dropout(one_layer("units", own["rate"], 4, 3), bc.Categorical, SGD, num_draws=4)
    method = bc.ensemble(build, settings={"rate": jnp.array([0.0, 0.5])})
    state = state_of(method, key)
    draws = bc.predict(method, state, rows(5), key).logits.reshape(2, 4, 5, 3)
    plain = bc.predict(method, state, rows(5), None).logits
    np.testing.assert_allclose(draws[0], np.broadcast_to(plain[0], (4, 5, 3)), rtol=1e-5, atol=1e-6)
    assert (draws[1].std(0) > 0).all()
    lone = build({"rate": jnp.float32(0)})
    assert jax.tree.structure(state_of(lone, key)) == jax.tree.structure(state.members)


def test_a_prediction_does_not_depend_on_its_batch_mates_with_batch_norm(key):
    """Between layers of each kind, after an update, so that moments differ from those of any batch."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([KINDS[kind](nnx.Linear(4, 4, rngs=rngs), 0.4, rngs) for kind in KINDS])
            self.norms = nnx.List([nnx.BatchNorm(4, momentum=0.5, rngs=rngs) for _ in KINDS])

        def __call__(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = nnx.relu(norm(layer(x)))
            return x

    model = bc.from_nnx(Net)
    method = bc.mc_dropout(model, bc.Categorical, SGD, num_draws=3, num_data=20)
    state, x = state_of(method, key), 3 * rows(20) + 1
    batch = bc.Batch(x, np.zeros(20, np.int32), jnp.ones(20), jnp.arange(20))
    state, _ = jax.jit(method.update)(state, batch, key)
    assert all(np.abs(moments["mean"]).max() > 0.1 for moments in state.variables.stats["norms"].values())
    mates = np.concatenate([x[:2], 50 * x[2:]])
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(state.variables, mates, key)[:2], apply(state.variables, x, key)[:2], rtol=1e-5)
    alone = bc.predict(method, state, x[:2], key).logits
    np.testing.assert_allclose(bc.predict(method, state, mates, key).logits[:, :2], alone, rtol=1e-5, atol=1e-6)


def without(kind):
    """Networks whose outputs hold nothing random."""
    import flax.linen as nn
    from flax import nnx

    class Dead(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            outputs = self.dense(x)
            self.dropout(x)
            return outputs

    class DeadLinen(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3)(x)

    def pure(wrap=lambda function: function):
        inner = wrap(lambda params, inputs, key: inputs @ params)
        apply = lambda variables, inputs, key: inner(variables.params, inputs, key)
        return bc.Model(lambda key: bc.Variables(jnp.ones((4, 3))), apply, lambda v, x, k: (apply(v, x, k), (), 0.0))

    example = jnp.ones((1, 4))
    return {
        "dead, nnx": lambda: bc.from_nnx(Dead),
        "dead, linen": lambda: bc.from_linen(DeadLinen(), example, train={"train": True}),
        "none, linen": lambda: bc.from_linen(nn.Dense(3), example),
        "none, nnx": lambda: bc.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs)),
        "number 0": lambda: bc.models.convnet((2, 2, 1), (2,), 4, 3, dropout=0.0),
        "plain function": pure,
        "jit": lambda: pure(jax.jit),
        "remat": lambda: pure(jax.checkpoint),
        "cond": lambda: pure(lambda f: lambda params, x, key: jax.lax.cond(x.sum() > 0, f, f, params, x, key)),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        *["dead, nnx", "dead, linen", "none, linen", "none, nnx", "number 0"],
        *["plain function", "jit", "remat", "cond"],
    ],
)
def test_variance_over_keys_or_an_error(kind, key):
    method = bc.mc_dropout(without(kind), bc.Categorical, SGD, num_draws=3)
    state = state_of(method, key)
    x = rows(5).reshape(5, 2, 2, 1) if kind == "number 0" else rows(5)
    drawn = "draw random numbers, got one whose outputs do not depend on its key, so that all draws would be the same"
    without_stream = kind.startswith(("none", "number"))
    sentence = "`key` was given to a network without a random stream" if without_stream else drawn
    with pytest.raises(ValueError, match=sentence):
        bc.predict(method, state, x, key)
    both = bc.ensemble(method, 2)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(both.predict, jax.eval_shape(both.init, key, None), x, key)
