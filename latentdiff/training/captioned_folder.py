"""Captioned folders: which images there are, what their captions say, and their pixels.

Two layouts are recognised: `metadata.jsonl` with `file_name` and `text` per line (the image folder of Hugging Face
datasets), or a `.txt` file of the same name beside each image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from latentdiff.errors import DataError
from latentdiff.files import atomic_path
from latentdiff.training.checkpoint import check_space
from latentdiff.training.data.images import read_image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class CaptionedFolder:
    """Images and captions, in the order of the metadata file or of the names."""

    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.folder / self.names[index]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or rewritten; captions do not matter. 16 hex digits."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            try:
                stat = self.path(index).stat()
            except OSError as error:
                raise DataError(
                    f"{self.path(index)} is named in the captions but cannot be read: {error.strerror}"
                ) from error
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def read_folder(folder: Path, *, limit: int | None = None) -> CaptionedFolder:
    """Find the images and captions in a folder; `limit` keeps the first so many.

    Raises:
        DataError: no folder, no images, or no captions; the message says what was looked for and what was there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"expected a folder of captioned images at {folder}, found {'a file' if folder.exists() else 'nothing'}"
        )
    pairs = list(_from_metadata(folder) if (folder / METADATA).is_file() else _from_sidecars(folder))[:limit]
    return CaptionedFolder(folder, tuple(name for name, _ in pairs), tuple(caption for _, caption in pairs))


def _from_metadata(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / METADATA
    found = False
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            found = True
            try:
                row = json.loads(line)
                name, caption = row["file_name"], row["text"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                expected = '{"file_name": ..., "text": ...}'
                raise DataError(f"{path} line {number}: expected {expected}, found {line[:60]!r}") from error
            if not isinstance(name, str) or not isinstance(caption, str):
                raise DataError(f"{path} line {number}: file_name and text must be strings, found {line[:60]!r}")
            yield name, caption
    if not found:
        raise DataError(f"{path} is empty; expected one line per image")


def _from_sidecars(folder: Path) -> Iterator[tuple[str, str]]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(
            f"no images in {folder}: looked for {METADATA} and for {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    missing = [path for path in images if not path.with_suffix(".txt").is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images in {folder} have no caption, the first is {missing[0].name}:"
            f" expected a {METADATA} or a .txt file beside each image"
        )
    for path in images:
        yield str(path.relative_to(folder)), path.with_suffix(".txt").read_text(encoding="utf-8").strip()


def load_image(path: Path, resolution: int) -> np.ndarray:
    """Read an image as training sees it: upright, transparency on white, scaled and centre-cropped, (R, R, 3) uint8.

    Raises:
        DataError: the file is not a readable image.
    """
    image = read_image(path, str(path))
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(image)


def decoded_images(data: CaptionedFolder, resolution: int, cache: Path, *, workers: int = 4) -> np.ndarray:
    """All images of a folder decoded once into one file below `cache`, memory-mapped, (n, R, R, 3) uint8.

    The file is keyed by the data, so that a changed folder gets a new one; a build that is cut off leaves nothing.
    """
    path = cache / f"images-{data.fingerprint}-{resolution}.npy"
    if not path.is_file():
        with atomic_path(path) as temporary:
            shape = (len(data), resolution, resolution, 3)
            # A full disk would kill the process while it writes to mapped memory.
            check_space(cache, math.prod(shape))
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            with ThreadPoolExecutor(workers) as pool:
                images = pool.map(lambda index: load_image(data.path(index), resolution), range(len(data)))
                for index, image in enumerate(
                    tqdm(images, desc="decode images", total=len(data), unit="img", leave=False)
                ):
                    array[index] = image
            array.flush()
            del array
    return np.load(path, mmap_mode="r")


class Prefetch:
    """Make items ahead of their use in background threads, in order.

    `make` must be a pure function of its key; an error in it is raised where the item is used.
    """

    def __init__(self, make: Callable[[Any], Any], keys: Iterable[Any], *, depth: int = 4, workers: int = 2) -> None:
        self._make, self._keys = make, iter(keys)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._waiting: list[Future] = []
        self._depth = depth

    def __iter__(self) -> Iterator[Any]:
        try:
            self._submit()
            while self._waiting:
                item = self._waiting.pop(0).result()
                self._submit()
                yield item
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        while len(self._waiting) < self._depth and (key := next(self._keys, None)) is not None:
            self._waiting.append(self._pool.submit(self._make, key))
