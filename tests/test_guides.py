"""Guides of variational inference: NumPyro's own, and what is refused. Against exact posteriors: test_variational.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bands import all_rows
from methods import blobs, pure_model
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoNormal,
)
from test_variational import classes

import bayescal as bc

pytestmark = pytest.mark.core


def unscaled(numpyros):
    """A guide of a class that takes no scale."""
    return lambda model, *, init_loc_fn, init_scale: numpyros(model, init_loc_fn=init_loc_fn)


def test_numpyros_own_guides(key):
    """`AutoNormal` is `guides.normal` to the bit; any function of the three arguments will do."""
    states = []
    own = lambda model, *, init_loc_fn, init_scale: AutoNormal(model, init_loc_fn=init_loc_fn, init_scale=init_scale)
    for guide in (None, AutoNormal, own):
        method = classes(model=pure_model(), guide=guide)
        states.append(jax.jit(method.update)(method.init(key, None), all_rows(blobs()), key)[0])
    for name, value in states[0].posterior.items():
        assert all((state.posterior[name] == value).all() for state in states)


@pytest.mark.parametrize("numpyros", [AutoDelta, AutoLaplaceApproximation])
def test_a_guide_that_trains_a_point_has_no_spread(key, numpyros):
    """Though Laplace's would draw, around the point, as its prior has it: no row of the data is in what it looks at."""
    guide = unscaled(numpyros)
    with pytest.raises(ValueError, match="`num_draws` must be 1 for a guide without spread, got 3"):
        classes(model=pure_model(), guide=guide)
    method = classes(model=pure_model(), guide=guide, num_draws=1)
    assert method.draw is None
    state = method.init(key, None)
    drawn, centre = (method.predict(state, blobs().inputs, k).logits for k in (key, None))
    np.testing.assert_array_equal(drawn, centre)


def test_a_guide_without_a_median(key):
    method = classes(model=pure_model(), guide=unscaled(AutoIAFNormal))
    state = method.init(key, None)
    one, two = (method.draw(state, jax.random.key(i)).params["w"] for i in range(2))
    assert (one != two).all()
    message = r"`guide` must have a median for `key=None`, got AutoIAFNormal, which has none\. Pass a key"
    for central in (lambda: method.draw(state, None), lambda: method.predict(state, blobs().inputs, None)):
        with pytest.raises(ValueError, match=message):
            central()


@pytest.mark.parametrize("guide", [bc.guides.full, bc.guides.low_rank(2), AutoDiagonalNormal])
def test_a_members_own_scale(key, guide):
    """Only `guides.normal` takes one: see test_variational.py."""
    build = lambda own: classes(model=pure_model(), guide=guide, initial_scale=own)
    message = r"`initial_scale` must be a number for this guide, got a traced float32\[\]\. Only `guides\.normal`"
    with pytest.raises(ValueError, match=message):
        bc.ensemble(build, settings=jnp.array([0.01, 0.1])).init(key, None)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ("normal", r"must be a function `\(numpyro_model, .* got an instance of str\. Pass"),
        (bc.guides.low_rank, r"must be a function .* got low_rank\(rank: int\).*\. Pass `guides\.normal`, `guides\.low_rank"),
        (AutoDelta, r"must be a function .* got AutoDelta\(model, .*\)\. Pass"),
        (AutoNormal(lambda: None), r"must be a function .* got an instance of AutoNormal\. Pass"),
        (lambda model, *, init_loc_fn, init_scale: model, r"must make one of NumPyro's AutoGuides, got function\. Pass"),
    ],
)  # fmt: skip
def test_what_is_no_guide(unchecked, guide, message):
    with pytest.raises(TypeError, match=f"`guide` {message}"):
        classes(model=pure_model(), guide=guide)


def test_rank():
    with pytest.raises(ValueError, match="`rank` must be a whole number of at least 1, got 0"):
        bc.guides.low_rank(0)


def test_a_full_guide_must_fit_the_device():
    """Three million weights: nine matrices of 9e12 numbers."""
    model = bc.models.mlp(1000, (3000,), 3)
    message = (
        r"`guides.full` must fit the device, got 3012003 weights, whose matrices take 326597\.8 GB of .*\. Use `guides"
    )
    with pytest.raises(ValueError, match=message):
        classes(model=model, guide=bc.guides.full)
