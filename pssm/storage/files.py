"""Files that are written whole or not at all: the one writer of everything that the package leaves on a disk."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.partial(\.[A-Za-z0-9]+)?")  # a name that a killed process may leave behind


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A new path beside `path`, with the same ending, to write to; synced and moved to `path` when the block ends.

    Where the block fails, `path` is as it was and nothing is left behind.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: str | Path, content: bytes | str) -> Path:
    """Writes bytes, or text as UTF-8, by `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
