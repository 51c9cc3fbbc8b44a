"""What a training needs at the least, and how ours grows: its matrix products alone, its own single member, doubled sizes."""

import time
from collections.abc import Callable
from itertools import pairwise
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from bench import entry, interleaved
from bench_training_data import CLASSES, Case, rows_of
from bench_training_ours import training
from bench_training_process import child

from bayescal.sharding import default_mesh, on, place, run_members

FLOOR = "matrix products alone"
DOUBLED = {"M": "members", "N": "rows", "width": "width"}


def floor(case: Case) -> Callable:
    """The products of a whole training of "mlp" as a function: three forward, three for the weights, two for the inputs.

    Members run as ours do: over all devices, one after another on each, a scan over steps.
    """
    sizes = [784, case.width, case.width, CLASSES]
    shapes = list(pairwise(sizes))
    batch, steps, mesh = case.batch_size, case.steps, default_mesh(case.members)
    inputs = place(rows_of(case)[0][0], mesh)

    def products(x, weights):
        below = [x]
        for w in weights:
            below.append(below[-1] @ w)
        back, found = below.pop(), []
        for layer in reversed(range(len(weights))):
            found.append(below[layer].T @ back)
            back = back @ weights[layer].T if layer else back
        return found[::-1]

    def one(key, inputs):
        keys = jax.random.split(key, len(shapes))
        weights = [jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(keys, shapes, strict=True)]

        def step(carry, number):
            row = inputs[number % len(inputs)]
            x = carry[0].at[number % batch].set(row)  # something new a step, or XLA takes the products out of the loop
            return (x, products(x, weights)), None

        start = (inputs[:batch], [jnp.zeros(s) for s in shapes])
        return jax.lax.scan(step, start, jnp.arange(steps))[0][1]

    compiled = jax.jit(lambda keys, inputs: run_members(one, keys, shared=(inputs,)))
    keys = jax.random.split(jax.random.key(0), case.members)

    def run():
        with on(mesh):
            return compiled(keys, inputs)

    return run


def growth(base: Case, rounds: int, cores: int) -> list[dict]:
    """Ours against as many single members, and against itself with half the members, rows or width.

    Memory is the highest that training took on top of the imports, in a process whose programs were compiled before.
    """
    single = base._replace(members=1)
    sizes = {base: None, single: None}  # in order, each once
    pairs = []
    for letter, field in DOUBLED.items():
        for times in (1, 2):
            small, large = (base._replace(**{field: getattr(base, field) * 2**t}) for t in (times - 1, times))
            sizes |= {small: None, large: None}
            pairs.append((f"mlp, {letter} = {getattr(large, field)}", f"half {letter}", large, small))
    seconds = interleaved({str(case): training(case) for case in sizes}, rounds, time.perf_counter)
    with TemporaryDirectory() as cache:
        memory = {case: [child("ours", case, cores, cache)["megabytes"] for _ in range(2)][1] for case in sizes}

    def line(label: str, peer: str, case: Case, other: Case, times: int = 1) -> dict:
        found = entry(label, peer, seconds[str(case)], times * seconds[str(other)], phase="growth")
        return found | {"ours_megabytes": memory[case], "peer_megabytes": times * memory[other]}

    several = [c for c in sizes if c.members > 1 and (c.rows, c.width) == (base.rows, base.width)]
    entries = [line(f"mlp, M = {c.members}", "ours x M", c, single, c.members) for c in several]
    return entries + [line(*pair) for pair in pairs]
