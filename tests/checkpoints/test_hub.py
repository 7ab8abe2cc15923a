"""Hub ids: the cache is read without a socket; without it there is a clear word."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentdiff.checkpoints import hub
from latentdiff.checkpoints.components import load_components
from latentdiff.errors import CheckpointError
from tests import tiny
from tests.checkpoints.test_folder import shard

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    import huggingface_hub.constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def fill(cache: Path, tmp_path: Path) -> Path:
    """Put a model into the cache, as huggingface_hub lays it out."""
    repository = cache / "models--someone--tiny-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(tiny.sd1_folder(tmp_path), repository / "snapshots" / COMMIT))


def test_cached_model_is_loaded_without_a_socket(cache: Path, tmp_path: Path):
    fill(cache, tmp_path)
    assert load_components("someone/tiny-model").name == "someone/tiny-model"


def test_folder_of_the_same_name_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(cache, tmp_path)
    (tmp_path / "someone" / "tiny-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.locate("someone/tiny-model") == Path("someone/tiny-model")


@pytest.mark.parametrize(
    "gone", ["vae/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
def test_incomplete_cache_is_not_used(cache: Path, tmp_path: Path, gone: str):
    (fill(cache, tmp_path) / gone).unlink()
    with pytest.raises(CheckpointError, match="not in the local cache and HF_HUB_OFFLINE forbids"):
        load_components("someone/tiny-model")


def test_unknown_id_offline(cache: Path):
    with pytest.raises(CheckpointError, match="someone/other is not in the local cache"):
        load_components("someone/other")


def repository(names: list[str]) -> SimpleNamespace:
    """What the hub says of a repository."""
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


def test_no_connection_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    import huggingface_hub.constants

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("[Errno 101] Network is unreachable\nand more")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match="cannot be downloaded.*Network is unreachable") as error:
        load_components("someone/other")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "model.safetensors", "./here", "org/model.ckpt", "a..b/c"])
def test_what_is_neither_there_nor_an_id(cache: Path, name: str):
    with pytest.raises(CheckpointError, match="no model at .*expected a folder, a file, or a hub id"):
        load_components(name)


def test_only_needed_files_are_downloaded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One format of the weights, shards and all; no safety checker, no images, no second precision."""
    import huggingface_hub
    import huggingface_hub.constants

    remote = tiny.sd1_folder(tmp_path)
    shard(remote / "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md"):
        (remote / name).write_bytes(b"x")
    (remote / "safety_checker").mkdir()
    (remote / "safety_checker/config.json").write_text("{}")
    local, fetched = tmp_path / "snapshot", []

    def download(hub_id: str, name: str) -> str:
        assert hub_id == "someone/tiny-model"
        fetched.append(name)
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / name, local / name)
        return str(local / name)

    listed = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, hub_id: repository(listed))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_components("someone/tiny-model")
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert "vae/diffusion_pytorch_model-00003-of-00003.safetensors" in fetched
    assert not {"README.md", "unet/diffusion_pytorch_model.bin", "safety_checker/config.json"} & set(fetched)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in fetched


def test_repository_without_a_model(cache: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, hub_id: repository(["config.json"]))
    with pytest.raises(CheckpointError, match="no model in the diffusers layout"):
        load_components("someone/other")
