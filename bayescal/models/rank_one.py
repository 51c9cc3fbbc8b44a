"""Dense layers and convolutions with rank-one posteriors of several components, for flax nnx networks."""

from functools import cache
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bayescal.models.adapters import NETWORK
from bayescal.models.dropout import carried, value_of
from bayescal.models.random_weights import (
    Padding,
    Scale,
    Window,
    as_rows,
    check_scales,
    convolution_product,
    kl_from_prior,
    normal,
)
from bayescal.types import PyTree

_VECTORS = ("input_mean", "input_log_scale", "output_mean", "output_log_scale")


def rank_one_dense(
    in_features: int,
    out_features: int,
    *,
    rngs,
    num_components: int = 4,
    component_scale: Scale = 0.5,
    prior_scale: Scale = 0.1,
    initial_scale: Scale = 0.03,
    use_bias: bool = True,
):
    """((x * r) @ kernel) * s + bias_k with q(r, s) = mean_k Normal(mean_k, scale_k^2), the components tied through the network.

    (batch, ..., in_features) -> (batch, ..., out_features). An ensemble of `num_components` networks that share their
    kernels: each has a normal posterior of its own over the vectors r (inputs) and s (outputs) of every layer; kernel and
    biases are point estimates. One component is a rank-one normal posterior. For `from_nnx`, or `dense=` of `models.mlp` and
    its like; trained by `bayes_by_backprop` (or `map_estimate` with `num_data`), since `penalty()` is
    mean_k KL[q_k || Normal(1, prior_scale^2)] in nats, NumPyro's closed form. The KL is convex, so that this is an upper
    bound on the mixture's own KL; over the whole network it is too large by at most log(num_components).

    All layers are in the same component. In training the rows of a batch are shared out among components evenly and at random,
    so that the leading axis must be that of the batch in every layer: do not reshape rows of many places to (batch * places,
    features), which a layer takes as they are. Each row draws its own r and s: unbiased for the same bound, at one random
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
            own setting, becomes a leaf of `Variables.stats`; a traced one that is not positive gives NaN.
        initial_scale: standard deviation of their posterior at the start.
        use_bias: whether there are biases.

    Raises:
        ValueError: for fewer than one component, or scales that are not positive and finite; at the call, for inputs without
            a batch axis, and in training for another number of rows than the network was given.
    Source: Dusenberry et al. 2020 (prior and start recalled); Wen et al. 2020 (BatchEnsemble).
    """
    settings = _checked(num_components, component_scale, prior_scale, initial_scale, use_bias)
    return _module()((in_features, out_features), jnp.matmul, settings, rngs)


