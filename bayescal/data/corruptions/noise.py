"""Noise, pixel by pixel and channel by channel.

Images are float (rows, height, width, channels) in [0, 1]; results are float32 of the same shape, clipped to [0, 1] as a
camera would. Row i draws from `fold_in(key, i)`: its result does not depend on the rows beside it.

Source: Hendrycks and Dietterich 2019, and their make_cifar_c.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.data.corruptions.images import Corrupted, Images, Strength, as_images, camera, row_keys
from bayescal.types import Key

MANY = (
    1e5  # photons in a pixel from which on they are normal; jax's Poisson is a few % too wide at 10^6, and int32 ends
)


@jax.jit
def gaussian_noise(images: Images, key: Key, *, std: Strength) -> Corrupted:
    """clip(x + std * e), e ~ N(0, 1).

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        std: standard deviation; 0 = none.
    """
    images, std = as_images(images), jnp.float32(std)
    return camera(images + std * _normal(images, key))


@jax.jit
def speckle_noise(images: Images, key: Key, *, std: Strength) -> Corrupted:
    """clip(x + x * std * e), e ~ N(0, 1): black stays black.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        std: standard deviation relative to the pixel; 0 = none.
    """
    images, std = as_images(images), jnp.float32(std)
    return camera(images + images * std * _normal(images, key))


@jax.jit
def shot_noise(images: Images, key: Key, *, photons: Strength) -> Corrupted:
    """clip(n / photons), n ~ Poisson(photons * x): mean x, variance x / photons before clipping.

    From 10^5 photons in a pixel on, n is a rounded normal number of the same mean and variance.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        photons: counted in a white pixel; fewer = more noise.
    """
    images, photons = as_images(images), jnp.float32(photons)
    rate = photons * images
    few = jnp.where(rate < MANY, rate, 0)
    counts = jax.vmap(lambda k, rate: jax.random.poisson(k, rate, dtype=jnp.int32))(row_keys(key, images), few)
    other = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no row's
    many = jnp.round(rate + jnp.sqrt(rate) * _normal(images, other))
    return camera(jnp.where(rate < MANY, counts.astype(jnp.float32), many) / photons)


@jax.jit
def impulse_noise(images: Images, key: Key, *, share: Strength) -> Corrupted:
    """Each number is replaced with probability `share`: by 0 or 1, equally often (salt and pepper).

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the noise.
        share: of the numbers that are replaced, in [0, 1]; each channel on its own.
    """
    images, share = as_images(images), jnp.float32(share)
    draw = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:], jnp.float32))(row_keys(key, images))
    salt = (draw < share / 2).astype(jnp.float32) + 0 * images  # NaN under salt stays NaN
    return camera(jnp.where(draw < share, salt, images))


def _normal(images, key):
    return jax.vmap(lambda k: jax.random.normal(k, images.shape[1:], jnp.float32))(row_keys(key, images))
