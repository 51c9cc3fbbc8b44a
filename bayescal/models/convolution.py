"""Convolutions that stay fast on CPU inside a loop, where XLA's own and their gradients are up to 25 times slower."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from bayescal.types import Array

_CACHE = 2**20  # bytes that a core has near
_IMAGE = 3  # channels of an image
_LARGEST = 7  # rows and columns of a kernel


def convolution(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    precision=None,
    preferred_element_type=None,
    **settings,
) -> Float[jax.Array, "..."]:
    """`jax.lax.conv_general_dilated`: its arguments, its result and its derivatives, up to rounding.

    For the `conv_general_dilated` of flax's convolution layers, where `from_nnx` and `from_linen` put it. XLA:CPU runs naive
    code for a convolution in a loop that is not in one layout, NHWC and HWIO, and the gradients of `conv_general_dilated`
    are not (jax issue 12868). On CPU this one keeps to that layout, in the derivatives of every order and both modes, and
    under `jax.vmap` of images or of kernels; `vmap` of both is right but slow. Elsewhere, and for what is rare (groups,
    explicit shardings, another type of result), it calls `conv_general_dilated`.

    Two-dimensional convolutions without strides and dilation of few channels are products with a matrix that repeats the
    kernel. There a NaN or infinite pixel makes NaN of pixels beside those that see it, in the same image.

    Args:
        lhs: images.
        rhs: kernel.
        window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
            precision, preferred_element_type, **settings: as `conv_general_dilated` takes them.
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    of_lhs, of_rhs, of_out = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    spatial = lhs.ndim - 2
    lhs_dilation, rhs_dilation = ((1,) * spatial if d is None else tuple(d) for d in (lhs_dilation, rhs_dilation))
    rare = (
        jax.default_backend() != "cpu"
        or (feature_group_count, batch_group_count, preferred_element_type) != (1, 1, None)
        or any(value is not None for value in settings.values())
        or not (1 <= spatial <= 3 and lhs.dtype == rhs.dtype and jnp.issubdtype(lhs.dtype, jnp.floating))
        or lhs.shape[of_lhs[1]] != rhs.shape[of_rhs[1]]
        or (isinstance(padding, str) and any(d != 1 for d in lhs_dilation))
        or jax.sharding.get_abstract_mesh().explicit_axes
    )
    if rare:
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
            **settings,
        )
    x = jax.lax.transpose(lhs, (of_lhs[0], *of_lhs[2:], of_lhs[1]))
    k = jax.lax.transpose(rhs, (*of_rhs[2:], of_rhs[1], of_rhs[0]))
    if isinstance(padding, str):
        size = [_dilated(n, d) for n, d in zip(k.shape[:-2], rhs_dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], size, window_strides, padding)
    y = _images.bind(
        *_alike(x, k),
        strides=tuple(window_strides),
        padding=tuple(map(tuple, padding)),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        precision=precision,
    )
    return jax.lax.transpose(y, np.argsort([of_out[0], *of_out[2:], of_out[1]]))


def _alike(a, b):
    """Both, each varying over the mesh axes that either varies over inside `shard_map`: as a product must have them."""
    of_a, of_b = (jax.typeof(x).manual_axis_type.varying for x in (a, b))
    a = jax.lax.pcast(a, tuple(of_b - of_a), to="varying") if of_b - of_a else a
    b = jax.lax.pcast(b, tuple(of_a - of_b), to="varying") if of_a - of_b else b
    return a, b


def _dilated(size: int, dilation: int) -> int:
    return 1 + dilation * (size - 1) if size else 0


# Below, x are images (batch, *sides, channels), k is a kernel (*size, channels, out), y their convolution and g its cotangent
# (batch, *sides, out). Two bilinear primitives, closed under transposition, give y from x and k, and k's cotangent from x
# and g. What each compiles to follows from the shapes. The rules rest on one core of an AMD EPYC with AVX-512, jax 0.10.2,
# float32, 64 to 128 images of 8 to 28 columns, 3 to 24 channels, kernels of 3, 5 and 7: the form taken is within 1.3 times
# the better one in nine of ten layers, and at worst 1.4 times XLA's (8 to 16 channels, 5 x 5, no padding).


def _convolve(x, k, *, padding, **settings):
    if _flat(x, k.shape[:-2], padding, settings):
        # The products multiply 2 (columns - 1) / columns times as much; up to 16 channels at one end, XLA's convolution takes
        # about as long for few at the other as for 16.
        *_, columns, channels, out = k.shape
        few = 8 * columns / (columns - 1)
        if channels <= _IMAGE or (channels <= few and out <= 16):
            return _gathered(x, k, padding, settings["precision"])
        if out <= few and channels <= 16:
            return _spread(x, k, padding, settings["precision"])
    return _convolved(x, k, padding=padding, **settings)


