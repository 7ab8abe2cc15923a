"""The recipe of a picture: everything needed to make it again, carried in two text chunks of its PNG file.

`latentdiff` holds the whole recipe as JSON; `parameters` holds what the web UIs of the field read, in their format. A
GIF has one text, its comment, which holds the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin

from latentdiff import __version__
from latentdiff.errors import DataError
from latentdiff.reading.json import is_unicode, parse_json
from latentdiff.request.options import KEPT, Kept

JSON_CHUNK = "latentdiff"
TEXT_CHUNK = "parameters"
COMMENT = "comment"  # of a GIF; Pillow gives it as bytes

FIRST_TITLES = ("Steps", "Sampler", "CFG scale", "Seed")  # of the settings, as the web UIs order them
NEGATIVE = "Negative prompt:"
_KEY = re.compile(r"\w[\w \-/]+$")  # at the end of what stands before a colon
_LONGEST_KEY = 64
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"')

Settings = TypeVar("Settings")


if TYPE_CHECKING:

    class _Asked:
        """`prompt`, and the options that recipes keep."""

        prompt: str

        def __getattr__(self, name: str) -> Any: ...

else:
    _Asked = dataclasses.make_dataclass(
        "_Asked",
        [
            ("prompt", str),
            *((name, kept.kind) for name, kept in KEPT.items() if kept.absent is ...),
            *((name, kept.kind, field(default=kept.absent)) for name, kept in KEPT.items() if kept.absent is not ...),
        ],
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class Recipe(_Asked):
    """How one image was made: the prompt, what `Kept` names of the options, and the fields here. Sizes are in pixels.

    task: "generate", or what was done to which images.
    task_settings: JSON values, what that task needs besides the other fields to be done again.
    sources: role ("image", "mask", ...) -> {"file": name, "sha256": of the file, or of the pixels if there was none}.
    loras: in the order of loading, {"file": name, "sha256": ..., "scale": ...}.
    """

    width: int
    height: int
    model: str = ""
    model_hash: str = ""
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    ema: bool = False
    given_latents: bool = False
    given_embeddings: bool = False
    precision: str = ""
    backend: str = "torch"
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    task: str = "generate"
    task_settings: dict[str, Any] = field(default_factory=dict[str, Any])
    sources: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    loras: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    schema: Literal[1] = 1

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    def sampling(self) -> dict[str, Any]:
        """The options of `SamplingOptions` that make this image."""
        return {name: getattr(self, name) for name in KEPT}

    def settings_as(self, kind: type[Settings]) -> Settings:
        """The settings of the task as an instance of its dataclass.

        Raises:
            DataError: one is missing, unknown, or of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        unknown = self.task_settings.keys() - {field.name for field in dataclasses.fields(cast(Any, kind))}
        if unknown:
            raise DataError(
                f"the picture's recipe has settings that the task {self.task!r} does not know: {sorted(unknown)}"
            )
        try:
            return TypeAdapter(kind).validate_json(json.dumps(self.task_settings), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, ("task_settings", *first["loc"])))
        raise DataError(f"the picture's recipe is not valid at {place}: {first['msg']}")

    def to_chunks(self) -> dict[str, str]:
        """The two text chunks by name, for `PIL.Image.Image.info`."""
        return {TEXT_CHUNK: self.to_parameters(), JSON_CHUNK: self.to_json()}

    def to_json(self) -> str:
        """The recipe as one line of ASCII JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            DataError: it is not JSON, not a recipe, has fields of the wrong type, or comes from a newer latentdiff.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "JSON"
        if place == "schema":
            raise DataError("the picture's recipe was written by a newer latentdiff; update latentdiff to read it")
        raise DataError(f"the picture's recipe is not valid at {place}: {first['msg']}")

    def to_parameters(self) -> str:
        """The recipe in the format of the web UIs: prompt, negative prompt, and one line of settings."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"{NEGATIVE} {self.negative_prompt}")
        lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in self._settings().items()))
        return "\n".join(lines)

    def _settings(self) -> dict[str, str]:
        asked = {
            kept.title: _written(kept, value)
            for name, kept in KEPT.items()
            if kept.title and (value := getattr(self, name)) != kept.absent
        }
        model = {"Size": f"{self.width}x{self.height}", "Model hash": self.model_hash[:10], "Model": self.model}
        done = {
            "Denoising strength": str(self.task_settings.get("strength") or ""),
            "Task": self.task if self.task != "generate" else "",
            "Version": f"latentdiff {self.versions['latentdiff']}" if "latentdiff" in self.versions else "",
        }
        first = {title: asked.pop(title) for title in FIRST_TITLES}
        settings = first | model | asked | done
        return {title: text for title, text in settings.items() if text}

    @classmethod
    def from_parameters(cls, text: str) -> Recipe:
        """Read the format of the web UIs, ours or another program's.

        As there, a line of the prompt that begins with "Negative prompt:" begins the negative prompt.

        Raises:
            DataError: a setting that is needed is missing, or has a value that latentdiff does not know.
        """
        if not is_unicode(text):
            raise DataError("the picture's parameters text holds half of a character, a lone surrogate")
        *lines, last = text.strip().split("\n")
        settings = read_settings(last)
        start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
        negative = "\n".join(lines[start:]).removeprefix(NEGATIVE).strip()
        try:
            width, height = settings["Size"].split("x")
            asked: dict[str, Any] = {
                name: _read(kept, settings[kept.title])
                for name, kept in KEPT.items()
                if kept.title in settings or (kept.title and kept.absent is ...)
            }
            if not settings.get("Version", "").startswith("latentdiff"):
                asked.setdefault("prompt_syntax", "a1111")
            asked |= {"prompt": "\n".join(lines[:start]).strip(), "negative_prompt": negative}
            return cls(
                **asked,
                task=settings.get("Task", "generate"),
                width=int(width),
                height=int(height),
                model=settings.get("Model", ""),
                model_hash=settings.get("Model hash", ""),
            )
        except (KeyError, ValueError) as error:
            raise DataError(f"the picture's parameters text lacks or has an unknown value of: {error}") from error


