"""Post-hoc calibration: `fit_x(pred, targets) -> calibrator`, `calibrator(pred) -> pred`. Pool first, then calibrate."""

from bayescal.calibrate.temperature import Temperature, fit_temperature

__all__ = ["Temperature", "fit_temperature"]
