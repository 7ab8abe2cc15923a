"""IP-Adapters against diffusers on the same random weights: one grey level at most."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPImageProcessor

from latentdiff import IPAdapter
from latentdiff.adapters.control.seen import clip_pixels
from latentdiff.checkpoints.image_encoder import empty_image_encoder, read_image_encoder
from latentdiff.checkpoints.ip_adapter import empty_ip_adapter
from latentdiff.checkpoints.mapping import fill
from latentdiff.networks.ip_adapter import cross_attentions
from latentdiff.networks.layers import ProjectedContext
from tests import peers
from tests.adapters.control import adapters
from tests.adapters.control.nets import OURS
from tests.tasks.images import an_image, apart


def their_pipeline(family: str, files: list):
    from diffusers import DDIMScheduler

    components = dict(peers.theirs(family).components)
    components["unet"] = deepcopy(components["unet"])
    components |= {
        "image_encoder": adapters.encoder(),
        "feature_extractor": CLIPImageProcessor(size=adapters.SIDE, crop_size=adapters.SIDE),
    }
    components["scheduler"] = DDIMScheduler.from_config(components["scheduler"].config, clip_sample=False)
    if family == "xl":
        pipe = StableDiffusionXLPipeline(**components, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        [str(file.parent) for file in files],
        subfolder=[""] * len(files),
        weight_name=[file.name for file in files],
        image_encoder_folder=None,
    )
    return pipe


def in_diffusers(family: str, files: list, scale, **options) -> np.ndarray:
    pipe = their_pipeline(family, files)
    pipe.set_ip_adapter_scale(scale)
    made = pipe(
        "a photo of the cat", negative_prompt="red fox", num_inference_steps=4, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7), output_type="np", **options,
    )  # fmt: skip
    return (made.images[0] * 255).round().astype(int)


def test_the_image_encoder_is_that_of_transformers(tmp_path):
    weights = read_image_encoder(adapters.saved_encoder(tmp_path))
    ours = empty_image_encoder(weights.config).eval()
    fill(ours, weights.tensors)
    pixels = torch.randn(2, 3, adapters.SIDE, adapters.SIDE)
    with torch.no_grad():
        theirs = adapters.encoder()(pixels, output_hidden_states=True)
        torch.testing.assert_close(ours(pixels), theirs.image_embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.hidden(pixels), theirs.hidden_states[-2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (100, 61), (61, 100), (20, 33)])
def test_pixels_are_those_of_transformers(size):
    expected = CLIPImageProcessor(size=28, crop_size=28)(an_image(*size), return_tensors="pt").pixel_values
    found = clip_pixels([an_image(*size)], 28)
    assert (found - expected).abs().max() < 2.1 / 255 / 0.26


KINDS = [("sd1", "plain"), ("sd1", "plus"), ("sd1", "full"), ("sd2", "plus"), ("xl", "plain"), ("xl", "plus")]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_same_image_as_diffusers(family, kind, tmp_path):
    file = adapters.saved(tmp_path, family, kind, suffix=".bin" if family == "sd1" else ".safetensors")
    expected = in_diffusers(family, [file], 0.7, ip_adapter_image=an_image())
    pipe = peers.ours(family)
    prompts = [IPAdapter.load(file)(an_image(), scale=0.7)]
    (image,) = pipe("a photo of the cat", image_prompts=prompts, **OURS)
    assert apart(image, expected) <= 1
    assert apart(pipe("a photo of the cat", **OURS)[0], expected) > 5


def test_several_images_and_several_adapters(tmp_path):
    files = [adapters.saved(tmp_path, "sd1", "plus"), adapters.saved(tmp_path, "sd1", "plain", 4)]
    images = [[an_image(seed=1), an_image(50, 40, 2)], [an_image(seed=3)]]
    expected = in_diffusers("sd1", files, [0.4, 0.9], ip_adapter_image=images)
    prompts = [
        IPAdapter.load(file)(some, scale=scale) for file, some, scale in zip(files, images, [0.4, 0.9], strict=True)
    ]
    pipe = peers.ours("sd1")
    assert apart(pipe("a photo of the cat", image_prompts=prompts, **OURS)[0], expected) <= 1
    assert apart(pipe("a photo of the cat", image_prompts=prompts[:1], **OURS)[0], expected) > 3


def test_blocks_of_style_and_layout(tmp_path):
    file = adapters.saved(tmp_path, "xl", "plain")
    theirs = {"style": {"up": {"block_0": [0.0, 1.0, 0.0]}}, "layout": {"down": {"block_2": [0.0, 1.0]}}}
    adapter, pipe, found = IPAdapter.load(file), peers.ours("xl"), {}
    for name, scale in theirs.items():
        expected = in_diffusers("xl", [file], scale, ip_adapter_image=an_image())
        found[name] = pipe("a photo of the cat", image_prompts=[adapter(an_image(), blocks=name)], **OURS)[0]
        assert apart(found[name], expected) <= 1
    assert apart(found["style"], found["layout"]) > 3


def test_a_negative_image(tmp_path):
    """diffusers takes embeddings, of what is to be avoided first."""
    file = adapters.saved(tmp_path, "sd1", "plain")
    with torch.no_grad():
        seen = [
            adapters.encoder()(clip_pixels([image], adapters.SIDE)).image_embeds
            for image in (an_image(seed=5), an_image())
        ]
    expected = in_diffusers("sd1", [file], 1.0, ip_adapter_image_embeds=[torch.stack(seen)])
    adapter, pipe = IPAdapter.load(file), peers.ours("sd1")
    image = pipe("a photo of the cat", image_prompts=[adapter(an_image(), negative=an_image(seed=5))], **OURS)[0]
    assert apart(image, expected) <= 1
    assert apart(pipe("a photo of the cat", image_prompts=[adapter(an_image())], **OURS)[0], expected) > 3


@torch.no_grad()
def test_attention_is_that_of_diffusers(tmp_path):
    """Each cross-attention with two adapters, to 1e-5."""
    files = [adapters.saved(tmp_path, "xl", "plain"), adapters.saved(tmp_path, "xl", "plain", 4)]
    pipe, ours = their_pipeline("xl", files), peers.ours("xl").unet
    pipe.set_ip_adapter_scale([0.4, 0.9])
    width = ours.config.cross_attention_dim
    text, *tokens = (
        torch.randn(2, length, width, generator=torch.Generator().manual_seed(length)) for length in (7, 4, 5)
    )
    networks = []
    for file in files:
        weights = IPAdapter.load(file).weights
        network = empty_ip_adapter(weights.config)
        fill(network, weights.tensors)
        networks.append(network)
    attentions = cross_attentions(ours)
    for number, (name, attention) in enumerate(attentions.items()):
        theirs = pipe.unet.get_submodule(f"{name}.attn2")
        x = torch.randn(2, 12, attention.to_q.in_features, generator=torch.Generator().manual_seed(number))
        expected = theirs(x, encoder_hidden_states=(text, [part[:, None] for part in tokens]))
        further = [
            (*network.keys_values(part, list(attentions.values()))[attention], scale)
            for network, part, scale in zip(networks, tokens, [0.4, 0.9], strict=True)
        ]
        context = ProjectedContext({attention: attention.keys_values(text)}).with_further({attention: further})
        torch.testing.assert_close(attention(x, context), expected, rtol=1e-5, atol=1e-5)
