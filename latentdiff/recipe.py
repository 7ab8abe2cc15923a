"""The recipe of an image: everything needed to make it again, carried in two text chunks of its PNG file.

`latentdiff` holds the whole recipe as JSON; `parameters` holds what the web UIs of the field read, in their format. A
GIF has one text, its comment, which holds the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from latentdiff import __version__
from latentdiff.errors import DataError, UsageError
from latentdiff.request import infotext
from latentdiff.request.domains import Choice, ChoiceOrFile
from latentdiff.request.options import GENERATING, KEPT, OPTIONS, SAMPLING, checked
from latentdiff.request.recorded import RecordedControl, RecordedImagePrompt, RecordedRegion

JSON_CHUNK = "latentdiff"
TEXT_CHUNK = "parameters"
COMMENT = "comment"  # of a GIF; Pillow gives it as bytes

# Of the settings, as the web UIs order them.
FIRST_TITLES = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed")
_ONLY_OURS = {
    "Task", "Spacing", "Prompt syntax", "Noise source", "Noise start", "Noise index", "Told timesteps",
}  # fmt: skip
_LOOKS_LIKE_GRAMMAR = re.compile(r"[()\[\]\\]")

Settings = TypeVar("Settings")


if TYPE_CHECKING:
    from pydantic import ValidationError

    from latentdiff.request.foreign.account import Account

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
    """How one image was made: the prompt, what `Kept` names of the options, and the fields here. Sizes: pixels, before `hires`.

    task: "generate", or what was done to which images.
    task_settings: JSON values, what that task needs besides the other fields to be done again.
    parts: what was taken from elsewhere than the model, "vae", "text_encoder" or "base" -> {"file": name, "sha256": ...}.
    sources: role ("image", "mask", ...) -> {"file": name, "sha256": of the file, or of the pixels if there was none}.
    controls, image_prompts, regions: what ControlNets, IP-Adapters and prompts for parts added, in their order.
    loras: in the order of loading, {"file": name, "sha256": ..., "scale": ...}; without a hash the name counts, or in place of
        it "tensors", the first digits of what web UIs hash. A prompt's tags name those with a "tag"; one with a "part" is the
        model's own, which `fast` says to have acted.
    """

    width: int
    height: int
    model: str = ""
    model_hash: str = ""
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    parts: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
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
    controls: list[RecordedControl] = field(default_factory=list[RecordedControl])
    image_prompts: list[RecordedImagePrompt] = field(default_factory=list[RecordedImagePrompt])
    regions: list[RecordedRegion] = field(default_factory=list[RecordedRegion])
    schema: Literal[1] = 1

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    def sampling(self) -> dict[str, Any]:
        """The options of `SamplingOptions` that make this image."""
        return {name: getattr(self, name) for name in KEPT if name in SAMPLING}

    def generating(self) -> dict[str, Any]:
        """The options of `GenerateOptions` that are none of those, without the size."""
        return {name: getattr(self, name) for name in GENERATING}

    def roles(self) -> dict[str, dict[str, str]]:
        """What it was made from: the sources, and files of controls and image prompts, as "control_image1"."""
        found = dict(self.sources)
        for steering in (self.controls, self.image_prompts, self.regions):
            for number, recorded in enumerate(steering, 1):
                found |= recorded.roles(number)
        return found

    def settings_as(self, kind: type[Settings]) -> Settings:
        """The settings of the task as an instance of its dataclass.

        Raises:
            DataError: one is missing, unknown, or of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        unknown = self.task_settings.keys() - {field.name for field in dataclasses.fields(cast(Any, kind))}
        if unknown:
            raise DataError(
                f"the image's recipe has settings that the task {self.task!r} does not know: {sorted(unknown)}"
            )
        try:
            return TypeAdapter(kind).validate_json(json.dumps(self.task_settings), strict=True)
        except ValidationError as error:
            raise _invalid(error, "task_settings") from error

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
            DataError: it is not JSON, not a recipe, has values that no call takes, or comes from a newer latentdiff.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return _allowed(TypeAdapter(cls).validate_json(text))
        except ValidationError as error:
            raise _invalid(error) from error

    def to_parameters(self) -> str:
        """The recipe in the format of the web UIs: prompt, negative prompt, and one line of settings."""
        return infotext.joined(self.prompt, self.negative_prompt, self._settings())

    def _settings(self) -> dict[str, str]:
        asked = {
            kept.title: infotext.written_value(value)
            for name, kept in KEPT.items()
            if kept.title and (value := getattr(self, name)) != kept.absent
        }
        method = infotext.written_method(self.sampling()) if self.sampler else {}
        asked = method | infotext.written_pass(self.generating()) | asked
        model = {"Size": f"{self.width}x{self.height}", "Model hash": self.model_hash[:10], "Model": self.model}
        is_literal = self.prompt_syntax == "plain" and _LOOKS_LIKE_GRAMMAR.search(self.prompt + self.negative_prompt)
        done = {
            "Emphasis": "None" if is_literal else "",
            **({} if self.hires else {"Denoising strength": str(self.task_settings.get("strength") or "")}),
            "Image CFG scale": str(self.task_settings.get("image_guidance_scale") or ""),
            "Task": self.task if self.task != "generate" else "",
            "Version": f"latentdiff {self.versions['latentdiff']}" if "latentdiff" in self.versions else "",
        }
        first = {title: asked.pop(title) for title in FIRST_TITLES if title in asked}
        settings = first | model | asked | done
        return {title: text for title, text in settings.items() if text}

    @classmethod
    def from_parameters(cls, text: str) -> Recipe:
        """Read what `to_parameters` wrote, and what earlier versions did.

        Raises:
            DataError: a setting that is needed is missing, or has a value that latentdiff does not know.
        """
        said = infotext.split(text)
        settings = said.settings
        try:
            width, height = settings["Size"].split("x")
            asked: dict[str, Any] = (
                infotext.read_method(settings)
                | infotext.read_pass(settings)
                | {
                    name: infotext.read_value(kept.kind, settings[kept.title])
                    for name, kept in KEPT.items()
                    if kept.title and (kept.title in settings or kept.absent is ...)
                }
            )
            asked |= {"prompt": said.prompt, "negative_prompt": said.negative}
            recipe = cls(
                **asked,
                task=settings.get("Task", "generate"),
                width=int(width),
                height=int(height),
                model=settings.get("Model", ""),
                model_hash=settings.get("Model hash", ""),
            )
        except (KeyError, ValueError) as error:
            raise DataError(f"the image's parameters text lacks or has an unknown value of: {error}") from error
        return _allowed(recipe)


