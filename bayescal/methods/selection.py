"""Which of a network's parameters a posterior is of: all, sub-trees, single leaves, single weights."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bayescal.methods.map_estimate import check_whole
from bayescal.types import Model, PyTree


class Selection(NamedTuple):
    """Which parameters a posterior is of; what becomes of the others is the method's.

    find: `params -> places`, arrays that stand in the state: what of a choice depends on the trained network.
    take: `(params, places) -> chosen`, a pytree.
    put: `(params, places, chosen) -> params`.
    path: the keys under which all that is chosen lies whole; None for single leaves or weights.
    """

    find: Callable[[PyTree], PyTree]
    take: Callable[[PyTree, PyTree], PyTree]
    put: Callable[[PyTree, PyTree, PyTree], PyTree]
    path: tuple | None


def selected(subset: Selection | tuple | None) -> Selection:
    """The selection that a method's `subset` stands for: None = all parameters, keys = the sub-tree under them.

    Raises:
        TypeError: for anything else.
    """
    if subset is None:
        return everything()
    if not isinstance(subset, tuple):  # as a `Selection` is
        raise TypeError(
            f"`subset` must be a tuple of keys or a `Selection`, got {type(subset).__name__}. Pass `last_layer(model)`, "
            "`subtrees(*paths)`, `without_biases()` or `subnetwork(number)`, or None for all parameters."
        )
    return subset if isinstance(subset, Selection) else subtree(subset)


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


def leaves(where: Callable[[tuple[str, ...]], bool]) -> Selection:
    """The parameter arrays whose keys `where` is true of.

    Args:
        where: keys that lead to an array, as text, such as `("layers", "0", "kernel")` -> whether it is chosen.

    Raises:
        ValueError: at `init`, where none is.
    """

    def take(params, places):
        named, structure = jax.tree.flatten_with_path(params)
        chosen = [leaf if where(path_names(path)) else None for path, leaf in named]
        if all(leaf is None for leaf in chosen):
            raise ValueError(
                "`where` must be true of at least one array of the network, got False for all of "
                f"{_listed(params)}. Choose among them."
            )
        return jax.tree.unflatten(structure, chosen)

    def put(params, places, chosen):
        return jax.tree.map(lambda old, new: old if new is None else new, params, chosen)

    return Selection(lambda params: (), take, put, None)


def subtrees(*paths: tuple) -> Selection:
    """The parameters under any of these keys: `subtrees(("layers", 0), last_layer(model))`.

    Args:
        paths: each keys that lead to one array or to a sub-tree of them.

    Raises:
        ValueError: for what is not a tuple of keys, and at `init` for keys that lead nowhere.
    """
    for path in paths or [None]:
        if not isinstance(path, tuple) or not path:
            raise ValueError(
                f'`paths` must be tuples of keys, got {path!r}. Write `subtrees(("head",), ("layers", 0))`, or pass '
                "`subset=None` for all parameters."
            )
    wanted = [tuple(map(str, path)) for path in paths]
    under = lambda names, path: names[: len(path)] == path
    chosen = leaves(lambda names: any(under(names, path) for path in wanted))

    def take(params, places):
        there = [path_names(path) for path, _ in jax.tree.leaves_with_path(params)]
        for path in wanted:
            if not any(under(names, path) for names in there):
                raise ValueError(
                    f"`paths` must lead to parameters, got {path!r}; the network's are {_listed(params)}. Pass the "
                    "first keys of some of them."
                )
        return chosen.take(params, places)

    return chosen._replace(take=take)


def without_biases() -> Selection:
    """All parameters but those whose last key is "bias"."""
    return leaves(lambda names: names[-1:] != ("bias",))


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
    check_whole("number", number, 1, "It counts single weights.")

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


def path_names(path: tuple) -> tuple[str, ...]:
    """The keys of jax's key path, as text."""
    return tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _listed(params: PyTree) -> list[str]:
    return ["/".join(path_names(path)) for path, _ in jax.tree.leaves_with_path(params)]
