"""Kronecker-factored curvature of dense layers and convolutions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.liveness import tree_bytes
from bayescal.memory import CACHE
from bayescal.methods.draws import reached
from bayescal.methods.laplace.structures import Eigen, Structure, eigen, in_groups
from bayescal.methods.laplace.view import View, layers, of_leaves
from bayescal.predictive import float32_or_wider
from bayescal.types import Batch, Key, PyTree


class Factors(NamedTuple):
    """Sums of one layer over the rows.

    seen: (rows + 1, rows + 1), products of what the layer saw, with a 1 for the bias where that is joint.
    gradient: (channels, channels), products of the roots' gradients with respect to what it puts out.
    positions: of all rows together.
    """

    seen: jax.Array
    gradient: jax.Array
    positions: jax.Array


def kronecker(*, bias: Literal["joint", "apart"] = "joint") -> Structure:
    """H of each layer as A (x) G: A the mean over rows and positions of what it saw, G the sum of its roots' gradients.

    Dense layers and convolutions, layers independent of each other. Exact for one dense layer where the roots' gradients
    do not depend on the row, as with normal noise of one variance (and `bias="joint"`); of the form "expand" for layers with
    several positions, where the leading axis of what a layer sees must be the batch.

    Args:
        bias: "joint" takes a layer's bias as the weight of an input of one, so that kernel and bias are dependent;
            "apart" gives it the curvature G of its own, as laplace-torch does.

    Raises:
        ValueError: at `init`, for parameters that are not kernel and bias of a dense layer or convolution; in `update`,
            for a layer that is used twice, or is none of those.
    Source: Martens and Grosse 2015; Grosse and Martens 2016 (convolutions); Ritter et al. 2018 (posterior).
    """
    if bias not in ("joint", "apart"):
        raise ValueError(f"`bias` must be 'joint' or 'apart', got {bias!r}. 'joint' keeps more of the curvature.")

    def init(chosen):
        return {name: _zeros(layer, bias) for name, layer in _kernels(chosen).items()}

    def update(sums, view: View, batch: Batch, weights):
        names = _names(view, sums)
        _check_used_once(view, names, batch.inputs)
        channels = {name: sums[own].gradient.shape[0] for own, name in names.items()}

        def add(sums, rows):
            inputs, targets, weights = rows
            seen, gradients = _backward(view, channels, inputs, lambda outputs: view.root(outputs, targets))
            return {own: _add(sums[own], seen[name], gradients[name], weights, bias) for own, name in names.items()}

        rows, size = (batch.inputs, batch.targets, weights), weights.shape[0]
        if jax.default_backend() == "cpu":  # as many rows as mostly stay in the cache: measured
            size = 2 * CACHE * size // tree_bytes(_shapes(view, channels, batch))
        return in_groups(add, sums, rows, size)

    def decompose(sums, rows, num_data):
        one = lambda f: (eigen(f.seen / jnp.maximum(f.positions, 1)), eigen(f.gradient * (num_data / rows)))
        return {name: one(factors) for name, factors in sums.items()}

    def log_det(spectrum, precision, chosen):
        total = jnp.zeros(())
        for name, (seen, gradient) in spectrum.items():
            own = _of_layer(precision, chosen)[name]
            total += jnp.log(jnp.outer(seen.values, gradient.values) + own).sum()
            if _has_bias(chosen)[name] and bias == "apart":
                total += jnp.log(gradient.values + own).sum()
        return total

    def covariance(spectrum, precision, view: View, inputs):
        names, own = _names(view, spectrum), _of_layer(precision, view.chosen())
        biased = _has_bias(view.chosen())
        channels = {name: spectrum[layer][1].values.size for layer, name in names.items()}
        seen, gradients = _backward(view, channels, inputs, lambda outputs: outputs.reshape(outputs.shape[0], -1))
        total = jnp.zeros(())
        for layer, name in names.items():
            args = spectrum[layer], own[layer], biased[layer], seen[name], jnp.moveaxis(gradients[name], 0, 1)
            total += _layer_covariance(*args, bias)
        return total

    def noise(spectrum, precision, chosen, key: Key):
        kernels, own, drawn = _kernels(chosen), _of_layer(precision, chosen), {}
        for place, (name, layer) in enumerate(kernels.items()):
            drawn[name] = _layer_noise(spectrum[name], own[name], layer, jax.random.fold_in(key, place), bias)
        leaves, structure = jax.tree.flatten(chosen)
        for name, places in layers(chosen).items():
            parts = [drawn[name][part] for part in sorted(drawn[name])]  # a dictionary's leaves are in this order
            for place, part in zip(places, parts, strict=True):
                leaves[place] = part.reshape(leaves[place].shape)
        return jax.tree.unflatten(structure, leaves)

    return Structure(init, update, decompose, log_det, covariance, noise)


def _check_used_once(view: View, names: dict[str, str], inputs) -> None:
    """Raises unless every chosen kernel enters one operation, of what the rows have given; judged by the program."""
    places = {name: own for name, own in zip(names.values(), layers(view.chosen()).values(), strict=True)}
    chosen, structure = jax.tree.flatten(view.chosen())
    arrays, laid_out = jax.tree.flatten(inputs)

    def forward(chosen, inputs):
        network = view._replace(variables=view.network(jax.tree.unflatten(structure, chosen)))
        return network.tapped(None, jax.tree.unflatten(laid_out, inputs))

    closed, (_, seen) = jax.make_jaxpr(forward, return_shape=True)(chosen, arrays)
    jaxpr = closed.jaxpr
    used = lambda variable: sum(any(v is variable for v in e.invars) for e in jaxpr.eqns)
    fed = reached(jaxpr, jaxpr.invars[len(chosen) :])
    shown = dict(zip(sorted(seen), jaxpr.outvars[-len(seen) :], strict=True))
    for name in set(names.values()) & set(seen):
        for place in places[name]:
            times, own = used(jaxpr.invars[place]), shown[name]
            if times > 1 or hasattr(own, "val") or own not in fed:
                got = f"{times} uses" if times > 1 else "inputs that do not depend on the rows"
                raise ValueError(
                    f"`subset` must hold layers that are used once, on each row, for `kronecker()`, got {got} of {name!r}: "
                    "the curvature of shared weights does not factorise. Use `diagonal()` or `low_rank(50)`, or a `subset` "
                    "of the others."
                )


def _shapes(view: View, channels: dict[str, int], batch: Batch):
    """Abstract results of the backward pass."""

    def look():
        return _backward(view, channels, batch.inputs, lambda outputs: view.root(outputs, batch.targets))

    return jax.eval_shape(look)


def _backward(view: View, channels: dict[str, int], inputs, of_outputs: Callable):
    """What each layer saw, (batch, positions, rows), and the gradient of each of the numbers that `of_outputs` gives a row
    with respect to what the layer puts out, (numbers, batch, positions, channels)."""
    _, shapes = jax.eval_shape(lambda: view.tapped(None, inputs))
    missing = sorted(set(channels) - set(shapes))
    if missing:
        raise ValueError(
            f"`taps` must show every chosen layer, got a forward pass without {missing}: layers of another kind than "
            f"dense and convolution, or not used. It shows {sorted(shapes)}. Use `diagonal()`, or a `subset` of those."
        )
    zeros = {name: jnp.zeros((*shapes[name].shape[:2], c), shapes[name].dtype) for name, c in channels.items()}

    def forward(zeros):
        outputs, seen = view.tapped(zeros, inputs)
        return of_outputs(outputs), seen

    values, pull, seen = jax.vjp(forward, zeros, has_aux=True)
    number = values.shape[1]  # a row's numbers depend on the row alone: one pass for each, for all rows at once
    each = jnp.broadcast_to(jnp.eye(number, dtype=values.dtype)[:, None], (number, *values.shape))
    return seen, jax.vmap(pull)(each)[0]


def _kernels(chosen: PyTree) -> dict[str, dict[str, jax.Array]]:
    """Layer -> its kernel and, where it has one, bias."""
    leaves = jax.tree.leaves_with_path(chosen)
    found, strange = {}, []
    for name, places in layers(chosen).items():
        own = {str(getattr(leaves[i][0][-1], "key", "")) if leaves[i][0] else "": leaves[i][1] for i in places}
        if {"kernel"} <= set(own) <= {"kernel", "bias"}:
            found[name] = own
        else:
            strange.append(f"{name or 'the parameters'} with {sorted(own)}")
    if strange or not found:
        raise ValueError(
            f"`subset` must hold kernels and biases of dense layers and convolutions alone for `kronecker()`, got "
            f"{'; '.join(strange) or 'no parameters'}. Name a subset without them, such as `last_layer(model)`, or use "
            "`diagonal()`."
        )
    return found


def _has_bias(chosen: PyTree) -> dict[str, bool]:
    return {name: "bias" in layer for name, layer in _kernels(chosen).items()}


def _of_layer(precision: jax.Array, chosen: PyTree) -> dict[str, jax.Array]:
    each = of_leaves(precision, chosen)
    return {name: each[places[0]] for name, places in layers(chosen).items()}


def _names(view: View, own) -> dict[str, str]:
    """The chosen layers' names among the chosen -> in the whole network, where the taps have them."""
    path = view.selection.path
    if path is None:
        raise ValueError(
            "`subset` must be the keys of one sub-tree for `kronecker()`, such as `last_layer(model)`, got a selection of "
            "leaves or weights. Pass those keys, or use `full()` or `diagonal()`."
        )
    return {name: "/".join([*map(str, path), *([name] if name else [])]) for name in own}


