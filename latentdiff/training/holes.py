"""What a model for inpainting is to paint in its training images: holes of random shapes, or those that masks show.

The U-Net of such a model sees the mask and the latents of the image without the masked part (Rombach et al. 2022, section
4.5). Stable Diffusion's was trained with synthetic masks, of which a quarter hid everything. The shapes are those of
Suvorov et al. 2022 ("Resolution-robust Large Mask Inpainting", section 2.3): wide strokes and boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from latentdiff.training.data.buckets import Size
from latentdiff.training.data.randomness import Key, generator
from latentdiff.training.data.transforms import CropKey
from latentdiff.training.masks import Masks

_EVERYTHING = 0.25  # share of the holes that hide the whole image, so that the model can still draw without one
_MOST_SHAPES = 4
_STROKE = (0.05, 0.25)  # width of a stroke, in shorter sides of the image
_BOX = (0.15, 0.6)  # sides of a box, in sides of the image


@dataclass(frozen=True)
class Holes:
    """Holes in the images of a data set.

    Attributes:
        seed: of the run.
        masks: show in white what is to be painted; None draws holes at random.
    """

    seed: int
    masks: Masks | None = None

    def of_step(self, step: int, rows: range) -> list[Key]:
        """What the holes of these rows of a step depend on."""
        return [(self.seed, "hole", step, row) for row in rows]

    def of_name(self, name: str) -> Key:
        """What the hole of an image depends on wherever it is measured or drawn."""
        return self.seed, "hole of", name

    def pixels(self, index: int, bucket: Size, key: Key, crop_key: CropKey = None) -> np.ndarray:
        """The hole in an image in its bucket, (H, W) bool.

        Args:
            crop_key: that of the image; where a mask is cropped depends on it.
        """
        if self.masks is None:
            return random_hole(bucket, generator(*key))
        return self.masks.pixels(index, bucket, crop_key) > 127


def seen_noise(keys: list[Key], shape: tuple[int, int, int]) -> np.ndarray:
    """Noise (n, C, h, w) to draw the latents with of what is left of images."""
    return np.stack([generator(*key, "seen").standard_normal(shape, dtype=np.float32) for key in keys])


def random_hole(size: Size, random: np.random.Generator) -> np.ndarray:
    """A hole in an image of (width, height) pixels, (H, W) bool; never empty."""
    width, height = size
    if random.random() < _EVERYTHING:
        return np.ones((height, width), bool)
    image = Image.new("1", size)
    draw, strokes = ImageDraw.Draw(image), random.random() < 0.5
    for _ in range(int(random.integers(1, _MOST_SHAPES + 1))):
        (_stroke if strokes else _box)(draw, size, random)
    hole = np.array(image)
    hole[height // 2, width // 2] |= not hole.any()
    return hole


def _box(draw: ImageDraw.ImageDraw, size: Size, random: np.random.Generator) -> None:
    sides = [max(1, round(side * random.uniform(*_BOX))) for side in size]
    left, top = (int(random.integers(0, side - own + 1)) for side, own in zip(size, sides, strict=True))
    draw.rectangle((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=1)


def _stroke(draw: ImageDraw.ImageDraw, size: Size, random: np.random.Generator) -> None:
    """A chain of segments that turn a little, with round ends and joints."""
    shorter = min(size)
    wide = max(1, round(shorter * random.uniform(*_STROKE)))
    place = np.array([random.uniform(0, side) for side in size])
    angle = random.uniform(0, 2 * np.pi)
    for _ in range(int(random.integers(1, 6))):
        angle += random.uniform(-0.4 * np.pi, 0.4 * np.pi)
        step = shorter * random.uniform(0.1, 0.5) * np.array([np.cos(angle), np.sin(angle)])
        following = np.clip(place + step, 0, size)
        draw.line((*place, *following), fill=1, width=wide)
        for x, y in (place, following):
            draw.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), fill=1)
        place = following
