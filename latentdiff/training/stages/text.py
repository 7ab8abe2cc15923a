"""Teaching the text encoder from captions alone, before the U-Net sees an image.

A U-Net learns colours and layouts long before it can use the words for things, because the text encoder does not tell these
apart yet, and learns to only through the U-Net. Here linear heads on the embedding of the end mark must say what the caption's
scene holds: background, relation, and of each thing, in the order of mention, its noun, colour, size and number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import DataError
from latentdiff.training.data import Dataset
from latentdiff.training.data.randomness import BatchOrder
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.stages.config import TextStageSection
from latentdiff.training.stages.scenes import read_scenes
from latentdiff.training.task import Task

_THINGS = 3  # of a scene that are asked for
_NOT_ASKED = -100  # label that the cross-entropy leaves out
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_VALIDATION_BATCH = 256


@dataclass(frozen=True)
class SceneLabels:
    """What scenes hold, as classes.

    Attributes:
        classes: question -> its possible answers.
        values: (n, questions) int64, indices of answers in the order of `classes`; -100 where nothing is asked.
    """

    classes: dict[str, tuple[str, ...]]
    values: np.ndarray


def read_labels(data: Dataset) -> SceneLabels:
    """The scenes that stand beside the captions in metadata.jsonl.

    Raises:
        DataError: an image has no scene there, or one that says too little.
    """
    answers = []
    for entry, scene in zip(data.entries, read_scenes(data), strict=True):
        try:
            answers.append(_answers(scene, entry.captions[0]))
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"the `scene` of {entry.name} does not say what the stage text asks: {error!r}") from error
    questions = [question for question in answers[0] if any(a[question] is not None for a in answers)]
    classes = {
        question: tuple(sorted({a[question] for a in answers if a[question] is not None})) for question in questions
    }
    numbers = {question: {answer: index for index, answer in enumerate(classes[question])} for question in questions}
    values = [[numbers[q][a[q]] if a[q] is not None else _NOT_ASKED for q in questions] for a in answers]
    return SceneLabels(classes, np.array(values, dtype=np.int64))


def _answers(scene: Mapping[str, Any], caption: str) -> dict[str, str | None]:
    """Question -> answer; None where the caption does not say, as of a background that it leaves out."""
    things = [(thing["noun"], thing["colour"], thing.get("size")) for thing in scene["objects"]]
    mentioned = _in_order_of_mention(list(dict.fromkeys(things)), caption)
    relation = scene["relation"]
    if relation and mentioned[0] != things[0]:
        relation = _OPPOSITE[relation]
    said = scene["background"] if _says_background(caption, scene["background"]) else "none"
    answers: dict[str, str | None] = {"background": said, "relation": relation or "none"}
    for place in range(_THINGS):
        there = place < len(mentioned)
        noun, colour, size = mentioned[place] if there else (None, None, None)
        answers |= {
            f"noun {place + 1}": noun if there else "none" if place else None,
            f"colour {place + 1}": (colour or "none") if there else None,
            f"size {place + 1}": (size or "none") if there else None,
            f"count {place + 1}": str(things.count(mentioned[place])) if there else None,
        }
    return answers


def _says_background(caption: str, background: str) -> bool:
    return background in caption.split() and (
        "background" in caption or background in ("meadow", "beach", "snow", "night")
    )


def _in_order_of_mention(things: Sequence[tuple[str, Any, Any]], caption: str) -> list[tuple[str, Any, Any]]:
    def place(thing: tuple[str, Any, Any]) -> int:
        stem = thing[0][: max(3, len(thing[0]) - 2)]  # also of "butterflies", "wolves", "leaves"
        found = caption.find(f" {stem}")
        return found if found >= 0 else caption.find(stem)

    return sorted(things, key=place)


class TextTask(Task):
    """The text encoder with its heads.

    Args:
        text_encoder: what is taught.
        settings: how.
        tokenizer: makes token ids of captions.
        data, held_out: captions with their scenes; the held-out ones are asked in the classes of the others.
        seed: of the run.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        settings: TextStageSection,
        tokenizer: Any,
        data: Dataset,
        held_out: Dataset,
        *,
        seed: int,
    ) -> None:
        self.fingerprint = f"{data.fingerprint} shuffled by seed {seed}"
        tokens = CaptionTokens(tokenizer, "cut")
        self._settings, self._data, self._labels = settings, data, read_labels(data)
        self._tokens, self._held_out_tokens = (
            tokens.rows([captions[0] for captions in of.captions], 1)[:, 0] for of in (data, held_out)
        )  # (n, L)
        self._held_out = in_classes_of(self._labels, read_labels(held_out))
        self._order = BatchOrder(data.repeats, settings.batch_size, seed)
        sizes = [len(answers) for answers in self._labels.classes.values()]
        self.module = TextLoss(text_encoder, sizes, tokenizer.eos_token_id)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", dict(self.module.named_parameters()))]

    def batch(self, step: int, rows: range) -> dict[str, np.ndarray]:
        indices = self._order.batch(step, rows)
        return {"tokens": self._tokens[indices], "labels": self._labels.values[indices]}

    def sources(self, step: int) -> list[str]:
        return [self._data.names[index] for index in self._order.batch(step, range(self._settings.batch_size))]

    def validate(self) -> dict[str, float]:
        """Share of right answers to each kind of question on held-out captions."""
        device = next(self.module.parameters()).device
        right, asked = 0, 0
        for start in range(0, len(self._held_out), _VALIDATION_BATCH):
            part = slice(start, start + _VALIDATION_BATCH)
            labels = torch.from_numpy(self._held_out[part]).to(device)
            guesses = self.module.answers(torch.from_numpy(self._held_out_tokens[part]).to(device))
            found = torch.stack([guess.argmax(1) for guess in guesses], dim=1)  # (n, questions)
            right = right + ((found == labels) & (labels >= 0)).sum(0)
            asked = asked + (labels >= 0).sum(0)
        shares = (right / asked.clamp(min=1)).tolist()
        names = [f"right_{question.replace(' ', '_')}" for question in self._labels.classes]
        return {name: round(share, 4) for name, share in zip(names, shares, strict=True)}

    def preview(self, folder: Path, step: int) -> None:
        """There is nothing to see."""


