"""What cameras and files do: brightness, contrast, saturation, coarse pixels, JPEG.

Images are float (rows, height, width, channels) in [0, 1]; results are float32 of the same shape in [0, 1]. Nothing here is
random.

Source: Hendrycks and Dietterich 2019, and their make_cifar_c.py.
"""

import io
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.data.corruptions.images import Corrupted, Images, Strength, along_axes, as_images, camera, check_range


@jax.jit
def brightness(images: Images, *, amount: Strength) -> Corrupted:
    """The value V = max over channels becomes clip(V + amount); hue and saturation stay.

    Args:
        images: float (rows, height, width, channels) in [0, 1]; for one channel clip(x + amount).
        amount: added to the value; 0 = nothing changes.
    """
    images, amount = as_images(images), jnp.float32(amount)
    value = images.max(-1, keepdims=True)
    brighter = camera(value + amount)
    return camera(jnp.where(value == 0, brighter, images * (brighter / jnp.where(value == 0, 1, value))))


@jax.jit
def contrast(images: Images, *, factor: Strength) -> Corrupted:
    """clip(mean + factor * (x - mean)), the mean over each image's pixels, channel by channel.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        factor: 1 = nothing changes; smaller = less contrast.
    """
    images, factor = as_images(images), jnp.float32(factor)
    mean = images.mean((1, 2), keepdims=True)
    return camera(mean + factor * (images - mean))


@jax.jit
def saturate(images: Images, *, factor: Strength, amount: Strength) -> Corrupted:
    """The saturation S = 1 - min / max becomes clip(factor * S + amount); hue and value stay.

    A grey pixel has no hue; an `amount` turns it red, as in every HSV conversion that calls its hue 0.

    Args:
        images: float (rows, height, width, 3) in [0, 1].
        factor: on the saturation; below 1 = towards grey.
        amount: added to the saturation.

    Raises:
        ValueError: for images that are not of three channels.
    """
    images, factor, amount = as_images(images, channels=(3,)), jnp.float32(factor), jnp.float32(amount)
    value = images.max(-1, keepdims=True)
    below = value - images
    depth = below.max(-1, keepdims=True)  # value * S
    new_depth = value * camera(factor * depth / jnp.where(value == 0, 1, value) + amount)
    red = jnp.array([0.0, 1.0, 1.0], jnp.float32)[None, None, None]
    return camera(value - new_depth * jnp.where(depth == 0, red, below / jnp.where(depth == 0, 1, depth)))


@partial(jax.jit, static_argnames=("share",))
def pixelate(images: Images, *, share: float) -> Corrupted:
    """Resized to floor(share * side) and back, both with Pillow's box filter.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        share: of each side that is left, in (0, 1]; 1 = nothing changes; static.

    Raises:
        ValueError: for a share outside (0, 1], or one that leaves no pixel.
    """
    images = as_images(images)
    sides = images.shape[1:3]
    small = [math.floor(share * side) for side in sides] if 0 < share <= 1 else [0]
    if 0 in small:
        raise ValueError(f"`share` must be in (0, 1] and leave a pixel, got {share} for images of {sides}. Enlarge it.")
    down, across = (_box(side, few) @ _box(few, side) for few, side in zip(small, sides, strict=True))
    return camera(along_axes(images, down.T, across.T))


def _box(old: int, new: int) -> np.ndarray:
    """(old, new): a new pixel is the mean of the old ones whose centre lies within half its width, at least half of one."""
    width = max(old / new, 1.0)
    centre = (np.arange(new) + 0.5) * old / new
    offset = (np.arange(old)[:, None] + 0.5 - centre[None]) / width
    weight = ((offset > -0.5) & (offset <= 0.5)).astype(np.float64)
    return weight / weight.sum(0)


def jpeg(images: Images, *, quality: int) -> Corrupted:
    """Written as JPEG and read again, by Pillow: on the host, image after image; cannot be jitted.

    Args:
        images: float (rows, height, width, 1 or 3) in [0, 1]; rounded to 8 bits.
        quality: Pillow's, from 1 to 95; smaller = stronger.

    Raises:
        ImportError: without Pillow.
        TypeError: inside a jitted function.
        ValueError: for a number of channels other than 1 and 3, values outside [0, 1], or another quality.
    """
    if isinstance(images, Tracer):
        raise TypeError(
            "`images` must be arrays on the host, got a value that jax is tracing. Call `jpeg` outside jit and vmap."
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("`jpeg` needs Pillow, which is not installed. Run `pip install pillow`.") from error
    if quality not in range(1, 96):
        raise ValueError(f"`quality` must be a whole number from 1 to 95, got {quality}. 40 is CIFAR-10-C's strongest.")
    host = np.asarray(as_images(images, channels=(1, 3)))
    check_range(host)

    def compressed(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    levels = np.rint(host * 255).astype(np.uint8)
    written = np.stack([compressed(image[..., 0] if image.shape[-1] == 1 else image) for image in levels])
    return jnp.asarray(written.reshape(host.shape).astype(np.float32) / 255)
