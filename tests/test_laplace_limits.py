"""Laplace where it is easily wrong without a word: few digits, shared weights, likelihoods that do more than pass on."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows
from exact import FEATURES, NOISE, ROWS, exact_posterior, linear_data, linear_model
from flax import nnx
from test_laplace import by_hand, digits, look, passed

import bayescal as bc
from bayescal.methods.laplace.structures import eigen

pytestmark = pytest.mark.core


def test_low_rank_keeps_its_digits_where_the_data_say_much_more_than_the_prior(key):
    """In float32, with curvature 2e7 times the prior precision."""
    data = linear_data()
    noise, prior = 1e-3, 1e-2
    exact = exact_posterior(data, prior=prior, noise=noise)
    start = bc.Variables(jnp.asarray(exact.mean[:, None], jnp.float32))
    settings = dict(num_data=ROWS, structure=bc.low_rank(20), prior_precision=prior)
    method = bc.laplace(linear_model(), bc.homoscedastic(noise), **settings)
    state = passed(method, data, start, key, 50)
    pred = bc.predict(method, state, np.eye(FEATURES, dtype=np.float32), key)
    np.testing.assert_allclose(pred.mean_variance[0, :, 0], np.diag(exact.covariance), rtol=1e-3)


def test_rounding_is_not_indefinite():
    """Factors of a softmax are singular, and float32 sums over many rows leave their zero below zero."""
    found = eigen(
        jnp.array([[8.148349, -5.277674, -2.87068], [-5.277674, 10.514626, -5.236957], [-2.87068, -5.236957, 8.107634]])
    )
    assert found.values.min() == 0 and found.values.max() > 10
    assert np.isnan(eigen(jnp.diag(jnp.array([1.0, -0.01]))).values).all()


def test_sums_are_wide_where_parameters_are_not(key):
    """bfloat16 parameters: the diagonal of many rows is that of float32 to bfloat16's digits of a row, and not of the sum."""
    data = linear_data(4000, 4)
    for structure in (bc.diagonal(), bc.full(), bc.low_rank(4)):
        states = []
        for dtype in (jnp.float32, jnp.bfloat16):
            settings = dict(num_data=4000, structure=structure, prior_precision=1.0)
            start = bc.Variables(jnp.full((4, 1), 0.25, dtype))
            method = bc.laplace(linear_model(4), bc.homoscedastic(NOISE), **settings)
            states.append(passed(method, bc.Dataset(data.inputs.astype(dtype), data.targets), start, key, 16))
        totals = [np.asarray(jax.tree.leaves(s.spectrum)[0], float).sum() for s in states]
        np.testing.assert_allclose(totals[1], totals[0], rtol=5e-3)
        assert method.draw(states[1], key).params.dtype == jnp.bfloat16


@pytest.mark.parametrize("likelihood", [bc.one_logit, bc.Categorical])
def test_the_empirical_fisher_is_that_of_a_loop_and_one_logit_has_its_own(likelihood, key):
    rng = np.random.default_rng(2)
    inputs, targets = rng.normal(size=(9, 3)).astype(np.float32), rng.integers(0, 2, 9).astype(np.int32)
    one = likelihood is bc.one_logit
    model, data = bc.models.mlp(3, (4,), 1 if one else 2), bc.Dataset(inputs, targets)
    variables = model.init(key)
    flat, unravel = jax.flatten_util.ravel_pytree(variables.params)
    outputs = lambda flat, n: model.apply(bc.Variables(unravel(flat)), inputs[n : n + 1], None)
    settings = dict(num_data=9, structure=bc.full(), prior_precision=1.0)

    log_prob = lambda flat, n: likelihood(outputs(flat, n)[None]).log_prob(targets[n : n + 1])[0]
    gradients = np.stack([np.asarray(jax.grad(log_prob)(flat, n), float) for n in range(9)])
    fisher = bc.laplace(model, likelihood, curvature=bc.empirical_fisher, **settings)
    np.testing.assert_allclose(
        by_hand(fisher, data, variables, key).sums, gradients.T @ gradients, rtol=1e-4, atol=1e-5
    )
    method = bc.laplace(model, likelihood, **settings)
    state = by_hand(method, data, variables, key)
    pred = method.predict(state, inputs, None)
    mean, covariance = bc.laplace(model, likelihood, predictive=look, **settings).predict(state, inputs, None)
    if one:
        jacobians = np.stack([np.asarray(jax.jacrev(outputs)(flat, n), float)[0, 0] for n in range(9)])
        slope = np.exp(-mean[:, 0]) / (1 + np.exp(-mean[:, 0])) ** 2
        np.testing.assert_allclose(
            state.sums, np.einsum("n,np,nq->pq", slope, jacobians, jacobians), rtol=1e-4, atol=1e-5
        )
        expected = mean[:, 0] / np.sqrt(1 + np.pi / 8 * covariance[:, 0, 0])
        np.testing.assert_allclose(pred.logits[0], expected, rtol=1e-5)


