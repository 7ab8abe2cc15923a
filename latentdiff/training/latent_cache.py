"""Latents of a data set as distributions, on disk, so that training samples them anew and never runs the encoder.

    CACHE/latents-ENCODER-DATA-RESOLUTION/00000.safetensors, ...     mean and logvar, (n, C, h, w) float16, of 1024
    images each

A shard is written atomically and keyed by everything that it depends on: an interrupted build goes on with the first
missing shard, a changed encoder or data set gets a new folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from latentdiff.errors import NotFiniteError
from latentdiff.files import atomic_path
from latentdiff.networks.vae import VAE
from latentdiff.training.captioned_folder import CaptionedFolder
from latentdiff.training.networks import encoder_hash
from latentdiff.training.vae_stage import to_signed

_SHARD = 1024
_BATCH = 32


@dataclass(frozen=True)
class CachedLatents:
    """Distributions of the latents of n images, float16 in memory."""

    mean: np.ndarray  # (n, C, h, w)
    logvar: np.ndarray  # (n, C, h, w)

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Latents (len(indices), C, h, w) float32 for standard normal noise of that shape."""
        deviation = np.exp(0.5 * self.logvar[indices].astype(np.float32))
        return self.mean[indices].astype(np.float32) + deviation * noise


def cached_latents(
    vae: VAE, data: CaptionedFolder, images: np.ndarray, cache: Path, accelerator: Accelerator
) -> CachedLatents:
    """Read the latents of decoded images (n, R, R, 3) uint8, encoding those that are not cached yet; processes share
    the work.

    Raises:
        NotFiniteError: the encoder overflows; the message names the image.
    """
    folder = cache / f"latents-{encoder_hash(vae)}-{data.fingerprint}-{images.shape[1]}"
    starts = range(0, len(images), _SHARD)
    missing = [start for start in starts if not _shard(folder, start).is_file()]
    own = missing[accelerator.process_index :: accelerator.num_processes]
    vae.to(accelerator.device).eval()
    for start in tqdm(own, desc="encode latents", unit="shard", leave=False, disable=not accelerator.is_main_process):
        shard = _encode(vae, images[start : start + _SHARD])
        finite = np.isfinite(shard["mean"] + shard["logvar"]).all(axis=(1, 2, 3))
        if not finite.all():
            raise NotFiniteError(f"the latents of {data.path(start + int(finite.argmin()))} are not finite")
        with atomic_path(_shard(folder, start)) as temporary:
            save_file(shard, temporary)
    accelerator.wait_for_everyone()
    shards = [load_file(_shard(folder, start)) for start in starts]
    return CachedLatents(*(np.concatenate([shard[name] for shard in shards]) for name in ("mean", "logvar")))


def _shard(folder: Path, start: int) -> Path:
    return folder / f"{start // _SHARD:05d}.safetensors"


@torch.inference_mode()
def _encode(vae: VAE, images: np.ndarray) -> dict[str, np.ndarray]:
    device = next(vae.parameters()).device
    parts = []
    for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(images[start : start + _BATCH].copy()).to(device)
        parts.append(vae.encode(to_signed(batch)))
    stacked = {"mean": torch.cat([part.mean for part in parts]), "logvar": torch.cat([part.logvar for part in parts])}
    return {name: np.ascontiguousarray(tensor.half().cpu().numpy()) for name, tensor in stacked.items()}
