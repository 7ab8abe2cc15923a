"""Captioned images as the numbers that a training step takes, each a pure function of seed, step and row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

from latentdiff.training.caches import LatentCache, LatentWork, TextCache
from latentdiff.training.data import Dataset
from latentdiff.training.data.buckets import BatchPlan, Size
from latentdiff.training.data.captions import choose
from latentdiff.training.data.randomness import Key, normal, uniform
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.data.transforms import CropKey, prepare, told_sizes
from latentdiff.training.hints import Hints
from latentdiff.training.holes import Holes, seen_noise
from latentdiff.training.masks import Masks
from latentdiff.training.noise import diffusion_noise
from latentdiff.training.objective import draw_timesteps
from latentdiff.training.sections import DenoisingSection
from latentdiff.training.store import row_key

# Changes when images are prepared in another way, so that cached latents are made again.
_PREPARATION = 1

Arrays = dict[str, np.ndarray]


class Samples:
    """Images in their buckets and their captions, as arrays.

    Args:
        data: the images.
        buckets: (width, height) of each, as training sees it.
        tokens: makes token ids.
        settings: how images are cropped and captions are chosen.
        latent: channels of the latents, and pixels per latent.
        tells_sizes: the U-Net is told the sizes of images, as those of SDXL are.
        hints: what a ControlNet follows, if one is trained.
        masks: where in the images errors count, if not everywhere.
        holes: what a model for inpainting is to paint.
    """

    def __init__(
        self,
        data: Dataset,
        buckets: Sequence[Size | None],
        tokens: CaptionTokens,
        settings: DenoisingSection,
        latent: tuple[int, int],
        *,
        tells_sizes: bool = False,
        hints: Hints | None = None,
        masks: Masks | None = None,
        holes: Holes | None = None,
    ) -> None:
        self.tells_sizes, self.hints, self.masks, self.holes = tells_sizes, hints, masks, holes
        self.data, self.buckets, self.tokens = data, list(buckets), tokens
        self._settings = settings
        self.latent = self._channels, self._downscale = latent
        self.latent_key = lru_cache(maxsize=None)(self._latent_key)
        self.latents: LatentCache | None = None
        self.texts: TextCache | None = None

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents."""
        width, height = self.buckets[index]
        return self._channels, height // self._downscale, width // self._downscale

    def pixels(
        self, index: int, *, flipped: bool = False, crop_key: CropKey = None, rejected: bool = False
    ) -> np.ndarray:
        """An image in its bucket, (H, W, 3) uint8; with a `crop_key`, where the crop lies depends on it."""
        image = prepare(self.data.load(index, rejected=rejected), self.buckets[index], crop_key)
        return np.ascontiguousarray(image[:, ::-1] if flipped else image)

    def _latent_key(self, index: int, *, flipped: bool = False, rejected: bool = False) -> str:
        """Names the latents of an image for ever: by its file, its bucket and how it is prepared."""
        entry = self.data.entries[index].images[int(rejected)]
        about = (entry.name, entry.origin.stamp(), self.data.background, self.buckets[index], flipped, _PREPARATION)
        return row_key(*about)

    def latent_work(self, indices: Sequence[int]) -> LatentWork:
        """What `cache_latents` needs for these images, mirrored too where training mirrors them."""
        return {
            self.latent_key(index, flipped=flipped, rejected=rejected): (
                self.buckets[index],
                partial(self.pixels, index, flipped=flipped, rejected=rejected),
                self.data.names[index],
            )
            for index in indices
            for flipped in ((False, True) if self._settings.flip else (False,))
            for rejected in ((False, True) if self.data.paired else (False,))
        }

    def images(
        self,
        indices: Sequence[int],
        posterior: np.ndarray,
        *,
        flipped: Sequence[bool] | None = None,
        crop_keys: Sequence[CropKey] | None = None,
        hole_keys: Sequence[Key] | None = None,
    ) -> Arrays:
        """Images of one bucket: their latents where these are cached, otherwise their pixels and the noise to draw
        with; their hints and masks; their holes, those of `Holes.of_name` without `hole_keys`, and their pixels. Of pairs,
        those of the other image are `rejected_latents` or `rejected_images`."""
        mirrored = [False] * len(indices) if flipped is None else flipped
        keys = [None] * len(indices) if crop_keys is None else crop_keys
        others = self._sizes(indices, mirrored, keys) | self._hints(indices, mirrored, keys)
        others |= self._masks(indices, mirrored, keys) | self._holes(indices, mirrored, keys, hole_keys)
        found = self._images(indices, posterior, mirrored, keys)
        if self.data.paired:  # both drawn from their distributions with the same noise
            other = self._images(indices, posterior, mirrored, keys, rejected=True)
            found |= {f"rejected_{name}": rows for name, rows in other.items() if name != "posterior"}
        return found | others

    def _images(
        self,
        indices: Sequence[int],
        posterior: np.ndarray,
        flipped: Sequence[bool],
        crop_keys: Sequence[CropKey],
        *,
        rejected: bool = False,
    ) -> Arrays:
        rows, found = list(zip(indices, flipped, crop_keys, strict=True)), {"posterior": posterior}
        if self.latents is not None:
            keys = [self.latent_key(index, flipped=flip, rejected=rejected) for index, flip, _ in rows]
            found = {"latents": self.latents.sample(keys, posterior)}
        if self.latents is None or self.holes is not None:
            pixels = [self.pixels(index, flipped=flip, crop_key=key, rejected=rejected) for index, flip, key in rows]
            found["images"] = np.stack(pixels)
        return found

    def _sizes(
        self, indices: Sequence[int], flipped: Sequence[bool], crop_keys: Sequence[CropKey]
    ) -> Arrays:
        if not self.tells_sizes:
            return {}
        rows = [
            told_sizes(self.data.sizes[index], self.buckets[index], key, flipped=flip)
            for index, flip, key in zip(indices, flipped, crop_keys, strict=True)
        ]
        return {"sizes": np.array(rows, np.float32)}

    def hint(self, index: int, *, flipped: bool = False, crop_key: CropKey = None) -> np.ndarray:
        """The hint of an image as `pixels` gives the image, (H, W, 3) uint8."""
        assert self.hints is not None
        hint = self.hints.pixels(index, self.buckets[index], crop_key, partial(self.pixels, index, crop_key=crop_key))
        return np.ascontiguousarray(hint[:, ::-1] if flipped else hint)

    def _hints(self, indices: Sequence[int], flipped: Sequence[bool], crop_keys: Sequence[CropKey]) -> Arrays:
        if self.hints is None:
            return {}
        rows = zip(indices, flipped, crop_keys, strict=True)
        return {"hints": np.stack([self.hint(index, flipped=flip, crop_key=key) for index, flip, key in rows])}

    def _masks(self, indices: Sequence[int], flipped: Sequence[bool], crop_keys: Sequence[CropKey]) -> Arrays:
        if (masks := self.masks) is None:
            return {}
        rows = zip(indices, flipped, crop_keys, strict=True)
        weights = [(masks.weights(index, self.buckets[index], key, self._downscale), flip) for index, flip, key in rows]
        return {"masks": np.stack([row[..., ::-1] if flip else row for row, flip in weights])}

    def _holes(
        self,
        indices: Sequence[int],
        flipped: Sequence[bool],
        crop_keys: Sequence[CropKey],
        hole_keys: Sequence[Key] | None,
    ) -> Arrays:
        if (holes := self.holes) is None:
            return {}
        keys = list(hole_keys or [holes.of_name(self.data.names[index]) for index in indices])
        made = [
            holes.pixels(index, self.buckets[index], key, crop_key)[:, :: -1 if flip else 1]
            for index, flip, key, crop_key in zip(indices, flipped, keys, crop_keys, strict=True)
        ]
        return {"holes": np.stack(made)[:, None], "seen_noise": seen_noise(keys, self.latent_shape(indices[0]))}

    def text(self, captions: Sequence[str], chunks: int) -> Arrays:
        """Captions: their embeddings where these are cached, otherwise their token ids (n, chunks, L)."""
        rows = self.tokens.rows(captions, chunks)
        return {"tokens": rows} if self.texts is None else {"context": self.texts.embeddings(rows)}