def library_versions() -> dict[str, str]:
    """The versions of what decides the pixels of a picture."""
    import tokenizers
    import torch

    return {"latentdiff": __version__, "torch": torch.__version__, "tokenizers": tokenizers.__version__}


def has_comment(info: Mapping[Any, Any]) -> bool:
    """Whether the comment in `PIL.Image.Image.info` is a recipe; other programs leave texts of any kind there."""
    comment = info.get(COMMENT)
    return isinstance(comment, bytes) and comment.startswith(b'{"prompt"')


def read_recipe(info: Mapping[Any, Any]) -> Recipe:
    """The recipe in `PIL.Image.Image.info`: from the JSON chunk, or the text of the web UIs, or the comment of a GIF.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if isinstance(info.get(JSON_CHUNK), str):
        return Recipe.from_json(info[JSON_CHUNK])
    if isinstance(info.get(TEXT_CHUNK), str):
        return Recipe.from_parameters(info[TEXT_CHUNK])
    if has_comment(info):
        return Recipe.from_json(info[COMMENT])
    raise DataError("the picture carries no recipe: it was made with --no-metadata, edited, or made elsewhere")


def _written(kept: Kept, value: Any) -> str:
    """A value as the text of the web UIs has it."""
    if isinstance(value, tuple):
        return " to ".join(map(str, cast(tuple[float, ...], value)))
    return (kept.names or {}).get(value, str(value))


def _read(kept: Kept, text: str) -> Any:
    """What `_written` wrote.

    Raises:
        KeyError, ValueError: it is not a value of this option.
    """
    if kept.names:
        return {title: value for value, title in kept.names.items()}[text]
    kind = next(kind for kind in (get_args(kept.kind) or (kept.kind,)) if kind is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(part(end) for part, end in zip(get_args(kind), text.split(" to "), strict=True))
    return kind(text)


def read_settings(line: str) -> dict[str, str]:
    """ "Key: value, Key: value" as the web UIs write it; a value with a comma, a colon or a line break is quoted.

    Text that is neither a key nor a value is passed over. The time is in proportion to the length of the line.
    """
    found: dict[str, str] = {}
    place = 0
    while (colon := line.find(":", place)) >= 0:
        before = line[max(place, colon - _LONGEST_KEY) : colon]
        key = _KEY.search(before[before.rfind(",") + 1 :])
        if not key:
            place = colon + 1
            continue
        start = colon + 1
        start += len(line[start : start + _LONGEST_KEY]) - len(line[start : start + _LONGEST_KEY].lstrip())
        quoted = _QUOTED.match(line, start) if line.startswith('"', start) else None
        if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
            end = quoted.end()
        else:
            end = next((comma for comma in (line.find(",", start),) if comma >= 0), len(line))
        found[key[0]] = _unquote(line[start:end])
        place = end
    return found


def _quote(value: str) -> str:
    is_plain = value == value.strip() and not re.search(r'[,:\n"]', value)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    try:
        return str(parse_json(value, "a setting", DataError)) if value.startswith('"') else value.strip()
    except DataError:
        return value
