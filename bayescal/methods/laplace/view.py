"""The network as a function of those of its parameters that a Laplace posterior is of, and its curvature's roots."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods.map_estimate import one_member
from bayescal.predictive import Bernoulli, Categorical, Gaussian
from bayescal.types import Array, Model, PyTree, Variables


class Selection(NamedTuple):
    """Which parameters a posterior is of; the others stay at the mode.

    find: `params -> places`, arrays that stand in the state: what of a choice depends on the trained network.
    take: `(params, places) -> chosen`, a pytree.
    put: `(params, places, chosen) -> params`.
    path: the keys under which all that is chosen lies whole; None for single weights.
    """

    find: Callable[[PyTree], PyTree]
    take: Callable[[PyTree, PyTree], PyTree]
    put: Callable[[PyTree, PyTree, PyTree], PyTree]
    path: tuple | None


def everything() -> Selection:
    """All parameters."""
    return Selection(lambda params: (), lambda params, places: params, lambda params, places, chosen: chosen, ())


def subtree(path: tuple) -> Selection:
    """The parameters under these keys, such as `last_layer(model)`."""

    def take(params, places):
        for depth, key in enumerate(path):
            if not isinstance(params, dict) or key not in params:
                has = sorted(map(str, params)) if isinstance(params, dict) else "an array"
                raise ValueError(
                    f"`subset` must be keys that lead to parameters, got {path!r}, where {path[:depth]!r} has {has}. "
                    "Pass one of them, or None for all parameters."
                )
            params = params[key]
        return params

    def put(params, places, chosen, path=path):
        if not path:
            return chosen
        return {**params, path[0]: put(params[path[0]], places, chosen, path[1:])}

    return Selection(lambda params: (), take, put, tuple(path))


def subnetwork(number: int, score: Callable[[PyTree], PyTree] | None = None) -> Selection:
    """The `number` single weights of the highest score, wherever they are: chosen when training begins.

    Args:
        number: of weights.
        score: `params -> pytree` of the same shapes, higher = chosen first, such as the marginal variances of a
            diagonal posterior, `lambda params: variances`; None = the magnitude.

    Raises:
        ValueError: for fewer than one weight, or more than there are.
    Source: Daxberger et al. 2021 (subnetwork inference): largest variances; largest magnitude as in laplace-torch.
    """
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"`number` must be a whole number of at least 1, got {number!r}. It counts single weights.")

    def find(params):
        scores = ravel_pytree(jax.tree.map(jnp.abs, params) if score is None else score(params))[0]
        if number > scores.size:
            raise ValueError(
                f"`number` must be at most the {scores.size} weights of the network, got {number}. Take fewer."
            )
        return jnp.sort(jax.lax.top_k(scores, number)[1])

    take = lambda params, places: {"weights": ravel_pytree(params)[0][places]}

    def put(params, places, chosen):
        flat, unravel = ravel_pytree(params)
        return unravel(flat.at[places].set(chosen["weights"].astype(flat.dtype)))

    return Selection(find, take, put, None)


def last_layer(model: Model) -> tuple:
    """The keys of the network's last layer, for `subset`.

    Raises:
        ValueError: for a network that names none.
    """
    if model.head is None or not model.head_path:
        raise ValueError(
            "`model` must name its last layer for a last-layer posterior, got one without a head. Build it with "
            "`head=`, as in `from_nnx(build, head='head')`, or pass `subset=None` for all parameters."
        )
    return model.head_path


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
                if _depends(lambda x: likelihood(one_member(x)).variance, outputs):
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
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        found.setdefault("/".join(keys[:-1]), []).append(place)
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
    return normal and curvature is ggn and not _depends(lambda x: likelihood(one_member(x)).variance, outputs)


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


def reached(jaxpr, variables) -> set:
    """Everything in the program that `variables` lead to."""
    found = set(variables)
    for equation in jaxpr.eqns:
        if any(v in found for v in equation.invars if not hasattr(v, "val")):
            found.update(equation.outvars)
    return found


def _depends(function: Callable, x) -> bool:
    """Whether what `function` gives depends on `x`, judged by the program."""
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    found = reached(jaxpr, jaxpr.invars)
    return any(v in found for v in jaxpr.outvars if not hasattr(v, "val"))
