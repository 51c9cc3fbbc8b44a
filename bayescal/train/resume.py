"""A training on disk: what identifies it, and its carry and history as a tree that a checkpoint holds."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from bayescal.checkpoint import Checkpoint, Store, digest
from bayescal.sharding import fetch, place, resize, uncommitted
from bayescal.train.member import EXCLUDED, Carry


class Resumable:
    """Checkpoints of one training; a context that waits for the last save.

    Args:
        settings: where and how often.
        identity: what must be the same: plain values, and trees of arrays of which a digest is kept; `program`, a text.
        carry: abstract, as it is on the devices of this run.
        mesh: devices that the carry lives on.
        forms: what was chosen for this run and is kept to when it is gone on with.
    """

    def __init__(
        self,
        settings: Checkpoint,
        identity: dict[str, Any],
        carry: Carry,
        mesh: Mesh | None,
        forms: dict[str, Any],
    ):
        self.settings = settings
        program = hashlib.blake2b(identity["program"].encode(), digest_size=12).hexdigest()
        plain = {k: v if _is_plain(v) else digest(v) for k, v in {**identity, "program": program}.items()}
        self.mesh = mesh
        self.devices = (
            "1 member x 1 data" if mesh is None else " x ".join(f"{n} {name}" for name, n in mesh.shape.items())
        )
        facts = {"devices": self.devices, "processes": jax.process_count(), "forms": forms}
        self.carry, self.saved = carry, 0
        layout = [(jax.tree_util.keystr(p), x.shape[1:], str(x.dtype)) for p, x in jax.tree.leaves_with_path(carry)]
        plain["state"] = hashlib.blake2b(str(layout).encode(), digest_size=12).hexdigest()
        self.store = Store(self.settings, plain, facts)

    def __enter__(self):
        self.store.__enter__()
        return self

    def __exit__(self, *exception):
        self.store.__exit__(*exception)

    def due(self, done: int) -> bool:
        """Whether the carry after `done` epochs is to be saved; the last one always is."""
        return done % self.settings.every == 0

    def until_due(self, done: int) -> int:
        """Epochs after `done` until the carry is to be saved next, at least 1."""
        return self.settings.every - done % self.settings.every

    def save(self, carry: Carry, history: list[dict]) -> None:
        """Saves the carry and the history of all epochs so far in the background, unless they are saved already."""
        if len(history) == self.saved:
            return
        self.saved = len(history)
        joined = {k: np.stack([h[k] for h in history]) for k in history[0]}
        types = {k: [list(v.shape), str(v.dtype)] for k, v in joined.items()}
        record = {"width": int(carry.status.shape[0]), "history": types, "devices": self.devices}
        self.store.save(self.saved, {"carry": carry, "history": joined}, record)

    def resume(self, number: int) -> tuple[int, Carry, list[dict]] | None:
        """Epochs done, carry and history of the newest sound checkpoint; None where there is none.

        Args:
            number: members that count; what is beyond them only fills up the devices.
        """
        width = self.carry.status.shape[0]
        spread, whole = self._shardings()

        def abstract(record):
            same = record["width"] == width
            resized = lambda x: jax.ShapeDtypeStruct(
                (record["width"], *x.shape[1:]), x.dtype, sharding=spread if same else whole
            )
            history = {
                k: jax.ShapeDtypeStruct(tuple(shape), np.dtype(kind), sharding=whole)
                for k, (shape, kind) in record["history"].items()
            }
            return {"carry": jax.tree.map(resized, self.carry), "history": history}

        found = self.store.resume(abstract)
        if found is None:
            return None
        done, tree, record = found
        self.saved = done
        history = jax.tree.map(np.asarray, fetch(tree["history"]))
        restored = uncommitted(tree["carry"]) if self.mesh is None else tree["carry"]
        if record["width"] != width:
            restored = resize(resize(fetch(restored), number), width)
            status = np.where(np.arange(width) < number, np.asarray(restored.status), EXCLUDED)
            restored = place(restored._replace(status=status), self.mesh, "member")
            history = {k: v[:, np.minimum(np.arange(width), number - 1)] for k, v in history.items()}
        return done, restored, [{k: v[i] for k, v in history.items()} for i in range(done)]

    def _shardings(self):
        if self.mesh is None:
            here = SingleDeviceSharding(jax.local_devices()[0])
            return here, here
        return NamedSharding(self.mesh, PartitionSpec("member")), NamedSharding(self.mesh, PartitionSpec())


def _is_plain(value) -> bool:
    return value is None or (isinstance(value, (int, float, str, list)) and not _holds_arrays(value))


def _holds_arrays(value) -> bool:
    return any(hasattr(x, "dtype") for x in jax.tree.leaves(value))
