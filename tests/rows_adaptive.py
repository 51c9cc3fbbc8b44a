"""The rows and programs that metrics with bins that follow the data, and decompositions, are tested on."""

import math
from functools import partial

import jax
import numpy as np
import oracles_adaptive as oracles

from bayescal.metrics.adaptive import (
    equal_mass_calibration_error,
    equal_mass_histogram,
    nixon_calibration_error,
    squared_equal_mass_calibration_error,
)
from bayescal.metrics.sweep import sweep_calibration_error, sweep_num_bins

ROWS = 200  # everywhere, so that little is compiled
RULES = {"grouped": oracles.grouped_bins, "rank": oracles.rank_bins}
FORMS = {"l1": {}, "l2": {"norm": 2}, "max": {"norm": math.inf}}
FORMS |= {"debiased l1": {"debiased": True}, "debiased l2": {"norm": 2, "debiased": True}}


@jax.jit
def everything(probability, outcome, weights):
    """All forms of the error in one program, and the bins' weight and sum of outcomes."""
    out = {}
    for ties in RULES:
        settings_of = {"weights": weights, "ties": ties}
        for name, form in FORMS.items():
            out[f"{ties} {name}"] = equal_mass_calibration_error(probability, outcome, **settings_of, **form)
        out[f"{ties} square"] = squared_equal_mass_calibration_error(probability, outcome, **settings_of)
        sums = equal_mass_histogram(probability, outcome, **settings_of)
        out |= {f"{ties} mass": sums.weight, f"{ties} hits": sums.confidence - sums.gap}
    return out


@partial(jax.jit, static_argnames=("scheme", "max_bins"))
def swept(probability, outcome, weights, scheme="mass", max_bins=60):
    call = {"weights": weights, "scheme": scheme, "max_bins": max_bins}
    return sweep_calibration_error(probability, outcome, **call), sweep_num_bins(probability, outcome, **call)


def forecasts(rng, ties=False, rows=ROWS):
    probability = rng.uniform(size=rows)
    probability = (np.round(probability * 10) / 10 if ties else probability).astype(np.float32)
    outcome = (rng.uniform(size=rows) < 0.2 + 0.6 * probability**2).astype(np.float32)
    return probability, outcome


NIXON = {
    "ace": {},
    "tace": {"threshold": 0.01},
    "marginal by rank": {"norm": 2, "ties": "rank"},
    "debiased marginal by rank": {"norm": 2, "ties": "rank", "debiased": True},
}


@jax.jit
def all_nixon(probs, targets, weights):
    return {name: nixon_calibration_error(probs, targets, weights=weights, **form) for name, form in NIXON.items()}
