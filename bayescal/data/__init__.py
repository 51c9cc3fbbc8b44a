"""Data in memory: the embedded set, image files, corruptions, and checks."""

from bayescal.data import corruptions
from bayescal.data.checks import check_dataset, check_finite
from bayescal.data.corruptions import DIGITS, SMALL_IMAGES, Corruption, corrupt
from bayescal.data.digits import OpenSplit, digits
from bayescal.data.images import load_images, read_idx

__all__ = [
    "DIGITS",
    "SMALL_IMAGES",
    "Corruption",
    "OpenSplit",
    "check_dataset",
    "check_finite",
    "corrupt",
    "corruptions",
    "digits",
    "load_images",
    "read_idx",
]
