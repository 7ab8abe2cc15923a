"""What tells Stable Diffusion 1.x, 2.x, XL and XL's refiner apart on disk: the parts, and where a single file has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latentdiff.networks.text_encoders import FIRST, SECOND

UNET_PREFIX = "model.diffusion_model."
_ALWAYS = {"unet": UNET_PREFIX, "vae": "first_stage_model."}
_OTHERS = {
    5: "StableDiffusionDepth2ImgPipeline",
    7: "StableDiffusionUpscalePipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}


@dataclass(frozen=True)
class Family:
    """Models of the same parts.

    prefixes: of the parts' names in an original single file.
    open_clip: parts that are OpenCLIP's there, under its names.
    pipeline, others: diffusers' classes, of text to image, and by the channels of U-Nets that see more.
    index: what a model_index.json says besides.
    scale: of the VAE's latents, which leaves no trace in tensors.
    scheduler: the class that is used, where a single file does not say.
    side: of the latents of the training.
    title, name: for programs and for people.
    published: width of the U-Net and of the text embeddings.
    """

    prefixes: Mapping[str, str]
    open_clip: tuple[str, ...] = ()
    pipeline: str = "StableDiffusionPipeline"
    others: Mapping[int, str] = field(default_factory=lambda: _OTHERS)
    index: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 0.18215
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    side: int = 64
    title: str = ""
    name: str = ""
    published: tuple[int, int] = (320, 768)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of such a model."""
        return tuple(self.prefixes)

    @property
    def tokenizers(self) -> dict[str, str]:
        """Folder of the tokenizer -> what pads: CLIP's own pads with its end mark, OpenCLIP's with token 0."""
        return {
            part.replace("text_encoder", "tokenizer"): "!" if part in self.open_clip else "<|endoftext|>"
            for part in self.parts
            if is_text(part)
        }


# As the folder of SDXL base has it.
_EULER = {"_class_name": "EulerDiscreteScheduler", "clip_sample": False, "interpolation_type": "linear",
          "timestep_spacing": "leading", "use_karras_sigmas": False}  # fmt: skip

SD = Family({**_ALWAYS, FIRST: "cond_stage_model."})
XL = Family(
    {**_ALWAYS, FIRST: "conditioner.embedders.0.", SECOND: "conditioner.embedders.1."},
    open_clip=(SECOND,),
    pipeline="StableDiffusionXLPipeline",
    others={8: "StableDiffusionXLInstructPix2PixPipeline", 9: "StableDiffusionXLInpaintPipeline"},
    index={"force_zeros_for_empty_prompt": True},
    scale=0.13025,
    scheduler=_EULER,
    side=128,
    title="stable-diffusion-xl-v1-base",
    name="XL",
    published=(320, 2048),
)
REFINER = Family(
    {**_ALWAYS, SECOND: "conditioner.embedders.0."},
    open_clip=(SECOND,),
    pipeline="StableDiffusionXLImg2ImgPipeline",
    index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    scale=0.13025,
    scheduler=_EULER,
    side=128,
    title="stable-diffusion-xl-v1-refiner",
    name="XL refiner",
    published=(384, 1280),
)

ALL_PREFIXES = tuple(dict.fromkeys(prefix for family in (SD, XL, REFINER) for prefix in family.prefixes.values()))


def is_text(part: str) -> bool:
    """Whether a part is a text encoder."""
    return part in (FIRST, SECOND)


def family_in(names: Iterable[str]) -> Family:
    """The family of an original single file, by the names of its tensors."""
    names = list(names)
    if any(name.startswith(SD.prefixes[FIRST]) for name in names):
        return SD
    if any(name.startswith(XL.prefixes[SECOND]) for name in names):
        return XL
    if any(name.startswith(f"{REFINER.prefixes[SECOND]}model.") for name in names):
        return REFINER
    return XL if any(name.startswith(XL.prefixes[FIRST]) for name in names) else SD


def family_with(parts: Iterable[str]) -> Family:
    """The family of a model with these parts."""
    own = set(parts)
    return next((family for family in (SD, XL, REFINER) if set(family.parts) == own), SD)


def parts_in(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that a model_index.json names."""
    texts = [part for part in (FIRST, SECOND) if any(_named(index.get(part)))]
    return ("unet", "vae", *(texts or [FIRST]))


def _named(entry: Any) -> list[Any]:
    return [each for each in entry if each] if isinstance(entry, list) else []
