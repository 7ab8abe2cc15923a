"""The images of a data set, decoded once: squares in one file that is mapped into memory."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from latentdiff.files import atomic_path
from latentdiff.training.checkpoint import check_space
from latentdiff.training.data import Dataset
from latentdiff.training.data.transforms import prepare


def decoded_images(data: Dataset, resolution: int, cache: Path, *, workers: int = 4) -> np.ndarray:
    """All images, scaled and cropped to squares, memory-mapped, (n, R, R, 3) uint8.

    The file is keyed by the data, so that a changed folder gets a new one; a build that is cut off leaves nothing.

    Raises:
        DataError: an image cannot be read, or the disk is too full.
    """
    path = cache / f"images-{data.fingerprint}-{resolution}.npy"
    if not path.is_file():
        with atomic_path(path) as temporary:
            shape = (len(data), resolution, resolution, 3)
            # A full disk would kill the process while it writes to mapped memory.
            check_space(cache, math.prod(shape))
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            with ThreadPoolExecutor(workers) as pool:
                images = pool.map(lambda index: prepare(data.load(index), (resolution, resolution)), range(len(data)))
                for index, image in enumerate(tqdm(images, desc="decode images", total=len(data), leave=False)):
                    array[index] = image
            array.flush()
            del array
    return np.load(path, mmap_mode="r")
