"""The scripts of `docs/experiments`: one experiment from end to end, resumed; what is measured, by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "experiments"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import measure

    return measure


def test_scores_by_hand(measure):
    truth = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0]])
    np.testing.assert_allclose(measure.r2(truth, truth), 1.0)
    np.testing.assert_allclose(measure.r2(truth.mean(0, keepdims=True), truth), 0.0, atol=1e-12)
    np.testing.assert_allclose(measure.r2(truth + [1.0, 0.0], truth), [1 - 3 / 2, 1.0])
    z = np.random.default_rng(0).normal(size=(7, 5, 2))
    states = z @ np.array([[1.0, -2.0, 0.0], [0.5, 1.0, 3.0]]) + np.array([1.0, 0.0, -4.0])
    np.testing.assert_allclose(measure.probe(z, states)(z[:2]), states[:2])


def run(program, *args):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, FOLDER / program, *args]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.slow
def test_one_experiment_by_two_methods_and_again(tmp_path):
    out = tmp_path / "results"
    options = ("--quick", "--out", out, "--experiments", "lds,thalamus", "--data", tmp_path / "nothing")
    said = run("run.py", *options, "--methods", "exact")
    assert "thalamus: left out" in said
    assert [path.name for path in out.iterdir()] == ["lds.exact.json"]
    begun = (out / "lds.exact.json").stat().st_mtime_ns
    said = run("run.py", *options, "--methods", "exact,chain")
    assert "lds, exact: there already" in said
    assert {path.name for path in out.iterdir()} == {"lds.exact.json", "lds.chain.json"}
    assert (out / "lds.exact.json").stat().st_mtime_ns == begun
    exact, chain = (json.loads((out / f"lds.{name}.json").read_text()) for name in ("exact", "chain"))
    assert exact["bound_kind"] == "exact"
    np.testing.assert_allclose(exact["bound"], exact["evidence"], rtol=1e-5)
    assert chain["bound_kind"] == "lower bound"
    assert chain["bound"] < chain["evidence"]
    for found in (exact, chain):
        assert len(found["forecast_r2"]) == found["size"]["steps"] - found["size"]["cut"]
        assert len(found["q"]) == len(found["state_r2"]) == 2
        assert found["steps_not_finite"] == 0
    run("report.py", "--out", out, "--page", tmp_path / "page.md", "--images", tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "| chain | " in page
    assert "| maximum likelihood | " in page
    assert (tmp_path / "experiments_forecasts.png").stat().st_size > 5000
