"""What an inversion leaves behind: a file that every editor takes in place of the image."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.hashing import file_hash
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import CheckpointError, DataError, UsageError
from latentdiff.files import atomic_path
from latentdiff.image import decibels
from latentdiff.reading.json import parse_json
from latentdiff.reading.plain import exists
from latentdiff.reading.safetensors import read_header
from latentdiff.request.sources import ImageInput

FORMAT = "latentdiff.inversion"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """The way of one image through the noise levels.

    latents: (S + 1, C, h, w), float32: the trajectory, noisiest first; the last are those of the image.
    levels: of the latents, in the same order.
    embeddings: (1, L, C) of the prompt that was followed.
    nulls: (S, L, C), the null embedding of each step, where null-text inversion found them.
    partner: (C, h, w), the second one of EDICT's pair at the noisiest level.
    size: (width, height) of the image in pixels.
    settings: how it was made, as JSON values.
    reconstruction_db, floor_db: PSNR against the image of what sampling leads back to, and of what the VAE alone
        keeps.
    source: {"file": name, "sha256": ...} of the image.
    """

    latents: Tensor
    levels: tuple[Level, ...]
    embeddings: Tensor
    prompt: str
    method: str
    model: str
    model_hash: str
    size: tuple[int, int]
    nulls: Tensor | None = None
    partner: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reconstruction_db: float | None = None
    floor_db: float | None = None
    source: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def thinned(self, steps: int) -> Inversion:
        """The same trajectory in fewer steps: levels at equal distances of index, both ends included.

        Raises:
            UsageError: more steps than were stored, or an artefact that holds for its own steps only.
        """
        if steps == self.steps:
            return self
        if not 1 <= steps <= self.steps:
            raise UsageError(f"expected 1 to {self.steps} steps, as many as the inversion has, found {steps}")
        if self.partner is not None:
            raise UsageError(
                f"an EDICT inversion is exact in its own {self.steps} steps only, found {steps}; leave --steps away"
            )
        kept = [round(index * self.steps / steps) for index in range(steps + 1)]
        return replace(self, latents=self.latents[kept], levels=tuple(self.levels[i] for i in kept), nulls=None)

    def at(self, level: Level) -> Tensor:
        """The latents (1, C, h, w) at one of its noise levels.

        Raises:
            UsageError: it has none there.
        """
        for index, own in enumerate(self.levels):
            if own.is_clean == level.is_clean and (own.is_clean or math.isclose(own.t, level.t, abs_tol=1e-3)):
                return self.latents[index : index + 1]
        raise UsageError(
            f"the inversion holds no latents at timestep {level.t:g}, where these steps pass; take its own "
            f"{self.steps} steps or a part of them such as {self.steps} / 2, the spacing with which it was inverted, and the "
            "sampler ddim, ddpm or euler"
        )

    def noise_statistics(self) -> dict[str, float]:
        """Mean, standard deviation and neighbours' correlation of the noisiest latents; of unit noise, 0, 1 and 0."""
        x = self.latents[0].cpu().double()
        x_c = x - x.mean()
        neighbours = ((x_c[..., 1:] * x_c[..., :-1]).mean() + (x_c[..., 1:, :] * x_c[..., :-1, :]).mean()) / 2
        return {
            "mean": x.mean().item(),
            "std": x.std().item(),
            "autocorrelation": (neighbours / x_c.square().mean()).item(),
        }

    def check_model(self, model_hash: str) -> None:
        """Make sure that the model about to edit is the one that inverted.

        Raises:
            CheckpointError: it is another one.
        """
        if model_hash != self.model_hash:
            raise CheckpointError(
                f"the inversion was made with the model {self.model!r} (hash {self.model_hash[:10] or 'unknown'}), "
                f"this one has the hash {model_hash[:10] or 'unknown'}; name that model with --model, or invert again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file with its settings in the metadata."""
        tensors = {"latents": self.latents, "embeddings": self.embeddings, "nulls": self.nulls, "partner": self.partner}
        plain = {key: value for key, value in vars(self).items() if key not in tensors} | {
            "levels": [asdict(level) for level in self.levels]
        }
        metadata = {"format": FORMAT, "schema": str(SCHEMA), "inversion": json.dumps(plain)}
        kept = {key: value.float().cpu().contiguous() for key, value in tensors.items() if value is not None}
        with atomic_path(path) as temporary:
            save_file(kept, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Inversion:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, it is damaged, no inversion, or comes from a newer latentdiff.
        """
        name = os.fspath(path)
        if not exists(Path(path)):
            raise DataError(f"no inversion at {name}")
        try:
            file = read_tensors(Path(path))
        except CheckpointError as error:
            raise DataError(
                f"cannot read {name} as an inversion, a safetensors file of `latentdiff invert`: {error}"
            ) from error
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            raise DataError(
                f"expected an inversion made by `latentdiff invert`, found another safetensors file: {name}"
            )
        if metadata.get("schema") != str(SCHEMA):
            raise DataError(f"{name} was written by a newer latentdiff; update latentdiff to read it")
        # Two images that are equal are infinitely alike, in dB.
        plain = parse_json(
            metadata.get("inversion", ""),
            f"the inversion of {name}",
            DataError,
            remedy="invert the image again",
            finite=False,
        )
        try:
            found = cls(**_checked(plain, file.tensors))
            _check_whole(found)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{name} is a damaged inversion: {error}; invert the image again") from error
        return found


def is_inversion(path: str | os.PathLike[str]) -> bool:
    """Whether `path` holds an inversion, and not an image."""
    try:
        return read_header(Path(path)).metadata.get("format") == FORMAT
    except CheckpointError:
        return False


def given_inversion(source: ImageInput | Inversion) -> tuple[Inversion, dict[str, dict[str, str]]] | ImageInput:
    """The inversion that is given in place of an image, and what recipes say of where it came from; or the image.

    One in memory is known by the image that it was made of, from which it can be made again.

    Raises:
        DataError: it is damaged.
    """
    if isinstance(source, Inversion):
        return source, {"image": source.source}
    if isinstance(source, (str, os.PathLike)) and is_inversion(source):
        return Inversion.load(source), {"inversion": {"file": Path(source).name, "sha256": file_hash(Path(source))}}
    return source


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images in [-1, 1], each (…, H, W); infinite if they are equal."""
    return decibels((a.double() - b.double()).square().mean().item(), peak=2.0)


# What each entry of the metadata is.
_KINDS: dict[str, Any] = {
    "levels": list, "prompt": str, "method": str, "model": str, "model_hash": str, "size": list, "settings": dict,
    "reconstruction_db": (int, float, type(None)), "floor_db": (int, float, type(None)), "source": dict,
}  # fmt: skip
_LARGEST_SIDE = 2**16


def _checked(plain: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of an inversion, each of its type and within sense; ValueError says which is not."""
    if not isinstance(plain, dict):
        raise ValueError(f"expected its fields, found a {type(plain).__name__}")
    for name, value in plain.items():
        if name not in _KINDS or isinstance(value, bool) or not isinstance(value, _KINDS[name]):
            raise ValueError(f"the field {name} is unknown or of the wrong type")
    if len(plain["size"]) != 2 or any(type(side) is not int or not 0 < side <= _LARGEST_SIDE for side in plain["size"]):
        raise ValueError(f"expected width and height as size, found {str(plain['size'])[:40]}")
    if not all(isinstance(text, str) for text in plain.get("source", {}).values()):
        raise ValueError("expected texts as source")
    if unknown := tensors.keys() - {"latents", "embeddings", "nulls", "partner"}:
        raise ValueError(f"unknown tensor {min(unknown)}")
    levels = tuple(_level(level) for level in plain["levels"])
    return {**tensors, **plain, "levels": levels, "size": tuple(plain["size"])}


def _level(plain: Any) -> Level:
    level = Level(**plain)
    numbers = [
        value for value in (level.t, level.alpha_cumprod) if type(value) in (int, float) and math.isfinite(value)
    ]
    if len(numbers) != 2 or level.t < 0 or not 0 <= level.alpha_cumprod <= 1 or type(level.is_clean) is not bool:
        raise ValueError(f"expected a level of a timestep and a share of signal, found {str(plain)[:80]}")
    return level


def _check_whole(found: Inversion) -> None:
    steps = found.steps
    if steps < 1:
        raise ValueError(f"expected two levels or more, found {steps + 1}")
    sides = tuple(found.latents.shape[1:])
    width = tuple(found.embeddings.shape[1:])
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], int]] = {
        "latents": (found.latents, (steps + 1, *sides), 4),
        "embeddings": (found.embeddings, (1, *width), 3),
        "nulls": (found.nulls, (steps, *width), 3),
        "partner": (found.partner, sides, 3),
    }
    for name, (tensor, shape, dimensions) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.ndim != dimensions or not tensor.numel():
            raise ValueError(f"expected {name} of shape {shape}, found {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{name} are not finite numbers")
