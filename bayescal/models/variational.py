"""Dense layers and convolutions whose kernel has a normal posterior, for flax nnx networks."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Estimator = Literal["local", "flipout", "shared"]


def variational_dense(
    in_features: int,
    out_features: int,
    *,
    rngs,
    estimator: Estimator = "local",
    prior_scale: float = 1.0,
    initial_scale: float = 0.01,
    use_bias: bool = True,
):
    """x @ kernel + bias, q(kernel) = Normal(mean, scale^2) weight by weight: (..., in_features) -> (..., out_features).

    For `from_nnx`, or `dense=` of `models.mlp` and its like; trained by `bayes_by_backprop` (or `map_estimate` with
    `num_data`), since `penalty()` is KL[q || Normal(0, prior_scale^2)] in nats, NumPyro's closed form. With a key the
    kernel is drawn once for all rows; without one it is the mean. The bias is a point estimate.

    Only in training does the estimator matter, through the variance of the gradient; each is unbiased for the same bound:
    "local": outputs are drawn, a row its own, from the normal that the kernel's posterior makes of it: the least variance,
        two products, one random number an output. Of inputs with axes between batch and features it draws at each place
        on its own, as in a convolution (see `variational_conv`).
    "flipout": one drawn kernel, whose deviation from the mean each row sees under random signs of its own: two products,
        one number a weight and one bit a row and feature.
    "shared": one drawn kernel for all rows of the batch: one product, the most variance.

    Args:
        in_features, out_features: numbers per row.
        rngs: `nnx.Rngs`.
        estimator: as above.
        prior_scale: standard deviation of the prior of every weight.
        initial_scale: standard deviation of the posterior at the start; its mean starts as that of `nnx.Linear`.
        use_bias: whether there is a bias.

    Raises:
        ValueError: for another word, or scales that are not positive.
    Source: Blundell et al. 2015; Kingma et al. 2015 (local reparametrisation); Wen et al. 2018 (Flipout).
    """
    _check(estimator, prior_scale, initial_scale)
    settings = {"estimator": estimator, "prior_scale": prior_scale, "initial_scale": initial_scale}
    return _module()((in_features, out_features), jnp.matmul, use_bias, settings, rngs)


def variational_conv(
    in_features: int,
    out_features: int,
    kernel_size: Sequence[int],
    *,
    rngs,
    strides: Sequence[int] | int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    estimator: Estimator = "flipout",
    prior_scale: float = 1.0,
    initial_scale: float = 0.01,
    use_bias: bool = True,
):
    """Convolution with q(kernel) = Normal(mean, scale^2): (batch, ..., in_features) -> (batch, ..., out_features).

    As `variational_dense`, with one difference: "local" draws every pixel put out on its own. Each has the right mean and
    variance, but pixels that share a kernel are correlated and these are not, so that it follows a bound of its own, that
    of kernels drawn anew at each place. "flipout" and "shared" are unbiased for the bound of one kernel a row.

    Args:
        in_features, out_features: channels.
        kernel_size: of the window, a number an axis of the image.
        rngs: `nnx.Rngs`.
        strides, padding: as of `nnx.Conv`.
        estimator, prior_scale, initial_scale, use_bias: as of `variational_dense`.

    Raises:
        ValueError: for another word, or scales that are not positive.
    Source: Wen et al. 2018 (Flipout); Molchanov et al. 2017 ("local" for convolutions, recalled).
    """
    from bayescal.models.convolution import convolution

    _check(estimator, prior_scale, initial_scale)
    size = tuple(kernel_size)
    strides = (strides,) * len(size) if isinstance(strides, int) else tuple(strides)
    spatial = "".join("HWD"[: len(size)])
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def product(inputs, kernel):
        return convolution(inputs, kernel, strides, padding, dimension_numbers=numbers)

    settings = {"estimator": estimator, "prior_scale": prior_scale, "initial_scale": initial_scale}
    return _module()((*size, in_features, out_features), product, use_bias, settings, rngs)


@cache  # jax keeps every module class for ever: one, and none that closes over a traced value
def _module():
    from flax import nnx

    class VariationalLayer(nnx.Module):
        def __init__(self, shape, product, use_bias, settings, rngs):
            initial = jnp.full(shape, settings["initial_scale"], jnp.float32)
            self.mean = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
            self.raw_scale = nnx.Param(initial + jnp.log(-jnp.expm1(-initial)))  # softplus's inverse
            self.bias = nnx.Param(jnp.zeros(shape[-1], jnp.float32)) if use_bias else None
            self.product, self.estimator, self.prior_scale = product, settings["estimator"], settings["prior_scale"]
            self.rngs = rngs["noise"].fork()
            self.deterministic, self.each_row = False, False

        def posterior(self):
            """NumPyro's distribution of the kernel."""
            import numpyro.distributions as dist

            return dist.Normal(self.mean[...], jax.nn.softplus(self.raw_scale[...]))

        def penalty(self):
            """KL[q || prior], nats."""
            import numpyro.distributions as dist

            return dist.kl_divergence(self.posterior(), dist.Normal(0.0, self.prior_scale)).sum()

        def __call__(self, inputs):
            mean, scale = self.mean[...], jax.nn.softplus(self.raw_scale[...])
            if self.deterministic:
                outputs = self.product(inputs, mean)
            else:
                way = self.estimator if self.each_row else "shared"
                outputs = noisy_product(self.rngs(), inputs, mean, scale, self.product, way)
            return outputs if self.bias is None else outputs + self.bias[...]

    return VariationalLayer


def noisy_product(
    key: jax.Array, inputs: jax.Array, mean: jax.Array, scale: jax.Array, product: Callable, estimator: Estimator
) -> jax.Array:
    """product(inputs, kernel) with kernel ~ Normal(mean, scale^2), by one of the three estimators.

    Args:
        key: of the noise.
        inputs: (batch, ..., features).
        mean, scale: (..., features, outputs).
        product: bilinear, `(inputs, kernel) -> (batch, ..., outputs)`.
        estimator: see `variational_dense`.
    """
    if estimator == "local":
        location, variance = product(inputs, mean), product(inputs**2, scale**2)
        # of inputs that are all zero the root has no slope, and there is no noise either
        spread = jnp.sqrt(jnp.where(variance > 0, variance, 1)) * (variance > 0)
        return location + spread * jax.random.normal(key, location.shape, location.dtype)
    kernel_key, in_key, out_key = jax.random.split(key, 3)
    deviation = scale * jax.random.normal(kernel_key, mean.shape, mean.dtype)
    if estimator == "shared":
        return product(inputs, mean + deviation)
    signs = lambda key, x: jax.random.rademacher(key, (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]), x.dtype)
    flipped = product(inputs * signs(in_key, inputs), deviation)
    return product(inputs, mean) + flipped * signs(out_key, flipped)


def _check(estimator, prior_scale, initial_scale) -> None:
    if estimator not in get_args(Estimator):
        raise ValueError(
            f"`estimator` must be one of {', '.join(get_args(Estimator))}, got {estimator!r}. Check the spelling."
        )
    for name, value in (("prior_scale", prior_scale), ("initial_scale", initial_scale)):
        if np.shape(value) or (not isinstance(value, Tracer) and not value > 0):
            raise ValueError(
                f"`{name}` must be one positive number, got {value!r}. It is a standard deviation of every weight."
            )
