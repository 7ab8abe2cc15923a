"""Make the images of this folder that latentdiff does not make: a mask, a small image, and a landscape.

python examples/make.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent
SIDE = 512


def mask(size: tuple[int, int]) -> Image.Image:
    """White in an ellipse in the middle, black elsewhere."""
    width, height = size
    image = Image.new("L", size, 0)
    ImageDraw.Draw(image).ellipse((width // 6, height // 6, width * 5 // 6, height * 5 // 6), fill=255)
    return image


def landscape() -> Image.Image:
    """Three ranges of hills below an evening sky, with haze and grain."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    top, low = np.array([64, 92, 150.0]), np.array([246, 190, 140.0])
    image = top + (low - top) * np.clip(y / 0.65, 0, 1)[..., None] ** 0.8
    sun = np.exp(-((x - 0.68) ** 2 + (y - 0.42) ** 2) / 0.004)
    image += sun[..., None] * np.array([60, 50, 20.0])
    for depth, base in enumerate((0.55, 0.66, 0.8)):
        waves = sum(
            random.normal() * 0.05 / n * np.sin(2 * np.pi * n * x[0] + random.uniform(0, 6.3)) for n in range(1, 24)
        )
        inside = y > base + waves[None, :]
        colour = np.array([92, 98, 112.0]) * (1 - 0.33 * depth) + np.array([14, 10, 0.0]) * depth
        shade = 1 + 0.12 * random.normal(size=(SIDE, SIDE)).cumsum(1)[:, ::-1] / SIDE**0.5
        image = np.where(inside[..., None], colour * np.clip(shade, 0.8, 1.2)[..., None], image)
    image += random.normal(scale=3, size=image.shape)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def main() -> None:
    """Write the images beside this file."""
    with Image.open(FOLDER / "scene.png") as opened:
        scene = opened.convert("RGB")
    mask(scene.size).save(FOLDER / "mask.png")
    scene.resize((scene.width // 2, scene.height // 2), Image.Resampling.BICUBIC).save(FOLDER / "small.png")
    landscape().save(FOLDER / "photo.png")


if __name__ == "__main__":
    main()
