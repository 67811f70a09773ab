"""Methods of a study that integrate paths out approximately and correct that: verdicts, budget, a whole study."""

import numpy as np
import pytest
from test_weights import COUNTS, counts, five

import pssm
from pssm.study.budget import within_budget
from pssm.study.clock import CompileClock
from pssm.study.method_names import APPROXIMATE, CHAINS, METHODS, OBJECTIVES, PATH_METHODS, Settings
from pssm.study.methods import MethodResult, run_method
from pssm.study.verdict import judge, parameter_rows

NONE = (float("nan"), "")


def verdict(name, **numbers):
    result = MethodResult(name, seconds_run=1.0, diagnostics=numbers)
    table = judge({name: result}, name, parameter_rows({}, ""), NONE)
    return table.level[0], table.verdict[0]


def test_verdicts_of_corrected_methods():
    assert set(APPROXIMATE) < set(METHODS)
    assert set(APPROXIMATE) < set(PATH_METHODS)
    assert "nodes:variational" not in CHAINS
    assert all("corrected" in OBJECTIVES[name] for name in APPROXIMATE)
    good = {"exact": 1.0, "khat": 0.2, "efficiency": 0.9, "effective_draws": 300.0}
    level, words = verdict("nodes:variational", **good)
    assert level == "good"
    assert "k-hat 0.20, 90 % effective" in words
    level, words = verdict("nodes:variational", **{**good, "effective_draws": 60.0})
    assert level == "check"
    assert "Only 60 effective nodes" in words
    level, words = verdict("nuts:laplace", **{**good, "exact": 0.0, "khat": 0.9, "efficiency": 0.1})
    assert level == "bad"
    assert "k-hat of the weights is 0.90" in words
    assert "nuts:transport" in words


def test_seconds_of_compiling_are_counted_once():
    clock = CompileClock()
    for span in ((1.0, 2.0), (1.5, 1.8), (0.5, 2.5), (3.0, 4.0)):
        clock._add(*span)
    assert clock.seconds == pytest.approx(3.0)


def test_nodes_are_never_cut():
    settings = Settings(budget=1e-9)
    assert within_budget("nodes:variational", five, 1.0, settings) == (settings, "", True)


def test_too_many_parameters_are_a_reason_and_no_error(monkeypatch):
    monkeypatch.setattr("pssm.study.methods.model_of_method", lambda name, model, y, **kwargs: model)
    monkeypatch.setattr("pssm.study.methods.path_marginal", lambda model, approximation: model)
    result = run_method("nodes:variational", five, 1.0, Settings(progress=False), {})
    assert result.status == "skipped"
    assert "has 5 unconstrained parameters" in result.note


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_study_with_corrected_methods(tmp_path):
    y = np.concatenate([COUNTS] * 6)
    methods = ["nuts:laplace", "nodes:variational", "ml"]
    options = {"num_warmup": 200, "num_samples": 300, "num_chains": 2, "progress": False, "horizon": 2}
    study = pssm.compare(counts, y, methods, out=tmp_path / "out", **options)
    table = study.table.set_index("method")
    assert (table.status == "done").all()
    assert study.reference == "nuts:laplace"
    assert table.level["nodes:variational"] == "good"
    assert abs(table.error_max_sds["nodes:variational"]) < 0.3
    assert table.objective["nodes:variational"].startswith("exact posterior up to Monte Carlo error")
    assert "Laplace" in table.objective["ml"]
    tree = study.results["nodes:variational"].tree
    assert {"posterior", "sample_stats", "forecast", "smoothed_states"} <= set(tree.children)
    assert "log_weight" in tree["sample_stats"]
    assert "nuts:transport" not in study.results["nodes:variational"].note
    assert "exact up to Monte Carlo error" in study.report(tmp_path / "report").read_text()
