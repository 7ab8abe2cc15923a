"""A fine-tuning from its configuration to its result: data, caches, training, result, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from latentdiff.checkpoints.components import load_components
from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.device import is_out_of_memory
from latentdiff.diffusion.schedule import Schedule
from latentdiff.engines.fast_forms import use_fast_forms
from latentdiff.errors import ConfigError, DataError, LatentDiffError, UsageError
from latentdiff.files import atomic_path
from latentdiff.model import EMBEDDED_NAME
from latentdiff.networks.attention import use_attention_backend
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.config import dump_config, read_yaml
from latentdiff.training.finetuning.config import FinetuneConfig, load_finetune_config, make_config
from latentdiff.training.finetuning.loss import FinetuneLoss
from latentdiff.training.finetuning.material import Material, build_caches, read_material, write_summary
from latentdiff.training.finetuning.memorization import check_copies
from latentdiff.training.finetuning.methods import Method, make_method
from latentdiff.training.finetuning.report import best_step, write_report
from latentdiff.training.finetuning.sheets import SampleSheets
from latentdiff.training.finetuning.task import FinetuneTask
from latentdiff.training.finetuning.validation import fixed_part, sample_prompts
from latentdiff.training.lean import lean_layers
from latentdiff.training.loop import Trainer
from latentdiff.training.objective import DiffusionObjective
from latentdiff.training.sharding import is_sharding

CONFIG = "config.yaml"

# Latents of up to this many entries a channel are attended to faster without PyTorch's fused kernels, on a CPU in
# bfloat16.
_SMALL_LATENT = 32 * 32

# Training images that samples are compared with.
_COPY_CANDIDATES = 5000


def finetune(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Mapping[str, Any]] | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a model on captioned images.

    Args:
        data: one or more folders, shards or data sets; see `latentdiff data check`.
        resume: folder of a run to go on with, from its newest whole checkpoint.
        config: a YAML file.
        settings: any key of `FinetuneConfig`, which replace those of the file: method, out, max_steps, lr ...

    Returns:
        The result: `OUT/lora.safetensors` for method lora, the model folder `OUT/model` for method full.

    Raises:
        UsageError: there is no data, or `out` holds a run already.
        ConfigError: an unknown key, or a value outside its domain.
        DataError: the images cannot be trained on, or the run folder cannot be written to.
        NotFiniteError: the loss became NaN or infinite; the newest checkpoint is from before.
        TrainingStopped: a signal ended the run after it was saved.
    """
    given = {**settings, **({} if data is None else {"data": data if isinstance(data, list | tuple) else [data]})}
    return run(resolve(resume and Path(resume), config and Path(config), given))


