"""Latents of a data set as distributions, on disk, so that training samples them anew and never runs the encoder.

    CACHE/latents-ENCODER-DATA-RESOLUTION/00000.safetensors, ...     mean and logvar, (n, C, h, w) float16, of 1024 images each

A shard is written atomically and keyed by everything that it depends on: an interrupted build goes on with the first missing
shard, a changed encoder or data set gets a new folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import NotFiniteError
from latentdiff.files import atomic_path
from latentdiff.training.data import CaptionedFolder
from latentdiff.training.networks import encoder_hash
from latentdiff.training.vae_stage import to_signed
from latentdiff.vae import VAE, LatentDistribution

_SHARD = 1024
_BATCH = 32


@dataclass(frozen=True)
class CachedLatents:
    """Distributions of the latents of n images, float16 in memory."""

    mean: Tensor  # (n, C, h, w)
    logvar: Tensor  # (n, C, h, w)

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Latents (len(indices), C, h, w) float32 for standard normal noise of that shape."""
        return LatentDistribution(self.mean[indices].float(), self.logvar[indices].float()).sample(noise)


def cached_latents(vae: VAE, data: CaptionedFolder, images: np.ndarray, cache: Path, accelerator: Accelerator) -> CachedLatents:
    """Read the latents of decoded images (n, R, R, 3) uint8, encoding those that are not cached yet; processes share the work.

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
        finite = torch.isfinite(shard["mean"]).flatten(1).all(1) & torch.isfinite(shard["logvar"]).flatten(1).all(1)
        if not finite.all():
            raise NotFiniteError(f"the latents of {data.path(start + int(finite.logical_not().nonzero()[0]))} are not finite")
        with atomic_path(_shard(folder, start)) as temporary:
            save_file(shard, temporary)
    accelerator.wait_for_everyone()
    shards = [load_file(_shard(folder, start)) for start in starts]
    return CachedLatents(*(torch.cat([shard[name] for shard in shards]) for name in ("mean", "logvar")))


def _shard(folder: Path, start: int) -> Path:
    return folder / f"{start // _SHARD:05d}.safetensors"


@torch.inference_mode()
def _encode(vae: VAE, images: np.ndarray) -> dict[str, Tensor]:
    device = next(vae.parameters()).device
    parts = []
    for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(images[start : start + _BATCH].copy()).to(device)
        parts.append(vae.encode(to_signed(batch)))
    return {
        "mean": torch.cat([part.mean for part in parts]).half().cpu().contiguous(),
        "logvar": torch.cat([part.logvar for part in parts]).half().cpu().contiguous(),
    }
