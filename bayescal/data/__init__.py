"""Data in memory: the embedded set, corruptions, and checks."""

from bayescal.data.checks import check_dataset, check_finite
from bayescal.data.corruptions import CORRUPTIONS, corrupt
from bayescal.data.digits import OpenSplit, digits

__all__ = ["CORRUPTIONS", "OpenSplit", "check_dataset", "check_finite", "corrupt", "digits"]
