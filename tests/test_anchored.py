"""Anchored networks and randomised priors against Bayesian linear regression, where both are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact import FEATURES, NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model
from methods import blobs, linen_model, pure_model

import bayescal as bc
from bayescal.methods.anchored import anchored, draw_anchor
from bayescal.models.prior import with_prior

pytestmark = pytest.mark.core
DESCENT = optax.sgd(0.05)  # of the mean nll, whose curvatures are 2 to 26: 300 steps leave e^-30 of the start
EPOCHS = 300


def linear(**settings):
    required = {"num_data": ROWS, "prior_precision": PRIOR, **settings}
    return anchored(linear_model(), bc.homoscedastic(NOISE), DESCENT, **required)


def trained(method, key, **settings):
    return bc.fit(method, linear_data(), key, epochs=EPOCHS, batch_size=ROWS, progress=False, **settings).state


def solution(anchor):
    """P^-1 (X'y / noise + prior * anchor), in float64, for anchors (member, features)."""
    exact = exact_posterior(linear_data())
    return exact.mean + PRIOR * np.linalg.solve(exact.precision, np.asarray(anchor, float).T).T


def flat_batch(rows, features):
    return bc.Batch(jnp.zeros((rows, features)), jnp.zeros((rows, 1)), jnp.ones(rows), jnp.arange(rows))


def test_members_are_the_ridge_regressions_of_their_anchors(key):
    """Each to the closed form; together normal(posterior mean, P^-1 prior P^-1), which is not the posterior."""
    number = 256
    state = trained(bc.ensemble(linear(), number), key).members
    weights = np.asarray(state.variables.params[..., 0], float)
    anchors = np.asarray(state.opt_state[0][..., 0], float)
    np.testing.assert_allclose(weights, solution(anchors), rtol=1e-4, atol=1e-5)

    exact = exact_posterior(linear_data())
    spread = PRIOR * exact.covariance @ exact.covariance
    normal = np.linalg.solve(np.linalg.cholesky(spread), (weights - exact.mean).T)  # (features, member), if so
    assert np.abs(normal.mean(1)).max() < 4.5 / np.sqrt(number)
    np.testing.assert_allclose((normal**2).mean(), 1, atol=4.5 * np.sqrt(2 / (number * FEATURES)))
    assert np.trace(spread) < 0.1 * np.trace(exact.covariance)


def test_where_data_say_nothing_the_spread_is_the_prior(key):
    """One unused feature goes to its anchor, and so keeps the prior's variance, as in the posterior; the others do not."""
    data = linear_data()
    inputs = np.concatenate([data.inputs, np.zeros((ROWS, 1), np.float32)], axis=1)
    method = anchored(
        linear_model(FEATURES + 1), bc.homoscedastic(NOISE), DESCENT, num_data=ROWS, prior_precision=PRIOR
    )
    state = method.init(key, None)
    batch = bc.Batch(jnp.asarray(inputs), jnp.asarray(data.targets), jnp.ones(ROWS), jnp.arange(ROWS))
    step = jax.jit(lambda state, _: (method.update(state, batch, key)[0], None))
    state, _ = jax.lax.scan(step, state, length=20_000)  # (1 - rate * prior / rows)^20000 = 2e-9 of the start is left
    weights, anchor = (np.asarray(x)[:, 0] for x in (state.variables.params, state.opt_state[0]))
    np.testing.assert_allclose(weights[-1], anchor[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights[:-1], solution(anchor[:-1]), rtol=1e-4, atol=1e-5)
    assert np.abs(weights[:-1] - anchor[:-1]).min() > 1e-3


@pytest.mark.parametrize("rows", [5, 50])
def test_the_pull_is_shared_by_the_data(key, rows):
    """With a flat likelihood a step of rate 1 is prior / num_data (anchor - params), whatever the batch."""
    method = anchored(linear_model(3), bc.homoscedastic(1.0), optax.sgd(1.0), num_data=50, prior_precision=4.0)
    state = method.init(key, None)
    new, info = jax.jit(method.update)(state, flat_batch(rows, 3), key)
    before, anchor = state.variables.params, state.opt_state[0]
    np.testing.assert_allclose(new.variables.params - before, 4 / 50 * (anchor - before), rtol=1e-5)
    np.testing.assert_array_equal(new.opt_state[0], anchor)
    np.testing.assert_allclose(info["loss"], 0.5 * np.log(2 * np.pi), rtol=1e-6)  # without the pull


def test_anchors_are_draws_from_the_prior(key):
    params = {"w": jnp.zeros((40, 50)), "b": jnp.zeros(1000)}
    one = draw_anchor(key, params, 4.0)
    for leaf in jax.tree.leaves(one):
        np.testing.assert_allclose(jnp.std(leaf), 0.5, rtol=4.5 / np.sqrt(2 * leaf.size))
        np.testing.assert_allclose(jnp.mean(leaf), 0, atol=4.5 * 0.5 / np.sqrt(leaf.size))
    layers = draw_anchor(key, params, {"w": 4.0, "b": 400.0})
    np.testing.assert_array_equal(layers["w"], one["w"])
    np.testing.assert_allclose(layers["b"], one["b"] / 10, rtol=1e-6)


def test_a_precision_a_layer(key):
    """The top of the params' structure is enough: one number for each dense layer and its bias."""
    model = bc.models.mlp(4, (8,), 3)
    precision = {"dense": 1.0, "head": 25.0}
    flat = lambda outputs, targets: jnp.zeros(outputs.shape[0])
    method = anchored(model, bc.Categorical, optax.sgd(1.0), num_data=30, prior_precision=precision, loss=flat)
    state = method.init(key, None)
    data = blobs()
    batch = bc.Batch(jnp.asarray(data.inputs), jnp.asarray(data.targets), jnp.ones(30), jnp.arange(30))
    new, _ = jax.jit(method.update)(state, batch, key)
    for name, tau in precision.items():
        moved = lambda p, q, a, tau=tau: np.testing.assert_allclose(p - q, tau / 30 * (a - q), rtol=1e-4, atol=1e-6)
        jax.tree.map(moved, new.variables.params[name], state.variables.params[name], state.opt_state[0][name])


def test_starts_where_it_is_told_and_keeps_its_anchor(key):
    method = linear()
    fresh = method.init(key, None)
    assert (fresh.variables.params != fresh.opt_state[0]).all(), "the network has a start of its own"
    start = bc.Variables(jnp.full((FEATURES, 1), 2.0))
    state = method.init(key, start)
    np.testing.assert_array_equal(state.variables.params, start.params)
    np.testing.assert_array_equal(state.opt_state[0], fresh.opt_state[0])
    other = method.init(jax.random.key(8), start)
    assert (other.opt_state[0] != state.opt_state[0]).all()
    again = method.init(key, other)  # a state, whose anchor is not taken over
    np.testing.assert_array_equal(again.opt_state[0], fresh.opt_state[0])


def test_the_anchor_has_a_stream_of_its_own(key):
    """Not the one of which a network draws its layers: `split(key)[1]` is also the key of a layer of an earlier fit's."""
    model = bc.models.mlp(8, (40, 40), 40)
    method = anchored(model, bc.Categorical, DESCENT, num_data=30, prior_precision=1.0)
    kernels = lambda tree: [np.ravel(x) for x in jax.tree.leaves(tree) if x.ndim == 2]
    for start in (None, model.init(key)):
        state = method.init(key, start)
        longest = min(map(len, kernels(state.opt_state[0])))
        for anchor in kernels(state.opt_state[0]):
            for weights in kernels(state.variables.params):
                assert abs(np.corrcoef(anchor[:longest], weights[:longest])[0, 1]) < 4.5 / np.sqrt(longest)
    prior = with_prior(model, scale=1.0).init(key)
    for fixed, own in zip(kernels(prior.stats.prior.params), kernels(prior.params), strict=True):
        assert abs(np.corrcoef(fixed, own)[0, 1]) < 4.5 / np.sqrt(len(own))
    jax.tree.map(np.testing.assert_array_equal, prior.params, model.init(key).params)


def test_an_own_objective_is_pulled_too(key):
    def objective(variables, batch, key, step):
        return 3 * variables.params.sum(), (variables.stats, {"loss": jnp.float32(0)})

    method = anchored(
        linear_model(3),
        bc.homoscedastic(1.0),
        optax.sgd(1.0),
        num_data=50,
        prior_precision=4.0,
        objective=objective,
    )
    state = method.init(key, None)
    new, _ = jax.jit(method.update)(state, flat_batch(5, 3), key)
    before = state.variables.params
    np.testing.assert_allclose(new.variables.params, before - 3 + 0.08 * (state.opt_state[0] - before), rtol=1e-5)


def test_precision_as_a_setting_of_each_member(key):
    """A member of precision 100 has anchors a tenth as wide, and is pulled a hundred times as hard."""
    build = lambda own: anchored(
        linear_model(3), bc.homoscedastic(1.0), optax.sgd(1.0), num_data=50, prior_precision=own
    )

    def run(precision):
        method = build(precision)
        state = method.init(key, None)
        return state, method.update(state, flat_batch(5, 3), key)[0]

    before, after = jax.jit(jax.vmap(run))(jnp.array([0.25, 25.0]))
    anchor, params = before.opt_state[0], before.variables.params
    np.testing.assert_allclose(anchor[0], 10 * anchor[1], rtol=1e-6)
    pull = jnp.array([0.25, 25.0])[:, None, None] / 50
    np.testing.assert_allclose(after.variables.params - params, pull * (anchor - params), rtol=1e-4)
    assert bc.ensemble(build, settings=jnp.array([0.25, 25.0])).members.number == 2


def test_a_randomised_prior_is_an_anchor_for_linear_networks(key):
    """Trained weights + scale * prior's = P^-1 (X'y / noise + precision * scale * prior's)."""
    scale = 1.5
    model = with_prior(linear_model(), scale=scale)
    method = bc.map_estimate(model, bc.homoscedastic(NOISE), DESCENT, prior_precision=PRIOR, num_data=ROWS)
    both = bc.ensemble(method, 2)
    state = trained(both, key).members
    anchors = scale * state.variables.stats.prior.params[..., 0]
    assert (anchors[0] != anchors[1]).all()
    whole = state.variables.params[..., 0] + anchors
    np.testing.assert_allclose(whole, solution(anchors), rtol=1e-4, atol=1e-5)
    pred = bc.predict(method, jax.tree.map(lambda x: x[0], state), np.eye(FEATURES, dtype=np.float32), None)
    np.testing.assert_allclose(pred.mean[0, :, 0], whole[0], rtol=1e-5, atol=1e-6)


def test_outputs_are_the_sum_and_keys_are_the_networks_own(key):
    """Dropout in the network alone; batch norm of the prior stays as it was made."""
    base = linen_model()
    model = with_prior(base, scale=2.0)
    inputs = jnp.asarray(blobs().inputs)
    variables = jax.jit(model.init)(key)
    network, prior = bc.Variables(variables.params, variables.stats.network), variables.stats.prior
    fixed = 2 * base.apply(prior, inputs, None)
    for k in (None, key):
        expected = base.apply(network, inputs, k) + fixed
        np.testing.assert_allclose(model.apply(variables, inputs, k), expected, rtol=1e-5, atol=1e-6)
    outputs, stats, _ = jax.jit(model.train)(variables, inputs, key)
    own, own_stats, _ = jax.jit(base.train)(network, inputs, key)
    np.testing.assert_allclose(outputs, own + fixed, rtol=1e-5, atol=1e-6)
    for kept, before in ((stats.prior, prior), (stats.network, own_stats)):
        jax.tree.map(np.testing.assert_array_equal, kept, before)
    different = jax.tree.map(lambda a, b: (a != b).any(), stats.network, variables.stats.network)
    assert any(jax.tree.leaves(different)), "the network's own moments do move"
    assert model.features is None and model.head is None


def test_the_prior_is_never_trained(key):
    model = with_prior(pure_model(), scale=1.0)
    method = bc.map_estimate(model, bc.Categorical, optax.adamw(0.1, weight_decay=0.5))
    start = method.init(key, None)
    fitted = bc.fit(method, blobs(), key, epochs=3, batch_size=10, start=start, progress=False).state
    jax.tree.map(np.testing.assert_array_equal, fitted.variables.stats.prior, start.variables.stats.prior)
    assert (fitted.variables.params["w"] != start.variables.params["w"]).all()
    assert (start.variables.params["w"] != start.variables.stats.prior.params["w"]).all()


def test_scale_as_a_setting_of_each_member_and_outputs_in_parts(key):
    base = pure_model()
    two = base._replace(apply=lambda v, x, k: {"a": base.apply(v, x, k), "b": x})
    inputs = jnp.ones((2, 4))
    outputs = jax.vmap(lambda s: (model := with_prior(two, scale=s)).apply(model.init(key), inputs, None))(
        jnp.array([1.0, 3.0])
    )
    np.testing.assert_allclose(outputs["b"], [2 * inputs, 4 * inputs])
    assert (outputs["a"][0] != outputs["a"][1]).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linear(prior_precision=0.0), "`prior_precision` must be positive, got 0.0"),
        (lambda: linear(prior_precision={"w": 1.0, "b": -1.0}), "`prior_precision` must be positive, got -1.0"),
        (
            lambda: linear(prior_precision={"w": 1.0}).init(jax.random.key(0), None),
            r"`prior_precision` must be one number, or a pytree .*, PyTreeDef\(\*\), got PyTreeDef\({'w': \*}\)",
        ),
        (
            lambda: linear(prior_precision=np.ones(20)),
            r"`prior_precision` must be one number, got shape \(20,\)\. Give",
        ),
        (lambda: with_prior(pure_model(), scale=np.ones(3)), r"`scale` must be one number, got shape \(3,\)\. Scale"),
        (lambda: linear(num_data=0), "`num_data` must be positive, got 0"),
        (lambda: with_prior(pure_model(), scale=0.0), "`scale` must be positive, got 0.0"),
    ],
)
def test_bad_settings(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_key_for_a_network_without_dropout(key):
    model = with_prior(bc.models.mlp(4, (8,), 3), scale=1.0)
    with pytest.raises(ValueError, match="`key` was given to a network without a random stream"):
        model.apply(model.init(key), jnp.ones((2, 4)), key)
