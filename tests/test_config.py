from dataclasses import dataclass
from pathlib import Path

import pytest

from bayescal.config import as_dict, command_line, load_config, versions

pytestmark = pytest.mark.core


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    steps: int = 3
    names: tuple[str, ...] = ("a",)
    widths: tuple[int, ...] = (8,)
    quiet: bool = False
    out: str | None = None


def test_yaml_then_words(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("rate: 1e-3\nsteps: 5\nwidths: [4, 4]\n")
    got = load_config(Settings, path, ["steps=7", "names=x,y", "widths=2,3", "quiet=true", "out=here"])
    assert got == Settings(1e-3, 7, ("x", "y"), (2, 3), True, "here")
    assert as_dict(got)["widths"] == [2, 3]
    assert load_config(Settings) == Settings()
    assert load_config(Settings, None, ["rate=2", "out=null", "names=z"]) == Settings(rate=2.0, names=("z",))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stpes=4", "`stpes` must be a key of Settings, got one that nobody reads. Did you mean `steps`?"),
        ("steps", "`steps` must have the form key=value, got no '='"),
        ("steps=2.5", r"`steps` must be int, got 2.5 \(float\). Write for example `steps=10`"),
        ("steps=true", r"`steps` must be int, got True \(bool\)"),
        ("rate=fast", r"`rate` must be float, got 'fast' \(str\)"),
        ("quiet=1", r"`quiet` must be bool, got 1 \(int\)"),
        ("widths=a", r"`widths` must be int, got 'a' \(str\)"),
    ],
)
def test_bad_words(word, message):
    with pytest.raises(ValueError, match=message):
        load_config(Settings, None, [word])


def test_bad_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`path` must be a yaml file, got .*nothing.yaml, which does not exist"
    ):
        load_config(Settings, tmp_path / "nothing.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping, got list"):
        load_config(Settings, path)
    path.write_text("rtae: 1\n")
    with pytest.raises(ValueError, match="Did you mean `rate`"):
        load_config(Settings, path)


def test_versions():
    found = versions()
    assert {"python", "bayescal", "jax", "flax", "device"} <= set(found)


def test_command_line(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("steps: 5\n")
    assert command_line(Settings, ["x/study.py"]) == (Settings(), Path("runs/study/default"))
    assert command_line(Settings, ["study.py", "steps=4"]) == (Settings(steps=4), Path("runs/study/default"))
    got, folder = command_line(Settings, ["study.py", str(path), "rate=2"])
    assert got == Settings(steps=5, rate=2.0) and folder == Path("runs/study/fast")
    assert command_line(Settings, ["study.py", str(path), "out=here"])[1] == Path("here")
