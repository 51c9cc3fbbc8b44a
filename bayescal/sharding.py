"""How members and draws run, and on which devices: the one place that knows."""

import contextlib
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Execution = Literal["map", "vmap"] | int


def use_all_cores(number: int | None = None) -> int:
    """One XLA device for each CPU core, over which members are spread; returns how many. For the first line of a script.

    Without it jax sees one CPU device, whatever the cores. It does nothing to GPUs and TPUs, and nothing where the
    number of host devices was set already (`XLA_FLAGS`, `jax_num_cpu_devices`).

    Args:
        number: devices; None = the cores that this process may use.

    Raises:
        RuntimeError: where jax has already started, with another number.
    """
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if flag or jax.config.jax_num_cpu_devices > 0:  # pyright: ignore
        return int(flag[1]) if flag else jax.config.jax_num_cpu_devices  # pyright: ignore
    cores = number or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        started = jax.local_device_count("cpu")
        if started != cores:
            raise RuntimeError(
                f"`use_all_cores` must be called before jax computes anything, got a jax already started with {started} "
                "CPU devices. Make it the first line of the script."
            ) from None
    return cores


def make_mesh(member: int | None = None, data: int = 1, *, devices=None) -> Mesh:
    """A mesh ('member', 'data'): members are spread over the first axis, the rows of every batch over the second.

    Args:
        member: devices along the member axis; None = all that `data` leaves.
        data: devices that share each batch.
        devices: which; None = all of all processes.

    Raises:
        ValueError: for more devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    if member is None:
        member = len(devices) // data if data else 0
    if member < 1 or data < 1 or member * data > len(devices):
        raise ValueError(
            f"`member` x `data` must be between 1 and the {len(devices)} devices, got {member} x {data}. On CPU, "
            "`bc.use_all_cores()` before anything else gives one device a core."
        )
    chosen = devices[: member * data]
    return jax.make_mesh((member, data), ("member", "data"), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def default_mesh(number: int) -> Mesh | None:
    """As many devices as members, or all of all processes; None for one device."""
    width = len(jax.devices()) if jax.process_count() > 1 else min(len(jax.devices()), number)
    return make_mesh(width) if width > 1 else None


def check_mesh(mesh: Mesh | None) -> None:
    """Raises for a mesh without a member axis, and inside `jax.set_mesh`, whose mesh would be mixed with ours."""
    if mesh is not None and (not isinstance(mesh, Mesh) or not {*mesh.axis_names} <= {"member", "data"}):
        got = mesh.axis_names if isinstance(mesh, Mesh) else type(mesh).__name__
        raise ValueError(
            f"`mesh` must have the axes 'member' and 'data', got {got}. Make it with `bc.make_mesh(member, data)`."
        )
    if not jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            "`mesh` must be passed as an argument, got a call inside `jax.set_mesh`. Leave that context, and pass "
            "`mesh=bc.make_mesh(...)`."
        )


def on(mesh: Mesh | None):
    """A context in which `run_members` spreads members over `mesh`; without one, nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def default_execution(mesh: Mesh | AbstractMesh | None = None) -> Execution:
    """ "map" on CPU and where rows are shared between devices, which vmapped convolutions would gather; else "vmap".

    On CPU "map" is as fast as "vmap" but for tiny networks (which `fit` runs side by side), compiles faster and keeps
    convolutions fast.
    """
    shared = mesh is not None and dict(mesh.shape).get("data", 1) > 1
    return "map" if shared or jax.default_backend() == "cpu" else "vmap"


