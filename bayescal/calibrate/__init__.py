"""Post-hoc calibration: `fit_x(pred, targets) -> calibrator`, `calibrator(pred) -> pred`. Pool first, then calibrate."""

from bayescal.calibrate.selection import MemberSelection, fit_member_selection
from bayescal.calibrate.temperature import Temperature, fit_temperature

__all__ = ["MemberSelection", "Temperature", "fit_member_selection", "fit_temperature"]
