"""Linearised Laplace against laplace-torch: the same weights and data, float64, one full batch."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayescal as bc

torch = pytest.importorskip("torch")
peer = pytest.importorskip("laplace", reason="a peer: pip install laplace-torch")

ROWS, FEATURES, HIDDEN, PRIOR, NOISE = 40, 5, 6, 0.7, 0.3
STRUCTURES = {
    "diag": (bc.diagonal(), "all", "diag"),
    "kron": (bc.kronecker(bias="apart"), "all", "kron"),
    "full": (bc.full(), "all", "full"),
    "last_layer_kron": (bc.kronecker(bias="apart"), "last_layer", "kron"),
    "last_layer_full": (bc.full(), "last_layer", "full"),
}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def both(outputs: int):
    """Model, its variables, and the same network in torch."""
    rng = np.random.default_rng(3)
    sizes = [FEATURES, HIDDEN, HIDDEN, outputs]
    weights = [(rng.normal(size=pair) / np.sqrt(pair[0]), 0.1 * rng.normal(size=pair[1])) for pair in pairwise(sizes)]
    model = bc.models.mlp(FEATURES, (HIDDEN, HIDDEN), outputs)
    layer = lambda w: {"kernel": jnp.asarray(w[0]), "bias": jnp.asarray(w[1])}
    params = {"dense": {0: layer(weights[0]), 1: layer(weights[1])}, "head": layer(weights[2])}
    modules = []
    for kernel, bias in weights:
        linear = torch.nn.Linear(*kernel.shape).double()
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
        modules += [linear, torch.nn.ReLU()]
    return model, bc.Variables(params), torch.nn.Sequential(*modules[:-1])


def rows(outputs: int, classes: bool):
    rng = np.random.default_rng(4)
    inputs = rng.normal(size=(ROWS, FEATURES))
    targets = rng.integers(0, outputs, ROWS) if classes else rng.normal(size=(ROWS, outputs))
    return inputs, targets, rng.normal(size=(9, FEATURES))


def theirs(network, likelihood, subset, hessian, inputs, targets):
    backend = peer.curvature.CurvlinopsGGN
    known = {"sigma_noise": NOISE**0.5} if likelihood == "regression" else {}
    settings = dict(
        subset_of_weights=subset, hessian_structure=hessian, prior_precision=PRIOR, backend=backend, **known
    )
    fitted = peer.Laplace(network, likelihood, **settings)
    data = torch.utils.data.TensorDataset(torch.tensor(inputs), torch.tensor(targets))
    fitted.fit(torch.utils.data.DataLoader(data, batch_size=len(inputs)))
    return fitted


@pytest.mark.parametrize("classes", [True, False], ids=["classification", "regression"])
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_mean_variance_and_marginal_likelihood(name, classes):
    structure, subset, hessian = STRUCTURES[name]
    outputs = 3 if classes else 2
    model, variables, network = both(outputs)
    inputs, targets, asked = rows(outputs, classes)
    other = theirs(network, "classification" if classes else "regression", subset, hessian, inputs, targets)
    mean, covariance = other._glm_predictive_distribution(torch.tensor(asked))

    rtol = 1e-5 if hessian == "full" else 1e-10  # theirs adds a jitter to the full matrix
    settings = dict(num_data=ROWS, structure=structure, prior_precision=PRIOR)
    settings["subset"] = bc.last_layer(model) if subset == "last_layer" else None
    likelihood = bc.Categorical if classes else bc.homoscedastic(NOISE)
    method, key = bc.laplace(model, likelihood, **settings), jax.random.key(0)
    state = method.init(key, variables)
    batch = bc.Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(ROWS), jnp.arange(ROWS))
    state = method.end_epoch(method.update(state, batch, key)[0])
    pred = method.predict(state, jnp.asarray(asked), None)
    look = lambda posterior, inputs, key: (posterior.mean(inputs), posterior.covariance(inputs))
    own_mean, own_covariance = bc.laplace(model, likelihood, predictive=look, **settings).predict(
        state, jnp.asarray(asked), None
    )
    covariance, mean = covariance.detach().numpy(), mean.detach().numpy()
    np.testing.assert_allclose(own_mean, mean, rtol=rtol)
    np.testing.assert_allclose(own_covariance, covariance, rtol=rtol, atol=rtol * np.abs(covariance).max())
    if classes:
        expected = other(torch.tensor(asked), pred_type="glm", link_approx="probit").detach().numpy()
        np.testing.assert_allclose(pred.pooled_mean(), expected, rtol=rtol)
    else:
        np.testing.assert_allclose(pred.mean[0], mean, rtol=rtol)
        np.testing.assert_allclose(pred.mean_variance[0], np.diagonal(covariance, axis1=1, axis2=2), rtol=rtol)
    np.testing.assert_allclose(method.evidence(state), other.log_marginal_likelihood().item(), rtol=rtol)
