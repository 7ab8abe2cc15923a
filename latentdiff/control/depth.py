"""Depths as hints: how near things are, by a model of transformers that the user names."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import CheckpointError
from latentdiff.image import as_rgb

# Models that say how far things are, in metres; the others say how near.
_METRIC = ("zoedepth", "depth_pro", "glpn")


class DepthModel:
    """A model that sees depths in a single image.

    depth = DepthModel.load("Depth-Anything-V2-Small-hf")
    depth(Image.open("photo.png")).save("depth.png")
    """

    def __init__(self, network: Any, processor: Any) -> None:
        self._network, self._processor = network.eval(), processor

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a folder of `AutoModelForDepthEstimation`; nothing is downloaded, and no code in it is run.

        Raises:
            CheckpointError: it holds no such model.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        how = {"local_files_only": True, "trust_remote_code": False}
        try:
            network = AutoModelForDepthEstimation.from_pretrained(folder, use_safetensors=True, **how)
            processor = AutoImageProcessor.from_pretrained(folder, **how)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"expected a folder of a depth model of transformers in {os.fspath(folder)}, with safetensors: {reason}"
            ) from error
        return cls(network, processor)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Image.Image:
        """Greys of the image's size: what is nearest is white, what is farthest black."""
        image = as_rgb(image)
        found: Tensor = self._network(**self._processor(images=image, return_tensors="pt")).predicted_depth  # (1, h, w)
        sized = F.interpolate(found[:, None], (image.height, image.width), mode="bicubic", align_corners=False)[0, 0]
        config = self._network.config
        if config.model_type in _METRIC or getattr(config, "depth_estimation_type", "") == "metric":
            sized = 1 / sized.clamp(min=1e-3)
        low, high = sized.min(), sized.max()
        greys = (sized - low) / (high - low).clamp(min=1e-6) * 255
        return Image.fromarray(greys.round().to(torch.uint8).numpy()).convert("RGB")
