"""One evaluation from the model's name to `results.json`: what `latentdiff evaluate` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import UsageError
from latentdiff.evaluation.agreement import read_agreement
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import EvaluationPrompt, read_prompts
from latentdiff.evaluation.protocol import score_prompts
from latentdiff.evaluation.references import read_scenes, score_references
from latentdiff.evaluation.report import HOW_TO_MAKE_SCENES, Scores
from latentdiff.files import atomic_path
from latentdiff.image import save_png
from latentdiff.pipeline import Pipeline


def evaluate(
    model: str | None = None,
    *,
    out: Path,
    loras: Sequence[tuple[str | Path, float]] = (),
    limit: int | None = None,
    seeds: int = 4,
    steps: int = 25,
    guidance: float = 5.0,
    sampler: str = "ddim",
    scenes: Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
    progress: bool = True,
) -> Scores:
    """Score a model; images and scores are written below `out`.

    Args:
        model: as `Pipeline.load` takes it; None is the embedded model.
        loras: files that adapt it, each with its scale.
        limit: prompts of each task; None is all.
        seeds: images of each prompt.
        scenes: real scenes made by tools/make_scenes.py, for the judge's ceiling and floor and the VAE's scores; None
            leaves these out.

    Returns:
        The report; `str` gives a table, `to_json` what `out/results.json` holds.

    Raises:
        UsageError, CheckpointError, DataError: see `Pipeline.load`, `score_prompts` and `read_scenes`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"expected a folder for --out, found the file {out}")
    judge, agreement = Judge.load(embedded_judge()), read_agreement(embedded_judge())
    prompts = read_prompts(limit=limit)
    real = read_scenes(Path(scenes)) if scenes else None  # before anything that takes long
    pipeline = Pipeline.load(model, device=device)
    for path, scale in loras:
        pipeline.load_lora(path, scale)

    settings = {"seeds_per_prompt": seeds, "steps": steps, "guidance_scale": guidance, "sampler": sampler}

    def keep(prompt: EvaluationPrompt, images: Sequence[Image.Image]) -> None:
        save_images(out, prompt, images)

    result = score_prompts(
        pipeline, prompts, judge=judge, **settings, batch_size=batch_size, progress=progress, on_images=keep
    )
    references = score_references(pipeline, judge, real, progress=progress) if real else None
    notes = (
        () if real else (f"for the judge's ceiling and floor: {HOW_TO_MAKE_SCENES}; then --scenes data/scenes-test",)
    )
    adapted = {"loras": pipeline.adaptations()} if loras else {}
    report = Scores(pipeline.name, pipeline.model_hash, settings | adapted, result, references, notes, agreement)
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return report


def save_images(out: Path, prompt: EvaluationPrompt, images: Sequence[Image.Image]) -> None:
    """Write a prompt's images in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png, ..."""
    folder = out / f"{prompt.number:05d}"
    with atomic_path(folder / "metadata.jsonl") as temporary:
        temporary.write_text(json.dumps(prompt.to_json()) + "\n", encoding="utf-8")
    for index, image in enumerate(images):
        save_png(image, folder / "samples" / f"{index:04d}.png")