@pytest.mark.parametrize("predictive", [bc.probit, bc.bridge])
def test_what_the_likelihood_does_to_the_outputs_is_in_the_variance(predictive, key):
    """Three times the logits, in the network or in the likelihood, is the same posterior and the same prediction."""
    net, data = bc.models.mlp(36, (4,), 3), digits()
    tripled = net._replace(apply=lambda v, x, k: 3 * net.apply(v, x, k))
    settings = dict(num_data=24, structure=bc.diagonal(), prior_precision=1.0, predictive=predictive)
    inside = bc.laplace(tripled, bc.Categorical, **settings)
    outside = bc.laplace(net, lambda outputs: bc.Categorical(3 * outputs), **settings)
    variables = jax.jit(net.init)(key)
    one, two = (m.predict(by_hand(m, data, variables, key), data.inputs, None) for m in (inside, outside))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_noise_is_scaled_only_where_it_divides_the_curvature(key):
    data, net = linear_data(), bc.models.mlp(FEATURES, (3,), 2)
    base = dict(num_data=ROWS, structure=bc.diagonal(), prior_precision=1.0)
    for method, start in (
        (bc.laplace(net, bc.heteroscedastic, **base), None),
        (bc.laplace(linear_model(), bc.homoscedastic(NOISE), curvature=bc.empirical_fisher, **base), None),
    ):
        with pytest.raises(TypeError, match=r"`noise` needs normal noise of a fixed variance, and `ggn`"):
            bc.fit_prior_precision(method, passed(method, data, start, key), noise=True)
    settings = dict(base, burn_in=0, every=2, noise=True)
    classes = bc.marginal_likelihood_training(bc.models.mlp(36, (4,), 3), bc.Categorical, optax.adam(0.1), **settings)
    with pytest.raises(TypeError, match=r"`noise` needs normal noise of a fixed variance, and `ggn`"):
        classes.update(classes.init(key), all_rows(digits()), key)


def test_a_tuned_noise_is_handed_on(key):
    data = linear_data()
    base = dict(num_data=ROWS, structure=bc.full(), prior_precision=1.0)
    train = bc.marginal_likelihood_training(
        linear_model(), bc.homoscedastic(4.0), optax.adam(0.05), burn_in=60, every=5, noise=True, **base
    )
    state = bc.fit(train, data, key, epochs=100, batch_size=ROWS, progress=False).state
    assert 0.5 * NOISE < 4.0 * state.noise_scale < 1.5 * NOISE
    method = bc.laplace(linear_model(), bc.homoscedastic(4.0), **base)
    after = passed(method, data, state, key)
    assert after.noise_scale == state.noise_scale
    np.testing.assert_allclose(
        bc.predict(method, after, data.inputs[:2], key).variance, 4 * state.noise_scale, rtol=1e-6
    )


def test_several_members_a_network_are_refused(key):
    heads = lambda outputs: bc.Categorical(jnp.concatenate([outputs[..., :3], outputs[..., 3:]]))
    model, data = bc.models.mlp(36, (4,), 6), digits()
    settings = dict(num_data=24, structure=bc.diagonal(), prior_precision=1.0)
    with pytest.raises(
        TypeError, match=r"`likelihood` must give one member a network for `ggn`, got 2.*`sampled\(20\)`"
    ):
        by_hand(bc.laplace(model, heads, **settings), data, model.init(key), key)
    own = bc.laplace(model, heads, curvature=bc.empirical_fisher, predictive=bc.sampled(2), **settings)
    assert own.predict(by_hand(own, data, model.init(key), key), data.inputs, key).num_members == 4


