"""Tensors on disk: what is saved comes back, what is damaged is refused by name."""

from __future__ import annotations

import errno
import json
import pickle
import struct

import pytest
import torch

from treelora_cli.errors import DivergedError, EnvironmentProblem, RunDirError
from treelora_cli.rundir.tensors import first_not_finite, load_tensors, save_tensors


def some() -> dict[str, torch.Tensor]:
    return {
        "t000.q_proj.lora_A": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7,
        "t000.q_proj.lora_B": torch.ones(2, 3, dtype=torch.bfloat16),
        "rng": torch.arange(9, dtype=torch.uint8),
        "step": torch.tensor(3),
        "none": torch.zeros(0, 5),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor.detach())


def raw(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def test_round_trip_and_same_bytes_whatever_the_order(tmp_path):
    save_tensors(tmp_path / "a.safetensors", some())
    save_tensors(tmp_path / "b.safetensors", dict(reversed(some().items())))
    assert_same(load_tensors(tmp_path / "a.safetensors"), some())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_no_tensors_at_all_is_a_file_too(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {})
    assert load_tensors(tmp_path / "a.safetensors") == {}


def test_views_ties_and_parameters_are_stored_whole(tmp_path):
    base = torch.nn.Parameter(torch.arange(20, dtype=torch.float32).reshape(4, 5))
    tensors = {"base": base, "tied": base, "row": base[1], "turned": base.t(), "cut": base[1:3]}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert_same(load_tensors(tmp_path / "a.safetensors"), tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path, value, dtype):
    path = tmp_path / "a.safetensors"
    tensors = {"fine": torch.ones(3), "broken": torch.tensor([0.0, value], dtype=dtype)}
    with pytest.raises(DivergedError, match="'broken'"):
        save_tensors(path, tensors)
    assert not path.exists()
    save_tensors(path, tensors, finite=False)
    with pytest.raises(RunDirError, match=r"a\.safetensors: the tensor 'broken' holds NaN"):
        load_tensors(path)
    assert torch.equal(load_tensors(path, finite=False)["fine"], torch.ones(3))


def test_eight_bit_floats_are_checked_as_well():
    broken = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert first_not_finite({"a": torch.ones(2).to(torch.float8_e4m3fn), "b": broken}) == "b"
    assert first_not_finite({"i": torch.tensor([1]), "b": torch.tensor([True])}) is None


def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, some())
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(RunDirError, match=r"a\.safetensors is damaged") as caught:
            load_tensors(path)
        assert caught.value.hint
    path.write_bytes(data + b"x")
    with pytest.raises(RunDirError, match="damaged"):
        load_tensors(path)


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def header(**changes: object) -> bytes:
    return json.dumps({"a": {**HEADER["a"], **changes}}).encode()


BROKEN = {
    "header 2^63": raw(b"{}", length=2**63),
    "header 2^64-1": raw(b"{}", length=2**64 - 1),
    "header 100 MB": raw(b"{}" + b" " * 100, length=100_000_001),
    "header 0": raw(b"", b"\0" * 20),
    "header 1": raw(b"{", b"\0" * 20),
    "not json": raw(b"{not json}"),
    "a list": raw(b"[1, 2]"),
    "deep": raw(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "twice": raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "unknown dtype": raw(header(dtype="X99"), b"\0" * 8),
    "negative shape": raw(header(shape=[-2]), b"\0" * 8),
    "huge shape": raw(header(shape=[2**62, 2**62]), b"\0" * 8),
    "wrong shape": raw(header(shape=[3]), b"\0" * 8),
    "offsets outside": raw(header(data_offsets=[0, 800]), b"\0" * 8),
    "offsets reversed": raw(header(data_offsets=[8, 0]), b"\0" * 8),
    "a gap": raw(header(data_offsets=[4, 12]), b"\0" * 12),
    "shape as text": raw(header(shape="2"), b"\0" * 8),
    "pickle": pickle.dumps({"a": 1}),
    "zip of torch.save": b"PK\x03\x04" + b"\0" * 200,
    "zeros": b"\0" * 200,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_hostile_file_is_one_error(tmp_path, case):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(RunDirError, match=r"a\.safetensors is damaged"):
        load_tensors(path)


def test_a_header_longer_than_the_format_allows_is_not_even_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write(raw(b"{}", length=100_000_001))
        stream.truncate(200_000_000)
    with pytest.raises(RunDirError, match="a header of 100,000,001 bytes"):
        load_tensors(path)


def test_another_ending_is_refused_whatever_is_inside(tmp_path):
    save_tensors(tmp_path / "a.bin", some())
    with pytest.raises(RunDirError, match=r"not a \.safetensors file"):
        load_tensors(tmp_path / "a.bin")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["a.bin", "a.pt", "a.pkl", "a.safetensors", "a.npz", "a", "a.safetensors.bin"]
)
def test_a_pickle_is_never_run(tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(RunDirError):
        load_tensors(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "link"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        save_tensors(tmp_path / "b.safetensors", some())
        path.symlink_to(tmp_path / "b.safetensors")
    with pytest.raises(RunDirError, match=r"a\.safetensors"):
        load_tensors(path)


def test_names_shapes_and_dtypes_can_be_demanded(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, some())
    assert_same(load_tensors(path, like=some()), some())
    for change, reason in (
        ({"rng": torch.zeros(8, dtype=torch.uint8)}, r"'rng' is torch.uint8 \[9\], expected .*\[8"),
        ({"rng": torch.zeros(9, dtype=torch.int8)}, "expected torch.int8"),
        ({"other": torch.zeros(1)}, "lacks tensor 'other'"),
    ):
        with pytest.raises(RunDirError, match=reason):
            load_tensors(path, like={**some(), **change})
    fewer = some()
    del fewer["step"]
    with pytest.raises(RunDirError, match="unexpected tensor 'step'"):
        load_tensors(path, like=fewer)


def test_a_full_disk_inside_the_library_is_named(tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from safetensors import torch as binding

    def fail(tensors, path):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(binding, "save_file", fail)
    with pytest.raises(EnvironmentProblem, match=r"a\.safetensors: the disk is full \([0-9,]+ b"):
        save_tensors(tmp_path / "a.safetensors", some())


@pytest.mark.parametrize("action", ["enospc", "eio"])
@pytest.mark.parametrize("point", ["file.tmp-written", "file.synced"])
def test_a_failed_save_keeps_the_earlier_file(tmp_path, arm, point, action):
    path = tmp_path / "a.safetensors"
    save_tensors(path, some())
    arm(f"{point}:{action}")
    kind = EnvironmentProblem if action == "enospc" else RunDirError
    with pytest.raises(kind) as caught:
        save_tensors(path, {"new": torch.ones(1)})
    assert errno.errorcode[caught.value.__cause__.errno] == action.upper()
    assert_same(load_tensors(path), some())
    assert list(tmp_path.iterdir()) == [path]
