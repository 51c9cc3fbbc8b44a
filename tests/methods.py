"""The one list of methods that drives the protocol tests: name -> (method, model, data).

Kept short, since a check compiles for ten seconds: `map_estimate` is there with each kind of network once.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

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


def tethered(model, likelihood, optimizer, strength):
    """The README's example of a new method: parameters are pulled towards where they began."""
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


def refreshed(model, optimizer):
    """Refresh of draws, begun from a posterior that is made up: the protocol starts from none."""
    swag = bc.swag(model, bc.Categorical, optimizer, num_draws=2, rank=3, burn_in=1, every=1)
    after = bc.refresh(swag, model, bc.Categorical, num_draws=2)

    def init(key, start=None):
        state = swag.init(key, None) if start is None else start
        squares = jax.tree.map(lambda x: jnp.full_like(x, 0.02), state.squares)
        made_up = state._replace(squares=squares, average=state.average._replace(count=jnp.int32(2)))
        return after.init(key, made_up)

    return after._replace(init=init)


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
        "tethered": lambda: (tethered(m := net(), bc.Categorical, adam, 1e-2), m, blobs()),
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
        **layered(net, adam),
        **posteriors(net, adam),
    }


def layered(net, adam):
    """Networks that are random by their own layers, and the guides that draw all weights as one vector."""

    def wrapped(wrap, **settings):
        return lambda a, b, *, rngs: wrap(nnx.Linear(a, b, rngs=rngs), rngs=rngs, **settings)

    data = {"num_data": ROWS}
    of = lambda build, **settings: lambda: (build(m := net(**settings)), m, blobs())
    dropped = lambda m, **own: bc.mc_dropout(m, bc.Categorical, adam, num_draws=3, **own)
    layers = lambda m, draws=3: bc.bayes_by_backprop(m, bc.Categorical, adam, num_draws=draws, **data)
    guided = lambda m, guide: bc.variational(m, bc.Categorical, adam, num_draws=3, guide=guide, **data)
    two = partial(bc.models.rank_one_dense, num_components=2)
    return {
        "concrete_dropout": of(lambda m: dropped(m, **data), dense=wrapped(bc.models.concrete_dropout)),
        "drop_connect": of(dropped, dense=wrapped(bc.models.drop_connect, rate=0.2)),
        "bayes_by_backprop": of(layers, dense=bc.models.variational_dense),
        "flipout": of(layers, dense=partial(bc.models.variational_dense, estimator=bc.models.flipout)),
        "rank_one": of(lambda m: layers(m, 4), dense=two),
        "variational_low_rank": of(lambda m: guided(m, bc.guides.low_rank(2))),
        "variational_full": of(lambda m: guided(m, bc.guides.full)),
    }


def posteriors(net, adam):
    """Those that draw from a posterior: of few rows, so that every one needs their number."""
    data = {"num_data": ROWS}
    prior = {**data, "prior_precision": 1.0}
    chain = {**prior, "num_samples": 3}
    of = lambda build: lambda: (build(m := net()), m, blobs())
    with_norm = lambda build: lambda: (build(m := net(batch_norm=True)), m, blobs())
    classes = bc.Categorical
    return {
        "laplace": of(lambda m: bc.laplace(m, classes, structure=bc.kronecker(), predictive=bc.sampled(3), **prior)),
        "laplace_regression": lambda: (
            bc.laplace(
                m := bc.models.mlp(4, (8,), 4), bc.heteroscedastic, structure=bc.low_rank(4), curvature=bc.ggn, **prior
            ),
            m,
            curve(),
        ),
        "laplace_bridge": with_norm(
            lambda m: bc.laplace(
                m, classes, structure=bc.full(), subset=bc.last_layer(m), predictive=bc.bridge, **prior
            )
        ),
        "marginal_likelihood_training": of(
            lambda m: bc.marginal_likelihood_training(
                m, classes, adam, structure=bc.diagonal(), burn_in=0, every=2, **prior
            )
        ),
        "swag": with_norm(lambda m: bc.swag(m, classes, adam, num_draws=3, rank=3, burn_in=1, every=1)),
        "swa": of(lambda m: bc.swa(m, classes, adam, burn_in=1, every=1)),
        "refresh": with_norm(lambda m: refreshed(m, adam)),
        "sgld": with_norm(lambda m: bc.sgld(m, classes, step_size=1e-3, burn_in=1, **chain)),
        "sghmc": of(lambda m: bc.sghmc(m, classes, step_size=0.02, friction=10.0, burn_in=1, **chain)),
        "psgld": of(lambda m: bc.psgld(m, classes, step_size=1e-4, burn_in=1, **chain)),
        "cyclical_sgld": of(
            lambda m: bc.cyclical_sgld(
                m, classes, step_size=1e-3, cycle_length=3, samples_per_cycle=1, exploration=0.5, **chain
            )
        ),
        "nuts": of(lambda m: bc.nuts(m, classes, warmup=20, max_num_doublings=3, **chain)),
        "mclmc": of(lambda m: bc.mclmc(m, classes, warmup=6, steps_per_update=3, **chain)),
        "svgd": with_norm(lambda m: bc.svgd(m, classes, adam, num_particles=3, **prior)),
        "ivon": with_norm(lambda m: bc.ivon(m, classes, learning_rate=1e-2, num_draws=3, **prior)),
        "anchored": of(lambda m: bc.anchored(m, classes, adam, **prior)),
        "with_prior": lambda: (bc.map_estimate(m := bc.models.with_prior(net(), scale=1.0), classes, adam), m, blobs()),
    }


FULL_BATCH = ("nuts", "mclmc")  # see all rows at every update
NEW = (*layered(None, None), *posteriors(None, None))
ENSEMBLED = ("tethered", "variational", *NEW)  # as an ensemble of three
FAST = ("bayes_by_backprop", "laplace", "swag", "sgld", "nuts", "ivon")
SLOW = tuple(name for name in NEW if name not in FAST)
