import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.writing import write_safetensors


def test_the_library_reads_what_is_written(tmp_path):
    random = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5, generator=random).half(),
        "brain": torch.randn(7, generator=random).bfloat16(),
        "last": torch.randn(2, 3, 4, 5, generator=random).to(memory_format=torch.channels_last),
        "view": torch.randn(6, 6, generator=random)[::2, 1:4],
        "number": torch.tensor(3.5),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "nothing": torch.zeros(0, 4),
    }
    write_safetensors(tensors, tmp_path / "a.safetensors", {"about": 'a "test"'})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"about": 'a "test"'}


def test_files_are_those_of_the_library(tmp_path):
    tensors = {name: torch.randn(3, 4) for name in ("b.weight", "a.bias", "ü")}
    write_safetensors(tensors, tmp_path / "ours.safetensors", {"format": "pt"})
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_no_tensors(tmp_path):
    write_safetensors({}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors") == {}
