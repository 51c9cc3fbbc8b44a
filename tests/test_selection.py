"""Which weights have a posterior: sub-trees, single leaves and weights, in variational inference and in Laplace's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bands import all_rows
from exact import FEATURES
from methods import blobs, pure_model
from test_variational import NET, classes, one_batch

import bayescal as bc
from bayescal.methods.selection import leaves

pytestmark = pytest.mark.core

HEAD = bc.last_layer(NET)
SUBSETS = {
    "last layer": (HEAD, lambda names: names[: len(HEAD)] == HEAD),
    "sub-trees": (bc.subtrees(HEAD), lambda names: names[: len(HEAD)] == HEAD),
    "without biases": (bc.without_biases(), lambda names: names[-1] != "bias"),
    "leaves": (leaves(lambda names: names[-1] == "bias"), lambda names: names[-1] == "bias"),
    "all": (None, lambda names: True),
}


def named(params):
    return {tuple(str(k.key) for k in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_has_a_posterior_and_the_rest_is_trained_beside_it(key, name):
    subset, inside = SUBSETS[name]
    method = classes(subset=subset)
    before = named(NET.init(key).params)
    state = method.init(key, None)
    for own, x in named(
        method.draw(state._replace(posterior=jax.tree.map(jnp.copy, state.posterior)), key).params
    ).items():
        assert np.allclose(x, before[own], atol=0.1)  # ten standard deviations: every weight in its place
    state = jax.jit(method.update)(state, all_rows(blobs()), key)[0]
    one, two = (named(method.draw(state, jax.random.key(i)).params) for i in range(2))
    number = sum(x.size for own, x in one.items() if inside(own))
    assert state.posterior["weights_auto_loc"].shape == (number,)
    assert len(jax.tree.leaves(state.point)) == sum(not inside(own) for own in one)
    for own in one:
        assert (one[own] != two[own]).any() == inside(own)
        if not inside(
            own
        ):  # Adam's first step is the rate, whatever the gradient: without a prior nothing else moves it
            moved = np.abs(one[own] - before[own])
            assert (np.isclose(moved, 0.05, rtol=1e-2) | (moved == 0)).all() and moved.any()
            np.testing.assert_array_equal(one[own], named(state.point)[own])


def test_single_weights(key):
    """The places of the largest weights stand in the state; the others of the same array are points."""
    method = classes(subset=bc.subnetwork(5))
    state = method.init(key, None)
    state = jax.jit(method.update)(state, all_rows(blobs()), key)[0]
    one, two = (jax.flatten_util.ravel_pytree(method.draw(state, jax.random.key(i)).params)[0] for i in range(2))
    np.testing.assert_array_equal(np.flatnonzero(one != two), state.places)


def test_outside_weights_have_no_prior(key):
    """Where the likelihood is flat they stay where they are, while the posterior is pulled to the prior."""
    init = lambda key: bc.Variables({"a": jnp.ones((FEATURES, 1)), "b": jnp.ones((FEATURES, 1))})
    apply = lambda v, x, key: x @ (v.params["a"] + v.params["b"])
    model = bc.Model(init, apply, lambda v, x, k: (apply(v, x, None), (), 0.0))
    settings = {"num_data": 50, "num_draws": 1, "subset": ("a",)}
    method = bc.variational(model, bc.homoscedastic(1.0), optax.sgd(1.0), **settings)
    new, _ = method.update(method.init(key, None), one_batch(), key)
    np.testing.assert_array_equal(new.point["b"], 1.0)
    assert new.point["a"] is None and (new.posterior["weights_auto_loc"] < 1).all()


@pytest.mark.parametrize("structure", [bc.diagonal(), bc.full(), bc.low_rank(3)])
def test_laplace_takes_the_same_subsets(key, structure):
    """The evidence of sub-trees, and of all but biases, is that of the keys that lead to them."""

    def init(key):
        return bc.Variables({"w": 0.5 * jax.random.normal(key, (4, 3)), "bias": jnp.zeros(3)})

    apply = lambda v, x, key: x @ v.params["w"] + v.params["bias"]
    model = bc.Model(init, apply, lambda v, x, k: (apply(v, x, None), (), 0.0))
    told = []
    for subset in (("w",), bc.subtrees(("w",)), bc.without_biases(), leaves(lambda names: names == ("w",))):
        settings = {"num_data": 30, "structure": structure, "prior_precision": 2.0, "subset": subset}
        method = bc.laplace(model, bc.Categorical, **settings)
        state = method.end_epoch(method.update(method.init(key, None), all_rows(blobs()), key)[0])
        told.append(float(method.evidence(state)))
        one, two = (method.draw(state, jax.random.key(i)).params for i in range(2))
        assert (one["w"] != two["w"]).all() and (one["bias"] == two["bias"]).all()
    np.testing.assert_allclose(told, told[0], rtol=1e-5)


def with_nothing():
    """A network with a part that has no weights."""
    plain = pure_model()
    return plain._replace(init=lambda key: bc.Variables({**plain.init(key).params, "e": {}}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bc.subtrees(), r"`paths` must be tuples of keys, got None\. Write"),
        (lambda: bc.subtrees("w"), r"`paths` must be tuples of keys, got 'w'\. Write"),
        (lambda: bc.subtrees(()), r"`paths` must be tuples of keys, got \(\)\. Write"),
        (
            lambda: classes(model=pure_model(), subset=bc.subtrees(("w",), ("v",))),
            r"`paths` must lead to parameters, got \('v',\); the network's are \['b', 'w'\]\. Pass",
        ),
        (
            lambda: classes(model=pure_model(), subset=leaves(lambda names: False)),
            r"`where` must be true of at least one array of the network, got False for all of \['b', 'w'\]\. Choose",
        ),
        (
            lambda: classes(model=pure_model(), subset=("v",)),
            r"`subset` must be keys that lead to parameters, got \('v',\), where \(\) has \['b', 'w'\]\. Pass",
        ),
        (
            lambda: classes(model=with_nothing(), subset=("e",)),
            r"`subset` must choose at least one weight, got a part of the network without any\. Pass",
        ),
        (lambda: bc.subnetwork(True), "`number` must be a whole number of at least 1, got True. It"),
        (lambda: classes(model=pure_model(), subset=bc.subnetwork(16)), "`number` must be at most the 15 weights"),
    ],
)
def test_errors(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("subset", "got"), [(5, "int"), (lambda params: params, "function"), ("head", "str")])
def test_what_is_no_subset(unchecked, subset, got):
    message = rf"`subset` must be a tuple of keys or a `Selection`, got {got}\. Pass `last_layer"
    for build in (
        lambda: classes(subset=subset),
        lambda: bc.laplace(
            NET, bc.Categorical, num_data=30, structure=bc.diagonal(), prior_precision=1.0, subset=subset
        ),
    ):
        with pytest.raises(TypeError, match=message):
            build()


def test_a_number_of_numpys(unchecked):
    assert bc.subnetwork(np.int64(5)).find({"w": jnp.arange(9.0)}).tolist() == [4, 5, 6, 7, 8]