def _kernel_cotangent(x, g, *, size, padding, **settings):
    if 0 in g.shape:
        return jnp.zeros((*size, x.shape[-1], g.shape[-1]), x.dtype)
    if _flat(x, size, padding, settings) and x.shape[-1] <= _IMAGE:
        return _gathered_cotangent(x, g, size, padding, settings["precision"])
    return _correlated(x, g, size, padding=padding, **settings)


def _flat(x, size, padding, settings):
    """Whether it can be a product: on a plane, in steps of one, with columns to repeat the kernel along, and not empty.

    Not of larger kernels than were measured: it copies the images twice for each row of the kernel.
    """
    steps = all(settings[name] == (1, 1) for name in ("strides", "lhs_dilation", "rhs_dilation"))
    empty = 0 in (*x.shape, *size) or any(n + sum(p) < w for n, p, w in zip(x.shape[1:-1], padding, size, strict=True))
    return x.ndim == 4 and 1 < size[1] <= _LARGEST and size[0] <= _LARGEST and steps and not empty


def _convolved(x, k, *, strides, padding, lhs_dilation, rhs_dilation, precision):
    ones = (1,) * (x.ndim - 2)
    plain = strides == lhs_dilation == rhs_dilation == ones
    if plain and any(low + high >= w for (low, high), w in zip(padding, k.shape[:-2], strict=True)):
        # what XLA pads by more than "SAME" is slow, up to 20 times; the barrier keeps it from padding itself
        x = jax.lax.optimization_barrier(_padded(x, *padding))
        padding = ((0, 0),) * len(ones)
    sides = "HWD"[: len(ones)]
    layout = f"N{sides}C", f"{sides}IO", f"N{sides}C"
    return jax.lax.conv_general_dilated(x, k, strides, padding, lhs_dilation, rhs_dilation, layout, precision=precision)


