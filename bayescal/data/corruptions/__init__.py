"""Corruptions of images: plain functions `(images, key?, *, strengths) -> images`, and five severities of each."""

from bayescal.data.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from bayescal.data.corruptions.digital import brightness, contrast, jpeg, pixelate, saturate
from bayescal.data.corruptions.geometry import elastic, rotation, translation
from bayescal.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from bayescal.data.corruptions.severities import DIGITS, SMALL_IMAGES, Corruption, corrupt
from bayescal.data.corruptions.weather import fog, snow, spatter

__all__ = [
    "DIGITS",
    "SMALL_IMAGES",
    "Corruption",
    "brightness",
    "contrast",
    "corrupt",
    "defocus_blur",
    "elastic",
    "fog",
    "gaussian_blur",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg",
    "motion_blur",
    "pixelate",
    "rotation",
    "saturate",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
    "translation",
    "zoom_blur",
]
