"""A ControlNet as its file has it, and a control: a ControlNet with an image to follow, and how strongly."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

from PIL import Image

from latentdiff.adapters.control.preparation import prepared
from latentdiff.checkpoints.control import ControlWeights, read_control
from latentdiff.checkpoints.hashing import place_hash
from latentdiff.checkpoints.t2i_adapter import T2IAdapterWeights, read_t2i_adapter
from latentdiff.errors import UsageError
from latentdiff.request.calls import public
from latentdiff.request.domains import Choice, Place, Real, YesNo
from latentdiff.request.options import CONTROL_MODES, PREPARATIONS
from latentdiff.request.recorded import RecordedControl
from latentdiff.request.sources import ImageInput, open_source

_SETTINGS = ("scale", "start", "end", "guess", "prepare", "mode")
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class ControlNet:
    """A ControlNet of Stable Diffusion 1.x, 2.x or XL, or a T2I-Adapter, mapped from its file; its weights are read where it
    is used.

    edges = ControlNet.load("control_v11p_sd15_canny.safetensors")
    pipe("a house", controls=[edges("edges.png", scale=0.8, end=0.6)])
    """

    def __init__(self, weights: ControlWeights | T2IAdapterWeights) -> None:
        self.weights = weights

    @classmethod
    @public(source=Place(), pools=YesNo())
    def load(cls, source: str | os.PathLike[str], *, pools: bool | None = None) -> Self:
        """Map a ControlNet, or a T2I-Adapter.

        Args:
            source: a diffusers folder, a hub id, or a file in the diffusers or the original layout; also one with
                differences, which are added to the U-Net that it is used on.
            pools: whether its outputs are averaged over the image, as those of the shuffle models are. None goes by its
                configuration, or by "shuffle" in the name of a file.

        Raises:
            CheckpointError: nothing is there, or it is damaged, incomplete, or something else.
            ConfigError: it is of another architecture.
            UsageError: `pools` of a T2I-Adapter.
        """
        adapter = read_t2i_adapter(source)
        if adapter is None:
            return cls(read_control(source, pools=pools))
        if pools is not None:
            raise UsageError(f"{adapter.path.name} is a T2I-Adapter, whose outputs are not averaged; leave pools out")
        return cls(adapter)

    @public(
        scale=Real(0),
        start=Real(0, 1),
        end=Real(0, 1),
        guess=YesNo(),
        prepare=Choice(PREPARATIONS),
        mode=Choice(CONTROL_MODES),
    )
    def __call__(
        self,
        image: ImageInput,
        *,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        guess: bool = False,
        mask: ImageInput | None = None,
        prepare: str | None = None,
        mode: str | None = None,
    ) -> Control:
        """A control by this network.

        Args:
            image: the hint, or what it is prepared from; of the proportions of the image that is made.
            scale: how strongly it acts, 0 or more.
            start, end: the share of the steps in which it acts, 0 to 1.
            guess: act on the prompt alone and less above the middle, so that the hint says what an empty prompt does not.
            mask: of the image's size, white where an inpainting ControlNet is to paint.
            prepare: make the hint of the image first: "canny", ...; see `latentdiff.adapters.control.preparation`.
            mode: what kind of hint it is, for a network that was trained on several; None is what `prepare` makes.

        Raises:
            UsageError: a value outside its domain, `start` is not before `end`, or no `mode` where there are several.
            DataError: a file is missing or no image.
            MissingDependencyError: what prepares the hint is not installed.
        """
        if start >= end:
            raise UsageError(f"expected the start of a control before its end, found {start} and {end}")
        if isinstance(self.weights, T2IAdapterWeights) and (guess or mask is not None):
            raise UsageError(
                f"{self.weights.path.name} is a T2I-Adapter, which knows no guess mode and no mask; leave guess and mask out"
            )
        mode = mode or (prepare if self.modes else None)
        self.index_of(mode)
        source, hidden = open_source(image), None if mask is None else open_source(mask)
        return Control(
            model=self,
            image=prepared(source.image, prepare) if prepare else source.image,
            mask=None if hidden is None else hidden.image,
            entries={"image": source.entry} | ({} if hidden is None else {"mask": hidden.entry}),
            scale=scale,
            start=start,
            end=end,
            guess=guess,
            prepare=prepare,
            mode=mode,
        )

    @property
    def modes(self) -> tuple[str, ...]:
        """The kinds of hints that it is told apart; none for a network that was trained on one."""
        return CONTROL_MODES[: self.weights.config.modes] if isinstance(self.weights, ControlWeights) else ()

    def index_of(self, mode: str | None) -> int | None:
        """The place of a kind of hint among `modes`; None for a network that was trained on one.

        Raises:
            UsageError: it was not trained on that, or none is named of several.
        """
        if mode in self.modes or (mode is None and not self.modes):
            return self.modes.index(mode) if mode else None
        name = self.weights.path.name
        if not self.modes:
            raise UsageError(f"{name} is a ControlNet for one kind of hint; leave mode out, found {mode!r}")
        raise UsageError(
            f"{name} takes several kinds of hints; expected mode to be one of {', '.join(self.modes)}, found {mode}"
        )

    @cached_property
    def entry(self) -> dict[str, str]:
        """What recipes say of it: {"file": name, "sha256": of its weights}."""
        return {"file": self.weights.path.name, "sha256": place_hash(self.weights.path)}

    def __repr__(self) -> str:
        """Its file and what it was made for."""
        if isinstance(self.weights, T2IAdapterWeights):
            return f"<ControlNet {self.weights.path.name}, a T2I-Adapter>"
        return f"<ControlNet {self.weights.path.name}, text width {self.weights.config.unet.cross_attention_dim}>"


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet with its hint; see `ControlNet.__call__`.

    entries: what recipes say of the image and the mask.
    """

    is_control: ClassVar[bool] = True  # what the domain of the option `controls` asks
    model: ControlNet
    image: Image.Image
    mask: Image.Image | None
    entries: dict[str, dict[str, str]]
    scale: float
    start: float
    end: float
    guess: bool
    prepare: str | None
    mode: str | None

    def describe(self) -> RecordedControl:
        """What a recipe holds of it."""
        return RecordedControl(
            model=self.model.entry, **self.entries, **{name: getattr(self, name) for name in _SETTINGS}
        )

    def cropped(self, box: Box, size: tuple[int, int], to: tuple[int, int]) -> Control:
        """The same for a part of what is made, `box` of an image of `size`, that is made at the size `to`."""
        scaled = [side * own / whole for side, own, whole in zip(box, self.image.size * 2, size * 2, strict=True)]

        def cut(image: Image.Image, how: Image.Resampling) -> Image.Image:
            return image.resize(to, how, box=tuple(scaled))

        mask = None if self.mask is None else cut(self.mask, Image.Resampling.NEAREST)
        return replace(self, image=cut(self.image.convert("RGB"), Image.Resampling.LANCZOS), mask=mask)


def controls_again(recorded: Sequence[RecordedControl], place_of: Callable[[str], os.PathLike[str]]) -> list[Control]:
    """The controls of a recipe once more.

    Args:
        place_of: a role, see `recipe.Recipe.roles` -> the file or folder.
    """
    controls = []
    for number, entry in enumerate(recorded, 1):
        network = ControlNet.load(place_of(f"control_model{number}"))
        mask = None if entry.mask is None else place_of(f"control_mask{number}")
        settings: dict[str, Any] = {name: getattr(entry, name) for name in _SETTINGS}
        controls.append(network(place_of(f"control_image{number}"), mask=mask, **settings))
    return controls
