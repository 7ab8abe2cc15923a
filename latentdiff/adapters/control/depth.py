"""Depths as hints: how near things are, by a model of transformers that the user names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import CheckpointError
from latentdiff.image import as_rgb

# Models that say how far things are, in metres; the others say how near.
_METRIC = ("zoedepth", "depth_pro", "glpn")
_PROCESSOR = "preprocessor_config.json"


class DepthModel:
    """A model that sees depths in a single image.

    depth = DepthModel.load("Depth-Anything-V2-Small-hf")
    depth(Image.open("photo.png")).save("depth.png")
    """

    def __init__(self, network: Any, processor: Any) -> None:
        self._network, self._processor = network.float().eval(), processor

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
            processor = AutoImageProcessor.from_pretrained(_processor_folder(Path(folder)), **how)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"expected a folder of a depth model of transformers in {os.fspath(folder)}, with safetensors: {reason}"
            ) from error
        return cls(network, processor)

    @torch.no_grad()
    def nearness(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """How near the places of an image are, in the model's own unit, float32 of (height, width) `size`."""
        given = self._processor(images=as_rgb(image), return_tensors="pt")
        found: Tensor = self._network(**given).predicted_depth  # (1, h, w)
        sized = F.interpolate(found[:, None], size, mode="bicubic", align_corners=False)[0, 0]
        config = self._network.config
        is_metric = config.model_type in _METRIC or getattr(config, "depth_estimation_type", "") == "metric"
        return 1 / sized.clamp(min=1e-3) if is_metric else sized

    def __call__(self, image: Image.Image) -> Image.Image:
        """Greys of the image's size: what is nearest is white, what is farthest black."""
        sized = self.nearness(image, (image.height, image.width))
        low, high = sized.min(), sized.max()
        greys = (sized - low) / (high - low).clamp(min=1e-6) * 255
        return Image.fromarray(greys.round().to(torch.uint8).numpy()).convert("RGB")


def _processor_folder(folder: Path) -> Path:
    """What prepares images lies with the model; in the folder of Stable Diffusion's depth model, beside it."""
    beside = folder.parent / "feature_extractor"
    return beside if not (folder / _PROCESSOR).exists() and (beside / _PROCESSOR).exists() else folder
