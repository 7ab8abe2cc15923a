"""Tiny models in both implementations, made once for all tests that need them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from tests import tiny

FAMILIES = ("sd1", "sd2")


@cache
def folder(family: str) -> Path:
    """A tiny model folder as published ones are, but drawn by DDIM: "sd1", "sd2" (v-prediction), "xl", or the first and
    last for inpainting, "inpaint" and "xl-inpaint", and the first for instructions, "pix2pix"; or "depth", "x4",
    "unclip". Do not write to it."""
    from diffusers import DDIMScheduler

    if family == "sd2":
        return tiny.sd2_folder(Path(_scratch().name))
    make = {
        "sd1": tiny.sd1_folder, "inpaint": tiny.inpaint_folder, "xl": tiny.xl_folder, "xl-inpaint": tiny.xl_inpaint_folder,
        "pix2pix": tiny.pix2pix_folder, "depth": tiny.depth_folder,
        "x4": lambda place, _: tiny.x4_folder(place), "unclip": lambda place, _: tiny.unclip_folder(place),
    }[family]  # fmt: skip
    ddim = DDIMScheduler(**tiny.BETAS, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    return make(Path(_scratch().name), ddim)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="latentdiff-tests-")  # disappears with the process


def ours(family: str):
    """A fresh latentdiff pipeline in float32 on the CPU."""
    from latentdiff import Pipeline

    return Pipeline.load(folder(family), device="cpu", precision="fp32")


@cache
def theirs(family: str):
    """The same model in diffusers."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    if family in ("pix2pix", "depth", "x4", "unclip"):
        pipe = DiffusionPipeline.from_pretrained(folder(family))
    elif family.startswith("xl"):
        pipe = StableDiffusionXLPipeline.from_pretrained(folder(family))
    else:
        pipe = StableDiffusionPipeline.from_pretrained(folder(family), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