def run_members(function: Callable, *args, shared: tuple = (), execution: Execution | None = None):
    """Calls `function(*own, *shared)` for each entry of the leading axis of `args` and stacks the results.

    Under a mesh with a member axis (`jax.set_mesh`) every device runs its share; entries that do not divide the
    devices are filled up with copies of the last, and cut. No device talks to another.

    Args:
        function: pure; takes one member's part of each argument, then what is shared. Other arrays from outside
            belong into `shared`: those of a closure are on the whole mesh, and cannot be indexed inside.
        *args: pytrees of arrays with a leading member axis.
        shared: pytrees of arrays that are the same for all members.
        execution: "map" runs members one after another in the same program: bitwise what each gives alone, and the
            least memory. "vmap" runs them side by side: results agree to rounding. A number k: side by side in groups
            of k. None = `default_execution()`.

    Raises:
        ValueError: for another word.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if execution is None:
        execution = default_execution(None if mesh.empty else mesh)
    if "member" not in mesh.axis_names or "member" in mesh.manual_axes:
        return _run_here(function, args, shared, execution)
    number = jax.tree.leaves(args)[0].shape[0]
    run = jax.shard_map(
        lambda own, shared: _run_here(function, own, shared, execution),
        in_specs=(PartitionSpec("member"), PartitionSpec()),
        out_specs=PartitionSpec("member"),
        axis_names={"member"} if mesh.shape.get("data", 1) > 1 else set(mesh.axis_names),
        check_vma=False,
    )
    filled = round_up(number, mesh.shape["member"])
    result = run(resize(args, filled), shared)
    return result if filled == number else resize(result, number)


def _run_here(function, args, shared, execution):
    one = lambda own: function(*own, *shared)
    if execution == "vmap":
        return jax.vmap(one)(args)
    if execution == "map":
        return jax.lax.map(one, args)
    if isinstance(execution, int) and not isinstance(execution, bool) and execution > 0:
        return jax.lax.map(one, args, batch_size=execution)
    raise ValueError(
        f"`execution` must be 'map', 'vmap', a positive number or None, got {execution!r}. None picks by backend."
    )


def over_data(rows):
    """The same array, its leading axis spread over the mesh's 'data' axis; without one, unchanged.

    For the row indices of a batch: without this line XLA computes the whole batch on every device, and nothing fails.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if dict(mesh.shape).get("data", 1) == 1:
        return rows
    return jax.lax.with_sharding_constraint(rows, PartitionSpec("data"))


def round_up(number: int, width: int) -> int:
    """The smallest multiple of `width` that is at least `number`."""
    return -(-number // width) * width


def resize(tree, number: int):
    """The leading axis cut, or filled up with copies of the last entry, to `number`."""
    leaves = jax.tree.leaves(tree)
    return tree if all(x.shape[0] == number for x in leaves) else _resize(tree, number)


@partial(jax.jit, static_argnums=1)
def _resize(tree, number):
    def one(x):
        copies = jnp.broadcast_to(x[-1:], (max(0, number - x.shape[0]), *x.shape[1:]))
        return jnp.concatenate([x[:number], copies])

    return jax.tree.map(one, tree)


def place(tree, mesh: Mesh | None, *spec: str | None):
    """`tree` on the devices of `mesh`: replicated, or its leading axes spread over the axes named in `spec`."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = one(np.asarray(jax.random.key_data(x)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def fetch(tree) -> Any:
    """Every leaf as a whole array on one device of this process, wherever its parts were.

    With several processes all of them must call it together.
    """
    leaves, structure = jax.tree.flatten(tree)
    for place, x in enumerate(leaves):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # pyright: ignore
            leaves[place] = jax.jit(_same, out_shardings=everywhere)(x).addressable_data(0)
    spread = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and len(x.devices()) > 1]
    if spread:
        device = min(leaves[spread[0]].devices(), key=lambda d: d.id)
        for i, x in zip(spread, jax.device_put([leaves[i] for i in spread], device), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def _same(x):
    return x


def fetch_numpy(tree) -> Any:
    """Every leaf as a numpy array, wherever its parts were."""
    return jax.tree.map(np.asarray, tree if jax.process_count() == 1 else fetch(tree))


def uncommitted(tree):
    """The same values, free to move to whatever device they are used with."""

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.asarray(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x)
            )
        return jnp.asarray(np.asarray(x))

    return jax.tree.map(one, tree)


def agree(number: int) -> int:
    """The first process's number, in all of them; they wait for each other."""
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.int32(number)))


def sum_over_processes(tree) -> Any:
    """Every float64 number added over all processes, in all of them; for small things, such as the sums of metrics."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import process_allgather

    high = jax.tree.map(lambda x: np.asarray(x, np.float32), tree)  # devices may have no float64: two parts
    low = jax.tree.map(lambda x, h: np.asarray(x - h, np.float32), tree, high)
    parts = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), process_allgather((high, low)))
    return jax.tree.map(np.add, *parts)
