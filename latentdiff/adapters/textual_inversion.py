"""New words for a text encoder: embeddings that textual inversion has learned (Gal et al. 2022)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import save_tensors
from latentdiff.checkpoints.hashing import file_hash
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.networks.text_encoder import TextEncoder

_UNNAMED = "emb_params"  # what web UIs call the vector in files that do not hold the word


class NewWord(nn.Module):
    """A word and its embedding, beside a text encoder that does not know it.

    Args:
        word: as prompts use it.
        vector: (C,), C the width of the text encoder's embeddings.
    """

    def __init__(self, word: str, vector: Tensor) -> None:
        super().__init__()
        self.word = word
        self.vector = nn.Parameter(vector.detach().float().clone())

    @classmethod
    def create(cls, word: str, tokenizer: Any, text_encoder: TextEncoder, initial: str | None = None) -> NewWord:
        """A new word that starts from the mean embedding of `initial`'s tokens, or of the whole vocabulary.

        Raises:
            UsageError: `initial` is no text.
        """
        vocabulary = _token_embedding(text_encoder).weight
        if initial is None:
            return cls(word, vocabulary.float().mean(0))
        ids = tokenizer(initial, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"expected a word to start from, found {initial!r}")
        return cls(word, vocabulary[torch.tensor(ids)].float().mean(0))

    def extended(self, tokenizer: Any) -> Any:
        """A copy of the tokenizer that knows the word as one token.

        Raises:
            UsageError: it is a token of the vocabulary already.
        """
        pieces = tokenizer(self.word, add_special_tokens=False)["input_ids"]
        new = copy.deepcopy(tokenizer)
        if len(pieces) < 2 or new.add_tokens([self.word]) != 1:
            raise UsageError(
                f"{self.word!r} is in the vocabulary already; choose a new word, for example <{self.word.strip() or 'word'}>"
            )
        return new

    @contextmanager
    def attached(self, tokenizer: Any, text_encoder: TextEncoder) -> Iterator[NewWord]:
        """Inside, the text encoder reads the token that `tokenizer`, a copy that knows it, has for the word."""
        own = tokenizer.convert_tokens_to_ids(self.word)
        layer, seen = _token_embedding(text_encoder), []

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0] == own)
            return (inputs[0].masked_fill(seen[-1], 0), *inputs[1:])

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where(seen.pop()[..., None], self.vector.to(output.dtype), output)

        hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def save(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """Write the word as diffusers (`load_textual_inversion`) and the web UIs read it.

        Raises:
            LatentDiffError: the file cannot be written.
        """
        save_tensors({self.word: self.vector.detach().cpu()}, Path(path), {"format": "pt", **(metadata or {})})


class LoadedEmbeddings:
    """The new words that a pipeline knows, each removable without a trace.

    Args:
        tokenizer, text_encoder: the model's; neither is touched, `tokenizer` here is the one that knows the words.
    """

    def __init__(self, tokenizer: Any, text_encoder: TextEncoder) -> None:
        self.tokenizer = self._plain = tokenizer
        self._text_encoder = text_encoder
        self._words: dict[str, tuple[NewWord, dict[str, Any]]] = {}
        self._hooks = ExitStack()

    def __contains__(self, name: str | None) -> bool:
        return name in self._words

    def load(self, path: str | os.PathLike[str], name: str) -> str:
        """Read the word of a file; see `Pipeline.load_lora`."""
        if name in self._words:
            raise UsageError(
                f"a word called {name!r} is loaded already; unload it first, or give this one another name"
            )
        word = read_word(path, self._text_encoder)
        word.extended(self.tokenizer)  # raises if it is known
        about = {"file": Path(path).name, "sha256": file_hash(Path(path)), "scale": 1.0}
        self._words[name] = (word.to(_token_embedding(self._text_encoder).weight.device).requires_grad_(False), about)
        self._attach()
        return f"the word {word.word}"

    def unload(self, name: str | None) -> None:
        """Forget one word, or all."""
        for each in [*self._words] if name is None else [name]:
            self._words.pop(each)
        self._attach()

    def to(self, device: torch.device | str) -> None:
        """Follow the model to `device`."""
        for word, _ in self._words.values():
            word.to(device)

    def describe(self) -> list[dict[str, Any]]:
        """What recipes say of them, as of LoRAs."""
        return [about for _, about in self._words.values()]

    def _attach(self) -> None:
        self._hooks.close()
        self.tokenizer = self._plain
        for word, _ in self._words.values():
            self.tokenizer = word.extended(self.tokenizer)
        for word, _ in self._words.values():
            self._hooks.enter_context(word.attached(self.tokenizer, self._text_encoder))


def read_word(path: str | os.PathLike[str], text_encoder: TextEncoder) -> NewWord:
    """Read the embedding of a word; in files without its name, the word is the file's name.

    Raises:
        CheckpointError: it is no such file, or for another model.
    """
    path = Path(path)
    tensors = {name: tensor for name, tensor in read_tensors(path).tensors.items() if tensor.is_floating_point()}
    if len(tensors) != 1:
        raise CheckpointError(f"expected the embedding of one word in {path}, found {len(tensors)} tensors")
    ((name, vector),) = tensors.items()
    vector = vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
    width = text_encoder.embedding_width
    if vector.shape != (width,):
        raise CheckpointError(
            f"expected one vector of {width} numbers in {path}, found the shape {tuple(vector.shape)}: it is for another model"
        )
    return NewWord(path.stem if name == _UNNAMED else name, vector)


def is_word_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds the embedding of a word, and no LoRA."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    tensors = read_tensors(path).tensors
    return len(tensors) == 1 and next(iter(tensors.values())).ndim <= 2 and not next(iter(tensors)).endswith(".weight")


def _token_embedding(text_encoder: TextEncoder) -> nn.Embedding:
    return text_encoder.text_model.embeddings.token_embedding
