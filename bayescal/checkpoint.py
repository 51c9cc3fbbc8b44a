"""What survives: checkpoints of a training that may be killed at any moment, and saved states.

Files are orbax's. Beside them stand digests of every file, written before a checkpoint becomes visible, so that one
that was cut short or changed is told from a sound one without trusting its contents.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayescal.config import versions
from bayescal.sharding import agree, fetch, uncommitted
from bayescal.types import Method, PyTree


class Checkpoint(NamedTuple):
    """Where and how often `fit` saves.

    folder: of this one training; made where absent. A folder with checkpoints of the same training is gone on with.
    every: epochs between saves; the last epoch is always saved. A save holds training up for a few hundredths of a
        second (the files are written meanwhile), and a kill loses at most this many epochs of work, never a bit.
    keep: newest checkpoints that are kept; at least 2, so that a damaged one has one before it.
    config: of the experiment, plain values; a training is gone on with only where they are the same.
    """

    folder: str | Path
    every: int = 1
    keep: int = 2
    config: Mapping[str, Any] = {}


class Store:
    """The checkpoints of one training in one folder; use as a context, which waits for the last save.

    `run.json` says what the training is, `log.jsonl` when it began, was resumed, or had a damaged checkpoint put aside
    (into `damaged/`); `steps/` are orbax's, `digests/` one file a checkpoint.

    Args:
        settings: where and how often.
        identity: name -> plain value: what must be the same for a training to be gone on with.
        facts: name -> plain value: what is only recorded.

    Raises:
        ValueError: for a folder that holds another training, naming every key that differs.
    """

    def __init__(self, settings: Checkpoint, identity: Mapping[str, Any], facts: Mapping[str, Any]):
        if settings.every < 1 or settings.keep < 2:
            raise ValueError(
                f"`checkpoint` must have every >= 1 and keep >= 2, got {settings.every} and {settings.keep}. Two are "
                "kept so that a damaged one has one before it."
            )
        self.folder = Path(settings.folder).absolute()
        self.settings = settings
        self.identity = {**identity, **{f"config.{k}": v for k, v in settings.config.items()}}
        self.identity = json.loads(json.dumps(self.identity, sort_keys=True, default=str))
        self.facts = {**facts, "versions": versions()}
        self.writes = jax.process_index() == 0
        self.unchecked = ""
        self._check_same_run()
        self.manager = None
        self.saving = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.manager is not None:
            self.manager.wait_until_finished()
            self.manager.close()

    def _check_same_run(self) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            left = [name for name in ("steps", "digests") if (self.folder / name).exists()]
            if left:
                raise ValueError(
                    f"`{path}` must say what training is in this folder, got none beside {' and '.join(left)}. Restore "
                    "it, choose another folder, or delete this one."
                )
            self.fresh = True
            return
        self.fresh = False
        try:
            before = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{path}` must say what training is in this folder, got a file that cannot be read ({error}). "
                "Choose another folder, or delete this one."
            ) from None
        changed = [k for k in _COMPILERS if before["facts"]["versions"].get(k) != self.facts["versions"].get(k)]
        if changed:  # another version writes the same program in other words
            self.unchecked = ", ".join(f"{k} was {before['facts']['versions'].get(k)}" for k in changed)
            warnings.warn(
                f"The program of the training in {self.folder} cannot be compared, since {self.unchecked}; all else is.",
                stacklevel=5,
            )
        keys = sorted({*before["identity"], *self.identity} - ({"program"} if changed else set()))
        old, new = before["identity"], self.identity
        differing = [k for k in keys if old.get(k, _ABSENT) != new.get(k, _ABSENT)]
        if differing:
            told = "; ".join(
                f"`{k}` was {_short(old.get(k, _ABSENT))}, is {_short(new.get(k, _ABSENT))}" for k in differing
            )
            raise ValueError(
                f"`checkpoint` must be a folder of the same training, got {self.folder}, where {told}. Put the settings "
                "back to go on with it, choose another folder, or delete this one to begin again."
            )

    def resume(self, abstract: Callable[[dict], PyTree]) -> tuple[int, PyTree, dict] | None:
        """The newest sound checkpoint: epochs done, its tree, and its record; None where there is none.

        A damaged one is put aside, warned of, and noted in the log; the one before is taken. Damage is files that are
        missing or not what was written; a disk that cannot be read is an error.

        Args:
            abstract: record -> tree of `jax.ShapeDtypeStruct` with shardings, as it shall come back.
        """
        self._note_start()
        damaged = 0
        while True:
            epoch = self._newest()
            if epoch is None and damaged:
                warnings.warn(f"No sound checkpoint is left in {self.folder}; training begins again.", stacklevel=4)
                self.log("began again")
            if epoch is None:
                return None
            if damage := self._damage(epoch):
                self._put_aside(epoch, damage)
                damaged += 1
                continue
            record = json.loads((self.folder / "digests" / f"{epoch}.json").read_text())["record"]
            tree = self._open().restore(epoch, args=_orbax().args.StandardRestore(abstract(record)))
            where = {"saved_on": record.get("devices"), "on": self.facts.get("devices")}
            self.log("resumed", epoch=epoch, **where, **({"not_compared": self.unchecked} if self.unchecked else {}))
            return epoch, tree, record

    def save(self, epoch: int, tree: PyTree, record: Mapping[str, Any]) -> None:
        """Saves after `epoch` epochs, in the background; waits for the save before this one to be whole."""
        manager = self._open()
        manager.wait_until_finished()
        self.saving = epoch, dict(record)
        manager.save(epoch, args=_orbax().args.StandardSave(tree), force=True)

    def log(self, event: str, **what) -> None:
        """A line in `log.jsonl`."""
        if self.writes:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"event": event, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **what}) + "\n")

    def _note_start(self) -> None:
        if self.fresh and self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "run.json", {"identity": self.identity, "facts": self.facts})
            self.log("began", **self.facts)

    def _open(self):
        if self.manager is None:
            orbax = _orbax()
            options = orbax.CheckpointManagerOptions(
                max_to_keep=self.settings.keep,
                async_options=orbax.AsyncOptions(post_finalization_callback=self._write_digests),
            )
            self.manager = orbax.CheckpointManager(self.folder / "steps", options=options)
        return self.manager

    def _write_digests(self) -> None:
        """Called by orbax when all files are written and the checkpoint is about to become visible."""
        if not self.writes or self.saving is None:
            return
        epoch, record = self.saving
        steps = self.folder / "steps"
        draft = next(p for p in sorted(steps.iterdir(), reverse=True) if p.name.split(".")[0] == str(epoch))
        (self.folder / "digests").mkdir(exist_ok=True)
        _write(self.folder / "digests" / f"{epoch}.json", {"record": record, "files": digests(draft)})
        for old in (self.folder / "digests").glob("*.json"):
            if int(old.stem) != epoch and not (steps / old.stem).exists():
                old.unlink()

    def _newest(self) -> int | None:
        steps = self.folder / "steps"
        here = [int(p.name) for p in steps.iterdir() if p.name.isdigit()] if steps.exists() else []
        newest = agree(max(here, default=-1))
        return newest if newest >= 0 else None

    def _damage(self, epoch: int) -> str:
        """What is wrong with a checkpoint's files, in words, by the first process and for all; empty = nothing."""
        wrong = ""
        if self.writes:
            try:
                written = json.loads((self.folder / "digests" / f"{epoch}.json").read_text())["files"]
                check_digests(self.folder / "steps" / str(epoch), written)
            except (FileNotFoundError, ValueError, KeyError) as error:
                wrong = _short(error)
        return wrong or "found by the first process" if agree(bool(wrong)) else ""

    def _put_aside(self, epoch: int, damage: str) -> None:
        warnings.warn(
            f"Checkpoint {epoch} in {self.folder} is damaged ({damage}); it is put into damaged/, and the one before "
            "is looked for.",
            stacklevel=5,
        )
        if self.writes:
            target = self.folder / "damaged" / f"{epoch}-{time.time_ns()}"
            target.parent.mkdir(exist_ok=True)
            (self.folder / "steps" / str(epoch)).rename(target)
        self.log("damaged checkpoint put aside", epoch=epoch, damage=damage)
        agree(0)  # the others look again only when it is gone


