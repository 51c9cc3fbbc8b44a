"""One list of calibrators over classes: every protocol test runs over it. An entry a calibrator, and nothing else.

Variants that change a setting and no path through the contract are for the calibrator's own tests.
"""

import jax

from bayescal import calibrate, conformal

KEY = jax.random.key(11)


# name -> (pred, targets, weights, features) -> fitted. The protocol's data have 3 classes unless the name is in BINARY.
CALIBRATORS = {
    "temperature": lambda pred, targets, weights, features: calibrate.fit_temperature(pred, targets, weights=weights),
    "platt": lambda pred, targets, weights, features: calibrate.fit_platt(pred, targets, weights=weights),
    "vector": lambda pred, targets, weights, features: calibrate.fit_vector(pred, targets, weights=weights),
    "matrix": lambda pred, targets, weights, features: calibrate.fit_matrix(
        pred, targets, off_diagonal=1e-2, intercept=1e-2, weights=weights
    ),
    "dirichlet": lambda pred, targets, weights, features: calibrate.fit_dirichlet(pred, targets, weights=weights),
    "diagonal Dirichlet": lambda pred, targets, weights, features: calibrate.fit_diagonal_dirichlet(
        pred, targets, weights=weights
    ),
    "beta": lambda pred, targets, weights, features: calibrate.fit_beta(pred, targets, weights=weights),
    "isotonic": lambda pred, targets, weights, features: calibrate.fit_isotonic(pred, targets, weights=weights),
    "isotonic, two classes": lambda pred, targets, weights, features: calibrate.fit_isotonic(
        pred, targets, mixture=1e-3, weights=weights
    ),
    "shared isotonic": lambda pred, targets, weights, features: calibrate.fit_shared_isotonic(
        pred, targets, weights=weights
    ),
    "histogram": lambda pred, targets, weights, features: calibrate.fit_histogram(
        pred, targets, num_bins=8, weights=weights
    ),
    "scaling-binning": lambda pred, targets, weights, features: calibrate.fit_scaling_binning(
        pred, targets, num_bins=8, weights=weights
    ),
    "Bayesian binning": lambda pred, targets, weights, features: calibrate.fit_bayesian_binning(
        pred, targets, weights=weights
    ),
    "binwise temperature": lambda pred, targets, weights, features: calibrate.fit_binwise_temperature(
        pred, targets, num_bins=3, weights=weights
    ),
    "groupwise temperature": lambda pred, targets, weights, features: calibrate.fit_groupwise_temperature(
        pred, targets, features=features, num_groups=2, weights=weights
    ),
    "density-aware": lambda pred, targets, weights, features: calibrate.fit_density_aware(
        pred, targets, features=features, weights=weights
    ),
    "proximity": lambda pred, targets, weights, features: calibrate.fit_proximity(
        pred, targets, features=features, weights=weights
    ),
    "ensemble temperature": lambda pred, targets, weights, features: calibrate.fit_ensemble_temperature(
        pred, targets, weights=weights
    ),
    "parametrised temperature": lambda pred, targets, weights, features: calibrate.fit_parametrised_temperature(
        KEY, pred, targets, steps=50, weights=weights
    ),
    "adaptive temperature": lambda pred, targets, weights, features: calibrate.fit_adaptive_temperature(
        KEY, pred, targets, features=features, steps=50, weights=weights
    ),
    "rank-preserving": lambda pred, targets, weights, features: calibrate.fit_rank_preserving(
        KEY, pred, targets, steps=50, weights=weights
    ),
    "order-preserving": lambda pred, targets, weights, features: calibrate.fit_order_preserving(
        KEY, pred, targets, steps=50, weights=weights
    ),
    "extra logit": lambda pred, targets, weights, features: calibrate.fit_extra_logit(pred, targets, weights=weights),
    "spline": lambda pred, targets, weights, features: calibrate.fit_spline(pred, targets, weights=weights),
    "Venn-Abers": lambda pred, targets, weights, features: conformal.fit_venn_abers(pred, targets, weights=weights),
    "Bayesian temperature": lambda pred, targets, weights, features: calibrate.fit_bayesian_temperature(
        pred, targets, weights=weights
    ),
    "Bayesian vector": lambda pred, targets, weights, features: calibrate.fit_bayesian_vector(
        KEY, pred, targets, num_draws=8, weights=weights
    ),
}
BINARY = {"isotonic, two classes", "platt", "beta"}  # those that take two classes only
SEVERAL = {"Bayesian temperature", "Bayesian vector"}  # whose result has members: the posterior of the map
FEATURES_FOR = {  # how the protocol's features (rows, columns) become those of a calibrator that takes others
    "groupwise temperature": lambda features: (features[:, 0] > 0).astype("int32"),
    "density-aware": abs,
    "proximity": lambda features: features[:, 0],
}
