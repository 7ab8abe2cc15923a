"""Sample images during training, made by the public pipeline with the model as it is at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from latentdiff.checkpoints.components import Components
from latentdiff.image import contact_sheet, save_png
from latentdiff.networks.attention import use_attention_backend
from latentdiff.pipeline import Pipeline
from latentdiff.training.config import DenoisingSection


class SampleSheets:
    """Images of fixed prompts with fixed seeds.

    Args:
        parts: the model that is trained; the networks are used in place.
        prompts: what to draw; none makes no images.
        settings: steps and guidance.
        folder: of the stage; the images lie in `samples/` there.
        seed: of the run; image i has seed `seed + i`.
    """

    def __init__(
        self, parts: Components, prompts: Sequence[str], settings: DenoisingSection, folder: Path, seed: int
    ) -> None:
        self._parts, self._prompts, self._settings = parts, list(prompts), settings
        self._folder, self._seed = folder, seed
        self.written: list[Path] = []

    def write(self, step: int, weights: str) -> None:
        """Write the images of a step; `weights` is "ema" or "raw"."""
        if not self._prompts:
            return
        settings, networks = self._settings, (self._parts.unet, self._parts.text_encoder, self._parts.vae)
        modes = [network.training for network in networks]
        self._parts.vae.to(self._parts.unet.conv_in.weight.device)
        # Not the hash: what the model is at this step lies in no file.
        name = f"{self._parts.name}, trained in {self._folder.name}, step {step}, {weights} weights"
        pipe = Pipeline.from_components(replace(self._parts, name=name, hash=""))
        make = partial(pipe, steps=settings.sample_steps, guidance_scale=settings.sample_guidance, progress=False)
        folder = sample_folder(self._folder, step, weights)
        with use_attention_backend("sdpa"):
            write_samples(make, self._prompts, folder, seed=self._seed)
        if weights == "ema":
            self.written = [folder / f"{number:02d}.png" for number in range(len(self._prompts))]
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)


class MakeImages(Protocol):
    """The public Pipeline with the settings of the samples already given, or anything that is called like it."""

    def __call__(self, prompt: Sequence[str], *, seed: Sequence[int]) -> list[Image.Image]: ...


def sample_folder(run: Path, step: int, weights: str) -> Path:
    """Where the images of a step lie; `weights` is "ema" or "raw"."""
    return run / "samples" / f"step-{step:08d}" / weights


def write_samples(make: MakeImages, prompts: Sequence[str], folder: Path, *, seed: int) -> list[Image.Image]:
    """Make one image of each prompt, write each with its recipe as `00.png`, `01.png` ..., and all of them as
    `sheet.png`.

    Image i has seed `seed + i`; the same prompts and seed at every step show what the steps changed.
    """
    images = make(prompts, seed=[seed + index for index in range(len(prompts))])
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:02d}.png")
    save_png(contact_sheet(images, prompts), folder / "sheet.png")
    return images
