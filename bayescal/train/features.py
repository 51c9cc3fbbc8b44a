"""A network's features beside its predictive, in one pass."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from bayescal.methods.ensemble import member_keys
from bayescal.methods.map_estimate import one_member
from bayescal.predictive import Predictive, merge_members
from bayescal.sharding import run_members
from bayescal.train.predict import check_state, over_rows
from bayescal.types import EnsembleState, Key, Model, PyTree, Variables


def predict_features(
    model: Model,
    likelihood: Callable,
    state: PyTree,
    inputs: PyTree,
    key: Key | None,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Predictive, Float[jax.Array, "member rows features"]]:
    """likelihood(head(features)) and the features of every row and network, streamed in chunks as `predict` does.

    The predictive is that of `predict` on `map_estimate`, or on an ensemble of it: the same program with one more result,
    and equal but for rounding. Members that are not alive weigh 0 in the predictive; their features are there and may be
    NaN.

    Args:
        model: a network with `features` and `head`.
        likelihood: outputs with a leading member axis -> predictive, e.g. `Categorical`.
        state: `Variables`, a state that has `variables`, or an `EnsembleState` of such.
        inputs: array (rows, ...), or a pytree of such, finite.
        key: None = the mean network; else each network is drawn once, as `mc_dropout` with one draw does it: one mask
            for all rows.
        chunk_size, mesh: as in `predict`.

    Returns:
        Predictive with batch shape (rows,), and features (member, rows, features), one member for a lone network. A
        likelihood that enlarges the member axis does so in the predictive alone.

    Raises:
        ValueError: for a model without features; empty, NaN or infinite inputs; the state of `experiments`; a key for a
            network that draws no random numbers.
        TypeError: for a `Fit` where its state is meant, or a state without `variables`.
    """
    if model.features is None or model.head is None:
        raise ValueError(
            "`model` must give features, got one without. Name its last layer where it is built: "
            '`bc.from_nnx(build, head="head")`.'
        )
    check_state("state", state)
    networks = _networks(state)
    number = len(networks.alive) if isinstance(networks, EnsembleState) else 1
    function = _WithFeatures(model.features, model.head, likelihood)
    return over_rows(function, networks, inputs, key, networks=number, chunk_size=chunk_size, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class _WithFeatures:
    """`(networks, inputs, key) -> (predictive, features)`; equal for the same model, so jit keeps its cache."""

    features: Callable
    head: Callable
    likelihood: Callable

    def __call__(self, networks: Variables | EnsembleState, inputs, key: Key | None):
        if isinstance(networks, Variables):
            pred, features = self.one(networks, key, inputs)
            return pred, features[None]
        keys = None if key is None else member_keys(key, len(networks.alive))
        preds, features = run_members(self.one, networks.members, keys, shared=(inputs,))
        return merge_members(preds, networks.alive.astype(jnp.float32)), features

    def one(self, variables: Variables, key: Key | None, inputs):
        if key is None:
            features = self.features(variables, inputs, None)
        else:  # row by row, or the masks would depend on a row's place in its chunk
            draw = jax.random.split(key, 1)[0]
            row = lambda x: self.features(variables, jax.tree.map(lambda leaf: leaf[None], x), draw)[0]
            features = jax.vmap(row)(inputs)
        return self.likelihood(one_member(self.head(variables, features))), features


def _networks(state: PyTree) -> Variables | EnsembleState:
    """The networks in a state, and which of them are alive."""
    if isinstance(state, EnsembleState) and jnp.ndim(state.alive) != 1:
        raise ValueError(
            f"`state` must be of one experiment, got members of shape {jnp.shape(state.alive)}. Take experiment e: "
            "`jax.tree.map(lambda x: x[e], state)`."
        )
    inner = state.members if isinstance(state, EnsembleState) else state
    variables = getattr(inner, "variables", inner)
    if not isinstance(variables, Variables):
        raise TypeError(
            f"`state` must be Variables, a state that has `variables`, or an EnsembleState of such, got "
            f"{type(inner).__name__}. Pass a fit's `state`, or draw networks from it first."
        )
    return EnsembleState(variables, state.alive) if isinstance(state, EnsembleState) else variables
