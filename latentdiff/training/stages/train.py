"""The stages of a training run, in order: VAE, decoder (optional), text (optional), diffusion, distillation (optional); then
the model folder.

A stage that is finished is skipped by a later call, one that was cut off goes on from its newest whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState

from latentdiff.checkpoints.components import Components, save_folder
from latentdiff.checkpoints.distilled import read_distilled
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.drawing import Drawing
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.files import atomic_path
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.device import computes_in_bf16
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.vae import VAE
from latentdiff.prompts.tokenizer import Tokenizer
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.folder import owned
from latentdiff.training.loop import Trainer
from latentdiff.training.loss import attention_backend
from latentdiff.training.material import Material, announce, build_latents
from latentdiff.training.report.page import write_report
from latentdiff.training.sections import DenoisingSection, StageSection, dump_config
from latentdiff.training.stages.config import (
    DistillationStageSection,
    TextStageSection,
    TrainingConfig,
    VAEStageSection,
)
from latentdiff.training.stages.diffusion import diffusion_task, read_images, read_material
from latentdiff.training.stages.distillation import check_teacher, distillation_task, is_saved, save_student
from latentdiff.training.stages.networks import (
    TEXT_FILE,
    WEIGHTS_FILE,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    new_text_encoder,
    new_unet,
    new_vae,
    save_text_encoder,
    save_vae,
    take_weights,
)
from latentdiff.training.stages.pixels import decoded_images
from latentdiff.training.stages.text import TextTask
from latentdiff.training.stages.vae import VAETask, measure_scaling_factor
from latentdiff.training.stages.words import words_of_data

STAGES = ("vae", "decoder", "text", "diffusion", "distillation")

_FINISHED = "finished"  # in the folder of the last stage: its last step


def train(config: TrainingConfig, stages: Sequence[str] = STAGES) -> Path | None:
    """Run the given stages; finished ones are skipped. `report.html` in the run folder tells how they went.

    Returns:
        The model folder, if all stages of the configuration are finished.
    """
    if unknown := set(stages) - set(STAGES):
        raise UsageError(f"unknown stage {sorted(unknown)[0]!r}; expected {', '.join(STAGES)}")
    main = PartialState().is_main_process
    with owned(config.run, main=main):
        if "vae" in stages:
            _vae_stage(config, "vae", config.vae)
        if "decoder" in stages and config.decoder:
            _vae_stage(config, "decoder", config.decoder)
        if "text" in stages and config.text:
            _text_stage(config, config.text)
        if "diffusion" in stages:
            _diffusion_stage(config)
        if "distillation" in stages and config.distillation and _diffusion_finished(config):
            _distillation_stage(config, config.distillation)
        if main:
            write_report(config.run)
        if not _finished(config):
            return None
        folder = config.run / "model"
        return export(config, folder) if main else folder


def export(config: TrainingConfig, folder: Path) -> Path:
    """Write the model folder from what has been trained so far: averaged weights of the newest whole checkpoint, and the LoRA
    for few steps where its stage is finished.

    Raises:
        CheckpointError: the VAE is not finished, or the diffusion stage has no checkpoint yet.
    """
    components = _trained_model(config)
    stage = config.run / "distillation"
    if config.distillation and is_saved(stage / "final"):
        check_teacher(components, stage)
        components.distilled = read_distilled(stage / "final")
    for network in (components.text_encoder, components.unet, components.vae):
        network.to(getattr(torch, config.model_dtype))
    components.words = words_of_data(read_images(config), config.data.resolution)
    save_folder(components, folder)
    return folder


def _vae_stage(config: TrainingConfig, name: str, settings: VAEStageSection) -> None:
    final = config.run / name / "final"
    if (final / "config.json").is_file():
        return
    decoder_only = name == "decoder"
    if not settings.max_steps:
        taken = load_vae(config.run / "vae" / "final" if decoder_only else settings.start)
        save_vae(taken, taken.config.scaling_factor, final)
        return
    if decoder_only:
        vae = load_vae(config.run / "vae" / "final")
    else:
        vae = new_vae(config.model.vae, settings.start, config.seed)
    vae.to(memory_format=torch.channels_last)
    accelerator = _accelerator(settings)
    with accelerator.main_process_first():
        data, held_out_data = read_images(config), read_images(config, held_out=settings.validation_images)
        images, held_out = (
            decoded_images(of, config.data.resolution, config.run / "cache") for of in (data, held_out_data)
        )
    task = VAETask(vae, settings, data, images, held_out, seed=config.seed, decoder_only=decoder_only)
    trainer = Trainer(task, settings, config.run / name, accelerator)
    _fit(trainer, config)
    if accelerator.is_main_process:
        with trainer.ema.swapped_in():
            scale = vae.config.scaling_factor if decoder_only else measure_scaling_factor(vae, images, config.seed)
            save_vae(vae, scale, final)
    accelerator.wait_for_everyone()


def _text_stage(config: TrainingConfig, settings: TextStageSection) -> None:
    final = config.run / "text" / TEXT_FILE
    if final.is_file():
        return
    accelerator = _accelerator(settings)
    tokenizer, text_encoder = _new_text(config)
    with accelerator.main_process_first():
        data, held_out = read_images(config), read_images(config, held_out=settings.validation_images)
    task = TextTask(text_encoder, settings, tokenizer, data, held_out, seed=config.seed)
    trainer = Trainer(task, settings, config.run / "text", accelerator)
    _fit(trainer, config)
    if accelerator.is_main_process:
        with trainer.ema.swapped_in():
            save_text_encoder(text_encoder, final)
    accelerator.wait_for_everyone()


def _diffusion_stage(config: TrainingConfig) -> None:
    settings, folder = config.diffusion, config.run / "diffusion"
    if _diffusion_finished(config):
        return
    parts = _new_model(config, _best_vae(config))
    if settings.start:
        take_weights(parts.unet, settings.start / "unet" / WEIGHTS_FILE, "model.unet")
    if config.text:
        load_text_encoder(parts.text_encoder, config.run / "text" / TEXT_FILE)
    elif settings.start:
        take_weights(parts.text_encoder, settings.start / "text_encoder" / "model.safetensors", "model.text_encoder")
    accelerator = _accelerator(settings)
    of = _cached_material(config, settings, parts, folder, accelerator)
    task = diffusion_task(config, parts, of, folder)
    side = config.model.unet.sample_size
    with use_attention_backend(attention_backend(settings, side, accelerator)):
        _fit(Trainer(task, settings, folder, accelerator), config)
    if accelerator.is_main_process:
        with atomic_path(folder / _FINISHED) as temporary:
            temporary.write_text(f"{settings.max_steps}\n")
    accelerator.wait_for_everyone()


def _distillation_stage(config: TrainingConfig, settings: DistillationStageSection) -> None:
    folder = config.run / "distillation"
    if is_saved(folder / "final"):
        return
    parts, accelerator = _trained_model(config), _accelerator(settings)
    with accelerator.main_process_first():
        check_teacher(parts, folder)
    of = _cached_material(config, settings, parts, folder, accelerator)
    task = distillation_task(config, parts, of, folder)
    trainer = Trainer(task, settings, folder, accelerator)
    with use_attention_backend(attention_backend(settings, config.model.unet.sample_size, accelerator)):
        _fit(trainer, config)
    if accelerator.is_main_process:
        save_student(config, parts, trainer.state().ema, trainer.step, folder / "final")
    accelerator.wait_for_everyone()


def _cached_material(
    config: TrainingConfig, settings: DenoisingSection, parts: Components, folder: Path, accelerator: Accelerator
) -> Material:
    """The images of a stage with their latents; those of an earlier stage are there already."""
    with accelerator.main_process_first():
        of = read_material(config, settings, parts)
    announce(of.summary(settings.batch_size), folder / "data.json", accelerator)
    parts.vae.eval().to(memory_format=torch.channels_last)
    with accelerator.autocast():  # as the task encodes what is not cached; in float32, a CPU takes four times as long
        build_latents(of, parts.vae, settings, config.run / "cache", accelerator)
    return of


def _fit(trainer: Trainer, config: TrainingConfig) -> None:
    """Train a stage; the configuration is written down once what lies in the folder has taken it."""
    trainer.start()
    if trainer.accelerator.is_main_process:
        with atomic_path(config.run / "config.yaml") as temporary:
            temporary.write_text(dump_config(config))
    trainer.fit()


def _new_model(config: TrainingConfig, vae: VAE) -> Components:
    """The model before its first step, around a trained VAE."""
    tokenizer, text_encoder = _new_text(config)
    return Components(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=new_unet(config.model.unet, config.seed).to(memory_format=torch.channels_last),
        vae=vae,
        schedule_config=_schedule(config),
        name=config.run.name,
        hash="",
    )


def _schedule(config: TrainingConfig) -> ScheduleConfig:
    """The schedule, and how the model is drawn from."""
    model = config.model
    drawing = Drawing.of_ours(guidance_scale=model.guidance_scale, fast_steps=model.fast_steps)
    return model.schedule.with_drawing(drawing)


def _trained_model(config: TrainingConfig) -> Components:
    """The model with the averaged weights of the newest whole checkpoint."""
    path, _ = newest_checkpoint(config.run / "diffusion" / "checkpoints")
    if path is None:
        raise CheckpointError(f"{config.run / 'diffusion'} has no checkpoint yet; run the stage diffusion first")
    average = load_checkpoint(path).ema
    components = _new_model(config, _best_vae(config))
    for name, network in (("unet.", components.unet), ("text_encoder.", components.text_encoder)):
        network.load_state_dict(
            {key.removeprefix(name): value for key, value in average.items() if key.startswith(name)}
        )
    return components


def _new_text(config: TrainingConfig) -> tuple[Tokenizer, TextEncoder]:
    section = config.model.text_encoder
    tokenizer = load_tokenizer(config.model.tokenizer, section.max_position_embeddings)
    return tokenizer, new_text_encoder(section, tokenizer, config.seed)


def _best_vae(config: TrainingConfig) -> VAE:
    """The VAE with the further trained decoder, if that stage is finished."""
    decoder = config.run / "decoder" / "final"
    return load_vae(decoder if (decoder / "config.json").is_file() else config.run / "vae" / "final")


def _finished(config: TrainingConfig) -> bool:
    vae_stages = ["vae", *(["decoder"] if config.decoder else [])]
    is_distilled = config.distillation is None or is_saved(config.run / "distillation" / "final")
    return (
        _diffusion_finished(config)
        and is_distilled
        and all((config.run / name / "final" / "config.json").is_file() for name in vae_stages)
    )


def _diffusion_finished(config: TrainingConfig) -> bool:
    """Whether the last step was taken, measured and drawn."""
    path = config.run / "diffusion" / _FINISHED
    return path.is_file() and int(path.read_text()) >= config.diffusion.max_steps


def _accelerator(settings: StageSection) -> Accelerator:
    # Before its start, the discriminator takes no part in the loss.
    late_parameters = bool(getattr(settings, "adversarial_weight", 0.0))
    ddp = DistributedDataParallelKwargs(find_unused_parameters=late_parameters)
    # Without being told, several processes on a machine without a GPU would each train alone and overwrite one another.
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_in_bf16("cpu" if cpu else "cuda") else "no"
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
