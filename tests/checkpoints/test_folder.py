"""Diffusers folders: every way in which weights lie in them, and saving one that diffusers opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.components import Components, load_components, save_folder
from latentdiff.checkpoints.folder import read_folder, weight_files
from latentdiff.checkpoints.layout import PARTS
from latentdiff.checkpoints.modules import build_module, parse_config
from latentdiff.errors import CheckpointError, ConfigError, LatentDiffError
from tests import tiny

FOLDERS = pytest.mark.parametrize("folder", [tiny.sd1_folder, tiny.sd2_folder, tiny.inpaint_folder])


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test writes to."""
    return tiny.sd1_folder(tmp_path_factory.mktemp("sd1"))


@pytest.fixture
def own(sd1: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sd1, tmp_path / "model"))


def assert_same(one: Components, other: Components) -> None:
    for part in PARTS:
        a, b = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    assert one.schedule_config == other.schedule_config
    assert one.tokenizer("a fox, zebra!")["input_ids"] == other.tokenizer("a fox, zebra!")["input_ids"]


def refusal(folder: Path) -> str:
    with pytest.raises(LatentDiffError) as error:
        load_components(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@FOLDERS
def test_outputs_equal_those_of_diffusers(tmp_path: Path, folder):
    source = folder(tmp_path)
    inpaint = folder is tiny.inpaint_folder
    peer = (StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline).from_pretrained(source)
    ours = load_components(source)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([peer.tokenizer("a fox", padding="max_length")["input_ids"]])
    x = torch.randn(1, ours.unet.config.in_channels, 8, 8, generator=generator)
    with torch.no_grad():
        context = peer.text_encoder(ids)[0]
        torch.testing.assert_close(ours.text_encoder(ids), context, rtol=1e-5, atol=1e-5)
        raw = peer.unet(x, torch.tensor([501]), context).sample
        torch.testing.assert_close(ours.unet(x, torch.tensor([501]), context), raw, rtol=1e-5, atol=1e-5)
        image = peer.vae.decode(x[:, :4] / 0.18215).sample
        torch.testing.assert_close(ours.vae.decode(x[:, :4]), image, rtol=1e-4, atol=1e-5)


@FOLDERS
def test_saved_folder_opens_in_diffusers_and_here(tmp_path: Path, folder):
    ours = load_components(folder(tmp_path))
    save_folder(ours, tmp_path / "saved")
    assert_same(ours, load_components(tmp_path / "saved"))
    peer = StableDiffusionPipeline.from_pretrained(tmp_path / "saved") if ours.unet.config.in_channels == 4 else None
    peer = peer or StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "saved")
    assert type(peer.scheduler).__name__ == ("DDIMScheduler" if folder is tiny.sd2_folder else "PNDMScheduler")
    assert peer.scheduler.config.prediction_type == ours.schedule_config.prediction_type
    assert peer.tokenizer("a fox")["input_ids"] == ours.tokenizer("a fox")["input_ids"]
    for part in ("unet", "vae"):
        state = getattr(ours, part).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in getattr(peer, part).state_dict().items())


