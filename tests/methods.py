"""The one list of methods that drives the protocol tests: name -> (method, model, data).

Kept short, since a check compiles for ten seconds: `map_estimate` is there with each kind of network once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bayescal as bc

ROWS = 30


def blobs(classes=3):
    rng = np.random.default_rng(0)
    targets = np.arange(ROWS) % classes
    inputs = rng.normal(size=(ROWS, 4)).astype(np.float32) + 2 * np.eye(4, dtype=np.float32)[targets]
    return bc.Dataset(inputs, targets.astype(np.int32))


def pictures():
    data = blobs()
    return bc.Dataset(np.repeat(data.inputs.reshape(ROWS, 2, 2, 1), 2, axis=1).repeat(2, axis=2), data.targets)


def curve():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(ROWS, 4)).astype(np.float32)
    return bc.Dataset(inputs, np.sin(inputs[:, :2]))


def anchored(model, likelihood, optimizer, strength):
    """The design's example of a new method: parameters are pulled towards where they began."""
    base = bc.map_estimate(model, likelihood, optimizer)

    def init(key, variables=None):
        fit = base.init(key, variables)
        return fit, fit.variables.params

    def update(state, batch, key):
        fit, anchor = state
        fit, info = base.update(fit, batch, key)
        params = jax.tree.map(lambda p, a: p + strength * (a - p), fit.variables.params, anchor)
        return (fit._replace(variables=fit.variables._replace(params=params)), anchor), info

    return bc.Method(init, update, lambda state, inputs, key: base.predict(state[0], inputs, key))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, inputs, train: bool):
        x = nn.Dense(16)(inputs)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def linen_model():
    return bc.from_linen(LinenNet(), jnp.ones((1, 4)), train={"train": True}, evaluate={"train": False})


def pure_model():
    """A network as plain functions: no adapter."""

    def init(key):
        return bc.Variables({"w": 0.5 * jax.random.normal(key, (4, 3)), "b": jnp.zeros(3)})

    def apply(variables, inputs, key):
        return inputs @ variables.params["w"] + variables.params["b"]

    return bc.Model(init, apply, lambda variables, inputs, key: (apply(variables, inputs, None), (), 0.0))


def cases():
    """Name -> a function that builds (method, model, data); building waits until the test runs."""
    adam = optax.adam(1e-2)
    net = lambda **settings: bc.models.mlp(4, (8,), 3, **settings)
    return {
        "map_estimate_pure": lambda: (bc.map_estimate(m := pure_model(), bc.Categorical, adam), m, blobs()),
        "map_estimate_regression": lambda: (
            bc.map_estimate(m := bc.models.mlp(4, (8,), 4), bc.heteroscedastic, adam),
            m,
            curve(),
        ),
        "anchored": lambda: (anchored(m := net(), bc.Categorical, adam, 1e-2), m, blobs()),
        "mc_dropout_linen": lambda: (bc.mc_dropout(m := linen_model(), bc.Categorical, adam, num_draws=3), m, blobs()),
        "mc_dropout_convnet": lambda: (
            bc.mc_dropout(
                m := bc.models.convnet((4, 4, 1), (2,), 8, 3, dropout=0.3),
                bc.Categorical,
                adam,
                num_draws=2,
            ),
            m,
            pictures(),
        ),
        "variational": lambda: (
            bc.variational(m := net(batch_norm=True), bc.Categorical, adam, num_data=ROWS, num_draws=3),
            m,
            blobs(),
        ),
    }


ENSEMBLED = ("anchored", "variational")  # checked as an ensemble of three; the README checks `anchored` alone
