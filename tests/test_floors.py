"""A module imports only from lower floors; heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "bayescal"
FLOORS = {
    "types": "0",
    **dict.fromkeys(
        [
            "predictive",
            "binning",
            "models",
            "sharding",
            "programs",
            "memory",
            "liveness",
            "data",
            "checkpoint",
            "config",
            "schedules",
        ],
        "1",
    ),
    "decompose": "2a",
    **dict.fromkeys(["losses", "metrics", "scores"], "2b"),
    **dict.fromkeys(["methods", "calibrate", "conformal"], "2c"),
    **dict.fromkeys(["train", "evaluate", "testing"], "3"),
    "compare": "3a",
    "detection": "3b",
    **dict.fromkeys(["plots", "fields", "language"], "4"),
    "report": "5",
    "recorded_calibration": "5a",
    "recorded_page": "5b",
    "recorded": "5c",
    "__main__": "6",
}
ONLY_IN = {
    "matplotlib": ("plots",),
    "numpyro": ("methods", "models/random_weights.py"),
    "blackjax": ("methods",),
    "flax": ("models",),
    "sklearn": ("data", "calibrate"),
}  # how the paths of those files begin that may import it
PEERS = {
    ("testing", "train"),
    ("checkpoint", "config"),
    ("checkpoint", "sharding"),
    ("memory", "liveness"),
    ("data", "predictive"),
    ("conformal", "calibrate"),
}  # on one floor, one way


def imports():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"bayescal.{a.name}" for a in node.names] if node.module == "bayescal" else [node.module]
            for name in names:
                yield path, module, name.split(".")


def test_floors():
    wrong = []
    for path, module, name in imports():
        if name[0] == "experiments":
            wrong.append(f"{path.name} imports experiments")
        if name[0] in ONLY_IN and not path.relative_to(PACKAGE).as_posix().startswith(ONLY_IN[name[0]]):
            wrong.append(f"{path.name} imports {name[0]}")
        own = name[0] == "bayescal" and module != "__init__" and name[1] != module
        if own and FLOORS[name[1]] >= FLOORS[module] and (module, name[1]) not in PEERS:
            wrong.append(f"{module} ({FLOORS[module]}) imports {name[1]} ({FLOORS[name[1]]})")
    assert not wrong, wrong


def test_files_are_short_and_well_named():
    for path in [*PACKAGE.rglob("*.py"), *(REPOSITORY / "experiments").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, path


def test_importing_is_light():
    """Nothing heavy comes along, and no device is touched."""
    code = (
        "import sys, bayescal; from jax._src import xla_bridge; "
        "print([m for m in ('numpyro', 'blackjax', 'matplotlib', 'sklearn', 'scipy.stats', 'orbax.checkpoint.experimental') "
        "if m in sys.modules], xla_bridge.backends_are_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["[]", "False"], out


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(Path(p).relative_to(PACKAGE)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
