"""From flax networks to `Model`. Pure functions need no adapter: `Model(init, apply, train)`."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from bayescal.models.head import HeadCalls, no_such_layer, random_head, shared_head
from bayescal.models.taps import Taps
from bayescal.types import Key, Model, Variables

NETWORK = "network"  # tag of the random streams that all layers of a network share
PENALTY = "penalty"  # linen's collection of nats for the whole data set
_NO_STREAM = (
    "`key` was given to a network without a random stream: expected dropout (or another layer that draws numbers) of "
    "rate above 0, got none that is used. Pass `key=None` for the deterministic network, or add dropout."
)


def from_nnx(build: Callable[[Any], Any], *, head: str | None = None) -> Model:
    """Model of a flax nnx module, used through split and merge alone.

    With a key, dropout (attention's own too) is switched on and every random stream of the module is seeded from the key; batch
    norm keeps its running moments. Without one the pass is deterministic. In `train` both are in training mode.
    `nnx.Conv` layers run on `convolution`, fast in loops on CPU, unless they were given a function of their own.

    Layers may go further: the nats that a method `penalty()` of any of them gives after a training pass are added up as the
    model's penalty; an attribute `noise_rows` that is None holds the number of rows of the batch in training alone, where
    noise may differ from row to row; and all streams of tag `NETWORK` have the same key, so that layers can draw one thing
    for the whole network.

    Args:
        build: `nnx.Rngs -> module`, called afresh for every initialisation.
        head: attribute that is the last layer, through which the model gives features: what that layer is called with.

    Returns:
        Model whose `params` are the module's `nnx.Param` values as nested dicts, and `stats` all other variables.

    Raises:
        ValueError: at `apply`, for a key given to a network that draws no random numbers; at every pass, for random streams
            of several keys, as `nnx.vmap` makes them. At `features`, for a `head` that is no layer of the module, is not
            called once and with an array (batch, features) alone, draws random numbers, or is not what gives the outputs.
    """
    from flax import nnx

    from bayescal.models.convolution import convolution

    def parts(module):
        graph, params, streams, stats = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graph, params, streams, stats

    def convolving(module):
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.Conv) and layer.conv_general_dilated is jax.lax.conv_general_dilated:
                layer.conv_general_dilated = convolution
        return module

    abstract: list = []  # filled once: graph definition and templates, without computing anything

    def template():
        if not abstract:
            graph_box: list = []

            def shapes(key):
                graph, *states = parts(convolving(build(nnx.Rngs(key))))
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
        tags = [x.tag for x in jax.tree.leaves(streams, is_leaf=lambda x: isinstance(x, nnx.RngState))]
        key = jax.random.key(0) if key is None else key

        def seeded(place, leaf, tag):
            if leaf.shape:
                raise _stacked(leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.fold_in(key, len(leaves) if tag == NETWORK else place)
            return jnp.zeros((), leaf.dtype)

        return jax.tree.unflatten(structure, map(seeded, range(len(leaves)), leaves, tags))

    def counts(module):
        return [
            x
            for x in jax.tree.leaves(nnx.state(module, nnx.RngState))
            if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]

    def drawn(module, before) -> bool:
        return any(a is not b for a, b in zip(before, counts(module), strict=True))

    def forward(variables: Variables, inputs, key: Key | None, call: Callable):
        module = module_with(variables, key)
        module.eval()
        if key is None:
            return call(module, inputs)
        module.set_attributes(deterministic=False, raise_if_not_found=False)  # dropout, and attention's own
        before = counts(module)
        result = call(module, inputs)
        if not drawn(module, before):
            raise ValueError(_NO_STREAM)
        return result

    def apply(variables: Variables, inputs, key: Key | None):
        return forward(variables, inputs, key, lambda module, inputs: module(inputs))

    def train(variables: Variables, inputs, key: Key):
        module = module_with(variables, key)
        module.train()
        layers: list[Any] = [layer for _, layer in nnx.iter_modules(module)]
        for layer in layers:
            if getattr(layer, "noise_rows", 0) is None:
                layer.noise_rows = jax.tree.leaves(inputs)[0].shape[0]
        outputs = module(inputs)
        # methods alone: an attribute of that name is the user's own
        penalties = [layer.penalty() for layer in layers if callable(getattr(type(layer), "penalty", None))]
        return outputs, nnx.to_pure_dict(parts(module)[3]), _total(penalties)

    def taps(variables: Variables, inputs, zeros):
        module, watch = module_with(variables, None), Taps(jax.tree.leaves(inputs)[0].shape[0], zeros)
        module.eval()
        for path, layer in nnx.iter_modules(module):  # exactly these: what inherits from them may do other things
            if type(layer) is nnx.Linear:
                layer.dot_general = watch.dense(path, layer.dot_general)
            elif type(layer) is nnx.Conv and layer.mask is None:
                layer.conv_general_dilated = watch.convolution(path, layer.conv_general_dilated)
        return module(inputs), watch.seen

    if head is None:
        return Model(init, apply, train, taps=taps)

    def layer_of(module):
        layers = nnx.to_pure_dict(template()[1])  # by their parameters: one that shares another's has none of its own
        if head not in layers:
            raise no_such_layer(head, layers)
        return getattr(module, head)

    def watched(module, inputs):
        layer, calls = layer_of(module), HeadCalls(head)

        def call(*args, **kwargs):
            before = counts(layer)
            outputs = calls(layer, *args, **kwargs)
            if drawn(layer, before):
                raise random_head(head)
            return outputs

        setattr(module, head, call)
        outputs = module(inputs)
        setattr(module, head, layer)
        return calls.features(outputs)

    def apply_head(variables: Variables, features):
        module = module_with(variables, None)
        module.eval()
        return layer_of(module)(features)

    features = lambda variables, inputs, key: forward(variables, inputs, key, watched)
    return Model(init, apply, train, features, apply_head, (head,), taps)


def from_linen(
    module,
    inputs,
    *,
    train: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    stream: str = "dropout",
    head: str | None = None,
) -> Model:
    """Model of a flax linen module.

    With a key, `nn.Dropout` is switched on (dropout inside attention layers is not); batch norm keeps its running
    moments. Without one the pass is the evaluation one. `nn.Conv` layers run on `convolution`, fast in loops on CPU,
    unless they were given a function of their own. Nats that layers `sow` under "penalty" in a training pass are added up as
    the model's penalty.

    Args:
        module: the linen module.
        inputs: an example batch, for the shapes of the parameters.
        train: keyword arguments of a training call, such as `{"train": True}`.
        evaluate: those of an evaluation call, such as `{"train": False}`.
        stream: name of the random stream of the stochastic layers.
        head: name of the last layer, such as `"Dense_1"`, through which the model gives features: what that layer is
            called with.

    Returns:
        Model whose `params` are the collection of that name, and `stats` all other collections.

    Raises:
        ValueError: at `apply`, for a key given to a network that draws no random numbers (flax itself says nothing). At
            once, for a `head` that is no layer of the module, is not called once and with an array (batch, features)
            alone, or is not what gives the outputs; at `features`, for one that draws random numbers.
    """
    import flax.linen as nn
    from flax.errors import InvalidRngError

    from bayescal.models.convolution import convolution

    train, evaluate = dict(train or {}), dict(evaluate or {})
    example = jax.tree.map(jnp.asarray, inputs)

    def dropout_on(call, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.Dropout) or context.method_name != "__call__":
            return call(*args, **kwargs)
        with _attribute(layer, "deterministic", None):  # linen refuses the argument beside the attribute
            return call(*args[:1], **{**kwargs, "deterministic": False})

    def convolving(call, args, kwargs, context):
        layer = context.module
        given = isinstance(layer, nn.Conv) and (layer.conv_general_dilated or layer.conv_general_dilated_cls)
        if not isinstance(layer, nn.Conv) or given or context.method_name != "__call__":
            return call(*args, **kwargs)
        with _attribute(layer, "conv_general_dilated_cls", lambda: convolution):
            return call(*args, **kwargs)

    def run(*args, **kwargs):
        with nn.intercept_methods(convolving):
            return module.apply(*args, **kwargs)

    def collections(variables: Variables):
        return {"params": variables.params, **(variables.stats or {})}

    def init(key: Key) -> Variables:
        params_key, stream_key = jax.random.split(key)
        variables = dict(module.init({"params": params_key, stream: stream_key}, example, **evaluate))
        variables.pop(PENALTY, None)
        return Variables(variables.pop("params", {}), variables)

    def forward(variables: Variables, inputs, key: Key | None, watch):
        if key is None:
            with watch:
                return run(collections(variables), inputs, **evaluate)
        with nn.intercept_methods(dropout_on):
            if not draws(lambda v, x: module.apply(v, x, **evaluate), collections(variables), inputs):
                raise ValueError(_NO_STREAM)
            with watch:
                return run(collections(variables), inputs, rngs={stream: key}, **evaluate)

    def draws(call, *args) -> bool:
        try:  # without the stream: a network that needs none gets through
            jax.eval_shape(call, *args)
        except InvalidRngError:
            return True
        return False

    def apply(variables: Variables, inputs, key: Key | None):
        return forward(variables, inputs, key, nullcontext())

    def train_pass(variables: Variables, inputs, key: Key):
        mutable = [*(variables.stats or {}), PENALTY]
        outputs, stats = run(collections(variables), inputs, rngs={stream: key}, mutable=mutable, **train)
        penalties = jax.tree.leaves(stats.pop(PENALTY, {}))
        return outputs, stats, _total(penalties)

    def taps(variables: Variables, inputs, zeros):
        watch = Taps(jax.tree.leaves(inputs)[0].shape[0], zeros)

        def tapped(call, args, kwargs, context):
            layer, replace = context.module, nullcontext()
            if context.method_name == "__call__" and type(layer) is nn.Dense:
                own = layer.dot_general_cls() if layer.dot_general_cls else layer.dot_general or jax.lax.dot_general
                replace = _attribute(layer, "dot_general_cls", lambda: watch.dense(layer.path, own))
            elif context.method_name == "__call__" and type(layer) is nn.Conv and layer.mask is None:
                own = layer.conv_general_dilated or convolution
                own = layer.conv_general_dilated_cls() if layer.conv_general_dilated_cls else own
                replace = _attribute(layer, "conv_general_dilated_cls", lambda: watch.convolution(layer.path, own))
            with replace:
                return call(*args, **kwargs)

        with nn.intercept_methods(tapped):
            return module.apply(collections(variables), inputs, **evaluate), watch.seen

    if head is None:
        return Model(init, apply, train_pass, taps=taps)

    def watching(calls: HeadCalls, found: list):
        def watch(call, args, kwargs, context):
            if context.module.path != (head,) or context.method_name != "__call__":
                return call(*args, **kwargs)
            found.append(context.module.unbind()[0])
            return calls(call, *args, **kwargs)

        return nn.intercept_methods(watch)

    def last_layer():
        found: list = []

        def look(key, inputs):
            calls, streams = HeadCalls(head), {"params": key, stream: key}
            with watching(calls, found):
                outputs, variables = module.init_with_output(streams, inputs, **evaluate)
            params = variables.get("params", {})
            if not found or head not in params:
                raise no_such_layer(head, params)
            own = found[0].init(streams, calls.features(outputs))["params"]
            if jax.tree.structure(own) != jax.tree.structure(params[head]):
                raise shared_head(head)

        jax.eval_shape(look, jax.eval_shape(jax.random.key, 0), example)
        return found[0]

    layer = last_layer()

    def features(variables: Variables, inputs, key: Key | None):
        calls = HeadCalls(head)
        result = calls.features(forward(variables, inputs, key, watching(calls, [])))
        if key is not None:
            with nn.intercept_methods(dropout_on):
                if draws(apply_head, variables, result):
                    raise random_head(head)
        return result

    def apply_head(variables: Variables, features):
        own = {name: tree[head] for name, tree in collections(variables).items() if head in tree}
        return layer.apply(own, features)

    return Model(init, apply, train_pass, features, apply_head, (head,), taps)


def _total(penalties: list) -> Any:
    """Their sum; the number 0 where there are none, which is how a model without a penalty is known."""
    return sum(penalties[1:], penalties[0]) if penalties else 0.0


def _stacked(shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"`build` must give a module whose random streams have one key each, got a stream of shape {shape}, as layers "
        "stacked by `nnx.vmap` have. Build them one by one, in an `nnx.List`."
    )


@contextmanager
def _attribute(layer, name: str, value):
    """Within it a linen layer, which is frozen, has this attribute."""
    own = getattr(layer, name)
    object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        object.__setattr__(layer, name, own)
