"""The study of posteriors: its distances against closed forms, and what a run leaves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import posteriors as study
import pytest
from conftest import REPOSITORY
from scipy.stats import norm

import bayescal as bc
from bayescal.config import load_config

pytestmark = pytest.mark.core
ROWS = slice(None)


def one_normal(mean, sd, rows=3):
    """A quarter of the variance is that of the mean."""
    every = lambda x: jnp.full((1, rows, 1), x)
    return bc.Gaussian(every(mean), every(0.75 * sd**2), every(0.25 * sd**2))


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0, 30.0])
def test_total_variation_of_two_normals(shift):
    """2 Phi(shift / 2 sd) - 1 by hand; of normals so far apart that the grid has nothing of the second, 1."""
    measured = study.regression_distances(one_normal(2.0, 0.5))
    got = measured(one_normal(2.0 + shift * 0.5, 0.5))(ROWS)
    np.testing.assert_allclose(got["total variation"], 2 * norm.cdf(shift / 2) - 1, atol=2e-4)
    np.testing.assert_allclose(got["RMSE of mean"], shift * 0.5, rtol=1e-6)


def test_total_variation_of_mixtures_in_numpy():
    """Against a grid of our own, over all that either has, in float64; a known variance of the mean counts as width."""
    rng = np.random.default_rng(0)
    means, noise = rng.normal(size=(2, 40, 3)), 0.3
    gold = bc.Gaussian(*(jnp.asarray(x, jnp.float32)[..., None] for x in (means[0], np.full((40, 3), noise**2))))
    width = np.full((40, 3), 0.2)
    pred = bc.Gaussian(
        *(jnp.asarray(x, jnp.float32)[..., None] for x in (means[1] + 0.5, np.full((40, 3), noise**2), width))
    )
    got = study.regression_distances(gold)(pred)(slice(1, 3))
    grid = np.linspace(-12, 12, 20_001)
    by_row = []
    for row in (1, 2):
        p = np.mean([norm.pdf(grid, m, noise) for m in means[0, :, row]], 0)
        q = np.mean([norm.pdf(grid, m, np.sqrt(noise**2 + 0.2)) for m in means[1, :, row] + 0.5], 0)
        by_row.append(0.5 * np.abs(p - q).sum() * (grid[1] - grid[0]))
    np.testing.assert_allclose(got["total variation"], np.mean(by_row), atol=5e-4)
    sd = [np.sqrt(means[0, :, row].var()) for row in (1, 2)]
    ratio = [np.sqrt(means[1, :, row].var() + 0.2) / s for row, s in zip((1, 2), sd, strict=True)]
    np.testing.assert_allclose(got["epistemic sd / NUTS's"], np.median(ratio), rtol=1e-5)


def test_distances_of_classes_by_hand():
    """Pools (0.5, 0.5) of (0.9, 0.1) and (0.1, 0.9), and (0.7, 0.3) of two that agree."""
    of = lambda *rows: bc.Categorical(jnp.log(jnp.asarray(rows))[:, None])
    split, agreed = of((0.9, 0.1), (0.1, 0.9)), of((0.7, 0.3), (0.7, 0.3))
    got = study.class_distances(split)(agreed)(ROWS)
    np.testing.assert_allclose(got["total variation"], 0.2, rtol=1e-5)
    information = np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1)
    np.testing.assert_allclose(got["error of MI"], information, rtol=1e-5)
    np.testing.assert_allclose(got["MI / NUTS's"], 0, atol=1e-6)
    same = study.class_distances(split)(split)(ROWS)
    assert same["total variation"] == 0 and same["agreement"] == 1 and same["MI / NUTS's"] == 1


def test_largest_curvature_of_a_linear_network():
    """No hidden layer: the Hessian is X^T X / noise + prior, with a column of ones for the bias."""
    data = study.regression(study.Config(rows=30)).data
    model = bc.models.mlp(2, (), 1)
    problem = study.regression(study.Config(rows=30))._replace(model=model)
    params = jax.vmap(lambda k: model.init(k).params)(jax.random.split(jax.random.key(0), 2))
    x = np.concatenate([data.inputs.astype(float), np.ones((30, 1))], 1)
    wanted = np.linalg.eigvalsh(x.T @ x / 0.2**2 + problem.prior_precision * np.eye(3))[-1]
    np.testing.assert_allclose(study.largest_curvature(problem, params), wanted, rtol=1e-5)


def test_what_a_run_leaves(tmp_path):
    config = load_config(study.Config, REPOSITORY / "configs/posteriors/smoke.yaml", ["problems=regression"])
    study.main(config, tmp_path)
    result = json.loads((tmp_path / "metrics.json").read_text())
    found = result["problems"]["regression"]
    assert list(found["methods"]) == list(config.methods)
    assert {"r_hat", "ess", "acceptance", "divergent transitions"} <= set(found["reference"])
    for own in found["methods"].values():
        for region in ("inside", "outside"):
            assert 0 <= own[region]["total variation"]["value"] <= 1
            assert own[region]["total variation"]["n"] == config.seeds
    # one network has nothing epistemic, and the linearised posterior has its mean
    single, laplace = found["methods"]["single"], found["methods"]["laplace_full"]
    assert single["inside"]["epistemic sd / NUTS's"]["value"] == 0
    assert laplace["inside"]["RMSE of mean"] == single["inside"]["RMSE of mean"]
    assert (tmp_path / "regression.png").stat().st_size > 1000
    page = (tmp_path / "regression.md").read_text().splitlines()
    assert page[0] == "**regression, inside**" and page[2].startswith("| method | total variation | RMSE of mean |")
    values = [float(line.split("|")[2].split("[")[0]) for line in page[4:7]]
    assert values == sorted(values)


def test_a_seed_that_diverged_is_left_out_and_counted(tmp_path, monkeypatch):
    config = load_config(study.Config, REPOSITORY / "configs/posteriors/smoke.yaml", ["problems=regression"])
    config = dataclasses.replace(config, methods=("single",))
    right = study.main(config, tmp_path)["problems"]["regression"]["methods"]["single"]
    repeat = study.repeat

    def one_lost(*args):
        fitted, preds = repeat(*args)
        lost = dataclasses.replace(preds[0], mean=preds[0].mean * jnp.nan)
        alive = np.array([False, True])
        return fitted._replace(members=fitted.members._replace(alive=alive)), [lost, preds[1]]

    monkeypatch.setattr(study, "repeat", one_lost)
    own = study.main(config, tmp_path)["problems"]["regression"]["methods"]["single"]
    assert (right["diverged"], own["diverged"]) == (0, 1)
    both, kept = right["inside"]["total variation"], own["inside"]["total variation"]
    assert kept.n == 1 and both.low < kept.value < both.high
    assert "| single (1 of 2 seeds) |" in (tmp_path / "regression.md").read_text()


def test_unknown_names(tmp_path):
    for setting, wanted in (("problems", "regression, classification, got digits"), ("methods", "single, .* got nuts")):
        name = wanted.split("got ")[1]
        config = study.Config(**{setting: (name,)})
        with pytest.raises(ValueError, match=f"`{setting}` must be some of {wanted}. Check"):
            study.main(config, tmp_path)