def rank_one_conv(
    in_features: int,
    out_features: int,
    kernel_size: Window,
    *,
    rngs,
    strides: Window | None = 1,
    padding: Padding = "SAME",
    num_components: int = 4,
    component_scale: Scale = 0.5,
    prior_scale: Scale = 0.1,
    initial_scale: Scale = 0.03,
    use_bias: bool = True,
):
    """conv(x * r, kernel) * s + bias_k, r and s a number a channel: (batch, ..., in_features) -> (batch, ..., out_features).

    As `rank_one_dense`; all pixels of an image see the same vectors.

    Args:
        in_features, out_features: channels.
        kernel_size, strides, padding: as of `nnx.Conv`.
        rngs: `nnx.Rngs`.
        num_components, component_scale, prior_scale, initial_scale, use_bias: as of `rank_one_dense`.

    Raises:
        ValueError: as of `rank_one_dense`.
    Source: Dusenberry et al. 2020; Wen et al. 2020.
    """
    settings = _checked(num_components, component_scale, prior_scale, initial_scale, use_bias)
    return _module()(*convolution_product(in_features, out_features, kernel_size, strides, padding), settings, rngs)


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
            log_scale = jnp.log(jnp.float32(settings["initial_scale"]))
            self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
            parts = {}
            for side, size in (("input", width), ("output", out_width)):
                normal = jax.random.normal(rngs.params(), (number, size), jnp.float32)
                parts[f"{side}_mean"] = 1 + settings["component_scale"] * normal
                parts[f"{side}_log_scale"] = jnp.full((number, size), log_scale)
            if settings["use_bias"]:
                parts["bias"] = jnp.zeros((number, out_width), jnp.float32)
            self.components = nnx.Dict({name: nnx.Param(x) for name, x in parts.items()})
            self.prior_scale, self.product = carried(settings["prior_scale"]), product
            self.rngs = rngs["noise"].fork()
            self.network = nnx.RngStream(rngs["noise"].key[...], tag=NETWORK)
            self.deterministic, self.noise_rows = False, None

        def posterior(self, side):
            """NumPyro's distribution of r ("input") or s ("output") in each component."""
            return normal(self.components[f"{side}_mean"][...], self.components[f"{side}_log_scale"][...])

        def penalty(self):
            """mean_k KL[q_k || prior], nats."""
            prior_scale = value_of(self.prior_scale)
            nats = [kl_from_prior(self.posterior(side), 1.0, prior_scale) for side in ("input", "output")]
            return (nats[0] + nats[1]) / self.components["input_mean"].shape[0]

        def __call__(self, inputs):
            kernel, parts = self.kernel[...], {name: x[...] for name, x in self.components.items()}
            inputs = as_rows(inputs, kernel)
            number = parts["input_mean"].shape[0]
            if self.deterministic:
                pairs = jnp.einsum("ki,ko->io", parts["input_mean"], parts["output_mean"], precision="highest")
                outputs = self.product(inputs, kernel * (pairs / number))
                return outputs + parts["bias"].mean(0) if "bias" in parts else outputs

            if self.noise_rows not in (None, inputs.shape[0]):
                raise _other_rows(self.noise_rows, inputs.shape)
            self.rngs()  # counted: a pass that draws
            # not the counted keys, or a layer called twice would be two layers, in two components
            component = _components(self.network.key[...], number, self.noise_rows)
            # a product, since the derivative of indexing adds rows up in any order on accelerators
            chosen = jax.nn.one_hot(component, number, dtype=kernel.dtype)
            of_rows = lambda x: jnp.matmul(chosen, x, precision="highest")
            input_key, output_key = jax.random.split(self.rngs.key[...])

            def everywhere(x):
                return x.reshape(x.shape[0], *(1,) * (inputs.ndim - 2), x.shape[-1])

            def drawn(side, key):
                mean, scale = of_rows(parts[f"{side}_mean"]), of_rows(jnp.exp(parts[f"{side}_log_scale"]))
                return everywhere(mean + scale * jax.random.normal(key, mean.shape, mean.dtype))

            outputs = self.product(inputs * drawn("input", input_key), kernel) * drawn("output", output_key)
            return outputs + everywhere(of_rows(parts["bias"])) if "bias" in parts else outputs

    return RankOneLayer


def _components(key: jax.Array, number: int, rows: int | None) -> jax.Array:
    """The component of every row, each as often as the others (but one row); for `rows=None` that of all rows, (1,)."""
    if number == 1:
        return jnp.zeros(1 if rows is None else rows, jnp.int32)
    order_key, shift_key = jax.random.split(key)
    # where rows do not divide by the number, some component has one row more: which one must be left to chance
    shift = jax.random.randint(shift_key, (1,), 0, number)
    return shift if rows is None else (jax.random.permutation(order_key, rows) + shift) % number


def _other_rows(rows: int, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"`inputs` of every rank-one layer must have the {rows} rows of the batch in training, got shape {shape}, since each "
        "row is in one component through the whole network. Keep the batch as the leading axis: (batch, ..., features)."
    )


def _checked(number, component_scale, prior_scale, initial_scale, use_bias) -> dict[str, Any]:
    """The settings, once they have been checked."""
    if isinstance(number, bool) or not isinstance(number, Integral) or not int(number) >= 1:
        raise ValueError(
            f"`num_components` must be a whole number of at least 1, got {number!r}. 4 is usual, 1 a rank-one normal posterior."
        )
    scales = {"prior_scale": prior_scale, "initial_scale": initial_scale, "component_scale": component_scale}
    alone = int(number) == 1 and isinstance(component_scale, Real) and component_scale == 0
    checked = {name: value for name, value in scales.items() if not (alone and name == "component_scale")}
    check_scales("the entries of r and s", **checked)
    return {**scales, "num_components": int(number), "use_bias": use_bias}
