"""`pssm forecast` and `pssm resume`: saved studies and fits go on, and forecast, without running again what is done."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pssm.study.compare as comparison
from pssm import datasets, models
from pssm.cli import main
from pssm.diagnostics import load_tree
from pssm.infer import fit_svi, save
from pssm.study.saved import load_plan
from pssm.times.grid import labels_after

pytestmark = pytest.mark.filterwarnings(
    "ignore:SVI has not converged", "ignore:.*transitions diverged", "ignore:NUTS was interrupted"
)
ROWS = 30
COMMAND = ["compare", "river.csv", "--column", "flow", "--out", "out", "--steps", "200", "--quiet", "--budget", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of three methods that was interrupted in the second, and the result of the first."""
    folder = tmp_path_factory.mktemp("made")
    nile = datasets.load("nile")
    rows = [f"{t},{y:g}" for t, y in zip(nile.time[:ROWS], nile.y[:ROWS, 0], strict=True)]
    (folder / "river.csv").write_text("\n".join(["year,flow", *rows]) + "\n")
    seen = []
    run_method = comparison.run_method

    def run(name, *args, **kwargs):
        if name == "svi:mvn":
            raise KeyboardInterrupt
        seen.append(run_method(name, *args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(comparison, "run_method", run)
        patch.setattr(comparison, "_add_elpd", lambda *args: None)
        assert main([*COMMAND, "--methods", "svi:normal,svi:mvn", "--horizon", "5", "--seed", "3"]) == 2
    return folder, seen[0]


@pytest.fixture
def study(made, tmp_path, monkeypatch):
    """A copy of it, in which every method gives the result of the first at no cost; the names of those run."""
    import shutil

    shutil.copytree(made[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    names = []

    def run(name, *args, **kwargs):
        names.append(name)
        result = copy.deepcopy(made[1])
        result.name = name
        return result

    monkeypatch.setattr(comparison, "run_method", run)
    monkeypatch.setattr(comparison, "_add_elpd", lambda *args: None)
    return names


def refused(capsys, argv):
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    assert captured.err.startswith("pssm: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_resume_runs_only_what_is_left(study, capsys):
    first = load_tree("out/svi-normal.nc")
    assert main(["resume", "out", "--quiet"]) == 0
    assert study == ["svi:mvn"]
    summary = json.loads(Path("out/summary.json").read_text())
    assert {m["method"]: m["status"] for m in summary["methods"]} == {"svi:normal": "done", "svi:mvn": "done"}
    assert summary["interrupted"] is False
    assert summary["settings"]["seed"] == 3
    assert summary["settings"]["svi_steps"] == 200
    assert summary["name"] == "river"
    assert load_tree("out/svi-normal.nc").identical(first)
    page = Path("out/report.html").read_text()
    assert "svi:mvn" in page
    losses = load_plan("out").finished["svi:normal"].losses
    assert losses.shape == (200,)
    assert "nothing is left to do" in refused(capsys, ["resume", "out"])


@pytest.mark.slow
def test_nuts_goes_on_in_the_middle(made, tmp_path, monkeypatch):
    """A study that is stopped within NUTS keeps its draws, and `resume` makes only the rest."""
    from pssm.fitting import mcmc
    from pssm.infer import fit_nuts

    monkeypatch.chdir(tmp_path)
    Path("river.csv").write_text((made[0] / "river.csv").read_text())
    monkeypatch.setattr(comparison, "_add_elpd", lambda *args: None)
    advance, taken = mcmc.NutsEngine.advance, []

    def counted(self, run, count):
        if len(taken) == 5:
            taken.append(0)
            raise KeyboardInterrupt
        taken.append(count)
        return advance(self, run, count)

    monkeypatch.setattr(mcmc.NutsEngine, "advance", counted)
    monkeypatch.setattr(mcmc, "CHUNK", 10)
    options = ["--methods", "nuts", "--warmup", "30", "--samples", "40", "--chains", "1", "--horizon", "3"]
    assert main([*COMMAND, *options]) == 2
    assert sum(taken) == 50
    assert Path("out/running/nuts/manifest.json").exists()
    assert main(["resume", "out", "--quiet"]) == 0
    assert sum(taken) == 70
    assert not Path("out/running").exists()
    draws = load_tree("out/nuts.nc")["posterior"]["sigma_obs"].values
    whole = fit_nuts(
        models.local_level, datasets.load("nile").y[:ROWS], key=0, num_warmup=30, num_samples=40, num_chains=1,
        target_accept_prob=0.9, progress_bar=False,
    )  # fmt: skip
    np.testing.assert_allclose(draws, whole.get_samples(group_by_chain=True)["sigma_obs"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svi:mvn", "svi:chain"])
def test_svi_goes_on_in_the_middle(made, tmp_path, monkeypatch, method):
    """Likewise within SVI: the steps that were taken are not taken again, and the end is that of one run."""
    from pssm.fitting import svi

    monkeypatch.chdir(tmp_path)
    Path("river.csv").write_text((made[0] / "river.csv").read_text())
    monkeypatch.setattr(comparison, "_add_elpd", lambda *args: None)
    monkeypatch.setattr(svi, "LONGEST", 25)
    program, taken = svi.steps_of, []

    def counted(*args):
        advance = program(*args)

        def one(state, count):
            if len(taken) == 3:
                taken.append(0)
                raise KeyboardInterrupt
            taken.append(count)
            return advance(state, count)

        return one

    monkeypatch.setattr(svi, "steps_of", counted)
    options = ["--methods", method, "--steps", "120", "--horizon", "3"]
    assert main([*COMMAND, *options]) == 2
    done = sum(taken)
    assert 0 < done < 120
    assert main(["resume", "out", "--quiet"]) == 0
    assert sum(taken) == 120
    draws = load_tree(f"out/{method.replace(':', '-')}.nc")["posterior"]["sigma_obs"].values
    assert main([*COMMAND, *options, "--force"]) == 0
    assert sum(taken) == 240
    whole = load_tree(f"out/{method.replace(':', '-')}.nc")["posterior"]["sigma_obs"].values
    np.testing.assert_array_equal(draws, whole)


def test_the_plan_is_what_was_asked(study):
    plan = load_plan("out")
    nile = datasets.load("nile")
    assert plan.model is models.local_level
    np.testing.assert_array_equal(plan.y, nile.y[:ROWS])
    np.testing.assert_array_equal(plan.time, range(1871, 1871 + ROWS))
    np.testing.assert_array_equal(plan.future_time, range(1871 + ROWS, 1876 + ROWS))
    assert plan.methods == ("svi:normal", "svi:mvn")
    assert plan.finished["svi:normal"].diagnostics.keys() == {"elbo", "elbo_se", "khat", "coverage90"}


def test_forecast_of_a_study_is_that_of_its_report(study, capsys):
    assert main(["forecast", "out"]) == 0
    assert "svi:normal" in capsys.readouterr().out
    table = pd.read_csv("out/forecast/forecast.csv")
    assert table.columns.tolist() == ["time", "series", "mean", "sd", "q05", "q25", "q50", "q75", "q95"]
    own = load_tree("out/svi-normal.nc")["forecast"]
    np.testing.assert_allclose(table["mean"], own["mean"].values[:, 0], rtol=1e-4)
    np.testing.assert_allclose(table["q95"], own["q95"].values[:, 0], rtol=1e-3)
    assert table["time"].tolist() == list(range(1871 + ROWS, 1876 + ROWS))
    assert Path("out/forecast/forecast.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(Path().rglob("*.partial"))
    message = refused(capsys, ["forecast", "out", "--horizon", "7"])
    assert "forecast exists already" in message
    assert "--force" in message
    assert main(["forecast", "out", "--horizon", "7", "--force"]) == 0
    assert len(pd.read_csv("out/forecast/forecast.csv")) == 7


def test_forecast_of_a_saved_fit(study, capsys):
    fit = fit_svi(models.local_level, datasets.load("nile").y[:ROWS], guide="normal", num_steps=20, progress_bar=False)
    save(fit, "fit")
    assert main(["forecast", "fit", "--horizon", "3", "--out", "there"]) == 0
    assert len(pd.read_csv("there/forecast.csv")) == 3
    assert "`num_steps` must be more than the 20 steps" in refused(capsys, ["resume", "fit"])


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["forecast", "absent"], ["`folder`", "'absent'"]),
        (["forecast", "."], ["`folder`", "no saved study"]),
        (["resume", "absent"], ["`folder`", "'absent'"]),
        (["forecast", "out", "--method", "nuts"], ["`method`", "'nuts'", "'svi:normal'"]),
        (["forecast", "out", "--horizon", "0"], ["`--horizon`", "got 0"]),
        (["forecast", "out", "--out", "river.csv", "--force"], ["`--out` river.csv", "file"]),
    ],
    ids=" ".join,
)
def test_bad_commands_are_named(study, capsys, argv, names):
    message = refused(capsys, argv)
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["finished"].update({"../x": m["finished"]["svi:normal"]}), "no method"),
        (lambda m: m["model"].update(name="os.system"), "`model`"),
        (lambda m: m.pop("settings"), "cannot be read"),
        (lambda m: m.update(kind="nuts"), "no saved study"),
    ],
)
def test_a_spoilt_study_is_refused(study, capsys, change, message):
    path = Path("out/study/manifest.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for command in ("resume", "forecast"):
        assert message in refused(capsys, [command, "out"])


def test_labels_after_dates_and_numbers():
    dates = np.arange("2020-01-01", "2020-01-06", dtype="datetime64[D]")
    assert (labels_after(dates[:3], 2) == dates[3:]).all()
    assert labels_after(np.array([1.0, 1.5, 2.0]), 2).tolist() == [2.5, 3.0]
