"""What tells whether training works: a held-out split, losses with fixed noise, the gap between them.

Everything here depends on the seed and on the images' keys alone, never on their number or order: when images are
added, those that were held out stay held out, and each keeps its noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentdiff.errors import DataError
from latentdiff.training.data.randomness import generator

# Parts of the range of timesteps whose losses are kept apart: a mean hides which noise levels improve.
BANDS = 5

# Errors per band and measurement below which a small held-out part is measured with several draws of noise per image.
_ERRORS_PER_BAND = 32
_MOST_DRAWS = 16

# errors_of(indices (n,), noise (n, 2, C, h, w) float32, timesteps (n,) int64) -> squared error of each sample, (n,).
# The images of one call have latents of one shape; noise[:, 0] is for the posterior, noise[:, 1] for the diffusion.
ErrorsOf = Callable[[np.ndarray, np.ndarray, np.ndarray], Tensor]


@dataclass(frozen=True)
class Split:
    """Indices of the images; `training_part` is as large as `held_out` and measured in the same way."""

    training: np.ndarray
    held_out: np.ndarray
    training_part: np.ndarray


def split(keys: Sequence[str], share: float, seed: int, most: int | None = None) -> Split:
    """Hold images out, fixed by the seed and each image's own key.

    Args:
        keys: names the images for ever: the file's name, or better a hash of its content; images of one key stay
            together.
        share: of the images, 0 to 1; 0 holds nothing out, more at least one image.
        most: measure no more than so many of the held-out images, those whose keys come first by hash.

    Raises:
        DataError: nothing would be left to train on.
    """
    places = np.array([_place(key, seed, "held out") for key in keys])
    out = places < share
    if share > 0 and len(keys) and not out.any():
        out = places == places.min()
    if out.all():
        raise DataError(
            f"all {len(keys)} images would be held out for validation; add images or set the validation share to 0"
        )
    training, held_out = np.flatnonzero(~out), np.flatnonzero(out)
    held_out = held_out[np.argsort(places[held_out], kind="stable")][:most]
    return Split(training, held_out, fixed_part(keys, training, len(held_out), seed))


def fixed_part(keys: Sequence[str], images: Sequence[int] | np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of up to `count` of the images, fixed by the seed and each image's own key."""
    images = np.asarray(images)
    places = np.array([_place(keys[index], seed, "training part") for index in images])
    return images[np.argsort(places, kind="stable")][:count]


def _place(key: str, seed: int, purpose: str) -> float:
    return float(generator(seed, purpose, key).random())


def banded_losses(
    images: Sequence[int] | np.ndarray,
    keys: Sequence[str],
    shape_of: Callable[[int], tuple[int, int, int]],
    errors_of: ErrorsOf,
    *,
    num_train_timesteps: int,
    seed: int,
    batch_size: int = 16,
) -> np.ndarray:
    """Mean losses of some images in each band of timesteps, (BANDS,); noise and timesteps are the same at every call.

    Each image has its own noise and, in each band, timesteps spread evenly from an offset of its own. Few images get
    several draws each, so that the mean does not hang on a handful of numbers.

    Args:
        images: indices, of `keys` and for `shape_of` and `errors_of`.
        shape_of: shape (C, h, w) of an image's latent.
        errors_of: see `ErrorsOf`; called with at most `batch_size` samples.
    """
    draws = min(_MOST_DRAWS, max(1, -(-_ERRORS_PER_BAND // max(1, len(images)))))
    by_shape: dict[Hashable, list[int]] = defaultdict(list)
    for image in images:
        by_shape[shape_of(int(image))].append(int(image))
    sums = np.zeros(BANDS)
    for shape, members in by_shape.items():
        samples = [(image, draw) for image in members for draw in range(draws)]
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            sums += _band_sums(batch, keys, shape, errors_of, draws, num_train_timesteps, seed)
    return sums / (len(images) * draws)


def _band_sums(
    batch: Sequence[tuple[int, int]],
    keys: Sequence[str],
    shape: tuple[int, int, int],
    errors_of: ErrorsOf,
    draws: int,
    num_train_timesteps: int,
    seed: int,
) -> np.ndarray:
    indices = np.array([image for image, _ in batch])
    noise = np.stack([_noise(keys[image], draw, shape, seed) for image, draw in batch])  # (n, 2, C, h, w)
    places = np.stack([_timestep_places(keys[image], draw, draws, seed) for image, draw in batch])  # (n, BANDS)
    timesteps = ((places + np.arange(BANDS)) / BANDS * num_train_timesteps).astype(np.int64)
    return np.array([float(errors_of(indices, noise, timesteps[:, band]).double().sum()) for band in range(BANDS)])


def _noise(key: str, draw: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return generator(seed, "validation noise", key, draw).standard_normal((2, *shape), dtype=np.float32)


def _timestep_places(key: str, draw: int, draws: int, seed: int) -> np.ndarray:
    """Places within the bands, each in [0, 1), (BANDS,)."""
    return (generator(seed, "validation timesteps", key).random(BANDS) + draw / draws) % 1


def losses_entry(
    held_out: np.ndarray, training_part: np.ndarray | None, num_train_timesteps: int, measure: str = "mse"
) -> dict[str, float]:
    """What the log says: means over the bands `val_mse` and `train_mse`, or of another measure, each band, and `gap`,
    held-out minus training."""
    entry = _entry("val", held_out, num_train_timesteps, measure)
    if training_part is not None:
        entry |= _entry("train", training_part, num_train_timesteps, measure)
        entry["gap"] = float(f"{held_out.mean() - training_part.mean():.5g}")
    return entry


def _entry(name: str, losses: np.ndarray, num_train_timesteps: int, measure: str) -> dict[str, float]:
    bounds = [band * num_train_timesteps // BANDS for band in range(BANDS + 1)]
    bands = {f"{name}_{low}_{high - 1}": loss for low, high, loss in zip(bounds[:-1], bounds[1:], losses, strict=True)}
    return {key: float(f"{value:.5g}") for key, value in {f"{name}_{measure}": losses.mean(), **bands}.items()}


def sample_prompts(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """Up to `count` different captions to make samples of, fixed by the seed and each caption alone."""
    return sorted(dict.fromkeys(captions), key=lambda caption: _place(caption, seed, "sample prompt"))[:count]
