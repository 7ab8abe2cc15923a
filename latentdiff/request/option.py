"""What there is to know of an option of generation, and the headings under which help and the web page list them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Kept:
    """A field of recipes.

    kind: its type there, where each image has a recipe of its own.
    title: what it is called in the text of the web UIs; None leaves it out, or `titles` has words for it.
    absent: what a recipe meant that does not have it; `...` is for what every recipe has.
    """

    kind: Any
    title: str | None = None
    absent: Any = ...


@dataclass(frozen=True)
class Option:
    """What there is to know of an option besides its name, type and documentation.

    fast: its default with `fast`, where that differs.
    unset: what stands in the help of the command line for a default of None.
    kept: as what recipes keep it; None if it does not change the image, or is kept otherwise.
    flags: of the command line; None is made of the name, and none at all is not offered there.

    Class attributes:
        heading: what it is listed under; "" is for what most people look for.
    """

    heading: ClassVar[str] = ""

    domain: Callable[[str, Any], Any]
    default: Any = None
    fast: Any = None
    unset: str = ""
    kept: Kept | None = None
    flags: tuple[str, ...] | None = None

    def flag(self, name: str) -> str:
        """The flag of the option of this name."""
        return self.flags[0] if self.flags else flag_of(name)


def flag_of(name: str) -> str:
    """The flag that is made of a name in Python."""
    return f"--{name.replace('_', '-')}"


class PromptOption(Option):
    """How a text becomes embeddings."""

    heading = "How prompts are read"


class GuidanceOption(Option):
    """How the prompt is followed, besides the scale."""

    heading = "Guidance"


class SamplerOption(Option):
    """How the sampler walks, and over which noise levels."""

    heading = "Sampler and noise levels"


class NoiseOption(Option):
    """Where the noise comes from."""

    heading = "Noise as other programs draw it"


class SizeOption(Option):
    """Images that are larger than those of the training, or continue at their edges."""

    heading = "Large and tiling images"


class XLOption(Option):
    """What models of the XL family are told besides the prompt."""

    heading = "Stable Diffusion XL"


class SpeedOption(Option):
    """What costs or saves time or memory."""

    heading = "Speed and memory"


class SteeringOption(Option):
    """What steers besides the prompt."""

    heading = "Regions, ControlNets and image prompts"
