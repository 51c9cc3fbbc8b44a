"""The last layer of a network, watched while the network runs: what goes in are the features."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp


class HeadCalls:
    """Calls of the layer `name` in one forward pass.

    A network is head(features) where its output is the very object that the head gave, so what is looked at is the
    structure of the pass: nothing is computed or compared in value, and every pass is looked at while it is traced.
    """

    def __init__(self, name: str):
        self.name = name
        self.calls: list[tuple] = []

    def __call__(self, layer: Callable, *args, **kwargs):
        """Calls the layer and keeps what went in and came out."""
        outputs = layer(*args, **kwargs)
        self.calls.append(((*args, *kwargs.values()), outputs))
        return outputs

    def features(self, outputs) -> jax.Array:
        """The array (batch, features) that the head was given, in the pass that gave `outputs`.

        Raises:
            ValueError: unless the head was called once, with that array alone, and gave the network's outputs.
        """
        if len(self.calls) != 1:
            raise ValueError(
                f"`head` must be called once in a forward pass, got {len(self.calls)} calls of {self.name!r}. Name the "
                "layer that comes last, or leave `head` out."
            )
        (args, own), *_ = self.calls
        if len(args) != 1 or jnp.ndim(args[0]) != 2:
            raise ValueError(
                f"`head` must be called with the features alone, one array (batch, features), got {self.name!r} called "
                f"with {[jnp.shape(x) for x in jax.tree.leaves(args)]}. Flatten or pool before it, or leave `head` out."
            )
        (leaves, structure), (own_leaves, own_structure) = jax.tree.flatten(outputs), jax.tree.flatten(own)
        if structure != own_structure or any(a is not b for a, b in zip(leaves, own_leaves, strict=True)):
            raise ValueError(
                f"`head` must give the network's outputs, got a network that goes on after {self.name!r}. Name the layer "
                "that comes last, or leave `head` out."
            )
        return args[0]


def no_such_layer(name: str, layers: Iterable[str]) -> ValueError:
    """The error for a head that is not there, or has no parameters of its own."""
    return ValueError(
        f"`head` must name a layer of the network with parameters of its own, its last, got {name!r} where there are "
        f"{sorted(map(str, layers))}. Pass one of them, or None for a network without features."
    )


def shared_head(name: str) -> ValueError:
    """The error for a head whose parameters are kept elsewhere in part, where linen's parent made its submodules."""
    return ValueError(
        f"`head` must keep all its parameters under its own name, got {name!r} with some of them elsewhere. Make its parts "
        "in its own `setup` or `__call__`."
    )


def random_head(name: str) -> ValueError:
    """The error for a head that draws random numbers, which would not be the same function each time."""
    return ValueError(
        f"`head` must draw no random numbers, got dropout (or the like) inside {name!r}. Put it before the head."
    )
