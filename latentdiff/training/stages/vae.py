"""Training the autoencoder on random crops (Rombach et al. 2022, section 3.1), or its decoder alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from latentdiff.errors import ConfigError
from latentdiff.files import atomic_path
from latentdiff.image import decibels
from latentdiff.networks.vae import VAE
from latentdiff.training.data import Dataset
from latentdiff.training.data.randomness import BatchOrder, normal, uniform
from latentdiff.training.data.transforms import to_bytes, to_signed
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.stages.config import VAEStageSection
from latentdiff.training.task import Task

# Images over which the standard deviation of the latents is measured.
_SCALE_IMAGES = 2000

# A sheet shows pairs of original and reconstruction.
_SHEET_IMAGES = 24
_SHEET_COLUMNS = 4


class VAETask(Task):
    """Reconstruction of images, with a divergence that keeps the latents near a standard normal.

    Args:
        vae: the autoencoder; its `scaling_factor` is 1 unless `decoder_only`.
        settings: weights of the loss terms.
        data, images: training set, its decoded images (n, R, R, 3) uint8.
        held_out: decoded images of the validation set.
        seed: of the run.
        decoder_only: leave the encoder as it is.
    """

    def __init__(
        self,
        vae: VAE,
        settings: VAEStageSection,
        data: Dataset,
        images: np.ndarray,
        held_out: np.ndarray,
        *,
        seed: int,
        decoder_only: bool = False,
    ) -> None:
        self.fingerprint = f"{data.fingerprint} shuffled by seed {seed}"
        self.module = VAELoss(vae, settings, decoder_only=decoder_only)
        self.loader_threads = settings.loader_threads
        self._vae, self._settings, self._data, self._images = vae, settings, data, images
        self._held_out = held_out[: settings.validation_images]
        self._seed, self._order = seed, BatchOrder(data.repeats, settings.batch_size, seed)
        size = settings.crop // vae.config.downscale
        self._latent_shape = (vae.config.latent_channels, size, size)

    def parameter_groups(self) -> list[ParameterGroup]:
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        of_vae = {name: p for name, p in trained.items() if name.startswith("vae.")}
        of_discriminator = {name: p for name, p in trained.items() if name not in of_vae}
        groups = [ParameterGroup("vae", of_vae), ParameterGroup("discriminator", of_discriminator)]
        return [group for group in groups if group.parameters]

    def averaged(self) -> set[str]:
        return {"vae"}

    def compile(self) -> None:
        self._vae.encoder.compile()
        self._vae.decoder.compile()

    def batch(self, step: int, rows: range) -> dict[str, np.ndarray]:
        crop = self._settings.crop
        indices = self._order.batch(step, rows)
        # On the grid of the latents, where whole images are encoded too.
        grid = self._vae.config.downscale
        places = (self._images.shape[1] - crop) // grid + 1
        corners = (uniform((self._seed, "crop", step), rows, (2,)) * places).astype(int) * grid
        crops = [
            self._images[index, top : top + crop, left : left + crop]
            for index, (top, left) in zip(indices, corners, strict=True)
        ]
        return {
            "images": np.stack(crops),  # (n, crop, crop, 3) uint8
            "noise": normal((self._seed, "posterior", step), rows, self._latent_shape),
        }

    def sources(self, step: int) -> list[str]:
        return [self._data.names[index] for index in self._order.batch(step, range(self._settings.batch_size))]

    def validate(self) -> dict[str, float]:
        psnr = torch.cat([_psnr(original, made) for original, made in self._reconstructions(self._held_out)])
        return {"psnr": round(psnr.mean().item(), 3)}

    def preview(self, folder: Path, step: int) -> None:
        pairs = [torch.cat(pair, dim=3) for pair in self._reconstructions(self._held_out[:_SHEET_IMAGES])]
        columns = [
            torch.cat(list(part), dim=1) for part in torch.cat(pairs).chunk(_SHEET_COLUMNS)
        ]  # (3, rows R, 2 R) each
        height = max(column.shape[1] for column in columns)
        sheet = torch.cat([F.pad(column, (0, 0, 0, height - column.shape[1])) for column in columns], dim=2)
        with atomic_path(folder / f"step-{step:08d}.png") as temporary:
            Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(temporary)

    def _reconstructions(self, images: np.ndarray, size: int = 32):
        """Pairs of original and reconstruction from the mode of the latents, (n, 3, R, R) uint8."""
        device = next(self._vae.parameters()).device
        for start in range(0, len(images), size):
            original = torch.from_numpy(images[start : start + size].copy()).to(device)
            made = self._vae.decode(self._vae.encode(to_signed(original)).mode())
            yield original.permute(0, 3, 1, 2), to_bytes(made)


class VAELoss(nn.Module):
    """The autoencoder with its training loss."""

    def __init__(self, vae: VAE, settings: VAEStageSection, *, decoder_only: bool) -> None:
        super().__init__()
        self.vae = vae
        self._settings, self._decoder_only = settings, decoder_only
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.discriminator = PatchDiscriminator() if settings.adversarial_weight else None
        self.features = _Features(settings.perceptual_network) if settings.perceptual_weight else None

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Loss and its parts for `images` (n, H, W, 3) uint8 and posterior `noise` (n, C, h, w)."""
        settings = self._settings
        images = to_signed(batch["images"])  # (n, 3, H, W)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._decoder_only):
            latents = self.vae.encode(images)
        made = self.vae.decode(latents.sample(batch["noise"])).float()
        error = made - images
        parts = {"l1": error.abs().mean(), "mse": error.square().mean(), "gradient": _edges(error)}
        weights = {"l1": settings.l1_weight, "mse": settings.mse_weight, "gradient": settings.gradient_weight}
        if not self._decoder_only:
            parts["kl"], weights["kl"] = latents.kl().float().mean(), settings.kl_weight
        if self.features is not None:
            parts["perceptual"], weights["perceptual"] = self.features(made, images), settings.perceptual_weight
        if self.discriminator is not None and step >= settings.adversarial_start:
            parts |= self._adversarial(made, images)
            weights |= {"adversarial": settings.adversarial_weight, "discriminator": 1.0}
        return {"loss": sum(weight * parts[name] for name, weight in weights.items()), **parts}

    def _adversarial(self, made: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Hinge losses of decoder and discriminator; each sees the other as a constant, so one backward pass serves
        both."""
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        verdict = functional_call(self.discriminator, constant, (made,)).float()
        real, fake = self.discriminator(images).float(), self.discriminator(made.detach()).float()
        return {
            "adversarial": -verdict.mean(),
            "discriminator": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
        }


class PatchDiscriminator(nn.Sequential):
    """Images (N, 3, H, W) -> a verdict per patch of about 46 pixels (Isola et al. 2017), group instead of batch
    norms."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, 1, 1),
        )


