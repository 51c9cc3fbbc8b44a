"""What the scores of features find, and what they miss, on a network trained on two moons."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rows_scores import SHAPES, linear, wider
from sklearn.datasets import make_moons
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier

from bayescal.scores.combine import fit_combination
from bayescal.scores.density import density_ratio, fit_gaussian_density
from bayescal.scores.gradient import grad_norm
from bayescal.scores.mahalanobis import fit_mahalanobis, fit_relative_mahalanobis
from bayescal.scores.neighbours import fit_neighbours
from bayescal.scores.shaping import fit_react
from bayescal.scores.subspace import fit_residual, fit_vim

pytestmark = pytest.mark.core


@cache
def moons():
    """A small network trained on two moons: features and head, and AUROC of any score against two sets of other inputs."""
    inputs, labels = make_moons(600, noise=0.1, random_state=0)
    held_out, _ = make_moons(300, noise=0.1, random_state=1)
    net = MLPClassifier((32, 32), random_state=0, max_iter=300, learning_rate_init=0.01).fit(inputs, labels)
    assert net.score(inputs, labels) > 0.98

    def features(x):
        for weights, bias in zip(net.coefs_[:-1], net.intercepts_[:-1], strict=True):
            x = np.maximum(x @ weights + bias, 0)
        return x.astype(np.float32)

    head = Partial(
        linear, [np.concatenate([-x, x], -1).astype(np.float32) / 2 for x in (net.coefs_[-1], net.intercepts_[-1])]
    )
    angle = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    circle = lambda radius: [0.5, 0.25] + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    between = np.random.default_rng(0).normal([0.5, 0.25], 0.05, size=(300, 2))  # in the gap between the moons

    def auroc(score):
        familiar = score(features(held_out))
        assert np.isfinite(familiar).all()
        return {
            name: roc_auc_score(np.repeat([0, 1], 300), np.concatenate([familiar, score(features(other))]))
            for name, other in {"far": circle(4), "farther": circle(10), "between": between}.items()
        }

    return features(inputs), labels, head, auroc


ON_MOONS = {
    "mahalanobis": lambda f, y, head: fit_mahalanobis(f, y, ridge=1e-6),
    "relative": lambda f, y, head: fit_relative_mahalanobis(f, y, ridge=1e-6),
    "density": lambda f, y, head: fit_gaussian_density(f, y, ridge=1e-6),
    "ratio": lambda f, y, head: density_ratio(
        fit_gaussian_density(f, y, ridge=1e-6), fit_gaussian_density(wider(f), 0 * y, ridge=1e-6)
    ),
    "neighbours": lambda f, y, head: fit_neighbours(f, k=10),
    "neighbours, any length": lambda f, y, head: fit_neighbours(f, k=10, normalise=False),
    "residual": lambda f, y, head: fit_residual(f, dim=8),
    "vim": lambda f, y, head: fit_vim(f, head, dim=8),
}


BY_HEAD = {
    "react": lambda f, y, head: fit_react(f, head),
    "gradient": lambda f, y, head: grad_norm(head),
    **{f"ash {kind}": lambda f, y, head, build=build: build(head, quantile=0.65) for kind, build in SHAPES.items()},
}


@pytest.mark.parametrize("name", ON_MOONS)
def test_distances_find_what_lies_far_from_the_moons(name):
    features, labels, head, auroc = moons()
    of = auroc(ON_MOONS[name](features, labels, head))
    exact = name in ("mahalanobis", "density", "neighbours, any length", "residual", "vim")
    assert min(of["far"], of["farther"]) > (0.99 if exact else 0.85), of


@pytest.mark.parametrize("name", BY_HEAD)
def test_scores_of_the_head_find_the_gap_and_miss_what_is_far(name):
    """By construction: far from the data a rectified network is linear, its logits grow, and energy falls for ever."""
    features, labels, head, auroc = moons()
    of = auroc(BY_HEAD[name](features, labels, head))
    assert of["between"] > 0.95, of
    assert max(of["far"], of["farther"]) < 0.3, of


def test_together_they_find_both():
    features, labels, head, auroc = moons()
    parts = [ON_MOONS["mahalanobis"](features, labels, head), BY_HEAD["react"](features, labels, head)]
    together = lambda x: jnp.stack([part(x) for part in parts])
    held_out = together(features[::2])
    combined = fit_combination(held_out)
    of = auroc(lambda x: combined(together(x)))
    assert min(of.values()) > 0.95, of
