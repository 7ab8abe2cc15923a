"""ControlNets for several kinds of hints, against diffusers' pipelines of them."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from safetensors.torch import load_file, save_file

from latentdiff import ControlNet, Pipeline, image_to_image
from latentdiff.checkpoints.control_layouts import convert_control
from latentdiff.checkpoints.inspection import inspect
from latentdiff.cli.controls import parse_control_model
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.recipe import read_recipe
from tests import peers
from tests.adapters.control.nets import hint, saved, union
from tests.tasks.images import an_image, apart

SAME = {"guidance_scale": 5.0, "negative_prompt": "red fox"}
OURS = {"steps": 4, "sampler": "ddim", "seed": 7, "progress": False, **SAME}
PROMPT = "a photo of the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("union") / "promax"
    union().save_pretrained(place)
    return place


def in_diffusers(kind, net, **options):
    pipe = kind(**copy(peers.theirs("xl").components), controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    made = pipe(PROMPT, generator=generator, output_type="np", num_inference_steps=4, **SAME, **options)
    return (made.images[0] * 255).round().astype(int)


@pytest.mark.parametrize(("modes", "layers", "mode"), [(8, 1, "tile"), (6, 1, "canny"), (8, 2, "depth")])
def test_same_image_as_diffusers(modes, layers, mode, tmp_path):
    net = union(modes, layers)
    net.save_pretrained(tmp_path / "union")
    control = ControlNet.load(tmp_path / "union")
    place = control.modes.index(mode)
    kind = StableDiffusionXLControlNetUnionPipeline
    expected = in_diffusers(kind, net, control_image=[hint()], control_mode=[place], controlnet_conditioning_scale=0.8)
    pipe = peers.ours("xl")
    found = pipe(PROMPT, controls=[control(hint(), mode=mode, scale=0.8)], **OURS)[0]
    assert apart(found, expected) <= 1
    other = pipe(PROMPT, controls=[control(hint(), mode="openpose", scale=0.8)], **OURS)[0]
    assert apart(other, expected) > 1, "the kind of the hint says something"


def test_image_to_image(folder):
    kind = StableDiffusionXLControlNetUnionImg2ImgPipeline
    expected = in_diffusers(
        kind,
        union(),
        image=an_image(),
        control_image=[hint()],
        control_mode=[5],
        strength=0.75,
        controlnet_conditioning_scale=1.0,
    )
    control = ControlNet.load(folder)(hint(), mode="segment")
    found = image_to_image(peers.ours("xl"), an_image(), PROMPT, strength=0.75, controls=[control], **OURS)[0]
    assert apart(found, expected) <= 1


def test_a_file_alone_and_the_names_of_its_authors(folder, tmp_path):
    """The first was published with a class of its own, and both kinds of weights beside one configuration."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    authors = tmp_path / "authors"
    authors.mkdir()
    save_file(tensors, authors / "diffusion_pytorch_model_promax.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("num_")}
    (authors / "config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModel_Union"}))
    pipe = peers.ours("xl")
    places = folder, tmp_path / "alone.safetensors", authors / "diffusion_pytorch_model_promax.safetensors"
    images = [pipe("cat", controls=[ControlNet.load(place)(hint(), mode="depth")], **OURS)[0] for place in places]
    assert apart(images[0], images[1]) == apart(images[0], images[2]) == 0


def test_an_image_does_not_depend_on_its_batch_nor_on_memory(folder):
    control = ControlNet.load(folder)(hint(), mode="normal")
    pipe = peers.ours("xl")
    both = pipe([PROMPT, "dog"], controls=[control], **OURS | {"seed": [7, 8]})
    alone = [pipe(p, controls=[control], **OURS | {"seed": s})[0] for p, s in ((PROMPT, 7), ("dog", 8))]
    assert [apart(a, b) <= 1 for a, b in zip(both, alone, strict=True)] == [True, True]
    low = Pipeline.load(peers.folder("xl"), device="cpu", precision="fp32", low_memory=True)
    assert apart(low(PROMPT, controls=[control], **OURS)[0], alone[0]) == 0


def test_the_kind_is_that_of_what_is_prepared_and_kept(folder):
    net = ControlNet.load(folder)
    assert net(an_image(), prepare="tile").mode == "tile"
    assert net(an_image(), prepare="tile", mode="repaint").mode == "repaint"
    (image,) = peers.ours("xl")("cat", controls=[net(hint(), mode="openpose")], **OURS)
    assert read_recipe(image.info).controls[0].mode == "openpose"
    notes = " ".join(inspect(folder).notes)
    assert "openpose, depth, scribble, canny, normal, segment, tile, repaint" in notes


def test_refusals(folder, tmp_path):
    with pytest.raises(UsageError, match="expected mode to be one of openpose, depth, .* found None"):
        ControlNet.load(folder)(hint())
    with pytest.raises(UsageError, match="for one kind of hint; leave mode out, found 'depth'"):
        ControlNet.load(saved(tmp_path, "xl"))(hint(), mode="depth")
    union(6).save_pretrained(tmp_path / "six")
    with pytest.raises(UsageError, match="normal, segment, found tile"):
        ControlNet.load(tmp_path / "six")(hint(), mode="tile")
    union(9).save_pretrained(tmp_path / "nine")
    with pytest.raises(CheckpointError, match="takes 9 kinds of hints, of which 8 are known"):
        ControlNet.load(tmp_path / "nine")


def test_a_file_becomes_a_folder_that_diffusers_opens(folder, tmp_path):
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    convert_control(tmp_path / "alone.safetensors", tmp_path / "made")
    made = ControlNetUnionModel.from_pretrained(tmp_path / "made").state_dict()
    assert made.keys() == tensors.keys() and all(torch.equal(made[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["lora_controlnet", "lllite_unet_input_blocks_4_1_attn1_to_q.cond_emb.weight"])
def test_other_kinds_of_controls_are_refused(name, tmp_path):
    save_file({name: torch.zeros(1), "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="Control-LoRA or a ControlNet-LLLite"):
        ControlNet.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth=u.safetensors:0.8@0-0.5", ("u.safetensors", {"mode": "depth", "scale": 0.8, "start": 0.0, "end": 0.5})),
        ("tile=u", ("u", {"mode": "tile"})),
        ("a=b", ("a=b", {})),
    ],
)
def test_the_kind_on_the_command_line(text, expected):
    assert parse_control_model(text) == expected
