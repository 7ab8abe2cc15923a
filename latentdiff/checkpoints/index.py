"""The model_index.json of the diffusers layout: which classes of diffusers a folder is for, and which schedules it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.checkpoints.families import SD, Family, is_text
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.text_encoders import FIRST, SECOND

INDEX = "model_index.json"
# Of the noise that the x4 upscaler's image gets, as its authors have it.
LOW_RES_SCHEDULE: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "variance_type": "fixed_small", "clip_sample": True,
}  # fmt: skip
_NOISING_SCHEDULE = {**LOW_RES_SCHEDULE, "beta_schedule": "squaredcos_cap_v2"}  # of the embedding that unCLIP sees
# The classes whose parts are read here. The pipelines differ in what they do with them.
_CLASSES = {
    "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL", "AutoencoderTiny"), "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}  # fmt: skip
_PIPELINES = tuple(
    f"StableDiffusion{size}{task}Pipeline"
    for size in ("", "XL")
    for task in ("", "Inpaint", "InpaintLegacy", "Img2Img", "InstructPix2Pix", "Depth2Img", "Upscale")
)


_UNCLIP = "StableUnCLIPImg2ImgPipeline"
_SEEING = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
}


def augmentations(unet: UNetConfig) -> dict[str, dict[str, Any]]:
    """The schedules of the noise that is put on what the U-Net sees, by the folders that diffusers has for them."""
    if unet.class_dim is not None:
        return {"image_noising_scheduler": dict(_NOISING_SCHEDULE)}
    return {"low_res_scheduler": dict(LOW_RES_SCHEDULE)} if unet.num_class_embeds else {}


def model_index(
    unet: UNetConfig, vae: str = "AutoencoderKL", scheduler: str = "DDIMScheduler", family: Family = SD
) -> dict[str, Any]:
    """The model_index.json with which diffusers opens the folder; `vae` and `scheduler` are its classes there."""
    sees_more = unet.in_channels != unet.out_channels  # than noisy latents; these may have eight channels themselves
    others = family.others if sees_more else {}
    classes = {FIRST: "CLIPTextModel", SECOND: "CLIPTextModelWithProjection"}
    safety = {"requires_safety_checker": False, "safety_checker": [None, None]} if family is SD else {}
    texts = {name: [None, None] for name in (() if family is SD else (FIRST, "tokenizer"))}
    texts |= {part: ["transformers", classes[part]] for part in family.parts if is_text(part)}
    texts |= {name: ["transformers", "CLIPTokenizer"] for name in family.tokenizers}
    return {
        "_class_name": _UNCLIP if unet.class_dim else others.get(unet.in_channels, family.pipeline),
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        **({"depth_estimator": [None, None]} if sees_more and unet.in_channels == 5 else {}),
        **(_SEEING if unet.class_dim else {}),
        **{name: ["diffusers", config["_class_name"]] for name, config in augmentations(unet).items()},
        **safety,
        "scheduler": ["diffusers", scheduler],
        **texts,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
        **family.index,
    }


def unknown_classes(index: Mapping[str, Any]) -> list[str]:
    """What a model_index.json names that is read as something else, in words."""
    found = [] if index.get("_class_name") in (None, _UNCLIP, *_PIPELINES) else [index["_class_name"]]
    for part, expected in _CLASSES.items():
        named = index.get(part)
        name = named[-1] if isinstance(named, list) and named else named
        found += [] if name in (None, *expected) else [f"{part}: {name}"]
    if not found:
        return []
    shown = ", ".join(str(name)[:80] for name in found)
    return [f"{INDEX} names classes that latentdiff does not know ({shown}); its parts are read as Stable Diffusion's"]
