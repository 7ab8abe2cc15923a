"""An IP-Adapter with its image encoder, and an image prompt: the two with images to resemble, and how strongly."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from latentdiff.checkpoints.hashing import place_hash
from latentdiff.checkpoints.image_encoder import (
    ImageEncoderWeights,
    places_beside,
    read_image_encoder,
    read_image_encoder_config,
)
from latentdiff.checkpoints.ip_adapter import IPAdapterWeights, read_ip_adapter
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.networks.image_encoder import ImageEncoderConfig
from latentdiff.networks.ip_adapter import IPAdapterConfig
from latentdiff.request.calls import public
from latentdiff.request.domains import BlockScales, Place, Real
from latentdiff.request.options import BLOCK_PRESETS
from latentdiff.request.recorded import RecordedImagePrompt
from latentdiff.request.sources import ImageInput, Source, open_source

_SETTINGS = ("scale", "start", "end", "blocks")
_REMEMBERED = 16  # images, of about a megabyte each
_ONLY_IN_XL = "up_blocks.0."  # has no attention in Stable Diffusion 1.x and 2.x


class IPAdapter:
    """An IP-Adapter of Stable Diffusion 1.x, 2.x or XL and its image encoder, mapped from their files; weights are read where
    they are used.

    faces = IPAdapter.load("IP-Adapter/models/ip-adapter-plus_sd15.bin")
    pipe("a man in a garden", image_prompts=[faces("face.png", scale=0.6)])
    """

    def __init__(self, weights: IPAdapterWeights, encoder: ImageEncoderWeights) -> None:
        self.weights, self.encoder = weights, encoder
        self.remembered: dict[Hashable, Tensor] = {}  # what the encoder gave last

    def remember(self, key: Hashable, seen: Tensor) -> None:
        """Keep what the encoder gave, and of others the last few."""
        while len(self.remembered) >= _REMEMBERED:
            del self.remembered[next(iter(self.remembered))]
        self.remembered[key] = seen

    @classmethod
    @public(source=Place(), image_encoder=Place())
    def load(cls, source: str | os.PathLike[str], *, image_encoder: str | os.PathLike[str] | None = None) -> Self:
        """Map an IP-Adapter: plain, Plus, Plus for faces or full-face.

        Args:
            source: a file, `.bin` or `.safetensors`, or a folder with one.
            image_encoder: the folder of a CLIPVisionModelWithProjection. None looks beside the file as its authors lay
                them out: `image_encoder`, or of SDXL's `vit-h` adapters `../models/image_encoder`.

        Raises:
            CheckpointError: nothing is there, it is damaged, incomplete or something else, or the encoder is of another width.
            ConfigError: the encoder is of another architecture.
        """
        weights = read_ip_adapter(source)
        folder = _encoder_for(weights) if image_encoder is None else Path(os.path.expanduser(os.fspath(image_encoder)))
        _check_encoder(weights, read_image_encoder_config(folder), folder)
        return cls(weights, read_image_encoder(folder))

    @public(scale=Real(0), start=Real(0, 1), end=Real(0, 1), blocks=BlockScales(tuple(BLOCK_PRESETS)))
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        blocks: str | Mapping[str, float] | None = None,
        negative: ImageInput | None = None,
    ) -> ImagePrompt:
        """An image prompt by this adapter.

        Args:
            images: what to resemble; several are seen as one. The middle square is seen, at the size of the encoder.
            scale: how strongly it acts, 0 or more.
            start, end: the share of the steps in which it acts, 0 to 1.
            blocks: where it acts: "style" or "layout" of SDXL (InstantStyle, Wang et al. 2024), or how strongly by
                beginnings of names, {"up_blocks.0.attentions.1": 1.0}, times `scale`; other blocks are left alone.
                None is all of them.
            negative: what not to resemble, where the negative prompt acts; none is an image that says nothing.

        Raises:
            UsageError: a value outside its domain, no image, or `start` is not before `end`.
            DataError: a file is missing or no image.
        """
        if start >= end:
            raise UsageError(f"expected the start of an image prompt before its end, found {start} and {end}")
        given = list(images) if isinstance(images, list | tuple) else [images]
        if not given:
            raise UsageError("expected an image to resemble, or several, found none")
        return ImagePrompt(
            adapter=self,
            images=tuple(open_source(image) for image in given),
            negative=None if negative is None else open_source(negative),
            scale=scale,
            start=start,
            end=end,
            blocks=blocks,
        )

    @cached_property
    def entries(self) -> dict[str, dict[str, str]]:
        """What recipes say of its files: {"file": name, "sha256": of its weights}."""
        return {
            name: {"file": path.name, "sha256": place_hash(path)}
            for name, path in (("adapter", self.weights.path), ("encoder", self.encoder.path))
        }

    def __repr__(self) -> str:
        """Its file and what it was made for."""
        config = self.weights.config
        return f"<IPAdapter {self.weights.path.name}, {config.kind}, text width {config.width}>"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePrompt:
    """Images to resemble; see `IPAdapter.__call__`, which makes it."""

    is_image_prompt: ClassVar[bool] = True  # what the domain of the option `image_prompts` asks
    adapter: IPAdapter
    images: tuple[Source, ...]
    negative: Source | None
    scale: float
    start: float
    end: float
    blocks: str | Mapping[str, float] | None

    def describe(self) -> RecordedImagePrompt:
        """What a recipe holds of it."""
        return RecordedImagePrompt(
            **self.adapter.entries,
            images=[source.entry for source in self.images],
            negative=None if self.negative is None else self.negative.entry,
            **{name: getattr(self, name) for name in _SETTINGS},
        )

    def scales(self, attentions: Sequence[str]) -> dict[str, float]:
        """How strongly it acts on cross-attentions, by their names; those on which it does not are left out.

        Raises:
            UsageError: there are no such blocks.
        """
        if self.blocks is None:
            found = dict.fromkeys(attentions, self.scale)
            return {name: scale for name, scale in found.items() if scale}
        given = BLOCK_PRESETS[self.blocks] if isinstance(self.blocks, str) else self.blocks
        if isinstance(self.blocks, str) and not any(name.startswith(_ONLY_IN_XL) for name in attentions):
            raise UsageError(
                f"the blocks of {self.blocks} are known for SDXL alone; name blocks of this model, as in up_blocks.1=1"
            )
        scales: dict[str, float] = {}
        for start, factor in given.items():
            named = [name for name in attentions if f"{name}.".startswith(f"{start}.")]
            if not named:
                raise UsageError(
                    "expected names of blocks with cross-attention, as "
                    f"{', '.join(_transformers(attentions)[:3])}, found {start!r}"
                )
            scales |= dict.fromkeys(named, factor * self.scale)
        return {name: scale for name, scale in scales.items() if scale}


def image_prompts_again(
    recorded: Sequence[RecordedImagePrompt], place_of: Callable[[str], os.PathLike[str]]
) -> list[ImagePrompt]:
    """The image prompts of a recipe once more.

    Args:
        place_of: a role, see `recipe.Recipe.roles` -> the file or folder.
    """
    adapters: dict[tuple[str, str], IPAdapter] = {}
    prompts = []
    for number, entry in enumerate(recorded, 1):
        roles = entry.roles(number)
        places = {role: Path(place_of(role)) for role in roles}
        key = str(places[f"ip_adapter{number}"]), str(places[f"image_encoder{number}"])
        if key not in adapters:
            adapters[key] = IPAdapter.load(key[0], image_encoder=key[1])
        images = [place for role, place in places.items() if role.startswith("image_prompt")]
        settings: dict[str, Any] = {name: getattr(entry, name) for name in _SETTINGS}
        prompts.append(adapters[key](images, negative=places.get(f"negative_image_prompt{number}"), **settings))
    return prompts


def _encoder_for(weights: IPAdapterWeights) -> Path:
    places = list(places_beside(weights.path))
    found = [place for place in places if (place / "config.json").is_file()]
    for place in found:
        if _width_seen(weights.config, read_image_encoder_config(place)) == weights.config.image_width:
            return place
    if found:
        return found[0]  # of another width, which is an error that tells both
    raise CheckpointError(
        f"an IP-Adapter needs its image encoder, which is not at {places[0]}; say where it is with image_encoder=FOLDER "
        "(--image-encoder)"
    )


def _check_encoder(weights: IPAdapterWeights, config: ImageEncoderConfig, folder: Path) -> None:
    expected, found = weights.config.image_width, _width_seen(weights.config, config)
    if expected != found:
        raise CheckpointError(
            f"{weights.path.name} needs an image encoder of width {expected}, found {found} in {folder}; take the one that it "
            "was made with (1280 and 1024: ViT-H, 1664 and 1280: ViT-bigG)"
        )


def _width_seen(adapter: IPAdapterConfig, encoder: ImageEncoderConfig) -> int:
    return encoder.projection_dim if adapter.kind == "plain" else encoder.hidden_size


def _transformers(attentions: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".transformer_blocks.")[0] for name in attentions))
