"""What layers with a posterior over their weights share: its normals and their KL, their convolution, what they refuse."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from bayescal.types import Array

Product = Callable[[Array, Array], jax.Array]
Scale = float | Float[Array, ""]
Window = int | Sequence[int]
Padding = str | int | Sequence[int | tuple[int, int]]


def normal(mean: Float[Array, "*shape"], log_scale: Float[Array, "*shape"]):
    """NumPyro's Normal(mean, exp(log_scale)^2), in float32 or wider; what is not a number comes through.

    Args:
        mean, log_scale: parameters of one shape.
    """
    import numpyro.distributions as dist

    mean, log_scale = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (mean, log_scale))
    return dist.Normal(mean, jnp.exp(log_scale), validate_args=False)


def kl_from_prior(posterior: Any, prior_mean: float, prior_scale: Scale) -> Float[jax.Array, ""]:
    """KL[posterior || Normal(prior_mean, prior_scale^2)], summed over weights: nats, by NumPyro's closed form.

    NaN for a scale that is not positive.

    Args:
        posterior: NumPyro's normal of every weight.
        prior_mean, prior_scale: of the prior, the same for all weights.
    """
    import numpyro.distributions as dist

    # of a traced scale nobody has seen the sign, which the KL, a function of its square, would hide
    prior_scale = jnp.where(prior_scale > 0, prior_scale, jnp.nan)
    prior = dist.Normal(prior_mean, prior_scale, validate_args=False)
    return dist.kl_divergence(posterior, prior).sum()


def convolution_product(
    in_features: int, out_features: int, kernel_size: Window, strides: Window | None, padding: Padding
) -> tuple[tuple[int, ...], Product]:
    """The shape of a kernel, and the function (inputs, kernel) -> outputs that `nnx.Conv` is without its bias.

    Args:
        in_features, out_features, kernel_size, strides, padding: as `nnx.Conv` takes them.
    """
    from flax import nnx

    from bayescal.models.convolution import convolution

    def build():
        settings: dict[str, Any] = {"padding": padding, "use_bias": False, "conv_general_dilated": convolution}
        return nnx.Conv(in_features, out_features, kernel_size, strides, rngs=nnx.Rngs(0), **settings)

    layer = nnx.eval_shape(build)
    graph, params = nnx.split(layer)

    def product(inputs, kernel):
        return nnx.merge(graph, jax.tree.map(lambda _: kernel, params))(inputs)

    return layer.kernel_shape, product


def as_rows(inputs: Array, kernel: Float[Array, "..."]) -> jax.Array:
    """The inputs, in the type of their product with the kernel: squares and signs of pixels are no pixels.

    Args:
        inputs: (batch, ..., features).
        kernel: (in_features, out_features), or with the axes of a window before.

    Raises:
        ValueError: for inputs without a batch axis, whose first axis would pass for one.
    """
    if jnp.ndim(inputs) < kernel.ndim:
        raise ValueError(
            f"`inputs` must have shape (batch, ..., features) of at least {kernel.ndim} axes, got {jnp.shape(inputs)}. For "
            "one example add the batch axis: `inputs[None]`."
        )
    return jnp.asarray(inputs, jnp.result_type(inputs, kernel))


def check_scales(of: str, **scales: Any) -> None:
    """Raises unless each is one number above 0 and finite; the value of a traced one cannot be checked."""
    for name, value in scales.items():
        number = np.shape(value) == () and isinstance(value, (Real, jax.Array, np.ndarray))
        # a comparison of arrays would be traced inside jit
        if not number or not (isinstance(value, Tracer) or 0 < float(value) < np.inf):
            raise ValueError(
                f"`{name}` must be one positive number, got {value!r}. It is a standard deviation of {of}."
            )
