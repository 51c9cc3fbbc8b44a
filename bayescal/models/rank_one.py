"""Dense layers and convolutions with rank-one posteriors of several components, for flax nnx networks."""

from collections.abc import Sequence
from functools import cache
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.models.adapters import NETWORK
from bayescal.types import Array, PyTree

_VECTORS = ("input_mean", "input_raw_scale", "output_mean", "output_raw_scale")


def rank_one_dense(
    in_features: int,
    out_features: int,
    *,
    rngs,
    num_components: int = 4,
    component_scale: float | Float[Array, ""] = 0.5,
    prior_scale: float | Float[Array, ""] = 0.1,
    initial_scale: float | Float[Array, ""] = 0.03,
    use_bias: bool = True,
):
    """((x * r) @ kernel) * s + bias_k with q(r, s) = mean_k Normal(mean_k, scale_k^2), the components tied through the network.

    (batch, ..., in_features) -> (batch, ..., out_features). An ensemble of `num_components` networks that share their
    kernels: each has a normal posterior of its own over the vectors r (inputs) and s (outputs) of every layer; kernel and
    biases are point estimates. One component is a rank-one normal posterior. For `from_nnx`, or `dense=` of `models.mlp` and
    its like; trained by `bayes_by_backprop` (or `map_estimate` with `num_data`), since `penalty()` is
    mean_k KL[q_k || Normal(1, prior_scale^2)] in nats, NumPyro's closed form. The KL is convex, so that this is an upper
    bound on the mixture's own KL; over the whole network it is too large by at most log(num_components).

    All layers are in the same component. In training the rows of a batch (the leading axis, in every layer) are shared out
    among components evenly and at random, and each row draws its own r and s: unbiased for the same bound, at one random
    number a row and feature. With a key else, component and vectors are drawn once for all rows; without one the kernel is
    the mean of kernel * r sᵀ, exact for one layer. Predictions of `bayes_by_backprop` take the components in turn.

    The vectors' parameters lie under "components". Usual for them are no weight decay and half the learning rate:

        parts = lambda params: jax.tree.map_with_path(
            lambda path, _: "fast" if "components" in jax.tree_util.keystr(path) else "slow", params
        )
        optimizer = optax.partition({"slow": optax.adamw(1e-3, weight_decay=1e-4), "fast": optax.adam(5e-4)}, parts)

    Batch norm beside these layers has the moments of all components together.

    Args:
        in_features, out_features: numbers per row.
        rngs: `nnx.Rngs`.
        num_components: of the posterior; the same in all layers.
        component_scale: standard deviation around 1 of the entries of r_k and s_k at the start; 0 makes components alike,
            and is refused for several.
        prior_scale: standard deviation of the prior of every entry of r and s, whose mean is 1. An array, such as a member's
            own setting, becomes a variable of the layer, in `Variables.stats`.
        initial_scale: standard deviation of their posterior at the start.
        use_bias: whether there are biases.

    Raises:
        ValueError: for fewer than one component, or scales that are not positive.
    Source: Dusenberry et al. 2020 (prior and start recalled); Wen et al. 2020 (BatchEnsemble).
    """
    settings = _checked(num_components, component_scale, prior_scale, initial_scale, use_bias)
    return _module()((in_features, out_features), jnp.matmul, settings, rngs)


def rank_one_conv(
    in_features: int,
    out_features: int,
    kernel_size: Sequence[int],
    *,
    rngs,
    strides: Sequence[int] | int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    num_components: int = 4,
    component_scale: float | Float[Array, ""] = 0.5,
    prior_scale: float | Float[Array, ""] = 0.1,
    initial_scale: float | Float[Array, ""] = 0.03,
    use_bias: bool = True,
):
    """conv(x * r, kernel) * s + bias_k, r and s a number a channel: (batch, ..., in_features) -> (batch, ..., out_features).

    As `rank_one_dense`; all pixels of an image see the same vectors.

    Args:
        in_features, out_features: channels.
        kernel_size: of the window, a number an axis of the image.
        rngs: `nnx.Rngs`.
        strides, padding: as of `nnx.Conv`.
        num_components, component_scale, prior_scale, initial_scale, use_bias: as of `rank_one_dense`.

    Raises:
        ValueError: for fewer than one component, or scales that are not positive.
    Source: Dusenberry et al. 2020; Wen et al. 2020.
    """
    from bayescal.models.convolution import convolution

    settings = _checked(num_components, component_scale, prior_scale, initial_scale, use_bias)
    size = tuple(kernel_size)
    strides = (strides,) * len(size) if isinstance(strides, int) else tuple(strides)
    spatial = "".join("HWD"[: len(size)])
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def product(inputs, kernel):
        return convolution(inputs, kernel, strides, padding, dimension_numbers=numbers)

    return _module()((*size, in_features, out_features), product, settings, rngs)


def num_components(params: PyTree) -> int:
    """How many components the rank-one layers of a network have; 1 where there are none.

    Args:
        params: of the network.

    Raises:
        ValueError: for layers that disagree.
    """
    numbers = {x["input_mean"].shape[0] for x in jax.tree.leaves(params, is_leaf=_is_layer) if _is_layer(x)}
    if len(numbers) > 1:
        raise ValueError(
            f"`num_components` must be the same in all layers, got {sorted(numbers)}. Build every rank-one layer of the "
            "network with one number."
        )
    return numbers.pop() if numbers else 1


