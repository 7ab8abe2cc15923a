"""An upscaler: a network of the ESRGAN family (Wang et al. 2018, 2021) from a file, built by spandrel."""

from __future__ import annotations

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints.hashing import place_hash
from latentdiff.checkpoints.modules import NoInitialization
from latentdiff.checkpoints.upscalers import read_upscaler
from latentdiff.errors import CheckpointError, MissingDependencyError, NotFiniteError, UsageError
from latentdiff.networks.device import explained_out_of_memory, pick_device
from latentdiff.networks.upscaling.tiles import SMALLEST_TILE, in_tiles
from latentdiff.request.calls import public
from latentdiff.request.domains import Place, Whole

TILE = 512


class Upscaler:
    """A network that makes images `factor` times larger.

    four = Upscaler.load("4x.safetensors")
    large = four(image)
    """

    def __init__(self, network: Any, path: Path) -> None:
        self.network, self.path = network, path

    @classmethod
    @public(source=Place())
    def load(cls, source: str | os.PathLike[str], *, device: str | torch.device = "auto") -> Self:
        """Read an upscaler of the ESRGAN family from a file, `.safetensors` or `.pth`.

        Raises:
            CheckpointError: there is no such file, it is damaged, or something else.
            MissingDependencyError: spandrel is not installed.
        """
        path, where = Path(source), pick_device(device)
        if not path.is_file():
            raise CheckpointError(f"no upscaler at {path}; expected a file, .safetensors or .pth")
        tensors = {name: tensor.float() for name, tensor in read_upscaler(path).items() if tensor.is_floating_point()}
        network = _built(tensors, path)
        network.model.to(where).eval()
        return cls(network, path)

    @property
    def factor(self) -> int:
        """How many times larger images become."""
        return int(self.network.scale)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.model.parameters()).device

    @cached_property
    def entry(self) -> dict[str, str]:
        """What recipes say of it: {"file": name, "sha256": of its content}."""
        return {"file": self.path.name, "sha256": place_hash(self.path)}

    @public(tile=Whole(1))
    @explained_out_of_memory()
    def __call__(self, image: Image.Image, *, tile: int = TILE) -> Image.Image:
        """The image, RGB of 8 bits, `factor` times larger.

        Args:
            tile: side in pixels of what the network sees at once; memory grows with its square.

        Raises:
            UsageError: the tile is too small.
            NotFiniteError: the network gives NaN or infinity.
        """
        if tile < SMALLEST_TILE:
            raise UsageError(f"expected a tile of {SMALLEST_TILE} pixels or more, as tiles overlap, found {tile}")
        multiple = self.network.size_requirements.multiple_of
        return Image.fromarray(in_tiles(np.asarray(image), self.factor, tile, self._enlarged, multiple=multiple))

    def _enlarged(self, pixels: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.array(pixels)).to(self.device).permute(2, 0, 1)[None] / 255.0
        found: Tensor = self.network(x)  # (1, 3, h factor, w factor), in [0, 1]
        if not torch.isfinite(found).all():
            raise NotFiniteError(f"the upscaler {self.path.name} must give finite colours, found NaN or infinity")
        return (found[0] * 255.0).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    def __repr__(self) -> str:
        """Its file and how much larger it makes images."""
        return f"<Upscaler {self.path.name}, {self.factor}x>"


def _built(tensors: dict[str, Tensor], path: Path) -> Any:
    """spandrel's descriptor of a network with these weights.

    First without memory: what does not fit its own file, as too many layers, fails before it costs any.
    """
    spandrel = _spandrel()
    try:
        with NoInitialization():
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                spandrel.MAIN_REGISTRY.load(tensors)
            found = spandrel.MAIN_REGISTRY.load(tensors)
    except spandrel.UnsupportedModelError:
        shown = ", ".join(list(tensors)[:3])
        raise CheckpointError(f"expected an upscaler, as ESRGAN, in {path}, found {shown}") from None
    except Exception as error:  # of the many authors whose code spandrel gathers
        reason = str(error).splitlines()[-1].strip() if str(error) else ""
        raise CheckpointError(
            f"the upscaler in {path} is incomplete or of an unknown form: {reason or type(error).__name__}"
        ) from error
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.tiling is not spandrel.ModelTiling.SUPPORTED:
        raise CheckpointError(
            f"expected an upscaler that works in tiles, as ESRGAN, in {path}, found {found.architecture.name}"
        )
    if (found.input_channels, found.output_channels) != (3, 3):
        raise CheckpointError(
            f"expected an upscaler of colour images in {path}, found {found.input_channels} channels in and "
            f"{found.output_channels} out"
        )
    return found


def _spandrel() -> Any:
    try:
        import spandrel
    except ImportError as error:
        if error.name == "spandrel":
            raise MissingDependencyError(
                "upscalers need spandrel, which is not installed; pip install 'latentdiff[upscale]'"
            ) from error
        raise MissingDependencyError(
            f"spandrel needs {error.name}, which is not installed; pip install {error.name}"
        ) from error
    except RuntimeError as error:  # a torchvision for another torch
        raise MissingDependencyError(
            f"spandrel does not work here ({str(error).splitlines()[0]}); install the torchvision that was made for "
            f"torch {torch.__version__}"
        ) from error
    return spandrel
