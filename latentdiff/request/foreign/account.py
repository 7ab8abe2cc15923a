"""What the text in an image of another program asks for, field by field, and what of it is done here. Pure data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from latentdiff.errors import UsageError
from latentdiff.request.options import OPTIONS

Verdict = Literal["honoured", "approximated", "refused"]


@dataclass(frozen=True)
class Field:
    """One thing that a text says, or that its program means by saying nothing.

    Attributes:
        name, value: in the words of the text.
        verdict: "honoured", or as near as it can be, or not done here.
        why: what becomes of it; never empty unless it is honoured.
    """

    name: str
    value: str
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class NamedLoRA:
    """A LoRA that a program attached outside of the prompt, and its strength as `--lora FILE:STRENGTH` has it."""

    file: str
    strength: str


@dataclass(frozen=True)
class Account:
    """A text, read.

    Attributes:
        program: who wrote it.
        fields: all that it says, in its order, then what it leaves unsaid.
        options: what makes the image here, by the names of `GenerateOptions`, with "prompt".
        task: "generate", or the command that needs an image besides: "edit", "inpaint".
        strength: of that task.
        model, model_hash: the model's name, and the first digits of its file's SHA-256.
        model_options: of loading it: "vae", "prediction_type", "zero_terminal_snr".
        loras: in their order.
        lora_hashes: name in the prompt -> first digits of the SHA-256 of the file behind its header.
        lacking: why no image can be made of it; empty if one can.
    """

    program: str
    fields: tuple[Field, ...]
    options: Mapping[str, Any]
    task: str = "generate"
    strength: float | None = None
    model: str = ""
    model_hash: str = ""
    model_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loras: tuple[NamedLoRA, ...] = ()
    lora_hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    lacking: tuple[str, ...] = ()

    def of(self, *verdicts: Verdict) -> list[Field]:
        """The fields with one of these verdicts."""
        return [one for one in self.fields if one.verdict in verdicts]


class Draft:
    """An account while a text is being read."""

    def __init__(self, program: str, **options: Any) -> None:
        self.program = program
        self.fields: list[Field] = []
        self.options: dict[str, Any] = options
        self.task = "generate"
        self.strength: float | None = None
        self.model, self.model_hash = "", ""
        self.model_options: dict[str, Any] = {}
        self.loras: list[NamedLoRA] = []
        self.lora_hashes: dict[str, str] = {}
        self.lacking: list[str] = []

    def honour(self, name: str, value: object, why: str = "", **options: Any) -> None:
        """Say that a field is done as it says, by these options."""
        self._say(name, value, "honoured", why, options)

    def approximate(self, name: str, value: object, why: str, **options: Any) -> None:
        """Say that a field is done nearly as it says."""
        self._say(name, value, "approximated", why, options)

    def refuse(self, name: str, value: object, why: str) -> None:
        """Say that a field is not done, which changes the image."""
        self._say(name, value, "refused", why, {})

    def lack(self, name: str, value: object, why: str) -> None:
        """Say that without this field there is no image."""
        self.refuse(name, value, why)
        self.lacking.append(f"{name}: {why}")

    def require(self, needed: Mapping[str, str]) -> None:
        """Say which options are not there that an image needs; option -> what the text calls it."""
        said = {one.name for one in self.fields}
        for option, name in needed.items():
            if option not in self.options and name not in said:
                self.lack(name, "", "the text does not say it")

    def number(self, name: str, value: object, option: str, kind: type[int] | type[float] = float) -> None:
        """A field that is a number, and its option."""
        try:
            found = OPTIONS[option].domain(name, kind(value))  # type: ignore[call-overload]
        except UsageError as error:
            self.lack(name, value, str(error))
            return
        except (TypeError, ValueError, OverflowError):
            self.lack(name, value, "it is no number")
            return
        self.honour(name, value, **{option: found})

    def attach(self, name: str, value: object, file: object, unet: object, text_encoder: object) -> None:
        """A LoRA, if it is one: a file's name and two strengths."""
        if not isinstance(file, str) or not file or not all(map(_is_finite, (unet, text_encoder))):
            self.refuse(name, value, "expected a file's name and a strength")
            return
        strength = f"{unet:g}" if unet == text_encoder else f"unet={unet:g},te={text_encoder:g}"
        self.loras.append(NamedLoRA(file, strength))
        self.honour(name, value, "name its file with --lora")

    def account(self) -> Account:
        """What has been said."""
        return Account(
            self.program,
            tuple(self.fields),
            dict(self.options),
            task=self.task,
            strength=self.strength,
            model=self.model,
            model_hash=self.model_hash,
            model_options=dict(self.model_options),
            loras=tuple(self.loras),
            lora_hashes=dict(self.lora_hashes),
            lacking=tuple(self.lacking),
        )

    def _say(self, name: str, value: object, verdict: Verdict, why: str, options: Mapping[str, Any]) -> None:
        self.fields.append(Field(name, str(value), verdict, why))
        self.options.update(options)


def number_of(option: str, kind: type[int] | type[float] = float) -> Callable[[Draft, str, Any], None]:
    """What reads a field that is the number of an option."""
    return lambda draft, name, value: draft.number(name, value, option, kind)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