def events(folder: str | Path) -> list[dict[str, Any]]:
    """The log of a training's folder in order: when it began, was resumed, or had a damaged checkpoint put aside."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what has no end was cut short by a kill
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def facts(folder: str | Path) -> dict[str, Any]:
    """What the training in a folder recorded beside its identity when it began; empty where there is none."""
    path = Path(folder) / "run.json"
    try:
        return json.loads(path.read_text())["facts"]
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def save(folder: str | Path, state: PyTree) -> None:
    """Saves a state, a calibrator, or any pytree of arrays; one that the folder holds already is replaced at the end.

    Killed at any moment it leaves the old or the new one, if need be as `FOLDER.old`, which the next `save` or `load`
    puts back.

    Args:
        folder: to write; its parents are made.
        state: such as `Fit.state` or `Fit.best`; typed keys are kept.

    Raises:
        FileNotFoundError: for a folder that holds other things.
    """
    folder = Path(folder).absolute()
    draft, old = folder.with_name(f"{folder.name}.draft"), folder.with_name(f"{folder.name}.old")
    first = jax.process_index() == 0
    if first:
        _put_back(folder)
        if folder.exists():
            _require_saved(folder)
        shutil.rmtree(draft, ignore_errors=True)
    agree(0)
    with _orbax().StandardCheckpointer() as writer:
        writer.save(draft / "state", state)
        writer.wait_until_finished()
    if first:
        _write(draft / "digests.json", {"files": digests(draft / "state"), "versions": versions()})
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    agree(0)


def _put_back(folder: Path) -> None:
    """What a `save` that was killed between two renamings had put away."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def load(folder: str | Path, like: Method | PyTree) -> PyTree:
    """What `save` wrote, as arrays on the first device; predictions from it are the same to the bit.

    Args:
        folder: that `save` wrote.
        like: the method whose state it is, or a pytree of the same structure, shapes and types.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for files that were changed or cut short, or a structure that is another.
    """
    folder = Path(folder).absolute()
    _put_back(folder)
    _require_saved(folder)
    check_digests(folder / "state", json.loads((folder / "digests.json").read_text())["files"])
    if isinstance(like, Method):
        init = like.init
        like = jax.eval_shape(lambda key: init(key, None), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=here), like)
    with _orbax().StandardCheckpointer() as reader:
        try:
            return uncommitted(reader.restore(folder / "state", wanted))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`like` must have the structure, shapes and types of what was saved in {folder}, got another: {error} "
                "Pass the method that was trained, with the same network and number of members."
            ) from error