def take_component(params: PyTree, index: int | jax.Array) -> PyTree:
    """The network of one component: its rank-one layers have that one alone; everything else is untouched.

    Args:
        params: of the network.
        index: which component, in [0, num_components); may be traced, and then is not checked.

    Raises:
        ValueError: for an index outside.
    """
    number = num_components(params)
    if not isinstance(index, Tracer) and not 0 <= index < number:
        raise ValueError(f"`index` must be a component in [0, {number}), got {index}. They are numbered from 0.")

    def taken(node):
        if not _is_layer(node):
            return node
        return {name: jax.lax.dynamic_slice_in_dim(x, index, 1) for name, x in node.items()}

    return jax.tree.map(taken, params, is_leaf=_is_layer)


def _is_layer(node) -> bool:
    """Known by all its vectors, since "components" may name something else in a user's network."""
    return isinstance(node, dict) and node.keys() >= {*_VECTORS}


@cache  # jax keeps every module class for ever: one, and none that closes over a traced value
def _module():
    from flax import nnx

    class RankOneLayer(nnx.Module):
        def __init__(self, shape, product, settings, rngs):
            *_, width, out_width = shape
            number = settings["num_components"]
            initial = jnp.float32(settings["initial_scale"])
            raw_scale = initial + jnp.log(-jnp.expm1(-initial))  # softplus's inverse
            self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
            parts = {}
            for side, size in (("input", width), ("output", out_width)):
                normal = jax.random.normal(rngs.params(), (number, size), jnp.float32)
                parts[f"{side}_mean"] = 1 + settings["component_scale"] * normal
                parts[f"{side}_raw_scale"] = jnp.full((number, size), raw_scale)
            if settings["use_bias"]:
                parts["bias"] = jnp.zeros((number, out_width), jnp.float32)
            self.components = nnx.Dict({name: nnx.Param(x) for name, x in parts.items()})
            prior_scale = settings["prior_scale"]
            own = isinstance(prior_scale, (jax.Array, np.ndarray))
            self.prior_scale = nnx.Variable(jnp.asarray(prior_scale, jnp.float32)) if own else prior_scale
            self.product = product
            self.rngs = rngs["noise"].fork()
            self.network = nnx.RngStream(rngs["noise"].key[...], tag=NETWORK)
            self.deterministic, self.each_row = False, False

        def scale(self, side):
            return jax.nn.softplus(self.components[f"{side}_raw_scale"][...])

        def posterior(self, side):
            """NumPyro's distribution of r ("input") or s ("output") in each component."""
            import numpyro.distributions as dist

            return dist.Normal(self.components[f"{side}_mean"][...], self.scale(side))

        def penalty(self):
            """mean_k KL[q_k || prior], nats."""
            import numpyro.distributions as dist

            own = isinstance(self.prior_scale, nnx.Variable)
            prior = dist.Normal(1.0, self.prior_scale[...] if own else self.prior_scale)
            nats = [dist.kl_divergence(self.posterior(side), prior).sum() for side in ("input", "output")]
            return (nats[0] + nats[1]) / self.components["input_mean"].shape[0]

        def __call__(self, inputs):
            kernel, parts = self.kernel[...], {name: x[...] for name, x in self.components.items()}
            inputs = jnp.asarray(inputs, jnp.result_type(inputs, kernel))
            number = parts["input_mean"].shape[0]
            if self.deterministic:
                pairs = jnp.einsum("ki,ko->io", parts["input_mean"], parts["output_mean"], precision="highest")
                outputs = self.product(inputs, kernel * (pairs / number))
                return outputs + parts["bias"].mean(0) if "bias" in parts else outputs

            self.rngs()  # counted: a pass that draws
            # not the counted keys, or a layer called twice would be two layers, in two components
            component = _components(self.network.key[...], number, inputs.shape[0] if self.each_row else None)
            input_key, output_key = jax.random.split(self.rngs.key[...])

            def everywhere(x):
                return x.reshape(x.shape[0], *(1,) * (inputs.ndim - 2), x.shape[-1])

            def drawn(side, key):
                mean, scale = parts[f"{side}_mean"][component], self.scale(side)[component]
                return everywhere(mean + scale * jax.random.normal(key, mean.shape, mean.dtype))

            outputs = self.product(inputs * drawn("input", input_key), kernel) * drawn("output", output_key)
            return outputs + everywhere(parts["bias"][component]) if "bias" in parts else outputs

    return RankOneLayer


def _components(key: jax.Array, number: int, rows: int | None) -> jax.Array:
    """The component of every row, each as often as the others (but one row); for `rows=None` that of all rows, (1,)."""
    if number == 1:
        return jnp.zeros(rows or 1, jnp.int32)
    order_key, shift_key = jax.random.split(key)
    # where rows do not divide by the number, some component has one row more: which one must be left to chance
    shift = jax.random.randint(shift_key, (1,), 0, number)
    return shift if rows is None else (jax.random.permutation(order_key, rows) + shift) % number


def _checked(number, component_scale, prior_scale, initial_scale, use_bias) -> dict[str, Any]:
    """The settings, once they have been checked."""
    if isinstance(number, bool) or not isinstance(number, Integral) or not int(number) >= 1:
        raise ValueError(
            f"`num_components` must be a whole number of at least 1, got {number!r}. 4 is usual, 1 a rank-one normal posterior."
        )
    scales = {"prior_scale": prior_scale, "initial_scale": initial_scale, "component_scale": component_scale}
    for name, value in scales.items():
        alone = name == "component_scale" and int(number) == 1
        if np.shape(value) or (not isinstance(value, Tracer) and not (value > 0 or (alone and value == 0))):
            raise ValueError(
                f"`{name}` must be one positive number, got {value!r}. It is a standard deviation of the entries of r and s."
            )
    return {**scales, "num_components": int(number), "use_bias": use_bias}
