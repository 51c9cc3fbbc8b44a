"""Convolution as one matrix product with a banded matrix: fast on CPU inside the loop over members and steps."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.types import Array


def band_convolution(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels out_channels"],
    *,
    margin: int,
) -> Float[jax.Array, "batch out_height out_width out_channels"]:
    """out[y, x] = sum_ij image[y + i - margin, x + j - margin] kernel[i, j]: a convolution of stride 1, zeros outside.

    A row of the output is linear in as many rows of the image as the kernel is high: one product with a matrix that
    repeats the kernel along its diagonal. It multiplies by zeros (5.6 times the work for 5 x 5 on 28 columns), but XLA's
    own convolutions fall to naive code on CPU inside a loop (jax issue 12868), and small channel numbers leave im2col
    with products too thin to be fast. Worth it for small images alone.

    Args:
        images: pixels.
        kernel: weights, as `nnx.Conv` keeps them.
        margin: rows and columns of zeros on each side; (kernel size - 1) / 2 keeps the image's size.
    """
    rows, columns, _, depth = kernel.shape
    batch, height, width, _ = images.shape
    out_height, out_width = height + 2 * margin - rows + 1, width + 2 * margin - columns + 1
    shift = np.arange(columns)[:, None, None]
    meets = np.arange(width)[:, None] + margin == np.arange(out_width) + shift  # kernel column, column in, column out
    band = jnp.einsum("jvx,ijcd->ivcxd", jnp.asarray(meets, kernel.dtype), kernel)
    padded = jnp.pad(images, ((0, 0), (margin, margin), (0, 0), (0, 0))).reshape(batch, height + 2 * margin, -1)
    seen = jnp.concatenate([padded[:, i : i + out_height] for i in range(rows)], axis=-1)
    out = seen @ band.reshape(seen.shape[-1], out_width * depth)
    return out.reshape(batch, out_height, out_width, depth)
