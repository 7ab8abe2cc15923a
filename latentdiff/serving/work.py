"""What the server's process and its workers say to each other. Loads no heavy library.

    server -> worker: a list of Pieces to be made at once; Cancel and Peek while they are; None to stop
    worker -> server: Ready or Broken; Loaded, Step, Preview, Made and Failed; Done after each list
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

MaskKind = Literal["white", "transparent"]  # what of a mask is to be painted
Fit = Literal["resize", "crop", "pad"]
FailureKind = Literal["request", "internal", "cancelled", "worker"]  # whose fault it was


@dataclass(frozen=True)
class Sent:
    """A file as it was sent; `name` is what recipes call it, "" if nobody can find it by a name."""

    file: bytes
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Following:
    """An image that a ControlNet is to follow.

    model: the file or folder of the ControlNet.
    prepare: what to make the hint by, one of `PREPARATIONS`; preparation: options of that.
    resolution: the shorter side in pixels at which the hint is prepared; None is that of the image.
    fit: bring the hint to the size of what is made: by "resize", "crop" or "pad". None leaves that to the pipeline.
    scale, start, end, guess, mode: see `ControlNet.__call__`.
    """

    model: str
    image: Sent
    prepare: str | None = None
    preparation: Mapping[str, int] = field(default_factory=dict[str, int])
    resolution: int | None = None
    fit: Fit | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    mode: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resembling:
    """An image that is to be resembled.

    adapter: the file of the IP-Adapter.
    scale, start, end: see `IPAdapter.__call__`.
    """

    adapter: str
    image: Sent
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What the images of one request have in common.

    options: of `GenerateOptions`, without prompts, seed, counts and size.
    lenient: leave out the options that belong to other samplers, as AUTOMATIC1111's interface does.
    image: what to begin from; mask: what to paint there.
    controls, image_prompts: what ControlNets follow and IP-Adapters see, in their order.
    task: the other options of `image_to_image` or `inpaint`.
    fit: bring image and mask to (width, height) first: by "resize", "crop" or "pad".
    loras: name -> file, of those that the prompt names.
    previews: images of what is expected, to be sent on the way, evenly over the steps.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lenient: bool = False
    image: Sent | None = None
    mask: Sent | None = None
    mask_kind: MaskKind = "white"
    invert_mask: bool = False
    task: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fit: Fit | None = None
    controls: tuple[Following, ...] = ()
    image_prompts: tuple[Resembling, ...] = ()
    loras: Mapping[str, str] = field(default_factory=dict[str, str])
    tags: tuple[Any, ...] = ()
    previews: int = 0
    suffix: str = ".png"
    quality: int = 95


@dataclass(frozen=True)
class Piece:
    """One image to be made; `number` is its own for as long as the server lives."""

    number: int
    seed: int
    draw: Draw
    is_alone: bool = False

    @property
    def shape(self) -> object:
        """Pieces of equal shapes may be made in one batch; those that images are sent for only with
        others of the same request."""
        draw = self.draw
        if self.is_alone:
            return self.number
        if draw.image is not None or draw.controls or draw.image_prompts:
            return id(draw)
        return (draw.model, draw.width, draw.height, draw.lenient, draw.tags, repr(sorted(draw.options.items())))

    def alone(self) -> Piece:
        """The same, not to be made with others."""
        return replace(self, is_alone=True)


@dataclass(frozen=True)
class Cancel:
    """Make these no further."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Peek:
    """Send a preview of this one after the next step."""

    number: int


@dataclass(frozen=True)
class Ready:
    """The worker has loaded its first model."""

    device: str


@dataclass(frozen=True)
class Broken:
    """The worker cannot work at all."""

    message: str


@dataclass(frozen=True)
class Loaded:
    """A model was loaded; what interfaces tell of it. `size` is (width, height) of its training."""

    name: str
    size: tuple[int, int]
    hash: str
    steps: int
    guidance: float
    sampler: str


@dataclass(frozen=True)
class Step:
    """So many steps of the images that are being made are done."""

    numbers: tuple[int, ...]
    done: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """What is expected; `index` counts from 0, and is None where one was asked for on the way."""

    number: int
    index: int | None
    png: bytes


@dataclass(frozen=True)
class Made:
    """An image as a file, and its recipe."""

    number: int
    file: bytes
    width: int
    height: int
    recipe: str
    parameters: str


@dataclass(frozen=True)
class Failed:
    """An image that is not made, and why."""

    number: int
    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Done:
    """The worker waits for the next list."""
