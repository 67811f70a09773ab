"""Folders that pretend to be saved fits: each is refused with a clear error, with little memory, and nothing is run."""

import hashlib
import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pssm.infer import SavedFitError, load
from pssm.storage.folder import FitFolder

MB = 2**20


class Bomb:
    """Writes a file when unpickled."""

    def __reduce__(self):
        return (Path.write_text, (Path("ran.txt"), "ran"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A small folder that is as it should be, but for its model."""
    own = FitFolder.create(tmp_path / "fit", {"kind": "nuts", "arguments": {"dict": {}}, "provenance": {}})
    own.put("arguments", {"a": np.zeros(3)})
    own.commit()
    return own.path


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def file_of(folder):
    return next(folder.glob("*.npz"))


def reseal(folder, **array):
    """Makes the manifest agree with a file that was tampered with."""
    path = file_of(folder)

    def change(manifest):
        record = manifest["files"]["arguments"][0][0]
        record["bytes"] = path.stat().st_size
        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        record["arrays"][0].update(array)

    edit(folder, change)


def archive(folder, content, name="a0.npy", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file_of(folder), "w", method) as z:
        z.writestr(name, content)


def header(shape, descr="<f8"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def set_record(folder, **entries):
    edit(folder, lambda m: m["files"]["arguments"][0][0].update(entries))


def set_array(folder, **entries):
    edit(folder, lambda m: m["files"]["arguments"][0][0]["arrays"][0].update(entries))


def truncated(folder):
    data = file_of(folder).read_bytes()
    file_of(folder).write_bytes(data[: len(data) // 2])


def flipped(folder):
    data = bytearray(file_of(folder).read_bytes())
    data[len(data) // 2] ^= 1
    file_of(folder).write_bytes(data)


def object_array(folder):
    archive(folder, header((3,), "|O") + pickle.dumps([Bomb()] * 3))
    reseal(folder)


def object_dtype_declared(folder):
    object_array(folder)
    set_array(folder, dtype="|O8")


def a_pickle(folder):
    file_of(folder).write_bytes(pickle.dumps(Bomb()))
    reseal(folder)


def pickle_as_member(folder):
    archive(folder, pickle.dumps(Bomb()))
    reseal(folder)


def zip_bomb(folder):
    archive(folder, header((128 * MB,)) + bytes(128 * MB), method=zipfile.ZIP_DEFLATED)
    reseal(folder, shape=[16 * MB])


def small_zip_bomb_with_true_sizes(folder):
    archive(folder, header((3,)) + bytes(24), method=zipfile.ZIP_DEFLATED)
    reseal(folder)


def huge_shape_in_the_header(folder):
    archive(folder, header((10**12,)) + bytes(24))
    reseal(folder)


def huge_shape_in_both(folder):
    archive(folder, header((10**12,)) + bytes(24))
    reseal(folder, shape=[10**12])


def huge_shape_that_overflows(folder):
    archive(folder, header((2**62, 8)) + bytes(24))
    reseal(folder, shape=[2**62, 8])


def long_header(folder):
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}" + b" " * 60_000 + b"\n"
    archive(folder, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24))
    reseal(folder)


def deep_header(folder):
    text = b"(" * 9000
    archive(folder, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    reseal(folder)


def extra_member(folder):
    with zipfile.ZipFile(file_of(folder), "a") as z:
        z.writestr("../../outside.npy", header((3,)) + bytes(24))
    reseal(folder)


def member_that_climbs(folder):
    archive(folder, header((3,)) + bytes(24), name="../../outside.npy")
    reseal(folder)


def absolute_member(folder):
    archive(folder, header((3,)) + bytes(24), name="/tmp/outside.npy")
    reseal(folder)


def bytes_after_the_end(folder):
    with file_of(folder).open("ab") as file:
        file.write(b"more")
    reseal(folder)


def linked_file(folder):
    target = folder.parent / "secret.npz"
    file_of(folder).rename(target)
    (folder / "arguments-000001.npz").symlink_to(target)


def linked_manifest(folder):
    target = folder.parent / "secret.json"
    (folder / "manifest.json").rename(target)
    (folder / "manifest.json").symlink_to(target)


def pipe(folder):
    file_of(folder).unlink()
    os.mkfifo(folder / "arguments-000001.npz")


def folder_for_a_file(folder):
    file_of(folder).unlink()
    (folder / "arguments-000001.npz").mkdir()


def manifest_text(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


REFUSED = {
    "truncated file": (truncated, "bytes, the manifest says"),
    "flipped bit": (flipped, "sha256"),
    "object array": (object_array, "no array"),
    "object dtype declared": (object_dtype_declared, "dtype"),
    "a pickle": (a_pickle, "not a .npz"),
    "a pickle as member": (pickle_as_member, "no array"),
    "zip bomb": (zip_bomb, "declares"),
    "compressed member": (small_zip_bomb_with_true_sizes, "compressed"),
    "huge shape in the header": (huge_shape_in_the_header, "manifest says"),
    "huge shape in both": (huge_shape_in_both, "declares"),
    "shape that overflows": (huge_shape_that_overflows, "declares"),
    "long header": (long_header, "no array"),
    "deep header": (deep_header, "no array"),
    "extra member": (extra_member, "members"),
    "member that climbs": (member_that_climbs, "members"),
    "absolute member": (absolute_member, "members"),
    "bytes after the end": (bytes_after_the_end, "not a .npz"),
    "linked file": (linked_file, "link"),
    "linked manifest": (linked_manifest, "link"),
    "pipe": (pipe, "no regular file"),
    "folder for a file": (folder_for_a_file, "no regular file"),
    "file name that climbs": (lambda f: set_record(f, file="../secret-000001.npz"), "no name of a file"),
    "absolute file name": (lambda f: set_record(f, file="/etc/passwd"), "no name of a file"),
    "file name with a null": (lambda f: set_record(f, file="a-000001.npz\0"), "no name of a file"),
    "file name that is a list": (lambda f: set_record(f, file=["a"]), "lacks one of"),
    "huge size": (lambda f: set_record(f, bytes=10**15), "max_bytes"),
    "negative size": (lambda f: set_record(f, bytes=-1), "declares"),
    "shape with a text": (lambda f: set_array(f, shape=["3"]), "no shape"),
    "negative shape": (lambda f: set_array(f, shape=[-3]), "no shape"),
    "dtype that is none": (lambda f: set_array(f, dtype="<f3"), "dtype"),
    "dtype with code": (lambda f: set_array(f, dtype="__import__('os')"), "dtype"),
    "no files": (lambda f: edit(f, lambda m: m.pop("files")), "no saved fit"),
    "files that are a list": (lambda f: edit(f, lambda m: m["files"].update(a=[1])), "list of lists"),
    "unknown kind": (lambda f: edit(f, lambda m: m.update(kind="pickle")), "kind"),
    "newer version": (lambda f: edit(f, lambda m: m.update(schema_version=99)), "Update pssm"),
    "version that is a text": (lambda f: edit(f, lambda m: m.update(schema_version="1")), "no saved fit"),
    "not JSON": (manifest_text("{"), "not JSON"),
    "deep JSON": (manifest_text("[" * 100_000), "not JSON"),
    "a JSON list": (manifest_text("[1, 2]"), "no saved fit"),
    "large manifest": (manifest_text(" " * (17 * MB)), "more than"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "a model that is code": (lambda f: edit(f, lambda m: m.update(model={"name": "os.system"})), "`model` must be one"),
    "arguments that are code": (
        lambda f: edit(f, lambda m: m.update(arguments={"eval": "1"}, model={"name": "local_level", "options": None})),
        "options|cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_folder_is_refused(folder, name):
    spoil, message = REFUSED[name]
    spoil(folder)
    before = {p: p.lstat().st_size for p in folder.parent.rglob("*")}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * MB
    assert len(str(caught.value)) < 1000
    assert {p: p.lstat().st_size for p in folder.parent.rglob("*")} == before
    assert not Path("ran.txt").exists()


def test_absent_folder():
    with pytest.raises(FileNotFoundError, match="manifest.json is not there"):
        load("absent")


def test_link_in_the_way_of_a_new_file_is_not_followed(folder):
    secret = folder.parent / "secret.txt"
    secret.write_text("secret")
    (folder / "state-000002.npz.partial").symlink_to(secret)
    (folder / "manifest.json.partial").symlink_to(secret)
    own = FitFolder.open(folder)
    own.put("state", {"x": np.ones(2)})
    own.commit()
    assert secret.read_text() == "secret"
    np.testing.assert_array_equal(FitFolder.open(folder).read("state")[0]["x"], np.ones(2))


def test_large_parts_go_into_several_files(folder, monkeypatch):
    monkeypatch.setattr("pssm.storage.folder.FILE_BYTES", 100)
    own = FitFolder.open(folder)
    arrays = {"a": np.arange(10.0), "b": np.arange(3), "c": np.array(True), "d": np.zeros((0, 2))}
    own.put("state", arrays)
    own.commit()
    assert len(list(folder.glob("state-*"))) == 2
    for name, x in FitFolder.open(folder).read("state")[0].items():
        np.testing.assert_array_equal(x, arrays[name])
        assert x.dtype == arrays[name].dtype


def test_what_no_file_can_hold(folder):
    with pytest.raises(TypeError, match="`x` cannot be saved"):
        FitFolder.open(folder).put("state", {"x": np.array([object()])})


def test_files_left_by_a_crash_go_at_the_next_commit(folder):
    own = FitFolder.open(folder)
    own.put("state", {"x": np.ones(2)})  # never committed
    assert FitFolder.open(folder).read("state") == []
    again = FitFolder.open(folder)
    again.put("state", {"x": np.zeros(2)})
    again.commit()
    assert len(list(folder.glob("state-*"))) == 1


def test_error_type_is_a_value_error():
    assert issubclass(SavedFitError, ValueError)
