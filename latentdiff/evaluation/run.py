"""One evaluation from the model's name to `results.json`: what `latentdiff evaluate` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import UsageError
from latentdiff.evaluation.agreement import read_agreement
from latentdiff.evaluation.breakdown import groups_of, image_path, save_examples
from latentdiff.evaluation.comparison import Compared
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import EvaluationPrompt, read_prompts
from latentdiff.evaluation.protocol import score_prompts
from latentdiff.evaluation.references import RealScenes, read_scenes, score_references
from latentdiff.evaluation.report import HOW_TO_MAKE_SCENES, Scores
from latentdiff.files import atomic_path
from latentdiff.image import save_png
from latentdiff.pipeline import Pipeline
from latentdiff.request.plan import customary_guidance

_NAMED = 8  # unknown words in a line


def evaluate(
    model: str | None = None,
    *,
    out: Path,
    compare: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    limit: int | None = None,
    seeds: int = 4,
    steps: int = 25,
    guidance: float | None = None,
    sampler: str = "ddim",
    scenes: Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
    progress: bool = True,
) -> Scores | Compared:
    """Score a model; images and scores are written below `out`.

    Args:
        model: as `Pipeline.load` takes it; None is the embedded model.
        compare: another model for the same prompts and seeds, whose images and scores are written below
            `out/compared`; None is none.
        loras: files that adapt the model, not the other one, each with its scale.
        limit: prompts of each task; None is all.
        seeds: images of each prompt.
        guidance: scale; None is what is customary for each model.
        scenes: real scenes made by tools/make_scenes.py, for the judge's ceiling and floor and the VAE's scores; None
            leaves these out.

    Returns:
        The report, or both with their differences; `str` gives tables, `to_json` what `out/results.json` holds.

    Raises:
        UsageError, CheckpointError, DataError: see `Pipeline.load`, `score_prompts` and `read_scenes`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"expected a folder for --out, found the file {out}")
    judge = Judge.load(embedded_judge())
    prompts = read_prompts(limit=limit)
    real = read_scenes(Path(scenes)) if scenes else None  # before anything that takes long
    settings = {"seeds_per_prompt": seeds, "steps": steps, "guidance_scale": guidance, "sampler": sampler}
    how = _How(judge, prompts, real, settings, batch_size, progress)

    pipeline = Pipeline.load(model, device=device)
    other = None if compare is None else Pipeline.load(compare, device=device)  # before the first one's images
    for path, scale in loras:
        pipeline.load_lora(path, scale)
    report = _scored(pipeline, out, how)
    if other is None:
        return report
    compared = Compared(report, _scored(other, out / "compared", how))
    _write(out, compared)
    return compared


@dataclass(frozen=True)
class _How:
    """What is the same for all models."""

    judge: Judge
    prompts: Sequence[EvaluationPrompt]
    real: RealScenes | None
    settings: dict[str, Any]
    batch_size: int
    progress: bool


def _scored(pipeline: Pipeline, out: Path, how: _How) -> Scores:
    """Score one model; write its images, an image of each kind of failure, and results.json."""

    def keep(prompt: EvaluationPrompt, images: Sequence[Image.Image]) -> None:
        save_images(out, prompt, images)

    settings = how.settings
    if settings["guidance_scale"] is None:
        settings = settings | {"guidance_scale": customary_guidance(pipeline.schedule, settings["sampler"])}
    result = score_prompts(
        pipeline, how.prompts, judge=how.judge, **settings, batch_size=how.batch_size, progress=how.progress,
        on_images=keep,
    )  # fmt: skip
    references = score_references(pipeline, how.judge, how.real, progress=how.progress) if how.real else None
    notes = [*unknown_words(pipeline, how.prompts)]
    if not how.real:
        notes.append(f"for the judge's ceiling and floor: {HOW_TO_MAKE_SCENES}; then --scenes data/scenes-test")
    adapted = {"loras": adaptations} if (adaptations := pipeline.adaptations()) else {}
    report = Scores(
        pipeline.name, pipeline.model_hash, settings | adapted, result, references, tuple(notes),
        read_agreement(embedded_judge()),
    )  # fmt: skip
    save_examples(out, groups_of(result))
    _write(out, report)
    return report


def unknown_words(pipeline: Pipeline, prompts: Sequence[EvaluationPrompt]) -> Iterator[str]:
    """A line about the words of the prompts that a model was not trained on, where it says what it was trained on."""
    if pipeline.words and (unknown := pipeline.words.unknown(prompt.text for prompt in prompts)):
        named = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "")
        yield f"this model does not know {len(unknown)} of the words that it is judged by ({named}): its scores suffer by that"


def _write(out: Path, report: Scores | Compared) -> None:
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


def save_images(out: Path, prompt: EvaluationPrompt, images: Sequence[Image.Image]) -> None:
    """Write a prompt's images in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png, ..."""
    folder = out / f"{prompt.number:05d}"
    with atomic_path(folder / "metadata.jsonl") as temporary:
        temporary.write_text(json.dumps(prompt.to_json()) + "\n", encoding="utf-8")
    for index, image in enumerate(images):
        save_png(image, image_path(out, prompt.number, index))