def resolve(resume: Path | None, config: Path | None, given: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration of a new run, or of one that goes on.

    Raises:
        UsageError: see `finetune`.
        ConfigError: see `finetune`.
    """
    if resume is None:
        settings = load_finetune_config(config, given)
        if newest_checkpoint(settings.out / "checkpoints")[0]:
            raise UsageError(
                f"{settings.out} holds a run already; go on with --resume {settings.out}, or choose another --out"
            )
        return settings
    if config is not None:
        raise UsageError(
            "--resume takes the configuration of the run; change single keys with their flags, without --config"
        )
    saved = Path(resume) / CONFIG
    if not saved.is_file():
        raise UsageError(f"expected a run to resume in {resume}, found no {CONFIG} there")
    return make_config({**read_yaml(saved), **given, "out": resume}, str(saved))


def run(settings: FinetuneConfig) -> Path:
    """Train as `settings` say, going on from the newest whole checkpoint in `settings.out`; see `finetune`."""
    try:
        return _run(settings)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LatentDiffError(
            "not enough memory for this training; try --gradient-checkpointing, --accumulation 4, --mixed-precision bf16,"
            " a smaller --resolution, or --method lora with --base-precision bf16"
        ) from error


def _run(settings: FinetuneConfig) -> Path:
    accelerator, settings = _accelerator(settings)
    parts = load_components(settings.model or embedded_model())
    if settings.model is None:
        parts.name = EMBEDDED_NAME
    _check_model(parts.unet.config.in_channels, parts.vae.config.latent_channels)
    method = make_method(parts, settings)
    settings = settings.model_copy(update={"attention": _attention(settings, parts, accelerator)})
    if accelerator.is_main_process:
        _start_folder(settings)
    accelerator.wait_for_everyone()

    material = read_material(settings, parts)
    if accelerator.is_main_process:
        write_summary(material.summary, settings.out / "data.json")
    accelerator.print(_announcement(material.summary))
    with ExitStack() as stack:
        stack.enter_context(use_attention_backend(settings.attention))
        _speed_up(parts, method, settings, accelerator, stack)
        build_caches(material, parts, settings, accelerator, trains_text=method.trains_text)
        stack.enter_context(method.attached())
        task = _task(settings, method, material)
        trainer = Trainer(task, settings, settings.out, accelerator)
        trainer.fit()
        task.close()
        result = _finish(settings, trainer, method, material)
    accelerator.wait_for_everyone()
    return result


def _accelerator(settings: FinetuneConfig) -> tuple[Accelerator, FinetuneConfig]:
    """Device, precision and processes, and the configuration with the precision that was chosen."""
    # Without being told, several processes on a machine without a GPU would each train alone and overwrite one another.
    cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "no"
    if precision == "fp16" and cpu:
        raise ConfigError("mixed_precision fp16 needs a GPU; on a CPU take bf16 or no")
    # accelerate remembers the precision for the life of the process; a second run may want another one.
    AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=precision), settings.model_copy(update={"mixed_precision": precision})


def _check_model(inputs: int, latents: int) -> None:
    if inputs != latents:
        raise UsageError(
            f"expected a text-to-image model with {latents} U-Net input channels, found {inputs}: this model is for"
            " inpainting, which cannot be fine-tuned here"
        )


def _attention(settings: FinetuneConfig, parts: Any, accelerator: Accelerator) -> str:
    if settings.attention != "auto":
        return settings.attention
    side = settings.resolution / parts.vae.config.downscale if settings.resolution else parts.unet.config.sample_size
    few = side**2 <= _SMALL_LATENT and settings.mixed_precision == "bf16"
    return "plain" if accelerator.device.type == "cpu" and few else "auto"


def _speed_up(parts: Any, method: Method, settings: FinetuneConfig, accelerator: Accelerator, stack: ExitStack) -> None:
    """Give the networks their fast forms on a CPU, until the `stack` is closed."""
    trained = [parts.unet, *([parts.text_encoder] if method.trains_text else [])]
    if accelerator.device.type != "cpu":
        return
    for network in (parts.vae, parts.text_encoder):
        if network not in trained:
            use_fast_forms(network)
    if not settings.compile and not is_sharding(accelerator):
        stack.enter_context(lean_layers(*trained))


def _start_folder(settings: FinetuneConfig) -> None:
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to the run folder {settings.out}: {error.strerror}; choose another --out"
        ) from error
    with atomic_path(settings.out / CONFIG) as temporary:
        temporary.write_text(dump_config(settings), encoding="utf-8")


def _announcement(summary: Mapping[str, Any]) -> str:
    sizes = len(summary["buckets"])
    parts = [f"training on {summary['images']} images" + (f" in {sizes} sizes" if sizes > 1 else "")]
    if summary["held_out"]:
        parts.append(f"{summary['held_out']} held out")
    if summary["captions_cut"]:
        parts.append(f"{summary['captions_cut']} of {summary['captions']} captions are too long and are cut")
    if summary["too_small"]:
        parts.append(f"{summary['too_small']} images are too small and are left out")
    if summary["unreadable"]:
        parts.append(
            f"{len(summary['unreadable'])} cannot be read and are left out, the first is {summary['unreadable'][0]}"
        )
    return "; ".join(parts)


def _task(settings: FinetuneConfig, method: Method, material: Material) -> FinetuneTask:
    parts = method.parts
    schedule = Schedule(parts.schedule_config)
    if settings.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    cached = all(samples.latents is not None for samples, _ in material.of())
    module = FinetuneLoss(
        parts.unet.to(memory_format=torch.channels_last),
        parts.text_encoder,
        DiffusionObjective(schedule, settings.min_snr_gamma),
        vae=None if cached else parts.vae,
        adapter=method.adapter,
        trains_text=method.trains_text,
    )
    samples, images = material.held_out if len(material.held_out[1]) else (material.samples, material.training)
    captions = [samples.data.captions[index][0] for index in images]
    prompts = settings.prompts or sample_prompts(captions, settings.sample_count, settings.seed)
    return FinetuneTask(
        module,
        method,
        material.batches(settings, schedule.num_train_timesteps),
        material.held_out,
        material.training_part,
        SampleSheets(parts, prompts, settings),
        settings.out,
        loader_threads=settings.loader_threads,
        seed=settings.seed,
    )


def _finish(settings: FinetuneConfig, trainer: Trainer, method: Method, material: Material) -> Path:
    """Write the result from the averaged weights, and the report."""
    if settings.result == "best":
        _take_best(settings, trainer)
    main = trainer.accelerator.is_main_process
    with trainer.ema.swapped_in(), trainer.whole():
        result = method.save(settings.out, _facts(settings, material)) if main else _result(settings)
    if not main:
        return result
    data, written = material.samples.data, trainer.task.sample_files
    if written:
        training = material.training.tolist()
        names = [data.names[index] for index in training]
        candidates = fixed_part(names, range(len(names)), _COPY_CANDIDATES, settings.seed)
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


def _facts(settings: FinetuneConfig, material: Material) -> dict[str, Any]:
    """What a LoRA file says about its training."""
    return {
        "images": len(material.training),
        "steps": settings.max_steps,
        "learning_rate": settings.lr,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "resolution": "{}x{}".format(*max(material.samples.buckets[index] for index in material.training)),
        "data": [entry.path for entry in settings.data],
    }


def _result(settings: FinetuneConfig) -> Path:
    return settings.out / {"lora": "lora.safetensors", "full": "model"}.get(settings.method, "embedding.safetensors")
