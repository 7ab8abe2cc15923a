"""What there is to draw with: models, LoRAs and embeddings by name, and what prompts mean to a model."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.checkpoints.tokenizer import clip_tokenizer_files, open_tokenizer
from latentdiff.errors import LatentDiffError
from latentdiff.prompts.account import PromptAccount, account
from latentdiff.prompts.syntax import read_prompt
from latentdiff.prompts.tags import LoRATag
from latentdiff.prompts.tokenizer import Tokenizer
from latentdiff.prompts.words import Words, read_words
from latentdiff.serving.errors import Refused
from latentdiff.serving.settings import ServerSettings

LORA_FILES = (".safetensors", ".pt", ".ckpt", ".bin")
CONTROL_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
ADAPTER_FILES = (".safetensors", ".bin")  # of which the first is taken where a name has both
_LONGEST_FILE = 16 * 2**20  # bytes, of a tokenizer's


class Catalogue:
    """Names are looked up in lists and never become paths."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.models = dict(settings.worker.models)
        self._tokenizer = lru_cache(maxsize=8)(self._open_tokenizer)
        self._words = lru_cache(maxsize=8)(self._read_words)

    def model(self, name: str | None) -> str:
        """A model that there is; None is the default.

        Raises:
            Refused: there is none of that name.
        """
        name = name or self._settings.default_model
        if name not in self.models:
            raise Refused(
                404,
                f"The model {name!r} does not exist; expected one of {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return name

    @property
    def loras(self) -> dict[str, Path]:
        """Name -> file, of the folder as it is now; and the results of runs by the names of these."""
        found: dict[str, Path] = {}
        if (out := self._settings.out) is not None and self._settings.data is not None:
            found = {path.parent.name: path for path in sorted((out / "runs").glob("*/lora.safetensors"))}
        if (folder := self._settings.loras) is not None and folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.suffix in LORA_FILES and path.is_file())
            found |= {path.stem: path for path in reversed(files)}
        return found

    @property
    def controls(self) -> dict[str, Path]:
        """Name -> file, or folder of the diffusers layout, in the folder as it is now."""
        folder = self._settings.controls
        if folder is None or not folder.is_dir():
            return {}
        folders = [path.parent for path in folder.glob("*/config.json")]
        files = [path for path in folder.rglob("*") if path.suffix in CONTROL_FILES and path.is_file()]
        lone = [path for path in files if path.parent not in folders]
        return {path.stem if path.is_file() else path.name: path for path in sorted([*folders, *lone], reverse=True)}

    def control(self, name: str) -> Path:
        """Where a ControlNet lies.

        Raises:
            Refused: there is none of that name.
        """
        return _named(name, self.controls, "ControlNet", "controls")

    @property
    def ip_adapters(self) -> dict[str, Path]:
        """Name -> file, in the folder as it is now; image encoders are folders of their own and no adapters."""
        folder = self._settings.ip_adapters
        if folder is None or not folder.is_dir():
            return {}
        files = [path for path in folder.rglob("*") if path.suffix in ADAPTER_FILES and path.is_file()]
        lone = [path for path in files if not (path.parent / "config.json").exists()]
        lone.sort(key=lambda path: (path.stem, -ADAPTER_FILES.index(path.suffix)))
        return {path.stem: path for path in lone}

    def ip_adapter(self, name: str) -> Path:
        """Where an IP-Adapter lies.

        Raises:
            Refused: there is none of that name.
        """
        return _named(name, self.ip_adapters, "IP-Adapter", "image_prompts")

    @property
    def embeddings(self) -> list[str]:
        """The names of what models learned at the start."""
        return [Path(file).stem for file in self._settings.worker.embeddings]

    def named(self, prompt: str, syntax: str) -> tuple[tuple[LoRATag, ...], dict[str, str]]:
        """The LoRAs that a prompt names, and their files.

        Raises:
            UsageError: the prompt cannot be read.
            Refused: it names one that is not there.
        """
        tags = read_prompt(prompt, syntax).loras
        offered = self.loras if tags else {}
        return tags, {tag.name: str(_named(tag.name, offered, "LoRA", "prompt")) for tag in tags}

    def account(self, model: str, prompt: str, syntax: str, steps: int, *, negative: bool = False) -> PromptAccount:
        """What a prompt means to a model; learned words count as the letters that they are written with.

        Raises:
            LatentDiffError: the prompt cannot be read, or the model's tokenizer.
        """
        return account(self._tokenizer(model), prompt, syntax, steps, negative=negative)

    def tokens(self, model: str, prompt: str) -> int:
        """How many tokens a prompt has; 0 where that cannot be known."""
        try:
            found = self.account(model, prompt, "a1111", 100)
        except LatentDiffError:
            return 0
        return sum(stage.count for stages in found.stages for stage in stages[:1])

    def words(self, model: str) -> Words | None:
        """What a small model says that it knows; None for others."""
        return self._words(model)

    def place(self, model: str) -> Path:
        """Where a model lies; a hub id is no place, and then there is nothing there."""
        source = self.models[model]
        return embedded_model() if source is None else Path(source).expanduser()

    def _read_words(self, model: str) -> Words | None:
        place = self.place(model)
        if not place.is_file():
            return read_words(place)
        from latentdiff.checkpoints.stored import words_in_file  # imports torch, which only the workers need else

        return words_in_file(place)

    def _open_tokenizer(self, model: str) -> Tokenizer:
        folder = self.place(model) / "tokenizer"
        if not folder.is_dir():  # single files and models of the hub have CLIP's
            return open_tokenizer(clip_tokenizer_files("<|endoftext|>"))
        files = [path for path in folder.iterdir() if path.suffix in (".json", ".txt")]
        small = [path for path in files if path.stat().st_size <= _LONGEST_FILE]
        return open_tokenizer({path.name: path.read_text(encoding="utf-8") for path in small})


def _named(name: str, offered: Mapping[str, Path], kind: str, param: str) -> Path:
    if name not in offered:
        near = get_close_matches(name, offered, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(list(offered)[:8]) or 'none'}"
        raise Refused(400, f"there is no {kind} called {name!r}; {hint}", param=param, code="invalid_value")
    return offered[name]
