"""The end of a fine-tuning: the result's files, the look for copies, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latentdiff.training.checkpoint import load_checkpoint
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.methods import FinetuningMethod
from latentdiff.training.loop import Trainer
from latentdiff.training.material import Material
from latentdiff.training.report.log import best_step
from latentdiff.training.report.memorization import check_copies
from latentdiff.training.report.page import write_report
from latentdiff.training.validation import fixed_part

# Training images that samples are compared with.
COPY_CANDIDATES = 5000


def finish(
    settings: FinetuneConfig, trainer: Trainer, method: FinetuningMethod, material: Material, written: Sequence[Path]
) -> Path:
    """Write the result from the averaged weights, and the report."""
    if settings.result == "best":
        _take_best(settings, trainer)
    main = trainer.accelerator.is_main_process
    with trainer.ema.swapped_in(), trainer.whole():
        result = method.save(settings.out, _facts(settings, material, method)) if main else _result(settings)
    if not main:
        return result
    if written:
        data = material.samples.data
        training = material.training.tolist()
        names = [data.names[index] for index in training]
        candidates = fixed_part(names, range(len(names)), COPY_CANDIDATES, settings.seed)
        check_copies(settings.out, written, names, lambda place: data.load(training[place]), candidates.tolist())
    write_report(settings.out)
    return result


def _take_best(settings: FinetuneConfig, trainer: Trainer) -> None:
    step = best_step(settings.out)
    path = settings.out / "checkpoints" / f"step-{step or 0:08d}"
    if path.is_dir():
        trainer.take_weights(load_checkpoint(path), path)
        trainer.accelerator.print(f"the result is that of step {step}, the best by validation loss")
    else:
        trainer.accelerator.print(
            f"no checkpoint of step {step}, the best by validation loss, was kept; taking the last step"
        )


def _facts(settings: FinetuneConfig, material: Material, method: FinetuningMethod) -> dict[str, Any]:
    """What a LoRA file says about its training; of the words, those that the model did not know."""
    known, texts = method.parts.words, _captions(material)
    return {
        **({} if known is None else {"words": sorted(known.with_texts(texts).all - known.all)}),
        "images": len(material.training),
        "steps": settings.max_steps,
        "learning_rate": settings.lr,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "resolution": "{}x{}".format(*max(material.samples.buckets[index] for index in material.training)),
        "data": [entry.path for entry in settings.data],
    }


def _captions(material: Material) -> Iterator[str]:
    return (text for index in material.training for text in material.samples.data.captions[index])


def _result(settings: FinetuneConfig) -> Path:
    names = {"lora": "lora.safetensors", "full": "model", "controlnet": "controlnet"}
    return settings.out / names.get(settings.method, "embedding.safetensors")
