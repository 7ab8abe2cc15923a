"""Prompts -> text embeddings: chunks encoded one by one, weighted, and joined along the sequence.

A prompt whose text changes over the steps, or that joins several texts by `AND`, becomes several embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UsageError
from latentdiff.networks.device import finite_or_float32
from latentdiff.networks.pooled import joined_chunks
from latentdiff.networks.text_encoders import PENULTIMATE, TextEncoders
from latentdiff.prompts.notice import shortened
from latentdiff.prompts.syntax import Chunk, chunks_of, read_prompt, warn_of_lost_text, warn_of_unheeded


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    syntax: "a1111", "comfy" or "plain"; see `latentdiff.prompts.syntax`.
    clip_skip: which hidden state of the text encoder is taken, from its end: 1 is the last, as the model was trained,
        2 the one before it. That is AUTOMATIC1111's counting; diffusers' `clip_skip` is one less. SDXL was trained on the
        second, which 1 and 2 are there; diffusers' is two less.
    """

    syntax: str = "plain"
    clip_skip: int = 1


PLAIN = Reading()
_ZEROS = "\0"  # no text of a prompt


@dataclass(frozen=True)
class EncodedPart:
    """One of the texts that `AND` joins."""

    weight: float
    stages: tuple[tuple[int, Tensor], ...]  # last step, from 1, and embeddings (1, L, C), float32

    def at(self, step: int) -> Tensor:
        """What holds at a step, from 1."""
        return next((text for last, text in self.stages if step <= last), self.stages[-1][1])


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the U-Net is told it."""

    parts: tuple[EncodedPart, ...]

    @classmethod
    def of(cls, embeddings: Tensor) -> list[EncodedPrompt]:
        """Of embeddings (N, L, C), one prompt for each row, the same at all steps."""
        return [cls((EncodedPart(1.0, ((1, row),)),)) for row in embeddings.split(1)]

    @property
    def is_plain(self) -> bool:
        """Whether it has one part of weight 1."""
        return len(self.parts) == 1 and self.parts[0].weight == 1.0


EncodedTexts = tuple[list[EncodedPrompt], list[EncodedPrompt]]  # what each image follows, and what it avoids


@dataclass(frozen=True)
class Given:
    """Embeddings that a caller gives in place of prompts or negative prompts; the prompts are empty then."""

    prompts: str | Sequence[str]
    positive: Tensor | None
    negative: Tensor | None

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str] | None,
        negatives: str | Sequence[str],
        positive: Tensor | None,
        negative: Tensor | None,
    ) -> Given:
        """Check that each is said once.

        Raises:
            UsageError: a prompt and its embeddings, or neither.
        """
        if (prompts is None) == (positive is None):
            found = "neither" if prompts is None else "both"
            raise UsageError(f"expected a prompt, or prompt_embeds in its place; found {found}")
        if negative is not None and negatives not in ("", [""]):
            raise UsageError("expected a negative prompt or negative_prompt_embeds; found both")
        return cls(prompts if positive is None else [""] * len(positive), positive, negative)

    @property
    def is_given(self) -> bool:
        """Whether there are any."""
        return self.positive is not None or self.negative is not None

    def instead_of(self, texts: EncodedTexts, width: int, pooled_after: int | None = None) -> EncodedTexts:
        """The texts of the images, with the given ones in their place.

        Args:
            pooled_after: length of a chunk, where the model wants pooled text in a row behind the chunks.

        Raises:
            UsageError: embeddings of another shape.
        """
        positive, negative = texts
        for name, given in (("prompt_embeds", self.positive), ("negative_prompt_embeds", self.negative)):
            if pooled_after and given is not None and given.ndim == 3 and given.shape[1] % pooled_after != 1:
                raise UsageError(
                    f"expected {name} with the pooled text in a row more than {pooled_after} or a multiple of it, as `encode` "
                    f"and `latentdiff.networks.pooled.with_pooled` make them, found {given.shape[1]} rows"
                )
        return (
            _in_place(positive, "prompt_embeds", self.positive, width),
            _in_place(negative, "negative_prompt_embeds", self.negative, width),
        )


def _in_place(texts: list[EncodedPrompt], name: str, given: Tensor | None, width: int) -> list[EncodedPrompt]:
    if given is None:
        return texts
    if given.ndim != 3 or given.shape[2] != width or not len(given) or len(texts) % len(given):
        raise UsageError(
            f"expected {name} of shape (N, L, {width}), one for all images or each prompt, found {tuple(given.shape)}"
        )
    if not given.isfinite().all():
        raise UsageError(f"expected finite {name}, found NaN or infinity")
    of_each = EncodedPrompt.of(given.to(texts[0].parts[0].stages[0][1]))
    return [of_each[place * len(given) // len(texts)] for place in range(len(texts))]


class PromptEncoder:
    """Embeds prompts; each distinct text once, alone.

    Args:
        tokenizer: a `Tokenizer`, or one of transformers.
        text_encoder: token ids (N, L) -> embeddings (N, L, C).

    Raises:
        UsageError: there is no such layer or syntax.
    """

    def __init__(self, tokenizer: Any, text_encoder: nn.Module, device: torch.device, reading: Reading = PLAIN) -> None:
        self._tokenizer, self._text_encoder, self._device, self._reading = tokenizer, text_encoder, device, reading
        self._two = text_encoder if isinstance(text_encoder, TextEncoders) else None
        most = text_encoder.depth + (0 if self._two is None else PENULTIMATE)
        if not 1 <= reading.clip_skip <= most:
            raise UsageError(
                f"expected a clip skip of 1 (none) to {most}, the layers of the text encoder, found {reading.clip_skip}"
            )
        self._texts: dict[str, Tensor] = {}

    def prompt(self, text: str, steps: int, *, negative: bool = False) -> EncodedPrompt:
        """A prompt over `steps` steps."""
        prompt = read_prompt(text, self._reading.syntax, negative=negative)
        warn_of_unheeded(prompt)
        embedded = self.negative if negative else self.text
        return EncodedPrompt(
            tuple(
                EncodedPart(
                    part.weight, tuple((stage.last, embedded(stage.text)) for stage in prompt.stages(part, steps))
                )
                for part in prompt.parts
            )
        )

    def simple(self, text: str, *, negative: bool = False) -> Tensor:
        """A prompt that says one thing from the first step to the last, (1, L, C).

        Raises:
            UsageError: it is composed, or changes on the way.
        """
        prompt = read_prompt(text, self._reading.syntax)
        if not prompt.is_simple or prompt.loras:
            raise UsageError(
                "expected a prompt without AND, weight at its end, <lora:...> and text that changes over the steps, which "
                f"only generating and editing by noise can follow; found {shortened(text)}"
            )
        warn_of_unheeded(prompt)
        return (self.negative if negative else self.text)(prompt.parts[0].text)

    def filled(self, texts: Sequence[Tensor]) -> Tensor:
        """Texts (1, L, C) as one tensor: where they have different numbers of chunks, empty ones fill up the shorter."""
        longest, empty = max(text.shape[1] for text in texts), self.text("")
        chunk = empty.shape[1] - (self._two is not None)
        missing = [(longest - text.shape[1]) // chunk for text in texts]
        return torch.cat([self._joined([text, *[empty] * count]) for text, count in zip(texts, missing, strict=True)])

    def text(self, text: str) -> Tensor:
        """The text of a stage, (1, L, C) float32."""
        if text not in self._texts:
            self._texts[text] = self._embedded(text)
        return self._texts[text]

    def negative(self, text: str) -> Tensor:
        """What to avoid at a stage, (1, L, C): of a model that was trained so, zeros if it is empty."""
        found = self.text(text)
        if text.strip() or self._two is None or not self._two.zero_empty:
            return found
        return self._texts.setdefault(_ZEROS, torch.zeros_like(found))

    def _embedded(self, text: str) -> Tensor:
        if self._reading.syntax == "plain":
            warn_of_lost_text(self._tokenizer, text)
        chunks = chunks_of(self._tokenizer, text, self._reading.syntax)
        return self._joined([self._weighted(chunk, text) for chunk in chunks])

    def _joined(self, chunks: list[Tensor]) -> Tensor:
        return torch.cat(chunks, dim=1) if self._two is None else joined_chunks(chunks, pooled=True)

    def _weighted(self, chunk: Chunk, text: str) -> Tensor:
        """The embeddings of a chunk, (1, 77, C), and pooled text, which has no weight."""
        found, weights = self._encoded(chunk, text)
        if not chunk.is_weighted:
            return found
        z, pooled = found.tensor_split([weights.shape[1]], dim=1)
        if self._reading.syntax == "comfy":
            empty = self._encoded(Chunk(), "")[0][:, : weights.shape[1]]
            weighted = torch.where(weights == 1.0, z, empty + weights * (z - empty))
        else:
            widths = z.shape[2] if self._two is None else self._two.widths
            weighted = torch.cat([_of_same_mean(part, weights) for part in z.split(widths, dim=2)], dim=2)
        weighted = torch.cat([weighted, pooled], dim=1)
        if not weighted.isfinite().all():
            raise UsageError(f"expected weights that leave something of the prompt, found {shortened(text)}")
        return weighted

    def _encoded(self, chunk: Chunk, text: str) -> tuple[Tensor, Tensor]:
        """Embeddings (1, 77, C), with pooled text (1, 78, C), and weights (1, 77, 1)."""
        ids, weights = chunk.framed(self._tokenizer)
        token_ids = torch.tensor([ids], device=self._device)
        own = 1 if self._two is None else 1 + PENULTIMATE  # what the model was trained on
        encoder, skip = self._text_encoder, max(self._reading.clip_skip - own, 0)
        found = finite_or_float32(
            "the text encoder", encoder, lambda _: encoder(token_ids, skip=skip), where=lambda: f"on {shortened(text)}"
        ).float()
        return found, torch.tensor(weights, dtype=torch.float32, device=found.device)[None, :, None]


def _of_same_mean(z: Tensor, weights: Tensor) -> Tensor:
    """One encoder's embeddings times the weights, brought back to their mean."""
    weighted = z * weights
    return weighted * (z.mean() / weighted.mean())
