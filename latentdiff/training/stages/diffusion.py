"""Training U-Net and text encoder together, from nothing, on cached latents and captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latentdiff.checkpoints.components import Components
from latentdiff.diffusion.schedule import Schedule
from latentdiff.training.data import Dataset, read_dataset
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.denoising import DenoisingTask, text_and_unet
from latentdiff.training.loss import DenoisingLoss
from latentdiff.training.material import Material, material
from latentdiff.training.objective import DiffusionObjective
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.samples import Batches, Samples
from latentdiff.training.sections import DenoisingSection, sources
from latentdiff.training.sheets import SampleSheets
from latentdiff.training.stages.close_ups import CloseUpBatches, read_close_ups
from latentdiff.training.stages.config import TrainingConfig


def read_images(config: TrainingConfig, *, held_out: int | None = None) -> Dataset:
    """The images that a run trains on, or up to so many of those that it is measured on.

    Raises:
        DataError: there are none, or one cannot be read; the message says what was looked for and what was there.
    """
    data = config.data
    return read_dataset(
        sources(data.validation if held_out else data.train),
        **data.reading,
        # Otherwise a damaged image is found when it is first used.
        verify=not data.strict,
        index=config.run / "index",
        limit=held_out or data.limit,
    )


def read_material(config: TrainingConfig, settings: DenoisingSection, parts: Components) -> Material:
    """Images as squares and their captions, as a stage sees them; the held-out ones are measured on."""
    resolution = config.data.resolution
    tokens = CaptionTokens(parts.tokenizer, settings.long_captions)
    latent = (parts.vae.config.latent_channels, parts.vae.config.downscale)
    training, other = (
        Samples(data, [(resolution, resolution)] * len(data), tokens, settings, latent)
        for data in (read_images(config), read_images(config, held_out=settings.validation_images))
    )
    held_out = (other, np.arange(len(other.data)))
    return material(training, np.arange(len(training.data)), held_out, config.seed)


def diffusion_task(config: TrainingConfig, parts: Components, of: Material, folder: Path) -> DenoisingTask:
    """The task of the stage, for networks that were just made.

    Args:
        parts: U-Net and text encoder are trained.
        of: the images, with their latents cached or not.
        folder: of the stage.
    """
    settings, schedule = config.diffusion, Schedule(config.model.schedule)
    if settings.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    module = DenoisingLoss(
        parts.unet, parts.text_encoder, DiffusionObjective(schedule, settings),
        vae=None if of.cached else parts.vae.requires_grad_(False), trains_text=True,
    )  # fmt: skip

    def groups() -> list[ParameterGroup]:
        named = {
            part: {f"{part}.{name}": p for name, p in getattr(parts, part).named_parameters()}
            for part in ("unet", "text_encoder")
        }
        return text_and_unet(named, settings.lr, settings.text_encoder_lr)

    return DenoisingTask(
        module,
        groups,
        _batches(config, of, schedule.num_train_timesteps),
        of,
        SampleSheets(parts, of.prompts(settings, config.seed), settings, folder, config.seed),
        folder,
        seed=config.seed,
        networks=[parts.unet, parts.text_encoder],
        loader_threads=settings.loader_threads,
    )


def _batches(config: TrainingConfig, of: Material, num_train_timesteps: int) -> Batches:
    settings, samples = config.diffusion, of.samples
    if not settings.close_up_share:
        return Batches(samples, of.training, settings, config.seed, num_train_timesteps)
    close_ups = read_close_ups(samples.data, config.model.unet.sample_size, samples.latent[1])
    return CloseUpBatches(of, settings, config.seed, num_train_timesteps, close_ups)
