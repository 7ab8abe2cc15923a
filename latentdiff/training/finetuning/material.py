"""From the folders that a configuration names to what is trained on and measured on: split and buckets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentdiff.checkpoints.components import Components
from latentdiff.errors import DataError
from latentdiff.training.data import Dataset, read_dataset
from latentdiff.training.data.buckets import Size, assign, default_step
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.streaming import StreamBatches
from latentdiff.training.hints import Hints
from latentdiff.training.holes import Holes
from latentdiff.training.masks import Masks
from latentdiff.training.material import Material, material
from latentdiff.training.samples import Batches, Samples
from latentdiff.training.sections import DataEntry, sources, with_words
from latentdiff.training.validation import split


def read_material(settings: FinetuneConfig, parts: Components, shards: Sequence[Path]) -> Material:
    """Read the data of a run and decide which images are trained on.

    Args:
        shards: of a stream; its first one shows what is in it.

    Raises:
        DataError: there is nothing to train on; the message says what was looked for and what was there.
    """
    tokens = CaptionTokens(parts.tokenizer, settings.long_captions)
    samples = _samples(_shard(settings, shards) if shards else settings.data, settings, parts, tokens)
    usable = _usable(samples)
    if not len(usable):
        raise DataError(
            f"all {len(samples.data)} images are smaller than the smallest bucket; take a smaller resolution, or upscale"
        )
    reminds = np.array([index in samples.data.reminders for index in usable])
    reminders, usable = usable[reminds], usable[~reminds]
    if not len(usable):
        raise DataError("all images are for regularization, expected some to learn from; add them with --data FOLDER")
    # Pairs of one prompt stay together, so that what is measured is what becomes of new prompts.
    keys = samples.data.names if not samples.data.paired else [captions[0] for captions in samples.data.captions]
    names = [keys[index] for index in usable]
    parted = split(names, settings.validation_share, settings.seed, settings.validation_images)
    held_out = (samples, usable[parted.held_out])
    if settings.validation:
        other = _samples(settings.validation, settings, parts, tokens)
        held_out = (other, _usable(other)[: settings.validation_images])
    return material(samples, usable[parted.training], held_out, settings.seed, reminders)


def _shard(settings: FinetuneConfig, shards: Sequence[Path]) -> list[DataEntry]:
    return [settings.data[0].model_copy(update={"path": str(shards[0])})]


def batches_of(
    of: Material, settings: FinetuneConfig, num_train_timesteps: int, shards: Sequence[Path]
) -> Batches | StreamBatches:
    """What each step trains on."""
    samples = of.samples
    if not shards:
        return Batches(samples, of.training, settings, settings.seed, num_train_timesteps)
    largest = max(samples.buckets[index] for index in of.training)
    return StreamBatches(
        list(shards),
        largest,
        samples.tokens,
        settings,
        samples.latent,
        num_train_timesteps,
        tells_sizes=samples.tells_sizes,
        holes=samples.holes,
    )


def _samples(
    entries: Sequence[DataEntry], settings: FinetuneConfig, parts: Components, tokens: CaptionTokens
) -> Samples:
    data = read_dataset(
        sources(with_words(entries, settings.caption_prefix, settings.caption_suffix), settings.prior_weight),
        **settings.reading,
        verify=not settings.stream,
        index=settings.out / "index",
        pairs=settings.loss == "dpo",
    )
    vae = parts.vae.config
    masks = Masks.find(data, settings.masks, settings.unmasked_weight)
    is_control = settings.method == "controlnet"
    return Samples(
        data,
        _buckets(data, settings, parts),
        tokens,
        settings,
        (vae.latent_channels, vae.downscale),
        tells_sizes=parts.unet.config.added_dim is not None,
        hints=Hints.find(data, settings.hints, settings.control_kind) if is_control else None,
        masks=masks,
        holes=Holes(settings.seed, masks) if parts.unet.config.in_channels > vae.latent_channels else None,
    )


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
