"""Priors of variational inference: what weights are likely before the data.

A prior is a function `params -> numpyro distribution` with event shape (weights,), of the weights that have a posterior as
one vector, leaf after leaf as `ravel_pytree` lays them out. It is given shapes and types only, of what `subset` takes:
- None, `subtrees(...)`, `without_biases()`: the network's own tree, with None for what is not chosen;
- keys, as of `last_layer(model)`: the tree that lies under them;
- `subnetwork(number)`: `{"weights": (number,)}`.
Your own is any such function.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bayescal.methods.map_estimate import check_positive
from bayescal.types import PyTree

if TYPE_CHECKING:
    from numpyro.distributions import Distribution

Prior = Callable[[PyTree], "Distribution"]


def normal(scale: Any) -> Prior:
    """w ~ N(0, scale^2), every weight by itself; the KL from a normal posterior is in closed form.

    Args:
        scale: standard deviation, above 0: one number, or a tree with one for each part of what `subset` takes, where a
            number stands for all that lies below it. Of `models.mlp`, `{"dense": 1.0, "head": 0.3}`, or by layer
            `{"dense": {0: 1.0, 1: 0.5}, "head": 0.3}`. Parts of which nothing is chosen may be left out.

    Raises:
        ValueError: for numbers that are not positive and finite; where the method is built, for a tree that does not fit.
    """
    _check_scale(scale)

    def prior(params):
        import numpyro.distributions as dist

        return _independent(lambda scale: dist.Normal(0.0, scale), scale, params)

    return prior


def student_t(df: Any, scale: Any) -> Prior:
    """w ~ scale * t(df), every weight by itself: heavier tails the smaller `df`; the KL is sampled.

    Args:
        df: degrees of freedom, above 0.
        scale: above 0, as in `normal`; the standard deviation is scale * sqrt(df / (df - 2)) for df > 2.

    Raises:
        ValueError: as `normal`.
    """
    check_positive(df=df)
    _check_scale(scale)

    def prior(params):
        import numpyro.distributions as dist

        return _independent(lambda scale: dist.StudentT(df, 0.0, scale), scale, params)

    return prior


def scale_mixture(scales: Sequence[Any], weights: Sequence[Any]) -> Prior:
    """p(w) = sum_k weights_k N(w; 0, scales_k^2), every weight by itself; the KL is sampled.

    Args:
        scales: standard deviations of the parts, above 0.
        weights: of the parts, above 0, with sum 1.

    Raises:
        TypeError: for what is no sequence.
        ValueError: for numbers out of range, or not as many weights as scales.
    Source: Blundell et al. 2015, equation 7 (recalled).
    """
    for name, given in {"scales": scales, "weights": weights}.items():
        if not isinstance(given, Sequence) and not np.ndim(given):
            raise TypeError(
                f"`{name}` must be a sequence of numbers, got {type(given).__name__}. Give each normal its own, as in "
                "`scale_mixture((1.0, 0.1), (0.25, 0.75))`."
            )
    scales, weights = tuple(scales), tuple(weights)
    if not scales or len(scales) != len(weights):
        raise ValueError(
            f"`weights` must be as many as `scales`, at least one, got {len(weights)} and {len(scales)}. Give each normal "
            "its weight, as in `scale_mixture((1.0, 0.1), (0.25, 0.75))`."
        )
    for scale, weight in zip(scales, weights, strict=True):
        check_positive(scales=scale, weights=weight)
    known = not any(isinstance(w, Tracer) for w in weights)
    if known and not math.isclose(sum(map(float, weights)), 1, abs_tol=1e-6):
        raise ValueError(
            f"`weights` must sum to 1, got {weights!r}, which sum to {sum(map(float, weights)):.6g}. Divide them by that."
        )

    def prior(params):
        import numpyro.distributions as dist

        parts = dist.Normal(0.0, jnp.stack([jnp.asarray(s, float) for s in scales]))
        choice = dist.Categorical(probs=jnp.stack([jnp.asarray(w, float) for w in weights]))
        return dist.MixtureSameFamily(choice, parts).expand((_size(params),)).to_event(1)

    return prior


def _independent(of_scale: Callable[[Any], Any], scale: Any, params: PyTree):
    """One distribution for every weight, each of its own scale where there are several."""
    if jax.tree_util.all_leaves([scale]):
        return of_scale(scale).expand((_size(params),)).to_event(1)
    try:
        each = jax.tree.leaves(jax.tree.broadcast(_filled(scale, params), params))
    except ValueError as error:
        raise ValueError(
            f"`scale` must be one number or have the first keys of the parameters, got {jax.tree.structure(scale)} for "
            f"{jax.tree.structure(params)}. Give a number for each of these keys, or for what lies above them."
        ) from error
    parts = [jnp.full(x.size, s, jnp.result_type(float)) for s, x in zip(each, jax.tree.leaves(params), strict=True)]
    return of_scale(jnp.concatenate(parts)).to_event(1)


def _filled(scale: Any, params: Any) -> Any:
    """The scales, and beside them what they need not name: parts of the parameters without any."""
    if not isinstance(scale, dict) or not isinstance(params, dict):
        return scale
    empty = {name: part for name, part in params.items() if not jax.tree.leaves(part)}
    return {**empty, **{name: _filled(one, params.get(name)) for name, one in scale.items()}}


def check_prior(prior: Any) -> None:
    """Raises unless it is a function, and none of those that make one."""
    from numpyro.distributions import Distribution

    made_by = [maker for maker in (normal, student_t, scale_mixture) if prior is maker]
    if made_by or not callable(prior) or isinstance(prior, Distribution):
        got = f"`priors.{made_by[0].__name__}` itself" if made_by else type(prior).__name__
        raise TypeError(
            f"`prior` must be a function from parameters to a distribution, got {got}. Pass `priors.normal(1.0)`, or your own "
            "such as `lambda params: distribution`."
        )


def _check_scale(scale: Any) -> None:
    if not jax.tree.leaves(scale):
        raise ValueError(f"`scale` must hold at least one number, got {scale!r}. 1.0 is usual.")
    for one in jax.tree.leaves(scale):
        check_positive(scale=one)


def _size(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
