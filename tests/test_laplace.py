"""Laplace approximations against closed forms and slow loops over rows."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bands import all_rows
from exact import FEATURES, NOISE, PRIOR, ROWS, exact_posterior, linear_data, linear_model

import bayescal as bc

pytestmark = pytest.mark.core
look = lambda posterior, inputs, key: (posterior.mean(inputs), posterior.covariance(inputs))


def passed(method, data, start, key, batch_size=None):
    """The state after one pass over the data."""
    batch_size = batch_size or len(data.targets)
    return bc.fit(method, data, key, epochs=1, batch_size=batch_size, start=start, progress=False).state


def by_hand(method, data, start, key):
    """The same without `fit`, which stays in float32."""
    return method.end_epoch(method.update(method.init(key, start), all_rows(data), key)[0])


def digits(rows=24, classes=3):
    rng = np.random.default_rng(5)
    return bc.Dataset(rng.normal(size=(rows, 6, 6, 1)).astype(np.float32), (np.arange(rows) % classes).astype(np.int32))


@pytest.mark.parametrize("batch_size", [200, 64])  # 64 does not divide the rows
@pytest.mark.parametrize("structure", [bc.full(), bc.diagonal()], ids=["full", "diagonal"])
def test_linear_regression(structure, batch_size, key):
    """Full: the posterior. Diagonal: its mean, and 1 / diagonal of its precision."""
    data = linear_data()
    exact = exact_posterior(data)
    start = bc.Variables(jnp.asarray(exact.mean[:, None], jnp.float32))
    settings = dict(num_data=ROWS, structure=structure, prior_precision=PRIOR)
    method = bc.laplace(linear_model(), bc.homoscedastic(NOISE), **settings)
    state = passed(method, data, start, key, batch_size)
    is_full = state.sums.ndim == 2
    covariance = exact.covariance if is_full else np.diag(1 / np.diag(exact.precision))
    asked = np.random.default_rng(1).normal(size=(30, FEATURES)).astype(np.float32)
    pred = bc.predict(method, state, asked, key)
    np.testing.assert_allclose(pred.mean[0, :, 0], asked @ exact.mean, rtol=1e-4, atol=1e-5)
    expected = np.einsum("bi,ij,bj->b", asked.astype(float), covariance, asked.astype(float))
    np.testing.assert_allclose(pred.mean_variance[0, :, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(pred.variance, NOISE, rtol=1e-6)
    np.testing.assert_allclose(bc.decompose(pred).epistemic[:, 0], expected, rtol=1e-5)
    if is_full:
        np.testing.assert_allclose(method.evidence(state), evidence(data, PRIOR, NOISE), rtol=1e-5)


def evidence(data, prior, noise):
    """log N(y | 0, noise I + X X^T / prior), nats."""
    inputs, targets = np.asarray(data.inputs, float), np.asarray(data.targets, float)[:, 0]
    covariance = noise * np.eye(len(targets)) + inputs @ inputs.T / prior
    return -0.5 * (targets @ np.linalg.solve(covariance, targets) + np.linalg.slogdet(2 * np.pi * covariance)[1])


def test_kronecker_is_exact_for_one_dense_layer_with_one_output(key):
    """With its bias: the posterior of the regression on [inputs, 1]."""
    data = linear_data()
    exact = exact_posterior(bc.Dataset(np.c_[data.inputs, np.ones(ROWS)], data.targets))
    layer = {
        "kernel": jnp.asarray(exact.mean[:-1, None], jnp.float32),
        "bias": jnp.asarray(exact.mean[-1:], jnp.float32),
    }
    model = bc.models.mlp(FEATURES, (), 1)
    method = bc.laplace(model, bc.homoscedastic(NOISE), num_data=ROWS, structure=bc.kronecker(), prior_precision=PRIOR)
    state = passed(method, data, bc.Variables({"head": layer}), key, 64)
    asked = np.random.default_rng(1).normal(size=(30, FEATURES)).astype(np.float32)
    pred = bc.predict(method, state, asked, key)
    one = np.c_[asked, np.ones(30)].astype(float)
    np.testing.assert_allclose(pred.mean[0, :, 0], one @ exact.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        pred.mean_variance[0, :, 0], np.einsum("bi,ij,bj->b", one, exact.covariance, one), rtol=1e-5
    )
    draws = jax.vmap(lambda k: method.draw(state, k).params["head"]["kernel"][:, 0])(jax.random.split(key, 20_000))
    # a variance of 20,000 draws has a relative error of 1 %: 4.5 of them for 20
    np.testing.assert_allclose(np.cov(draws.T), exact.covariance[:-1, :-1], atol=0.045 * exact.covariance.max())
    np.testing.assert_allclose(draws.var(0), np.diag(exact.covariance)[:-1], rtol=0.045)


def test_low_rank_is_exact_where_the_curvature_has_no_more(key):
    data = linear_data(dtype=np.float64)
    exact = exact_posterior(data)
    with jax.enable_x64(True):
        start = bc.Variables(jnp.asarray(exact.mean[:, None]))
        for rank, right in ((20, True), (50, True), (12, False)):
            structure = bc.low_rank(rank)
            settings = dict(num_data=ROWS, structure=structure, prior_precision=PRIOR)
            method = bc.laplace(linear_model(), bc.homoscedastic(NOISE), **settings)
            state, whole = method.init(key, start), all_rows(data)
            for part in np.split(np.arange(ROWS), 8):  # each batch joins what was kept
                state, _ = method.update(state, jax.tree.map(lambda x, part=part: x[part], whole), key)
            state = method.end_epoch(state)
            pred = method.predict(state, jnp.eye(FEATURES), key)
            close = np.allclose(pred.mean_variance[0, :, 0], np.diag(exact.covariance), rtol=1e-8)
            assert close == right
            assert np.isclose(method.evidence(state), evidence(data, PRIOR, NOISE), rtol=1e-8) == right
            assert (pred.mean_variance[0, :, 0] > 0.99 * np.diag(exact.covariance)).all()  # what is left out is prior


@pytest.mark.parametrize("likelihood", [bc.Categorical, bc.homoscedastic(NOISE), bc.heteroscedastic])
def test_curvature_is_that_of_a_loop_over_rows(likelihood, key):
    """J^T F J with F the Fisher information in the outputs, by its definition as an expectation."""
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(7, 3))
    classes, dim = likelihood is bc.Categorical, 2 if likelihood is bc.heteroscedastic else 4
    targets = rng.integers(0, 4, 7) if classes else rng.normal(size=(7, dim))
    with jax.enable_x64(True):
        model = bc.models.mlp(3, (5,), 4)
        variables = jax.tree.map(lambda x: jnp.asarray(x, float), model.init(key))
        flat, unravel = jax.flatten_util.ravel_pytree(variables.params)
        expected = np.zeros((flat.size, flat.size))
        for row in inputs:
            outputs = lambda flat, row=row: model.apply(bc.Variables(unravel(flat)), jnp.asarray(row)[None], None)[0]
            jacobian = np.asarray(jax.jacfwd(outputs)(flat))
            expected += jacobian.T @ fisher(likelihood, outputs(flat)) @ jacobian
        data = bc.Dataset(inputs, targets)
        for structure, of in ((bc.full(), lambda x: x), (bc.diagonal(), np.diag)):
            method = bc.laplace(model, likelihood, num_data=7, structure=structure, prior_precision=1.0)
            state = by_hand(method, data, variables, key)
            np.testing.assert_allclose(state.sums, of(expected), rtol=1e-9, atol=1e-12)
        kron = bc.laplace(model, likelihood, num_data=7, structure=bc.kronecker(), prior_precision=1.0)
        sums = by_hand(kron, data, variables, key).sums["head"]
        features = np.asarray(model.features(variables, jnp.asarray(inputs), None))
        seen = np.c_[features, np.ones(7)]
        gradient = sum(fisher(likelihood, model.apply(variables, jnp.asarray(x)[None], None)[0]) for x in inputs)
        np.testing.assert_allclose(sums.seen, seen.T @ seen, rtol=1e-9)
        np.testing.assert_allclose(sums.gradient, gradient, rtol=1e-9, atol=1e-12)


def fisher(likelihood, outputs):
    """E_y[score score^T] in the outputs, with the expectation over y written out."""
    of = lambda y: jax.grad(lambda f: likelihood(f[None, None]).log_prob(y[None])[0])(outputs)
    if likelihood is bc.Categorical:
        scores, weights = jax.vmap(of)(jnp.arange(4)), jax.nn.softmax(outputs)
    else:
        pred = likelihood(outputs[None, None])
        mean, sd = np.asarray(pred.mean[0, 0]), np.sqrt(np.asarray(pred.variance[0, 0]))
        nodes, weight = np.polynomial.hermite_e.hermegauss(3)  # exact: a score is of second degree in y
        grid = np.array(list(product(nodes, repeat=mean.size)))
        weights = np.array([np.prod(w) for w in product(weight / weight.sum(), repeat=mean.size)])
        scores = jax.vmap(of)(jnp.asarray(mean + sd * grid))
    return np.einsum("y,yi,yj->ij", weights, scores, scores)


def test_kronecker_of_convolutions_is_that_of_loops(key):
    """A: mean over rows and positions of patches; G: sum over rows, positions and classes of gradients; ensembled too."""
    data = digits()
    model = bc.models.convnet((6, 6, 1), (2,), 4, 3)
    method = bc.laplace(model, bc.Categorical, num_data=24, structure=bc.kronecker(), prior_precision=1.0)
    network = jax.jit(model.init)(key)
    state = passed(method, data, network, key, 10)
    positions = 36
    _, seen = model.taps(network, data.inputs, None)
    ones = np.concatenate([seen["conv/0"], np.ones((24, positions, 1))], -1).reshape(-1, 10).astype(float)
    np.testing.assert_allclose(state.sums["conv/0"].seen, ones.T @ ones, rtol=1e-4)
    gradient = np.zeros((2, 2))
    for n in range(24):
        one = data.inputs[n : n + 1]
        probs = np.asarray(jax.nn.softmax(model.apply(network, one, None))[0], float)
        values, vectors = np.linalg.eigh(np.diag(probs) - np.outer(probs, probs))
        root = vectors * np.sqrt(np.maximum(values, 0))
        logits = lambda zeros, one=one: model.taps(network, one, {"conv/0": zeros})[0][0]
        jacobian = np.asarray(jax.jacrev(logits)(jnp.zeros((1, positions, 2))), float)[:, 0]
        for own in np.einsum("ck,cpo->kpo", root, jacobian):
            gradient += own.T @ own
    np.testing.assert_allclose(state.sums["conv/0"].gradient, gradient, rtol=1e-3, atol=1e-6)
    both = bc.ensemble(method, 2)
    nets = jax.vmap(model.init)(jnp.stack([key, jax.random.key(1)]))
    start = bc.EnsembleState(bc.Variables(*nets), jnp.ones(2, bool))
    mixture = passed(both, data, start, key, 24)
    lone = passed(method, data, network, key, 24)
    np.testing.assert_allclose(mixture.members.sums["head"].seen[0], lone.sums["head"].seen, rtol=1e-4)
    pred = bc.predict(both, mixture, data.inputs, key)
    assert pred.num_members == 2


def test_weights_count_as_often_as_they_say(key):
    """A row of weight 2 is two rows; one of weight 0 may hold anything but NaN, and adds nothing."""
    data = linear_data(30)
    weights = np.array([2.0] * 10 + [1.0] * 10 + [0.0] * 10)
    twice = bc.Dataset(*(np.concatenate([x[:10], x[:20]]) for x in data[:2]))
    settings = dict(num_data=30, structure=bc.full(), prior_precision=PRIOR)
    method = bc.laplace(linear_model(), bc.homoscedastic(NOISE), **settings)
    start = linear_model().init(key)
    one = passed(method, bc.Dataset(*data[:2], weights), start, key, 8)
    two = passed(method, twice, start, key, 8)
    for a, b in zip(jax.tree.leaves(one.spectrum), jax.tree.leaves(two.spectrum)):
        np.testing.assert_allclose(np.abs(a), np.abs(b), rtol=2e-3, atol=1e-2)
    np.testing.assert_allclose(one.rows, 30, rtol=1e-5)


def test_more_passes_change_nothing(key):
    data, start = linear_data(30), linear_model().init(key)
    settings = dict(num_data=30, structure=bc.full(), prior_precision=PRIOR)
    method = bc.laplace(linear_model(), bc.homoscedastic(NOISE), **settings)
    more = bc.fit(method, data, key, epochs=3, batch_size=30, start=start, progress=False).state
    once = passed(method, data, start, key)
    np.testing.assert_allclose(more.spectrum.values, once.spectrum.values, rtol=1e-5)
    np.testing.assert_allclose(method.evidence(more), method.evidence(once), rtol=1e-5)


def classifier(key, **settings):
    model, data = bc.models.mlp(36, (4,), 3), digits()
    settings = {"structure": bc.kronecker(), **settings}
    method = bc.laplace(model, bc.Categorical, num_data=24, prior_precision=2.0, **settings)
    return method, by_hand(method, data, jax.jit(model.init)(key), key), data


@pytest.mark.slow
def test_links(key):
    """Each against its formula, from the mean and covariance of the outputs."""
    method, state, data = classifier(key, predictive=look)
    mean, covariance = (np.asarray(x, float) for x in method.predict(state, data.inputs, None))
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    probit = bc.predict(classifier(key)[0], state, data.inputs, key)
    np.testing.assert_allclose(probit.logits[0], mean / np.sqrt(1 + np.pi / 8 * variance), rtol=1e-4, atol=1e-6)

    bridged = bc.predict(classifier(key, predictive=bc.bridge)[0], state, data.inputs, key)
    for n in range(3):  # f given that its sum is zero
        ones = np.ones(3)
        gain = covariance[n] @ ones / (ones @ covariance[n] @ ones)
        centred, rest = mean[n] - gain * mean[n].sum(), covariance[n] - np.outer(gain, covariance[n] @ ones)
        expected = (1 - 2 / 3 + np.exp(centred) / 9 * np.exp(-centred).sum()) / np.diag(rest)
        np.testing.assert_allclose(bridged.concentration[0, n], expected, rtol=1e-3)
    assert (bc.decompose(bridged).epistemic > 0).all()

    drawn = bc.predict(classifier(key, predictive=bc.monte_carlo(4000))[0], state, data.inputs[:2], key)
    np.testing.assert_allclose(drawn.logits.mean(0), mean[:2], atol=4.5 * np.sqrt(variance.max() / 4000))
    np.testing.assert_allclose(np.cov(drawn.logits[:, 0].T), covariance[0], atol=0.1 * variance[0].max())
    alone = classifier(key, predictive=bc.monte_carlo(5))[0].predict(state, data.inputs, None)
    np.testing.assert_allclose(alone.logits[0], mean, rtol=1e-4, atol=1e-5)

    method = classifier(key, predictive=bc.sampled(6))[0]
    networks = jax.vmap(lambda k: method.draw(state, k))(jax.random.split(key, 6))
    sampled = bc.predict(method, state, data.inputs, key)
    model = bc.models.mlp(36, (4,), 3)
    expected = jax.vmap(lambda v: model.apply(v, data.inputs, None))(networks)
    np.testing.assert_allclose(sampled.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "structure", [bc.diagonal(), bc.full(), bc.low_rank(8), bc.kronecker(), bc.kronecker(bias="apart")]
)
def test_draws_have_the_covariance_of_the_predictive(structure, key):
    """The linearised covariance of the outputs is J cov J^T, with cov that of the draws."""
    method, state, data = classifier(key, structure=structure, predictive=look)
    draws = jax.jit(jax.vmap(lambda k: jax.flatten_util.ravel_pytree(method.draw(state, k).params)[0]))(
        jax.random.split(key, 20_000)
    )
    covariance = np.cov(np.asarray(draws, float).T)
    model = bc.models.mlp(36, (4,), 3)
    flat, unravel = jax.flatten_util.ravel_pytree(state.variables.params)
    np.testing.assert_allclose(draws.mean(0), flat, atol=5 * np.sqrt(np.diag(covariance).max() / 20_000))
    outputs = lambda flat: model.apply(bc.Variables(unravel(flat)), data.inputs[:3], None)
    jacobian = np.asarray(jax.jacrev(outputs)(flat), float)
    expected = np.einsum("bip,pq,bjq->bij", jacobian, covariance, jacobian)
    own = method.predict(state, data.inputs[:3], None)[1]
    np.testing.assert_allclose(own, expected, atol=0.05 * np.abs(expected).max())


def test_temperature_multiplies_the_covariance(key):
    warm, state, data = classifier(key, predictive=look)
    cold = classifier(key, predictive=look, temperature=0.25)[0]
    np.testing.assert_allclose(
        cold.predict(state, data.inputs, None)[1], 0.25 * warm.predict(state, data.inputs, None)[1], rtol=1e-5
    )


def test_subsets(key):
    """The last layer by its keys, and single weights: both are the part of `full()` of those alone."""
    model, data = bc.models.mlp(36, (4,), 3), digits()
    network = jax.jit(model.init)(key)
    base = dict(num_data=24, prior_precision=2.0)
    everything = passed(bc.laplace(model, bc.Categorical, structure=bc.full(), **base), data, network, key)
    flat, _ = jax.flatten_util.ravel_pytree(network.params)
    last = bc.laplace(model, bc.Categorical, structure=bc.full(), subset=bc.last_layer(model), **base)
    state = passed(last, data, network, key)
    np.testing.assert_allclose(state.sums, everything.sums[-15:, -15:], rtol=1e-4, atol=1e-5)
    for structure in (bc.kronecker(), bc.low_rank(5), bc.diagonal()):
        own = bc.laplace(model, bc.Categorical, structure=structure, subset=bc.last_layer(model), **base)
        bc.predict(own, passed(own, data, network, key), data.inputs, key)

    chosen = bc.subnetwork(20)
    some = bc.laplace(model, bc.Categorical, structure=bc.full(), subset=chosen, **base)
    state = passed(some, data, network, key)
    places = np.sort(np.argsort(-np.abs(flat))[:20])
    np.testing.assert_array_equal(state.places, places)
    np.testing.assert_allclose(state.sums, everything.sums[np.ix_(places, places)], rtol=1e-4, atol=1e-5)
    drawn = jax.flatten_util.ravel_pytree(some.draw(state, key).params)[0]
    np.testing.assert_array_equal(np.flatnonzero(drawn != flat), places)
    variances = jax.tree.map(lambda x: 1 + jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), network.params)
    widest = bc.laplace(
        model, bc.Categorical, structure=bc.diagonal(), subset=bc.subnetwork(3, lambda p: variances), **base
    )
    scores = jax.flatten_util.ravel_pytree(variances)[0]
    assert set(np.asarray(passed(widest, data, network, key).places)) <= set(
        np.flatnonzero(scores >= np.sort(scores)[-3])
    )


def test_a_layer_of_batch_norm_needs_another_structure(key):
    model = bc.models.mlp(36, (4,), 3, batch_norm=True)
    settings = dict(num_data=24, prior_precision=1.0)
    with pytest.raises(
        ValueError, match=r"`subset` must hold kernels and biases.*norm/0 with \['bias', 'scale'\].*last_layer"
    ):
        bc.laplace(model, bc.Categorical, structure=bc.kronecker(), **settings).init(key)
    own = bc.laplace(model, bc.Categorical, structure=bc.kronecker(), subset=("dense",), **settings)
    assert set(passed(own, digits(), None, key).sums) == {"0"}


def test_refusals(key, unchecked):
    model, data = bc.models.mlp(36, (4,), 3), digits()
    base = dict(num_data=24, prior_precision=1.0)
    with pytest.raises(TypeError, match="num_data"):
        bc.laplace(model, bc.Categorical, structure=bc.full(), prior_precision=1.0)
    for precision in (0.0, -1.0, np.inf, np.array([1.0, 0.0])):
        with pytest.raises(ValueError, match=r"`prior_precision` must be positive.*`fit_prior_precision`"):
            bc.laplace(model, bc.Categorical, num_data=24, structure=bc.full(), prior_precision=precision)
    with pytest.raises(ValueError, match=r"for each of the layers \['dense/0', 'head'\], got shape \(3,\)"):
        bc.laplace(model, bc.Categorical, num_data=24, structure=bc.diagonal(), prior_precision=np.ones(3)).init(key)
    with pytest.raises(ValueError, match=r"`prior_precision` must be one number for `full\(\)`, got one for each of 2"):
        own = bc.laplace(model, bc.Categorical, num_data=24, structure=bc.full(), prior_precision=np.ones(2))
        own.evidence(own.init(key))
    with pytest.raises(ValueError, match=r"`bias` must be 'joint' or 'apart', got 'both'"):
        bc.kronecker(bias="both")
    with pytest.raises(ValueError, match=r"`rank` must be a whole number of at least 1, got 0"):
        bc.low_rank(0)
    with pytest.raises(ValueError, match=r"`number` must be a whole number of at least 1, got 0"):
        bc.subnetwork(0)
    with pytest.raises(ValueError, match=r"`number` must be at most the 163 weights of the network, got 1000"):
        bc.laplace(model, bc.Categorical, structure=bc.full(), subset=bc.subnetwork(1000), **base).init(key)
    with pytest.raises(
        ValueError, match=r"`subset` must be the keys of one sub-tree for `kronecker\(\)`, .* got a selection"
    ):
        chosen = bc.subnetwork(5)._replace(take=lambda params, places: {"kernel": jnp.ones((2, 2))})
        own = bc.laplace(model, bc.Categorical, structure=bc.kronecker(), subset=chosen, **base)
        own.update(own.init(key), all_rows(data), key)
    with pytest.raises(ValueError, match=r"`subset` must be keys that lead.*got \('tail',\).*\['dense', 'head'\]"):
        bc.laplace(model, bc.Categorical, structure=bc.full(), subset=("tail",), **base).init(key)
    with pytest.raises(ValueError, match=r"`model` must name its last layer.*got one without a head.*`head=`"):
        bc.last_layer(linear_model())
    with pytest.raises(ValueError, match=r"`model` must have `taps`.*pure functions without.*`diagonal\(\)`"):
        pure = model._replace(taps=None)
        own = bc.laplace(pure, bc.Categorical, structure=bc.kronecker(), **base)
        own.update(own.init(key), all_rows(data), key)
    with pytest.raises(TypeError, match=r"must have logits for `probit`, got Gaussian.*`normal`"):
        own = bc.laplace(model, bc.homoscedastic(1.0), structure=bc.diagonal(), predictive=bc.probit, **base)
        own.predict(own.init(key), data.inputs, key)
    with pytest.raises(TypeError, match=r"must be normal for `normal`, got Categorical"):
        own = bc.laplace(model, bc.Categorical, structure=bc.diagonal(), predictive=bc.normal, **base)
        own.predict(own.init(key), data.inputs, key)
    with pytest.raises(
        ValueError, match=r"`full\(\)` must fit the device, got .* parameters, whose matrices take .* GB"
    ):
        jax.eval_shape(
            bc.laplace(bc.models.mlp(1000, (1000,), 3), bc.Categorical, structure=bc.full(), **base).init, key
        )
    with pytest.raises(TypeError, match=r"must give Categorical, Bernoulli or Gaussian for `ggn`, got Dirichlet"):
        evidential = lambda outputs: bc.Dirichlet(jnp.exp(outputs))
        own = bc.laplace(model, evidential, structure=bc.diagonal(), predictive=look, **base)
        own.update(own.init(key), all_rows(data), key)


def test_a_layer_used_twice_is_an_error(key):
    from flax import nnx

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.layer(nnx.relu(self.layer(x))))

    model = bc.from_nnx(lambda rngs: Twice(rngs), head="head")
    data = bc.Dataset(np.ones((6, 4), np.float32), np.arange(6, dtype=np.int32) % 3)
    settings = dict(num_data=6, prior_precision=1.0)
    with pytest.raises(ValueError, match=r"called once.*'layer'.*`diagonal`"):
        passed(bc.laplace(model, bc.Categorical, structure=bc.kronecker(), **settings), data, None, key)
    for structure in (bc.diagonal(), bc.full()):  # these add up both uses, as they should
        passed(bc.laplace(model, bc.Categorical, structure=structure, **settings), data, None, key)


def test_a_network_that_is_not_finite_is_no_posterior(key):
    model = linear_model()
    method = bc.laplace(model, bc.homoscedastic(NOISE), num_data=ROWS, structure=bc.full(), prior_precision=1.0)
    with pytest.raises(ValueError, match="must stay finite"):
        passed(method, linear_data(), bc.Variables(jnp.full((FEATURES, 1), jnp.nan)), key)
