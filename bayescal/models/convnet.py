"""Small convolutional network."""

from collections.abc import Sequence

from bayescal.models.adapters import check_dropout, from_nnx
from bayescal.types import Model


def convnet(
    shape: tuple[int, int, int],
    channels: Sequence[int],
    hidden: int,
    out_features: int,
    *,
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> Model:
    """3x3 convolutions with ReLU and 2x2 max-pooling, one dense layer, one head: (batch, *shape) -> (batch, out_features).

    Args:
        shape: height, width and channels of an image; height and width divisible by 2 ** len(channels).
        channels: output channels of each convolution.
        hidden: width of the dense layer.
        out_features: classes, or numbers per example.
        dropout: rate after every convolution's pooling and after the dense layer, in [0, 1).
        batch_norm: normalise before every ReLU.

    Raises:
        ValueError: for an image that cannot be halved once per convolution, or a dropout rate outside [0, 1).
    """
    from flax import nnx

    check_dropout(dropout)

    height, width, depth = shape
    factor = 2 ** len(channels)
    if height % factor or width % factor:
        raise ValueError(
            f"`shape` must have height and width divisible by 2 ** len(channels) = {factor}, got {shape}. "
            "Use fewer convolutions or pad the images."
        )

    class ConvNet(nnx.Module):
        def __init__(self, rngs):
            depths = [depth, *channels]
            flat = height * width // factor**2 * depths[-1]
            self.conv = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in zip(depths, channels, strict=False)])
            self.dense = nnx.Linear(flat, hidden, rngs=rngs)
            self.norm = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in [*channels, hidden]] if batch_norm else [])
            rates = [*channels, hidden] if dropout else []
            self.dropout = nnx.List([nnx.Dropout(dropout, rngs=rngs) for _ in rates])
            self.head = nnx.Linear(hidden, out_features, rngs=rngs)

        def __call__(self, inputs):
            x = inputs
            for i, conv in enumerate(self.conv):
                x = conv(x)
                x = nnx.relu(self.norm[i](x) if batch_norm else x)
                n, h, w, c = x.shape
                x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))  # twice as fast as reduce_window on CPU
                x = self.dropout[i](x) if dropout else x
            x = self.dense(x.reshape(x.shape[0], -1))
            x = nnx.relu(self.norm[-1](x) if batch_norm else x)
            x = self.dropout[-1](x) if dropout else x
            return self.head(x)

    return from_nnx(ConvNet)
