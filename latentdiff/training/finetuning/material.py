"""From the folders that a configuration names to what training and validation read: split, buckets, tokens, caches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from latentdiff.checkpoints.components import Components
from latentdiff.errors import DataError
from latentdiff.files import atomic_path
from latentdiff.training.data import Dataset, DataSource, read_dataset
from latentdiff.training.data.buckets import Size, assign, default_step
from latentdiff.training.finetuning.caches import cache_latents, cache_text
from latentdiff.training.finetuning.captions import CaptionTokens
from latentdiff.training.finetuning.config import DataEntry, FinetuneConfig
from latentdiff.training.finetuning.samples import Batches, Samples
from latentdiff.training.finetuning.streaming import StreamBatches, shards_to_stream
from latentdiff.training.finetuning.validation import fixed_part, split


@dataclass
class Material:
    """What is learned from, and what it is measured on."""

    samples: Samples
    training: np.ndarray  # indices of `samples`
    held_out: tuple[Samples, np.ndarray]
    training_part: tuple[Samples, np.ndarray]
    summary: dict[str, Any]
    shards: tuple[Path, ...] = ()  # of a stream, of which `samples` is then only the beginning

    def batches(self, settings: FinetuneConfig, num_train_timesteps: int) -> Batches | StreamBatches:
        """What each step trains on."""
        samples = self.samples
        if not self.shards:
            return Batches(samples, self.training, settings, num_train_timesteps)
        largest = max(samples.buckets[index] for index in self.training)
        return StreamBatches(list(self.shards), largest, samples.tokens, settings, samples.latent, num_train_timesteps)

    def of(self) -> list[tuple[Samples, np.ndarray]]:
        """Every image that is read, by the samples it belongs to."""
        samples, held_out = self.held_out
        if samples is not self.samples:
            return [(self.samples, self.training), self.held_out]
        return [(self.samples, np.concatenate([self.training, held_out]))]


def read_material(settings: FinetuneConfig, parts: Components) -> Material:
    """Read the data of a run and decide which images are trained on.

    Raises:
        DataError: there is nothing to train on; the message says what was looked for and what was there.
    """
    tokens = CaptionTokens(parts.tokenizer, settings.long_captions)
    shards = shards_to_stream(settings) if settings.stream else []
    # A stream shows what is in it by its first shard.
    data = [DataEntry(path=str(shards[0]))] if shards else settings.data
    samples = _samples(data, settings, parts, tokens)
    usable = _usable(samples)
    if not len(usable):
        raise DataError(
            f"all {len(samples.data)} images are smaller than the smallest bucket; take a smaller resolution, or upscale"
        )
    names = [samples.data.names[index] for index in usable]
    parted = split(names, settings.validation_share, settings.seed, settings.validation_images)
    held_out = (samples, usable[parted.held_out])
    part = parted.training_part
    if settings.validation:
        other = _samples(settings.validation, settings, parts, tokens)
        held_out = (other, _usable(other)[: settings.validation_images])
        part = fixed_part(names, parted.training, len(held_out[1]), settings.seed)
    training = usable[parted.training]
    summary = _summary(samples, training, held_out, settings) | ({"shards": len(shards)} if shards else {})
    return Material(samples, training, held_out, (samples, usable[part]), summary, tuple(shards))


def build_caches(
    material: Material, parts: Components, settings: FinetuneConfig, accelerator: Accelerator, *, trains_text: bool
) -> None:
    """Encode images and captions where that is asked for and right; the samples read from the caches from then on."""
    if settings.stream:
        return
    folder = settings.cache or settings.out / "cache"
    if settings.cache_latents and settings.crop == "center":
        work = {}
        for samples, indices in material.of():
            work |= samples.latent_work(indices.tolist())
        latents = cache_latents(parts.vae, work, folder, settings.cache_precision, accelerator, settings.loader_threads)
        for samples, _ in material.of():
            samples.latents = latents
    # Captions that are put together anew at every step, or in batches of different lengths, have no fixed embeddings.
    if settings.cache_text and not trains_text and not settings.shuffle_tags and settings.long_captions == "cut":
        captions = {
            caption
            for samples, indices in material.of()
            for index in indices
            for caption in samples.data.captions[index]
        }
        rows = [material.samples.tokens.rows([caption], 1)[0] for caption in sorted({"", *captions})]
        texts = cache_text(parts.text_encoder, rows, folder, settings.cache_precision, accelerator)
        for samples, _ in material.of():
            samples.texts = texts


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write what the report says about the data."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _samples(
    entries: Sequence[DataEntry], settings: FinetuneConfig, parts: Components, tokens: CaptionTokens
) -> Samples:
    data = read_dataset(
        [DataSource(entry.path, entry.repeats, entry.weight) for entry in entries],
        caption_column=settings.caption_column,
        strict=settings.strict,
        allow_missing=settings.allow_missing,
        background=settings.background,
        verify=not settings.stream,
        index=settings.out / "index",
    )
    vae = parts.vae.config
    return Samples(data, _buckets(data, settings, parts), tokens, settings, (vae.latent_channels, vae.downscale))


def _buckets(data: Dataset, settings: FinetuneConfig, parts: Components) -> list[Size | None]:
    downscale = parts.vae.config.downscale
    resolution = settings.resolution or parts.unet.config.sample_size * downscale
    step = settings.bucket_step or default_step(resolution, downscale)
    if step % downscale:
        raise DataError(f"expected a bucket_step that is a multiple of the VAE's factor {downscale}, found {step}")
    aspect = settings.max_aspect if settings.buckets and not settings.stream else 1.0
    return assign(data.sizes, resolution, step, upscale=settings.upscale, max_aspect=aspect)


def _usable(samples: Samples) -> np.ndarray:
    return np.array([index for index, bucket in enumerate(samples.buckets) if bucket is not None], dtype=np.int64)


def _summary(
    samples: Samples, training: np.ndarray, held_out: tuple[Samples, np.ndarray], settings: FinetuneConfig
) -> dict[str, Any]:
    data = samples.data
    captions = [caption for index in training for caption in data.captions[index]]
    buckets = Counter(samples.buckets[index] for index in training)
    return {
        "sources": data.layouts,
        "images": len(training),
        "held_out": len(held_out[1]),
        "captions": len(captions),
        "captions_cut": sum(map(samples.tokens.is_cut, captions)),
        "too_small": sum(bucket is None for bucket in samples.buckets),
        "unreadable": [f"{problem.name}: {problem.reason}" for problem in data.problems],
        "notes": data.notes,
        "buckets": {f"{width}x{height}": count for (width, height), count in sorted(buckets.items())},
        "batch_size": settings.batch_size,
    }
