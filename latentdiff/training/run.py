"""The stages of a training run, in order: VAE, decoder (optional), diffusion; then the model folder.

A stage that is finished is skipped by a later call, one that was cut off goes on from its newest whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState

from latentdiff.checkpoints.components import Components, save_folder
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.files import atomic_path
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE
from latentdiff.training.captioned_folder import CaptionedFolder, decoded_images, read_folder
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.close_ups import read_close_ups
from latentdiff.training.config import StageSection, TextStageSection, TrainingConfig, VAEStageSection, dump_config
from latentdiff.training.diffusion_stage import DiffusionTask, load_tokenizer, tokenize
from latentdiff.training.latent_cache import cached_latents
from latentdiff.training.loop import Trainer
from latentdiff.training.networks import (
    TEXT_FILE,
    load_text_encoder,
    load_unet,
    load_vae,
    new_text_encoder,
    new_unet,
    new_vae,
    save_text_encoder,
    save_vae,
)
from latentdiff.training.text_stage import TextTask, read_labels
from latentdiff.training.vae_stage import VAETask, measure_scaling_factor
from latentdiff.training.words import write_words

STAGES = ("vae", "decoder", "text", "diffusion")

# Writes a sheet of pictures that the given components make; training knows nothing of the pipeline behind it.
Preview = Callable[[Components, Path], None]


def train(config: TrainingConfig, stages: Sequence[str] = STAGES, preview: Preview | None = None) -> Path | None:
    """Run the given stages; finished ones are skipped.

    Returns:
        The model folder, if all stages of the configuration are finished.
    """
    if unknown := set(stages) - set(STAGES):
        raise UsageError(f"unknown stage {sorted(unknown)[0]!r}; expected {', '.join(STAGES)}")
    with atomic_path(config.run / "config.yaml") as temporary:
        temporary.write_text(dump_config(config))
    if "vae" in stages:
        _vae_stage(config, "vae", config.vae)
    if "decoder" in stages and config.decoder:
        _vae_stage(config, "decoder", config.decoder)
    if "text" in stages and config.text:
        _text_stage(config, config.text)
    if "diffusion" in stages:
        _diffusion_stage(config, preview)
    if not _finished(config):
        return None
    folder = config.run / "model"
    return export(config, folder) if PartialState().is_main_process else folder


def export(config: TrainingConfig, folder: Path) -> Path:
    """Write the model folder from what has been trained so far: averaged weights of the newest whole checkpoint.

    Raises:
        CheckpointError: the VAE is not finished, or the diffusion stage has no checkpoint yet.
    """
    path, _ = newest_checkpoint(config.run / "diffusion" / "checkpoints")
    if path is None:
        raise CheckpointError(f"{config.run / 'diffusion'} has no checkpoint yet; run the stage diffusion first")
    average = load_checkpoint(path).ema
    tokenizer, unet, text_encoder = _new_networks(config)
    for name, network in (("unet.", unet), ("text_encoder.", text_encoder)):
        network.load_state_dict(
            {key.removeprefix(name): value for key, value in average.items() if key.startswith(name)}
        )
    components = _components(config, tokenizer, text_encoder, unet, _best_vae(config))
    for network in (components.text_encoder, components.unet, components.vae):
        network.to(getattr(torch, config.model_dtype))
    save_folder(components, folder)
    write_words(read_folder(config.data.train, limit=config.data.limit), config.data.resolution, folder)
    return folder


def _vae_stage(config: TrainingConfig, name: str, settings: VAEStageSection) -> None:
    final = config.run / name / "final"
    if (final / "config.json").is_file():
        return
    decoder_only = name == "decoder"
    if decoder_only:
        vae = load_vae(config.run / "vae" / "final")
    else:
        vae = new_vae(config.model.vae, settings.start, config.seed)
    vae.to(memory_format=torch.channels_last)
    accelerator = _accelerator(settings)
    data, images = _images(config, config.data.train, config.data.limit, accelerator)
    _, held_out = _images(config, config.data.validation, settings.validation_images, accelerator)
    task = VAETask(vae, settings, data, images, held_out, seed=config.seed, decoder_only=decoder_only)
    trainer = Trainer(task, settings, config.run / name, accelerator)
    trainer.fit()
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
    tokenizer, _, text_encoder = _new_networks(config)
    folders = [read_folder(config.data.train, limit=config.data.limit), read_folder(config.data.validation)]
    (data, tokens, labels), (_, held_out_tokens, held_out) = (
        (folder, tokenize(tokenizer, folder.captions)[0], read_labels(folder)) for folder in folders
    )
    task = TextTask(
        text_encoder,
        settings,
        data,
        tokens,
        labels,
        held_out_tokens,
        held_out,
        end=tokenizer.eos_token_id,
        seed=config.seed,
    )
    trainer = Trainer(task, settings, config.run / "text", accelerator)
    trainer.fit()
    if accelerator.is_main_process:
        with trainer.ema.swapped_in():
            save_text_encoder(text_encoder, final)
    accelerator.wait_for_everyone()


def _diffusion_stage(config: TrainingConfig, preview: Preview | None) -> None:
    settings = config.diffusion
    if _diffusion_finished(config):
        return
    vae = _best_vae(config)
    accelerator = _accelerator(settings)
    data, images = _images(config, config.data.train, config.data.limit, accelerator)
    held_out_data, held_out_images = _images(config, config.data.validation, settings.validation_images, accelerator)
    latents = cached_latents(vae, data, images, config.run / "cache", accelerator)
    held_out = cached_latents(vae, held_out_data, held_out_images, config.run / "cache", accelerator)
    tokenizer, unet, text_encoder = _new_networks(config)
    if settings.start:
        load_unet(unet, settings.start)
    if config.text:
        load_text_encoder(text_encoder, config.run / "text" / TEXT_FILE)
    (tokens, cut), (held_out_tokens, _), (empty, _) = (
        tokenize(tokenizer, captions) for captions in (data.captions, held_out_data.captions, [""])
    )
    close_ups = read_close_ups(data, latents.mean.shape[-1], vae.config.downscale) if settings.close_up_share else []
    if cut:
        accelerator.print(f"{cut} of {len(data)} captions are longer than {tokens.shape[1]} tokens and have been cut")
    components = _components(config, tokenizer, text_encoder, unet, vae) if preview else None
    task = DiffusionTask(
        unet.to(memory_format=torch.channels_last),
        text_encoder,
        Schedule(config.model.schedule),
        settings,
        data,
        tokens,
        latents,
        held_out_tokens,
        held_out,
        empty=empty[0],
        close_ups=[(part, tokenize(tokenizer, part.captions)[0]) for part in close_ups],
        sheet=(lambda path: preview(components, path)) if preview else None,
        seed=config.seed,
    )
    Trainer(task, settings, config.run / "diffusion", accelerator).fit()


def _new_networks(config: TrainingConfig) -> tuple[Any, UNet, TextEncoder]:
    """Tokenizer, U-Net and text encoder."""
    section = config.model.text_encoder
    tokenizer = load_tokenizer(config.model.tokenizer, section.max_position_embeddings)
    return tokenizer, new_unet(config.model.unet, config.seed), new_text_encoder(section, tokenizer, config.seed)


def _components(config: TrainingConfig, tokenizer: Any, text_encoder: TextEncoder, unet: UNet, vae: VAE) -> Components:
    return Components(
        tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, vae=vae, schedule_config=config.model.schedule,
        name=config.run.name, hash="",
    )  # fmt: skip


def _best_vae(config: TrainingConfig) -> VAE:
    """The VAE with the further trained decoder, if that stage is finished."""
    decoder = config.run / "decoder" / "final"
    return load_vae(decoder if (decoder / "config.json").is_file() else config.run / "vae" / "final")


def _finished(config: TrainingConfig) -> bool:
    vae_stages = ["vae", *(["decoder"] if config.decoder else [])]
    return _diffusion_finished(config) and all(
        (config.run / name / "final" / "config.json").is_file() for name in vae_stages
    )


def _diffusion_finished(config: TrainingConfig) -> bool:
    path, _ = newest_checkpoint(config.run / "diffusion" / "checkpoints")
    return path is not None and int(path.name.removeprefix("step-")) >= config.diffusion.max_steps


def _accelerator(settings: StageSection) -> Accelerator:
    # Before its start, the discriminator takes no part in the loss.
    late_parameters = bool(getattr(settings, "adversarial_weight", 0.0))
    ddp = DistributedDataParallelKwargs(find_unused_parameters=late_parameters)
    # Without being told, several processes on a machine without a GPU would each train alone and overwrite one another.
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return Accelerator(cpu=cpu, mixed_precision=settings.mixed_precision, kwargs_handlers=[ddp])


def _images(
    config: TrainingConfig, folder: Path, limit: int | None, accelerator: Accelerator
) -> tuple[CaptionedFolder, np.ndarray]:
    data = read_folder(folder, limit=limit)
    with accelerator.main_process_first():
        return data, decoded_images(data, config.data.resolution, config.run / "cache")
