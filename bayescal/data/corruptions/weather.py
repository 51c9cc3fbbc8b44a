"""Weather without photographs: fog by plasma fractals, snow and mud by thresholded noise. (Frost needs photographs.)

Images are float (rows, height, width, channels) in [0, 1]; results are float32 of the same shape, clipped to [0, 1] as a
camera would. Row i draws from `fold_in(key, i)`.

Source: Hendrycks and Dietterich 2019, and their make_cifar_c.py.
"""

import math

import jax
import jax.numpy as jnp

from bayescal.data.corruptions.blur import smooth, trail, zoom
from bayescal.data.corruptions.images import Corrupted, Count, Images, Strength, as_images, camera, grey, row_keys
from bayescal.types import Key

MUD = (63 / 255, 42 / 255, 20 / 255)


@jax.jit
def fog(images: Images, key: Key, *, amount: Strength, decay: Strength) -> Corrupted:
    """(x + amount * plasma) * m / (m + amount), m the image's largest value: bright clouds, less contrast.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the clouds; row i draws from `fold_in(key, i)`.
        amount: of fog; 0 = none.
        decay: of the clouds' details, see `plasma`; smaller = finer clouds.
    """
    images, amount, decay = as_images(images), jnp.float32(amount), jnp.float32(decay)
    height, width = images.shape[1:3]

    def foggy(image, key):
        clouds = plasma(key, max(height, width), decay)[:height, :width, None]
        largest = image.max()
        return (image + amount * clouds) * (largest / (largest + amount + jnp.finfo(jnp.float32).tiny))

    return camera(jax.vmap(foggy)(images, row_keys(key, images)))


def plasma(key: Key, size: int, decay) -> jax.Array:
    """Plasma fractal by diamonds and squares: at least (size, size), sides a power of 2, periodic, from 0 to 1.

    Each halving of the grid adds to the mean of four neighbours uniform noise, whose amplitude falls by decay^2 from one
    grid to the next: by 9 for clouds, by 3 for something close to grain.
    """
    levels = math.ceil(math.log2(max(size, 2)))
    draws = jax.random.uniform(
        key, (4**levels - 1,), jnp.float32, minval=-1.0
    )  # one draw, cut up: many small ones compile slowly
    heights = jnp.zeros((1, 1), jnp.float32)
    for level in range(levels):
        new = draws[4**level - 1 : 4 ** (level + 1) - 1].reshape(3, *heights.shape) / decay ** (2 * level)
        right, below = jnp.roll(heights, -1, 1), jnp.roll(heights, -1, 0)
        middle = (heights + right + below + jnp.roll(right, -1, 0)) / 4 + new[0]
        top = (heights + right + middle + jnp.roll(middle, 1, 0)) / 4 + new[1]
        left = (heights + below + middle + jnp.roll(middle, 1, 1)) / 4 + new[2]
        blocks = jnp.stack([jnp.stack([heights, top], -1), jnp.stack([left, middle], -1)], 1)
        heights = blocks.reshape(2 * len(heights), -1)
    heights = heights - heights.min()
    return heights / heights.max()


@jax.jit
def snow(
    images: Images,
    key: Key,
    *,
    mean: Strength,
    std: Strength,
    size: Strength,
    threshold: Strength,
    radius: Count,
    sigma: Strength,
    keep: Strength,
) -> Corrupted:
    """clip(keep * x + (1 - keep) * max(x, 1.5 grey + 0.5) + flakes + flakes turned by half a circle).

    Flakes are normal noise zoomed by `size`, set to 0 below `threshold`, and blurred along a direction within 45 degrees
    of the vertical.

    Args:
        images: float (rows, height, width, 1 or 3) in [0, 1].
        key: of the flakes; row i draws from `fold_in(key, i)`.
        mean: of the noise.
        std: of the noise.
        size: zoom factor of the noise, at least 1; larger = larger flakes.
        threshold: noise below it is no flake.
        radius: length of a flake's trail in pixels, a whole number.
        sigma: how far the trail's weight reaches, in pixels, above 0.
        keep: share of the image that is not whitened.

    Raises:
        ValueError: for a number of channels other than 1 and 3.
    """
    images = as_images(images, channels=(1, 3))
    mean, std, threshold, keep = map(jnp.float32, (mean, std, threshold, keep))

    def snowy(image, key):
        noise_key, angle_key = jax.random.split(key)
        noise = zoom(mean + std * jax.random.normal(noise_key, (*image.shape[:2], 1), jnp.float32), size)
        flakes = camera(jnp.where(noise < threshold, 0, noise))
        flakes = trail(
            flakes, jax.random.uniform(angle_key, dtype=jnp.float32, minval=-135.0, maxval=-45.0), radius, sigma
        )
        white = keep * image + (1 - keep) * jnp.maximum(image, 1.5 * grey(image) + 0.5)
        return white + flakes + flakes[::-1, ::-1]

    return camera(jax.vmap(snowy)(images, row_keys(key, images)))


@jax.jit
def spatter(
    images: Images,
    key: Key,
    *,
    mean: Strength,
    std: Strength,
    sigma: Strength,
    threshold: Strength,
    softness: Strength,
) -> Corrupted:
    """x (1 - m) + mud * m: opaque brown spots (grey ones on grey images).

    m is where smoothed normal noise passes `threshold`, smoothed once more and set to 0 below 0.8. The water of CIFAR-10-C's
    severities 1 to 3, which rests on an edge detector, is left out.

    Args:
        images: float (rows, height, width, 1 or 3) in [0, 1].
        key: of the spots; row i draws from `fold_in(key, i)`.
        mean: of the noise.
        std: of the noise.
        sigma: of the noise's smoothing, in pixels.
        threshold: noise above it is mud; smaller = more mud.
        softness: sigma of the mud's smoothing, in pixels.

    Raises:
        ValueError: for a number of channels other than 1 and 3.
    """
    images = as_images(images, channels=(1, 3))
    mean, std, threshold = map(jnp.float32, (mean, std, threshold))
    mud = jnp.broadcast_to(jnp.array(MUD, jnp.float32)[None, None], (1, 1, 3))
    mud = mud if images.shape[-1] == 3 else grey(mud)

    def spattered(image, key):
        noise = mean + std * jax.random.normal(key, (*image.shape[:2], 1), jnp.float32)
        wet = (smooth(noise, sigma, edges="edge") > threshold).astype(jnp.float32)
        mask = smooth(wet, softness, edges="edge")
        mask = jnp.where(mask < 0.8, 0, mask)
        return image * (1 - mask) + mud * mask

    return camera(jax.vmap(spattered)(images, row_keys(key, images)))
