"""Training on WebDataset shards in sequence: data sets of any size, with no index of them in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from latentdiff.errors import DataError, UsageError
from latentdiff.training.data.buckets import Size
from latentdiff.training.data.captions import MAX_CHUNKS, choose, worded
from latentdiff.training.data.randomness import generator
from latentdiff.training.data.shards import find_shards
from latentdiff.training.data.stream import Sample, ShardStream
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.data.transforms import CropKey, prepare, told_sizes
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.holes import Holes, random_hole, seen_noise
from latentdiff.training.samples import Arrays, step_numbers
from latentdiff.training.sections import with_words

_REMEMBERED_STEPS = 1024  # whose file names are kept for messages
_PROBLEMS_SHOWN = 20


class _Item(NamedTuple):
    name: str
    pixels: np.ndarray  # (H, W, 3) uint8
    caption: str
    size: Size  # before it was prepared


class StreamBatches:
    """Batches of square images from shards, in an order that depends on the seed alone.

    Args:
        shards: local tar files.
        size: of the images, width and height.
        tokens: makes token ids.
        settings: batch size, crops, captions, seed.
        latent: channels of the latents, and pixels per latent.
        num_train_timesteps: of the noise schedule.
        tells_sizes: the U-Net is told the sizes of images.
        holes: what a model for inpainting is to paint.
    """

    def __init__(
        self,
        shards: list[Path],
        size: Size,
        tokens: CaptionTokens,
        settings: FinetuneConfig,
        latent: tuple[int, int],
        num_train_timesteps: int,
        *,
        tells_sizes: bool = False,
        holes: Holes | None = None,
    ) -> None:
        self._tells_sizes, self._holes = tells_sizes, holes
        self._shards, self._size, self._tokens, self._settings = shards, size, tokens, settings
        self._stream = ShardStream(tuple(shards), settings.batch_size, settings.seed)
        self._rules = settings.caption_rules
        (self._source,) = with_words(settings.data, settings.caption_prefix, settings.caption_suffix)
        channels, downscale = latent
        self._latent_shape = (channels, size[1] // downscale, size[0] // downscale)
        self._timesteps = num_train_timesteps
        self._names: OrderedDict[int, list[str]] = OrderedDict()
        self._problems = 0

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a shard is added, removed, renamed or rewritten. 16 hex digits."""
        digest = hashlib.sha256()
        for shard in self._shards:
            stat = shard.stat()
            digest.update(f"{shard.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def names(self, step: int) -> list[str]:
        """Names of the samples of a step that was read not long ago."""
        return self._names.get(step, [])

    def iterate(self, first_step: int, rows: range, micro_batch: int) -> Iterator[Arrays]:
        """Micro-batches of the given rows of each batch from `first_step` on, for ever; see `DenoisingLoss.forward`."""
        batches = self._stream.batches(self._item, first_step=first_step, rows=rows)
        for step, batch in enumerate(batches, start=first_step):
            self._remember(step, [item.name for item in batch.items])
            for problem in batch.problems:
                self._problems += 1
                if self._problems <= _PROBLEMS_SHOWN:
                    tqdm.write(f"left out {problem.name}: {problem.reason}")
            for start in range(0, len(rows), micro_batch):
                part = range(rows.start + start, rows.start + start + micro_batch)
                yield self._arrays(step, part, batch.items[start : start + micro_batch])

    def _item(self, sample: Sample, step: int, row: int) -> _Item:
        settings = self._settings
        image = sample.image(settings.background)
        if not settings.upscale and (image.width < self._size[0] or image.height < self._size[1]):
            wanted = "x".join(map(str, self._size))
            raise DataError(f"the image {sample.name} has {image.width}x{image.height} pixels, fewer than {wanted}")
        captions = worded(sample.captions(settings.caption_column), self._source.prefix, self._source.suffix)
        caption = choose(captions, self._rules, seed=settings.seed, step=step, row=row)
        return _Item(sample.name, prepare(image, self._size, self._crop_key(step, row)), caption, image.size)

    def _crop_key(self, step: int, row: int) -> CropKey:
        return (self._settings.seed, "crop", step, row) if self._settings.crop == "random" else None

    def _sizes(self, step: int, rows: range, items: list[_Item], flipped: list[bool]) -> Arrays:
        if not self._tells_sizes:
            return {}
        told = [
            told_sizes(item.size, self._size, self._crop_key(step, row), flipped=flip)
            for item, row, flip in zip(items, rows, flipped, strict=True)
        ]
        return {"sizes": np.array(told, np.float32)}

    def _arrays(self, step: int, rows: range, items: list[_Item]) -> Arrays:
        settings, shape = self._settings, self._latent_shape
        numbers, posterior, flipped = step_numbers(settings, settings.seed, step, rows, shape, self._timesteps)
        pixels = [item.pixels[:, ::-1] if flip else item.pixels for item, flip in zip(items, flipped, strict=True)]
        chunks = MAX_CHUNKS if settings.long_captions == "chunk" else 1
        return {
            "images": np.stack(pixels),
            "posterior": posterior,
            "tokens": self._tokens.rows([item.caption for item in items], chunks),
            "weights": np.ones(len(items), np.float32),
            **self._sizes(step, rows, items, flipped),
            **self._with_holes(step, rows),
            **numbers,
        }

    def _with_holes(self, step: int, rows: range) -> Arrays:
        if self._holes is None:
            return {}
        keys = self._holes.of_step(step, rows)
        made = [random_hole(self._size, generator(*key)) for key in keys]
        return {"holes": np.stack(made)[:, None], "seen_noise": seen_noise(keys, self._latent_shape)}

    def _remember(self, step: int, names: list[str]) -> None:
        self._names[step] = names
        while len(self._names) > _REMEMBERED_STEPS:
            self._names.popitem(last=False)


def shards_to_stream(settings: FinetuneConfig) -> list[Path]:
    """The shards of a configuration with `stream`.

    Raises:
        UsageError: the data is something else.
    """
    if len(settings.data) != 1 or not (shards := find_shards(settings.data[0].path)):
        raise UsageError(
            "stream reads one folder or range of WebDataset tar files; give it with --data, or leave out stream"
        )
    if settings.data[0].regularization:
        raise UsageError("a stream has no images beside it to learn from: leave regularization out")
    if settings.data[0].repeats != 1 or settings.data[0].weight != 1:
        raise UsageError("a stream is read once from start to end: its data has no repeats and no weight")
    if settings.validation_share:
        raise UsageError("a stream has no images to hold out; give a held-out folder with --validation")
    return shards
