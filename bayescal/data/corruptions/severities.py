"""Five severities of each corruption: for small photographs, and for digits; and `corrupt`, which picks one by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.data.corruptions import blur, digital, geometry, noise, weather
from bayescal.data.corruptions.images import Corrupted, Images, as_images, check_range
from bayescal.types import Key


class Corruption(NamedTuple):
    """A function of images, and its keyword arguments at severities 1, 2, ...

    function: `(images, **strengths) -> images`, or `(images, key, **strengths) -> images`.
    """

    function: Callable[..., jax.Array]
    strengths: tuple[dict[str, Any], ...]


def _by(function: Callable[..., jax.Array], **columns: tuple) -> Corruption:
    """A corruption from its arguments, each as the tuple of its values at severities 1 to 5."""
    return Corruption(
        function, tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    )


# For 32 x 32 pixels: the constants of CIFAR-10-C (hendrycks/robustness, make_cifar_c.py, looked up), but for spatter at
# severities 1 to 3, where CIFAR-10-C has water. Frost is missing: it needs photographs. Nothing is rounded to 8 bits on the
# way, apart from jpeg; so the images are like those of CIFAR-10-C, and not the same. The mean squared change rises with
# severity, but for three whose constants change in kind on the way: glass_blur (fewer draws, more blur), saturate (to grey,
# then to colour), and elastic (from affine moves to ripples, where the change falls).
SMALL_IMAGES: dict[str, Corruption] = {
    "gaussian_noise": _by(noise.gaussian_noise, std=(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": _by(noise.shot_noise, photons=(500, 250, 100, 75, 50)),
    "impulse_noise": _by(noise.impulse_noise, share=(0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": _by(noise.speckle_noise, std=(0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": _by(blur.gaussian_blur, sigma=(0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": _by(blur.defocus_blur, radius=(0.3, 0.4, 0.5, 1.0, 1.5), softness=(0.4, 0.5, 0.6, 0.2, 0.1)),
    "glass_blur": _by(
        blur.glass_blur, sigma=(0.05, 0.25, 0.4, 0.25, 0.4), reach=(1, 1, 1, 1, 1), iterations=(1, 1, 1, 2, 2)
    ),
    "motion_blur": _by(blur.motion_blur, radius=(6, 6, 6, 8, 9), sigma=(1.0, 1.5, 2.0, 2.0, 2.5)),
    "zoom_blur": _by(blur.zoom_blur, largest=(1.06, 1.11, 1.15, 1.2, 1.25), num_zooms=(7, 12, 16, 21, 26)),
    "fog": _by(weather.fog, amount=(0.2, 0.5, 0.75, 1.0, 1.5), decay=(3.0, 3.0, 2.5, 2.0, 1.75)),
    "snow": _by(
        weather.snow,
        mean=(0.1, 0.1, 0.15, 0.25, 0.3),
        std=(0.2, 0.2, 0.3, 0.3, 0.3),
        size=(1.0, 1.0, 1.75, 2.25, 1.25),
        threshold=(0.6, 0.5, 0.55, 0.6, 0.65),
        radius=(8, 10, 10, 12, 14),
        sigma=(3.0, 4.0, 4.0, 6.0, 12.0),
        keep=(0.95, 0.9, 0.9, 0.85, 0.8),
    ),
    "spatter": _by(
        weather.spatter,
        mean=(0.65,) * 5,
        std=(0.1,) * 5,
        sigma=(0.7, 0.7, 0.7, 0.7, 0.5),
        threshold=(0.72, 0.71, 0.70, 0.69, 0.68),
        softness=(0.6,) * 5,
    ),
    "brightness": _by(digital.brightness, amount=(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": _by(digital.contrast, factor=(0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": _by(digital.saturate, factor=(0.3, 0.1, 1.5, 2.0, 2.5), amount=(0.0, 0.0, 0.0, 0.1, 0.2)),
    "pixelate": _by(digital.pixelate, share=(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": _by(digital.jpeg, quality=(80, 65, 58, 50, 40)),
    "elastic": _by(
        geometry.elastic,
        affine=(0.08, 0.07, 0.06, 0.05, 0.03),
        amplitude=(0.0, 0.05, 0.08, 0.1, 0.1),
        sigma=(0.0, 0.2, 0.06, 0.04, 0.03),
    ),
}

# For grey digits on black, of 8 x 8 or 28 x 28 pixels: standard deviations, degrees counter-clockwise, factors on the distance
# to the image's mean, shares of the side.
DIGITS: dict[str, Corruption] = {
    "noise": _by(noise.gaussian_noise, std=(0.1, 0.2, 0.3, 0.4, 0.5)),
    "rotation": _by(geometry.rotation, degrees=(15, 30, 45, 60, 75)),
    "contrast": _by(digital.contrast, factor=(0.75, 0.6, 0.45, 0.3, 0.15)),
    "translation": _by(geometry.translation, down=(0.05, 0.1, 0.15, 0.2, 0.25), right=(0.05, 0.1, 0.15, 0.2, 0.25)),
}


def corrupt(
    name: str,
    images: Images,
    severity: int,
    key: Key,
    *,
    severities: Mapping[str, Corruption] = SMALL_IMAGES,
) -> Corrupted:
    """The images under a named shift: `severities[name].function` with the strengths of `severity`.

    The result depends on the key, and on each row's place and image, not on the rows beside it. Values are checked here, on
    the host; the functions themselves (`bc.data.corruptions`) check shapes alone, and can be jitted (but for `jpeg`).

    Args:
        name: in `severities`.
        images: float (rows, height, width, channels) in [0, 1].
        severity: 1 to 5; higher = stronger.
        key: of what is random in the shift; the same key gives the same images.
        severities: `SMALL_IMAGES` for photographs of about 32 x 32 pixels, `DIGITS` for digits, or a table of your own.

    Returns:
        float32 array of the same shape, in [0, 1].

    Raises:
        TypeError: for a key that is none, or images of whole numbers.
        ValueError: for another name or severity, another shape, or images outside [0, 1].
    """
    if name not in severities:
        raise ValueError(f"`name` must be one of {sorted(severities)}, got {name!r}. Check the spelling.")
    function, strengths = severities[name]
    if severity not in range(1, len(strengths) + 1):
        raise ValueError(
            f"`severity` must be a whole number from 1 to {len(strengths)}, got {severity!r}. The largest is the strongest."
        )
    if not isinstance(key, jax.Array) or not (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(f"`key` must be one key of jax, got {key!r}. Make it from a seed: `jax.random.key(0)`.")
    images = as_images(images)
    check_range(np.asarray(images))
    drawn = (key,) if "key" in inspect.signature(function).parameters else ()
    return function(images, *drawn, **strengths[int(severity) - 1])
