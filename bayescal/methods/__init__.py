"""Methods: data -> state -> predictive. One file a method, the same names in the same order: State, init, update,
predict, builder."""

from bayescal.methods.ensemble import ensemble
from bayescal.methods.experiments import experiments
from bayescal.methods.map_estimate import map_estimate
from bayescal.methods.mc_dropout import mc_dropout
from bayescal.methods.resample import Subsample, bootstrap, out_of_bag
from bayescal.methods.variational import variational

__all__ = [
    "Subsample",
    "bootstrap",
    "ensemble",
    "experiments",
    "map_estimate",
    "mc_dropout",
    "out_of_bag",
    "variational",
]
