"""A folder of arrays that survives a crash and cannot harm who opens it: a JSON manifest and `.npz` files.

Writing: every file is written whole (`files.py`), and the manifest last, so that at any moment it names whole files.
Reading: nothing is unpickled, nothing compressed is accepted, and sizes, checksums, shapes and dtypes are compared with
the manifest before an array is allocated.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pssm.storage.files import PARTIAL, whole_file, write_whole

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 * 2**20
DIRECTORY_BYTES = 8 * 2**20
FILE_BYTES = 2**30  # arrays of one part go into several files from this size on
MAX_BYTES = 8 * 2**30
HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9]{1,2})', 'fortran_order': False, "
    rb"'shape': \(((?:[0-9]{1,18}, ?){0,31}(?:[0-9]{1,18})?)\), \} *\n"
)
FILE_NAME = re.compile(r"[a-z]{1,20}-[0-9]{6,9}\.npz")


class SavedFitError(ValueError):
    """A folder is not a saved fit, is damaged, or holds what a saved fit never holds."""


class FitFolder:
    """A saved fit on disk: `put` arrays, then `commit` them; or `open` one and `read` its parts.

    Args:
        path: the folder.
        manifest: what JSON can hold; the entry `files` is this class's own.
        max_bytes: a folder that declares more is refused.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any], *, max_bytes: int = MAX_BYTES):
        self.path, self.manifest, self.max_bytes = Path(path), manifest, max_bytes
        self.manifest.setdefault("files", {})
        self._there: dict[str, list[dict[str, np.ndarray]]] = {}  # the groups that the manifest's files hold
        self._count = 0

    @classmethod
    def create(cls, path: str | Path, manifest: dict[str, Any], *, force: bool = False) -> "FitFolder":
        """A new folder.

        Raises:
            FileExistsError: there is something at `path`, and `force` is not given or it is no saved fit.
        """
        path = Path(path)
        if path.exists() or path.is_symlink():
            empty = path.is_dir() and not any(path.iterdir())
            if not empty and not (force and (path / MANIFEST).is_file()):
                hint = "Choose another, or give `force=True`." if (path / MANIFEST).is_file() else "Choose another."
                raise FileExistsError(f"`path` {path} exists already; nothing was changed. {hint}")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, {"schema_version": SCHEMA_VERSION, **manifest})
        folder._count = max((_number(p.name) for p in path.iterdir() if FILE_NAME.fullmatch(p.name)), default=0)
        return folder

    @classmethod
    def open(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> "FitFolder":
        """A folder that exists; its manifest is read and checked.

        Raises:
            FileNotFoundError: there is no manifest.
            SavedFitError: the manifest is none of this library's.
        """
        path = Path(path)
        with _regular(path / MANIFEST) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MANIFEST_BYTES:
                raise SavedFitError(f"`path` {path}: {MANIFEST} has {size} bytes, more than {MANIFEST_BYTES}.")
            text = file.read(MANIFEST_BYTES)
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SavedFitError(f"`path` {path}: {MANIFEST} is not JSON: {error}") from None
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        if type(version) is not int or not isinstance(manifest.get("files"), dict):
            raise SavedFitError(f"`path` {path}: {MANIFEST} has no `schema_version` or no `files`: no saved fit.")
        if version > SCHEMA_VERSION:
            raise SavedFitError(
                f"`path` {path}: its format has version {version}, this pssm reads up to {SCHEMA_VERSION}. Update pssm."
            )
        folder = cls(path, manifest, max_bytes=max_bytes)
        records = [r for group in folder._groups() for r in group]
        declared = sum(r["bytes"] for r in records)
        if declared > max_bytes:
            raise SavedFitError(f"`path` {path}: declares {declared} bytes; `max_bytes` is {max_bytes}.")
        folder._count = max((_number(r["file"]) for r in records), default=0)
        return folder

    @staticmethod
    def remove(path: Path) -> None:
        """Removes a saved fit, and its folder and the one above where they are then empty; nothing else."""
        if not path.is_dir() or path.is_symlink():
            return
        for file in path.iterdir():
            if file.name == MANIFEST or FILE_NAME.fullmatch(file.name) or PARTIAL.fullmatch(file.name):
                file.unlink()
        for folder in (path, path.parent):
            if not any(folder.iterdir()):
                folder.rmdir()

    def put(self, part: str, arrays: dict[str, np.ndarray]) -> None:
        """Writes the arrays of a part in place of what it had."""
        self._there.pop(part, None)
        self.sync(part, [arrays])

    def sync(self, part: str, groups: list[dict[str, np.ndarray]]) -> None:
        """Makes these groups the part's own; those that `read` gave, or an earlier call wrote, are kept as they are."""
        files = self.manifest["files"]
        known = {id(g): record for g, record in zip(self._there.get(part, []), files.get(part, []), strict=False)}
        files[part] = [known.get(id(g)) or self._write(part, g) for g in groups]
        self._there[part] = list(groups)

    def commit(self, **entries: Any) -> None:
        """Makes everything since the last commit count, with further entries of the manifest."""
        self.manifest.update(entries)
        write_whole(self.path / MANIFEST, json.dumps(self.manifest, indent=1, allow_nan=False))
        kept = {r["file"] for group in self._groups() for r in group}
        for path in self.path.iterdir():
            if PARTIAL.fullmatch(path.name) or (FILE_NAME.fullmatch(path.name) and path.name not in kept):
                path.unlink()

    def read(self, part: str) -> list[dict[str, np.ndarray]]:
        """The groups of arrays of a part, in the order in which they were written; none where it is absent.

        Raises:
            SavedFitError: a file is not what the manifest says.
        """
        groups = self.manifest["files"].get(part, [])
        found = [{n: x for record in group for n, x in self._read(record).items()} for group in groups]
        self._there[part] = list(found)
        return found

    def _write(self, part: str, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        batches: list[dict[str, np.ndarray]] = [{}]
        for name, x in arrays.items():
            x = np.asarray(x, order="C")
            x = x if x.dtype.isnative and x.dtype.str[0] in "<|" else x.astype(x.dtype.newbyteorder("<"))
            if x.dtype.kind not in "biufc" or x.nbytes > 3 * FILE_BYTES:
                raise TypeError(f"`{name}` cannot be saved: dtype {x.dtype}, {x.nbytes} bytes.")
            if batches[-1] and sum(b.nbytes for b in batches[-1].values()) + x.nbytes > FILE_BYTES:
                batches.append({})
            batches[-1][name] = x
        records = []
        for batch in batches:
            self._count += 1
            name = f"{part}-{self._count:06d}.npz"
            members = {f"a{i}": x for i, x in enumerate(batch.values())}
            with whole_file(self.path / name) as partial:
                np.savez(partial, **members)
            with _regular(self.path / name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            shapes = [{"name": n, "shape": list(x.shape), "dtype": x.dtype.str} for n, x in batch.items()]
            size = (self.path / name).stat().st_size
            records.append({"file": name, "bytes": size, "sha256": digest, "arrays": shapes})
        return records

    def _groups(self) -> list[list[dict[str, Any]]]:
        """The file records of all parts, checked for their form."""
        found = []
        for part, groups in self.manifest["files"].items():
            if not isinstance(groups, list) or not all(isinstance(g, list) for g in groups):
                raise SavedFitError(f"`path` {self.path}: the files of `{part}` are no list of lists.")
            for record in (r for group in groups for r in group):
                _check_record(self.path, record)
            found += groups
        return found

    def _read(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        path = self.path / record["file"]
        with _regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record["bytes"]:
                raise SavedFitError(f"`path` {path}: has {size} bytes, the manifest says {record['bytes']}.")
            if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                raise SavedFitError(f"`path` {path}: its sha256 is not that of the manifest; the file was changed.")
            _check_directory(path, file, size)
            try:
                with zipfile.ZipFile(file) as archive:
                    return _members(path, archive, record["arrays"], size)
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
                raise SavedFitError(f"`path` {path}: not a readable .npz file: {error}") from None


def _number(name: str) -> int:
    return int(name.rsplit("-", 1)[1].removesuffix(".npz"))


def _regular(path: Path) -> BinaryIO:
    """Opens a regular file; a link, a folder or a device is refused."""
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"`path` {path} is not there.")
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise SavedFitError(f"`path` {path} is a link or no regular file; a saved fit has none.")
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")


def _check_record(path: Path, record: Any) -> None:
    form = {"file": str, "bytes": int, "sha256": str, "arrays": list}
    if not isinstance(record, dict) or any(type(record.get(n)) is not kind for n, kind in form.items()):
        raise SavedFitError(f"`path` {path}: a file in the manifest lacks one of {', '.join(form)}.")
    if not FILE_NAME.fullmatch(record["file"]):
        raise SavedFitError(f"`path` {path}: {record['file'][:80]!r} is no name of a file in a saved fit.")
    total = 0
    for array in record["arrays"]:
        shape = array.get("shape") if isinstance(array, dict) else None
        dtype = array.get("dtype") if isinstance(array, dict) else None
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or len(shape) > 32:
            raise SavedFitError(f"`path` {path}: an array of {record['file']} has no shape.")
        if not isinstance(dtype, str) or not re.fullmatch(r"[<|](b1|[iu][1248]|f[248]|c8|c16)", dtype):
            raise SavedFitError(f"`path` {path}: an array of {record['file']} has dtype {str(dtype)[:40]!r}.")
        if not isinstance(array.get("name"), str):
            raise SavedFitError(f"`path` {path}: an array of {record['file']} has no name.")
        total += math.prod(shape) * int(dtype[2:])
    if total > record["bytes"]:
        raise SavedFitError(f"`path` {path}: {record['file']} declares {total} bytes of arrays in {record['bytes']}.")


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """The archive's own directory, which the reader takes into memory, must be small."""
    file.seek(max(size - 22, 0))
    end = file.read(22)
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or struct.unpack("<I", end[12:16])[0] > DIRECTORY_BYTES:
        raise SavedFitError(f"`path` {path}: not a .npz file as a saved fit has it.")
    file.seek(0)


def _members(path: Path, archive: zipfile.ZipFile, declared: list[Any], size: int) -> dict[str, np.ndarray]:
    infos = archive.infolist()
    if [i.filename for i in infos] != [f"a{k}.npy" for k in range(len(declared))]:
        raise SavedFitError(f"`path` {path}: its members are not those of the manifest.")
    if any(i.compress_type != zipfile.ZIP_STORED or i.file_size > size for i in infos):
        raise SavedFitError(f"`path` {path}: a member is compressed or larger than the file.")
    return {entry["name"]: _array(path, archive, info, entry) for info, entry in zip(infos, declared, strict=True)}


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, declared: dict[str, Any]) -> np.ndarray:
    """One array, of the shape and dtype that the manifest declares; NumPy's own parser of headers is not used."""
    with archive.open(info) as member:
        start = member.read(10)
        header = member.read(int.from_bytes(start[8:], "little")) if start[:8] == b"\x93NUMPY\x01\x00" else b""
        match = HEADER.fullmatch(header)
        if match is None:
            raise SavedFitError(f"`path` {path}: a member is no array.")
        dtype, shape = match[1].decode(), [int(n) for n in match[2].replace(b" ", b"").split(b",") if n]
        if (shape, dtype) != (declared["shape"], declared["dtype"]):
            raise SavedFitError(
                f"`path` {path}: `{declared['name']}` is {dtype} {shape}; the manifest says {declared['dtype']} "
                f"{declared['shape']}."
            )
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(start) + len(header) + size != info.file_size:
            raise SavedFitError(f"`path` {path}: `{declared['name']}` has not the size that its shape needs.")
        return np.frombuffer(bytearray(member.read()), dtype).reshape(shape)


def data_digest(arrays: dict[str, Any]) -> str:
    """sha256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{x.shape}:{x.dtype}".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
