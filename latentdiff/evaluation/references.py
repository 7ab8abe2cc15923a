"""What the scores can be at best and at worst: the judge on real scenes, on what the VAE makes of them, on wrong
captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from latentdiff.errors import DataError
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import TASK_OF_KIND, EvaluationPrompt, prompt_of_scene
from latentdiff.evaluation.protocol import Result, check_words, judged
from latentdiff.image import open_image, psnr, to_pil, to_tensor
from latentdiff.pipeline import Pipeline
from latentdiff.reading.json import parse_object
from latentdiff.reading.plain import read_text

BATCH = 16


@dataclass(frozen=True)
class RealScenes:
    """Images of one size that show exactly what their prompts ask for."""

    images: list[Image.Image]
    prompts: list[EvaluationPrompt]


@dataclass(frozen=True)
class References:
    """The judge's scores that a model's scores are to be read against."""

    ceiling: Result  # real scenes with their own captions
    floor: Result  # real scenes with the caption of another scene of the same task
    reconstructions: Result  # what the model's VAE makes of the real scenes
    psnr: float  # of the reconstructions, dB, mean over images


def read_scenes(folder: Path) -> RealScenes:
    """Read the scenes of the six tasks from a folder made by tools/make_scenes.py.

    Raises:
        DataError: there is no such folder, a line is no scene, or none is about a task.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(f"expected scenes in {folder}, found no metadata.jsonl; make them with tools/make_scenes.py")
    images, prompts = [], []
    for number, text in enumerate(read_text(metadata, DataError).splitlines()):
        line = parse_object(text, f"{metadata} line {number + 1}", DataError, remedy="mend that line")
        try:
            if line["scene"]["kind"] not in TASK_OF_KIND:
                continue
            prompt, name = prompt_of_scene(line["scene"], line["text"]), line["file_name"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{metadata} line {number + 1}: expected a scene, found {text[:60]!r}") from error
        prompts.append(replace(prompt, number=number))
        images.append(open_image(folder / name))
    if not images:
        raise DataError(f"no scene in {folder} is about one of GenEval's tasks")
    return RealScenes(images, prompts)


def score_references(pipeline: Pipeline, judge: Judge, scenes: RealScenes, *, progress: bool = True) -> References:
    """Judge real scenes, the same with other captions, and their reconstructions by the model's VAE.

    Raises:
        DataError: the judge does not know what the scenes show, or their size does not suit the VAE.
    """
    check_words(scenes.prompts, judge)
    reconstructions = reconstruct(pipeline, scenes.images, progress=progress)
    pairs = zip(scenes.images, reconstructions, strict=True)
    return References(
        ceiling=score(judge, scenes.images, scenes.prompts),
        floor=score(judge, scenes.images, shuffled(scenes.prompts)),
        reconstructions=score(judge, reconstructions, scenes.prompts),
        psnr=float(np.mean([psnr(image, copy) for image, copy in pairs])),
    )


def score(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[EvaluationPrompt]) -> Result:
    """Judge images that exist already, each against its own prompt."""
    return Result.of([judged(prompt, seen) for prompt, seen in zip(prompts, judge(images), strict=True)])


def shuffled(prompts: Sequence[EvaluationPrompt]) -> list[EvaluationPrompt]:
    """The prompts, each at the place of the one before it in its task; a task with one prompt keeps it."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt.task].append(place)
    moved = list(prompts)
    for own in places.values():
        for place, source in zip(own, own[1:] + own[:1], strict=True):
            moved[place] = prompts[source]
    return moved


@torch.no_grad()
def reconstruct(pipeline: Pipeline, images: Sequence[Image.Image], *, progress: bool = True) -> list[Image.Image]:
    """Encode (to the mode) and decode images with the model's VAE.

    Raises:
        DataError: the images differ in size, or their sides are no multiples of the VAE's factor.
    """
    width, height = images[0].size
    factor = pipeline.vae.config.downscale
    if width % factor or height % factor or any(image.size != (width, height) for image in images):
        raise DataError(
            f"expected scenes of one size with sides that are multiples of {factor}, found {width}x{height}"
        )
    copies: list[Image.Image] = []
    for start in tqdm(range(0, len(images), BATCH), unit="batch", disable=None if progress else True, leave=False):
        pixels = to_tensor(images[start : start + BATCH]).to(pipeline.device, pipeline.precision.vae)  # (N, 3, H, W)
        copies += to_pil(pipeline.decode(pipeline.vae.encode(pixels).mode()))
    return copies
