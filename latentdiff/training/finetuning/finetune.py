"""A fine-tuning from its configuration to its result: data, caches, training, result, report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from latentdiff.checkpoints.components import Components, load_components
from latentdiff.checkpoints.embedded import EMBEDDED_NAME, embedded_model
from latentdiff.device import computes_in_bf16, is_out_of_memory
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.engines.fast_forms import use_fast_forms
from latentdiff.errors import ConfigError, LatentDiffError, UsageError
from latentdiff.files import atomic_path
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.sizes import OF_BASE, count_of_sizes
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.denoising import DenoisingTask
from latentdiff.training.finetuning.config import FinetuneConfig, load_finetune_config, make_config
from latentdiff.training.finetuning.material import batches_of, read_material
from latentdiff.training.finetuning.methods import FinetuningMethod, make_method
from latentdiff.training.finetuning.streaming import shards_to_stream
from latentdiff.training.folder import owned
from latentdiff.training.lean import lean_layers
from latentdiff.training.loop import Trainer
from latentdiff.training.loss import DenoisingLoss, attention_backend
from latentdiff.training.material import Material, announce, build_latents, build_texts
from latentdiff.training.objective import DiffusionObjective
from latentdiff.training.replay import verify_resume
from latentdiff.training.report.log import best_step
from latentdiff.training.report.memorization import check_copies
from latentdiff.training.report.page import write_report
from latentdiff.training.sections import dump_config, read_yaml
from latentdiff.training.sharding import is_sharding
from latentdiff.training.sheets import Followed, SampleSheets
from latentdiff.training.validation import fixed_part

CONFIG = "config.yaml"

# Training images that samples are compared with.
_COPY_CANDIDATES = 5000


def finetune(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Mapping[str, Any]] | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    verify_resume: int | None = None,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a model on captioned images.

    Args:
        data: one or more folders, shards or data sets; see `latentdiff data check`.
        resume: folder of a run to go on with, from its newest whole checkpoint.
        verify_resume: take at least so many steps before that checkpoint again, and compare every bit, before going on.
        config: a YAML file.
        settings: any key of `FinetuneConfig`, which replace those of the file: method, out, max_steps, lr ...

    Returns:
        The result: `OUT/lora.safetensors` for method lora, the model folder `OUT/model` for method full, the ControlNet
        `OUT/controlnet` for method controlnet.

    Raises:
        UsageError: there is no data, or `out` holds a run already.
        ConfigError: an unknown key, or a value outside its domain.
        DataError: the images cannot be trained on, or the run folder cannot be written to.
        NotFiniteError: the loss became NaN or infinite; the newest checkpoint is from before.
        TrainingStopped: a signal ended the run after it was saved.
    """
    given = {**settings, **({} if data is None else {"data": data if isinstance(data, list | tuple) else [data]})}
    return run(resolve(resume and Path(resume), config and Path(config), given), verify_steps=verify_resume)


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


def run(settings: FinetuneConfig, *, verify_steps: int | None = None) -> Path:
    """Train as `settings` say, going on from the newest whole checkpoint in `settings.out`; see `finetune`."""
    accelerator, settings = _accelerator(settings)
    try:
        with owned(settings.out, main=accelerator.is_main_process):
            return _run(settings, accelerator, verify_steps)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LatentDiffError(
            "not enough memory for this training; try --gradient-checkpointing, --accumulation 4, --mixed-precision bf16,"
            " a smaller --resolution, or --method lora with --base-precision bf16"
        ) from error


def _run(settings: FinetuneConfig, accelerator: Accelerator, verify_steps: int | None) -> Path:
    parts = load_components(settings.model or embedded_model())
    if settings.model is None:
        parts.name = EMBEDDED_NAME
    _check_model(parts)
    parts.schedule_config = _schedule_config(parts.schedule_config, settings)
    method = make_method(parts, settings)
    side = settings.resolution / parts.vae.config.downscale if settings.resolution else parts.unet.config.sample_size
    settings = settings.model_copy(update={"attention": attention_backend(settings, side, accelerator)})
    if not newest_checkpoint(settings.out / "checkpoints")[0]:
        _write_config(settings, accelerator)
    shards = shards_to_stream(settings) if settings.stream else []
    material = read_material(settings, parts, shards)
    summary = material.summary(settings.batch_size) | ({"shards": len(shards)} if shards else {})
    announce(summary, settings.out / "data.json", accelerator)
    sheets = _sheets(settings, method, material)
    with ExitStack() as stack:
        stack.enter_context(use_attention_backend(settings.attention))
        _speed_up(parts, method, settings, accelerator, stack)
        if not shards:
            _build_caches(settings, method, material, accelerator)
        stack.enter_context(method.attached())
        trainer = Trainer(_task(settings, method, material, sheets, shards), settings, settings.out, accelerator)
        trainer.start()
        _write_config(settings, accelerator)  # only once what lies in the folder has taken it
        if verify_steps:
            first, last = verify_resume(trainer, verify_steps)
            accelerator.print(f"steps {first} to {last}, taken again, give the same to the last bit")
        trainer.fit()
        result = _finish(settings, trainer, method, material, sheets.written)
    accelerator.wait_for_everyone()
    return result


