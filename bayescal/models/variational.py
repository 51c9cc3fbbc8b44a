"""Dense layers and convolutions whose kernel has a normal posterior, for flax nnx networks."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.models.dropout import carried, value_of
from bayescal.models.random_weights import (
    Padding,
    Product,
    Scale,
    Window,
    as_rows,
    check_scales,
    convolution_product,
    kl_from_prior,
    normal,
)
from bayescal.types import Array, Key

Estimator = Callable[[Key, Array, Array, Array, Product], jax.Array]


def local_reparametrisation(
    key: Key,
    inputs: Float[Array, "batch ..."],
    mean: Float[Array, "..."],
    scale: Float[Array, "..."],
    product: Product,
) -> Float[jax.Array, "batch ..."]:
    """product(x, mean) + noise * sqrt(product(x^2, scale^2)): outputs drawn from the normal that the kernel makes of each.

    As a rule the least variance of the gradient: two products, one random number an output. Rows have kernels of their own.
    Exact for a dense layer of inputs (batch, features). Where a row uses its kernel at several places (pixels, positions, a
    layer called twice) every output still has the right mean and variance, but not its covariance with those of other
    places: what is trained then is the bound of kernels drawn anew at each place.

    Args:
        key: of the noise.
        inputs: (batch, ..., features).
        mean, scale: of the kernel's normal posterior, (..., features, outputs).
        product: bilinear, `(inputs, kernel) -> (batch, ..., outputs)`; one of non-negative arrays is not negative.
    Source: Kingma et al. 2015; for convolutions Molchanov et al. 2017 (recalled).
    """
    location, variance = product(inputs, mean), product(inputs**2, scale**2)
    # of inputs that are all zero the root has no slope, and there is no noise either; what is not a number stays
    noisy = ~(variance <= 0)
    spread = jnp.sqrt(jnp.where(noisy, variance, 1)) * noisy
    return location + spread * jax.random.normal(key, location.shape, location.dtype)


def flipout(
    key: Key,
    inputs: Float[Array, "batch ..."],
    mean: Float[Array, "..."],
    scale: Float[Array, "..."],
    product: Product,
) -> Float[jax.Array, "batch ..."]:
    """product(x, mean) + product(x * r, deviation) * s: one drawn kernel, which each row sees under random signs r, s.

    Every row has one kernel from the posterior, for all its places; kernels of two rows are uncorrelated, so that their
    gradients average out: less variance than under shared noise, unless the rows' gradients cancel each other (balanced
    classes at the start). Two products, one random number a weight, one sign a row and feature.

    Args:
        key, inputs, mean, scale, product: as in `local_reparametrisation`.
    Source: Wen et al. 2018 (recalled).
    """
    kernel_key, in_key, out_key = jax.random.split(key, 3)
    flipped = product(_signed(in_key, inputs), _deviation(kernel_key, mean, scale))
    return product(inputs, mean) + _signed(out_key, flipped)


def shared_noise(
    key: Key,
    inputs: Float[Array, "batch ..."],
    mean: Float[Array, "..."],
    scale: Float[Array, "..."],
    product: Product,
) -> Float[jax.Array, "batch ..."]:
    """product(x, kernel), kernel ~ Normal(mean, scale^2): one drawn kernel for all rows of the batch.

    One product, one random number a weight, as a rule the most variance of the gradient. What predictions are made of.

    Args:
        key, inputs, mean, scale, product: as in `local_reparametrisation`.
    Source: Blundell et al. 2015 (recalled).
    """
    return product(inputs, mean + _deviation(key, mean, scale))


def variational_dense(
    in_features: int,
    out_features: int,
    *,
    rngs,
    estimator: Estimator = local_reparametrisation,
    prior_scale: Scale = 1.0,
    initial_scale: Scale = 0.01,
    use_bias: bool = True,
):
    """x @ kernel + bias with q(kernel) = Normal(mean, scale^2) weight by weight.

    (batch, ..., in_features) -> (batch, ..., out_features), where every row of the batch may have noise of its own.

    For `from_nnx`, or `dense=` of `models.mlp` and its like; trained by `bayes_by_backprop` (or `map_estimate` with
    `num_data`), since `penalty()` is KL[q || Normal(0, prior_scale^2)] in nats, NumPyro's closed form. With a key the
    kernel is drawn once for all rows, also where the layer is called twice; without one it is the mean. The bias is a point
    estimate.

    The prior is the decay of the mean and pulls the scale to `prior_scale`. Weight decay would pull the scale to 1 as well,
    since what is trained is `log_scale`; keep both out of it:

        mask = lambda params: jax.tree.map_with_path(
            lambda path, _: not {"mean", "log_scale"} & {getattr(step, "key", None) for step in path}, params
        )
        optimizer = optax.adamw(1e-3, mask=mask)

    Args:
        in_features, out_features: numbers per row.
        rngs: `nnx.Rngs`.
        estimator: how the noise is drawn in training, which changes the variance of the gradient and, for inputs
            (batch, in_features), not the bound: `local_reparametrisation`, `flipout`, `shared_noise`, or your own
            `(key, inputs, mean, scale, product) -> outputs`.
        prior_scale: standard deviation of the prior of every weight. An array, such as a member's own setting, becomes a
            leaf of `Variables.stats`; the value of a traced one cannot be checked, and gives NaN where it is not positive.
        initial_scale: standard deviation of the posterior at the start; its mean starts as that of `nnx.Linear`.
        use_bias: whether there is a bias.

    Raises:
        ValueError: for scales that are not one positive finite number; at the call, for inputs of fewer than two axes.
        TypeError: for an estimator that is not a function.
    Source: Blundell et al. 2015.
    """
    _check(estimator, prior_scale, initial_scale)
    shape = in_features, out_features
    return _module()(shape, jnp.matmul, estimator, prior_scale, initial_scale, use_bias, rngs)


def variational_conv(
    in_features: int,
    out_features: int,
    kernel_size: Window,
    *,
    rngs,
    strides: Window | None = 1,
    padding: Padding = "SAME",
    estimator: Estimator = flipout,
    prior_scale: Scale = 1.0,
    initial_scale: Scale = 0.01,
    use_bias: bool = True,
):
    """Convolution with q(kernel) = Normal(mean, scale^2): (batch, ..., in_features) -> (batch, ..., out_features).

    As `variational_dense`. `flipout` and `shared_noise` follow the bound of one kernel a row; `local_reparametrisation` draws
    every pixel put out on its own, and so follows another.

    Args:
        in_features, out_features: channels.
        kernel_size, strides, padding: as of `nnx.Conv`.
        rngs: `nnx.Rngs`.
        estimator, prior_scale, initial_scale, use_bias: as of `variational_dense`.

    Raises:
        ValueError: for scales that are not one positive finite number; at the call, for inputs without a batch axis.
        TypeError: for an estimator that is not a function.
    Source: Blundell et al. 2015; for convolutions Wen et al. 2018.
    """
    _check(estimator, prior_scale, initial_scale)
    shape, product = convolution_product(in_features, out_features, kernel_size, strides, padding)
    return _module()(shape, product, estimator, prior_scale, initial_scale, use_bias, rngs)


@cache  # jax keeps every module class for ever: one, and none that closes over a traced value
def _module():
    from flax import nnx

    class VariationalLayer(nnx.Module):
        def __init__(self, shape, product, estimator, prior_scale, initial_scale, use_bias, rngs):
            self.mean = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
            self.log_scale = nnx.Param(jnp.log(jnp.full(shape, initial_scale, jnp.float32)))
            self.bias = nnx.Param(jnp.zeros(shape[-1], jnp.float32)) if use_bias else None
            self.prior_scale = carried(prior_scale)
            self.product, self.estimator = product, estimator
            self.rngs = rngs["noise"].fork()
            self.deterministic, self.noise_rows = False, None

        def posterior(self):
            """NumPyro's distribution of the kernel."""
            return normal(self.mean[...], self.log_scale[...])

        def penalty(self):
            """KL[q || prior], nats."""
            return kl_from_prior(self.posterior(), 0.0, value_of(self.prior_scale))

        def __call__(self, inputs):
            mean, scale = self.mean[...], jnp.exp(self.log_scale[...])
            inputs = as_rows(inputs, mean)
            if self.deterministic:
                outputs = self.product(inputs, mean)
            else:
                self.rngs()  # counted: a pass that draws
                key = self.rngs.key[...]  # not the counted one, or a layer called twice would have two kernels
                draw = shared_noise if self.noise_rows is None else self.estimator
                outputs = draw(key, inputs, mean, scale, self.product)
            return outputs if self.bias is None else outputs + self.bias[...]

    return VariationalLayer


def _deviation(key, mean, scale):
    return scale * jax.random.normal(key, mean.shape, mean.dtype)


def _signed(key, x):
    """Under one random sign a row and feature, the same at all places of a row; a random number has 32 of them."""
    rows, features = x.shape[0], x.shape[-1]
    words = -(-features // 32)
    bits = jax.random.bits(key, (rows, words, 1), jnp.uint32) >> jnp.arange(32, dtype=jnp.uint32)
    signs = 1 - 2 * (bits & 1).astype(x.dtype).reshape(rows, 32 * words)[:, :features]
    return x * signs.reshape(rows, *(1,) * (x.ndim - 2), features)


def _check(estimator, prior_scale, initial_scale) -> None:
    if not callable(estimator):
        raise TypeError(
            f"`estimator` must be a function, got {estimator!r}. Pass `models.local_reparametrisation`, `models.flipout`, "
            "`models.shared_noise` or your own."
        )
    check_scales("every weight", prior_scale=prior_scale, initial_scale=initial_scale)
