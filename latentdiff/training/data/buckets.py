"""Aspect-ratio buckets: every image keeps its shape as far as a grid of sizes allows, and a batch has one size."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from latentdiff.errors import DataError, UsageError
from latentdiff.training.data.randomness import SampleOrder, generator

Size = tuple[int, int]  # width, height in pixels

STEP = 64  # pixels; the U-Net of SD halves latents, which are 1/8 of the image, three times
MAX_ASPECT = 2.0


def default_step(resolution: int, downscale: int) -> int:
    """Multiples that sides of buckets have where nothing else is asked for: 64 pixels, or 4 latents of smaller models.

    Args:
        resolution: side of the square bucket.
        downscale: pixels per latent.
    """
    return STEP if resolution >= 4 * STEP else min(4 * downscale, resolution)


def bucket_sizes(resolution: int, step: int = STEP, max_aspect: float = MAX_ASPECT) -> list[Size]:
    """Sizes with multiples of `step` as sides, an area of at most `resolution`², and sides that differ by `max_aspect`
    at most.

    Raises:
        UsageError: the resolution is no multiple of the step.
    """
    if step < 1 or resolution < step or resolution % step:
        raise UsageError(f"expected a resolution that is a multiple of {step}, found {resolution}")
    if max_aspect < 1:
        raise UsageError(f"expected a max_aspect of at least 1, found {max_aspect}")
    widths = range(step, int(resolution * math.sqrt(max_aspect)) + 1, step)
    sizes = {(width, resolution**2 // width // step * step) for width in widths if resolution**2 // width >= step}
    sizes |= {(height, width) for width, height in sizes}
    return sorted(size for size in sizes if max(size) <= max_aspect * min(size))


def assign(
    sizes: Sequence[Size],
    resolution: int,
    step: int = STEP,
    *,
    upscale: bool = False,
    max_aspect: float = MAX_ASPECT,
) -> list[Size | None]:
    """The bucket of each image: that of the nearest aspect ratio.

    An image that is smaller than its bucket gets a smaller one, its own size rounded down to multiples of `step`, so
    that nothing is enlarged; None where even one step is larger than the image. With `upscale` it is enlarged instead.

    Args:
        sizes: of the images.
        resolution: the side of the square bucket; all buckets have about its area.
        step: pixels; what the model needs the sides to be multiples of.
        upscale: enlarge images that are smaller than their bucket.
        max_aspect: the longer side of a bucket through the shorter; more elongated images are cropped.
    """
    buckets = bucket_sizes(resolution, step, max_aspect)
    ratios = np.log([width / height for width, height in buckets])
    found: dict[Size, Size | None] = {}
    for width, height in set(sizes):
        bucket = buckets[int(np.abs(ratios - math.log(width / height)).argmin())]
        too_small = width < bucket[0] or height < bucket[1]
        found[width, height] = (
            _shrunk((width, height), bucket, step, max_aspect) if too_small and not upscale else bucket
        )
    return [found[size] for size in sizes]


def _shrunk(size: Size, bucket: Size, step: int, max_aspect: float) -> Size | None:
    width, height = (min(side, limit) // step * step for side, limit in zip(size, bucket, strict=True))
    if not width or not height:
        return None
    longest = int(max_aspect * min(width, height)) // step * step
    return min(width, longest), min(height, longest)


def kept_share(size: Size, bucket: Size) -> float:
    """How much of an image's area is left after it was scaled to cover its bucket and cropped, 0 to 1."""
    aspect, wanted = size[0] / size[1], bucket[0] / bucket[1]
    return min(aspect, wanted) / max(aspect, wanted)


class BatchPlan:
    """Which images make up which batch, as a pure function of the step.

    Every image of a bucket is seen once (times its repeats) in each of its epochs, in an order that depends on
    (seed, bucket, epoch) alone. What does not fill the last batch of a bucket waits for the next epoch and comes first
    then: no batch is smaller, nothing is left out, and in the long run every image is seen equally often. A bucket with
        fewer
    images than a batch thus has a batch only every few epochs, and may hold an image twice.

    Args:
        bucket_of: the bucket of each image; None leaves it out.
        batch_size: of the global batch.
        seed: of the order.
        repeats: how often each image is seen in an epoch; once by default.

    Raises:
        DataError: no image has a bucket.
    """

    def __init__(
        self, bucket_of: Sequence[Size | None], batch_size: int, seed: int, repeats: Sequence[int] | None = None
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, found {batch_size}")
        members: dict[Size, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            if bucket is not None:
                members.setdefault(bucket, []).extend([index] * (repeats[index] if repeats is not None else 1))
        if not members:
            raise DataError(
                f"none of {len(bucket_of)} images is large enough; take a smaller resolution or allow upscaling"
            )
        self.batch_size = batch_size
        self._buckets = sorted(members)
        self._members = [np.array(members[bucket]) for bucket in self._buckets]
        seeds = [int(generator(seed, "bucket", *bucket).integers(2**63)) for bucket in self._buckets]
        self._orders = [SampleOrder(len(own), each) for own, each in zip(self._members, seeds, strict=True)]
        self._seed = seed
        self._epoch = lru_cache(maxsize=4)(self._batches_of)

    @property
    def samples_per_epoch(self) -> int:
        """Images that are seen in an epoch, repeats included."""
        return sum(len(members) for members in self._members)

    @property
    def buckets(self) -> list[Size]:
        """The buckets that hold images."""
        return list(self._buckets)

    def epoch(self, step: int) -> int:
        """The epoch that the batch of this step belongs to, from 0."""
        # The buckets' rests make epochs differ by a few batches, never by more than one a bucket.
        guess = step * self.batch_size // self.samples_per_epoch
        return bisect_right(range(guess + len(self._buckets) * self.batch_size + 2), step, key=self._first_step) - 1

    def indices(self, step: int) -> tuple[Size, np.ndarray]:
        """The bucket of a step and the images of its global batch, (batch_size,) int64."""
        epoch = self.epoch(step)
        bucket, number = self._epoch(epoch)[step - self._first_step(epoch)]
        places = self._orders[bucket].indices(number * self.batch_size, self.batch_size)
        return self._buckets[bucket], self._members[bucket][places]

    def _first_step(self, epoch: int) -> int:
        return sum(len(members) * epoch // self.batch_size for members in self._members)

    def _batches_of(self, epoch: int) -> list[tuple[int, int]]:
        """Batches of an epoch as (bucket, number of the batch in it since the start), shuffled."""
        batches = [
            (bucket, number)
            for bucket, members in enumerate(self._members)
            for number in range(len(members) * epoch // self.batch_size, len(members) * (epoch + 1) // self.batch_size)
        ]
        return [batches[place] for place in generator(self._seed, "batches", epoch).permutation(len(batches))]
