"""Files are written whole or not at all, by the one writer of the package."""

from pathlib import Path

import numpy as np
import pytest

from pssm.storage.files import PARTIAL, whole_file, write_whole

PACKAGE = Path(__file__).parent.parent / "pssm"


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = write_whole(tmp_path / "a.txt", "before")

    def killed():
        with whole_file(path) as partial:
            partial.write_text("half of")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed()
    assert path.read_text() == "before"
    with whole_file(path) as partial:
        assert PARTIAL.fullmatch(partial.name)
        assert partial.suffix == ".txt"
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a.npy") as one, whole_file(tmp_path / "a.npy") as two:
        np.save(one, np.zeros(3))
        np.save(two, np.ones(3))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.zeros(3))


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.txt").symlink_to(tmp_path / "mine.txt")
    write_whole(tmp_path / "a.txt", b"new")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a.txt", "x")


def test_nobody_else_moves_files_into_place():
    """A texture's folder may be moved as a whole; single files go through `whole_file`."""
    movers = [p for p in PACKAGE.rglob("*.py") if "os.replace" in p.read_text()]
    assert {p.relative_to(PACKAGE).as_posix() for p in movers} == {"storage/files.py", "study/texture.py"}
