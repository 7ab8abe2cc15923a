"""The end of a fine-tuning: when it has come, the result's files, the look for copies, and the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image

from latentdiff.files import atomic_path
from latentdiff.training.agreement import from_main
from latentdiff.training.checkpoint import load_checkpoint
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.methods import FinetuningMethod
from latentdiff.training.finetuning.stopping import Choice, choose
from latentdiff.training.loop import Trainer
from latentdiff.training.material import Material
from latentdiff.training.report.log import LOG, RESULT, RunLog, best_step
from latentdiff.training.report.memorization import check_copies, count_copies
from latentdiff.training.report.page import write_report
from latentdiff.training.sheets import sample_folder
from latentdiff.training.validation import fixed_part

# Training images that samples are compared with.
COPY_CANDIDATES = 5000

_LONGEST_PROMPT = 80  # characters, in the command that uses the result


class Decision:
    """When a run with `stop: auto` is done; see `stopping.choose`.

    Args:
        settings: patience, and the least that must be kept.
        material: the training images, with which samples are compared.
        written: gives the newest samples.
    """

    def __init__(self, settings: FinetuneConfig, material: Material, written: Callable[[], Sequence[Path]]) -> None:
        self._settings, self._material, self._written = settings, material, written

    def choice(self) -> Choice:
        """What the log says up to now."""
        path = self._settings.out / LOG
        log = RunLog.read(path) if path.is_file() else RunLog({})
        return choose(log, patience=self._settings.patience, least_kept=self._settings.least_kept)

    def best(self) -> int | None:
        """The best step so far."""
        return self.choice().step

    def is_done(self) -> bool:
        """Whether more steps are not worth their time."""
        return self.choice().ended

    def seen(self) -> dict[str, float]:
        """`copies`: how many of the newest samples are suspiciously near a training image."""
        load, candidates, _ = _candidates(self._settings, self._material)
        written = self._written()
        return {"copies": count_copies(written, load, candidates)} if written else {}


def finish(
    settings: FinetuneConfig, trainer: Trainer, method: FinetuningMethod, material: Material, written: Sequence[Path]
) -> Path:
    """Write the result from the averaged weights, and the report."""
    step, why = trainer.step, ""
    if settings.stop == "auto":
        choice = from_main(trainer.accelerator, Decision(settings, material, lambda: written).choice)
        why = choice.why
        if choice.ended:
            trainer.accelerator.print(f"stopped at step {step} of {settings.max_steps}: {why}")
        step = _take(choice.step, "the chosen one", trainer)
    elif settings.result == "best":
        step = _take(from_main(trainer.accelerator, lambda: best_step(settings.out)), "the best by validation loss", trainer)
    main = trainer.accelerator.is_main_process
    with trainer.ema.swapped_in(), trainer.whole():
        result = method.save(settings.out, _facts(settings, material, method, step)) if main else _result(settings)
    if not main:
        return result
    with atomic_path(settings.out / RESULT) as temporary:
        about = {"step": step, "why": why, "use": _use(settings, material, result)}
        temporary.write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
    # Those that no hole was painted in are the images themselves.
    compares = material.samples.holes is None or len(material.held_out[1]) > 0
    if compares and (drawn := [path for path in map(partial(_of_step, settings.out, step), written) if path.is_file()]):
        load, candidates, names = _candidates(settings, material)
        check_copies(settings.out, drawn, names, load, candidates)
    write_report(settings.out)
    return result


def _candidates(
    settings: FinetuneConfig, material: Material
) -> tuple[Callable[[int], Image.Image], list[int], list[str]]:
    """Gives training images by number, the numbers with which samples are compared, and all names."""
    data, learned = material.samples.data, material.learned.tolist()
    names = [data.names[index] for index in learned]
    candidates = fixed_part(names, range(len(names)), COPY_CANDIDATES, settings.seed)
    return lambda place: data.load(learned[place]), candidates.tolist(), names


def _of_step(run: Path, step: int, sample: Path) -> Path:
    """The same sample of the step that the result is from; of the last one where none was drawn then."""
    other = sample_folder(run, step, "ema") / sample.name
    return other if other.is_file() else sample


def _take(step: int | None, what: str, trainer: Trainer) -> int:
    """Take the weights of a step, if they were kept; returns the step whose weights are taken."""
    path = trainer.folder / "checkpoints" / f"step-{step or 0:08d}"
    if path.is_dir():
        trainer.take_weights(load_checkpoint(path), path)
        trainer.accelerator.print(f"the result is that of step {step}, {what}")
        return int(path.name.removeprefix("step-"))
    trainer.accelerator.print(f"no checkpoint of step {step}, {what}, was kept; taking the last step")
    return trainer.step


def _facts(settings: FinetuneConfig, material: Material, method: FinetuningMethod, step: int) -> dict[str, Any]:
    """What a LoRA file says about its training; of the words, those that the model did not know."""
    known, texts = method.parts.words, _captions(material)
    return {
        **({} if known is None else {"words": sorted(known.with_texts(texts).all - known.all)}),
        "images": len(material.learned),
        "steps": step,
        "learning_rate": settings.lr,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "resolution": "{}x{}".format(*max(material.samples.buckets[index] for index in material.training)),
        "data": [entry.path for entry in settings.data],
    }


def _captions(material: Material) -> Iterator[str]:
    return (text for index in material.training for text in material.samples.data.captions[index])


def _use(settings: FinetuneConfig, material: Material, result: Path) -> str:
    """The command that uses the result, with a caption of the training for a prompt."""
    learned = (material.samples.data.captions[index][0] for index in material.learned)
    prompt = next(filter(None, (*settings.prompts, *learned)), "")
    words = ["generate", shorten(prompt, _LONGEST_PROMPT, placeholder="")]
    if material.samples.holes is not None:
        words = ["inpaint", "IMAGE", *words[1:], "--mask", "MASK"]
    if settings.model and settings.method != "full":
        words += ["--model", str(settings.model)]
    if settings.method == "controlnet":
        words += ["--control", f"{settings.control_kind}=IMAGE" if settings.control_kind else "HINT"]
    flags = {"full": "--model", "controlnet": "--control-model", "textual_inversion": "--embedding"}
    return shlex.join(["latentdiff", *words, flags.get(settings.method, "--lora"), str(result)])


def _result(settings: FinetuneConfig) -> Path:
    names = {"lora": "lora.safetensors", "full": "model", "controlnet": "controlnet"}
    return settings.out / names.get(settings.method, "embedding.safetensors")
