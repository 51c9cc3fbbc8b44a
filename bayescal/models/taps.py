"""Dense layers and convolutions watched from outside: what each has seen, and zeros added to what it puts out."""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import Float


class Taps:
    """The tapped layers of one forward pass.

    Every such layer is output = seen @ kernel + bias, with its kernel as a matrix (rows, channels) and `seen` (batch,
    positions, rows): one position for a dense layer, one for each pixel put out for a convolution, whose rows are the
    patch under its kernel. The gradient with respect to the zeros is that with respect to the output.

    Args:
        batch: rows of the batch.
        zeros: by the layer's name, (batch, positions, channels), added to its output; None = none.
    """

    def __init__(self, batch: int, zeros: dict[str, jax.Array] | None):
        self.batch, self.zeros = batch, zeros
        self.seen: dict[str, jax.Array] = {}

    def dense(self, path: Sequence, multiply: Callable = jax.lax.dot_general) -> Callable:
        """A stand-in for the `dot_general` of the dense layer whose parameters are at `path`."""

        def call(inputs, kernel, *args, **kwargs):
            if kernel.ndim != 2 or inputs.shape[0] != self.batch:
                raise _not_a_product(
                    path, f"a kernel of shape {kernel.shape} and inputs of shape {inputs.shape}", self.batch
                )
            return self._watch(path, inputs, multiply(inputs, kernel, *args, **kwargs))

        return call

    def convolution(self, path: Sequence, convolve: Callable = jax.lax.conv_general_dilated) -> Callable:
        """A stand-in for the `conv_general_dilated` of the convolution whose parameters are at `path`."""

        def call(inputs, kernel, window_strides, padding, **kwargs):
            groups = kwargs.get("feature_group_count", 1)
            if groups != 1 or any(d != 1 for d in kwargs.get("lhs_dilation") or ()) or inputs.shape[0] % self.batch:
                got = f"{groups} feature groups, input dilation {kwargs.get('lhs_dilation')}, inputs of shape {inputs.shape}"
                raise _not_a_product(path, got, self.batch)
            outputs = convolve(inputs, kernel, window_strides, padding, **kwargs)
            sizes, dilation = kernel.shape[:-2], kwargs.get("rhs_dilation") or (1,) * (kernel.ndim - 2)
            seen = patches(inputs, sizes, tuple(window_strides), padding, tuple(dilation))
            return self._watch(path, seen, outputs)

        return call

    def _watch(self, path: Sequence, seen, outputs):
        name = layer_name(path)
        if name in self.seen:
            raise ValueError(
                f"`taps` need every layer to be called once in a forward pass, got a second call of {name!r}: the "
                "curvature of shared weights does not factorise. Use another structure (`diagonal`, `low_rank`), or "
                "`subset` for layers that are used once."
            )
        self.seen[name] = jnp.asarray(seen).reshape(self.batch, -1, seen.shape[-1])
        if self.zeros is None or name not in self.zeros:
            return outputs
        return outputs + self.zeros[name].reshape(outputs.shape).astype(outputs.dtype)


def layer_name(path: Sequence) -> str:
    """The name of the layer whose parameters are at `path`: its keys joined by slashes."""
    return "/".join(map(str, path))


def patches(
    images: Float[jax.Array, "batch *space channels"],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    padding: str | Sequence[tuple[int, int]],
    dilation: tuple[int, ...],
) -> Float[jax.Array, "batch *positions rows"]:
    """What lies under a convolution's kernel at each of its positions, in the order of its kernel as a matrix.

    patches @ kernel.reshape(rows, out) is the convolution.

    Args:
        images: channels last.
        sizes, strides, dilation: of the kernel, in each dimension of space.
        padding: "SAME", "VALID", or pixels before and after in each dimension.
    """
    space = images.shape[1:-1]
    reach = [(size - 1) * d + 1 for size, d in zip(sizes, dilation, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(space, reach, strides, padding)
    padded = jnp.pad(images, [(0, 0), *padding, (0, 0)])
    number = [
        (n + sum(pad) - r) // stride + 1 for n, pad, r, stride in zip(space, padding, reach, strides, strict=True)
    ]
    parts = []
    for offset in product(*map(range, sizes)):
        first = [o * d for o, d in zip(offset, dilation, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, number, strides, strict=True)]
        window = tuple(slice(f, z, s) for f, z, s in zip(first, last, strides, strict=True))
        parts.append(padded[(slice(None), *window)])
    stacked = jnp.stack(parts, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], prod(sizes) * images.shape[-1])


def _not_a_product(path: Sequence, got: str, batch: int) -> ValueError:
    return ValueError(
        f"`taps` need layers that are one matrix product for each of the {batch} rows, got {layer_name(path)!r} with {got}. "
        "Use another structure (`diagonal`, `low_rank`), or `subset` for the other layers."
    )