def _zeros(layer: dict[str, jax.Array], bias: str) -> Factors:
    kernel = layer["kernel"]
    if kernel.ndim < 2:
        raise ValueError(
            f"`kernel` must be that of a dense layer or convolution for `kronecker()`, got shape {kernel.shape}. Use "
            "`diagonal()`."
        )
    rows, channels = kernel.size // kernel.shape[-1] + ("bias" in layer and bias == "joint"), kernel.shape[-1]
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    return Factors(jnp.zeros((rows, rows), dtype), jnp.zeros((channels, channels), dtype), jnp.zeros((), dtype))


def _add(sums: Factors, seen, gradients, weights, bias: str) -> Factors:
    if sums.seen.shape[0] > seen.shape[-1]:
        seen = _with_one(seen)
    weight = weights[:, None, None]
    seen, gradients = float32_or_wider(seen), float32_or_wider(gradients)
    seen, gradients = jnp.where(weight == 0, 0, seen), jnp.where(weight[None] == 0, 0, gradients)
    weighted = (weight * seen).reshape(-1, seen.shape[-1])
    channels = gradients.shape[-1]
    return Factors(
        sums.seen + weighted.T @ seen.reshape(-1, seen.shape[-1]),
        sums.gradient + (weight[None] * gradients).reshape(-1, channels).T @ gradients.reshape(-1, channels),
        sums.positions + weights.sum() * seen.shape[1],
    )


