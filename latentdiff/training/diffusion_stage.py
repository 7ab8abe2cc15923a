"""Training U-Net and text encoder together on cached latents and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.checkpoints.folder import read_tokenizer
from latentdiff.checkpoints.tokenizer import open_tokenizer
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.networks.attention import use_attention_backend
from latentdiff.prompts.tokenizer import Tokenizer
from latentdiff.training.captioned_folder import CaptionedFolder
from latentdiff.training.close_ups import CloseUps, close_up_turn
from latentdiff.training.config import DiffusionStageSection
from latentdiff.training.data.randomness import SampleOrder, normal, uniform
from latentdiff.training.latent_cache import CachedLatents
from latentdiff.training.objective import DiffusionObjective, draw_timesteps
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.task import Task

_VALIDATION_BATCH = 64

# Parts of the range of timesteps whose validation losses are logged apart: a mean hides which noise levels improve.
_BANDS = 5


class DiffusionTask(Task):
    """Denoising of latents under captions.

    Args:
        unet, text_encoder: what is trained.
        schedule: noise levels and parameterization.
        settings: caption dropout, loss weights.
        data, tokens, latents: training set, its token ids (n, L), its cached latents.
        held_out_tokens, held_out: the same of the validation set.
        empty: token ids of the empty caption, (L,).
        close_ups: crops that take a share of the steps, with the token ids of their captions.
        sheet: writes a sheet of pictures, made with the networks as they are, to a file.
        seed: of the run.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        schedule: Schedule,
        settings: DiffusionStageSection,
        data: CaptionedFolder,
        tokens: np.ndarray,
        latents: CachedLatents,
        held_out_tokens: np.ndarray,
        held_out: CachedLatents,
        *,
        empty: np.ndarray,
        close_ups: Sequence[tuple[CloseUps, np.ndarray]] = (),
        sheet: Callable[[Path], None] | None,
        seed: int,
    ) -> None:
        self.fingerprint = f"{data.fingerprint} shuffled by seed {seed}"
        self.module = DiffusionLoss(
            unet, text_encoder, DiffusionObjective(schedule, settings.min_snr_gamma), settings.attention
        )
        self._settings, self._data, self._seed, self._sheet = settings, data, seed, sheet
        self._tokens, self._latents, self._empty = tokens, latents, empty
        self._held_out_tokens = held_out_tokens[: settings.validation_images]
        self._held_out = held_out
        self._close_ups = close_ups
        self._timesteps = schedule.num_train_timesteps
        self._order = SampleOrder(len(data), seed)
        self._latent_shape = tuple(latents.mean.shape[1:])

    def parameter_groups(self) -> list[ParameterGroup]:
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        of_text = {name: p for name, p in trained.items() if name.startswith("text_encoder.")}
        of_unet = {name: p for name, p in trained.items() if name not in of_text}
        if self._settings.text_encoder_lr is None:
            return [ParameterGroup("all", trained)]
        scale = self._settings.text_encoder_lr / self._settings.lr
        return [ParameterGroup("unet", of_unet), ParameterGroup("text_encoder", of_text, scale, muon=False)]

    def compile(self) -> None:
        self.module.unet.compile()

    def batch(self, step: int, rows: range) -> dict[str, np.ndarray]:
        turn = close_up_turn(step, self._settings.close_up_share) if self._close_ups else None
        if turn is not None:
            return self._close_up_batch(step, rows, *self._close_ups[turn % len(self._close_ups)])
        indices = self._order.indices(step * self._settings.batch_size + rows.start, len(rows))
        noise = self._noise(step, rows, self._latent_shape)
        latents = self._latents.sample(indices, noise[:, 0])
        return self._sample(step, rows, self._settings.batch_size, latents, noise[:, 1], self._tokens[indices])

    def _close_up_batch(self, step: int, rows: range, close_ups: CloseUps, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of crops, larger as their sides are shorter; any crop may come at any step."""
        factor = self._latent_shape[-1] // close_ups.side
        rows = range(rows.start * factor, rows.stop * factor)
        chosen = (uniform((self._seed, "close-ups", step), rows) * len(close_ups)).astype(np.int64)
        noise = self._noise(step, rows, (self._latent_shape[0], close_ups.side, close_ups.side))
        deviation = np.exp(0.5 * close_ups.crop(self._latents.logvar, chosen))
        latents = close_ups.crop(self._latents.mean, chosen) + deviation * noise[:, 0]
        return self._sample(step, rows, self._settings.batch_size * factor, latents, noise[:, 1], tokens[chosen])

    def _noise(self, step: int, rows: range, shape: tuple[int, ...]) -> np.ndarray:
        """Of the posterior and of the diffusion, (n, 2, *shape)."""
        return normal((self._seed, "noise", step), rows, (2, *shape))

    def _sample(
        self, step: int, rows: range, batch_size: int, latents: np.ndarray, noise: np.ndarray, tokens: np.ndarray
    ) -> dict[str, np.ndarray]:
        settings, seed = self._settings, self._seed
        dropped = uniform((seed, "caption dropout", step), rows) < settings.caption_dropout  # (n,)
        key = (seed, "timesteps", step)
        return {
            "latents": latents,
            "noise": noise,
            "timesteps": draw_timesteps(key, rows, batch_size, self._timesteps, settings.high_noise_share),
            "tokens": np.where(dropped[:, None], self._empty, tokens),
        }

    def sources(self, step: int) -> list[str]:
        size = self._settings.batch_size
        return [self._data.names[index] for index in self._order.indices(step * size, size)]

    def validate(self) -> dict[str, float]:
        """Unweighted losses with the same images, noise and timesteps every time, by band of timesteps and in the
        mean."""
        count = len(self._held_out_tokens)
        losses = torch.zeros(_BANDS)
        for start in range(0, count, _VALIDATION_BATCH):
            rows = range(start, min(start + _VALIDATION_BATCH, count))
            losses += self._band_losses(rows) / count
        bounds = [band * self._timesteps // _BANDS for band in range(_BANDS + 1)]
        names = [f"val_{low}_{high - 1}" for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        values = {"val_mse": losses.mean().item(), **dict(zip(names, losses.tolist(), strict=True))}
        return {name: float(f"{value:.5g}") for name, value in values.items()}

    def preview(self, folder: Path, step: int) -> None:
        if self._sheet is not None:
            self._sheet(folder / f"step-{step:08d}.png")

    def _band_losses(self, rows: range) -> Tensor:
        """Sums over the rows of the losses in each band, (_BANDS,)."""
        device = self.module.objective.alpha.device
        noise = normal((self._seed, "validation noise"), rows, (2, *self._latent_shape))
        place = uniform((self._seed, "validation timesteps"), rows, (_BANDS,))
        timesteps = ((place + np.arange(_BANDS)) / _BANDS * self._timesteps).astype(np.int64)  # (n, _BANDS)
        arrays = (
            self._held_out.sample(np.asarray(rows), noise[:, 0]),
            noise[:, 1],
            timesteps.T,
            self._held_out_tokens[rows.start : rows.stop],
        )
        latents, noise, bands, tokens = (torch.tensor(array, device=device) for array in arrays)
        context = self.module.text_encoder(tokens)
        return torch.stack([self.module.errors(latents, noise, band, context).sum() for band in bands]).cpu()


class DiffusionLoss(nn.Module):
    """U-Net and text encoder with their training loss; `attention` names the U-Net's back end."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, objective: DiffusionObjective, attention: str) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.objective = unet, text_encoder, objective
        self._attention = attention

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Weighted loss and plain mean squared error for latents and noise (n, C, h, w), timesteps (n,), tokens (n,
        L)."""
        context = self.text_encoder(batch["tokens"])  # (n, L, width)
        errors = self.errors(batch["latents"], batch["noise"], batch["timesteps"], context)  # (n,)
        weights = self.objective.weights(batch["timesteps"])
        return {"loss": (weights * errors).mean(), "mse": errors.detach().mean()}

    def errors(self, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Squared error of each sample, (n,)."""
        noisy = self.objective.noisy(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with use_attention_backend(self._attention):
            prediction = self.unet(noisy, timesteps, context)
        return self.objective.errors(prediction, latents, noise, timesteps)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[np.ndarray, int]:
    """Token ids of captions, (n, L) int32, and how many captions were too long and have been cut."""
    length = tokenizer.model_max_length
    full = tokenizer(list(captions), verbose=False)["input_ids"]
    cut = sum(len(ids) > length for ids in full)
    rows = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)["input_ids"]
    return np.array(rows, dtype=np.int32), cut


def load_tokenizer(folder: Path, longest: int) -> Tokenizer:
    """Read a CLIP tokenizer from a folder.

    Raises:
        ConfigError: there is none, or it allows more tokens than the text encoder has positions.
    """
    try:
        tokenizer = open_tokenizer(read_tokenizer(folder))
    except CheckpointError as error:
        raise ConfigError(f"expected a CLIP tokenizer in {folder}: {error}") from error
    if tokenizer.model_max_length > longest:
        raise ConfigError(
            f"the tokenizer {folder} has model_max_length {tokenizer.model_max_length}, more than"
            f" text_encoder.max_position_embeddings {longest}"
        )
    return tokenizer
