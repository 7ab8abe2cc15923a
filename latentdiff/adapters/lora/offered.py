"""LoRA files that prompts may name by `<lora:name:weight>`: a folder's, each by its file name without the ending."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from latentdiff.adapters.lora.strength import Strength
from latentdiff.checkpoints.hashing import file_hash
from latentdiff.errors import UsageError
from latentdiff.prompts.tags import LoRATag

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
_NAMED = 5  # files in an error message


class OfferedLoRAs:
    """Names and their files; nothing is read before a prompt asks for it."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}  # with what tells that a file is another

    def add_folder(self, folder: str | os.PathLike[str]) -> None:
        """Offer all files of a folder and the folders in it.

        Raises:
            UsageError: there is no such folder, or it holds no LoRA.
        """
        place = Path(folder)
        if not place.is_dir():
            raise UsageError(f"there is no folder {place} of LoRAs")
        found = sorted(path for path in place.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not found:
            raise UsageError(f"expected LoRAs in {place} ({', '.join(SUFFIXES)}), found none")
        for path in found:
            self._files.setdefault(path.stem, path)

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Offer one file under a name."""
        self._files[name] = Path(path)

    def path(self, tag: LoRATag) -> Path:
        """The file that a tag names.

        Raises:
            UsageError: none is offered under this name.
        """
        if tag.name in self._files:
            return self._files[tag.name]
        near = get_close_matches(tag.name, self._files, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"offered are: {self._shown()}"
        if not self._files:
            hint = "say in which folder it lies with --lora-dir, or offer_loras in Python"
        raise UsageError(f"there is no LoRA called {tag.name!r}, which the prompt names; {hint}")

    @contextmanager
    def attached(
        self,
        tags: Sequence[LoRATag],
        load: Callable[[Path, Strength, str], object],
        unload: Callable[[str], object],
    ) -> Iterator[None]:
        """Inside, the LoRAs that a prompt's tags name act as strongly as it says.

        Args:
            load: (file, strength, name) -> anything; attaches one.
            unload: (name) -> anything; detaches it.

        Raises:
            UsageError: none is offered under a name.
            CheckpointError: a file is no LoRA, or one for another model.
        """
        files = [(self.path(tag), strength_of(tag), str(tag)) for tag in last_of_each(tags)]
        attached: list[str] = []
        try:
            for path, scale, name in files:
                load(path, scale, name)
                attached.append(name)
            yield
        finally:
            for name in attached:
                unload(name)

    def describe(self, tags: Sequence[LoRATag]) -> list[dict[str, Any]]:
        """What recipes say of the LoRAs that a prompt names; its own text says how strong they are."""
        return [
            {"file": path.name, "sha256": self._hash(path), "scale": strength_of(tag).as_json, "tag": tag.name}
            for tag in last_of_each(tags)
            for path in [self.path(tag)]
        ]

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if path not in self._hashes or self._hashes[path][0] != mark:
            self._hashes[path] = (mark, file_hash(path))
        return self._hashes[path][1]

    def _shown(self) -> str:
        more = f" and {len(self._files) - _NAMED} more" if len(self._files) > _NAMED else ""
        return ", ".join(list(self._files)[:_NAMED]) + more


def last_of_each(tags: Iterable[LoRATag]) -> list[LoRATag]:
    """A name that comes twice counts as it is said last."""
    return list({tag.name: tag for tag in tags}.values())


def strength_of(tag: LoRATag) -> Strength:
    """How strongly a tag says that its LoRA acts."""
    return Strength(unet=tag.unet_scale, text_encoder=tag.text_scale)
