"""The command line: good runs, refusals that name what is wrong and write nothing, and runs that are cut short."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import pssm.study.compare as comparison
from pssm import datasets
from pssm.cli import main
from pssm.diagnostics import load_tree

pytestmark = pytest.mark.filterwarnings("ignore:SVI has not converged")

ROWS = 40
QUICK = ["--steps", "300", "--quiet", "--budget", "0", "--horizon", "5"]


def write_nile(path: Path) -> Path:
    nile = datasets.load("nile")
    rows = [f"{t},{y:g},text,," for t, y in zip(nile.time[:ROWS], nile.y[:ROWS, 0], strict=True)]
    path.write_text("\n".join(["year,flow,river,nothing,note", *rows]) + "\n")
    return path


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test starts in a folder of its own, where a stray result would be seen."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nile_csv(tmp_path):
    return write_nile(tmp_path / "river.csv")


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """One short run through the command line: exit code, output folder, and the method's result."""
    folder = tmp_path_factory.mktemp("good")
    seen = []

    def recording(*args, **kwargs):
        seen.append(run_method(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        run_method = comparison.run_method
        patch.setattr(comparison, "run_method", recording)
        data = write_nile(folder / "river.csv")
        out = folder / "out"
        command = ["compare", str(data), "--column", "flow", "--methods", "svi:normal", "--out", str(out), *QUICK]
        code = main(command)
    return code, out, copy.copy(seen[0])


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(capsys, argv: list[str]) -> str:
    """Runs a command that must fail with code 2, one message, and no change on disk; returns the message."""
    before = everything_under(Path())
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert everything_under(Path()) == before
    assert captured.err.startswith("pssm: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


# What is refused


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--column", "flwo"], ["`column`", "'flwo'", "Did you mean 'flow'"]),
        (["--column", "river"], ["`column`", "'river'", "row 1", "'text'"]),
        (["--column", "nothing"], ["`column`", "'nothing'", "missing"]),
        (["--column", "flow", "--time", "yaer"], ["'yaer'", "'year'"]),
        (["--column", "flow", "--model", "local_levle"], ["`--model`", "'local_levle'", "Did you mean 'local_level'"]),
        (["--column", "flow", "--methods", "nuts,svi:nrmal"], ["`--methods`", "'svi:nrmal'", "'svi:normal'"]),
        (["--column", "flow", "--methods", ","], ["`methods`", "empty"]),
        (["--column", "flow", "--budget", "-1"], ["`--budget`", "-1"]),
        (["--column", "flow", "--samples", "0"], ["`--samples`", "got 0"]),
        (["--column", "flow", "--warmup", "0"], ["`--warmup`", "got 0"]),
        (["--column", "flow", "--chains", "-2"], ["`--chains`", "got -2"]),
        (["--column", "flow", "--steps", "0"], ["`--steps`", "got 0"]),
        (["--column", "flow", "--horizon", "0"], ["`--horizon`", "got 0"]),
        (["--column", "flow", "--order", "2"], ["`--order`", "local_level"]),
        (["--column", "flow", "--harmonics", "2"], ["`--harmonics`", "local_level"]),
        (["--column", "flow", "--model", "seasonal"], ["`--period`", "required"]),
        (["--column", "flow", "--model", "structural", "--harmonics", "2"], ["`--harmonics`", "`--period`"]),
        (["--column", "flow", "--model", "lds", "--order", "2"], ["`--order`", "lds"]),
        (["--column", "flow", "--states", "2"], ["`--states`", "local_level"]),
        (["--column", "flow", "--column", "flow"], ["`column`", "different"]),
    ],
    ids=lambda x: " ".join(x[-2:]) if x[0].startswith("--") else "",
)
def test_bad_options_are_named(capsys, nile_csv, options, names):
    message = refused(capsys, ["compare", str(nile_csv), *options])
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("year,flow\n", ["river.csv", "only its header"]),
        ("", ["river.csv", "empty"]),
        ("year,flow\n1871,\n1872,NA\n", ["'flow'", "missing"]),
        ("year,flow\n1871,12\n1872,inf\n", ["'flow'", "row 2", "infinite"]),
    ],
    ids=["no rows", "empty file", "all missing", "infinite"],
)
def test_bad_files_are_named(capsys, nile_csv, text, names):
    nile_csv.write_text(text)
    message = refused(capsys, ["compare", str(nile_csv), "--column", "flow"])
    for name in names:
        assert name in message