def in_classes_of(labels: SceneLabels, others: SceneLabels) -> np.ndarray:
    """The values of `others` in the classes of `labels`; an answer that these lack is not asked for."""
    columns, places = [], list(others.classes)
    for question, answers in labels.classes.items():
        if question not in others.classes:
            columns.append(np.full(len(others.values), _NOT_ASKED))
            continue
        number = {answer: index for index, answer in enumerate(answers)}
        table = np.array([number.get(answer, _NOT_ASKED) for answer in others.classes[question]])
        values = others.values[:, places.index(question)]
        columns.append(np.where(values >= 0, table[values.clip(0)], _NOT_ASKED))
    return np.stack(columns, axis=1)


class TextLoss(nn.Module):
    """The text encoder, a head for each question, and their summed cross-entropy; `end` is the id of the end mark."""

    def __init__(self, text_encoder: nn.Module, sizes: Iterable[int], end: int) -> None:
        super().__init__()
        self.text_encoder, self._end = text_encoder, end
        self.heads = nn.ModuleList(nn.Linear(text_encoder.embedding_width, size) for size in sizes)

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Loss for token ids (n, L) and labels (n, questions)."""
        losses = [
            F.cross_entropy(guess.float(), answer, ignore_index=_NOT_ASKED, reduction="sum") / len(answer)
            for guess, answer in zip(self.answers(batch["tokens"]), batch["labels"].unbind(1), strict=True)
        ]
        return {"loss": torch.stack(losses).sum()}

    def answers(self, tokens: Tensor) -> list[Tensor]:
        """Scores of the answers to each question, (n, answers)."""
        embeddings = self.text_encoder(tokens)  # (n, L, width)
        places = (tokens == self._end).int().argmax(1)  # the first end mark; padding repeats it
        read = embeddings[torch.arange(len(tokens), device=tokens.device), places]
        return [head(read) for head in self.heads]
