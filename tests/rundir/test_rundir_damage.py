"""JSON, manifests and units that were cut, changed or made to do harm."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from treelora_cli.errors import RunDirError
from treelora_cli.rundir import atomic
from treelora_cli.rundir.jsonfile import dump_json, parse_object, read_json
from treelora_cli.rundir.manifest import MANIFEST, verify, write_manifest

DEEP = b'{"a":' * 100_000

BROKEN_JSON = {
    "empty": (b"", "empty"),
    "blank": (b"  \n", "empty"),
    "cut": (b'{"a": [1, 2', "damaged"),
    "trailing": (b'{"a": 1} {"b": 2}', "damaged"),
    "list": (b"[1]", "holds a list, not an object"),
    "number": (b"3", "holds a int, not an object"),
    "nan": (b'{"a": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"a": -Infinity}', "Infinity is not a JSON number"),
    "overflow": (b'{"a": 1e999}', "1e999 is too large a number"),
    "long integer": (b'{"a": ' + b"9" * 5000 + b"}", "damaged"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
    "bom": (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
    "deep": (DEEP, "nested too deeply"),
    "deep list": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}.", "not UTF-8"),
    "nul": (b'{"a": "\0"}', "damaged"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_json_is_one_error_with_a_reason(tmp_path, case):
    data, reason = BROKEN_JSON[case]
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(RunDirError) as caught:
        read_json(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint


def test_long_json_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as stream:
        stream.truncate(51 * 1024 * 1024)
    with pytest.raises(RunDirError, match=r"53,477,376 bytes, more than the 52,428,800 allowed"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path, max_bytes=8) == {"a": 1}
    with pytest.raises(RunDirError, match="more than the 7"):
        read_json(path, max_bytes=7)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "link", "dangling"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "real.json").write_text("{}")
        path.symlink_to(tmp_path / "real.json")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "none")
    reason = {"missing": "No such file", "link": "symbolic link", "dangling": "symbolic link"}
    with pytest.raises(RunDirError, match=reason.get(kind, "not a regular file|Is a directory")):
        read_json(path)


def test_json_with_a_lone_surrogate_reads_back_the_same():
    doc = {"text": "a\ud800b\u2028 \\ud800 é 🤖"}
    assert parse_object(dump_json(doc)) == doc


# --- units


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    target = tmp_path / "000-A"
    with atomic.commit_dir(target) as folder:
        atomic.write_json(folder / "task.json", {"name": "A"})
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    verify(target)
    return target


def test_manifest_is_a_function_of_the_files(unit):
    before = (unit / MANIFEST).read_bytes()
    assert json.loads(before) == {
        "format": 1,
        "files": {
            "adapter/weights.safetensors": {
                "bytes": 2048,
                "sha256": hashlib.sha256(bytes(range(256)) * 8).hexdigest(),
            },
            "task.json": {
                "bytes": 18,
                "sha256": hashlib.sha256(b'{\n  "name": "A"\n}\n').hexdigest(),
            },
        },
    }
    os.utime(unit / "task.json", (0, 0))
    write_manifest(unit)
    assert (unit / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("size", [0, 7, 8, 1024, 2047, 2049])
def test_a_file_of_another_length_is_named(unit, size):
    path = unit / "adapter" / "weights.safetensors"
    path.write_bytes((path.read_bytes() + b"x")[:size])
    with pytest.raises(RunDirError, match=rf"weights\.safetensors has {size:,} bytes .* 2,048"):
        verify(unit)


@pytest.mark.parametrize("at", [0, 1000, 2047])
def test_one_flipped_bit_is_found(unit, at):
    path = unit / "adapter" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunDirError, match=r"weights\.safetensors was changed") as caught:
        verify(unit)
    assert "restore the folder" in caught.value.hint
    verify(unit, hashes=False)


def test_a_missing_file_or_manifest_or_folder_is_named(unit):
    (unit / "task.json").rename(unit / "elsewhere.json")
    with pytest.raises(RunDirError, match=r"task\.json is missing"):
        verify(unit)
    (unit / MANIFEST).unlink()
    with pytest.raises(RunDirError, match="never finished"):
        verify(unit)
    with pytest.raises(RunDirError, match="none is missing"):
        verify(unit.parent / "none")


def test_files_written_later_are_allowed(unit):
    (unit / "predictions").mkdir()
    (unit / "predictions" / "A.own.test.jsonl").write_text("{}\n")
    verify(unit)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "predictions/x.PKL", "a.pth"])
def test_a_pickle_slipped_in_is_refused_and_never_run(unit, name):
    canary = unit.parent / "canary"
    (unit / name).parent.mkdir(exist_ok=True)
    (unit / name).write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(RunDirError, match="may hold a pickle"):
        verify(unit)
    assert not canary.exists()


@pytest.mark.parametrize("where", ["task.json", "adapter", "extra", "dangling", "the unit"])
def test_links_are_refused(unit, where):
    outside = unit.parent / "outside"
    if where == "task.json":
        (unit / "task.json").rename(outside)
        (unit / "task.json").symlink_to(outside)
    elif where == "adapter":
        (unit / "adapter").rename(outside)
        (unit / "adapter").symlink_to(outside, target_is_directory=True)
    elif where == "the unit":
        unit.rename(outside)
        unit.symlink_to(outside, target_is_directory=True)
    else:
        (unit / "x").symlink_to("/etc/passwd" if where == "extra" else outside)
    with pytest.raises(RunDirError, match="is a symbolic link"):
        verify(unit)


FILES = {"task.json": {"bytes": 18, "sha256": "0" * 64}}
BROKEN_MANIFESTS = {
    "no format": ({"files": FILES}, "names no format"),
    "format as text": ({"format": "1", "files": FILES}, "names no format"),
    "format as bool": ({"format": True, "files": FILES}, "names no format"),
    "older": ({"format": 0, "files": FILES}, "names no format"),
    "newer": ({"format": 2, "files": FILES}, "created by a newer version"),
    "files as list": ({"format": 1, "files": ["task.json"]}, "lists no files"),
    "extra key": ({"format": 1, "files": FILES, "run": "rm"}, "more than files"),
    "entry as text": ({"format": 1, "files": {"task.json": "0"}}, "no size and SHA-256"),
    "entry extra": (
        {"format": 1, "files": {"task.json": {"bytes": 1, "sha256": "", "x": 1}}},
        "no size and SHA-256",
    ),
    "size as bool": (
        {"format": 1, "files": {"task.json": {"bytes": True, "sha256": ""}}},
        "no size and SHA-256",
    ),
    "parent": ({"format": 1, "files": {"../run.json": FILES["task.json"]}}, "not a file of its"),
    "inner parent": ({"format": 1, "files": {"a/../../b": FILES["task.json"]}}, "not a file of"),
    "absolute": ({"format": 1, "files": {"/etc/passwd": FILES["task.json"]}}, "not a file of its"),
    "nul": ({"format": 1, "files": {"a\0b": FILES["task.json"]}}, "not a file of its"),
    "empty name": ({"format": 1, "files": {"": FILES["task.json"]}}, "not a file of its"),
}


@pytest.mark.parametrize("case", BROKEN_MANIFESTS)
def test_a_broken_manifest_is_one_error(unit, case):
    doc, reason = BROKEN_MANIFESTS[case]
    (unit / MANIFEST).write_text(json.dumps(doc))
    with pytest.raises(RunDirError, match=reason) as caught:
        verify(unit)
    assert MANIFEST in caught.value.message


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_manifest_that_is_broken_json_is_one_error(unit, case):
    data, reason = BROKEN_JSON[case]
    (unit / MANIFEST).write_bytes(data)
    with pytest.raises(RunDirError) as caught:
        verify(unit)
    assert reason in caught.value.message


def test_files_swapped_between_units_are_found(unit):
    other = unit.parent / "001-B"
    with atomic.commit_dir(other) as folder:
        atomic.write_json(folder / "task.json", {"name": "B"})
    (unit / "task.json").write_bytes((other / "task.json").read_bytes())
    with pytest.raises(RunDirError, match=r"000-A/task\.json was changed"):
        verify(unit)


def test_an_unreadable_disk_is_named(unit, monkeypatch):
    def fail(stream, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(RunDirError, match=r"cannot read .*weights\.safetensors: Input/output"):
        verify(unit)
