"""What the depth model of SD 2 sees beside its latents: how near the things of an image are (Rombach et al. 2022).

The map is brought to the size of the latents and to -1 (farthest) to 1 (nearest), as the model was trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.adapters.control.depth import DepthModel
from latentdiff.checkpoints.hashing import place_hash
from latentdiff.checkpoints.hub import locate
from latentdiff.errors import UsageError
from latentdiff.networks.vae import LatentDistribution
from latentdiff.pipeline import Pipeline
from latentdiff.reading.colours import as_rgb
from latentdiff.request.sources import ImageInput, open_source

OWN = "depth_estimator"  # its folder in that of a model
_FLAT = 1e-6  # of what is all at one depth

# (image extended to whole cells, size of its latents) -> how near its places are (1, 1, h, w), in any unit
_Near = Callable[[Image.Image, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Depths:
    """Where the depths of an image come from.

    near: what makes or knows them.
    sources: what a recipe says of them, by role; the model's own estimator is not named.
    """

    near: _Near
    sources: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    @classmethod
    def of(cls, pipe: Pipeline, given: ImageInput | None, size: tuple[int, int]) -> Depths:
        """Depths by a map, by the folder of a model of transformers, or by that in the folder of `pipe`.

        Args:
            size: (width, height) of the image before it is extended to whole cells.

        Raises:
            UsageError: there is none, or a map of other proportions.
            DataError: the map is missing or no image.
            CheckpointError: there is no such model in the folder.
        """
        if given is None:
            return cls(_estimated(_own(pipe)))
        if isinstance(given, str | os.PathLike) and Path(given).is_dir():
            folder = Path(given)
            entry = {"file": folder.resolve().name, "sha256": place_hash(folder)}
            return cls(_estimated(folder), {"depth_model": entry})
        source = open_source(given)
        return cls(_mapped(source.image, size), {"depth": source.entry})

    def seen(self, pipe: Pipeline, image: Image.Image, encoded: LatentDistribution) -> Tensor:
        """What the U-Net sees (1, 1, h, w).

        Raises:
            UsageError: all is at one depth.
        """
        height, width = encoded.mean.shape[-2:]
        near = self.near(image, (height, width))
        low, high = near.min(), near.max()
        if not high - low > _FLAT * high.abs().clamp(min=1.0):
            raise UsageError("expected depths of what is near and what is far, found the same everywhere")
        return (2.0 * (near - low) / (high - low) - 1.0).to(pipe.device)


def _own(pipe: Pipeline) -> Path:
    """The estimator that came with a model.

    Raises:
        UsageError: there is none.
    """
    source = (pipe.loaded_from or {}).get("source")
    folder = None if source is None else locate(source) / OWN
    if folder is None or not folder.is_dir():
        raise UsageError(
            "this model sees depths, and its files have no estimator of them; give a map, depth=FILE (--depth), or the folder "
            "of a depth model of transformers"
        )
    return folder


def _estimated(folder: Path) -> _Near:
    model = DepthModel.load(folder)
    return lambda image, size: model.nearness(image, size)[None, None]


def _mapped(image: Image.Image, size: tuple[int, int]) -> _Near:
    """By a map, brighter where it is nearer, of an image of this size before it was extended.

    Raises:
        UsageError: of other proportions.
    """
    width, height = size
    if abs(image.height * width / image.width - height) > 1:
        raise UsageError(
            f"expected a depth map in the proportions of the image, {width} x {height} pixels, found {image.width} x "
            f"{image.height}"
        )
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    values = np.asarray(image if is_deep else as_rgb(image).convert("L")).astype(np.float32)
    if not np.isfinite(values).all():
        raise UsageError("expected a depth map of finite numbers, found NaN or infinity")
    values = torch.from_numpy(values)[None, None]

    def near(extended: Image.Image, cells: tuple[int, int]) -> Tensor:
        right = round(values.shape[-1] * extended.width / width) - values.shape[-1]
        bottom = round(values.shape[-2] * extended.height / height) - values.shape[-2]
        whole = F.pad(values, (0, right, 0, bottom), mode="replicate")
        return F.interpolate(whole, cells, mode="bicubic", align_corners=False)

    return near
