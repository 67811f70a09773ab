"""The Python blocks of README and of the pages in `docs/` run, from the top of a page to its end in one namespace.

A comment in front of a block, which readers do not see, says what the test does with it:

    <!-- not run: reason -->                a block that cannot run here; `NOT_RUN` counts them
    <!-- small: 5000 -> 50; 1000 -> 20 -->  replaces numbers, so that the block takes seconds
    <!-- first: y = jnp.zeros((50, 2)) -->  statements to run before, of one line or of several
"""

import os
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = 0  # blocks marked `not run`: one more is a decision
SEEN = re.compile(
    r"(?P<comments>(?:^[ ]*<!--(?:(?!-->).)*-->\s*?\n)*)^(?P<indent>[ ]*)```python\n(?P<code>.*?)^[ ]*```", re.M | re.S
)
COMMENT = re.compile(r"<!--\s*(not run|small|first):\s*(.*?)\s*-->", re.S)


class Block(NamedTuple):
    """A block of a page, with what its comments say."""

    line: int
    code: str
    not_run: str = ""


def blocks(text: str) -> list[Block]:
    """All Python blocks of a page."""
    found = []
    for match in SEEN.finditer(text):
        code, before, not_run = textwrap.dedent(match["code"]), "", ""
        for kind, value in COMMENT.findall(match["comments"]):
            if kind == "not run":
                not_run = value
            elif kind == "first":
                before += textwrap.dedent(value) + "\n"
            else:
                for change in value.split(";"):
                    old, new = (part.strip() for part in change.split("->"))
                    if not re.search(rf"\b{re.escape(old)}\b", code):
                        raise ValueError(f"`{old}` of the comment `small` is not in the block.")
                    code = re.sub(rf"\b{re.escape(old)}\b", new, code)
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(line, before + code, not_run))
    return found


def test_comments_are_understood():
    text = "<!-- first:\na = 1\nb = 2 -->\n<!-- small: 500 -> 5 -->\n```python\nc = 500 + 5000\n```\n\n"
    text += "<!-- not run: a file -->\n```python\nd\n```\n"
    one, two = blocks(text)
    assert (one.code, one.line, one.not_run) == ("a = 1\nb = 2\nc = 5 + 5000\n", 6, "")
    assert two.not_run == "a file"
    with pytest.raises(ValueError, match="`7`"):
        blocks("<!-- small: 7 -> 5 -->\n```python\nc = 500\n```\n")


def test_no_block_is_left_out_unseen():
    counted = sum(bool(block.not_run) for page in PAGES for block in blocks(page.read_text()))
    assert counted == NOT_RUN, f"{counted} blocks are marked `not run`; NOT_RUN says {NOT_RUN}"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text())], ids=lambda page: page.name)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.environ.setdefault("MPLBACKEND", "agg")
    names = {"__name__": "page"}
    for block in blocks(page.read_text()):
        if block.not_run:
            continue
        try:
            exec(compile(block.code, f"{page.name}:{block.line}", "exec"), names)
        except Exception as error:
            pytest.fail(f"{page.name}, the block in line {block.line}: {type(error).__name__}: {error}")
