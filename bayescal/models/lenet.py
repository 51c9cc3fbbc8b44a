"""LeNet: a small convolutional network for images of one or a few channels."""

from collections.abc import Callable
from functools import cache

from bayescal.models.adapters import from_nnx
from bayescal.models.convnet import max_pool
from bayescal.models.dropout import Rate, check_dropout, dropout_layer, has_dropout
from bayescal.types import Model


def lenet(
    shape: tuple[int, int, int],
    out_features: int,
    *,
    channels: tuple[int, int] = (6, 16),
    dropout: Rate = 0.0,
    dense: Callable | None = None,
    conv: Callable | None = None,
) -> Model:
    """LeNet-5 with ReLU and max-pooling: (batch, *shape) -> (batch, out_features).

    5x5 convolution (same size), pooling, 5x5 convolution (no padding), pooling, dense 120, dense 84, head. Its features
    are what the head is given, (batch, 84). With 28 x 28 x 1 images and 10 outputs it has 61,706 parameters.

    Args:
        shape: height, width and channels of an image; height and width at least 12 and divisible by 4.
        out_features: classes, or numbers per example.
        channels: output channels of the two convolutions.
        dropout: rate after each pooling and each dense layer, in [0, 1); may be traced, see `dropout_layer`.
        dense, conv: what makes the layers, as in `convnet`.

    Raises:
        ValueError: for images that are too small or cannot be halved twice, or a dropout rate outside [0, 1).
    Source: LeCun et al. 1998 (recalled); it has trained subsampling, tanh and a sparse second convolution instead.
    """
    check_dropout(dropout)
    if any(size < 12 or size % 4 for size in shape[:2]):
        raise ValueError(
            f"`shape` must have height and width divisible by 4 and at least 12, got {shape}. Pad or resize the images."
        )
    return from_nnx(lambda rngs: _module()(shape, out_features, channels, dropout, dense, conv, rngs), head="head")


@cache  # jax keeps every module class for ever: one, and none that closes over a traced rate
def _module():
    from flax import nnx

    class LeNet(nnx.Module):
        def __init__(self, shape, out_features, channels, dropout, dense, conv, rngs):
            dense, conv = dense or nnx.Linear, conv or nnx.Conv
            height, width, depth = shape
            first, second = channels
            flat = (height // 2 - 4) // 2 * ((width // 2 - 4) // 2) * second
            layers = (depth, first, "SAME"), (first, second, "VALID")
            self.conv = nnx.List([conv(a, b, (5, 5), padding=padding, rngs=rngs) for a, b, padding in layers])
            self.dense = nnx.List([dense(a, b, rngs=rngs) for a, b in ((flat, 120), (120, 84))])
            self.dropout = nnx.List([dropout_layer(dropout, rngs) for _ in range(4)] if has_dropout(dropout) else [])
            self.head = dense(84, out_features, rngs=rngs)

        def __call__(self, inputs):
            x = inputs
            for i, conv in enumerate(self.conv):
                x = nnx.relu(max_pool(conv(x)))  # pooled first: the same, on a quarter of the pixels
                x = self.dropout[i](x) if self.dropout else x
            x = x.reshape(x.shape[0], -1)
            for i, dense in enumerate(self.dense):
                x = nnx.relu(dense(x))
                x = self.dropout[2 + i](x) if self.dropout else x
            return self.head(x)

    return LeNet
