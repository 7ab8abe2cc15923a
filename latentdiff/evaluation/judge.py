"""What an image shows, according to the judge.

The judge is trained on composed scenes, whole and damaged (`tools/train_judge.py`). It shares no weights with any
generative model, so that no model is judged by its own mistakes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.evaluation.network import STRIDE, JudgeConfig, JudgeNetwork, JudgeOutput
from latentdiff.files import atomic_path
from latentdiff.image import to_tensor
from latentdiff.reading.json import read_object
from latentdiff.reading.plain import exists

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
BATCH = 64
NEIGHBOURHOOD = 5  # cells; a centre is the highest score of so many by so many


@dataclass(frozen=True)
class Seen:
    """One object that the judge sees.

    Args:
        colour: None where the object has its own colours.
        box: left, top, right, bottom as shares of the image's width and height.
        score: how sure the judge is that this noun is there, 0 to 1.
    """

    noun: str
    colour: str | None
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one image; objects from the surest to the least sure.

    Args:
        unclear: places where something stands that it cannot name.
    """

    objects: tuple[Seen, ...]
    background: str
    unclear: int = 0


class Judge:
    """Sees nouns, colours, boxes and the background in images."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval()
        self.config = network.config

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Judge:
        """Load a judge that `tools/train_judge.py` wrote.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = Path(folder)
        if missing := [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not exists(folder / name)]:
            raise CheckpointError(f"expected the judge in {folder}, found no {missing[0]}")
        try:
            config = JudgeConfig.from_json(read_object(folder / CONFIG_NAME))
        except (ValueError, TypeError, ConfigError) as error:
            raise CheckpointError(f"the judge in {folder} is damaged: {error}") from error
        weights = read_tensors(folder / WEIGHTS_NAME).tensors
        network = JudgeNetwork(config)
        try:
            network.load_state_dict({name: value.float() for name, value in weights.items()})
        except RuntimeError as error:
            raise CheckpointError(f"the judge in {folder} does not fit its config.json: {error}") from error
        return cls(network)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Look at images of any size; each is resized to the judge's own."""
        verdicts = []
        for start in range(0, len(images), BATCH):
            resized = [self._fit(image) for image in images[start : start + BATCH]]
            verdicts += read_output(self.network(to_tensor(resized)), self.config)
        return verdicts

    def _fit(self, image: Image.Image) -> Image.Image:
        side = self.config.size
        image = image.convert("RGB")
        return (
            image
            if image.size == (side, side)
            else image.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        )


def read_output(output: JudgeOutput, config: JudgeConfig) -> list[Verdict]:
    """Turn raw outputs into objects: at each peak of the centres' map the likeliest noun and colour."""
    # What is unknown takes its share of the certainty and is never named.
    certainty, noun = output.noun.softmax(1)[:, : len(config.nouns)].max(1)  # (N, h, w) each
    there = output.centre.sigmoid()
    score = there * certainty
    highest = peaks(output.centre)
    unclear = (highest & (there > config.threshold) & (score <= config.threshold)).sum((1, 2)).tolist()
    colour = output.colour.argmax(1)
    found: list[list[Seen]] = [[] for _ in score]
    colours = (*config.colours, None)
    for image, row, column in (highest & (score > config.threshold)).nonzero().tolist():
        box = _corners(output.box[image, :, row, column], row, column, config.size // STRIDE)
        where = (image, row, column)
        found[image].append(Seen(config.nouns[noun[where]], colours[colour[where]], box, float(score[where])))
    backgrounds = output.background.argmax(1).tolist()
    return [
        Verdict(tuple(sorted(objects, key=lambda seen: -seen.score)), config.backgrounds[background], doubtful)
        for objects, background, doubtful in zip(found, backgrounds, unclear, strict=True)
    ]


def peaks(centre: Tensor) -> Tensor:
    """Where the centres' map (N, h, w) of logits is highest around; bool (N, h, w)."""
    # Logits, for probabilities next to one another may round to the same 1.
    return centre == F.max_pool2d(centre, NEIGHBOURHOOD, stride=1, padding=NEIGHBOURHOOD // 2)


def _corners(box: Tensor, row: int, column: int, cells: int) -> tuple[float, float, float, float]:
    dx, dy, width, height = box.tolist()
    x, y = (column + 0.5) / cells + dx, (row + 0.5) / cells + dy
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def save_judge(network: JudgeNetwork, folder: Path) -> None:
    """Write the weights in float16 and the config."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(weights, temporary)
    with atomic_path(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(network.config.to_json(), indent=2) + "\n", encoding="utf-8")
