"""The family of posteriors that variational inference looks in: NumPyro's prior and guide, of the weights as one vector."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods import guides
from bayescal.methods.draws import depends, reached
from bayescal.methods.selection import Selection
from bayescal.predictive import float32_or_wider
from bayescal.types import Key, Model, PyTree, Variables


class Family(NamedTuple):
    """What is known of the posterior before there is a network; built once.

    prior: NumPyro model of one site, `weights`: a random draw costs a third of a second to compile, so one is better than
        one a layer.
    guide: of it, ready for use.
    start: `weights -> the guide's unconstrained parameters` around them, in float32 or wider.
    constraint: of every parameter of the guide.
    params: shapes of the network's.
    outside: of its leaves, whether something of them has no posterior.
    weights: shape of the vector that the posterior is of, in the network's own precision; unravel: from it to what the
        selection puts.
    """

    selection: Selection
    prior: Callable
    guide: Any
    start: Callable[[jax.Array], dict[str, PyTree]]
    constraint: dict[str, Any]
    params: PyTree
    outside: list[bool]
    weights: jax.ShapeDtypeStruct
    unravel: Callable[[jax.Array], PyTree]

    def constrained(self, posterior: dict[str, PyTree]) -> dict[str, PyTree]:
        """The guide's parameters as NumPyro wants them."""
        from numpyro.distributions import biject_to

        return {name: biject_to(self.constraint[name])(value) for name, value in posterior.items()}

    def sample(self, posterior: dict[str, PyTree], key: Key) -> jax.Array:
        """One vector of weights."""
        with unvalidated():
            return self.guide.sample_posterior(key, self.constrained(posterior))["weights"]

    def median(self, posterior: dict[str, PyTree]) -> jax.Array:
        """The vector in the middle, which is a normal posterior's mean.

        Raises:
            ValueError: for a guide without a median.
        """
        try:
            with unvalidated():
                return self.guide.median(self.constrained(posterior))["weights"]
        except NotImplementedError as error:
            raise ValueError(
                f"`guide` must have a median for `key=None`, got {type(self.guide).__name__}, which has none. Pass a key, "
                "or take a normal guide, such as `guides.low_rank(10)`."
            ) from error

    def point(self, params: PyTree) -> PyTree:
        """What of the network has no posterior."""
        leaves, structure = jax.tree.flatten(params)
        kept = [leaf if outside else None for leaf, outside in zip(leaves, self.outside, strict=True)]
        return jax.tree.unflatten(structure, kept) if any(self.outside) else ()

    def network(self, weights: jax.Array, point: PyTree, places: PyTree, stats: PyTree) -> Variables:
        """The network of these weights, and of what of it has no posterior."""
        kept = iter(jax.tree.leaves(point))
        shapes, structure = jax.tree.flatten(self.params)
        # what is replaced whole is never read
        leaves = [
            next(kept) if outside else jnp.zeros(x.shape, x.dtype)
            for outside, x in zip(self.outside, shapes, strict=True)
        ]
        chosen = self.unravel(weights.astype(self.weights.dtype))
        params = self.selection.put(jax.tree.unflatten(structure, leaves), places, chosen)
        return Variables(params, stats)

    def spreads(self) -> bool:
        """Whether a draw, and what is trained, depends on its key, judged by the program."""
        from numpyro.handlers import seed, substitute, trace

        def posterior():
            shapes = jax.eval_shape(self.start, self.weights)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def trained(key):
            with unvalidated():
                guide = substitute(seed(self.guide, key), data=self.constrained(posterior()))
                return trace(guide).get_trace()["weights"]["value"]

        key = jax.eval_shape(jax.random.key, 0)
        return depends(trained, key) and depends(lambda key: self.sample(posterior(), key), key)


def unvalidated():
    """Without NumPyro's checks of values: they fail under `shard_map`, and NaN must come through, not raise here or there."""
    from numpyro import validation_enabled

    return validation_enabled(False)


