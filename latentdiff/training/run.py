"""The stages of a training run, in order: VAE, decoder (optional), diffusion, model folder.

A stage is finished when its `final/` folder is there; a later call skips it. Everything else goes on from checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from latentdiff.errors import CheckpointError, UsageError
from latentdiff.files import atomic_path
from latentdiff.training.config import StageSection, TrainingConfig, VAEStageSection, dump_config
from latentdiff.training.data import CaptionedFolder, decoded_images, read_folder
from latentdiff.training.loop import Trainer
from latentdiff.training.networks import load_vae, save_vae, seeded
from latentdiff.training.randomness import normal
from latentdiff.training.vae_stage import VAETask, to_signed
from latentdiff.vae import VAE

STAGES = ("vae", "decoder", "diffusion")

# Images over which the standard deviation of the latents is measured.
_SCALE_IMAGES = 2000


def train(config: TrainingConfig, stages: Sequence[str] = STAGES) -> None:
    """Run the given stages of a configuration; finished ones are skipped."""
    if unknown := set(stages) - set(STAGES):
        raise UsageError(f"unknown stage {sorted(unknown)[0]!r}; expected {', '.join(STAGES)}")
    with atomic_path(config.run / "config.yaml") as temporary:
        temporary.write_text(dump_config(config))
    if "vae" in stages:
        _vae_stage(config, "vae", config.vae)
    if "decoder" in stages and config.decoder:
        _vae_stage(config, "decoder", config.decoder)


def _vae_stage(config: TrainingConfig, name: str, settings: VAEStageSection) -> None:
    folder = config.run / name
    if (folder / "final" / "config.json").is_file():
        print(f"stage {name} is finished: {folder / 'final'}")
        return
    decoder_only = name == "decoder"
    if decoder_only:
        vae = load_vae(config.run / "vae" / "final")
    else:
        vae = seeded(lambda: VAE(_unscaled(config)), config.seed, "vae")
    vae.to(memory_format=torch.channels_last)
    accelerator = _accelerator(settings)
    data, images = _images(config, config.data.train, config.data.limit)
    _, held_out = _images(config, config.data.validation, settings.validation_images)
    task = VAETask(vae, settings, data, images, held_out, seed=config.seed, decoder_only=decoder_only)
    trainer = Trainer(task, settings, folder, accelerator)
    trainer.fit()
    if accelerator.is_main_process:
        with trainer.ema.swapped_in():
            scale = vae.config.scaling_factor if decoder_only else measure_scaling_factor(vae, images, config.seed)
            save_vae(vae, vae.state_dict(), scale, folder / "final")
    accelerator.wait_for_everyone()


@torch.inference_mode()
def measure_scaling_factor(vae: VAE, images: np.ndarray, seed: int) -> float:
    """1 / standard deviation of sampled latents of evenly spread images (n, R, R, 3) uint8 (Rombach et al. 2022, appendix G)."""
    device = next(vae.parameters()).device
    chosen = np.linspace(0, len(images) - 1, min(len(images), _SCALE_IMAGES)).astype(int)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(chosen), 32):
        batch = torch.from_numpy(images[chosen[start : start + 32]]).to(device)
        distribution = vae.encode(to_signed(batch))
        noise = normal((seed, "scaling factor"), range(start, start + len(batch)), tuple(distribution.mean.shape[1:]))
        latents = distribution.sample(noise.to(device)).double()
        count, total, squares = count + latents.numel(), total + latents.sum().item(), squares + latents.square().sum().item()
    mean = total / count
    return float(vae.config.scaling_factor / (squares / count - mean**2) ** 0.5)


def _unscaled(config: TrainingConfig):
    from dataclasses import replace

    return replace(config.model.vae, scaling_factor=1.0)


def _accelerator(settings: StageSection) -> Accelerator:
    return Accelerator(mixed_precision=settings.mixed_precision)


def _images(config: TrainingConfig, folder: Path, limit: int | None) -> tuple[CaptionedFolder, np.ndarray]:
    data = read_folder(folder, limit=limit)
    return data, decoded_images(data, config.data.resolution, config.run / "cache")