class _Features(nn.Module):
    """Distance of images in the hidden states of a frozen vision model (as LPIPS, Zhang et al. 2018, without its
    weights)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        try:
            network = AutoModel.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"perceptual_network {folder} is no transformers vision model: {str(error).splitlines()[0]}"
            ) from error
        self.network = network.eval().requires_grad_(False)

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        return sum(_cosine_distance(a, b) for a, b in zip(self._states(made), self._states(images), strict=True))

    def _states(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(pixel_values=images, output_hidden_states=True).hidden_states


@torch.inference_mode()
def measure_scaling_factor(vae: VAE, images: np.ndarray, seed: int) -> float:
    """1 / standard deviation of the latents of evenly spread images (n, R, R, 3) uint8 (Rombach et al. 2022, appendix
    G)."""
    device = next(vae.parameters()).device
    chosen = np.linspace(0, len(images) - 1, min(len(images), _SCALE_IMAGES)).astype(int)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(chosen), 32):
        batch = torch.from_numpy(images[chosen[start : start + 32]]).to(device)
        distribution = vae.encode(to_signed(batch))
        noise = normal((seed, "scaling factor"), range(start, start + len(batch)), tuple(distribution.mean.shape[1:]))
        latents = distribution.sample(torch.from_numpy(noise).to(device)).double()
        count += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    return vae.config.scaling_factor / (squares / count - (total / count) ** 2) ** 0.5


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of unit feature vectors, of maps (N, C, h, w) or tokens (N, L, C)."""
    channels = 1 if a.ndim == 4 else -1
    return (F.normalize(a, dim=channels) - F.normalize(b, dim=channels)).square().sum(channels).mean()


def _edges(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring errors, which is the error of the image gradients."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images (N, 3, H, W) in dB, (N,)."""
    errors = (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return torch.tensor([decibels(error) for error in errors.tolist()])