def _correlated(x, g, size, *, strides, padding, lhs_dilation, rhs_dilation, precision):
    """k's cotangent as a convolution whose batch are the channels, and whose channels the batch."""
    sides = zip(x.shape[1:-1], lhs_dilation, size, rhs_dilation, g.shape[1:-1], strides, padding, strict=True)
    ends = [(low, _dilated(o, s) - _dilated(n, d) + _dilated(w, r) - 1 - low) for n, d, w, r, o, s, (low, _) in sides]

    def piece(x, g):
        x, g = x.astype(_wide(x)), g.astype(_wide(x))
        images, kernel = jnp.moveaxis(x, (0, -1), (-1, 0)), jnp.moveaxis(g, 0, -2)
        return _convolved(
            images,
            kernel,
            strides=rhs_dilation,
            padding=tuple(ends),
            lhs_dilation=lhs_dilation,
            rhs_dilation=strides,
            precision=precision,
        )

    # Each number is read many times: in pieces that stay in the cache it is up to twice as fast.
    wanted = -(-(x.size + g.size) * x.dtype.itemsize // _CACHE)
    pieces = next((n for n in range(wanted, 4 * wanted) if len(x) % n == 0), 1)
    if pieces == 1:
        total = piece(x, g)
    else:
        # every pieces-th row, and not runs of rows: rows spread over devices stay where they are
        x, g = (a.reshape(-1, pieces, *a.shape[1:]) for a in (x, g))
        part = lambda i: piece(*(jax.lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in (x, g)))
        total = jax.lax.fori_loop(1, pieces, lambda i, total: total + part(i), part(0))
    return jnp.moveaxis(total, 0, -2).astype(x.dtype)


# Products: t = columns - 1 columns of y are linear in the 2t columns of x that they see, which are two neighbouring blocks
# of t. The matrix repeats the kernel along its diagonal. With few channels that fills the registers, where im2col is thin.


def _gathered(x, k, padding, precision):
    rows, columns, _, out = k.shape
    seen = _seen(x, (rows, columns), padding)
    matrix = jnp.einsum("jvx,ijcd->ivcxd", _meets(columns, k.dtype), k).reshape(seen.shape[-1], -1)
    y = jnp.matmul(seen, matrix, precision=precision, preferred_element_type=_wide(x)).astype(x.dtype)
    return y.reshape(*y.shape[:2], -1, out)[:, :, : x.shape[2] + sum(padding[1]) - columns + 1]


def _gathered_cotangent(x, g, size, padding, precision):
    """The transpose of `_gathered` to its kernel."""
    rows, columns = size
    seen = _seen(x, size, padding)
    *places, numbers = seen.shape
    g = _padded(g, (0, 0), (0, places[-1] * (columns - 1) - g.shape[2])).reshape(math.prod(places), -1)
    # of two axes each: XLA moves those that a product sums over, where they are several
    products = jnp.matmul(seen.reshape(-1, numbers).T, g, precision=precision, preferred_element_type=_wide(x)).reshape(
        rows, 2 * columns - 2, x.shape[-1], columns - 1, -1
    )
    return jnp.einsum("jvx,ivcxd->ijcd", _meets(columns, _wide(x)), products).astype(x.dtype)


def _spread(x, k, padding, precision):
    """For few channels out: columns as in `_gathered`, and each row of x adds to as many rows of y as the kernel is high."""
    rows, columns, _, out = k.shape
    (top, bottom), width = padding
    seen = _seen(x, (1, columns), ((0, 0), width))
    matrix = jnp.einsum("jvx,ijcd->vcixd", _meets(columns, k.dtype), k[::-1]).reshape(seen.shape[-1], -1)
    parts = jnp.matmul(seen, matrix, precision=precision, preferred_element_type=_wide(x))
    parts = parts.reshape(*seen.shape[:3], rows, -1)
    moved = [_padded(parts[:, :, :, i], (top - rows + 1 + i, bottom - i), (0, 0)) for i in range(rows)]
    y = sum(moved[1:], moved[0]).astype(x.dtype)
    return y.reshape(*y.shape[:2], -1, out)[:, :, : x.shape[2] + sum(width) - columns + 1]


def _seen(x, size, padding):
    """What each block of y sees: (batch, rows of y, blocks of y, rows * 2t * channels)."""
    (rows, columns), (height, width) = size, padding
    t, columns_out = columns - 1, x.shape[2] + sum(width) - columns + 1
    blocks = -(-columns_out // t)
    x = _padded(x, height, (width[0], width[1] + blocks * t - columns_out))
    x = x.reshape(*x.shape[:2], blocks + 1, -1)
    x = jnp.concatenate([x[:, :, :-1], x[:, :, 1:]], -1)
    return jnp.concatenate([x[:, i : i + x.shape[1] - rows + 1] for i in range(rows)], -1)


def _meets(columns, dtype):
    """1 where a column of the kernel, one of the 2t of x and one of the t of y meet."""
    of_kernel, of_x, of_y = np.ogrid[:columns, : 2 * columns - 2, : columns - 1]
    return jnp.asarray(of_x == of_y + of_kernel, dtype)


def _padded(x, *sides):
    """Zeros around; negative numbers cut."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*ends, 0) for ends in sides), (0, 0, 0)])


def _wide(x):
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _image_cotangent(g, x, k, *, strides, padding, lhs_dilation, rhs_dilation, precision):
    sides = zip(
        x.aval.shape[1:-1], lhs_dilation, k.shape[:-2], rhs_dilation, g.shape[1:-1], strides, padding, strict=True
    )
    ends = [(_dilated(w, r) - 1 - low, _dilated(n, d) + low - _dilated(o, s)) for n, d, w, r, o, s, (low, _) in sides]
    return _images.bind(
        g,
        jnp.flip(k, range(k.ndim - 2)).swapaxes(-1, -2),
        strides=lhs_dilation,
        padding=tuple(ends),
        lhs_dilation=strides,
        rhs_dilation=rhs_dilation,
        precision=precision,
    )


def _batched(primitive, form, joins, args, dims, **settings):
    """Either operand's batch joins an axis that the primitive carries through to the result; both at once cannot."""
    if None not in dims:
        return jax.vmap(partial(form, **settings), dims)(*args), 0
    args, which = [*args], 0 if dims[1] is None else 1
    at, to = (axis % args[1 - which].ndim for axis in joins[which])
    a = jnp.moveaxis(args[which], dims[which], at)
    number, size = a.shape[at : at + 2]
    args[which] = a.reshape(*a.shape[:at], number * size, *a.shape[at + 2 :])
    out = primitive.bind(*args, **settings)
    return out.reshape(*out.shape[:to], number, out.shape[to] // number, *out.shape[to + 1 :]), to


def _primitive(name, form, shape, joins, *transposes):
    primitive = Primitive(name)
    static = ("strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "size")
    primitive.def_impl(jax.jit(form, static_argnames=static))
    primitive.def_abstract_eval(shape)
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = partial(_batched, primitive, form, joins)
    mlir.register_lowering(primitive, mlir.lower_fun(form, multiple_results=False))
    return primitive


_images = _primitive(
    "convolution",
    _convolve,
    lambda x, k, **settings: jax.make_jaxpr(partial(_convolved, **settings))(x, k).out_avals[0],
    ((0, 0), (-1, -1)),
    _image_cotangent,
    lambda g, x, k, **settings: _kernels.bind(x, g, size=k.aval.shape[:-2], **settings),
)
_kernels = _primitive(
    "convolution_kernel",
    _kernel_cotangent,
    lambda x, g, *, size, **settings: x.update(shape=(*size, x.shape[-1], g.shape[-1])),
    ((-1, -2), (-1, -1)),
    lambda k, x, g, *, size, **settings: _image_cotangent(g, x, k, **settings),
    lambda k, x, g, *, size, **settings: _images.bind(x, k, **settings),
)
