"""New words for a text encoder: embeddings that textual inversion has learned (Gal et al. 2022)."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
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
from latentdiff.networks.text_encoders import FIRST, TextEncoders, encoders_of

_UNNAMED = ("*", "emb_params", "string_to_param.*")  # what files that do not hold the word call the vectors
_SDXL = ("clip_l", "clip_g")
_WORD = "latentdiff.word"  # in the metadata of such a file
_LONGEST = 75  # vectors: as many tokens as a prompt holds


class NewWord(nn.Module):
    """A word and its embedding, beside a text encoder that does not know it.

    Args:
        word: as prompts use it.
        vector: (C,), or (n, C) for several, which take n places in a prompt; C is the width of the text encoder's
            embeddings.
        second: likewise for the second text encoder, where there are two.
    """

    def __init__(self, word: str, vector: Tensor, second: Tensor | None = None) -> None:
        super().__init__()
        self.word = word
        self.vector = nn.Parameter(vector.detach().float().clone())
        self.second = None if second is None else nn.Parameter(second.detach().float().clone())

    @property
    def vectors(self) -> Tensor:
        """One or several, (n, C)."""
        return torch.atleast_2d(self.vector)

    @property
    def of_encoders(self) -> list[Tensor]:
        """The vectors for each text encoder."""
        return [self.vectors, *([] if self.second is None else [torch.atleast_2d(self.second)])]

    @classmethod
    def create(cls, word: str, tokenizer: Any, text_encoder: TextEncoder, initial: str | None = None) -> NewWord:
        """A new word that starts from the mean embedding of `initial`'s tokens, or of the whole vocabulary.

        Raises:
            UsageError: `initial` is no text.
        """
        vocabularies = [layer.weight for layer in _token_embeddings(text_encoder)]
        if initial is None:
            return cls(word, *(vocabulary.float().mean(0) for vocabulary in vocabularies))
        ids = tokenizer(initial, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"expected a word to start from, found {initial!r}")
        return cls(word, *(vocabulary[torch.tensor(ids)].float().mean(0) for vocabulary in vocabularies))

    @property
    def tokens(self) -> list[str]:
        """What the tokenizer calls the vectors: the word itself, then it and a number, as in diffusers."""
        return [self.word, *(f"{self.word}_{number}" for number in range(1, len(self.vectors)))]

    def extended(self, tokenizer: Any) -> Any:
        """A copy of the tokenizer that knows the word as one token, and which other tokens belong to it.

        Raises:
            UsageError: it is a token of the vocabulary already.
        """
        pieces = tokenizer(self.word, add_special_tokens=False)["input_ids"]
        new = copy.deepcopy(tokenizer)
        if len(pieces) < 2 or new.add_tokens(self.tokens) != len(self.tokens):
            raise UsageError(
                f"{self.word!r} is in the vocabulary already; choose a new word, for example <{self.word.strip() or 'word'}>"
            )
        first, *others = new.convert_tokens_to_ids(self.tokens)
        if others:
            new.expansions = {**getattr(tokenizer, "expansions", {}), first: (first, *others)}
        return new

    @contextmanager
    def attached(self, tokenizer: Any, text_encoder: TextEncoder) -> Iterator[NewWord]:
        """Inside, the text encoder reads the tokens that `tokenizer`, a copy that knows them, has for the word."""
        with ExitStack() as stack:
            for number, layer in enumerate(_token_embeddings(text_encoder)):
                stack.enter_context(self._read_by(layer, number, tokenizer.convert_tokens_to_ids(self.tokens)))
            yield self

    @contextmanager
    def _read_by(self, layer: nn.Embedding, number: int, own: list[int]) -> Iterator[None]:
        """Inside, the token embedding of encoder `number` has this word at the tokens `own`."""
        seen = threading.local()

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            places = inputs[0][..., None] == torch.tensor(own, device=inputs[0].device)  # (N, L, n)
            seen.places = places
            return (inputs[0].masked_fill(places.any(-1), 0), *inputs[1:])

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            places = seen.places
            chosen = self.of_encoders[number][places.long().argmax(-1)].to(output.dtype)  # (N, L, C)
            return torch.where(places.any(-1, keepdim=True), chosen, output)

        hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """Write the word as diffusers (`load_textual_inversion`) and the web UIs read it.

        Raises:
            LatentDiffError: the file cannot be written.
        """
        tensors = {self.word: self.vector.detach().cpu()}
        about = {"format": "pt", **(metadata or {})}
        if self.second is not None:  # the names of the tensors are taken: for other programs, the file's is the word
            tensors = dict(zip(_SDXL, (each.detach().cpu() for each in self.of_encoders), strict=True))
            about[_WORD] = self.word
        save_tensors(tensors, Path(path), about)


class LoadedEmbeddings:
    """The new words that a pipeline knows, by the names under which they were loaded, each removable without a trace.

    Args:
        tokenizer, text_encoder: the model's; neither is touched, `tokenizer` here is the one that knows the words.
    """

    def __init__(self, tokenizer: Any, text_encoder: TextEncoder | TextEncoders) -> None:
        self.tokenizer = self._plain = tokenizer
        self._text_encoder = text_encoder
        self._words: dict[str, list[NewWord]] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._hooks = ExitStack()

    def __contains__(self, name: str | None) -> bool:
        return name in self._words

    def load(self, words: Sequence[NewWord], path: Path, name: str, *, alone: bool = True) -> str:
        """Learn the words of a file; see `Pipeline.load_embedding`.

        Args:
            alone: the file holds nothing else, so that recipes name it for them.
        """
        if name in self._words:
            raise UsageError(
                f"a word called {name!r} is loaded already; unload it first, or give this one another name"
            )
        tokenizer = self.tokenizer
        for word in words:
            tokenizer = word.extended(tokenizer)  # raises if it is known
        device = _token_embeddings(self._text_encoder)[0].weight.device
        self._words[name] = [word.to(device).requires_grad_(False) for word in words]
        if alone:
            self._files[name] = {"file": path.name, "sha256": file_hash(path), "scale": 1.0}
        self._attach()
        return "the " + ", ".join(
            f"word {word.word}" + (f" ({len(word.vectors)} vectors)" if len(word.vectors) > 1 else "") for word in words
        )

    def unload(self, name: str | None) -> None:
        """Forget the words of one file, or all."""
        for each in [*self._words] if name is None else [name]:
            self._words.pop(each)
            self._files.pop(each, None)
        self._attach()

    def to(self, device: torch.device | str) -> None:
        """Follow the model to `device`."""
        for word in self._all():
            word.to(device)

    def describe(self) -> list[dict[str, Any]]:
        """What recipes say of their files, as of LoRAs."""
        return list(self._files.values())

    def _all(self) -> list[NewWord]:
        return [word for words in self._words.values() for word in words]

    def _attach(self) -> None:
        self._hooks.close()
        self.tokenizer = self._plain
        for word in self._all():
            self.tokenizer = word.extended(self.tokenizer)
        for word in self._all():
            self._hooks.enter_context(word.attached(self.tokenizer, self._text_encoder))


def read_embedding(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The vectors of a textual-inversion file by the words that it gives them. Nothing in it is executed.

    The forms of the field: {word: (C,) or (n, C)} (diffusers), {"emb_params": (n, C)}, {"clip_l": ..., "clip_g": ...}
    (SDXL), and {"string_to_param": {"*": (n, C)}, "name": ...} (A1111, `.pt`).

    Raises:
        CheckpointError: there is no such file, it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no embedding {path}")
    file = read_tensors(path)
    inner = file.others.get("string_to_param")
    tensors = {str(name): each for name, each in inner.items()} if isinstance(inner, Mapping) else file.tensors
    vectors = {name: each for name, each in tensors.items() if isinstance(each, Tensor) and each.is_floating_point()}
    if len(vectors) != 1 and set(vectors) != set(_SDXL):
        raise CheckpointError(f"expected the embedding of one word in {path}, found {len(vectors)} tensors")
    return {name: each.detach() for name, each in vectors.items()}


def read_words(path: Path, vectors: Mapping[str, Tensor], text_encoder: TextEncoder | TextEncoders) -> list[NewWord]:
    """Words of these vectors; where their file does not name the word, it is called as the file.

    Raises:
        CheckpointError: they are for another model, or not finite.
    """
    widths = [layer.embedding_dim for layer in _token_embeddings(text_encoder)]
    of_both = set(vectors) == set(_SDXL)
    if of_both and FIRST not in encoders_of(text_encoder):  # the refiner has the second alone
        vectors, of_both = {path.stem: vectors[_SDXL[1]]}, False
    if of_both != (len(widths) > 1):
        kinds = "Stable Diffusion XL", "1.x or 2.x"
        raise CheckpointError(f"{path} is an embedding for {kinds[not of_both]}; expected one for {kinds[of_both]}")
    ordered = [vectors[name] for name in _SDXL] if of_both else list(vectors.values())
    for vector, width in zip(ordered, widths if of_both else widths * len(ordered), strict=True):
        if vector.ndim not in (1, 2) or vector.shape[-1] != width or not vector.numel():
            found = "x".join(map(str, vector.shape))
            raise CheckpointError(
                f"expected vectors of {width} numbers in {path}, found the shape {found}: it is for another model"
            )
        if len(torch.atleast_2d(vector)) > _LONGEST:
            raise CheckpointError(f"expected at most {_LONGEST} vectors in {path}, found {len(vector)}")
        if not torch.isfinite(vector.float()).all():
            raise CheckpointError(f"the embedding {path} holds NaN or infinity; download it again")
    if of_both:
        if len({len(torch.atleast_2d(vector)) for vector in ordered}) > 1:
            raise CheckpointError(f"expected as many vectors for each text encoder in {path}")
        stated = read_tensors(path).metadata.get(_WORD, "").strip()
        return [NewWord(stated or path.stem, *ordered)]
    return [NewWord(path.stem if name in _UNNAMED else name, vector) for name, vector in vectors.items()]


def is_word_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds the embedding of a word, and no LoRA."""
    from latentdiff.checkpoints.architecture import is_embedding

    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".bin") or not path.is_file():
        return False
    file = read_tensors(path)
    return "string_to_param" in file.others or is_embedding({n: tuple(t.shape) for n, t in file.tensors.items()})


def _token_embeddings(text_encoder: nn.Module) -> list[nn.Embedding]:
    """Of each text encoder."""
    return [encoder.text_model.embeddings.token_embedding for encoder in encoders_of(text_encoder).values()]
