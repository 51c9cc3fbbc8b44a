"""Networks of a variational posterior: the central one, their precision and stats, derivatives by the vector of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows
from exact import linear_model
from jax.flatten_util import ravel_pytree
from methods import blobs
from test_variational import NET, classes, one_batch

import bayescal as bc
from bayescal.methods.variational_family import by_parts

pytestmark = pytest.mark.core


@pytest.mark.slow
def test_its_central_network_is_where_others_start(key):
    """`draw(state, None)`, which is also what `key=None` predicts by; of an ensemble's members under vmap."""
    method = classes(model=NET, guide=bc.guides.low_rank(2))
    state = jax.jit(method.update)(method.init(key, None), all_rows(blobs()), key)[0]
    centre, inputs = method.draw(state, None), jnp.asarray(blobs().inputs)
    np.testing.assert_array_equal(method.predict(state, inputs, None).logits[0], NET.apply(centre, inputs, None))
    still, laplace = optax.sgd(0.0), {"structure": bc.diagonal(), "prior_precision": 1.0}
    for after in (
        bc.map_estimate(NET, bc.Categorical, still),
        bc.laplace(NET, bc.Categorical, num_data=30, **laplace),
        bc.variational(NET, bc.Categorical, still, num_data=30, num_draws=2),
    ):
        started = bc.fit(after, blobs(), key, epochs=1, batch_size=10, start=centre, progress=False).state
        own = after.draw(started, None) if hasattr(started, "posterior") else started.variables
        jax.tree.map(np.testing.assert_array_equal, own, centre)
    members = bc.ensemble(method, 2).init(key, None).members
    centres = jax.vmap(method.draw, (0, None))(members, None)
    for m in range(2):
        lone = method.draw(jax.tree.map(lambda x, m=m: x[m], members), None)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, m=m: x[m], centres), lone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(key, dtype):
    """The posterior is in float32, and so is its KL, of 32,000 weights beyond what float16 holds; networks are in their own."""
    init = lambda key: bc.Variables(0.1 * jax.random.normal(key, (32_000, 1), dtype))
    model = linear_model()._replace(init=init)
    method = bc.variational(model, bc.homoscedastic(1.0), optax.adam(1e-3), num_data=50, num_draws=2)
    state = method.init(key, None)
    m = np.asarray(init(key).params, float)
    expected = np.sum(-np.log(0.01) + (0.01**2 + m**2) / 2 - 0.5)
    new, info = jax.jit(method.update)(state, one_batch(2, 32_000), key)
    np.testing.assert_allclose(info["kl"], expected, rtol=1e-5)
    for x in jax.tree.leaves((state.posterior, new.posterior, info)):
        assert x.dtype == jnp.float32 and np.isfinite(x).all()
    assert method.draw(new, key).params.dtype == method.draw(new, None).params.dtype == dtype


def test_stats_are_carried_from_step_to_step(key):
    """Of a posterior without width they are those that the network itself leaves."""
    model, batch = bc.models.mlp(4, (8,), 3, batch_norm=True), all_rows(blobs())
    method = classes(model=model, initial_scale=1e-7)
    new, _ = jax.jit(method.update)(method.init(key, None), batch, key)
    _, expected, _ = model.train(model.init(key), batch.inputs, key)
    jax.tree.map(lambda own, wanted: np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5), new.stats, expected)
    assert (new.stats["norm"][0]["mean"] != 0).all() and method.draw(new, key).stats is new.stats


@pytest.mark.slow
def test_weight_decay_of_the_rest_alone(key):
    """As the docstring has it: the posterior moves as by Adam, what has none also decays."""
    states = []
    for optimizer in (optax.adam(0.1), optax.adamw(0.1, weight_decay=0.5, mask=(False, True))):
        method = bc.variational(NET, bc.Categorical, optimizer, num_data=30, num_draws=1, subset=bc.last_layer(NET))
        states.append(jax.jit(method.update)(method.init(key, None), all_rows(blobs()), key)[0])
    plain, decayed = states
    jax.tree.map(np.testing.assert_array_equal, plain.posterior, decayed.posterior)
    before = NET.init(key).params["dense"][0]["kernel"]
    lost = plain.point["dense"][0]["kernel"] - decayed.point["dense"][0]["kernel"]
    np.testing.assert_allclose(lost, 0.1 * 0.5 * before, rtol=1e-3, atol=1e-6)


def test_the_derivative_of_the_network_by_the_vector():
    """Of leaves of several shapes: what training differentiates by gives what `ravel_pytree`'s own does, to the bit."""
    rng = np.random.default_rng(0)
    tree = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in zip("abcd", [(2, 3), (4,), (3, 2), ()])
    }
    factors = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)
    vector, unravel = ravel_pytree(tree)
    total = lambda unravel, v: sum(jax.tree.leaves(jax.tree.map(lambda f, x: (f * x**2).sum(), factors, unravel(v))))
    own, wanted = (jax.grad(total, argnums=1)(function, vector) for function in (by_parts(unravel), unravel))
    np.testing.assert_array_equal(own, wanted)
    np.testing.assert_array_equal(wanted, 2 * ravel_pytree(factors)[0] * vector)


def test_a_draw_in_forward_mode(key):
    """By its location and scale: 1, and sigmoid(raw scale) times the noise, which is (weight - location) / scale."""
    method = classes(model=NET, initial_scale=0.3)
    state = method.init(key, None)
    along = jax.tree.map(jnp.ones_like, state.posterior)
    drawn, moved = jax.jvp(lambda p: method.draw(state._replace(posterior=p), key).params, (state.posterior,), (along,))
    location, raw = (np.asarray(state.posterior[f"weights_auto_{name}"], float) for name in ("loc", "scale"))
    noise = (np.asarray(ravel_pytree(drawn)[0], float) - location) / np.log1p(np.exp(raw))
    np.testing.assert_allclose(ravel_pytree(moved)[0], 1 + noise / (1 + np.exp(-raw)), rtol=1e-4, atol=1e-5)