def test_half_precision_is_saved_as_it_is(sd1: Path, tmp_path: Path):
    ours = load_components(sd1, dtype=torch.float16)
    save_folder(ours, tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    assert_same(ours, load_components(tmp_path / "half"))


def test_published_file_names_are_written(sd1: Path, tmp_path: Path):
    save_folder(load_components(sd1), tmp_path / "saved")
    written = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert written - {"tokenizer/special_tokens_map.json"} == {  # transformers 4 writes one file more
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    names = load_file(tmp_path / "saved/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


# --- Ways in which weights lie in a folder ---


def test_fp16_variant_is_taken_where_nothing_else_is(tmp_path: Path):
    folder = tiny.sd1_folder(tmp_path, variant="fp16")
    assert not list(folder.rglob("diffusion_pytorch_model.safetensors"))
    load_components(folder)
    shutil.copy(
        folder / "vae/diffusion_pytorch_model.fp16.safetensors", folder / "vae/diffusion_pytorch_model.safetensors"
    )
    assert [path.name for path in weight_files(folder, "vae")] == ["diffusion_pytorch_model.safetensors"]


def shard(file: Path, index: str, pieces: int = 3) -> None:
    """Split a safetensors file as save_pretrained does with large ones."""
    tensors = load_file(file)
    weight_map = {}
    for piece in range(pieces):
        name = f"{file.name.split('.')[0]}-{piece + 1:05}-of-{pieces:05}.safetensors"
        names = list(tensors)[piece::pieces]
        save_file({key: tensors[key] for key in names}, file.parent / name)
        weight_map |= dict.fromkeys(names, name)
    (file.parent / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file.unlink()


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_put_together(sd1: Path, own: Path, variant: str):
    shard(own / "unet/diffusion_pytorch_model.safetensors", f"diffusion_pytorch_model.safetensors.index{variant}.json")
    shard(own / "text_encoder/model.safetensors", f"model.safetensors.index{variant}.json")
    assert_same(load_components(own), load_components(sd1))


def test_missing_shard_is_named(own: Path):
    shard(own / "unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    (own / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00003.safetensors" in refusal(own)


def test_pickled_weights_are_read(sd1: Path, own: Path):
    for file in list(own.rglob("*.safetensors")):
        stem = "pytorch_model" if file.parent.name == "text_encoder" else "diffusion_pytorch_model"
        torch.save(load_file(file), file.parent / f"{stem}.bin")
        file.unlink()
    assert_same(load_components(own), load_components(sd1))


def rename(file: Path, renaming) -> None:
    save_file({renaming(name): tensor for name, tensor in load_file(file).items()}, file)


def test_old_names_of_the_vae_attention_are_read(sd1: Path, own: Path):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def to_old(name: str) -> str:
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        return name

    rename(own / "vae/diffusion_pytorch_model.safetensors", to_old)
    assert_same(load_components(own), load_components(sd1))


def test_text_encoder_names_of_old_and_new_transformers_are_read(sd1: Path, own: Path):
    file = own / "text_encoder/model.safetensors"
    rename(file, lambda name: name.removeprefix("text_model."))
    assert_same(load_components(own), load_components(sd1))
    save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    assert_same(load_components(own), load_components(sd1))


def test_safety_checker_and_friends_are_ignored(own: Path):
    (own / "safety_checker").mkdir()
    index = json.loads((own / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (own / "model_index.json").write_text(json.dumps(index))
    load_components(own)


# --- Refusals ---


def test_folder_without_a_model_lists_what_is_there(tmp_path: Path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    message = refusal(tmp_path)
    assert "model_index.json" in message and "holiday.jpg" in message


def test_missing_parts_are_named(own: Path):
    shutil.rmtree(own / "vae")
    shutil.rmtree(own / "scheduler")
    assert "no vae, scheduler" in refusal(own)


def test_missing_weights_are_named(own: Path):
    (own / "unet/diffusion_pytorch_model.safetensors").rename(own / "unet/other.safetensors")
    message = refusal(own)
    assert "no weights of the U-Net" in message and "other.safetensors" in message


def test_other_pipelines_are_named(own: Path):
    index = json.loads((own / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "X"]}
    (own / "model_index.json").write_text(json.dumps(index))
    assert "StableDiffusion3Pipeline" in refusal(own)


def test_configuration_of_another_size_is_said_to_be_so(own: Path):
    config = json.loads((own / "unet/config.json").read_text())
    (own / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [16, 32, 32, 64]}))
    message = refusal(own)
    assert "expected 64" in message and "found 32" in message


def test_weights_that_do_not_fit_are_listed(own: Path):
    file = own / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file)
    assert "VAE" in refusal(own) and "1 missing: decoder.conv_in.bias 32" in refusal(own)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_broken_json_is_named(own: Path, name: str, text: str, words: str):
    (own / name).write_text(text)
    assert words in refusal(own) and name in refusal(own)


ODD_VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats(-2, 2)
    | st.text(max_size=3)
    | st.lists(st.integers(-1, 3), max_size=3)
)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), part=st.sampled_from(("unet", "vae", "text_encoder", "scheduler")), value=ODD_VALUES)
def test_any_value_in_a_configuration_loads_or_is_an_error_of_ours(
    sd1: Path, data: st.DataObject, part: str, value: object
):
    raw = read_folder(sd1)
    key = data.draw(st.sampled_from(sorted(raw.configs[part])))
    raw.configs[part][key] = value
    try:
        parse_config(part, raw.configs[part]) if part == "scheduler" else build_module(raw, part)
    except LatentDiffError as error:
        assert "\n" not in str(error)


def test_missing_vocabulary_is_named(own: Path):
    (own / "tokenizer/merges.txt").unlink()
    assert "expected vocab.json and merges.txt" in refusal(own)


def test_broken_vocabulary_is_named(own: Path):
    (own / "tokenizer/vocab.json").write_text("{")
    assert "tokenizer" in refusal(own)


# --- Saving ---


def test_saving_replaces_a_model_and_nothing_else(sd1: Path, tmp_path: Path):
    ours = load_components(sd1)
    target = tmp_path / "saved"
    save_folder(ours, target)
    (target / "unet" / "stale.txt").write_text("old")
    save_folder(ours, target)
    assert not (target / "unet" / "stale.txt").exists()
    (target / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="refusing to replace.*diary.txt"):
        save_folder(ours, target)
    assert (target / "diary.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="a file of that name"):
        save_folder(ours, target / "diary.txt")


def test_saved_files_are_readable_by_whoever_may_read_the_folder(sd1: Path, tmp_path: Path):
    save_folder(load_components(sd1), tmp_path / "saved")
    (tmp_path / "mine").touch()
    (tmp_path / "our").mkdir()
    for path in (tmp_path / "saved").rglob("*"):
        usual = tmp_path / ("our" if path.is_dir() else "mine")
        assert path.stat().st_mode == usual.stat().st_mode


def test_model_can_be_saved_over_the_folder_that_it_is_mapped_from(own: Path, sd1: Path):
    save_folder(load_components(own), own)
    assert_same(load_components(own), load_components(sd1))


def test_failed_save_leaves_nothing_behind(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = load_components(sd1)
    target = tmp_path / "saved"
    save_folder(ours, target)
    before = sorted(path.name for path in tmp_path.iterdir())

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentdiff.checkpoints.folder.write_safetensors", no_space)
    for place in (target, tmp_path / "new"):
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            save_folder(ours, place)
        assert f"{place}: " in str(error.value) and "/." not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_same(ours, load_components(target))


def test_foreign_text_encoder_cannot_be_saved(sd1: Path, tmp_path: Path):
    ours = load_components(sd1)
    ours.text_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="found a Linear"):
        save_folder(ours, tmp_path / "saved")


def test_hash_follows_the_weights_not_the_place(sd1: Path, own: Path):
    first = load_components(sd1)
    assert first.name == "sd1" and len(first.hash) == 64
    assert load_components(own).hash == first.hash
    file = own / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert load_components(own).hash != first.hash
