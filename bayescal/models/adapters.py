"""From flax networks to `Model`. Pure functions need no adapter: `Model(init, apply, train)`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bayescal.types import Key, Model, Variables

_NO_STREAM = (
    "`key` was given to a network without a random stream: expected dropout (or another layer that draws numbers) of "
    "rate above 0, got none that is used. Pass `key=None` for the deterministic network, or add dropout."
)


def from_nnx(build: Callable[[Any], Any]) -> Model:
    """Model of a flax nnx module, used through split and merge alone.

    With a key, dropout (attention's own too) is switched on and every random stream of the module is seeded from the key; batch
    norm keeps its running moments. Without one the pass is deterministic. In `train` both are in training mode.

    Args:
        build: `nnx.Rngs -> module`, called afresh for every initialisation.

    Returns:
        Model whose `params` are the module's `nnx.Param` values as nested dicts, and `stats` all other variables.

    Raises:
        ValueError: at `apply`, for a key given to a network that draws no random numbers.
    """
    from flax import nnx

    def parts(module):
        graph, params, streams, stats = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graph, params, streams, stats

    abstract: list = []  # filled once: graph definition and templates, without computing anything

    def template():
        if not abstract:
            graph_box: list = []

            def shapes(key):
                graph, *states = parts(build(nnx.Rngs(key)))
                graph_box.append(graph)
                return states

            states = jax.eval_shape(shapes, jax.eval_shape(jax.random.key, 0))
            abstract.append((graph_box[0], *states))
        return abstract[0]

    def init(key: Key) -> Variables:
        _, params, _, stats = parts(build(nnx.Rngs(key)))
        return Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(stats))

    def module_with(variables: Variables, key: Key | None):
        graph, params, streams, stats = template()
        return nnx.merge(
            graph,
            _filled(params, variables.params),
            _seeded(streams, key),
            _filled(stats, variables.stats or {}),
            copy=True,
        )

    def _filled(state, values):
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, values)
        return state

    def _seeded(streams, key):
        leaves, structure = jax.tree.flatten(streams)
        key = jax.random.key(0) if key is None else key
        return jax.tree.unflatten(
            structure,
            [
                jax.random.fold_in(key, i)
                if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                else jnp.zeros(x.shape, x.dtype)
                for i, x in enumerate(leaves)
            ],
        )

    def counts(module):
        return [
            x
            for x in jax.tree.leaves(nnx.state(module, nnx.RngState))
            if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]

    def apply(variables: Variables, inputs, key: Key | None):
        module = module_with(variables, key)
        module.eval()
        if key is None:
            return module(inputs)
        module.set_attributes(deterministic=False, raise_if_not_found=False)  # dropout, and attention's own
        before = counts(module)
        outputs = module(inputs)
        if all(a is b for a, b in zip(before, counts(module), strict=True)):  # no stream was drawn from
            raise ValueError(_NO_STREAM)
        return outputs

    def train(variables: Variables, inputs, key: Key):
        module = module_with(variables, key)
        module.train()
        outputs = module(inputs)
        return outputs, nnx.to_pure_dict(parts(module)[3]), 0.0

    return Model(init, apply, train)


def from_linen(
    module,
    inputs,
    *,
    train: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    stream: str = "dropout",
) -> Model:
    """Model of a flax linen module.

    With a key, `nn.Dropout` is switched on (dropout inside attention layers is not); batch norm keeps its running
    moments. Without one the pass is the
    evaluation one.

    Args:
        module: the linen module.
        inputs: an example batch, for the shapes of the parameters.
        train: keyword arguments of a training call, such as `{"train": True}`.
        evaluate: those of an evaluation call, such as `{"train": False}`.
        stream: name of the random stream of the stochastic layers.

    Returns:
        Model whose `params` are the collection of that name, and `stats` all other collections.

    Raises:
        ValueError: at `apply`, for a key given to a network that draws no random numbers (flax itself says nothing).
    """
    import flax.linen as nn
    from flax.errors import InvalidRngError

    train, evaluate = dict(train or {}), dict(evaluate or {})
    example = jax.tree.map(jnp.asarray, inputs)

    def dropout_on(call, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.Dropout) or context.method_name != "__call__":
            return call(*args, **kwargs)
        own = layer.deterministic
        object.__setattr__(layer, "deterministic", None)  # linen refuses the argument beside the attribute
        try:
            return call(*args[:1], **{**kwargs, "deterministic": False})
        finally:
            object.__setattr__(layer, "deterministic", own)

    def collections(variables: Variables):
        return {"params": variables.params, **(variables.stats or {})}

    def init(key: Key) -> Variables:
        params_key, stream_key = jax.random.split(key)
        variables = dict(module.init({"params": params_key, stream: stream_key}, example, **evaluate))
        return Variables(variables.pop("params", {}), variables)

    def apply(variables: Variables, inputs, key: Key | None):
        if key is None:
            return module.apply(collections(variables), inputs, **evaluate)
        with nn.intercept_methods(dropout_on):
            try:  # without the stream: a network that needs none gets through
                jax.eval_shape(lambda v, x: module.apply(v, x, **evaluate), collections(variables), inputs)
            except InvalidRngError:
                return module.apply(collections(variables), inputs, rngs={stream: key}, **evaluate)
        raise ValueError(_NO_STREAM)

    def train_pass(variables: Variables, inputs, key: Key):
        outputs, stats = module.apply(
            collections(variables), inputs, rngs={stream: key}, mutable=list(variables.stats or {}), **train
        )
        return outputs, stats, 0.0

    return Model(init, apply, train_pass)
