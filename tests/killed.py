"""Trains a small ensemble with checkpoints and writes its parameters: the process that the fault tests kill.

python tests/killed.py FOLDER DEVICES OUT
"""

import sys
from pathlib import Path

import jax

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

import numpy as np
import optax
from methods import blobs

import bayescal as bc

EPOCHS = 12


def train(folder, mesh=None):
    """Three members, one of which stops early, in twelve epochs with a save after each."""
    build = lambda rate: bc.map_estimate(bc.models.mlp(4, (8,), 3), bc.Categorical, optax.adam(rate))
    method = bc.ensemble(build, settings=np.array([0.01, 0.05, 1.0], np.float32))
    data = blobs()
    checkpoint = folder and bc.Checkpoint(folder, every=1)
    settings = dict(epochs=EPOCHS, batch_size=8, validation=data, patience=4, mesh=mesh, progress=False)
    return method, bc.fit(method, data, jax.random.key(3), checkpoint=checkpoint, **settings)


def leaves(fitted):
    """Everything that training leaves, as numpy arrays by name."""
    kept = {"state": fitted.state, "best": fitted.best, "history": fitted.history, "members": fitted.members}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(kept)}


if __name__ == "__main__":
    folder, devices, out = sys.argv[1:]
    bc.use_all_cores(int(devices))
    print("begins", flush=True)
    _, fitted = train(None if folder == "none" else folder)
    np.savez(out + ".draft.npz", **leaves(fitted))
    Path(out + ".draft.npz").rename(out)
    print("done", flush=True)