def _with_one(seen):
    return jnp.concatenate([seen, jnp.ones((*seen.shape[:-1], 1), seen.dtype)], axis=-1)


def _layer_covariance(spectrum: tuple[Eigen, Eigen], precision, has_bias: bool, seen, gradients, bias: str):
    """(batch, outputs, outputs) from (batch, positions, rows) and (batch, outputs, positions, channels)."""
    a, g = spectrum
    joint = has_bias and bias == "joint"
    turned_seen = (_with_one(seen) if joint else seen) @ a.vectors
    turned = gradients @ g.vectors
    variances = 1 / (jnp.outer(a.values, g.values) + precision)
    if seen.shape[1] == 1:  # the outer product is never made
        scale = turned_seen[:, 0] ** 2 @ variances
        total = jnp.einsum("bic,bjc,bc->bij", turned[:, :, 0], turned[:, :, 0], scale)
    else:
        jacobian = jnp.einsum("bpr,bipc->birc", turned_seen, turned)
        total = jnp.einsum("birc,bjrc->bij", jacobian * variances, jacobian)
    if has_bias and bias == "apart":
        own = turned.sum(2)
        total += jnp.einsum("bic,bjc->bij", own / (g.values + precision), own)
    return total


def _layer_noise(spectrum: tuple[Eigen, Eigen], precision, layer: dict[str, Any], key: Key, bias: str):
    a, g = spectrum
    kernel_key, bias_key = jax.random.split(key)
    normal = jax.random.normal(kernel_key, (a.values.size, g.values.size), a.values.dtype)
    matrix = a.vectors @ (normal * jax.lax.rsqrt(jnp.outer(a.values, g.values) + precision)) @ g.vectors.T
    if "bias" not in layer:
        return {"kernel": matrix}
    if bias == "joint":
        return {"kernel": matrix[:-1], "bias": matrix[-1]}
    normal = jax.random.normal(bias_key, g.values.shape, g.values.dtype)
    return {"kernel": matrix, "bias": g.vectors @ (normal * jax.lax.rsqrt(g.values + precision))}
