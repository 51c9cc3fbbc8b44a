"""Multilayer perceptron, as plain functions: flax takes longer to import than a small network to train."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from bayescal.models.adapters import _NO_STREAM, from_nnx
from bayescal.models.dropout import Rate, check_dropout, dropout_layer, has_dropout, scaled_mask
from bayescal.models.kept_units import ROWS, dense_after_dropout, pays
from bayescal.models.taps import Taps
from bayescal.types import Key, Model, OneNetwork, Variables

_MOMENTUM, _EPSILON = 0.99, 1e-5
_SMALL = 2**12  # numbers in a batch of inputs


def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    *,
    dropout: Rate = 0.0,
    batch_norm: bool = False,
    dense: Callable | None = None,
) -> Model:
    """Dense layers with ReLU between them: (batch, ...) flattened to (batch, in_features) -> (batch, out_features).

    Its features are what the last dense layer is given: (batch, hidden[-1]), or the inputs where nothing is hidden.

    Args:
        in_features: numbers per example, after flattening.
        hidden: width of each hidden layer.
        out_features: classes, or numbers per example.
        dropout: rate after every hidden layer, in [0, 1); may be traced, see `dropout_layer`.
        batch_norm: normalise before every ReLU.
        dense: `(in_features, out_features, *, rngs) -> layer` of flax nnx for every layer, such as `variational_dense`;
            None = dense layers as plain functions. Of layers that draw numbers the head is one: `features` with a key
            raises.

    Raises:
        ValueError: for a dropout rate outside [0, 1).
    """
    check_dropout(dropout)
    if dense is not None:
        build = lambda rngs: _module()(in_features, hidden, out_features, dropout, batch_norm, dense, rngs)
        return from_nnx(build, head="head")
    widths, layers = [in_features, *hidden], range(len(hidden))
    random = has_dropout(dropout)
    carried = isinstance(dropout, (jax.Array, np.ndarray))

    def init(key: Key) -> Variables:
        # keys numbered as `from_nnx` does for a module of these layers: a seed stands for the same network, and masks
        head_key = jax.random.fold_in(key, len(layers) * (2 + 2 * batch_norm + random))
        dense = {i: _dense(jax.random.fold_in(key, 2 * i), *pair) for i, pair in enumerate(pairwise(widths))}
        params = {"dense": dense, "head": _dense(head_key, widths[-1], out_features)}
        stats = {}
        if batch_norm:
            params["norm"] = {
                i: {"scale": jnp.ones(hidden[i], jnp.float32), "bias": jnp.zeros(hidden[i], jnp.float32)}
                for i in layers
            }
            stats["norm"] = {
                i: {"mean": jnp.zeros(hidden[i], jnp.float32), "var": jnp.ones(hidden[i], jnp.float32)} for i in layers
            }
        if carried:
            stats["dropout"] = {i: {"rate": jnp.array(dropout, jnp.float32)} for i in layers}
        return Variables(*({name: part for name, part in tree.items() if part} for tree in (params, stats)))

    def mask_key(key: Key, i: int) -> Key:
        return jax.random.fold_in(jax.random.fold_in(key, 2 * i + 1), 0)

    def forward(variables: Variables, inputs, key: Key | None, moments_of: Callable, product_of=lambda *path: _product):
        params, stats = variables
        x, moments = inputs.reshape(inputs.shape[0], -1), {}
        for i in layers:
            x = _affine(x, params["dense"][i], product_of("dense", i))
            if batch_norm:
                moments[i] = moments_of(x, i)
                x = _normalised(x, params["norm"][i], moments[i])
            x = jax.nn.relu(x)
            if random and key is not None:
                rate = stats["dropout"][i]["rate"] if carried else dropout
                x = x * scaled_mask(mask_key(key, i), rate, x.shape, x.dtype)
        return x, moments

    def features(variables: Variables, inputs, key: Key | None):
        if key is not None and not (random and layers):
            raise ValueError(_NO_STREAM)
        return forward(variables, inputs, key, lambda x, i: variables.stats["norm"][i])[0]

    def head(variables: Variables, features):
        return _affine(features, variables.params["head"])

    def apply(variables: Variables, inputs, key: Key | None):
        return head(variables, features(variables, inputs, key))

    def train(variables: Variables, inputs, key: Key):
        x, moments = forward(variables, inputs, key, lambda x, i: _moments(x))
        stats = variables.stats
        if moments:
            moved = lambda old, new: (_MOMENTUM * old + (1 - _MOMENTUM) * new).astype(old.dtype)
            stats = {**stats, "norm": jax.tree.map(moved, stats["norm"], moments)}
        return head(variables, x), stats, 0.0

    def taps(variables: Variables, inputs, zeros):
        watch = Taps(inputs.shape[0], zeros)
        product_of = lambda *path: watch.dense(path, _product)
        x, _ = forward(variables, inputs, None, lambda x, i: variables.stats["norm"][i], product_of)
        return _affine(x, variables.params["head"], product_of("head")), watch.seen

    def outputs(variables: Variables, inputs, key: Key):
        params, stats = variables
        dense = [params["dense"][i] for i in layers]
        if batch_norm:
            dense = [_with_norm(dense[i], params["norm"][i], stats["norm"][i]) for i in layers]
        x = jax.nn.relu(dense[0]["kernel"].T @ inputs.reshape(inputs.shape[0], -1).T + dense[0]["bias"][:, None])
        masks = [scaled_mask(mask_key(key, i), dropout, (1, hidden[i]), x.dtype)[0] for i in layers]
        after = [(layer["kernel"], layer["bias"]) for layer in [*dense[1:], params["head"]]]
        return dense_after_dropout(x, masks, after, rate=float(dropout))

    faster = random and not carried and pays([*widths[1:], out_features], float(dropout))
    one_network = OneNetwork(outputs, apply, ROWS) if faster else None
    return Model(init, apply, train, features, head, ("head",), taps, one_network)


@cache  # jax keeps every module class for ever: one, and none that closes over a traced rate
def _module():
    from flax import nnx

    class MLP(nnx.Module):
        def __init__(self, in_features, hidden, out_features, dropout, batch_norm, dense, rngs):
            self.dense = nnx.List([dense(a, b, rngs=rngs) for a, b in pairwise([in_features, *hidden])])
            self.norm = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in hidden] if batch_norm else [])
            self.dropout = nnx.List([dropout_layer(dropout, rngs) for _ in hidden] if has_dropout(dropout) else [])
            self.head = dense([in_features, *hidden][-1], out_features, rngs=rngs)

        def __call__(self, inputs):
            x = inputs.reshape(inputs.shape[0], -1)
            for i, dense in enumerate(self.dense):
                x = dense(x)
                x = nnx.relu(self.norm[i](x) if self.norm else x)
                x = self.dropout[i](x) if self.dropout else x
            return self.head(x)

    return MLP


def _dense(key, width, out_features):
    kernel = jax.nn.initializers.lecun_normal()(key, (width, out_features), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(out_features, jnp.float32)}


def _affine(x, layer, product=None):
    return (product or _product)(x, layer["kernel"]) + layer["bias"]


def _product(x, kernel):
    small = jax.default_backend() == "cpu" and x.size <= _SMALL
    return (_small_product if small else jnp.matmul)(x, kernel)


@jax.custom_jvp
def _small_product(x, kernel):
    return x @ kernel


@partial(_small_product.defjvp, symbolic_zeros=True)
def _small_product_jvp(primals, tangents):
    """The product's own derivative, put so that the kernel's gradient, xᵀ g, finds xᵀ already made.

    XLA's product over the leading axis of both operands takes up to three times as long on CPU where they are small, and
    the barrier keeps it from taking the transpose back into the product. Where they are large either may be the faster.
    """
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(dx @ kernel)
    if not isinstance(dkernel, SymbolicZero):
        columns = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
        terms.append(jnp.tensordot(columns, dkernel, (0, 0)))
    return x @ kernel, sum(terms[1:], terms[0])


def _moments(x):
    """In two passes: mean of squares - square of mean loses its digits where the mean is large."""
    mean = x.mean(0, dtype=jnp.promote_types(x.dtype, jnp.float32))
    return {"mean": mean, "var": ((x - mean) ** 2).mean(0)}


def _normalised(x, layer, moments):
    return (x - moments["mean"]) * (jax.lax.rsqrt(moments["var"] + _EPSILON) * layer["scale"]) + layer["bias"]


def _with_norm(dense, layer, moments):
    """The dense layer and the normalisation after it, of fixed moments, as one dense layer."""
    factor = jax.lax.rsqrt(moments["var"] + _EPSILON) * layer["scale"]
    return {"kernel": dense["kernel"] * factor, "bias": (dense["bias"] - moments["mean"]) * factor + layer["bias"]}
