"""Headers of safetensors files: what the library reads is read the same, what is odd is read with a warning."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.files import FileWarning, read_tensors
from latentdiff.errors import CheckpointError

DEEP = b"[" * 3000 + b"]" * 3000  # deeper than some releases of Python read


def written(path: Path, header: object, body: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_those_of_the_library(tmp_path):
    path = tmp_path / "a.safetensors"
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    more = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
    save_file(
        {str(t): torch.arange(1, 7).view(2, 3).to(t) for t in (*types, *more)} | {"none": torch.empty(0, 2)}, path
    )
    expected, found = load_file(path), read_tensors(path).tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].contiguous().view(torch.uint8).equal(tensor.view(torch.uint8))


def test_bytes_that_belong_to_no_tensor_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(3.0)}, path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.warns(FileWarning, match="4 bytes behind its tensors belong to none"):
        assert read_tensors(path).tensors["w"].tolist() == [0, 1, 2]
    written(path, {"w": entry(offsets=(8, 16))}, bytes(8) + torch.arange(2.0).numpy().tobytes())
    with pytest.warns(FileWarning, match="8 bytes between its tensors"):
        assert read_tensors(path).tensors["w"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": entry(offsets=(0,))}, "two data_offsets"),
        ({"w": entry(offsets=(8, 0))}, "two data_offsets"),
        ({"w": entry(offsets=(0, True))}, "two data_offsets"),
        ({"w": entry(shape="2")}, "has the shape"),
        ({"w": entry(shape=(-2,))}, "has the shape"),
        ({"w": entry(shape=(2.0,))}, "has the shape"),
        ({"w": entry(shape=(10**30, 10**30))}, "beyond 64 bits"),
        ({"w": entry(shape=(2**40, 2**40))}, "has 8 bytes"),
        ({"w": entry(shape=(3,))}, "has 8 bytes"),
        ({"w": entry(dtype="X9")}, "does not know"),
        ({"w": []}, "needs dtype"),
        ({"w": None}, "needs dtype"),
        ({"w": entry(), "v": entry(offsets=(4, 12))}, "overlaps"),
        ({"w": entry(offsets=(2**62, 2**62 + 8))}, "is truncated"),
        ({"__metadata__": {"a": 1}}, "must hold texts"),
        ({"\x1b[31m": None}, "\\x1b[31m"),
        (DEEP, "levels deep"),
        (b"[]", "must hold a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b'{"\\ud800": 1}', "surrogate"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path, header, words):
    if header in (DEEP, b"[]", b"\xff{}"):
        header = header + b" "  # not recognised as safetensors by `sniff`; the reader is asked itself
    from latentdiff.reading.safetensors import read_header

    with pytest.raises(CheckpointError) as error:
        read_header(written(tmp_path / "a.safetensors", header))
    assert words in str(error.value) and str(error.value).isprintable()


def test_many_names_are_read_fast(tmp_path):
    """In about a second of the processor; once it took 17."""
    from latentdiff.reading.safetensors import read_header

    path = written(tmp_path / "a.safetensors", {f"layer.{i}.weight": entry((0,), (0, 0)) for i in range(50_000)}, b"")
    start = time.process_time()
    assert len(read_header(path).entries) == 50_000
    assert time.process_time() - start < 8
