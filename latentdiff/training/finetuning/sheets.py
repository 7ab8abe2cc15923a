"""Sample pictures during training, made by the public pipeline with the model as it is at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from latentdiff.checkpoints.components import Components
from latentdiff.networks.attention import use_attention_backend
from latentdiff.pipeline import Pipeline
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.validation import sample_folder, write_samples


class SampleSheets:
    """Pictures of fixed prompts with fixed seeds.

    Args:
        parts: the model that is trained; the networks are used in place.
        prompts: what to draw; none makes no pictures.
        settings: steps and guidance.
    """

    def __init__(self, parts: Components, prompts: Sequence[str], settings: FinetuneConfig) -> None:
        self._parts, self._prompts, self._settings = parts, list(prompts), settings
        self.written: list[Path] = []

    def write(self, step: int, weights: str) -> None:
        """Write the pictures of a step; `weights` is "ema" or "raw"."""
        if not self._prompts:
            return
        settings, networks = self._settings, (self._parts.unet, self._parts.text_encoder, self._parts.vae)
        modes = [network.training for network in networks]
        self._parts.vae.to(self._parts.unet.conv_in.weight.device)
        # Not the hash: what the model is at this step lies in no file.
        name = f"{self._parts.name}, fine-tuned in {settings.out.name}, step {step}, {weights} weights"
        pipe = Pipeline.from_components(replace(self._parts, name=name, hash=""))
        make = partial(pipe, steps=settings.sample_steps, guidance_scale=settings.sample_guidance, progress=False)
        folder = sample_folder(settings.out, step, weights)
        with use_attention_backend("sdpa"):
            write_samples(make, self._prompts, folder, seed=settings.seed)
        if weights == "ema":
            self.written = [folder / f"{number:02d}.png" for number in range(len(self._prompts))]
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)
