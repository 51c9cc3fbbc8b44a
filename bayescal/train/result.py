"""From the carries of all members to a `Fit`: cut, shaped like the method, and told in words."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bayescal.methods.experiments import Runners
from bayescal.sharding import fetch, fetch_numpy, place
from bayescal.train.member import STOPPED_EARLY, TRAINING, Carry
from bayescal.types import REASONS, EnsembleState, Fit, MemberReport


def result(
    apart: Runners, ensembled: bool, carry: Carry, epochs: list[dict], seconds: dict[str, float], mesh: Mesh | None
) -> Fit:
    """Cuts what only fills up the devices, and gives states, history and report the shape of the method.

    Args:
        apart: the members of all experiments.
        ensembled: whether members pool, so that states are `EnsembleState`s.
        carry: of every member, after the last epoch.
        epochs: each one's info, arrays (member,).
        seconds: as in `Fit`.
        mesh: where the carry is.

    Raises:
        ValueError: where no member's state, last or best, is usable.
    """
    several = jax.process_count() > 1
    shape = apart.shape or (1,)
    shaped = lambda x: fetch_numpy(x)[: apart.number].reshape(shape)
    history = {k: np.stack([shaped(epoch[k]) for epoch in epochs]) for k in epochs[0]}
    history.pop("training")
    trained = np.flatnonzero(history.pop("trained").reshape(len(epochs), -1).any(1))
    ran = int(trained.max(initial=0)) + 1  # nobody trained in the epochs after
    history = {k: v[:ran] for k, v in history.items()}
    report = _report(carry, ran, shaped)
    validated = "validation_score" in history
    best_alive = report.best_epoch >= 0 if validated else report.alive
    if not (report.alive | best_alive).any():
        raise ValueError(
            f"`loss` must stay finite for at least one member, got none of {apart.number}; they diverged in epochs "
            f"{report.stopped_epoch.ravel().tolist()} ({', '.join(sorted(set(report.reason.ravel().tolist())))}). Lower the "
            "learning rate, check the scale of the inputs, or, for a sampler, whether `num_data` is the number of rows."
        )
    if not best_alive.any():
        raise ValueError(
            f"`score` must be a number for at least one member and epoch, got {history['validation_score'][-1].ravel()} "
            "in the last. Check the validation rows and the metric."
        )
    states = carry.state, carry.best if validated else carry.state
    if carry.status.shape != apart.shape:
        cut = carry.status.shape[0] != apart.number
        states = _reshaped(fetch(states) if cut else states, apart.shape)
        states = place(states, mesh) if cut and several else states
    if ensembled:
        alive = (jnp.asarray(report.alive), jnp.asarray(best_alive))
        alive = place(alive, mesh) if several else alive
        states = [EnsembleState(state, sound) for state, sound in zip(states, alive, strict=True)]
    return Fit(states[0], states[1], history, report, seconds)


def _report(carry: Carry, epochs: int, shaped: Callable[[Any], np.ndarray]) -> MemberReport:
    status, stopped = shaped(carry.status), shaped(carry.stopped_epoch)
    return MemberReport(
        alive=(status == TRAINING) | (status == STOPPED_EARLY),
        reason=np.array(REASONS)[status],
        stopped_epoch=np.where(stopped < 0, epochs, stopped),
        stopped_step=shaped(carry.updates),
        last_finite_loss=shaped(carry.last_loss),
        best_epoch=shaped(carry.best_epoch),
    )


@partial(jax.jit, static_argnums=1)
def _reshaped(states, shape):
    return jax.tree.map(lambda x: x[: math.prod(shape)].reshape(*shape, *x.shape[1:]), states)
