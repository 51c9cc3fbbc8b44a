"""Documentation runs: the README's Python blocks, its commands' files, and the notebook."""

import re
import runpy

import matplotlib
import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
RUNNING = (REPOSITORY / "docs" / "running.md").read_text()
BLOCKS = [block for page in (README, RUNNING) for block in re.findall(r"```python\n(.*?)```", page, flags=re.S)]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "readme"})


def test_there_is_a_runnable_block():
    assert len(BLOCKS) >= 3


def test_files_named_in_the_readme_exist():
    names = set(re.findall(r"[\w/]+\.(?:py|yaml|png|md)\b", README + RUNNING)) - {"train.py"}
    assert names
    for name in names:
        assert (REPOSITORY / name).exists() or name.startswith("runs/"), name


def test_public_names_in_the_readme_exist():
    import bayescal as bc

    for name in set(re.findall(r"\bbc\.([A-Za-z_]\w*)", README + RUNNING)):
        assert hasattr(bc, name), name


def test_notebook_runs(monkeypatch):
    matplotlib.use("Agg")
    shown = runpy.run_path(str(REPOSITORY / "notebooks" / "explore_predictive.py"))
    assert shown["pred"].logits.shape == (5, 289, 8)
    assert shown["unseen_parts"].epistemic.mean() > 3 * shown["known_parts"].epistemic.mean()