class Tied(nnx.Module):
    """Two layers with one kernel; or one that is used again by hand; or one fed with what all rows share."""

    def __init__(self, how, rngs):
        self.how = how
        self.a, self.b = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2))
        if how == "shared":
            self.b.kernel = self.a.kernel
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        if self.how == "by hand":
            return self.head(nnx.relu(self.a(x)) @ self.a.kernel[...].T + self.b(x))
        if self.how == "shared":
            return self.head(self.b(nnx.relu(self.a(x))))
        return self.head(nnx.relu(self.a(x)) + self.b(jnp.eye(4)).sum(0))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shared", "one matrix product|2 uses of 'a'"),
        ("by hand", "got 2 uses of 'a'"),
        ("table", "inputs that do not depend on the rows of 'b'"),
    ],
)
def test_kernels_that_are_used_otherwise_are_errors(how, message, key):
    model = bc.from_nnx(lambda rngs: Tied(how, rngs), head="head")
    data = bc.Dataset(np.ones((4, 4), np.float32), np.arange(4, dtype=np.int32) % 3)
    settings = dict(num_data=4, prior_precision=1.0)
    with pytest.raises(ValueError, match=message):
        by_hand(bc.laplace(model, bc.Categorical, structure=bc.kronecker(), **settings), data, model.init(key), key)
    if how == "table":  # of another size than the batch
        few = bc.Dataset(data.inputs[:3], data.targets[:3])
        with pytest.raises(
            ValueError, match=r"one matrix product for each of the 3 rows, got 'b' .* inputs of shape \(4, 4\)"
        ):
            by_hand(bc.laplace(model, bc.Categorical, structure=bc.kronecker(), **settings), few, model.init(key), key)
    right = bc.laplace(model, bc.Categorical, structure=bc.full(), **settings)
    assert np.isfinite(by_hand(right, data, model.init(key), key).spectrum.values).all()


@pytest.mark.parametrize("structure", [bc.full(), bc.low_rank(2)], ids=["full", "low_rank"])
def test_one_prior_precision_a_layer_is_refused_wherever_it_is_used(structure, key):
    model, data = bc.models.mlp(36, (4,), 2), digits(classes=2)
    method = bc.laplace(model, bc.Categorical, num_data=24, structure=structure, prior_precision=np.ones(2))
    state = method.init(key)
    for use in (lambda: method.predict(state, data.inputs, key), lambda: method.draw(state, key)):
        with pytest.raises(ValueError, match=r"`prior_precision` must be one number for `.*`, got one for each of 2"):
            use()


def test_validation_weights_count(key):
    method = bc.laplace(
        linear_model(), bc.homoscedastic(NOISE), num_data=ROWS, structure=bc.full(), prior_precision=1.0
    )
    state = passed(method, linear_data(), linear_model().init(key), key)
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(40, FEATURES)).astype(np.float32)
    far = np.where(np.arange(40)[:, None] < 30, 30.0, 0.0)  # rows that ask for a wide posterior
    targets = (np.asarray(inputs @ state.variables.params) + far).astype(np.float32)
    weights = (np.arange(40) >= 30).astype(np.float32)
    weighed = bc.select_prior_precision(method, state, bc.Dataset(inputs, targets, weights), key)
    alone = bc.select_prior_precision(method, state, bc.Dataset(inputs[30:], targets[30:]), key)
    everything = bc.select_prior_precision(method, state, bc.Dataset(inputs, targets), key)
    assert weighed.prior_precision == alone.prior_precision != everything.prior_precision


def test_a_curvature_that_was_not_decomposed_is_refused(key):
    method = bc.laplace(
        linear_model(), bc.homoscedastic(NOISE), num_data=ROWS, structure=bc.full(), prior_precision=1.0
    )
    state, _ = method.update(method.init(key), all_rows(linear_data()), key)
    with pytest.raises(
        ValueError, match=r"after the end of an epoch, got a curvature of \[0.0\] rows.*`method.end_epoch"
    ):
        bc.fit_prior_precision(method, state)
    for early in (method.init(key), state):
        with pytest.raises(ValueError, match=r"curvature of an epoch that is over\), got too few.*`method.end_epoch`"):
            bc.predict(method, early, linear_data().inputs, key)
    whole = bc.fit_prior_precision(method, method.end_epoch(state))
    assert np.isfinite(bc.predict(method, whole, linear_data().inputs, key).mean_variance).all()


@pytest.mark.parametrize("name", ["laplace", "marginal_likelihood_training"])
def test_a_pass_that_was_cut_off_goes_on_to_the_same_bits(name, key, tmp_path):
    """The last epoch's checkpoint is taken away, and the epoch made again."""
    model, data = bc.models.mlp(36, (4,), 3), digits()
    prior = dict(num_data=24, structure=bc.kronecker(), prior_precision=1.0)
    method = {
        "laplace": lambda: bc.laplace(model, bc.Categorical, **prior),
        "marginal_likelihood_training": lambda: bc.marginal_likelihood_training(
            model, bc.Categorical, optax.adam(1e-2), burn_in=0, every=2, **prior
        ),
    }[name]()

    def fit():
        checkpoint = bc.Checkpoint(tmp_path, every=1)
        return bc.fit(method, data, key, epochs=3, batch_size=10, progress=False, checkpoint=checkpoint)

    whole = fit()
    shutil.rmtree(tmp_path / "steps" / "3")
    again = fit()
    assert again.seconds["epochs"] == 1
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
