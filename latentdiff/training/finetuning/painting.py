"""Samples of a model for inpainting: images of the data whose holes it paints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.pipeline import Pipeline
from latentdiff.request.options import SamplingOptions
from latentdiff.tasks.inpainting import inpaint
from latentdiff.training.material import Material
from latentdiff.training.sample_options import sample_options
from latentdiff.training.sections import DenoisingSection
from latentdiff.training.sheets import MakeImages

_GREY = 127  # what the network sees in place of a hole


@dataclass(frozen=True)
class Painted:
    """An image and its hole for each prompt.

    Attributes:
        images: of the size that is trained on.
        masks: white where to paint.
    """

    images: Sequence[Image.Image]
    masks: Sequence[Image.Image]
    title = "what it sees"

    @classmethod
    def of(cls, material: Material, settings: DenoisingSection, seed: int) -> Painted:
        """Held-out images, or training images where none are held out, with the holes that are measured too.

        Raises:
            UsageError: the options of the samples have one that inpainting has not.
        """
        for name in sample_options(settings.sample_options):
            if name not in SamplingOptions.__annotations__ and name != "seed":
                raise UsageError(
                    f"samples of a model for inpainting have the size of their image and no {name}; leave it out"
                )
        samples, indices = material.drawn(settings, seed)
        assert (holes := samples.holes) is not None
        images, masks = [], []
        for index in indices:
            hole = holes.pixels(index, samples.buckets[index], holes.of_name(samples.data.names[index]))
            images.append(Image.fromarray(samples.pixels(index)))
            masks.append(Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)))
        return cls(images, masks)

    @property
    def hints(self) -> list[Image.Image]:
        """What the model sees of each image."""
        return [
            Image.composite(Image.new("RGB", image.size, (_GREY,) * 3), image, mask)
            for image, mask in zip(self.images, self.masks, strict=True)
        ]

    def maker(self, pipe: Pipeline, name: str, options: Mapping[str, Any]) -> MakeImages:
        def paint(prompts: Sequence[str], *, seed: Sequence[int], **more: Any) -> list[Image.Image]:
            made: list[Image.Image] = []
            for prompt, own, image, mask in zip(prompts, seed, self.images, self.masks, strict=True):
                made += inpaint(pipe, image, mask, [prompt], seed=[own], progress=False, **{**options, **more})
            return made

        return paint
