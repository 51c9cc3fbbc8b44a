import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics import REFERENCE

import bayescal as bc

pytestmark = pytest.mark.core


def test_recovers_a_known_temperature(rng):
    logits = (2 * rng.normal(size=(20_000, 5))).astype(np.float32)
    gumbel = rng.gumbel(size=logits.shape)
    targets = (logits / 1.7 + gumbel).argmax(1)
    scaler = bc.fit_temperature(bc.Categorical(logits[None]), targets)
    np.testing.assert_allclose(scaler.temperature, 1.7, rtol=0.03)
    assert abs(float(scaler.gradient)) < 1e-4


def test_scaling_by_hand():
    scaler = bc.Temperature(jnp.float32(2), jnp.float32(0))
    pred = scaler(bc.Categorical(jnp.array([[[math.log(9), 0.0]]])))
    np.testing.assert_allclose(pred.pooled_mean(), [[0.75, 0.25]], rtol=1e-6)
    assert pred.normalised and pred.num_members == 1


def test_pool_first():
    members = bc.Categorical(jnp.array([[[4.0, 0.0]], [[0.0, 4.0]]]))
    np.testing.assert_allclose(bc.Temperature(jnp.float32(3), jnp.float32(0))(members).pooled_mean(), [[0.5, 0.5]])


def test_stored_oracle():
    path = REFERENCE / "metrics_oracles.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set BAYESCAL_DATA to the folder of the shared data")
    groups = json.loads(path.read_text())["oracles"]
    group = next(v for k, v in groups.items() if k.startswith("calibrators("))
    inputs = np.load(REFERENCE / "metrics_oracle_inputs.npz")
    pred, targets = bc.Categorical(inputs["logits"].astype(np.float32)[None, :100]), inputs["Y"][:100].astype(np.int32)
    expected = group["ref_temperature"]["value"]["T"]
    np.testing.assert_allclose(bc.fit_temperature(pred, targets).temperature, expected, rtol=1e-4)


def test_bad_input(unchecked):
    with pytest.raises(TypeError, match="`pred` must be a Categorical, got Bernoulli"):
        bc.Temperature(jnp.float32(2), jnp.float32(0))(bc.Bernoulli(np.zeros((1, 3), np.float32)))
    pred = bc.Categorical(jnp.array([[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]))
    with pytest.raises(ValueError, match="`weights` must be one finite non-negative number per row"):
        bc.fit_temperature(pred, np.array([0, 0, 1]), weights=-np.ones(3))
    with pytest.raises(ValueError, match="`targets` must have positive probability"):
        bc.fit_temperature(bc.Categorical(jnp.array([[[0.0, -jnp.inf], [0.0, 1.0]]])), np.array([1, 1]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [(np.array([0, 0, 0]), "it is 0 "), (np.array([1, 1, 1]), "it is infinity")],
)
def test_no_finite_temperature(targets, message):
    pred = bc.Categorical(jnp.tile(jnp.array([2.0, 0.0]), (1, 3, 1)))
    with pytest.raises(ValueError, match=message):
        bc.fit_temperature(pred, targets)
