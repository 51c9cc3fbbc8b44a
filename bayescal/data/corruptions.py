"""Shifts of images at five severities: `corrupt(name, images, severity, seed)`. Images are (rows, height, width) in [0, 1].

Noise keeps values in [0, 1], as a camera would.
"""

from collections.abc import Callable

import numpy as np

NOISE = (0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviation
ROTATION = (15, 30, 45, 60, 75)  # degrees, counter-clockwise
CONTRAST = (0.75, 0.6, 0.45, 0.3, 0.15)  # factor on the distance to the image's mean


def noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise of standard deviation `NOISE[severity - 1]` and clips to [0, 1]."""
    return np.clip(images + rng.normal(0, NOISE[severity - 1], images.shape), 0, 1)


def rotation(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Rotates by `ROTATION[severity - 1]` degrees, bilinear, with zeros outside."""
    from scipy.ndimage import rotate

    return rotate(images, ROTATION[severity - 1], axes=(2, 1), reshape=False, order=1, mode="constant")


def contrast(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Draws every pixel towards its image's mean: mean + `CONTRAST[severity - 1]` * (pixel - mean)."""
    mean = images.mean((1, 2), keepdims=True)
    return mean + CONTRAST[severity - 1] * (images - mean)


CORRUPTIONS: dict[str, Callable] = {"noise": noise, "rotation": rotation, "contrast": contrast}


def corrupt(name: str, images: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """The images under a named shift.

    Args:
        name: "noise", "rotation" or "contrast".
        images: float (rows, height, width) in [0, 1].
        severity: 1 to 5.
        seed: of the noise; the same seed gives the same images.

    Returns:
        float32 array of the same shape.

    Raises:
        ValueError: for another name or severity, or images outside [0, 1].
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"`name` must be one of {sorted(CORRUPTIONS)}, got {name!r}. Check the spelling.")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"`severity` must be 1, 2, 3, 4 or 5, got {severity!r}. 5 is the strongest.")
    if np.min(images) < 0 or np.max(images) > 1:
        raise ValueError(
            f"`images` must lie in [0, 1], got values from {np.min(images):g} to {np.max(images):g}. Divide by the largest "
            "possible value, such as 255."
        )
    return CORRUPTIONS[name](np.asarray(images), severity, np.random.default_rng(seed)).astype(np.float32)
