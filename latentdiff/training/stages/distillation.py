"""Distilling the finished U-Net into a LoRA that draws its guided images in few steps, see `consistency`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.metadata import lora_metadata
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.checkpoints.components import Components
from latentdiff.checkpoints.distilled import LORA_FILE, OPTIONS_FILE, write_options
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError
from latentdiff.files import atomic_path
from latentdiff.networks.weights import weights_hash
from latentdiff.training.data.randomness import normal, torch_seed
from latentdiff.training.material import Material
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.samples import Arrays, Batches
from latentdiff.training.sheets import SampleSheets
from latentdiff.training.stages.config import DistillationStageSection, TrainingConfig
from latentdiff.training.stages.consistency import ConsistencyLoss
from latentdiff.training.task import Task

_AT_ONCE = 16  # images of a measurement


class DistillationTask(Task):
    """A LoRA that is to do in few steps what its U-Net does in many.

    Args:
        module: the loss.
        batches: what each step sees; latents are cached.
        material: held-out captions to measure on.
        sheets: draws samples.
        teacher: names the weights of the U-Net.
        seed: of the run.
        loader_threads: background threads that make batches.
    """

    measures_start = True

    def __init__(
        self,
        module: ConsistencyLoss,
        batches: Batches,
        material: Material,
        sheets: SampleSheets,
        *,
        teacher: str,
        seed: int,
        loader_threads: int = 2,
    ) -> None:
        self.module, self._batches, self._material, self._sheets = module, batches, material, sheets
        self.fingerprint = f"{batches.fingerprint}, shuffled by seed {seed}, for the U-Net {teacher}"
        self.loader_threads, self._seed = loader_threads, seed
        self._ends: list[Tensor] = []  # of the teacher's walks, which are the same at each measurement

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", parameters_of(self.module.lora))]

    def batch(self, step: int, rows: range) -> Arrays:
        return self._batches.arrays(step, rows)

    def sources(self, step: int) -> list[str]:
        return self._batches.names(step)

    def validate(self) -> dict[str, float]:
        """How far the student's images are from the teacher's of the same noise and captions: root of the mean squared
        difference of their latents, in standard deviations of the teacher's. Before the first step, that is the U-Net itself
        in few steps and without guidance."""
        walks = self._walks()
        if not self._ends:
            self._ends = [self.module.walk(*walk, student=False) for walk in walks]
        if not walks:
            return {}
        found, wanted = torch.cat([self.module.walk(*walk, student=True) for walk in walks]), torch.cat(self._ends)
        distance = (found - wanted).square().mean().sqrt() / wanted.std()
        return {"distance": float(f"{distance.item():.5g}")}

    def preview(self, folder: Path, step: int) -> None:
        with self.module.lora.attached():
            self._sheets.write(step, "ema")

    def _walks(self) -> list[tuple[Tensor, Tensor]]:
        """Start noise (n, C, h, w) and token ids (n, chunks, L) of the held-out images."""
        samples, indices = self._material.held_out
        device, found = self.module.alpha.device, []
        for first in range(0, len(indices), _AT_ONCE):
            part = indices[first : first + _AT_ONCE]
            shape = samples.latent_shape(int(part[0]))
            noise = normal((self._seed, "distillation noise"), range(first, first + len(part)), shape)
            tokens = samples.tokens.rows([samples.data.captions[index][0] for index in part], 1)
            found.append((torch.from_numpy(noise).to(device), torch.from_numpy(tokens).to(device)))
        return found


def parameters_of(lora: LoRA) -> dict[str, torch.nn.Parameter]:
    """The weights of a LoRA by the names of its layers."""
    return {
        f"{layer}.{name}": parameter
        for layer, change in lora.layers.items()
        for name, parameter in change.named_parameters()
    }


def new_student(config: TrainingConfig, parts: Components) -> LoRA:
    """The LoRA before its first step."""
    settings = _settings(config)
    spec = LoRASpec(rank=settings.rank, targets=settings.targets)
    return LoRA.create(parts.unet, None, spec, torch_seed(config.seed, "distillation"))


def distillation_task(config: TrainingConfig, parts: Components, of: Material, folder: Path) -> DistillationTask:
    """The task of the stage, for a finished model.

    Args:
        of: the images, with their latents cached.
        folder: of the stage.

    Raises:
        ConfigError: the numbers of steps do not divide one another.
    """
    settings, schedule = _settings(config), Schedule(config.model.schedule)
    for network in (parts.unet, parts.text_encoder, parts.vae):
        network.requires_grad_(False).eval()
    module = ConsistencyLoss(
        parts.unet,
        parts.text_encoder,
        new_student(config, parts),
        schedule,
        torch.from_numpy(np.ascontiguousarray(of.samples.tokens.rows([""], 1)[0, 0])),
        guidance_scale=settings.guidance_scale,
        teacher_steps=settings.teacher_steps,
        segments=settings.segments,
        teacher_span=settings.teacher_span,
        huber_c=settings.huber_c,
    )
    sheets = SampleSheets(
        parts, of.prompts(settings, config.seed), settings, folder, config.seed, drawing=few_steps(settings)
    )
    return DistillationTask(
        module,
        Batches(of.samples, of.training, settings, config.seed, schedule.num_train_timesteps),
        of,
        sheets,
        teacher=weights_hash(parts.unet),
        seed=config.seed,
        loader_threads=settings.loader_threads,
    )


def few_steps(settings: DistillationStageSection) -> dict[str, Any]:
    """The options of generation that the student is for."""
    way = {"sampler": "ddim", "spacing": "trailing", "steps": settings.segments}
    if settings.segments == 1:
        way = {"sampler": "lcm", "spacing": "lcm", "steps": 4}
    return {**way, "guidance_scale": 1.0}


def save_student(
    config: TrainingConfig, parts: Components, average: Mapping[str, Tensor], steps: int, folder: Path
) -> None:
    """Write the LoRA with these averaged weights and its options into `folder`, in float16, as diffusers reads it."""
    settings, lora = _settings(config), new_student(config, parts)
    for name, parameter in parameters_of(lora).items():
        parameter.data.copy_(average[name])
    options = few_steps(settings)
    facts = {"teacher": weights_hash(parts.unet), "steps": steps, "batch_size": settings.batch_size, **options}
    facts |= {"teacher_steps": settings.teacher_steps, "teacher_guidance": settings.guidance_scale, "seed": config.seed}
    about = lora_metadata(
        parts.unet.config, config.model.schedule.prediction_type, model=parts.name, title=folder.name, training=facts
    )
    save_lora(lora.to(torch.float16), folder / LORA_FILE, about, dialect="peft")
    write_options(options, folder)


def is_saved(folder: Path) -> bool:
    """Whether `save_student` has written all of it; the options come last."""
    return (folder / OPTIONS_FILE).is_file()


def check_teacher(parts: Components, folder: Path) -> None:
    """Note in the folder of the stage which U-Net it distils, or see that it is the same still.

    Raises:
        CheckpointError: it is another one.
    """
    note, own = folder / "teacher", weights_hash(parts.unet)
    if not note.is_file():
        with atomic_path(note) as temporary:
            temporary.write_text(f"{own}\n")
    elif note.read_text().strip() != own:
        raise CheckpointError(
            f"{folder} distils another U-Net than that of this run; delete it, and run its stage again"
        )


def _settings(config: TrainingConfig) -> DistillationStageSection:
    assert config.distillation is not None
    return config.distillation
