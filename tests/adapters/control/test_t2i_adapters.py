"""T2I-Adapters against diffusers on the same random weights, in both layouts, and what is refused."""

from __future__ import annotations

from copy import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MultiAdapter, StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import ControlNet, Pipeline
from latentdiff.checkpoints.inspection import inspect
from latentdiff.checkpoints.t2i_adapter import read_t2i_adapter, t2i_map
from latentdiff.errors import CheckpointError, ConfigError, UsageError
from latentdiff.recipe import read_recipe
from tests import peers, tiny
from tests.adapters.control.nets import OURS, hint, saved
from tests.tasks.images import apart

TYPES = {"full": "full_adapter", "light": "light_adapter", "xl": "full_adapter_xl"}
shared = cache(peers.ours)


@cache
def theirs(kind: str, channels: int = 3, seed: int = 5) -> T2IAdapter:
    """Beside a tiny U-Net; two blocks a level of the full kinds, four of the light one, as published."""
    unet = peers.theirs("xl" if kind == "xl" else "sd1").unet.config
    widths = list(unet.block_out_channels)
    # The light kind has a level more than it names.
    levels = {"xl": [*widths, widths[-1]], "light": widths[:-1], "full": widths}
    torch.manual_seed(seed)
    made = T2IAdapter(
        in_channels=channels,
        channels=levels[kind],
        num_res_blocks=4 if kind == "light" else 2,
        downscale_factor=16 if kind == "xl" else 8,
        adapter_type=TYPES[kind],
    )
    return tiny.randomize(made, seed)


def folder(tmp: Path, kind: str, channels: int = 3, seed: int = 5) -> Path:
    place = tmp / f"{kind}-{channels}-{seed}"
    theirs(kind, channels, seed).save_pretrained(place)
    return place


def original(tmp: Path, kind: str, channels: int = 3) -> Path:
    """The file in the names of the original code."""
    weights = read_t2i_adapter(folder(tmp, kind, channels))
    table = t2i_map(weights.config)
    path = tmp / f"t2iadapter-{kind}.safetensors"
    save_file({table.to_theirs(name): tensor.clone() for name, tensor in weights.tensors.items()}, path)
    return path


def in_diffusers(family: str, adapters: list, images: list, **options) -> np.ndarray:
    from diffusers import DDIMScheduler

    components = copy(peers.theirs(family).components)
    components["scheduler"] = DDIMScheduler.from_config(components["scheduler"].config, clip_sample=False)
    adapter = MultiAdapter(adapters) if len(adapters) > 1 else adapters[0]
    if family == "xl":
        pipe = StableDiffusionXLAdapterPipeline(**components, adapter=adapter)
    else:
        del components["image_encoder"]
        pipe = StableDiffusionAdapterPipeline(**components, adapter=adapter, requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a photo of the cat", negative_prompt="red fox", num_inference_steps=4, guidance_scale=5.0, output_type="np",
        image=images if len(images) > 1 else images[0], generator=torch.Generator().manual_seed(7), **options,
    )  # fmt: skip
    return (made.images[0] * 255).round().astype(int)


@pytest.mark.parametrize(("kind", "channels"), [("full", 3), ("full", 1), ("light", 3), ("xl", 3), ("xl", 1)])
def test_same_image_as_diffusers(kind, channels, tmp_path):
    family = "xl" if kind == "xl" else "sd1"
    image = hint() if channels == 3 else hint().convert("L")
    expected = in_diffusers(family, [theirs(kind, channels)], [image], adapter_conditioning_scale=0.8)
    controls = [ControlNet.load(folder(tmp_path, kind, channels))(image, scale=0.8)]
    (found,) = shared(family)("a photo of the cat", controls=controls, **OURS)
    assert apart(found, expected) <= 1
    assert apart(shared(family)("a photo of the cat", **OURS)[0], expected) > 3


def test_in_a_share_of_the_steps(tmp_path):
    expected = in_diffusers("xl", [theirs("xl")], [hint()], adapter_conditioning_factor=0.5)
    net = ControlNet.load(folder(tmp_path, "xl"))
    (found,) = shared("xl")("a photo of the cat", controls=[net(hint(), end=0.5)], **OURS)
    assert apart(found, expected) <= 1
    assert apart(shared("xl")("a photo of the cat", controls=[net(hint())], **OURS)[0], expected) > 2


def test_two_add_up(tmp_path):
    both = [theirs("full"), theirs("full", 3, 6)]
    expected = in_diffusers("sd1", both, [hint(1), hint(2)], adapter_conditioning_scale=[0.4, 0.9])
    nets = [ControlNet.load(folder(tmp_path, "full", 3, seed)) for seed in (5, 6)]
    controls = [net(hint(n), scale=scale) for n, (net, scale) in enumerate(zip(nets, [0.4, 0.9], strict=True), 1)]
    assert apart(shared("sd1")("a photo of the cat", controls=controls, **OURS)[0], expected) <= 1


