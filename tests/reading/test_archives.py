"""Files of torch: the tensors that torch itself reads, and an error of ours for each kind of damage and malice."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import CheckpointError
from latentdiff.reading import archives

WEIGHTS = {
    "plain": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "half": torch.randn(3).half(),
    "bfloat16": torch.randn(2, 2).bfloat16(),
    "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "whole numbers": torch.arange(5),
    "truth": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "parameter": nn.Parameter(torch.randn(3)),
    "part": torch.arange(10.0)[2:7:2],
}


def zipped(
    source: Path, target: Path, change: dict[str, bytes] | None = None, method: int = zipfile.ZIP_DEFLATED
) -> Path:
    """The same archive packed again, with other contents of some records."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, (change or {}).get(name.split("/", 1)[1], old.read(name)))
    return target


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.float(), expected.detach().float())


@pytest.mark.parametrize("way", ["archive", "old", "packed", "stored again"])
def test_tensors_are_those_that_torch_reads(tmp_path, way):
    path = tmp_path / "model.ckpt"
    # torch reads its own old files of 8-bit floats no longer.
    content = OrderedDict((name, tensor) for name, tensor in WEIGHTS.items() if way != "old" or name != "fp8")
    content._metadata = OrderedDict(version=1)  # what nn.Module.state_dict leaves
    torch.save({"state_dict": content, "global_step": 7}, path, _use_new_zipfile_serialization=way != "old")
    if way in ("packed", "stored again"):
        method = zipfile.ZIP_DEFLATED if way == "packed" else zipfile.ZIP_STORED
        path = zipped(path, tmp_path / "again.ckpt", method=method)
    file = read_tensors(path)
    expected = torch.load(path, weights_only=True)["state_dict"]
    assert list(file.tensors) == list(content) and file.others == {"global_step": 7}
    for name, tensor in expected.items():
        assert same(file.tensors[name], tensor) and same(tensor, WEIGHTS[name]), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickles(tmp_path, protocol):
    path = tmp_path / "model.ckpt"
    torch.save({"weight": torch.ones(3), "raw": b"\xff", "several": {1, 2}}, path, pickle_protocol=protocol)
    assert torch.equal(read_tensors(path).tensors["weight"], torch.ones(3))


def test_a_packed_file_is_read_right(tmp_path):
    """A mapping of the packed bytes gave 1e-26 for 0."""
    torch.save({"weight": torch.arange(4.0)}, tmp_path / "plain.ckpt")
    path = zipped(tmp_path / "plain.ckpt", tmp_path / "deflated.ckpt")
    assert read_tensors(path).tensors["weight"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_wrong_checksums_are_seen(tmp_path, method):
    torch.save({"weight": torch.arange(1000.0)}, tmp_path / "plain.ckpt")
    path = zipped(tmp_path / "plain.ckpt", tmp_path / "model.ckpt", method=method)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content[record.header_offset + 100] ^= 1
    path.write_bytes(content)
    assert any(words in refusal(path) for words in ("checksum", "cannot be unpacked"))


def test_bombs_are_refused_before_they_unpack(tmp_path, monkeypatch):
    """Once with small limits; those in force are 64 MiB, and 256 MiB and 16 times the file."""
    monkeypatch.setattr(archives, "LONGEST_PICKLE", 1000)
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED", 1000)
    torch.save({"weight": torch.arange(4.0)}, tmp_path / "plain.ckpt")
    path = zipped(tmp_path / "plain.ckpt", tmp_path / "pickle.ckpt", {"data.pkl": bytes(2**20)})
    assert "its pickle has 1,048,576 bytes" in refusal(path)
    path = zipped(tmp_path / "plain.ckpt", tmp_path / "storage.ckpt", {"data/0": bytes(2**20)})
    assert "unpacks to 1,048,576 bytes" in refusal(path)


def program(path: Path, code: bytes) -> Path:
    """A file of torch whose pickle is this program."""
    torch.save({"weight": torch.arange(4.0)}, path.with_suffix(".plain"))
    return zipped(path.with_suffix(".plain"), path, {"data.pkl": code})


CALL = b"\x80\x02c"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (CALL + b"builtins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.", "makes bytes"),
        (CALL + b"os\nsystem\nX\x04\0\0\0true\x85R.", "asks for os.system"),
        (CALL + b"builtins\neval\nX\x01\0\0\0001\x85R.", "asks for builtins.eval"),
        (b"\x80\x02}r\xff\xff\xff\x7f(X\x01\0\0\0aK\x01u.", ""),  # a memo of 2**31 places
        (b"\x80\x02" + b"]" * 5_000_000 + b".", "instructions"),
        (b"\x80\x02}" + b"(" * 10_000 + b"u.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7f", "cut off"),
        (b"\x80\x02}(" + b")" + b"\x85" * 2000 + b"K\x01u.", "a key that is no name"),
        (b"\x80\x02}]K\x01s.", "a key that is no name"),
        (b"", "damaged"),
        (b"\x80\x02(dp0\n.", "the instruction 'd'"),
    ],
)
def test_hostile_pickles(tmp_path, code, words):
    path = program(tmp_path / "model.ckpt", code)
    if words:
        assert words in refusal(path)
    else:
        assert read_tensors(path).others == {"a": 1}


def test_a_list_that_is_copied_again_and_again_ends(tmp_path):
    """A call costs two bytes of the program and would copy a million entries."""
    many = b"\x80\x02(" + b"N" * 1_000_000 + b"lq\x00\x85q\x010" + b"cbuiltins\nset\nh\x01R0" * 100_000 + b"}."
    assert "instructions" in refusal(program(tmp_path / "model.ckpt", many))


def tensor(shape: bytes, stride: bytes, offset: bytes = b"K\x00", key: bytes = b"0") -> bytes:
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpuK\x04tQ"
    code = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset
    return code + shape + stride + b"\x89}tRs."


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (tensor(b"K\x05\x85", b"K\x01\x85"), "larger than its storage"),
        (tensor(b"M\xff\xffM\xff\xff\x86", b"K\x00K\x00\x86"), "larger than its storage"),  # 16 GB of one number
        (tensor(b"K\x02\x85", b"K\x01\x85", b"K\x03"), "larger than its storage"),
        (tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "no list of sizes"),
        (tensor(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"), "no list of sizes"),
        (tensor(b"K\x04\x85", b"K\x01\x85", key=b"9"), "its storage '9' needs 16 bytes, found none"),
    ],
)
def test_hostile_tensors(tmp_path, code, words):
    assert words in refusal(program(tmp_path / "model.ckpt", code))


def test_the_program_of_those_tests_is_sound(tmp_path):
    path = program(tmp_path / "model.ckpt", tensor(b"K\x04\x85", b"K\x01\x85"))
    assert read_tensors(path).tensors["w"].tolist() == [0, 1, 2, 3]


def test_plain_pickles_and_old_files_of_nothing(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    assert "the number that torch's files begin with" in refusal(path)
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for cut in (10, 50, 120, len(whole) - 20, len(whole) - 5):
        path.write_bytes(whole[:cut])
        refusal(path)
    place = whole.rindex(struct.pack("<q", 3))
    path.write_bytes(whole[:place] + struct.pack("<q", -3) + whole[place + 8 :])
    assert "has -3 numbers" in refusal(path)
