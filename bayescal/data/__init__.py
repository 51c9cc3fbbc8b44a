"""Data in memory: the embedded set, corruptions, and checks."""

from bayescal.data import corruptions
from bayescal.data.checks import check_dataset, check_finite
from bayescal.data.corruptions import DIGITS, SMALL_IMAGES, Corruption, corrupt
from bayescal.data.digits import OpenSplit, digits

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
]
