"""Noise, pixel by pixel and channel by channel.

Images are float (rows, height, width, channels) in [0, 1]; results are float32 of the same shape, clipped to [0, 1] as a
camera would. Row i draws from `fold_in(key, i)`: its result does not depend on the rows beside it.

Source: Hendrycks and Dietterich 2019, and their make_cifar_c.py.
"""

import jax
import jax.numpy as jnp

from bayescal.data.corruptions.images import Corrupted, Images, Strength, as_images, camera, row_keys
from bayescal.types import Key


@jax.jit
def gaussian_noise(images: Images, key: Key, *, std: Strength) -> Corrupted:
    """clip(x + std * e), e ~ N(0, 1).

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        std: standard deviation; 0 = none.
    """
    images = as_images(images)
    return camera(images + std * _normal(images, key))


@jax.jit
def speckle_noise(images: Images, key: Key, *, std: Strength) -> Corrupted:
    """clip(x + x * std * e), e ~ N(0, 1): black stays black.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        std: standard deviation relative to the pixel; 0 = none.
    """
    images = as_images(images)
    return camera(images + images * std * _normal(images, key))


@jax.jit
def shot_noise(images: Images, key: Key, *, photons: Strength) -> Corrupted:
    """clip(n / photons), n ~ Poisson(photons * x): mean x, variance x / photons before clipping.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise; of jax's default kind (threefry).
        photons: counted in a white pixel; fewer = more noise.
    """
    images = as_images(images)
    rate = photons * images
    counts = jax.vmap(jax.random.poisson)(row_keys(key, images), jnp.where(jnp.isnan(rate), 0, rate))
    return camera(counts.astype(jnp.float32) / photons + 0 * rate)  # no count is NaN, whatever its rate


@jax.jit
def impulse_noise(images: Images, key: Key, *, share: Strength) -> Corrupted:
    """Each number is replaced with probability `share`: by 0 or 1, equally often (salt and pepper).

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        share: of the numbers that are replaced, in [0, 1]; each channel on its own.
    """
    images = as_images(images)
    draw = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:]))(row_keys(key, images))
    salt = jnp.where(draw < share / 2, 1.0, 0.0) + 0 * images  # NaN under salt stays NaN
    return camera(jnp.where(draw < share, salt, images))


def _normal(images, key):
    return jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(row_keys(key, images))