def recorded_steering(options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The fields of recipes for what steers besides the prompt."""
    return {
        name: [one.describe() for one in options.get(name) or ()] for name in ("controls", "image_prompts", "regions")
    }


def _allowed(recipe: Recipe) -> Recipe:
    """The recipe, if a call takes its options, those that are files by their sources alone; else a DataError."""
    is_walk = recipe.task == "generate" or recipe.steps or recipe.sampler  # upscalers take no steps
    try:
        for name in KEPT.keys() - recipe.sources.keys() - (set() if is_walk else {"steps", "sampler"}):
            value = getattr(recipe, name)
            if isinstance(domain := OPTIONS[name].domain, ChoiceOrFile):
                Choice(domain.names)(name, value)  # never a path that a recipe names
            checked({name: value})
    except UsageError as error:
        raise DataError(f"the image's recipe is not valid: {error}") from error
    return recipe


def library_versions() -> dict[str, str]:
    """The versions of what decides the pixels of an image."""
    import tokenizers
    import torch

    return {"latentdiff": __version__, "torch": torch.__version__, "tokenizers": tokenizers.__version__}


def has_comment(info: Mapping[Any, Any]) -> bool:
    """Whether the comment in `PIL.Image.Image.info` is a recipe; other programs leave texts of any kind there."""
    comment = info.get(COMMENT)
    return isinstance(comment, bytes) and comment.startswith(b'{"prompt"')


def _invalid(error: ValidationError, *within: str) -> DataError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, (*within, *first["loc"]))) or "JSON"
    if place == "schema":
        return DataError("the image's recipe was written by a newer latentdiff; update latentdiff to read it")
    return DataError(f"the image's recipe is not valid at {place}: {first['msg']}")


def read_recipe(info: Mapping[Any, Any]) -> Recipe:
    """The recipe in `PIL.Image.Image.info`: from the JSON chunk, or the comment of a GIF, or the text of any program.

    Raises:
        DataError: there is none, it cannot be read, or it needs more than a recipe holds.
    """
    return own if (own := _own_recipe(info)) else _recipe_of(_foreign_account(info))


def read_account(info: Mapping[Any, Any]) -> Account:
    """What the texts in `PIL.Image.Image.info` ask for, and what of it is done here.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    return _account_of(own) if (own := _own_recipe(info)) else _foreign_account(info)


def _own_recipe(info: Mapping[Any, Any]) -> Recipe | None:
    if isinstance(info.get(JSON_CHUNK), str):
        return Recipe.from_json(info[JSON_CHUNK])
    if isinstance(text := info.get(TEXT_CHUNK), str):
        settings = infotext.split(text).settings
        if settings.get("Version", "").startswith("latentdiff") or _ONLY_OURS & settings.keys():
            return Recipe.from_parameters(text)
    return Recipe.from_json(info[COMMENT]) if has_comment(info) else None


def _foreign_account(info: Mapping[Any, Any]) -> Account:
    from latentdiff.request import foreign

    texts = {name: text for name, text in info.items() if isinstance(name, str) and isinstance(text, str)}
    found = foreign.read_account(texts)
    if found is None and TEXT_CHUNK in texts:
        raise DataError("the image's parameters text lacks or has an unknown value of: all settings")
    if found is None:
        raise DataError("the image carries no recipe: it was made with --no-metadata, edited, or made elsewhere")
    return found


def _recipe_of(account: Account) -> Recipe:
    """The recipe that an account of another program's text amounts to.

    Raises:
        DataError: something is missing, or the image was made from another one, which the text does not hold.
    """
    if account.lacking:
        reasons = "; ".join(account.lacking)
        raise DataError(f"the image's parameters text lacks or has an unknown value of: {reasons}")
    if account.task != "generate":
        raise DataError(
            "the image was made from another one, which its text does not hold; latentdiff import shows the command"
        )
    absent = {name: kept.absent for name, kept in KEPT.items() if kept.absent is not ...}
    options = {name: value for name, value in account.options.items() if value is not None or name in absent}
    try:
        recipe = Recipe(
            **{"guidance_scale": 1.0, **options},
            model=account.model,
            model_hash=account.model_hash,
            loras=[{"file": lora.file, "sha256": "", "scale": lora.strength} for lora in account.loras]
            + [
                {"file": name, "sha256": "", "tensors": digits, "scale": 1.0, "tag": name}
                for name, digits in account.lora_hashes.items()
            ],
            **{name: value for name, value in account.model_options.items() if name != "vae"},
        )
    except TypeError as error:
        raise DataError(f"the image's parameters text lacks or has an unknown value of: {error}") from error
    return _allowed(recipe)


def _account_of(recipe: Recipe) -> Account:
    """A recipe of ours as an account, in which all is honoured."""
    from latentdiff.request.foreign.account import Account, Field, NamedLoRA

    said = dataclasses.asdict(recipe)
    absent = {name: kept.absent for name, kept in KEPT.items()}
    fields = [Field(name, str(value), "honoured") for name, value in said.items() if value != absent.get(name, "")]
    names = ("prompt", "width", "height", *KEPT)
    model = ("prediction_type", "zero_terminal_snr", "ema")
    return Account(
        f"latentdiff {recipe.versions.get('latentdiff', '')}".strip(),
        tuple(fields),
        {name: said[name] for name in names},
        task=recipe.task,
        model=recipe.model,
        model_hash=recipe.model_hash,
        model_options={name: said[name] for name in model if said[name]}
        | {role: part.get("file", "") for role, part in recipe.parts.items()},
        loras=tuple(NamedLoRA(str(one.get("file")), str(one.get("scale"))) for one in recipe.loras if "part" not in one),
    )
