"""Diagnostics of chains against numpyro's, ranks of scipy's, and autoregressions whose effective sample size is known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import NOISE, PRIOR, ROWS, linear_data, linear_model
from scipy.stats import norm, rankdata

import bayescal as bc
from bayescal.methods.chains import ChainDiagnostics, chain_diagnostics, chain_values
from bayescal.methods.langevin import sgld
from bayescal.methods.samples import Samples, keep, no_samples

pytestmark = pytest.mark.core


class Chain(NamedTuple):
    """A state with samples, as a sampler of one's own may have."""

    variables: bc.Variables
    samples: Samples


MODEL = bc.Model(lambda key: None, lambda v, x, key: v.params[None, :] * x, lambda v, x, key: None)
ONE = np.ones((1, 1), np.float32)  # outputs are the params


def chains(values, alive=None, count=None):
    """The state of an ensemble of chains that kept `values` (chain, sample, value)."""
    values = jnp.asarray(values, jnp.float32)
    number = values.shape[0]
    counts = jnp.full(number, values.shape[1]) if count is None else jnp.asarray(count)
    state = Chain(bc.Variables(values[:, -1]), Samples(values, counts.astype(jnp.int32)))
    return bc.EnsembleState(state, jnp.ones(number, bool) if alive is None else jnp.asarray(alive))


def diagnose(values, **settings):
    return chain_diagnostics(MODEL, chains(values, **settings), ONE)


def autoregression(rho, *shape, seed=0):
    """(chain, sample, value), stationary, of variance 1 and lag-one correlation rho."""
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(shape[0], shape[2]))]
    for _ in range(shape[1] - 1):
        x.append(rho * x[-1] + np.sqrt(1 - rho**2) * rng.normal(size=x[0].shape))
    return np.stack(x, 1)


def ranked(x):
    """Normal quantiles of pooled ranks, value by value: Vehtari et al.'s equation 14."""
    size = x.shape[0] * x.shape[1]
    out = np.empty(x.shape)
    for v in range(x.shape[2]):
        out[..., v] = norm.ppf((rankdata(x[..., v].ravel()) - 3 / 8) / (size + 1 / 4)).reshape(x.shape[:2])
    return out


def test_r_hat_is_numpyros_of_ranks():
    """Ranks by scipy, halves and ratio by numpyro; chains that differ in place, in scale, in time, and not at all."""
    from numpyro.diagnostics import split_gelman_rubin

    x = autoregression(0.5, 4, 100, 4).astype(np.float32)
    x[0, :, 0] += 1
    x[1, :, 1] *= 4
    x[:, 50:, 2] += 1.5
    got = diagnose(x)
    folded = abs(x - np.median(x, (0, 1)))
    parts = np.stack([split_gelman_rubin(ranked(x)), split_gelman_rubin(ranked(folded))])
    np.testing.assert_allclose(got.r_hat, parts.max(0), rtol=1e-4)
    assert parts[1, 1] > parts[0, 1] and (got.r_hat[:3] > 1.05).all() and got.r_hat[3] < 1.03
    assert (got.chains, got.samples) == (4, 100)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_effective_size_of_an_autoregression(rho):
    """n (1 - rho) / (1 + rho) for each of 40 independent values; and numpyro's, which cuts its sums a little elsewhere.

    With K lags summed, about twice the correlation time, one estimate has a relative sd of sqrt(2 (2 K + 1) / n): 14 % for
    rho = 0.9. Of the mean over 40 values four standard errors are 2.2, 4.1 and 8.8 %.
    """
    from numpyro.diagnostics import effective_sample_size

    x = autoregression(rho, 4, 2000, 40, seed=1)
    got = diagnose(x)
    time = (1 + rho) / (1 - rho)
    assert abs(got.ess.mean() / (8000 / time) - 1) < 4 * np.sqrt(2 * (4 * time + 1) / 8000 / 40)
    halves = np.concatenate([x[:, :1000], x[:, 1000:]]).astype(np.float32)
    np.testing.assert_allclose(got.ess, effective_sample_size(ranked(halves)), rtol=0.03)
    worst = got.worst()
    assert worst["ess"].value == got.ess.min() and worst["r_hat"].value == got.r_hat.max() < 1.04


def test_increasing_functions_change_nothing():
    x = autoregression(0.5, 4, 100, 4).astype(np.float32)
    once, again = diagnose(x), diagnose(np.exp(x))
    np.testing.assert_allclose(once.ess, again.ess, rtol=1e-5)
    order = diagnose(x[::-1])
    np.testing.assert_allclose(once.r_hat, order.r_hat, rtol=1e-5)
    np.testing.assert_allclose(once.ess, order.ess, rtol=1e-4)


def test_chains_that_do_not_move():
    """One of four stuck: R-hat > 1.5 and hardly a draw. All stuck in places of their own: infinite. All in one: undefined."""
    x = autoregression(0.2, 4, 100, 4)
    x[0, :, 0] = 3.0
    x[:, :, 1] = np.arange(4)[:, None]
    x[:, :, 2] = 0.1
    got = diagnose(x)
    assert got.r_hat[0] > 1.5 and 0 < got.ess[0] < 20
    assert got.r_hat[1] == np.inf and got.ess[1] == 0
    assert np.isnan(got.r_hat[2]) and np.isnan(got.ess[2])
    assert got.r_hat[3] < 1.05 and got.ess[3] > 150
    assert np.isnan(got.worst()["r_hat"].value) and np.isnan(got.worst()["ess"].value)


