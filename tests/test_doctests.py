"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pssm"
SLOW = {  # whole fits
    "pssm.study.compare",
    "pssm.fitting.fit",
    "pssm.infer.causal",
    "pssm.fitting.saved",
    "pssm.diagnostics.backtest",
    "pssm.diagnostics.gap",
    "pssm.diagnostics.impact",
    "pssm.diagnostics.tree",
    "pssm.guides.amortized",
    "pssm.guides.frames",
    "pssm.guides.scan_adapter",
    "pssm.learning.readout",
}


def modules_with_examples():
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.filterwarnings("ignore:SVI has not converged")
@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples(name):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.attempted > 0
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name}; see the output above"
