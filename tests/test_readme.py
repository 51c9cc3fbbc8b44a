"""Documentation runs: the README's Python blocks, its commands' files, and the notebook."""

import re
import runpy

import matplotlib
import pytest
from conftest import REPOSITORY

import bayescal as bc

README = (REPOSITORY / "README.md").read_text()
DOCS = [path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = [README, *DOCS]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page, flags=re.S)]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "readme"})


def test_there_is_a_runnable_block():
    assert len(BLOCKS) >= 3


def test_files_named_in_the_readme_exist():
    names = set(re.findall(r"[\w/]+\.(?:py|yaml|png|md)\b", "".join(PAGES))) - {"train.py"}
    assert names
    for name in names:
        found = any((folder / name).exists() for folder in (REPOSITORY, REPOSITORY / "docs"))  # pages' own pictures
        assert found or name.startswith("runs/"), name


def test_public_names_in_the_readme_exist():
    for name in set(re.findall(r"\bbc\.([A-Za-z_]\w*)", "".join(PAGES))):
        assert hasattr(bc, name), name


def test_the_table_of_metrics_is_complete():
    """Every public name of the metrics is in the page, and every name in its table exists."""
    import bayescal.metrics as metrics

    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`([A-Za-z_]+)(?:\(|`)", page[page.index("## All of them") :]))
    assert set(metrics.__all__) - named == set(), "not in docs/metrics.md"
    settings = {"groups", "weights"}
    unknown = {n for n in named if not hasattr(metrics, n) and not hasattr(bc, n)} - settings
    assert not unknown, unknown


@pytest.mark.parametrize(("package", "page"), [(bc.calibrate, "calibration"), (bc.conformal, "conformal")])
def test_the_pages_of_calibration_are_complete(package, page):
    """Every public function is in the page, and every `fit_` and `bc.conformal` name in it exists."""
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    named = set(re.findall(r"`(?:bc\.|calibrate\.|conformal\.)*([A-Za-z_]+)", text))
    assert {name for name in package.__all__ if name[0].islower()} - named == set()
    known = {*package.__all__, *bc.calibrate.__all__, *bc.conformal.__all__}
    assert {name for name in named if name.startswith("fit_")} - {"fit_"} - known == set()


def test_notebook_runs(monkeypatch):
    matplotlib.use("Agg")
    shown = runpy.run_path(str(REPOSITORY / "notebooks" / "explore_predictive.py"))
    assert shown["pred"].logits.shape == (5, 289, 8)
    assert shown["unseen_parts"].epistemic.mean() > 3 * shown["known_parts"].epistemic.mean()
