"""What every corruption shares: the check of its images, one key a row, and sampling between pixels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Real

from bayescal.types import Array, Key

Images = Float[Array, "rows height width channels"]
Corrupted = Float32[jax.Array, "rows height width channels"]
Strength = float | Real[jax.Array, ""]
Count = int | Int[jax.Array, ""]

THREEFRY = "threefry2x32"
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey value (ITU-R BT.601)


def as_images(images, channels: tuple[int, ...] | None = None) -> jax.Array:
    """The images in float32.

    Raises:
        TypeError: for whole numbers.
        ValueError: for another shape, or a number of channels that is not among `channels`.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"`images` must be floats in [0, 1], got {images.dtype}. Divide by the largest value, such as 255."
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"`images` must have shape (rows, height, width, channels), none of them 0, got {images.shape}. Add the channel "
            "axis to grey images: `images[..., None]`."
        )
    if channels is not None and images.shape[-1] not in channels:
        raise ValueError(
            f"`images` must have {' or '.join(map(str, channels))} channels, got {images.shape[-1]}. Channels come last."
        )
    return images.astype(jnp.float32)


def check_range(images) -> None:
    """Raises unless every number lies in [0, 1]."""
    low, high = float(np.min(images)), float(np.max(images))
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"`images` must lie in [0, 1], got values from {low:g} to {high:g}. Divide by the largest possible value, such "
            "as 255, and repair NaN."
        )


def camera(images: jax.Array) -> jax.Array:
    """Clips to [0, 1], as a camera does; NaN stays NaN."""
    return jnp.clip(images, 0, 1)


def row_keys(key: Key, images: jax.Array) -> Key:
    """`fold_in(key, row)` for every row: what happens to an image does not depend on the rows beside it.

    Of jax's default kind (threefry), whatever the key's: under vmap the other kinds draw all rows by the first one's.
    """
    if jax.random.key_impl(key) != THREEFRY:
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=THREEFRY)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))


def grey(image: jax.Array) -> jax.Array:
    """Grey value of one image of 1 or 3 channels: (height, width, 1)."""
    return image if image.shape[-1] == 1 else (image * jnp.array(LUMA, jnp.float32)[None, None]).sum(-1, keepdims=True)


def grid(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of each pixel of one image: two float arrays (height, width)."""
    height, width = image.shape[:2]
    down, across = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in (height, width)), indexing="ij")
    return down, across


def bilinear(image: jax.Array, down: jax.Array, across: jax.Array) -> jax.Array:
    """One image between its pixels, at places that must lie in it: (height, width, channels) at (...) -> (..., channels)."""

    def neighbours(place, size):
        low = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, size - 1)
        return low, jnp.minimum(low + 1, size - 1), (place - low.astype(jnp.float32))[..., None]

    up, low, part_down = neighbours(down, image.shape[0])
    left, right, part_across = neighbours(across, image.shape[1])
    above = image[up, left] * (1 - part_across) + image[up, right] * part_across
    below = image[low, left] * (1 - part_across) + image[low, right] * part_across
    return above * (1 - part_down) + below * part_down


def along_axes(images: jax.Array, down: jax.Array | np.ndarray, across: jax.Array | np.ndarray) -> jax.Array:
    """sum_ij down[h, i] across[w, j] images[..., i, j, c]: a linear map of the rows of pixels, and one of the columns."""
    across, down = (jnp.asarray(x, jnp.float32) for x in (across, down))
    images = jnp.einsum("...ijc,wj->...iwc", images, across, precision="highest")
    return jnp.einsum("...iwc,hi->...hwc", images, down, precision="highest")
