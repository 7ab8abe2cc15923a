"""SDXL and its refiner on disk: folders, original files with and without what `convert` keeps, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.components import load_components, save_folder
from latentdiff.checkpoints.conversion import convert, read_model
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import CheckpointError, UsageError
from tests import tiny
from tests.checkpoints import compvis

PARTS = {
    "base": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "refiner": ("unet", "vae", "text_encoder_2"),
}


def assert_same_folder(one: Path, other: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        (mine,), (theirs,) = (list((folder / part).glob("*.safetensors")) for folder in (one, other))
        ours, expected = load_file(mine), load_file(theirs)
        assert ours.keys() == expected.keys()
        assert all(ours[name].dtype == expected[name].dtype for name in ours)
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def test_published_key_counts() -> None:
    """2,515 tensors are in sd_xl_base_1.0.safetensors, 1,680 of them of the U-Net."""
    shapes = compvis.xl()
    assert len(shapes) == 2515
    assert sum(name.startswith("model.diffusion_model.") for name in shapes) == 1680


def test_every_key_of_the_published_model_has_its_place() -> None:
    from latentdiff.checkpoints.families import XL
    from latentdiff.checkpoints.infer import infer_configs
    from latentdiff.checkpoints.original import layouts
    from latentdiff.networks.config import UNetConfig

    shapes = compvis.xl()
    configs = infer_configs(shapes, "epsilon")
    unet = UNetConfig.from_diffusers(configs["unet"])
    assert (unet.transformer_depth, unet.num_heads, unet.added_dim, unet.size_dim) == (
        (1, 2, 10),
        (5, 10, 20),
        2816,
        256,
    )
    assert unet.sample_size == 128 and configs["vae"]["scaling_factor"] == 0.13025
    assert (
        configs["text_encoder_2"]["num_attention_heads"] == 20 and configs["text_encoder_2"]["num_hidden_layers"] == 32
    )
    placed = {
        layout.prefix + name
        for layout in layouts(configs, open_clip=False, family=XL).values()
        for name in (key.removeprefix(layout.prefix) for key in shapes if key.startswith(layout.prefix))
        if layout.names.to_ours(name)
    }
    assert shapes.keys() - placed == {"conditioner.embedders.1.model.logit_scale"}


@pytest.mark.parametrize(("kind", "folder"), [("base", tiny.xl_folder), ("refiner", tiny.refiner_folder)])
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, kind: str, folder) -> None:
    source = folder(tmp_path)
    convert(source, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    assert_same_folder(tmp_path / "back", source, PARTS[kind])
    again, before = (read_model(path) for path in (tmp_path / "back", source))
    assert (
        again.configs["unet"] == before.configs["unet"]
        and again.configs["model_index"] == before.configs["model_index"]
    )
    assert (again.tokenizer, again.second_tokenizer) == (before.tokenizer, before.second_tokenizer)
    for path in (source, tmp_path / "model.safetensors"):
        report = inspect(path)
        name = "Stable Diffusion XL refiner" if kind == "refiner" else "Stable Diffusion XL,"
        assert report.family.startswith(name) and not report.problem
        assert set(report.parameters) == set(PARTS[kind])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_short_types_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    made = compvis.tensors(compvis.tiny_xl(), dtype=dtype)
    save_file(made, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == made.keys()
    assert all(torch.equal(bits(again[name]), bits(made[name])) for name in made)


@pytest.mark.parametrize(
    ("shapes", "kind", "pipeline"),
    [
        (compvis.tiny_xl, "base", StableDiffusionXLPipeline),
        (compvis.tiny_refiner, "refiner", StableDiffusionXLImg2ImgPipeline),
    ],
)
def test_diffusers_reads_the_same_weights_from_an_original_file(tmp_path: Path, shapes, kind: str, pipeline) -> None:
    """A file listed independently of our tables: diffusers' own single-file reader and ours agree, bit for bit."""
    path = tmp_path / "model.safetensors"
    save_file(compvis.tensors(shapes()), path)
    convert(path, tmp_path / "folder")
    peer = pipeline.from_single_file(str(path), config=str(tmp_path / "folder"), local_files_only=True)
    ours = read_model(path)
    for part in PARTS[kind]:
        theirs = {tiny_name(part, name): tensor for name, tensor in getattr(peer, part).state_dict().items()}
        mine = {name: tensor for name, tensor in ours.tensors[part].items() if "position_ids" not in name}
        assert mine.keys() == {name for name in theirs if "position_ids" not in name}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def tiny_name(part: str, name: str) -> str:
    """transformers 5 leaves `text_model.` out."""
    bare = not part.startswith("text_encoder") or name.startswith(("text_model.", "text_projection"))
    return name if bare else f"text_model.{name}"


def test_a_saved_model_opens_in_diffusers(tmp_path: Path) -> None:
    source = tiny.xl_folder(tmp_path)
    save_folder(load_components(source), tmp_path / "saved")
    assert_same_folder(tmp_path / "saved", source, PARTS["base"])
    peer = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    assert peer.config.force_zeros_for_empty_prompt is True
    assert peer.tokenizer_2.pad_token == "!" and peer.tokenizer.pad_token == "<|endoftext|>"
    assert torch.equal(peer.unet.conv_in.weight, load_components(source).unet.conv_in.weight)


def test_markers_of_velocity_and_of_pure_noise(tmp_path: Path) -> None:
    made = compvis.tensors(compvis.tiny_xl()) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(made, tmp_path / "model.safetensors")
    config = load_components(tmp_path / "model.safetensors").schedule_config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.drawing.file["_class_name"] == "EulerDiscreteScheduler"


def test_tokenizers_that_read_otherwise_are_refused(tmp_path: Path) -> None:
    source = tiny.xl_folder(tmp_path)
    path = source / "tokenizer_2" / "vocab.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"cat</w>"', '"cow</w>"'), encoding="utf-8")
    merges = source / "tokenizer_2" / "merges.txt"
    merges.write_text(merges.read_text(encoding="utf-8").replace("ca t</w>\n", "co w</w>\n"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer.*download|differ in more than their padding"):
        load_components(source)


def test_a_missing_text_encoder_is_named(tmp_path: Path) -> None:
    own = {k: v for k, v in compvis.tiny_xl().items() if not k.startswith("conditioner.embedders.0.")}
    save_file(compvis.tensors(own), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no text_encoder \(conditioner.embedders.0.\*\)"):
        load_components(tmp_path / "model.safetensors")


def test_an_unet_alone_takes_the_rest_from_a_base(tmp_path: Path) -> None:
    made = compvis.tensors(compvis.tiny_xl())
    save_file(made, tmp_path / "model.safetensors")
    unet = {name: 2 * tensor for name, tensor in made.items() if name.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="--base"):
        load_components(tmp_path / "unet.safetensors")
    found = load_components(tmp_path / "unet.safetensors", base=tmp_path / "model.safetensors")
    assert torch.equal(found.unet.conv_in.weight, unet["model.diffusion_model.input_blocks.0.0.weight"])
    assert found.text_encoder.pooled_width == 20


def test_another_text_encoder_is_refused_and_another_vae_taken(tmp_path: Path) -> None:
    source = tiny.xl_folder(tmp_path)
    with pytest.raises(UsageError, match="cannot be replaced"):
        load_components(source, text_encoder=source)
    other = tiny.xl_vae(seed=9)
    other.save_pretrained(tmp_path / "vae")
    found = load_components(source, vae=tmp_path / "vae")
    assert torch.equal(found.vae.quant_conv.weight, other.quant_conv.weight)
