"""Trains a convolutional ensemble on a mesh and writes its parameters: a process of the sharding and multi-process tests.

    python tests/sharded.py OUT DEVICES MEMBER DATA MEMBERS EPOCHS [PROCESSES RANK PORT CHECKPOINT]

With more than one process each owns DEVICES devices of the mesh.
"""

import json
import re
import sys

import jax

import bayescal as bc


def network():
    return bc.models.convnet((8, 8, 1), (4,), 8, 8, batch_norm=True)


def main(out, devices, member, data, members, epochs, processes=1, rank=0, port=0, checkpoint=None):
    import numpy as np
    import optax

    bc.use_all_cores(devices)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    train = bc.data.digits(seed=0).train
    rows = bc.Dataset(train.inputs[:64], train.targets[:64])
    method = bc.ensemble(bc.map_estimate(network(), bc.Categorical, optax.sgd(0.05)), members)
    mesh = bc.make_mesh(member, data)
    texts = []
    if processes == 1:
        watch(sys.modules["bayescal.train.fit"], texts)
    settings = dict(epochs=epochs, batch_size=64, mesh=mesh, progress=False, checkpoint=checkpoint)
    fitted = bc.fit(method, rows, jax.random.key(0), **settings)
    state = bc.sharding.fetch_numpy(fitted.state.members.variables.params)
    pred = bc.predict(method, fitted.state, rows.inputs, jax.random.key(1), mesh=mesh)
    bc.save(f"{out}.state", fitted.state)
    half = slice(rank * 32, (rank + 1) * 32) if processes > 1 else slice(None)
    figures = bc.evaluate(bc.take(pred, half), rows.targets[half], {"nll": bc.nll()}, across_processes=processes > 1)
    if rank == 0:
        named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        np.savez(out, history=fitted.history["loss"], logits=pred.logits, nll=figures["nll"].value, **named)
        with open(f"{out}.json", "w") as file:
            json.dump({"programs": texts, "n": figures["nll"].n}, file)


def watch(module, found):
    """Notes, for the program of the epochs, its collectives and its floating-point operations per device."""
    run = module._run

    def watched(function, *args):
        if function.__name__ == "several_epochs" and not found:
            compiled = run.lower(function, *args).compile()
            text = compiled.as_text()
            groups = re.findall(r"all-reduce(?:-start)?\([^\n]*replica_groups=(\S+?),? ", text)
            found.append(
                {
                    "all_gather": len(re.findall(r"= \S+ all-gather", text)),
                    "all_to_all": len(re.findall(r"= \S+ all-to-all", text)),
                    "all_reduce": len(re.findall(r"all-reduce(?:-start)?\(", text)),
                    "groups": sorted(set(groups)),
                    "flops": compiled.cost_analysis()["flops"],
                }
            )
        return run(function, *args)

    watched.lower = run.lower
    module._run = watched


if __name__ == "__main__":
    out, *numbers = sys.argv[1:]
    checkpoint = numbers.pop() if len(numbers) > 8 else None
    main(out, *(int(x) for x in numbers), **({"checkpoint": checkpoint} if checkpoint else {}))
