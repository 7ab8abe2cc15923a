"""What adapts a model without touching a weight: LoRAs and their relatives, and learned words."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.adapters.lora.loaded import LoadedLoRAs
from latentdiff.adapters.lora.offered import OfferedLoRAs
from latentdiff.adapters.lora.strength import Strength
from latentdiff.adapters.textual_inversion import LoadedEmbeddings, is_word_file, read_embedding, read_words
from latentdiff.checkpoints.distilled import Distilled
from latentdiff.errors import LatentDiffError
from latentdiff.model.memory.residence import Residence
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.device import Precision
from latentdiff.request.calls import public
from latentdiff.request.domains import Place, YesNo

if TYPE_CHECKING:
    from latentdiff.adapters.lora.adapter import LoRA
    from latentdiff.adapters.lora.loading import LoadReport


class AdaptedModel:
    """A model's adapters, by the names under which they were loaded."""

    tokenizer: Any
    residence: Residence
    precision: Precision
    loras: LoadedLoRAs
    embeddings: LoadedEmbeddings
    offered: OfferedLoRAs
    adapted_by: list[tuple[str, tuple[Any, ...], str]]  # calls that adapted it: method, arguments, name
    distilled: Distilled | None  # its own LoRA for few steps
    _student: LoRA | None  # that in memory, from its first use on

    @public(path=Place(), scale=lambda name, value: Strength.of(value), allow_partial=YesNo())
    @one_use(alone=True)
    def load_lora(
        self,
        path: str | os.PathLike[str],
        scale: float | str | Strength = 1.0,
        name: str | None = None,
        *,
        allow_partial: bool = False,
    ) -> LoadReport | str:
        """Adapt the model by a LoRA or LyCORIS file; several act at once. The model's own weights stay as they are.

        Args:
            path: in the dialect of kohya's tools, of LyCORIS, of PEFT or of diffusers; or a folder that the last two
                wrote. An embedding of words, as textual inversion makes it, is taken too; it has no scale.
            scale: strength; 1 is as trained. Text and a `Strength` say more, see `adapters.lora.strength`.
            name: what `unload_lora` calls it; None is the path as it is given here.
            allow_partial: leave out what does not fit, as long as something does.

        Returns:
            A report that says "matched 264 of 264 layers".

        Raises:
            CheckpointError: there is no such file, it is damaged, no LoRA, or one for another model.
        """
        name = os.fspath(path) if name is None else name
        if is_word_file(path):
            return self.load_embedding(path, name)
        for part in ("text_encoder", "unet"):  # what is loaded goes where they lie
            self.residence.ready(part)
        file = self.loras.read(path)
        report = self.loras.load(file, scale, name, allow_partial=allow_partial, precision=self.precision)
        if file.words:
            try:
                words = read_words(file.path, file.words, self.residence.ready("text_encoder"))
                self.embeddings.load(words, file.path, name, alone=False)
            except LatentDiffError:
                self.loras.unload(name)
                raise
            self.tokenizer = self.embeddings.tokenizer
        self.adapted_by.append(("load_lora", (os.path.abspath(path), scale, name), name))
        return report

    @public(path=Place())
    @one_use(alone=True)
    def load_embedding(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Teach the model the words of a textual-inversion file; prompts then use them.

        Args:
            path: `.safetensors`, `.pt` or `.bin`, of A1111, diffusers or latentdiff. Files that do not hold the word
                are named after it.
            name: what `unload_lora` calls it; None is the path as it is given here.

        Returns:
            A report that names the word.

        Raises:
            CheckpointError: there is no such file, it is damaged, or for another model.
            UsageError: the word is in the vocabulary already.
        """
        path, name = Path(path), os.fspath(path) if name is None else name
        words = read_words(path, read_embedding(path), self.residence.ready("text_encoder"))
        report = self.embeddings.load(words, path, name)
        self.tokenizer = self.embeddings.tokenizer
        self.adapted_by.append(("load_embedding", (os.path.abspath(path), name), name))
        return report

    @one_use(alone=True)
    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA or an embedding off again, or all of them: images are as before, bit for bit."""
        has_words = name is None or name in self.embeddings
        if has_words:
            self.embeddings.unload(name)
            self.tokenizer = self.embeddings.tokenizer
        if name is None or name in self.loras or not has_words:
            self.loras.unload(name)
        self.adapted_by = [call for call in self.adapted_by if name not in (None, call[2])]

    @one_use(alone=True)
    def offer_loras(self, folder: str | os.PathLike[str]) -> None:
        """Let prompts name the LoRAs of a folder: `<lora:name:weight>`, by file name without its ending.

        Raises:
            UsageError: there is no such folder, or nothing in it.
        """
        self.offered.add_folder(folder)

    @contextmanager
    def in_few_steps(self) -> Generator[None, None, None]:
        """Inside, the model's own LoRA for few steps acts; it stays in memory afterwards, so that the next time is quick.

        Raises:
            CheckpointError: its file is damaged, or was made for another model.
        """
        from latentdiff.adapters.lora.loading import load_lora

        assert self.distilled is not None
        unet = self.residence.ready("unet")
        if self._student is None:
            self._student, _ = load_lora(self.distilled.lora, unet, None)
        for layer in self._student.layers.values():
            layer.follow(self.residence.device, self.precision.unet)
        with self._student.attached():
            yield

    def adaptations(self) -> list[dict[str, Any]]:
        """What recipes say of the LoRAs and words that are loaded."""
        return [*self.loras.describe(), *self.embeddings.describe()]
