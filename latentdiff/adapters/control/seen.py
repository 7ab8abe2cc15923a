"""What an IP-Adapter makes of images: pixels as CLIP sees them, and keys and values for one walk of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentdiff.adapters.control.image_prompts import ImagePrompt, IPAdapter
from latentdiff.checkpoints.image_encoder import ImageEncoderWeights, empty_image_encoder
from latentdiff.checkpoints.ip_adapter import empty_ip_adapter
from latentdiff.checkpoints.modules import check_made_for
from latentdiff.diffusion.schedule import Level
from latentdiff.model.memory.estimate import weight_bytes
from latentdiff.model.memory.parts import Part
from latentdiff.model.memory.residence import Residence
from latentdiff.networks.device import finite_or_float32
from latentdiff.networks.image_encoder import DEVIATION, MEAN, ImageEncoder
from latentdiff.networks.ip_adapter import AppliedImagePrompt, IPAdapterNetwork, cross_attentions
from latentdiff.networks.layers import KeysValues
from latentdiff.networks.rows import window_of
from latentdiff.networks.unet import UNet


def image_prompt_parts(prompts: Sequence[ImagePrompt], residence: Residence, dtype: torch.dtype) -> list[Part]:
    """The image encoders and adapters of image prompts among the networks of a model, each once; they need not be in memory.

    Raises:
        CheckpointError: one was made for another model.
    """
    parts: dict[int, Part] = {}
    for prompt in prompts:
        _check_fits(prompt.adapter, residence.module("unet"))
        for part in (_encoder_part(prompt.adapter, residence, dtype), _adapter_part(prompt.adapter, residence, dtype)):
            parts[id(part)] = part
    return list(parts.values())


@torch.no_grad()
def applied_image_prompts(
    prompts: Sequence[ImagePrompt], residence: Residence, dtype: torch.dtype, levels: Sequence[Level]
) -> list[AppliedImagePrompt]:
    """What acts on one walk over `levels`. The networks' memory is given back: what they made is all that is needed.

    Raises:
        CheckpointError: an adapter was made for another model.
        UsageError: an image prompt names blocks that are not there.
    """
    attentions = cross_attentions(residence.module("unet"))
    image_prompt_parts(prompts, residence, dtype)
    scales = [prompt.scales(list(attentions)) for prompt in prompts]
    applied: list[AppliedImagePrompt] = []
    for prompt, strengths in zip(prompts, scales, strict=True):
        images, none = _seen(prompt, residence, dtype)
        make = partial(_keys_values, prompt.adapter, residence, dtype, list(attentions.values()))
        by_layer: dict[nn.Module, float | Tensor] = {attentions[name]: scale for name, scale in strengths.items()}
        window = window_of([level.t for level in levels[:-1]], prompt.start, prompt.end)
        applied.append(AppliedImagePrompt(make(images), make(none), by_layer, window))
        for part in image_prompt_parts([prompt], residence, dtype):
            part.give_back()
    return applied


def clip_pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Images as CLIP sees them (N, 3, side, side): the shorter side brought to `side`, the middle square, normalised."""
    made = []
    for image in images:
        short, long = sorted(image.size)
        scaled = (side, side * long // short) if image.width <= image.height else (side * long // short, side)
        left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
        resized = image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        made.append(np.asarray(resized, dtype=np.float32) / 255.0)  # (side, side, 3)
    values = (np.stack(made) - np.float32(MEAN)) / np.float32(DEVIATION)
    return torch.from_numpy(values).permute(0, 3, 1, 2)


def _seen(prompt: ImagePrompt, residence: Residence, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the encoder gives for the images, and for what stands for none: as many, so that both have as many tokens."""
    adapter = prompt.adapter
    side, is_plain = adapter.encoder.config.image_size, adapter.weights.config.kind == "plain"
    encode = partial(_encoded, adapter, residence, dtype)
    images = encode(clip_pixels([source.opaque() for source in prompt.images], side))
    if prompt.negative is not None:
        none = encode(clip_pixels([prompt.negative.opaque()], side))
    elif is_plain:
        none = torch.zeros_like(images[:1])
    else:  # the mean colour, which is zero when it is normalised
        none = encode(torch.zeros(1, 3, side, side))
    return images, none.expand_as(images)


def _encoded(adapter: IPAdapter, residence: Residence, dtype: torch.dtype, pixels: Tensor) -> Tensor:
    """(N, 3, side, side) -> embeddings (N, C) for plain adapters, hidden states (N, L, C) for others; what was seen last is
    remembered."""
    part = _encoder_part(adapter, residence, dtype)
    is_plain = adapter.weights.config.kind == "plain"
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    key = (digest, is_plain, dtype, str(part.device))
    if key not in adapter.remembered:
        residence.make_room(
            "text_encoder", weight_bytes(part.module)
        )  # neither the U-Net nor the VAE is used at the moment
        encoder = part.ready()
        assert isinstance(encoder, ImageEncoder)

        def compute(now: torch.dtype) -> Tensor:
            given = pixels.to(part.device, now)
            return encoder(given) if is_plain else encoder.hidden(given)

        adapter.remember(key, finite_or_float32("the image encoder", encoder, compute).to(dtype))
    return adapter.remembered[key]


def _keys_values(
    adapter: IPAdapter, residence: Residence, dtype: torch.dtype, attentions: Sequence[nn.Module], seen: Tensor
) -> Mapping[nn.Module, KeysValues]:
    network = _adapter_part(adapter, residence, dtype).ready()
    assert isinstance(network, IPAdapterNetwork)
    tokens = finite_or_float32("the IP-Adapter", network, lambda now: network.tokens(seen.to(now))).to(dtype)
    return network.keys_values(tokens, attentions)


def _encoder_part(adapter: IPAdapter, residence: Residence, dtype: torch.dtype) -> Part:
    return adopted(adapter.encoder, residence, dtype)


def adopted(encoder: ImageEncoderWeights, residence: Residence, dtype: torch.dtype) -> Part:
    """An image encoder among the networks of a model; it need not be in memory."""
    return _part(encoder, lambda: empty_image_encoder(encoder.config), encoder.tensors, residence, dtype)


def _adapter_part(adapter: IPAdapter, residence: Residence, dtype: torch.dtype) -> Part:
    weights = adapter.weights
    return _part(weights, lambda: empty_ip_adapter(weights.config), weights.tensors, residence, dtype)


def _part(
    key: object, make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], residence: Residence, dtype: torch.dtype
) -> Part:
    if key not in residence.beside:
        residence.adopt(key, make().to(dtype), tensors)
    part = residence.beside[key]
    part.to(residence.device, dtype)
    return part


def _check_fits(adapter: IPAdapter, unet: UNet) -> None:
    config = adapter.weights.config
    widths = [attention.to_k.out_features for attention in cross_attentions(unet).values()]
    facts = {
        "text width": (config.width, unet.config.cross_attention_dim),
        "cross-attentions": (len(config.layers), len(widths)),
        "their widths": (sorted(set(config.layers.values())), sorted(set(widths))),
        "widths in order": (list(config.layers.values()), widths),
    }
    check_made_for("an IP-Adapter", adapter.weights.path, facts)
