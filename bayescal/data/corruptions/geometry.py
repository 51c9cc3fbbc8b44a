"""Shifts of place: rotation, translation, elastic deformation; bilinear between pixels.

Images are float (rows, height, width, channels) in [0, 1]; results are float32 of the same shape in [0, 1].

Source: elastic: Hendrycks and Dietterich 2019, and their make_cifar_c.py.
"""

import jax
import jax.numpy as jnp

from bayescal.data.corruptions.blur import smooth
from bayescal.data.corruptions.images import Corrupted, Images, Strength, as_images, bilinear, camera, grid, row_keys
from bayescal.types import Key


@jax.jit
def rotation(images: Images, *, degrees: Strength) -> Corrupted:
    """Turned counter-clockwise about the centre; 0 where the source lies outside. As scipy.ndimage.rotate at order 1.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        degrees: counter-clockwise; 0 = nothing changes.
    """
    images, degrees = as_images(images), jnp.float32(degrees)
    down, across = grid(images[0])
    middle_down, middle_across = ((n - 1) / 2 for n in images.shape[1:3])
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    dy, dx = down - middle_down, across - middle_across
    return _sampled(images, middle_down + cos * dy + sin * dx, middle_across - sin * dy + cos * dx)


@jax.jit
def translation(images: Images, *, down: Strength, right: Strength) -> Corrupted:
    """Moved down and to the right; 0 where the source lies outside. As scipy.ndimage.shift at order 1.

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        down: share of the height; negative = up.
        right: share of the width; negative = left.
    """
    images, down, right = as_images(images), jnp.float32(down), jnp.float32(right)
    at_down, at_across = grid(images[0])
    return _sampled(images, at_down - down * images.shape[1], at_across - right * images.shape[2])


def _sampled(images, down, across, slack=1e-4):
    """All images at the same places, 0 outside; rounding must not push an edge pixel out, hence a slack in pixels."""
    height, width = images.shape[1:3]
    inside = (down >= -slack) & (down <= height - 1 + slack) & (across >= -slack) & (across <= width - 1 + slack)
    at = jnp.clip(down, 0, height - 1), jnp.clip(across, 0, width - 1)
    sampled = jax.vmap(bilinear, (0, None, None))(images, *at)
    return camera(jnp.where(inside[None, ..., None], sampled, 0))


@jax.jit
def elastic(images: Images, key: Key, *, affine: Strength, amplitude: Strength, sigma: Strength) -> Corrupted:
    """x(place + random affine field + amplitude * smoothed uniform noise), mirrored at the edge; all 0 = the identity.

    The affine field is the one that moves three points, a third of the shorter side away from the centre, each by uniform
    noise of half-width `affine`. All three strengths are shares of the shorter side. (CIFAR-10-C interpolates twice, the
    affine part first, and so blurs a little more.)

    Args:
        images: float (rows, height, width, channels) in [0, 1].
        key: of the fields; row i draws from `fold_in(key, i)`.
        affine: half-width of the three points' moves.
        amplitude: of the noise in (-1, 1), before it is smoothed.
        sigma: of the smoothing, cut at 3 sigma; larger = smoother and smaller moves.
    """
    images, affine, amplitude, sigma = as_images(images), *map(jnp.float32, (affine, amplitude, sigma))
    height, width = images.shape[1:3]
    side = min(height, width)
    down, across = grid(images[0])
    arm = max(side // 3, 1)
    y, x = (down - height // 2)[..., None] / arm, (across - width // 2)[..., None] / arm

    def deformed(image, key):
        point_key, field_key = jax.random.split(key)
        corner, top, opposite = affine * side * jax.random.uniform(point_key, (3, 1, 1, 2), jnp.float32, minval=-1.0)
        # the points are (1, 1), (-1, 1) and (-1, -1) in (y, x); an affine field is fixed by three
        move = top + (corner - top) * (y + 1) / 2 + (opposite - top) * (1 - x) / 2
        noise = jax.random.uniform(field_key, (height, width, 2), jnp.float32, minval=-1.0)
        move = move + amplitude * side * smooth(noise, sigma * side, edges="symmetric", truncate=3.0)
        return bilinear(image, _mirrored(down + move[..., 0], height), _mirrored(across + move[..., 1], width))

    return camera(jax.vmap(deformed)(images, row_keys(key, images)))


def _mirrored(place, size):
    """Folds any place into [0, size - 1], the edge pixel being the mirror."""
    period = max(2 * (size - 1), 1)
    place = jnp.mod(place, period)
    return jnp.clip(jnp.minimum(place, period - place), 0, size - 1)