class Batches:
    """Which images, captions, noise and timesteps each step trains on.

    Args:
        samples: the images.
        indices: those that are trained on; repeats come on top.
        seed: of the run.
        num_train_timesteps: of the noise schedule.
    """

    def __init__(
        self, samples: Samples, indices: np.ndarray, settings: DenoisingSection, seed: int, num_train_timesteps: int
    ) -> None:
        self._samples, self._settings, self._seed, self._timesteps = samples, settings, seed, num_train_timesteps
        self.indices = indices
        captions = row_key(*(samples.data.captions[index] for index in indices))
        self.fingerprint = f"{samples.data.fingerprint} of {len(indices)} images, captions {captions[:16]}"
        if samples.hints is not None:
            self.fingerprint += f", hints {samples.hints.fingerprint}"
        if samples.masks:
            self.fingerprint += f", masks {samples.masks.fingerprint}"
        if samples.holes is not None:
            self.fingerprint += ", with holes"
        if any(weight != 1 for weight in samples.data.weights):
            self.fingerprint += f", weights {row_key(*samples.data.weights)[:8]}"
        repeats = [samples.data.repeats[index] for index in indices]
        self._plan = BatchPlan([samples.buckets[index] for index in indices], settings.batch_size, seed, repeats)
        self._rules = settings.caption_rules

    def names(self, step: int) -> list[str]:
        """File names of the images of a step."""
        return [self._samples.data.names[index] for index in self._of(step)]

    def arrays(self, step: int, rows: range) -> Arrays:
        """See `DenoisingLoss.forward`."""
        settings, seed, samples = self._settings, self._seed, self._samples
        indices = self._of(step)
        captions = [
            choose(samples.data.captions[index], self._rules, seed=seed, step=step, row=row)
            for row, index in enumerate(indices)
        ]
        chunks = max(map(samples.tokens.chunks, captions))  # of the whole batch, however it is split
        indices, captions = indices[rows.start : rows.stop], captions[rows.start : rows.stop]
        shape = samples.latent_shape(indices[0])
        numbers, posterior, flipped = step_numbers(settings, seed, step, rows, shape, self._timesteps)
        crop_keys = [(seed, "crop", step, row) if settings.crop == "random" else None for row in rows]
        hole_keys = samples.holes and samples.holes.of_step(step, rows)
        return {
            **samples.images(indices, posterior, flipped=flipped, crop_keys=crop_keys, hole_keys=hole_keys),
            **samples.text(captions, chunks),
            "weights": np.array([samples.data.weights[index] for index in indices], np.float32),
            **numbers,
        }

    def _of(self, step: int) -> list[int]:
        _, places = self._plan.indices(step)
        return self.indices[places].tolist()


def step_numbers(
    settings: DenoisingSection,
    seed: int,
    step: int,
    rows: range,
    latent_shape: tuple[int, int, int],
    num_train_timesteps: int,
) -> tuple[Arrays, np.ndarray, list[bool]]:
    """What is drawn for the given rows of a step, besides crops and captions.

    Returns:
        `noise` (n, C, h, w) and `timesteps` (n,); noise (n, C, h, w) to draw latents with; which images are mirrored.
    """
    noise = normal((seed, "noise", step), rows, (2, *latent_shape))
    flipped = (uniform((seed, "flip", step), rows) < 0.5 * settings.flip).tolist()
    timesteps = draw_timesteps(
        (seed, "timesteps", step), rows, settings.batch_size, num_train_timesteps, settings.high_noise_share
    )
    return {"noise": diffusion_noise(noise[:, 1], settings, seed, step, rows), "timesteps": timesteps}, noise[:, 0], flipped
