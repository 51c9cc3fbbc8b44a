"""How much a function's temporaries hold at once, read off its jaxpr: nothing is compiled, computed or allocated."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from bayescal.types import PyTree


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CALLS = _names("checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit remat remat2 shard_map")
_LOOPS = _names("scan while")
_RENAMINGS = _names(
    "copy copy_p device_put expand_dims optimization_barrier pcast pvary reshape sharding_constraint squeeze "
    "stop_gradient transpose"
)
_BROADCASTS = _names("broadcast_in_dim iota")
_ELEMENTWISE = _BROADCASTS | _names(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp "
    "convert_element_type cos cosh digamma div dynamic_slice eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision "
    "rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan "
    "tanh xor"
)
_FUSING = _ELEMENTWISE | _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")
_RANDOM_WORDS = 3  # threefry turns over two words a number, old and new: three beside the bits that come out


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, as a device holds them: float64 counts as float32 unless jax runs in 64 bits.

    Args:
        tree: pytree of arrays or `jax.ShapeDtypeStruct`s, typed random keys among them.
    """
    return sum(_bytes(x) for x in jax.tree.leaves(abstract(tree)))


def peak_bytes(function: Callable, *args) -> int:
    """Most bytes that the temporaries of `function(*args)` hold at once; arguments, constants and results not counted.

    A value is held from its equation to its last use. Calls are inlined; of branches the largest counts; of a loop its
    results and its body, with the slices that it reads and with those of its own results that must be copied because
    they are not elementwise. Elementwise equations fuse into an elementwise or reducing consumer where it is the only
    one, broadcasts into all; reshapes and transposes are free.

    On CPU that is 0.6 to 1.5 times the compiler's `temp_size_in_bytes` for steps of dense, convolutional and attention
    networks in a loop and for their predictions, and 0.4 to 2.4 times it with random weights or with optimiser states
    made on the way. It is further off where results outweigh temporaries, as in a lone update on few rows: the compiler
    keeps temporaries in the results' memory, which it cannot in a loop of updates, and the estimate is the loop's. What
    a backend adds is not seen: scratch space of convolutions, float32 copies of bfloat16 on some CPUs.

    Args:
        function: what `jax.jit` takes.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
    """
    return _peak(jax.make_jaxpr(function)(*args).jaxpr)


@dataclass(frozen=True, eq=False)
class _Value:
    """A result of an equation, in bytes; compared by identity, since one inner jaxpr may be called twice."""

    size: int


class _Step(NamedTuple):
    """An equation: the values it reads and writes, and bytes of temporaries of its own."""

    name: str
    reads: Collection[_Value]
    writes: Sequence[_Value]
    inside: int = 0


def _peak(jaxpr, caller=None) -> int:
    """Peak bytes of a jaxpr's temporaries; `caller` is the equation whose loop body or branch it is."""
    name = caller.primitive.name if caller else ""
    pairs = zip(caller.invars, jaxpr.invars, strict=True) if caller and name == "scan" else ()
    slices = {v: _Value(_bytes(v.aval)) for whole, v in pairs if whole.aval.shape != v.aval.shape}
    values: dict = dict(slices)
    steps = [_Step("dynamic_slice", [], [value]) for value in slices.values()] + list(_steps(jaxpr, values))
    results = {_value(values, v) for v in jaxpr.outvars}
    steps = _materialised(_needed(steps, results), results)
    last: dict = {value: number for number, step in enumerate(steps) for value in [*step.reads, *step.writes]}
    last.update(dict.fromkeys(results, len(steps)))
    elsewhere = results
    if name in _LOOPS:  # only an elementwise result can overwrite what the body began with
        elsewhere = results.difference(*(step.writes for step in steps if step.name not in _ELEMENTWISE))

    def size(some):
        return sum(value.size for value in some if value not in elsewhere)

    held = peak = 0
    for number, step in enumerate(steps):
        freed = size(value for value in step.reads if last[value] == number)
        unread = size(value for value in step.writes if last[value] == number)
        in_place = freed if step.name in _ELEMENTWISE else 0
        peak = max(peak, held + size(step.writes) + step.inside - in_place)
        held += size(step.writes) - freed - unread
    return peak


def _steps(jaxpr, values: dict) -> Iterator[_Step]:
    """The equations in order, calls inlined; fills `values`: variable -> value, None for arguments and constants."""
    from jax.extend.core import jaxprs_in_params  # slow to import: all of Pallas comes along

    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(jaxprs_in_params(eqn.params))
        reads = [_value(values, v) for v in eqn.invars]
        if name in _CALLS:
            own = dict(zip(inner[0].invars, reads, strict=True))
            yield from _steps(inner[0], own)
            values.update(zip(eqn.outvars, [_value(own, v) for v in inner[0].outvars], strict=True))
        elif name in _RENAMINGS:
            values.update(zip(eqn.outvars, reads, strict=True))
        else:
            writes = [_Value(_bytes(v.aval)) for v in eqn.outvars]
            values.update(zip(eqn.outvars, writes, strict=True))
            inside = max((_peak(j, eqn) for j in inner), default=0)
            inside += _RANDOM_WORDS * writes[0].size if name == "random_bits" else 0
            yield _Step(name, {value for value in reads if value}, writes, inside)


def _needed(steps: list[_Step], results: set) -> list[_Step]:
    """The steps that results depend on, in order; the compiler drops the others."""
    needed, kept = set(results), []
    for step in reversed(steps):
        if needed.intersection(step.writes):
            needed.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _materialised(steps: list[_Step], results: set) -> list[_Step]:
    """The steps whose values exist as arrays, each reading what the steps fused into it read."""
    readers = defaultdict(list)
    for step in steps:
        for value in step.reads:
            readers[value].append(step.name)
    sources, kept = {}, []
    for step in steps:
        reads, value = set().union(*(sources[v] for v in step.reads)), step.writes[0]
        alone = len(readers[value]) == 1 or step.name in _BROADCASTS
        if step.name in _ELEMENTWISE and value not in results and alone and _FUSING.issuperset(readers[value]):
            sources[value] = reads
        else:
            sources.update((v, {v}) for v in step.writes)
            kept.append(step._replace(reads=reads))
    return kept


def _value(values: dict, variable) -> _Value | None:
    from jax.extend.core import Literal

    return None if isinstance(variable, Literal) else values.get(variable)


def _bytes(x) -> int:
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return x.size * x.dtype.itemsize


def abstract(tree: PyTree) -> PyTree:
    """Shapes and types of a pytree of arrays, without the arrays."""
    return jax.eval_shape(lambda t: t, tree)
