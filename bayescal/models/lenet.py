"""LeNet: a small convolutional network for images of one or a few channels."""

from functools import cache

from bayescal.models.adapters import from_nnx
from bayescal.models.band import band_convolution
from bayescal.models.convnet import max_pool
from bayescal.models.dropout import Rate, check_dropout, dropout_layer, has_dropout
from bayescal.types import Model


def lenet(shape: tuple[int, int, int], out_features: int, *, dropout: Rate = 0.0) -> Model:
    """LeNet-5 with ReLU and max-pooling: (batch, *shape) -> (batch, out_features).

    5x5 convolution to 6 channels (same size), pooling, 5x5 convolution to 16 channels (no padding), pooling, dense 120,
    dense 84, head. Its features are what the head is given, (batch, 84). With 28 x 28 x 1 images and 10 outputs it has
    61,706 parameters.

    Args:
        shape: height, width and channels of an image; height and width at least 12 and divisible by 4.
        out_features: classes, or numbers per example.
        dropout: rate after each pooling and each dense layer, in [0, 1); may be traced, see `dropout_layer`.

    Raises:
        ValueError: for images that are too small or cannot be halved twice, or a dropout rate outside [0, 1).
    Source: LeCun et al. 1998 (recalled); it has trained subsampling, tanh and a sparse second convolution instead.
    """
    check_dropout(dropout)
    if any(size < 12 or size % 4 for size in shape[:2]):
        raise ValueError(
            f"`shape` must have height and width divisible by 4 and at least 12, got {shape}. Pad or resize the images."
        )
    return from_nnx(lambda rngs: _module()(shape, out_features, dropout, rngs), head="head")


@cache  # jax keeps every module class for ever: one, and none that closes over a traced rate
def _module():
    from flax import nnx

    class LeNet(nnx.Module):
        def __init__(self, shape, out_features, dropout, rngs):
            height, width, depth = shape
            flat = (height // 2 - 4) // 2 * ((width // 2 - 4) // 2) * 16
            self.conv = nnx.List([nnx.Conv(a, b, (5, 5), rngs=rngs) for a, b in ((depth, 6), (6, 16))])
            self.dense = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((flat, 120), (120, 84))])
            self.dropout = nnx.List([dropout_layer(dropout, rngs) for _ in range(4)] if has_dropout(dropout) else [])
            self.head = nnx.Linear(84, out_features, rngs=rngs)

        def __call__(self, inputs):
            x = inputs
            for i, conv in enumerate(self.conv):
                x = band_convolution(x, conv.kernel[...], margin=(2, 0)[i]) + conv.bias[...]  # pyright: ignore
                x = max_pool(nnx.relu(x))
                x = self.dropout[i](x) if self.dropout else x
            x = x.reshape(x.shape[0], -1)
            for i, dense in enumerate(self.dense):
                x = nnx.relu(dense(x))
                x = self.dropout[2 + i](x) if self.dropout else x
            return self.head(x)

    return LeNet