def test_an_absent_file(capsys):
    assert "absent.csv" in refused(capsys, ["compare", "absent.csv"])


def test_unknown_data(capsys):
    message = refused(capsys, ["compare", "nlie"])
    assert "'nlie'" in message
    assert "nile" in message


@pytest.mark.parametrize("given", [["--out", "mine"], []], ids=["--out", "the default folder"])
def test_a_folder_that_exists_is_left_alone(capsys, nile_csv, given):
    folder = Path(given[1] if given else "results/river-local_level")
    folder.mkdir(parents=True)
    (folder / "table.csv").write_text("precious")
    message = refused(capsys, ["compare", str(nile_csv), "--column", "flow", *given])
    assert str(folder) in message
    assert "--force" in message


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "--force"])
def test_out_that_is_a_file(capsys, nile_csv, force):
    Path("taken").write_text("precious")
    message = refused(capsys, ["compare", str(nile_csv), "--column", "flow", "--out", "taken", *force])
    assert "`--out` taken" in message


@pytest.mark.parametrize(
    "argv",
    [["compare", "nile", "--sampels", "5"], ["compare", "nile", "--seed", "x"], ["compare"], ["compre"], []],
    ids=["unknown option", "text for a number", "no data", "unknown command", "nothing"],
)
def test_a_command_that_cannot_be_read(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: pssm" in capsys.readouterr().err
    assert not any(Path().iterdir())


# Runs


def test_a_good_run_writes_everything(good_run):
    code, out, _ = good_run
    assert code == 0
    assert {p.name for p in out.iterdir()} >= {
        "table.csv",
        "parameters.csv",
        "summary.json",
        "svi-normal.nc",
        "report.html",
    }
    assert not list(out.rglob("*.partial"))
    assert pd.read_csv(out / "table.csv")["method"].tolist() == ["svi:normal"]
    assert set(pd.read_csv(out / "parameters.csv")["parameter"]) == {"sigma_level", "sigma_obs"}


def test_the_summary_is_strict_json(good_run):
    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    summary = json.loads((good_run[1] / "summary.json").read_text(), parse_constant=no_constant)
    assert summary["schema_version"] == 1
    assert summary["model"] == "local_level"
    assert summary["methods"][0]["method"] == "svi:normal"
    assert summary["methods"][0]["log_evidence"] is None  # no exact method: NaN in the table
    assert summary["settings"]["svi_steps"] == 300


def test_the_saved_tree_has_the_labels_of_the_file(good_run):
    tree = load_tree(good_run[1] / "svi-normal.nc")
    assert set(tree.children) >= {"posterior", "log_likelihood", "observed_data", "smoothed_states", "forecast"}
    assert tree["observed_data"]["time"].values.tolist() == list(range(1871, 1871 + ROWS))
    assert tree["forecast"]["horizon"].values.tolist() == list(range(1871 + ROWS, 1876 + ROWS))


def test_the_report_stands_alone(good_run):
    page = (good_run[1] / "report.html").read_text()
    assert "svi:normal" in page
    assert "sigma_level" in page


@pytest.fixture
def second_method_raises(monkeypatch, good_run):
    """The first method gives the result of the good run at no cost, the second raises, a third is as the first."""

    def use(error):
        def run(name, *args, **kwargs):
            if name == "svi:mvn":
                raise error
            result = copy.deepcopy(good_run[2])
            result.name = name
            return result

        monkeypatch.setattr(comparison, "run_method", run)
        monkeypatch.setattr(comparison, "_add_elpd", lambda *args: None)

    return use


def test_an_interrupted_run_keeps_what_was_finished(capsys, nile_csv, second_method_raises):
    second_method_raises(KeyboardInterrupt())
    methods = "svi:normal,svi:mvn,nuts"
    code = main(["compare", str(nile_csv), "--column", "flow", "--methods", methods, "--out", "out", *QUICK])
    assert code == 2
    assert "interrupted" in capsys.readouterr().err
    assert {p.name for p in Path("out").glob("*.nc")} == {"svi-normal.nc"}
    assert "posterior" in load_tree("out/svi-normal.nc").children
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["interrupted"] is True
    assert [m["status"] for m in summary["methods"]] == ["done", "interrupted", "skipped"]
    assert "interrupted" in Path("out/report.html").read_text()


def test_a_method_that_fails_leaves_the_others(capsys, nile_csv, second_method_raises):
    second_method_raises(RuntimeError("the sampler <fell> over"))
    methods = "svi:mvn,svi:normal"
    code = main(["compare", str(nile_csv), "--column", "flow", "--methods", methods, "--out", "out", *QUICK])
    assert code == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert {m["method"]: m["status"] for m in summary["methods"]} == {"svi:mvn": "failed", "svi:normal": "done"}
    page = Path("out/report.html").read_text()
    assert "failed" in page
    assert "RuntimeError: the sampler &lt;fell&gt; over" in page
    assert Path("out/svi-normal.nc").exists()


def test_where_every_method_fails_the_exit_code_says_so(capsys, nile_csv, second_method_raises):
    second_method_raises(FloatingPointError("the loss became nan"))
    code = main(["compare", str(nile_csv), "--column", "flow", "--methods", "svi:mvn", "--out", "out", *QUICK])
    assert code == 2
    assert "no method finished" in capsys.readouterr().err
    assert "the loss became nan" in Path("out/report.html").read_text()


def test_force_writes_over_a_folder(nile_csv, second_method_raises):
    second_method_raises(RuntimeError)
    Path("out").mkdir()
    Path("out/table.csv").write_text("old")
    Path("out/mine.txt").write_text("mine")
    code = main(
        ["compare", str(nile_csv), "--column", "flow", "--methods", "svi:normal", "--out", "out", "--force", *QUICK]
    )
    assert code == 0
    assert Path("out/table.csv").read_text() != "old"
    assert Path("out/mine.txt").read_text() == "mine"


# Lists


def test_the_list_of_models(capsys):
    assert main(["models"]) == 0
    assert "local_level" in capsys.readouterr().out


def test_the_list_of_datasets_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "pssm", "datasets"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0
    assert run.stderr == ""
    rows = [*datasets.available(), *datasets.available_sequences()]
    assert {line.split()[0] for line in run.stdout.splitlines()} == {row[0] for row in rows}


def test_two_columns_in_a_model_of_several_series(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_add_elpd", lambda *args: None)
    two = datasets.load("macrodata", ["infl", "unemp"])
    rows = [f"{t},{a:g},{b:g}" for t, (a, b) in enumerate(two.y[:30])]
    (tmp_path / "two.csv").write_text("\n".join(["t,infl,unemp", *rows]) + "\n")
    columns = ["--column", "unemp", "--column", "infl"]
    command = ["compare", "two.csv", *columns, "--model", "lds", "--states", "1", "--methods", "svi:normal"]
    assert main([*command, "--out", "out", *QUICK]) == 0
    tree = load_tree("out/svi-normal.nc")
    assert tree["observed_data"]["series"].values.tolist() == ["unemp", "infl"]
    assert tree["posterior"]["A"].shape[-2:] == (1, 1)
    assert tree["forecast"]["mean"].shape == (5, 2)
    assert "unemp, infl" in Path("out/report.html").read_text()
    assert main(["forecast", "out"]) == 0
    capsys.readouterr()
    table = pd.read_csv("out/forecast/forecast.csv")
    assert table["series"].tolist() == ["unemp", "infl"] * 5
