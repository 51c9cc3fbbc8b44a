"""Small convolutional network."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bayescal.models.adapters import from_nnx
from bayescal.models.dropout import Rate, check_dropout, dropout_layer, has_dropout
from bayescal.types import Model


def convnet(
    shape: tuple[int, int, int],
    channels: Sequence[int],
    hidden: int,
    out_features: int,
    *,
    dropout: Rate = 0.0,
    batch_norm: bool = False,
    dense: Callable | None = None,
    conv: Callable | None = None,
) -> Model:
    """3x3 convolutions with ReLU and 2x2 max-pooling, one dense layer, one head: (batch, *shape) -> (batch, out_features).

    Its features are what the head is given, (batch, hidden).

    Args:
        shape: height, width and channels of an image; height and width divisible by 2 ** len(channels).
        channels: output channels of each convolution.
        hidden: width of the dense layer.
        out_features: classes, or numbers per example.
        dropout: rate after every convolution's pooling and after the dense layer, in [0, 1); may be traced, see
            `dropout_layer`.
        batch_norm: normalise before every ReLU.
        dense: `(in_features, out_features, *, rngs) -> layer` for the dense layers, such as `variational_dense`; None =
            `nnx.Linear`. Of layers that draw numbers the head is one: `features` with a key raises.
        conv: `(in_features, out_features, kernel_size, *, padding, rngs) -> layer`, such as `variational_conv`; None =
            `nnx.Conv`.

    Raises:
        ValueError: for an image that cannot be halved once per convolution, or a dropout rate outside [0, 1).
    """
    check_dropout(dropout)
    height, width, _ = shape
    factor = 2 ** len(channels)
    if height % factor or width % factor:
        raise ValueError(
            f"`shape` must have height and width divisible by 2 ** len(channels) = {factor}, got {shape}. "
            "Use fewer convolutions or pad the images."
        )

    build = lambda rngs: _module()(shape, channels, hidden, out_features, dropout, batch_norm, dense, conv, rngs)
    return from_nnx(build, head="head")


def max_pool(
    images: Float[jax.Array, "batch height width channels"],
) -> Float[jax.Array, "batch rows columns channels"]:
    """max over each 2 x 2 block of pixels; height and width must be even.

    Faster on CPU than `reduce_window`. Not reshape-and-max: under vmap on CPU, after batch norm, jax 0.10.2 compiles its
    gradient to wrong numbers.
    """
    x = jnp.maximum(images[:, ::2], images[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


@cache  # jax keeps every module class for ever: one, and none that closes over a traced rate
def _module():
    from flax import nnx

    class ConvNet(nnx.Module):
        def __init__(self, shape, channels, hidden, out_features, dropout, batch_norm, dense, conv, rngs):
            dense, conv = dense or nnx.Linear, conv or nnx.Conv
            height, width, depth = shape
            depths = [depth, *channels]
            flat = height * width // 4 ** len(channels) * depths[-1]
            widths = [*channels, hidden]
            self.conv = nnx.List([conv(a, b, (3, 3), padding="SAME", rngs=rngs) for a, b in pairwise(depths)])
            self.dense = dense(flat, hidden, rngs=rngs)
            self.norm = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in widths] if batch_norm else [])
            self.dropout = nnx.List([dropout_layer(dropout, rngs) for _ in widths] if has_dropout(dropout) else [])
            self.head = dense(hidden, out_features, rngs=rngs)

        def __call__(self, inputs):
            x = inputs
            for i, conv in enumerate(self.conv):
                x = conv(x)
                x = self.norm[i](x) if self.norm else x
                x = nnx.relu(max_pool(x))  # pooled first: the same, on a quarter of the pixels
                x = self.dropout[i](x) if self.dropout else x
            x = self.dense(x.reshape(x.shape[0], -1))
            x = nnx.relu(self.norm[-1](x) if self.norm else x)
            x = self.dropout[-1](x) if self.dropout else x
            return self.head(x)

    return ConvNet
