"""Blurs: what a lens out of focus, a moving or zooming camera, or uneven glass does.

Images are float (rows, height, width, channels) in [0, 1]; results are float32 of the same shape. Every blur is a mean of
pixels, so that a constant image stays as it is. With a key, row i draws from `fold_in(key, i)`.

Source: Hendrycks and Dietterich 2019, and their make_cifar_c.py; the trail of motion blur after ImageMagick (recalled).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.data.corruptions.images import (
    Corrupted,
    Count,
    Images,
    Strength,
    along_axes,
    as_images,
    bilinear,
    camera,
    grid,
    row_keys,
)
from bayescal.types import Key


def smooth(images: jax.Array, sigma, *, edges: str, truncate: float = 4.0) -> jax.Array:
    """sum_ij g_i g_j x: (..., height, width, channels) under a normal kernel, cut at `truncate` sigma and one image's side.

    Args:
        images: any numbers.
        sigma: in pixels; 0 = nothing changes.
        edges: what lies outside, in numpy.pad's words: "edge" or "symmetric".
        truncate: where the kernel ends, in units of sigma.
    """

    sigma = jnp.float32(sigma)

    def kernel(size):
        inside = np.pad(np.arange(size), size, mode=edges)  # type: ignore[call-overload]  the pixel each place stands for
        offset = jnp.asarray(np.arange(-size, 2 * size)[None] - np.arange(size)[:, None], jnp.float32)
        weight = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)
        weight = jnp.where(jnp.abs(offset) <= jnp.floor(truncate * sigma + 0.5), weight, 0)
        folded = jnp.matmul(weight, jnp.asarray(np.eye(size)[inside], jnp.float32), precision="highest")
        return folded / weight.sum(1, keepdims=True)

    return along_axes(images, kernel(images.shape[-3]), kernel(images.shape[-2]))


@jax.jit
def gaussian_blur(images: Images, *, sigma: Strength) -> Corrupted:
    """Mean of the pixels around, with normal weights that end at 4 sigma; edge pixels go on outside.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        sigma: in pixels; 0 = nothing changes.
    """
    return camera(smooth(as_images(images), sigma, edges="edge"))


@partial(jax.jit, static_argnames=("radius", "softness"))
def defocus_blur(images: Images, *, radius: float, softness: float) -> Corrupted:
    """Mean over a disc, whose rim is softened by a 3 x 3 (above radius 8: 5 x 5) normal kernel; mirrored at the edge.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        radius: of the disc, in pixels; static. Below 1 the disc is one pixel, and the softened rim all there is.
        softness: sigma of the rim in pixels, above 0; static.

    Raises:
        ValueError: for a radius below 0 or a softness that is not above 0.
    """
    if not radius >= 0 or not softness > 0:
        raise ValueError(
            f"`radius` must be 0 or more and `softness` above 0, got {radius} and {softness}. Both are in pixels."
        )
    images = as_images(images)
    kernel = _disc(radius, softness)
    half = len(kernel) // 2
    padded = jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect")
    planes = jnp.moveaxis(padded, -1, 1).reshape(-1, 1, *padded.shape[1:3])
    blurred = jax.lax.conv(
        planes, jnp.asarray(kernel)[None, None], (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST
    )
    return camera(jnp.moveaxis(blurred.reshape(len(images), images.shape[-1], *images.shape[1:3]), 1, -1))


def _disc(radius: float, softness: float) -> np.ndarray:
    rim = 1 if radius <= 8 else 2
    half = math.floor(radius) + rim
    offset = np.arange(-half, half + 1)
    disc = (offset[:, None] ** 2 + offset[None] ** 2 <= radius**2).astype(np.float64)
    normal = np.exp(-0.5 * (np.arange(-rim, rim + 1) / softness) ** 2)
    soften = lambda line: np.convolve(line, normal / normal.sum(), mode="same")
    for axis in (0, 1):
        disc = np.apply_along_axis(soften, axis, disc)
    return (disc / disc.sum()).astype(np.float32)


@jax.jit
def glass_blur(images: Images, key: Key, *, sigma: Strength, reach: Count, iterations: Count) -> Corrupted:
    """Normal blur, then every pixel shows one drawn from its neighbourhood, then the blur again.

    The neighbour's offset is uniform in -reach, ..., reach - 1 along each axis, the same for all channels; the `reach`
    + 1 outermost pixels at the top and the left, and `reach` - 1 at the other sides, stay. For reach 1 that is what
    CIFAR-10-C does: its swaps of array views copy.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the offsets; row i draws from `fold_in(key, i)`.
        sigma: of both blurs, in pixels.
        reach: largest offset in pixels, a whole number.
        iterations: how often pixels are drawn, a whole number.
    """
    images = as_images(images)
    height, width = images.shape[1:3]
    down, across = jnp.arange(height)[:, None], jnp.arange(width)[None]
    loose = (down > reach) & (down <= height - reach) & (across > reach) & (across <= width - reach)

    def shuffled(image, key):
        def draw(i, image):
            offset = jax.random.randint(jax.random.fold_in(key, i), (2, height, width), -reach, reach, jnp.int32)
            offset = jnp.where(loose[None], offset, 0)
            return image[down + offset[0], across + offset[1]]

        return jax.lax.fori_loop(0, iterations, draw, image)

    smoothed = smooth(images, sigma, edges="edge")
    return camera(smooth(jax.vmap(shuffled)(smoothed, row_keys(key, images)), sigma, edges="edge"))


@jax.jit
def motion_blur(images: Images, key: Key, *, radius: Count, sigma: Strength) -> Corrupted:
    """Mean along a trail of `radius` pixels on one side, with half-normal weights; edge pixels go on outside.

    Each image's direction is uniform within 45 degrees of the horizontal.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the directions; row i draws from `fold_in(key, i)`.
        radius: length of the trail in pixels, a whole number; 0 = nothing changes.
        sigma: how far the trail's weight reaches, in pixels, above 0.
    """
    images = as_images(images)

    def blurred(image, key):
        return trail(image, jax.random.uniform(key, dtype=jnp.float32, minval=-45.0, maxval=45.0), radius, sigma)

    return camera(jax.vmap(blurred)(images, row_keys(key, images)))


def trail(image: jax.Array, degrees, radius, sigma) -> jax.Array:
    """sum_i w_i x(place + i * (sin, cos)), w_i ~ exp(-i^2 / (2 sigma^2)), i = 0, ..., radius: one image, bilinear."""
    degrees, sigma = jnp.float32(degrees), jnp.float32(sigma)
    down, across = grid(image)
    height, width = image.shape[:2]
    step_down, step_across = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))

    def add(i, sums):
        length = jnp.float32(i)
        weight = jnp.exp(-0.5 * (length / sigma) ** 2)
        at = jnp.clip(down + length * step_down, 0, height - 1), jnp.clip(across + length * step_across, 0, width - 1)
        return sums[0] + weight * bilinear(image, *at), sums[1] + weight

    total, weights = jax.lax.fori_loop(0, radius + 1, add, (jnp.zeros_like(image), jnp.float32(0)))
    return total / weights


@jax.jit
def zoom_blur(images: Images, *, largest: Strength, num_zooms: Count) -> Corrupted:
    """Mean of the image and of `num_zooms` zooms about its centre, evenly spaced from 1 to `largest`; bilinear.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        largest: zoom factor, at least 1; 1 = nothing changes.
        num_zooms: a whole number, at least 2.
    """
    images, largest = as_images(images), jnp.float32(largest)
    add = lambda i, total: total + zoom(images, 1 + (largest - 1) * jnp.float32(i) / (num_zooms - 1))
    return camera(jax.lax.fori_loop(0, num_zooms, add, images) / (num_zooms + 1))


def zoom(images: jax.Array, factor) -> jax.Array:
    """x(centre + (place - centre) / factor), bilinear: (..., height, width, channels); factor at least 1."""

    factor = jnp.float32(factor)

    def lines(size):
        pixels = jnp.arange(size, dtype=jnp.float32)
        centre = (size - 1) / 2
        places = centre + (pixels - centre) / factor
        return jnp.maximum(1 - jnp.abs(places[:, None] - pixels[None]), 0)  # a tent on each pixel is bilinear

    return along_axes(images, lines(images.shape[-3]), lines(images.shape[-2]))