def digests(folder: Path) -> dict[str, str]:
    """File -> digest of its bytes, for every file below `folder` but orbax's own marks at its top."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not (p.parent == folder and _is_mark(p.name)))
    return {str(p.relative_to(folder)): _digest_file(p) for p in files}


def check_digests(folder: Path, written: Mapping[str, str]) -> None:
    """Raises ValueError unless the files below `folder` are those that were written, to the byte."""
    found = digests(folder)
    wrong = sorted(name for name in {*found, *written} if found.get(name) != written.get(name))
    if wrong:
        raise ValueError(
            f"`{folder}` must hold the files that were written, got {len(wrong)} changed, missing or added, first "
            f"{wrong[0]}. Use an older checkpoint, or train again."
        )


def digest(tree: PyTree) -> str:
    """One digest of every number of a pytree, with shapes and types: equal trees have equal digests."""
    total = hashlib.blake2b(digest_size=12)
    for path, leaf in jax.tree.leaves_with_path(fetch(tree)):
        typed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        host = np.asarray(jax.random.key_data(leaf) if typed else leaf)
        total.update(f"{jax.tree_util.keystr(path)} {host.shape} {host.dtype}".encode())
        total.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


_ABSENT = "absent"
_COMPILERS = ("python", "jax", "jaxlib", "flax", "optax", "numpyro", "bayescal")  # whose versions word a program


def _is_mark(name: str) -> bool:
    return name in ("_CHECKPOINT_METADATA", "commit_success.txt")


def _require_saved(folder: Path) -> None:
    if not (folder / "digests.json").is_file():
        raise FileNotFoundError(f"`folder` must be one that `bc.save` wrote, got {folder}. Check the path.")


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def _write(path: Path, value) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1, default=str) + "\n")
    draft.replace(path)


def _short(value) -> str:
    words = " ".join(str(value).split())
    return words if len(words) < 120 else words[:117] + "..."


def _orbax():
    import orbax.checkpoint  # heavy: only those who save pay for it

    return orbax.checkpoint