def _build_caches(
    settings: FinetuneConfig, method: FinetuningMethod, material: Material, accelerator: Accelerator
) -> None:
    folder = settings.cache or settings.out / "cache"
    build_latents(material, method.parts.vae, settings, folder, accelerator)
    if settings.cache_text and not method.trains_text:
        build_texts(material, method.parts.text_encoder, settings, folder, accelerator)


def _accelerator(settings: FinetuneConfig) -> tuple[Accelerator, FinetuneConfig]:
    """Device, precision and processes, and the configuration with the precision that was chosen."""
    # Without being told, several processes on a machine without a GPU would each train alone and overwrite one another.
    cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if not cpu and computes_in_bf16("cuda") else "no"
    if precision == "fp16" and cpu:
        raise ConfigError("mixed_precision fp16 needs a GPU; on a CPU take bf16 or no")
    # accelerate remembers the precision for the life of the process; a second run may want another one.
    AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=precision), settings.model_copy(update={"mixed_precision": precision})


def _check_model(parts: Components) -> None:
    inputs, latents = parts.unet.config.in_channels, parts.vae.config.latent_channels
    pooled = getattr(parts.text_encoder, "pooled_width", None)
    if count_of_sizes(parts.unet.config, pooled) not in (0, OF_BASE):
        raise UsageError(
            "the refiner of SDXL, which is told scores of images, cannot be fine-tuned here; take the base"
        )
    if inputs != latents:
        raise UsageError(
            f"expected a text-to-image model with {latents} U-Net input channels, found {inputs}: this model is for"
            " inpainting, which cannot be fine-tuned here"
        )


def _schedule_config(of_model: ScheduleConfig, settings: FinetuneConfig) -> ScheduleConfig:
    """The schedule that is trained on, and written into the result."""
    wanted: dict[str, Any] = {} if settings.prediction_type == "model" else {"prediction_type": settings.prediction_type}
    if settings.zero_snr:
        predicted = wanted.get("prediction_type", of_model.prediction_type)
        if predicted == "epsilon":
            raise ConfigError(
                "zero_snr needs a model of v-prediction, found epsilon: at the last noise level there is no signal that a"
                " prediction of the noise could reveal; add --prediction-type v_prediction"
            )
        # Samplers must begin at the last level, or what it has learned is not used.
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(of_model, **wanted).with_drawing(of_model.drawing)


def _speed_up(
    parts: Any, method: FinetuningMethod, settings: FinetuneConfig, accelerator: Accelerator, stack: ExitStack
) -> None:
    """Give the networks their fast forms on a CPU, until the `stack` is closed."""
    trained = [parts.unet, *([parts.text_encoder] if method.trains_text else [])]
    trained += [method.control] if method.control else []
    if accelerator.device.type != "cpu":
        return
    for network in (parts.vae, parts.text_encoder):
        if network not in trained:
            use_fast_forms(network)
    if not settings.compile and not is_sharding(accelerator):
        stack.enter_context(lean_layers(*trained))


def _write_config(settings: FinetuneConfig, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        with atomic_path(settings.out / CONFIG) as temporary:
            temporary.write_text(dump_config(settings), encoding="utf-8")
    accelerator.wait_for_everyone()


def _task(
    settings: FinetuneConfig, method: FinetuningMethod, of: Material, sheets: SampleSheets, shards: Sequence[Path]
) -> DenoisingTask:
    parts, schedule = method.parts, Schedule(method.parts.schedule_config)
    for network in (parts.unet, method.control):
        if network is not None and settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
    module = DenoisingLoss(
        parts.unet.to(memory_format=torch.channels_last),
        parts.text_encoder,
        DiffusionObjective(schedule, settings),
        vae=None if of.cached else parts.vae,
        adapter=method.adapter,
        control=None if method.control is None else method.control.to(memory_format=torch.channels_last),
        trains_text=method.trains_text,
    )
    return DenoisingTask(
        module,
        method.parameter_groups(),
        batches_of(of, settings, schedule.num_train_timesteps, shards),
        of,
        sheets,
        settings.out,
        seed=settings.seed,
        networks=method.networks(),
        loader_threads=settings.loader_threads,
        measures_start=True,
        draws_raw=True,
        resume_hint=f"go on with: latentdiff finetune --resume {settings.out}",
    )


def _sheets(settings: FinetuneConfig, method: FinetuningMethod, material: Material) -> SampleSheets:
    prompts, seed = material.prompts(settings, settings.seed), settings.seed
    if method.control is None:
        return SampleSheets(method.parts, prompts, settings, settings.out, seed)
    followed = Followed(method.control, material.hints(settings, seed))
    return SampleSheets(method.parts, prompts, settings, settings.out, seed, followed)


def _finish(
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
