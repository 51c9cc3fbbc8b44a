"""States that hold networks: too few to predict from are refused, and `refresh` takes each of a finite set once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows
from methods import blobs, pure_model

import bayescal as bc

pytestmark = pytest.mark.core
SGD = optax.sgd(0.05)
PRIOR = {"num_data": 30, "prior_precision": 1.0}


def chain(**settings):
    return bc.sgld(
        pure_model(), bc.Categorical, **{**PRIOR, "step_size": 1e-3, "burn_in": 0, "num_samples": 8, **settings}
    )


def run(method, key, updates):
    """States after each update on all rows, the first one first."""
    update, states, batch = jax.jit(method.update), [method.init(key, None)], all_rows(blobs())
    for k in jax.random.split(key, updates):
        states.append(update(states[-1], batch, k)[0])
    return states


SAMPLERS = {
    "sgld": lambda: (chain(burn_in=6), 7),
    "nuts": lambda: (bc.nuts(pure_model(), bc.Categorical, **PRIOR, warmup=6, num_samples=2), 7),
    "mclmc": lambda: (bc.mclmc(pure_model(), bc.Categorical, **PRIOR, warmup=6, num_samples=2), 7),
    "swag": lambda: (bc.swag(pure_model(), bc.Categorical, SGD, num_draws=2, burn_in=5, every=1), 7),
    "swa": lambda: (bc.swa(pure_model(), bc.Categorical, SGD, burn_in=6, every=1), 7),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_without_a_posterior_are_refused(name, key):
    """One update before there is one, and after it; `predict` of the method itself goes on as it may inside `fit`."""
    (method, updates), inputs = SAMPLERS[name](), blobs().inputs[:3]
    *_, before, after = run(method, key, updates)
    with pytest.raises(ValueError, match=r"got too few\. Train for more: `burn_in`, .* updates, not epochs"):
        bc.predict(method, before, inputs, key)
    assert not before.ready and after.ready
    for pred in (bc.predict(method, after, inputs, key), method.predict(before, inputs, key)):
        assert np.isfinite(pred.logits).all()


def test_members_without_a_sample_are_named(key):
    """Where some members hold samples; those that are not alive weigh nothing, and need none."""
    method, inputs = chain(burn_in=4), blobs().inputs[:3]
    states = run(method, key, 5)
    both = jax.tree.map(lambda *x: jnp.stack(x), states[5], states[4], states[3])
    members, ensemble = lambda *alive: bc.EnsembleState(both, jnp.array(alive)), bc.ensemble(method, 3)
    with pytest.raises(ValueError, match=r"got too few in members \[1, 2\]\."):
        bc.predict(ensemble, members(True, True, True), inputs, key)
    with pytest.raises(ValueError, match=r"got too few in members \[2\]\."):
        bc.predict(ensemble, members(True, False, True), inputs, key)
    assert bc.predict(ensemble, members(True, False, False), inputs, key).num_members == 24


def test_samples_of_a_chain_are_taken_once_each(key):
    """All of them, or evenly spaced; never one twice."""
    states = run(chain(), key, 11)
    after = lambda number: bc.refresh(chain(), pure_model(), bc.Categorical, num_draws=number)
    state, full = states[6], states[11]
    kernels = np.asarray(state.samples.params["w"])
    np.testing.assert_array_equal(after(6).init(key, state).networks.params["w"], kernels[:6])
    np.testing.assert_array_equal(jax.jit(after(3).init)(key, state).networks.params["w"], kernels[[0, 2, 4]])
    with pytest.raises(ValueError, match=r"`num_draws` must be at most .* `start` holds, 6, got 7: .* Take fewer"):
        after(7).init(key, state)
    with pytest.raises(ValueError, match="holds, 8, got 9"):
        jax.jit(after(9).init)(key, state)
    with pytest.raises(
        ValueError, match="`loss` must stay finite"
    ):  # `fit` knows the number kept as little as jit does
        bc.fit(after(7), blobs(), key, epochs=1, batch_size=30, start=state, progress=False)
    assert len(np.unique(after(8).init(key, full).networks.params["w"], axis=0)) == 8


def test_particles_are_taken_once_each_with_their_own_moments(key):
    model = bc.models.mlp(4, (6, 6), 3, batch_norm=True)
    particles = bc.svgd(model, bc.Categorical, SGD, num_data=30, num_particles=4, prior_precision=1.0)
    state = particles.init(key, None)
    shifted = jax.tree.map(lambda x: x + jnp.arange(4.0).reshape(4, *[1] * (x.ndim - 1)), state.variables.stats)
    state = state._replace(variables=state.variables._replace(stats=shifted))
    for number, places in ((4, [0, 1, 2, 3]), (2, [0, 2])):
        networks = bc.refresh(particles, model, bc.Categorical, num_draws=number).init(key, state).networks
        jax.tree.map(
            lambda a, b, at=places: np.testing.assert_array_equal(a, b[np.array(at)]), networks, state.variables
        )
    with pytest.raises(ValueError, match=r"`num_draws` must be at most .* holds, 4, got 5"):
        bc.refresh(particles, model, bc.Categorical, num_draws=5).init(key, state)


def test_draws_of_a_posterior_that_is_none_are_refused(key):
    model = pure_model()
    method = bc.swag(model, bc.Categorical, SGD, num_draws=2, burn_in=1, every=1)
    after = bc.refresh(method, model, bc.Categorical, num_draws=2)
    state = after.init(key, method.init(key, None))
    with pytest.raises(ValueError, match="`state` must hold what its posterior is made of"):
        bc.predict(after, state, blobs().inputs, key)
    assert bc.predict(after, after.init(key, run(method, key, 5)[-1]), blobs().inputs, key).num_members == 2