@pytest.mark.parametrize("kind", TYPES)
def test_names_of_the_original_code(kind, tmp_path):
    path = original(tmp_path, kind)
    names = set(load_file(path))
    if kind == "light":
        expected = {"body.0.in_conv.weight", "body.3.body.3.block2.bias", "body.3.out_conv.weight"}
    else:
        expected = {"conv_in.weight", "body.0.block1.weight", "body.2.in_conv.weight", "body.7.block2.bias"}
    assert expected <= names and len(names) == len(theirs(kind).state_dict())
    again, mine = read_t2i_adapter(path), theirs(kind).state_dict()
    assert again.tensors.keys() == mine.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in mine.items())
    alone = tmp_path / "alone.safetensors"  # in the names of diffusers, without a configuration
    save_file({name: tensor.clone() for name, tensor in mine.items()}, alone)
    assert read_t2i_adapter(alone).config == again.config == read_t2i_adapter(folder(tmp_path, kind)).config


def test_another_size_and_a_control_net_beside(tmp_path):
    """Sides that the first map does not divide; and what both add is added."""
    net = ControlNet.load(folder(tmp_path, "xl"))
    options = {**OURS, "steps": 2, "width": 72, "height": 88}
    image = hint(size=(72, 88))
    assert apart(shared("xl")("cat", controls=[net(image)], **options)[0], shared("xl")("cat", **options)[0]) > 2
    other = ControlNet.load(saved(tmp_path))
    adapter = ControlNet.load(folder(tmp_path, "full"))
    both, one, none = (
        shared("sd1")("cat", controls=controls, **OURS)[0]
        for controls in (
            [adapter(hint()), other(hint(2))],
            [other(hint(2))],
            [adapter(hint(), scale=0.0), other(hint(2))],
        )
    )
    assert apart(one, none) == 0 and apart(both, one) > 2


def test_low_memory_and_recipes(tmp_path):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="fp32", low_memory=True)
    net = ControlNet.load(original(tmp_path, "light"))
    low = pipe("cat", controls=[net(hint(), scale=0.7)], **OURS)[0]
    assert apart(low, shared("sd1")("cat", controls=[net(hint(), scale=0.7)], **OURS)[0]) == 0
    assert not any(part.is_ready for part in pipe.residence.beside.values())
    (recorded,) = read_recipe(low.info).controls
    assert recorded.model["file"] == "t2iadapter-light.safetensors" and recorded.scale == 0.7


def test_inspect_names_it(tmp_path):
    assert (
        inspect(original(tmp_path, "full")).family == "T2I-Adapter for Stable Diffusion 1.x or 2.x, a size of its own"
    )
    report = inspect(folder(tmp_path, "xl", 1))
    assert report.kind == "folder of a T2I-Adapter (safetensors)" and "XL" in report.family and not report.problem
    assert report.notes == ["sees the grey of a hint"]
    assert inspect(original(tmp_path, "light")).family.startswith("light T2I-Adapter")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("body.7.block2.bias"), CheckpointError, "1 missing: adapter.body.3.resnets.1.block2.bias"),
        (lambda t: t.update({"extra.weight": torch.ones(2)}), CheckpointError, "1 unexpected: extra.weight"),
        (lambda t: t.pop("conv_in.weight"), CheckpointError, "is missing"),
        (lambda t: t.update({"conv_in.weight": torch.ones(16, 5, 3, 3)}), ConfigError, "256, 768 channels, found 5"),
        (lambda t: t.update({"transformer_layes.0.x": torch.ones(2)}), CheckpointError, "style or composing T2I-Adapter"),
        (lambda t: t.update({"conv_in.bias": torch.ones(16, dtype=torch.int8)}), CheckpointError, "expected floats"),
    ],
)  # fmt: skip
def test_damaged_files(change, error, message, tmp_path):
    path = original(tmp_path, "full")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(error, match=message) as raised:
        ControlNet.load(path)
    assert "\n" not in str(raised.value)
    assert inspect(path).problem


def test_refusals(tmp_path):
    net = ControlNet.load(folder(tmp_path, "full"))
    for options in ({"guess": True}, {"mask": Image.new("L", (64, 64))}):
        with pytest.raises(UsageError, match="a T2I-Adapter, which knows no guess mode and no mask"):
            net(hint(), **options)
    with pytest.raises(UsageError, match="leave mode out"):
        net(hint(), mode="canny")
    with pytest.raises(UsageError, match="leave pools out"):
        ControlNet.load(folder(tmp_path, "full"), pools=True)
    with pytest.raises(CheckpointError, match="for another model: pixels for the first map 8, expected 16") as raised:
        shared("xl")("cat", controls=[net(hint())], **OURS)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="in the proportions of what is made"):
        shared("sd1")("cat", controls=[net(hint())], width=128, **OURS)
    with pytest.raises(UsageError, match="leave cache_interval at 1"):
        shared("sd1")("cat", controls=[net(hint())], cache_interval=2, **OURS)
