"""`slow.txt` names tests that are there: an entry whose test was renamed would let it back in, unseen."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINES = [line for line in (HERE / "slow.txt").read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("line", LINES)
def test_an_entry_names_a_test(line):
    file, test = line.split("::", 1)
    source = (HERE.parent / file).read_text()
    assert re.search(rf"^def {re.escape(test.split('[')[0])}\(", source, re.MULTILINE)


def test_no_entry_stands_twice():
    assert len(set(LINES)) == len(LINES)
