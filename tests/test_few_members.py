"""The simulation of few members: its smoke run, and its arithmetic."""

import json

import few_members as study
import numpy as np
from conftest import REPOSITORY

from bayescal.config import load_config


def test_smoke(tmp_path, capsys):
    config = load_config(study.Config, REPOSITORY / "configs" / "few_members" / "smoke.yaml")
    cases = study.main(config, tmp_path)
    stored = json.loads((tmp_path / "metrics.json").read_text())["cases"]
    assert stored.keys() == cases.keys() and len(cases) == 4
    for own in stored.values():
        assert own["plain"]["value"] < own["corrected"]["value"] and own["coverage"]["n"] == 50
        assert 0.7 <= own["coverage"]["value"] <= 1
    assert "coverage of 95 %" in capsys.readouterr().out


def test_share_by_hand():
    found = study.share(np.array([1.0, 3.0]), 4.0)  # mean 2 of 4, spread 1 of 4
    np.testing.assert_allclose(found[:3], [0.5, 0.5 - 1.96 * 0.25 / 2**0.5, 0.5 + 1.96 * 0.25 / 2**0.5])
