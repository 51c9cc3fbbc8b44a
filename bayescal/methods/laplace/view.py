"""The network as a function of those of its parameters that a Laplace posterior is of, and its curvature's roots."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bayescal.methods.draws import depends
from bayescal.methods.map_estimate import one_member
from bayescal.methods.selection import Selection, path_names
from bayescal.predictive import Bernoulli, Categorical, Gaussian
from bayescal.types import Array, Model, PyTree, Variables


class View(NamedTuple):
    """One network at its mode, as a function of the chosen parameters alone.

    root: `(outputs, targets) -> (batch, roots)`, whose Jacobian J gives a row's curvature J^T J.
    """

    model: Model
    root: Callable[[Any, Array], jax.Array]
    selection: Selection
    variables: Variables
    places: PyTree

    def chosen(self) -> PyTree:
        """The chosen parameters at the mode."""
        return self.selection.take(self.variables.params, self.places)

    def network(self, chosen: PyTree) -> Variables:
        """The network with other values of the chosen parameters."""
        return self.variables._replace(params=self.selection.put(self.variables.params, self.places, chosen))

    def outputs(self, chosen: PyTree, inputs) -> Any:
        """(batch, ...) outputs of the deterministic network."""
        return self.model.apply(self.network(chosen), inputs, None)

    def tapped(self, zeros, inputs) -> tuple[Any, dict[str, jax.Array]]:
        """Outputs with `zeros` added inside, and what the layers saw; see `Model.taps`.

        Raises:
            ValueError: for a network without taps.
        """
        if self.model.taps is None:
            raise ValueError(
                "`model` must have `taps` for a Kronecker-factored posterior, got a network of pure functions without. "
                "Build it with `from_nnx`, `from_linen` or `models.mlp`, write `taps`, or take `diagonal()`."
            )
        return self.model.taps(self.variables, inputs, zeros)


def ggn(likelihood: Callable) -> Callable[[Any, Array], jax.Array]:
    """Root of the generalised Gauss-Newton matrix: of E_y[-d2 log p(y | f) / df2], the Fisher information in the outputs.

    Classes: sqrt(p) (z - sum p z), turned so that K - 1 of K are left; one logit: sqrt(p (1 - p)) z; normals: mean / sd and
    variance / (sqrt(2) variance), with everything but z, mean and variance held constant. It does not look at the targets.

    Args:
        likelihood: outputs with a leading member axis -> `Categorical`, `Bernoulli` or `Gaussian`.

    Raises:
        TypeError: for another family.
    Source: Martens 2020, section 8; Daxberger et al. 2021, section 3.
    """

    def root(outputs, targets):
        pred = only_member(likelihood(one_member(outputs)), "ggn")
        still = jax.lax.stop_gradient
        match pred:
            case Categorical():
                logits = pred.logits[0]
                half = still(jnp.sqrt(jax.nn.softmax(logits, axis=-1)))
                roots = half * (logits - (half**2 * logits).sum(-1, keepdims=True))
                # They are orthogonal to sqrt(p), which a reflection takes to the last axis: one root less to pass back
                turned = roots - half * (roots[..., -1:] / (1 + half[..., -1:]))
                return _flat(turned[..., :-1])
            case Bernoulli():
                logit = pred.logits[0]
                slope = jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)
                return _flat(jnp.sqrt(still(slope)) * logit)
            case Gaussian():
                mean, variance = pred.mean[0], pred.variance[0]
                parts = [mean / jnp.sqrt(still(variance))]
                if depends(lambda x: likelihood(one_member(x)).variance, outputs):
                    parts.append(variance / (math.sqrt(2) * still(variance)))
                return _flat(jnp.concatenate(parts, axis=-1))
        raise TypeError(
            f"`likelihood` must give Categorical, Bernoulli or Gaussian for `ggn`, got {type(pred).__name__}. Use "
            "`empirical_fisher`."
        )

    return root


def empirical_fisher(likelihood: Callable) -> Callable[[Any, Array], jax.Array]:
    """Root of the empirical Fisher matrix, sum_n g_n g_n^T with g_n the gradient of log p(y_n): log p itself.

    One backward pass a row instead of one a class; not an estimate of the Fisher information where the model is wrong.

    Source: Kunstner et al. 2019 (its limits).
    """
    return lambda outputs, targets: likelihood(one_member(outputs)).log_prob(targets)[:, None]


def layers(chosen: PyTree) -> dict[str, list[int]]:
    """Names of the layers, and the places of their leaves among all: leaves under the same keys but for the last."""
    found: dict[str, list[int]] = {}
    for place, (path, _) in enumerate(jax.tree.leaves_with_path(chosen)):
        found.setdefault("/".join(path_names(path)[:-1]), []).append(place)
    return found


def of_leaves(precision: jax.Array, chosen: PyTree) -> list[jax.Array]:
    """The prior precision of every leaf, from one number or one for each of the `layers`."""
    own, number = layers(chosen), len(jax.tree.leaves(chosen))
    if precision.ndim == 0:
        return [precision] * number
    result: list = [None] * number
    for value, places in zip(precision, own.values(), strict=True):
        for place in places:
            result[place] = value
    return result


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def noise_scales(likelihood: Callable, curvature: Callable, outputs) -> bool:
    """Whether the curvature is divided by what the noise variance is multiplied by: normal noise of a fixed variance, `ggn`."""
    found: list = []
    jax.eval_shape(lambda outputs: found.append(likelihood(one_member(outputs))), outputs)
    normal = isinstance(found[0], Gaussian)
    return normal and curvature is ggn and not depends(lambda x: likelihood(one_member(x)).variance, outputs)


def only_member(pred, name: str):
    """The predictive of one network.

    Raises:
        TypeError: for a likelihood that makes several members of one network.
    """
    if pred.num_members != 1:
        raise TypeError(
            f"`likelihood` must give one member a network for `{name}`, got {pred.num_members}. Use `empirical_fisher` with "
            "`sampled(20)`, which take any."
        )
    return pred