def family(model: Model, selection: Selection, prior, guide, initial_scale) -> Family:
    """Prior and guide of the chosen weights; looks at shapes alone."""
    import numpyro  # heavy: only those who use it pay for it
    from numpyro.distributions import Distribution, biject_to, constraints
    from numpyro.handlers import seed, trace
    from numpyro.infer import init_to_uniform, init_to_value

    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(model.init, key).params
    places = jax.eval_shape(selection.find, params)
    chosen = jax.eval_shape(selection.take, params, places)
    unravel: list = []

    def flat(chosen):
        vector, function = ravel_pytree(chosen)
        unravel.append(function)
        return vector

    weights = jax.eval_shape(flat, chosen)
    size = weights.size
    if not size:
        raise ValueError(
            "`subset` must choose at least one weight, got a part of the network without any. Pass keys that lead to some, "
            "such as `last_layer(model)`, or None for all parameters."
        )
    distribution = prior(chosen)
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"`prior` must give one of NumPyro's distributions, got {type(distribution).__name__}. Pass "
            "`priors.normal(1.0)`, or return such as `dist.Laplace(0.0, 1.0).expand((size,)).to_event(1)`."
        )
    if distribution.batch_shape or distribution.event_shape != (size,):
        raise ValueError(
            f"`prior` must give a distribution with event shape ({size},), one vector of all weights, got batch shape "
            f"{distribution.batch_shape} and event shape {distribution.event_shape}. Use `.expand(({size},)).to_event(1)`."
        )
    joint = lambda: numpyro.sample("weights", distribution)
    constraint: dict[str, Any] = {}

    def parameters(guide, key):
        with unvalidated():
            sites = trace(seed(guide, key)).get_trace().values()
        found = {site["name"]: site for site in sites if site["type"] == "param"}
        constraint.update({name: site["kwargs"].get("constraint", constraints.real) for name, site in found.items()})
        return {name: biject_to(constraint[name]).inv(site["value"]) for name, site in found.items()}

    # The guide inspects the prior at its first call: abstractly at once, eagerly in seconds. The values that this one finds
    # are never used; those of `start` come from the network's own weights.
    ready = guides.made(guide, joint, init_loc_fn=init_to_uniform, init_scale=initial_scale)
    jax.eval_shape(lambda key: parameters(ready, key), key)

    @jax.jit
    def start(weights):
        around: Any = init_to_value(values={"weights": float32_or_wider(weights)})
        fresh = guides.made(guide, joint, init_loc_fn=around, init_scale=initial_scale)
        return parameters(fresh, jax.random.key(0))

    outside = _read(selection.put, params, places, chosen)
    return Family(selection, joint, ready, start, constraint, params, outside, weights, unravel[0])


def by_parts(unravel: Callable[[jax.Array], PyTree]) -> Callable[[jax.Array], PyTree]:
    """`unravel`, whose derivative writes the leaves' into one vector in turn.

    Its own concatenates them, in one loop on CPU that asks of every weight which leaf it is of: 0.1 to 10 ms for 200,000.
    For training alone: it has no forward mode.
    """

    @jax.custom_vjp
    def parts(vector):
        return unravel(vector)

    def backward(_, cotangents):
        leaves, place = jax.tree.leaves(cotangents), 0
        vector = jnp.zeros(sum(x.size for x in leaves), jnp.result_type(*leaves))
        for leaf in leaves:
            vector = jax.lax.dynamic_update_slice(vector, leaf.ravel().astype(vector.dtype), (place,))
            place += leaf.size
        return (vector,)

    parts.defvjp(lambda vector: (unravel(vector), None), backward)
    return parts


def _read(put: Callable, params, places, chosen) -> list[bool]:
    """Of every leaf of the params, whether `put` keeps anything of it, judged by the program."""
    jaxpr = jax.make_jaxpr(put)(params, places, chosen).jaxpr
    out = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    return [bool(reached(jaxpr, [v]) & out) for v in jaxpr.invars[: len(jax.tree.leaves(params))]]