@pytest.mark.parametrize("samples", [100, 101])
def test_nan_stays_where_it_is(samples):
    """In the last sample too, which an odd number leaves out of the halves."""
    x = autoregression(0.2, 4, samples, 4)
    x[1, -1, 1] = np.nan
    got = diagnose(x)
    np.testing.assert_array_equal(np.isnan(got.r_hat), [False, True, False, False])
    np.testing.assert_array_equal(np.isnan(got.ess), [False, True, False, False])


def test_a_lone_chain_and_a_single_value():
    """A drift shows between its halves; the one value keeps its axis."""
    x = autoregression(0.0, 1, 200, 1)
    x += np.linspace(0, 4, 200)[None, :, None]
    state = jax.tree.map(lambda leaf: leaf[0], chains(x).members)
    got = chain_diagnostics(MODEL, state, ONE)
    assert got.r_hat.shape == got.ess.shape == (1,) and got.r_hat[0] > 1.5 and got.chains == 1
    np.testing.assert_array_equal(got.r_hat, diagnose(x).r_hat)


def test_samples_are_read_in_order_of_time():
    """A ring of 5 slots after 0 to 13 samples; order is what autocorrelations see."""
    samples, held = no_samples(jnp.zeros(1), 5), []
    for i in range(13):
        samples = keep(samples, jnp.full(1, float(i)), jnp.array(True))
        held = [*held, i][-5:]
        if len(held) >= 4:
            values = chain_values(MODEL, Chain(bc.Variables(jnp.zeros(1)), samples), ONE)
            np.testing.assert_array_equal(values[0, :, 0], held)


def test_values_are_what_the_networks_compute(key):
    """Of chains from `fit`, in the order in which they were kept; a chain that is not alive is left out."""
    model, data = linear_model(), linear_data()
    settings = dict(num_data=ROWS, prior_precision=PRIOR, step_size=3e-4, num_samples=8, burn_in=4)
    method = bc.ensemble(sgld(model, bc.homoscedastic(NOISE), **settings), 3)
    state = bc.fit(method, data, key, epochs=15, batch_size=200, progress=False).state
    assert state.members.samples.count.tolist() == [11] * 3
    values = chain_values(model, state, data.inputs[:6])
    assert values.shape == (3, 8, 6)
    params = np.asarray(state.members.samples.params)
    for chain in range(3):
        for sample in range(8):
            np.testing.assert_allclose(
                values[chain, sample], data.inputs[:6] @ params[chain, (11 + sample) % 8, :, 0], rtol=1e-4, atol=1e-5
            )
    last = jax.jit(jax.vmap(lambda v: model.apply(v, data.inputs[:6], None)[:, 0]))(state.members.variables)
    np.testing.assert_allclose(values[:, -1], last, rtol=1e-5, atol=1e-6)  # where the chains are is what they kept last
    some = chain_values(model, state._replace(alive=jnp.array([True, False, True])), data.inputs[:6])
    np.testing.assert_array_equal(some, values[jnp.array([0, 2])])
    assert chain_diagnostics(model, state, data.inputs[:6]).chains == 3


def test_outputs_of_several_leaves():
    model = MODEL._replace(apply=lambda v, x, key: {"a": v.params[None, :1] * x, "b": v.params[None, 1:] * x})
    x = autoregression(0.1, 2, 6, 3).astype(np.float32)
    np.testing.assert_array_equal(chain_values(model, chains(x), ONE), x)


def test_json():
    got = ChainDiagnostics(np.array([1.0, 1.2]), np.array([90.0, 40.0]), 2, 50).json()
    assert (got["r_hat"]["value"], got["ess"]["value"], got["ess"]["n"]) == (1.2, 40.0, 100)
    assert "rank-normalised split R-hat" in got["r_hat"]["convention"] and "2 chains of 50" in got["ess"]["convention"]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (lambda x: chains(x[:, :3]), ValueError, "^`state` must hold at least 4 samples a chain, got 3. Run on"),
        (lambda x: chains(x, count=[0, 0]), ValueError, "^`state` must hold at least 4 samples a chain, got 0. Run on"),
        (
            lambda x: chains(x, count=[5, 9]),
            ValueError,
            r"^`state` must hold as many samples in every chain, got \[5, 8\]. Run",
        ),
        (
            lambda x: chains(x, alive=[False, False]),
            ValueError,
            "^`state` must have a chain that is alive, got 2 that diverged. Take",
        ),
        (
            lambda x: jax.tree.map(lambda leaf: leaf[None], chains(x)),
            ValueError,
            r"^`state` must be of one experiment, got chains of shape \(1, 2\). Take one",
        ),
        (
            lambda x: bc.Variables(jnp.ones(3)),
            TypeError,
            "^`state` must be a chain's, or an ensemble's of chains, got Variables without samples. Pass",
        ),
    ],
)
def test_errors(state, error, message, unchecked):
    with pytest.raises(error, match=message):
        chain_diagnostics(MODEL, state(autoregression(0.1, 2, 8, 3)), ONE)
