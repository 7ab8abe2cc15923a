"""Whether samples are copies: the nearest training image of each, and whether it is suspiciously near.

Images are compared as 32x32 pixels, less their mean colour and scaled to length 1, so that brightness, tint,
contrast, compression and slight blur do not hide a copy; mirrored copies are looked for too. The distance of two such
vectors runs from 0 to 2. What is suspicious depends on the data: training images have a usual distance to the nearest
other one, and a sample that is nearer to a training image than half of that is flagged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from latentdiff.errors import DataError
from latentdiff.files import atomic_path
from latentdiff.image import open_image, save_png
from latentdiff.reading.json import read_object

SPACE = "32x32 pixels, less the mean colour and scaled to length 1; mirrored copies too"
FOLDER = "copying"  # in the run folder

_SIDE = 32
_NEAR = 0.5  # of the usual distance
_UNKNOWN_USUAL = 0.6  # taken as usual where there are too few images to measure it; copies reach about 0.2
_SAME = 0.02  # training images nearer than this are one image, kept twice
_CALIBRATION = 256  # training images whose distance to the nearest other is measured
_CHUNK = 256
_THUMBNAIL = 192  # pixels


@dataclass(frozen=True)
class Nearest:
    """One sample and its nearest training image.

    Args:
        sample: its file, relative to the run folder.
        training: name of the training image.
        thumbnail: file of a small version of that, relative to the run folder.
    """

    sample: str
    training: str
    thumbnail: str
    distance: float
    mirrored: bool
    suspicious: bool


@dataclass(frozen=True)
class CopyCheck:
    """What `check_copies` found; `usual` is the median distance of a training image to the nearest other one."""

    nearest: tuple[Nearest, ...]
    usual: float
    threshold: float
    compared: int
    training_images: int
    space: str = SPACE

    @property
    def suspicious(self) -> int:
        return sum(one.suspicious for one in self.nearest)


def check_copies(
    run: Path,
    samples: Sequence[Path],
    names: Sequence[str],
    load: Callable[[int], Image.Image],
    images: Sequence[int],
) -> CopyCheck:
    """Find the nearest training image of each sample; written to `copying/` in the run folder, for the report.

    Args:
        run: the run folder; the samples lie in it.
        names: of the training images, by index.
        load: gives a training image by index.
        images: the indices to compare with; for very large data, a part such as `validation.fixed_part` gives.

    Raises:
        DataError: an image cannot be read.
    """
    drawn = [open_image(path) for path in samples]
    found, usual = nearest_images(drawn, load, images)
    threshold = _NEAR * (usual or _UNKNOWN_USUAL)
    nearest = []
    for number, (path, (index, distance, mirrored)) in enumerate(zip(samples, found, strict=True)):
        small = load(index).convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        save_png(small, run / FOLDER / f"{number:02d}.png", metadata=False)
        nearest.append(
            Nearest(
                str(path.relative_to(run)), names[index], f"{FOLDER}/{number:02d}.png", round(distance, 3), mirrored,
                distance < threshold,
            )
        )  # fmt: skip
    check = CopyCheck(tuple(nearest), round(usual, 3), round(threshold, 3), len(images), len(names))
    with atomic_path(run / FOLDER / "copying.json") as temporary:
        temporary.write_text(json.dumps(asdict(check), indent=1) + "\n", encoding="utf-8")
    return check


def count_copies(samples: Sequence[Path], load: Callable[[int], Image.Image], images: Sequence[int]) -> int:
    """How many of the samples are suspiciously near a training image; as `check_copies`, but nothing is written."""
    found, usual = nearest_images([open_image(path) for path in samples], load, images)
    return sum(distance < _NEAR * (usual or _UNKNOWN_USUAL) for _, distance, _ in found)


def read_copy_check(run: Path) -> CopyCheck | None:
    """What `check_copies` wrote in a run folder, if it did."""
    path = run / FOLDER / "copying.json"
    if not path.is_file():
        return None
    values = read_object(path, DataError, remedy="delete it")
    return CopyCheck(**{**values, "nearest": tuple(Nearest(**one) for one in values["nearest"])})


def nearest_images(
    samples: Sequence[Image.Image], load: Callable[[int], Image.Image], images: Sequence[int]
) -> tuple[list[tuple[int, float, bool]], float]:
    """The nearest of `images` for each sample as (index, distance, mirrored), and the usual distance among them.

    The images are read once and not kept, so that memory does not grow with their number. The usual distance is 0 where
    there are too few different images to tell.
    """
    images = list(images)
    count = len(samples)
    calibration = images[:: max(1, len(images) // _CALIBRATION)][:_CALIBRATION]
    queries = np.stack(
        [features(image) for image in samples]
        + [features(ImageOps.mirror(image)) for image in samples]
        + [features(load(index)) for index in calibration]
    )  # (2 samples + calibration, d)
    best = np.full(len(queries), np.inf)
    which = np.zeros(len(queries), dtype=np.int64)
    for indices, chunk in _chunks(load, images):
        squared = (queries**2).sum(1)[:, None] + (chunk**2).sum(1) - 2 * queries @ chunk.T
        distances = np.sqrt(np.maximum(0.0, squared))  # (queries, chunk)
        itself = distances[2 * count :]
        itself[itself < _SAME] = np.inf
        nearest = distances.argmin(1)
        smallest = distances[np.arange(len(queries)), nearest]
        which = np.where(smallest < best, indices[nearest], which)
        best = np.minimum(best, smallest)
    others = best[2 * count :]
    usual = float(np.median(others[np.isfinite(others)])) if np.isfinite(others).any() else 0.0
    mirrored = best[count : 2 * count] < best[:count]
    rows = np.arange(count) + count * mirrored
    return [(int(which[row]), float(best[row]), bool(flip)) for row, flip in zip(rows, mirrored, strict=True)], usual


def _chunks(load: Callable[[int], Image.Image], images: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(images), _CHUNK):
            indices = images[start : start + _CHUNK]
            yield np.array(indices), np.stack(list(pool.map(lambda index: features(load(index)), indices)))


def features(image: Image.Image) -> np.ndarray:
    """The vector by which images are compared, (3 * 32 * 32,) float64; an image of one colour gives zeros."""
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float64) / 255.0
    values = (
        values - values.mean((0, 1))
    ).ravel()  # each channel by itself, or the background's colour would count most
    # Nearly uniform images must not have their noise blown up to full length.
    return values / max(float(np.linalg.norm(values)), 1.0)
